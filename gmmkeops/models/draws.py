"""Random draws from a mixture, also within regions of its components."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmmkeops._checks import as_integer, as_shape
from gmmkeops.components import mind_fork
from gmmkeops.data import categorical, generator_on
from gmmkeops.models.densities import CHUNK
from gmmkeops.models.regions import radii, shell

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture

__all__ = ["sample"]


def sample(
    mixture: Mixture,
    sample_shape: Any = (),
    *,
    return_labels: bool = False,
    generator: torch.Generator | None = None,
    component: int | None = None,
    confidence: float | None = None,
    std_range: tuple[float, float] | None = None,
) -> Any:
    r"""Draw points, and optionally the component of each.

    Points within a region (``confidence`` or ``std_range``) are drawn exactly and without rejection: the whitened point is
    a uniformly distributed direction times a radius from the chi distribution with D degrees of freedom, truncated to the
    region. The time does not depend on the probability of the region.

    Args:
        sample_shape: Shape S of the sample: an int, or a sequence of ints.
        return_labels: Whether to return the components as well.
        generator: Random number generator. A generator on another device than the mixture only provides a seed. None uses
            torch's global generator, as all torch distributions do: two calls draw different points, and
            ``torch.manual_seed`` makes them reproducible.
        component: Draw from this component only.
        confidence: Draw within the ellipsoid that contains this probability of the component, in (0, 1].
        std_range: Draw at Mahalanobis distances from a to b of the mean of the component, given as (a, b); b may be infinite.

    Returns:
        Points (*S, *B, D), data units; with ``return_labels`` also components (*S, *B), int64.

    Raises:
        ValueError: The component does not exist, the region is empty, or its probability underflows float64.

    Example:
        >>> import torch, gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.5, 0.5], means=[[0.0], [9.0]], covariances=[1.0, 1.0], covariance_type="spherical")
        >>> x, labels = m.sample(5, return_labels=True, generator=torch.Generator().manual_seed(0))
        >>> x.shape, bool(((x[:, 0] > 4.5) == (labels == 1)).all())
        (torch.Size([5, 1]), True)
    """
    mind_fork()
    shape = as_shape(sample_shape)
    if component is not None:
        component = as_integer(component, "component", -mixture.n_components, mixture.n_components - 1)
    bounds = shell(confidence, std_range, mixture.n_features)
    generator = generator_on(generator, mixture.means.device)
    with torch.no_grad():
        labels = _labels(mixture, shape.numel(), component, generator)
        points = _moved(mixture, _noise(mixture, labels.numel(), bounds, generator), labels)
    points = points.reshape(mixture._extended_shape(shape))
    return (points, labels.reshape(*shape, *mixture.batch_shape)) if return_labels else points


def _labels(mixture: Mixture, count: int, component: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw components for ``count`` points of each mixture (count, number of mixtures)."""
    batch, K = mixture.batch_shape.numel(), mixture.n_components
    if component is not None or count * batch == 0:
        return torch.full((count, batch), (component or 0) % K, device=mixture.means.device)
    return categorical(mixture.weights.double().reshape(batch, K), count, generator).T


def _noise(mixture: Mixture, count: int, bounds: tuple[float, float], generator: torch.Generator | None) -> Tensor:
    """Draw standard normal vectors (count, D) whose norms are within bounds."""
    device, D = mixture.means.device, mixture.n_features
    draws = torch.randn(count, D, generator=generator, dtype=mixture.means.dtype, device=device)
    if bounds != (0.0, math.inf) and len(draws):
        uniform = torch.rand(count, 1, generator=generator, dtype=torch.float64, device=device)
        radius = radii(uniform, *bounds, D)
        draws = (draws.double() / draws.double().norm(dim=1, keepdim=True) * radius).to(draws.dtype)
    return draws


def _moved(mixture: Mixture, draws: Tensor, labels: Tensor) -> Tensor:
    """Transform whitened points, in place, to points (S · number of mixtures, D) of components (S, number of mixtures)."""
    count, batch = labels.shape
    K, D, leading = mixture.n_components, mixture.n_features, mixture.factor.leading
    first = torch.arange(batch, device=labels.device)
    index = (labels + K * first).reshape(-1)
    factor = mixture.factor.replace(**{n: t.flatten(0, -2) for n, t in mixture.factor.tensors.items()})
    which = index if leading == K else first.expand_as(labels).reshape(-1)
    means, rows = mixture.means.reshape(-1, D), max(1, CHUNK // (D * D))
    # Blocks limit the memory for the factors, which are converted to matrices.
    order = torch.arange(count * batch, device=labels.device).view(count, batch)
    for block in order.split(max(1, rows // K), 1) if len(draws) else ():
        begin = int(block[0, 0]) * leading
        mine = slice(begin, begin + block.shape[1] * leading)
        own = factor.replace(**{name: tensor[mine] for name, tensor in factor.tensors.items()})
        for part in block.reshape(-1).split(rows):
            draws[part] = means[index[part]] + own.unwhiten(draws[part], which[part] - begin)
    return draws
