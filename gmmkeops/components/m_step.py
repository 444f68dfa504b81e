r"""The M-step: parameters that maximize the expected log-likelihood for given sufficient statistics.

.. math::

    W_k = \frac{S^0_k + a_k}{\lambda + N c_k}, \qquad
    \mu_k = \frac{S^0_k m_k + \sum_i \kappa_i \mu_i}{S^0_k + \sum_i \kappa_i}, \qquad
    \Sigma_k = \frac{S^2_k + \Psi}{S^0_k + \nu} + \mathrm{ridge}

with the pseudo-counts of a :class:`Surrogate`. EM, k-means and initialization all call :func:`m_step`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops.components.base import Factor
from gmmkeops.components.moments import Moments
from gmmkeops.components.transfer import numbers

__all__ = ["Frozen", "MStep", "Surrogate", "m_step", "solve_weights"]


@dataclass(frozen=True)
class Surrogate:
    r"""Terms that penalties add to an M-step.

    The terms are N times an upper bound of each penalty that is equal to the penalty at the current mixture. Conjugate priors
    are pseudo-counts. Concave functions of the weights are bounded by their tangent at the current weights, with slopes
    :math:`c_k` (majorization-minimization).

    Args:
        counts: a (K,), pseudo-counts of the weights.
        slopes: c (K,), nats per point.
        means: Pairs (κ, μ) of a pseudo-count and the mean (D,) or (K, D) of its pseudo-points, data units.
        scatter: Scatter matrix Ψ (D, D) that is added to S2 of each covariance, squared data units; or None.
        degrees: Pseudo-count ν in the denominator of each covariance.
        degrees_per_component: Pseudo-count of each component; for a tied covariance, the denominator contains K of them.

    Reference:
        Hunter and Lange 2004, *A tutorial on MM algorithms*, The American Statistician 58.

    Example:
        >>> import torch, gmmkeops as gk
        >>> mixture = gk.Mixture(torch.zeros(2), torch.zeros(2, 1), gk.SphericalFactor(torch.zeros(2, 1), 1))
        >>> gk.penalties.Dirichlet(3.0).m_step(mixture, points=100.0).counts  # alpha - 1 pseudo-counts each
        tensor([2., 2.])
    """

    counts: Tensor
    slopes: Tensor
    means: tuple[tuple[float, Tensor], ...] = ()
    scatter: Tensor | None = None
    degrees: float = 0.0
    degrees_per_component: float = 0.0

    @classmethod
    def none(cls, mixture: Any) -> Surrogate:
        """Return a surrogate without additional terms for the components of a :class:`~gmmkeops.Mixture`."""
        zeros = mixture.means.new_zeros(mixture.n_components)
        return cls(zeros, zeros)

    def select(self, index: Tensor) -> Surrogate:
        """Select the terms of some components."""
        return replace(
            self,
            counts=self.counts[index],
            slopes=self.slopes[index],
            means=tuple((points, mean[index] if mean.ndim == 2 else mean) for points, mean in self.means),
        )

    def spread_about(self, means: Tensor, kind: type[Factor]) -> Tensor:
        """Compute the second moments Σ_i κ_i (μ - μ_i)(μ - μ_i)ᵀ (K, ...) of the pseudo-points about means μ (K, D)."""
        zero = means.new_zeros(len(means), *kind.spread_shape(means.shape[1]))
        return sum((points * kind.outer(means - mean) for points, mean in self.means), zero)

    def counted_in(self, unit: float) -> Surrogate:
        """Convert pseudo-counts from points to multiples of a unit; slopes, which are per point, are unchanged."""
        return replace(self * (1 / unit), slopes=self.slopes)

    def __add__(self, other: Surrogate) -> Surrogate:
        scatter = other.scatter if self.scatter is None else self.scatter
        if self.scatter is not None and other.scatter is not None:
            scatter = self.scatter + other.scatter
        return Surrogate(
            self.counts + other.counts,
            self.slopes + other.slopes,
            self.means + other.means,
            scatter,
            self.degrees + other.degrees,
            self.degrees_per_component + other.degrees_per_component,
        )

    def __mul__(self, factor: float) -> Surrogate:
        return Surrogate(
            factor * self.counts,
            factor * self.slopes,
            tuple((factor * points, mean) for points, mean in self.means),
            None if self.scatter is None else factor * self.scatter,
            factor * self.degrees,
            factor * self.degrees_per_component,
        )


@dataclass(frozen=True)
class Frozen:
    """Boolean masks (K,) of the components whose weight, mean or covariance an M-step does not change; None for no component."""

    weights: Tensor | None = None
    means: Tensor | None = None
    covariances: Tensor | None = None

    def select(self, index: Tensor) -> Frozen:
        """Select the masks of some components."""
        masks = (self.weights, self.means, self.covariances)
        return Frozen(*(None if mask is None else mask[index] for mask in masks))


@dataclass(frozen=True)
class MStep:
    """Result of an M-step.

    Args:
        log_weights: Log-weights (K,), nats.
        means: Means (K, D).
        factor: Precision factors of the covariances.
        repaired: Boolean mask (K,) of components whose singular covariance was regularized.
        counts: Expected count of each covariance (K,), or (1,) when tied, pseudo-counts included.
    """

    log_weights: Tensor
    means: Tensor
    factor: Factor
    repaired: Tensor
    counts: Tensor


def m_step(
    sums: Moments,
    log_weights: Tensor,
    means: Tensor,
    factor: Factor,
    prior: Surrogate,
    *,
    mass: float,
    frozen: Frozen,
    ridge: Tensor,
    floor: float,
    tied: bool = False,
    pruned: tuple[float, Tensor] | None = None,
) -> MStep:
    """Maximize the expected log-likelihood for given sufficient statistics and pseudo-counts.

    Args:
        sums: Moments of the components about any centers. Moments of a part of the points are scaled to ``mass``.
        log_weights, means, factor: Current parameters (K,), (K, D), K or 1. Frozen and empty components keep them.
        prior: Pseudo-counts.
        mass: Total weight N of all points.
        frozen: Parameters that do not change.
        ridge: Constants (D,) that are added to the variances of the columns, squared data units.
        floor: Smallest variance, squared data units.
        tied: Whether all components share one covariance.
        pruned: Pseudo-count and second moments (1, ...) that pruned components contribute to a tied covariance, or None.

    Returns:
        The new parameters. A component without expected count keeps its covariance.
    """
    kind, features = type(factor), means.shape[1]
    scale = mass / float(sums.mass)
    S0, new = sums.S0 * scale, sums.means
    kappa = sum(points for points, _ in prior.means)
    if kappa:
        pulled = sum((points * mean for points, mean in prior.means), torch.zeros_like(new))
        new = (S0[:, None] * new + pulled) / (S0 + kappa).clamp(min=1e-300)[:, None]
    if frozen.means is not None:
        new = torch.where(frozen.means[:, None], means, new)
    scatter = sums.recenter(new).S2 * scale
    if kappa:
        scatter = scatter + prior.spread_about(new, kind)
    counts = S0 + prior.degrees_per_component
    if tied:
        counts, scatter = counts.sum(0, keepdim=True), scatter.sum(0, keepdim=True)
        if pruned is not None:
            counts, scatter = counts + pruned[0], scatter + pruned[1]
    counts = counts + prior.degrees
    if prior.scatter is not None:
        scatter = scatter + kind.second_moments(prior.scatter)
    found, repaired = kind.maximize(scatter, counts, features, ridge=ridge, floor=floor)
    if len(counts) < len(means):
        kept = frozen.covariances is not None and bool(frozen.covariances.any())
        found, repaired = factor if kept else found, repaired.expand(len(means))
    else:
        keep = ~(counts > 1e-200)
        keep = keep if frozen.covariances is None else keep | frozen.covariances
        if bool(keep.any()):
            index = keep.nonzero()[:, 0]
            found = found.scatter(index, factor.select(index))
        repaired = repaired & ~keep
    weights = solve_weights(S0 + prior.counts, mass * prior.slopes, log_weights, frozen.weights)
    return MStep(weights, new, found, repaired, counts)


def solve_weights(counts: Tensor, slopes: Tensor, old: Tensor, frozen: Tensor | None = None) -> Tensor:
    """Solve W_k = counts_k / (λ + slopes_k) for log-weights (K,), where all weights sum to one and frozen ones are fixed.

    Args:
        counts: Expected counts (K,); negative ones count as zero.
        slopes: Slopes of a penalty of the weights (K,), times the number of points.
        old: Current log-weights (K,), nats.
        frozen: Boolean mask (K,); None for no component.
    """
    counts = counts.clamp(min=0)
    if frozen is not None and not bool(frozen.any()):
        frozen = None
    free = None if frozen is None else ~frozen
    if free is not None and not bool(free.any()):
        return old
    left = 1.0 if frozen is None else 1 - float(old[frozen].exp().sum())
    a, c = (counts, slopes) if free is None else (counts[free], slopes[free])
    some, equal = numbers((a > 0).any(), (c == c[0]).all())
    if not some or left <= 0:
        return old
    if equal:
        W = left * a / a.sum()
    else:
        # Bracket of λ: each term is at most the sum, and at least its value at the smallest slope.
        low, high = float((a / left - c)[a > 0].max()), float(a.sum() / left - c[a > 0].min())
        for _ in range(200):
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            if float((a / (middle + c))[a > 0].sum()) > left:
                low = middle
            else:
                high = middle
        W = torch.where(a > 0, a / (high + c), torch.zeros_like(a))
        W = left * W / W.sum()
    found = W.clamp(min=1e-300).log()
    if free is None:
        return found
    logits = old.clone()
    logits[free] = found
    return logits
