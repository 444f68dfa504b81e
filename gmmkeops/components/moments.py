r"""Sufficient statistics of the components, which are additive over data.

.. math::

    S^0_k = \sum_n r_{nk} \qquad
    S^1_k = \sum_n r_{nk}\,(x_n - m_k) \qquad
    S^2_k = \sum_n r_{nk}\,(x_n - m_k)(x_n - m_k)^\top, \qquad r_{nk} = g_n\, p(k \mid x_n)

Sums over minibatches, chunks and processes can be added. Sums about different centers :math:`m_k` are first converted to
common centers by the parallel-axis theorem.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmmkeops._checks import FormerName
from gmmkeops.components.transfer import transferred

if TYPE_CHECKING:
    from gmmkeops.components.base import Factor

__all__ = ["Moments", "like", "outer"]


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics: responsibility-weighted sums, about one center per component, in float64.

    Args:
        S0: Expected counts of the components (K,).
        S1: First moments (K, D), data units.
        S2: Second moments: (K, D, D) full, (K, D) their diagonal, or (K,) their trace; squared data units.
        centers: Centers of S1 and S2 (K, D), data units.
        total: Weighted log-likelihood :math:`\\sum_n g_n \\ell_n`, nats, scalar.
        mass: Total weight of the points :math:`\\sum_n g_n`, scalar.

    Reference:
        Chan, Golub and LeVeque 1983, *Algorithms for computing the sample variance*, The American Statistician 37.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> parameters = torch.zeros(1), torch.zeros(1, 2), gk.DiagonalFactor(torch.zeros(1, 2))
        >>> whole = gk.reductions.moments(x, *parameters)
        >>> parts = gk.reductions.moments(x[:300], *parameters) + gk.reductions.moments(x[300:], *parameters)
        >>> torch.allclose(whole.S2, parts.S2, rtol=1e-12)
        True
    """

    S0: Tensor
    S1: Tensor
    S2: Tensor
    centers: Tensor
    total: Tensor
    mass: Tensor

    def __post_init__(self) -> None:
        components, features = self.centers.shape
        shapes = {(components, features, features), (components, features), (components,)}
        if (
            self.S0.shape != (components,)
            or self.S1.shape != (components, features)
            or tuple(self.S2.shape) not in shapes
        ):
            raise ValueError(
                f"moments about centers {tuple(self.centers.shape)} must be S0 (K,), S1 (K, D) and S2 (K, D, D), (K, D) "
                f"or (K,), got {tuple(self.S0.shape)}, {tuple(self.S1.shape)} and {tuple(self.S2.shape)}."
            )

    centres = FormerName("centers")
    recentre = FormerName("recenter")

    def recenter(self, centers: Tensor) -> Moments:
        """Convert the moments to other centers (K, D) by the parallel-axis theorem."""
        centers = centers.to(self.centers)
        if centers.shape != self.centers.shape:
            raise ValueError(f"centers must have shape {tuple(self.centers.shape)}, got {tuple(centers.shape)}.")
        shift = centers - self.centers
        S0 = self.S0
        S1 = self.S1 - S0[:, None] * shift
        if self.S2.ndim == 3:
            cross = self.S1[:, :, None] * shift[:, None, :]
            S2 = self.S2 - cross - cross.mT + S0[:, None, None] * shift[:, :, None] * shift[:, None, :]
        elif self.S2.ndim == 2:
            S2 = self.S2 - 2 * self.S1 * shift + S0[:, None] * shift**2
        else:
            S2 = self.S2 - 2 * (self.S1 * shift).sum(-1) + S0 * (shift**2).sum(-1)
        return Moments(S0, S1, S2, centers, self.total, self.mass)

    @classmethod
    def nothing(cls, centers: Tensor, kind: type[Factor]) -> Moments:
        """Return the moments of an empty data set about centers (K, D), for components of a family."""
        K, D = centers.shape
        zero = torch.zeros((), dtype=torch.float64, device=centers.device)
        S2 = zero.expand(K, *kind.spread_shape(D))
        return cls(zero.expand(K), zero.expand(K, D), S2, centers.detach(), zero, zero)

    @classmethod
    def expected(cls, weights: Tensor, means: Tensor, factor: Factor) -> Moments:
        """Compute the expected moments of one point of a mixture with weights (K,), means (K, D) and precision factors."""
        K, zero = len(weights), means.new_zeros(())
        S2 = factor.second_moments(factor.covariances().expand(K, -1, -1))
        S2 = weights.reshape(-1, *[1] * (S2.ndim - 1)) * S2
        return cls(weights, torch.zeros_like(means), S2, means, zero, zero + 1)

    def blended(self, sums: Moments, rate: float) -> Moments:
        r"""Update a running average of the moments per point with the moments of a batch.

        .. math:: M \leftarrow (1 - \rho)\, M + \rho\, \bar M_{batch}, \qquad \rho_t = (t + t_0)^{-\kappa}

        References:
            Cappé and Moulines 2009, *On-line EM algorithm for latent data models*; for variational Bayes Hoffman, Blei, Wang and
            Paisley 2013, *Stochastic variational inference*.
        """
        return self * (1 - rate) + sums * (rate / float(sums.mass))

    def scaled(self, centers: Tensor, scale: Tensor) -> Moments:
        """Convert the moments to coordinates in which column d is multiplied by scale_d (D,) and the centers are ``centers``.

        Spherical moments, which are summed over the columns, need equal scales.
        """
        square = {3: scale[:, None] * scale, 2: scale**2, 1: scale[0] ** 2}[self.S2.ndim]
        return replace(self, S1=self.S1 * scale, S2=self.S2 * square, centers=centers)

    def to(self, device: torch.device) -> Moments:
        """Copy the moments to a device, in one transfer."""
        parts = self.S0, self.S1, self.S2, self.centers, self.total, self.mass
        if all(part.device == device for part in parts):
            return self
        return Moments(*transferred(parts, device))

    def select(self, index: Tensor) -> Moments:
        """Select the moments of some components, in the order of an index."""
        return replace(self, S0=self.S0[index], S1=self.S1[index], S2=self.S2[index], centers=self.centers[index])

    def __add__(self, other: Moments) -> Moments:
        """Add the moments of two data sets, about the centers of the first."""
        if not isinstance(other, Moments):
            return NotImplemented
        if other.S2.ndim != self.S2.ndim or other.centers.shape != self.centers.shape:
            raise ValueError(
                f"moments must have S2 of one shape to be added, got {tuple(self.S2.shape)} and {tuple(other.S2.shape)}; "
                "add moments of one model only."
            )
        if not torch.equal(other.centers, self.centers):
            other = other.recenter(self.centers)
        return Moments(
            self.S0 + other.S0,
            self.S1 + other.S1,
            self.S2 + other.S2,
            self.centers,
            self.total + other.total,
            self.mass + other.mass,
        )

    def __radd__(self, other: Any) -> Moments:
        """Support the built-in ``sum``, which starts from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: float) -> Moments:
        """Multiply the weight of every point by ``factor``."""
        return Moments(
            factor * self.S0,
            factor * self.S1,
            factor * self.S2,
            self.centers,
            factor * self.total,
            factor * self.mass,
        )

    __rmul__ = __mul__

    @property
    def means(self) -> Tensor:
        """Weighted mean of each component (K, D), data units; the center of a component with an expected count of zero."""
        return self.centers + self.S1 / _safe(self.S0)[:, None]

    @property
    def scatters(self) -> Tensor:
        """Weighted covariance of each component about its mean, in the shape of S2; zero for an expected count of zero."""
        about = self.recenter(self.means)
        return about.S2 / _safe(about.S0).reshape(-1, *[1] * (about.S2.ndim - 1))


def _safe(mass: Tensor) -> Tensor:
    return torch.where(mass == 0, torch.ones_like(mass), mass)


def outer(z: Tensor, ndim: int) -> Tensor:
    """Compute outer products of vectors z (K, D) as second moments of ``ndim`` dimensions; kept for code of version 0.1."""
    warnings.warn("outer is deprecated; use Factor.outer of a family.", DeprecationWarning, stacklevel=2)
    if ndim == 3:
        return z[:, :, None] * z[:, None, :]
    return z.square() if ndim == 2 else z.square().sum(-1)


def like(matrix: Tensor, ndim: int, *, mean: bool = False) -> Tensor:
    """Reduce a matrix (D, D) to second moments of ``ndim`` dimensions; kept for code of version 0.1."""
    warnings.warn("like is deprecated; use Factor.second_moments of a family.", DeprecationWarning, stacklevel=2)
    if ndim == 3:
        return matrix
    diagonal = matrix.diagonal()
    return diagonal if ndim == 2 else diagonal.mean() if mean else diagonal.sum()
