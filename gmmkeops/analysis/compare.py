r"""Monte Carlo estimates of divergences between mixtures, and merging of components by moment matching.

Divergences between mixtures of several components have no closed form; a sample from p gives an unbiased estimate and its
standard error. The closed form for two Gaussians is registered for ``torch.distributions.kl_divergence``. Reference:
Hershey and Olsen 2007, *Approximating the Kullback Leibler divergence between Gaussian mixture models*, ICASSP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal
from torch.distributions.kl import register_kl

from gmmkeops._checks import accepts, as_integer
from gmmkeops.components import DiagonalFactor, Factor, FullFactor
from gmmkeops.data import as_generator, listed
from gmmkeops.models import Mixture, as_mixture, log_weights

__all__ = ["Estimate", "jensen_shannon", "kl_divergence", "merge", "total_variation"]


_accepts = accepts(also={"random_state": "generator"}, wrong={"n_samples": "samples=", "num_samples": "samples="})


class Estimate(NamedTuple):
    """A Monte Carlo estimate and its standard error, in the unit of the estimated quantity.

    Args:
        value: The estimate.
        error: Standard error of the estimate.

    Example:
        >>> import gmmkeops as gk
        >>> p = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> gk.analysis.kl_divergence(p, p)
        Estimate(value=0.0, error=0.0)
    """

    value: float
    error: float


def _differences(p: Mixture, q: Mixture, samples: int, generator: torch.Generator) -> Tensor:
    """Draw from p and return log p - log q at the draws (samples,), nats."""
    for name, mixture in (("p", p), ("q", q)):
        as_mixture(mixture, name)
    if p.n_features != q.n_features:
        raise ValueError(f"both mixtures must have the same number of features, got {p.n_features} and {q.n_features}.")
    if p.columns is not None and q.columns is not None and p.columns != q.columns:
        raise ValueError(
            f"both mixtures must have the same columns, got {listed(p.columns)} and {listed(q.columns)}; use marginal to select "
            "and reorder columns."
        )
    samples = as_integer(samples, "samples", 2)
    with torch.no_grad():
        x = p.sample(samples, generator=generator)
        return p.log_prob(x).double() - q.log_prob(x).double()


def _estimate(values: Tensor) -> Estimate:
    """Compute the mean of samples and its standard error."""
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


@_accepts
def kl_divergence(
    p: Mixture, q: Mixture, *, samples: int = 100_000, generator: torch.Generator | int | None = None
) -> Estimate:
    r"""Estimate the Kullback-Leibler divergence :math:`\mathbb E_p[\log p - \log q]`, nats.

    Args:
        p, q: Mixtures with the same number of features.
        samples: Number of draws from p.
        generator: Random number generator, or a seed. None uses a fixed seed, so that results are reproducible.

    Returns:
        The estimate and its standard error, nats.

    Raises:
        TypeError: An argument is not a mixture.
        ValueError: The mixtures have different columns, or there are fewer than two samples.

    Reference:
        Hershey and Olsen 2007, *Approximating the Kullback Leibler divergence between Gaussian mixture models*, ICASSP.

    Example:
        >>> import torch, gmmkeops as gk
        >>> p = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> q = gk.Mixture.from_parameters([1.0], [[1.0]], [1.0], "spherical")
        >>> value, error = gk.analysis.kl_divergence(p, q, generator=torch.Generator().manual_seed(0))
        >>> abs(value - 0.5) < 5 * error
        True
    """
    return _estimate(_differences(p, q, samples, as_generator(generator, as_mixture(p, "p").means.device)))


@_accepts
def jensen_shannon(
    p: Mixture, q: Mixture, *, samples: int = 100_000, generator: torch.Generator | int | None = None
) -> Estimate:
    r"""Estimate the Jensen-Shannon divergence, from 0 to log 2 nats.

    .. math:: \tfrac12 \mathbb E_p\Bigl[\log \frac{2p}{p + q}\Bigr] + \tfrac12 \mathbb E_q\Bigl[\log \frac{2q}{p + q}\Bigr]

    It is the mean of the Kullback-Leibler divergences from p and from q to their average (p + q) / 2. Arguments, result and
    errors are as for :func:`kl_divergence`; half of the samples are drawn from each mixture.

    Reference:
        Lin 1991, *Divergence measures based on the Shannon entropy*, IEEE Transactions on Information Theory 37.

    Example:
        >>> import gmmkeops as gk
        >>> p = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> q = gk.Mixture.from_parameters([1.0], [[99.0]], [1.0], "spherical")
        >>> round(gk.analysis.jensen_shannon(p, q).value, 4)  # log 2, as they do not overlap
        0.6931
    """
    as_mixture(p, "p")
    samples = as_integer(samples, "samples", 2)
    generator, halves = as_generator(generator, p.means.device), []
    for a, b in ((p, q), (q, p)):
        difference = _differences(a, b, max(2, samples // 2), generator)
        # log a - log (a + b) / 2
        halves.append(math.log(2) - torch.nn.functional.softplus(-difference))
    errors = [_estimate(half) for half in halves]
    return Estimate(0.5 * sum(e.value for e in errors), 0.5 * math.hypot(*(e.error for e in errors)))


@_accepts
def total_variation(
    p: Mixture, q: Mixture, *, samples: int = 100_000, generator: torch.Generator | int | None = None
) -> Estimate:
    r"""Estimate the total variation distance :math:`\mathbb E_p[\max(0, 1 - q/p)]`, from 0 to 1.

    Arguments, result and errors are as for :func:`kl_divergence`; the distance has no unit.

    Example:
        >>> import gmmkeops as gk
        >>> p = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> q = gk.Mixture.from_parameters([1.0], [[99.0]], [1.0], "spherical")
        >>> gk.analysis.total_variation(p, q).value
        1.0
    """
    ratios = (-_differences(p, q, samples, as_generator(generator, as_mixture(p, "p").means.device))).exp()
    return _estimate((1 - ratios).clamp(min=0))


def merge(mixture: Mixture, groups: Sequence[Sequence[int]]) -> Mixture:
    r"""Replace each group of components by one component with the weight, mean and covariance of the group.

    .. math:: W = \sum_k W_k, \quad \mu = \sum_k \tfrac{W_k}{W} \mu_k, \quad
              \Sigma = \sum_k \tfrac{W_k}{W} (\Sigma_k + (\mu_k - \mu)(\mu_k - \mu)^\top)

    Args:
        mixture: A single mixture.
        groups: Disjoint lists of component indices. Other components are unchanged and follow the merged ones.

    Returns:
        A mixture with full covariances that has the same mean and covariance as ``mixture``.

    Raises:
        TypeError: The argument is not a mixture, or ``groups`` is not a list of lists.
        ValueError: A component does not exist, or is in two groups.

    Reference:
        Runnalls 2007, *Kullback-Leibler approach to Gaussian mixture reduction*, IEEE TAES 43.

    Example:
        >>> import gmmkeops as gk
        >>> two = gk.Mixture.from_parameters([0.5, 0.5], [[-1.0], [1.0]], [1.0, 1.0], "spherical")
        >>> gk.analysis.merge(two, [[0, 1]]).covariance_matrix.round(decimals=6).tolist()
        [[2.0]]
    """
    as_mixture(mixture)
    if not isinstance(groups, Iterable) or not all(isinstance(group, (list, tuple, range)) for group in groups):
        raise TypeError(f"groups must be a list of lists of components, got {groups!r}; pass for example [[0, 1]].")
    named = [as_integer(k, "each component in groups") for group in groups for k in group]
    if len(set(named)) < len(named) or not all(0 <= k < mixture.n_components for k in named) or not all(groups):
        raise ValueError(
            f"groups must be disjoint and not empty, with indices below {mixture.n_components}, got {groups}."
        )
    parts = [list(group) for group in groups] + [[k] for k in range(mixture.n_components) if k not in named]
    one = [mixture[part] for part in parts]
    weights = torch.stack([mixture.weights[part].sum() for part in parts])
    return Mixture(
        log_weights(weights),
        torch.stack([part.mean for part in one]),
        FullFactor.from_covariances(torch.stack([part.covariance_matrix for part in one])),
    ).named(mixture.columns)


def _gaussian(p: Distribution) -> Mixture:
    """Convert a Gaussian to a mixture of one component.

    Raises:
        NotImplementedError: The distribution is not a multivariate Gaussian, or is a mixture of several components.
    """
    if isinstance(p, Mixture):
        if p.n_components > 1:
            raise NotImplementedError(
                f"the divergence of a mixture of {p.n_components} components has no closed form; estimate it by sampling with "
                "gmmkeops.analysis.kl_divergence(p, q)."
            )
        return p
    if isinstance(p, (MultivariateNormal, LowRankMultivariateNormal)):
        mean, factor = p.loc, cast(Factor, FullFactor.from_cholesky(p.scale_tril.unsqueeze(-3)))
    elif isinstance(p, Independent) and isinstance(p.base_dist, Normal) and len(p.event_shape) == 1:
        mean, factor = p.base_dist.loc, DiagonalFactor(-p.base_dist.scale.log().unsqueeze(-2))
    else:
        raise NotImplementedError(
            "the divergence has a closed form only between mixtures of one component, MultivariateNormal and "
            f"Independent(Normal(...), 1), got {p}; estimate others by sampling with gmmkeops.analysis (gk.analysis)."
        )
    return Mixture(torch.zeros_like(mean[..., :1]), mean.unsqueeze(-2), factor, validate_args=False)


@register_kl(Mixture, Mixture)
@register_kl(Mixture, MultivariateNormal)
@register_kl(MultivariateNormal, Mixture)
@register_kl(Mixture, LowRankMultivariateNormal)
@register_kl(LowRankMultivariateNormal, Mixture)
@register_kl(Mixture, Independent)
@register_kl(Independent, Mixture)
def _closed_form(p: Distribution, q: Distribution) -> Tensor:
    r"""Compute the Kullback-Leibler divergence (*B) between Gaussians, nats.

    .. math:: \mathrm{KL}(p \,\|\, q) = \log \frac{|U_p|}{|U_q|}
              + \tfrac12 \bigl(\lVert U_q^\top L_p \rVert^2 + \lVert U_q^\top (\mu_p - \mu_q) \rVert^2 - D\bigr),
              \qquad L_p L_p^\top = \Sigma_p

    Raises:
        NotImplementedError: One of the distributions is not Gaussian.
        ValueError: The numbers of features differ, or the batches do not broadcast.
    """
    p, q = _gaussian(p), _gaussian(q)
    if p.n_features != q.n_features:
        raise ValueError(
            f"both distributions must have the same number of features, got {p.n_features} and {q.n_features}."
        )
    try:
        torch.broadcast_tensors(p.logits, q.logits)
    except RuntimeError:
        raise ValueError(
            f"batch shapes must broadcast, got {tuple(p.batch_shape)} and {tuple(q.batch_shape)}; expand one of them."
        ) from None
    wide = torch.promote_types(p.means.dtype, q.means.dtype)
    p, q = p.to(wide), q.to(wide)
    U, L = q.factor.matrices()[..., 0, :, :], p.factor.cholesky()[..., 0, :, :]
    shift = q.factor.whiten(p.means - q.means)
    squares = (U.mT @ L).square().sum((-1, -2)) + shift.square().sum((-1, -2))
    log_ratio = p.factor.log_determinant()[..., 0] - q.factor.log_determinant()[..., 0]
    return log_ratio + 0.5 * (squares - p.n_features)
