r"""Posterior probabilities (responsibilities) and labels of points.

.. math:: p(k \mid x) = \exp\bigl(\log p(x, k) - \log p(x)\bigr)

Far from all components the two logarithms are large, and their difference loses significant digits. For such points, the
log-odds of components are computed without subtracting squared distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops._checks import as_integer
from gmmkeops.components import concrete
from gmmkeops.data import Batch
from gmmkeops.models.densities import CHUNK, joint
from gmmkeops.models.kept import prepared
from gmmkeops.models.points import as_points_of, as_rows_of, check_range, examined, widened

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture

__all__ = ["predict", "responsibilities"]

# A log-density below minus this number, in nats per column, is so low that differences of exponents lose significant digits.
_DEPTH = {torch.float32: 1e2, torch.float64: 1e3}


def responsibilities(
    mixture: Mixture, value: Any, k: int | None = None, *, backend: str = "auto", truncate: float | None = None
) -> Any:
    """Compute the responsibilities p(k | x), the posterior probabilities of the components.

    Args:
        value: Points (*S, D), data units; without ``k`` also (*S, *B, D) for a batch of mixtures.
        k: Number of responsibilities per point, the largest ones; None for all K. The others are not stored.
        backend: Used with ``k``: ``"auto"``, ``"native"``, ``"keops"``, ``"triton"`` or ``"dense"``.
        truncate: Used with ``k``, as for :meth:`log_prob`.

    Returns:
        (*S, K), or (*S, *B, K) for a batch; with ``k`` the pair of probabilities (*S, k), in descending order, and
        components (*S, k), int64.

    Raises:
        TypeError, ValueError: As for :meth:`log_prob`; or k is not between 1 and K.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.5, 0.5], means=[[-1.0], [1.0]], covariances=[1.0, 1.0], covariance_type="spherical")
        >>> m.responsibilities([[0.0], [1.0]]).round(decimals=3).tolist()
        [[0.5, 0.5], [0.119, 0.881]]
    """
    if k is None:
        x, parameters = as_points_of(mixture, value), prepared(mixture)
        near, is_near = examined(mixture, x, parameters, check=mixture._validate_args)
        values = joint(mixture, near, parameters, is_near=is_near)
        if not is_near:
            check_range(mixture, values.amax(-1), x)
        if not _has_far(mixture, values):
            return torch.softmax(values, -1).to(x.dtype)
        return _log_posterior(mixture, values, near).exp().to(x.dtype)
    k = as_integer(
        k, "k", 1, mixture.n_components, clause=f"must be between 1 and the {mixture.n_components} components"
    )
    x, flat = as_rows_of(mixture, value)
    if not len(flat):
        return torch.softmax(joint(mixture, x), -1).topk(k)
    flat, _ = widened(mixture, flat)
    arranged = reductions.arrange(flat, mixture.n_components, truncate, sweeps=2)
    points = Batch(arranged) if isinstance(arranged, Tensor) else arranged
    arguments = (points, mixture.offsets.detach(), mixture.means.detach(), mixture.factor)
    exponents, indices = reductions.topk(*arguments, k, backend=backend)
    values = reductions.logsumexp(*arguments, backend=backend).detach()
    largest = (exponents - values[:, None]).exp()
    for rows, posterior in _far_rows(mixture, flat, values):
        found, indices[rows] = posterior.topk(k, -1)
        largest[rows] = found.exp().to(largest.dtype)
    shape = (*x.shape[:-1], k)
    return largest.to(x.dtype).reshape(shape), indices.reshape(shape)


def predict(mixture: Mixture, value: Any, *, backend: str = "auto", truncate: float | None = None) -> Tensor:
    """Return the index of the most probable component of each point.

    Args:
        value: Points (*S, D), data units.
        backend, truncate: As for :meth:`log_prob`. Truncation does not change the labels.

    Returns:
        (*S), int64.

    Raises:
        TypeError, ValueError: As for :meth:`log_prob`; or the mixture is a batch.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.5, 0.5], means=[[-1.0], [1.0]], covariances=[1.0, 1.0], covariance_type="spherical")
        >>> m.predict([[-3.0], [0.2]]).tolist()
        [0, 1]
    """
    x, flat = as_rows_of(mixture, value)
    if not len(flat):
        return joint(mixture, x).argmax(-1)
    parameters = prepared(mixture)
    flat, is_near = examined(mixture, flat, parameters, check=True)
    if is_near and parameters is not None:
        labels = parameters.argmax(flat, backend=backend, truncate=truncate)
    else:
        arguments = (Batch(flat), mixture.offsets, mixture.means, mixture.factor)
        exponents, indices = reductions.topk(*arguments, 1, backend=backend, truncate=truncate)
        labels = indices[:, 0]
        for rows, posterior in _far_rows(mixture, flat, exponents[:, 0]):
            labels[rows] = posterior.argmax(-1)
    return labels if x.ndim == 2 else labels.reshape(x.shape[:-1])


def _far(mixture: Mixture, values: Tensor) -> Tensor:
    """Return a mask of the log-densities so low that differences of log-densities lose digits."""
    return values < -_DEPTH[values.dtype] * mixture.n_features


def _has_far(mixture: Mixture, values: Tensor) -> bool:
    """Return whether the log-densities of a point, given its log p(x, k) (*S, *B, K), may be so low."""
    if not values.numel() or not concrete(values):
        return False
    return not values.detach().amax(-1).amin().item() >= -_DEPTH[values.dtype] * mixture.n_features


def _far_rows(mixture: Mixture, flat: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over blocks of rows whose log-densities (N,) are so low, with their log p(k | x), float64."""
    check_range(mixture, values, flat)
    far = _far(mixture, values).nonzero()[:, 0]
    with torch.no_grad():
        for rows in far.split(max(1, CHUNK // mixture.means.numel())) if len(far) else ():
            x = flat[rows].double()
            yield rows, _log_posterior(mixture, joint(mixture, x), x)


def _log_posterior(mixture: Mixture, values: Tensor, x: Tensor) -> Tensor:
    """Compute log p(k | x) (*S, *B, K) of points and their log p(x, k), accurate also far from all components."""
    posterior = torch.log_softmax(values, -1)
    if not _has_far(mixture, values):
        return posterior
    far = _far(mixture, values.detach().amax(-1)).reshape(-1, *mixture.batch_shape)
    rows = far.flatten(1).any(1).nonzero()[:, 0] if mixture.batch_shape else far.nonzero()[:, 0]
    if not len(rows):
        return posterior
    flat = posterior.reshape(*far.shape, -1)
    points = x.expand(*values.shape[:-1], mixture.n_features).reshape(*far.shape, -1)
    parts = rows.split(max(1, CHUNK // (mixture.means.numel() * mixture.n_features)))
    odds = torch.cat([_log_odds(mixture, points[part], flat[part].detach().argmax(-1)) for part in parts])
    return flat.index_copy(0, rows, torch.log_softmax(odds, -1).to(flat.dtype)).reshape(posterior.shape)


def _log_odds(mixture: Mixture, x: Tensor, best: Tensor) -> Tensor:
    r"""Compute log p(x, k) - log p(x, j) (n, *B, K), float64, of points (n, *B, D) and the components j = best (n, *B).

    The squared distances are not subtracted from each other: with :math:`y_k = U_k^\top (x - \mu_k)` and
    :math:`\delta = y_j - y_k = (U_j - U_k)^\top (x - \mu_j) + U_k^\top (\mu_k - \mu_j)`, half their difference is

    .. math:: \tfrac12 (|y_j|^2 - |y_k|^2) = \delta^\top (y_j - \delta / 2).
    """
    offsets, means = mixture.offsets.double(), mixture.means.double()
    factor = mixture.factor.to(torch.float64)
    U = factor.U.expand(*means.shape[:-1], *factor.U.shape[means.ndim - 1 :])

    def chosen(of: Tensor) -> Tensor:
        depth = of.ndim - offsets.ndim
        index = best.reshape(*best.shape, *[1] * (depth + 1))
        return torch.take_along_dim(of.expand(len(best), *of.shape), index, len(best.shape))

    z = x.double().unsqueeze(-2) - chosen(means)
    shift = factor.whiten(means - chosen(means))
    y, delta = factor.times(chosen(U), z), factor.times(chosen(U) - U, z) + shift
    # A sum of overflowing products can be NaN; the log-odds are then -inf.
    differences = (delta * (y - 0.5 * delta)).sum(-1)
    return offsets - chosen(offsets) + differences.masked_fill(differences.isnan(), -math.inf)
