"""Penalties and constraints on means and covariances."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops.components import Surrogate, as_tensor, check_finite
from gmmkeops.models import Mixture
from gmmkeops.penalties.penalty import Penalty
from gmmkeops.penalties.weights import _finite, _told

__all__ = [
    "CovariancePrior",
    "EigenvalueFloor",
    "InverseWishart",
    "NormalInverseWishart",
    "NormalMean",
    "PrecisionRidge",
]


@dataclass(frozen=True)
class NormalMean(Penalty):
    r"""Conjugate normal prior :math:`\mu_k \sim \mathcal N(m, \Sigma_k / \kappa)` on each mean, without its constant.

    .. math:: \frac1N \sum_k \tfrac{\kappa}{2} (\mu_k - m)^\top \Sigma_k^{-1} (\mu_k - m) + \tfrac12 \log |\Sigma_k|

    Its effect on a mean is that of κ additional points at m.

    Args:
        mean: Prior mean m (D,), or (K, D) with one per component, data units.
        mean_precision: Prior precision κ >= 0, as a number of points.

    Reference:
        Gelman et al. 2013, *Bayesian Data Analysis*, 3rd ed., §3.6.

    Example:
        >>> import torch, gmmkeops as gk
        >>> one = gk.Mixture.from_parameters([1.0], torch.zeros(1, 2), torch.ones(1, 2), "diag")
        >>> float(gk.penalties.NormalMean(torch.ones(2), 2.0)(one))
        2.0
    """

    mean: Any
    mean_precision: float

    def __post_init__(self) -> None:
        _finite("mean_precision", self.mean_precision, 0)
        check_finite(as_tensor(self.mean, name="mean"), name="mean", rows="entry")

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        residuals = (mixture.means - self._center(mixture)).expand_as(mixture.means)
        pull = 0.5 * self.mean_precision * mixture.factor.whiten(residuals).square().sum()
        return (pull - mixture.factor.log_determinant().expand(mixture.n_components).sum()) / points

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        pair = (float(self.mean_precision), self._center(mixture))
        return replace(Surrogate.none(mixture), means=(pair,), degrees_per_component=1.0)

    def _center(self, mixture: Mixture) -> Tensor:
        center = as_tensor(self.mean, name="mean").to(mixture.means)
        K, D = mixture.n_components, mixture.n_features
        if tuple(center.shape) not in {(), (D,), (K, D)}:
            raise ValueError(f"mean of the prior must have shape ({D},) or ({K}, {D}), got {tuple(center.shape)}.")
        return center


class _PseudoPoints(Penalty):
    """Base class of priors of the covariances that act as additional points, of the same number for each covariance."""

    @abstractmethod
    def _scatter(self, mixture: Mixture) -> Tensor:
        """Return the scatter matrix (D, D) of these points, squared data units."""

    @abstractmethod
    def _degrees(self, mixture: Mixture) -> float:
        """Return their number."""

    @property
    def constant(self) -> bool:
        return True

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        U = mixture.factor.matrices()
        log_determinant = -self._degrees(mixture) * mixture.factor.log_determinant().sum()
        return (log_determinant + 0.5 * (U * (self._scatter(mixture) @ U)).sum()) / points

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        return replace(Surrogate.none(mixture), scatter=self._scatter(mixture), degrees=self._degrees(mixture))


@dataclass(frozen=True)
class InverseWishart(_PseudoPoints):
    r"""Inverse-Wishart prior on each covariance, without its normalizing constant; a tied covariance counts once.

    .. math:: \frac1N \sum_k \tfrac{\nu + D + 1}{2} \log |\Sigma_k| + \tfrac12 \mathrm{tr}(\Psi \Sigma_k^{-1})

    Its effect on a covariance is that of ν + D + 1 additional points with the covariance Ψ / (ν + D + 1), so that no covariance
    becomes singular.

    Args:
        scale: Scale matrix Ψ (D, D), squared data units; a number is multiplied by the identity.
        degrees_of_freedom: Degrees of freedom ν > D - 1.

    Reference:
        Fraley and Raftery 2007, *Bayesian regularization for normal mixture estimation*, Journal of Classification 24.

    Example:
        >>> import torch, gmmkeops as gk
        >>> one = gk.Mixture.from_parameters([1.0], torch.zeros(1, 2), torch.ones(1, 2), "diag")
        >>> float(gk.penalties.InverseWishart(3.0, 4.0)(one))
        3.0
    """

    scale: Any
    degrees_of_freedom: float

    def __post_init__(self) -> None:
        _finite("degrees_of_freedom", self.degrees_of_freedom, 0, strict=True)
        _check_matrix("scale", self.scale)

    def _scatter(self, mixture: Mixture) -> Tensor:
        return _matrix("scale", self.scale, mixture)

    def _degrees(self, mixture: Mixture) -> float:
        D = mixture.n_features
        if self.degrees_of_freedom <= D - 1:
            raise ValueError(f"degrees_of_freedom must exceed D - 1 = {D - 1}, got {self.degrees_of_freedom}.")
        return self.degrees_of_freedom + D + 1


@dataclass(frozen=True)
class CovariancePrior(_PseudoPoints):
    r"""Pseudo-points that give each covariance the shape of a given one; a tied covariance counts once.

    .. math:: \frac1N \sum_k \tfrac{n}{2} \left( \log |\Sigma_k| + \mathrm{tr}(S\, \Sigma_k^{-1}) \right)

    Its effect on a covariance is that of n additional points with the covariance S. It is an inverse-Wishart prior with
    n - D - 1 degrees of freedom, which for small n is not a distribution, although its maximum exists.

    Args:
        covariance: Covariance S of the additional points (D, D), squared data units; a number is multiplied by the identity.
        points: Number n > 0 of additional points of each component.

    Reference:
        Fraley and Raftery 2007, *Bayesian regularization for normal mixture estimation*, Journal of Classification 24.

    Example:
        >>> import torch, gmmkeops as gk
        >>> one = gk.Mixture.from_parameters([1.0], torch.zeros(1, 2), torch.ones(1, 2), "diag")
        >>> float(gk.penalties.CovariancePrior(3.0, 4.0)(one))
        12.0
    """

    covariance: Any
    points: float

    @classmethod
    def from_valid(cls, covariance: Tensor, points: float) -> CovariancePrior:
        """Create a prior from a covariance (D, D) that is known to be symmetric and positive definite, without checks."""
        prior = object.__new__(cls)
        vars(prior).update(covariance=covariance, points=points)
        return prior

    def __post_init__(self) -> None:
        _finite("points", self.points, 0, strict=True)
        _check_matrix("covariance", self.covariance)

    def _scatter(self, mixture: Mixture) -> Tensor:
        return self.points * _matrix("covariance", self.covariance, mixture)

    def _degrees(self, mixture: Mixture) -> float:
        return float(self.points)


def _check_matrix(name: str, value: Any) -> None:
    """Raise a ValueError unless a value is a positive number or a positive definite matrix."""
    matrix = as_tensor(value, name=name, dtype=torch.float64)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not (square or (matrix.ndim == 0 and float(matrix) > 0)):
        raise ValueError(f"{name} must be a positive number or a matrix (D, D), got {_told(matrix)}.")
    check_finite(matrix, name=name)
    # Relative to the variances: covariances of uncorrelated columns are rounding errors.
    scale = matrix.diagonal().abs().sqrt() if square else matrix
    if square and bool(((matrix - matrix.mT).abs() > 1e-5 * scale * scale[:, None]).any()):
        raise ValueError(f"{name} must be symmetric, got an asymmetric matrix; symmetrize it with (S + S.T) / 2.")
    if square and int(torch.linalg.cholesky_ex(matrix).info) > 0:
        raise ValueError(
            f"{name} must be positive definite, got {_told(matrix)}; add a small constant to its diagonal."
        )


def _matrix(name: str, value: Any, mixture: Mixture) -> Tensor:
    """Return a matrix (D, D) for the features of a mixture; a number is multiplied by the identity."""
    matrix, D = as_tensor(value, name=name).to(mixture.means), mixture.n_features
    if matrix.ndim == 2 and matrix.shape != (D, D):
        raise ValueError(f"{name} of the prior must have shape ({D}, {D}), got {tuple(matrix.shape)}.")
    return matrix * torch.eye(D).to(matrix) if matrix.ndim == 0 else matrix


@dataclass(frozen=True)
class NormalInverseWishart(Penalty):
    r"""Normal-inverse-Wishart prior, the sum of :class:`NormalMean` and :class:`InverseWishart`.

    .. math::

        \frac1N \sum_k \tfrac{\nu + D + 2}{2} \log |\Sigma_k| + \tfrac12 \mathrm{tr}(\Psi \Sigma_k^{-1})
        + \tfrac{\kappa}{2} (\mu_k - m)^\top \Sigma_k^{-1} (\mu_k - m)

    Args:
        mean, mean_precision: As for :class:`NormalMean`.
        scale, degrees_of_freedom: As for :class:`InverseWishart`.

    Reference:
        Fraley and Raftery 2007, *Bayesian regularization for normal mixture estimation*, Journal of Classification 24.

    Example:
        >>> import torch, gmmkeops as gk
        >>> one = gk.Mixture.from_parameters([1.0], torch.zeros(1, 2), torch.ones(1, 2), "diag")
        >>> float(gk.penalties.NormalInverseWishart(torch.ones(2), 2.0, 3.0, 4.0)(one))
        5.0
    """

    mean: Any
    mean_precision: float
    scale: Any
    degrees_of_freedom: float

    def __post_init__(self) -> None:
        self._both()

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return self._both()(mixture, points)

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        return self._both().m_step(mixture, points)

    def _both(self) -> Penalty:
        return NormalMean(self.mean, self.mean_precision) + InverseWishart(self.scale, self.degrees_of_freedom)


@dataclass(frozen=True)
class PrecisionRidge(Penalty):
    r"""Ridge penalty on the precision factors, that is, on the traces of the precision matrices.

    .. math:: \frac{s}{K} \sum_k \lVert U_k \rVert_F^2 = \frac{s}{K} \sum_k \mathrm{tr}\, \Sigma_k^{-1}

    It prevents small variances. With EM, 2 s / (K W_k) is added to the variances of component k of weight W_k.

    Args:
        strength: Strength s >= 0, squared data units times nats per point.

    Reference:
        Yuan and Lin 2007, *Model selection and estimation in the Gaussian graphical model*, Biometrika 94 (penalized
        precisions).

    Example:
        >>> import torch, gmmkeops as gk
        >>> one = gk.Mixture.from_parameters([1.0], torch.zeros(1, 2), torch.full((1, 2), 0.5), "diag")
        >>> round(float(gk.penalties.PrecisionRidge(1.0)(one)), 4)
        4.0
    """

    strength: float

    def __post_init__(self) -> None:
        _finite("strength", self.strength, 0)

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return self.strength * mixture.factor.matrices().square().sum((-1, -2)).mean()

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        eye = torch.eye(mixture.n_features).to(mixture.means)
        return replace(Surrogate.none(mixture), scatter=2 * points * self.strength / mixture.factor.leading * eye)


@dataclass(frozen=True)
class EigenvalueFloor(Penalty):
    r"""Lower bound on the eigenvalues of all covariances, enforced as a constraint; the value of the penalty is zero.

    .. math:: \lambda_{\min}(\Sigma_k) \ge \text{minimum}

    After each step, covariances with smaller eigenvalues are replaced by the nearest ones (in Frobenius norm) that satisfy the
    bound: the smaller eigenvalues are set to ``minimum``.

    Args:
        minimum: Smallest allowed eigenvalue, squared data units.

    Reference:
        Ingrassia 2004, *A likelihood-based constrained algorithm for multivariate normal mixture models*, Statistical
        Methods & Applications 13.

    Example:
        >>> import torch, gmmkeops as gk
        >>> thin = gk.Mixture.from_parameters([1.0], torch.zeros(1, 2), torch.tensor([[1.0, 0.01]]), "diag")
        >>> bounded, moved = gk.penalties.EigenvalueFloor(0.25).project(thin)
        >>> bounded.factor.covariances().diagonal(dim1=1, dim2=2).tolist(), moved.tolist()
        ([[1.0, 0.25]], [True])
    """

    minimum: float

    def __post_init__(self) -> None:
        _finite("minimum", self.minimum, 0, strict=True)

    @property
    def bounds(self) -> bool:
        return True

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return mixture.means.new_zeros(())

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        return Surrogate.none(mixture)

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        factor, low = mixture.factor.floored(self.minimum)
        if not bool(low.any()):
            return mixture, low.expand(mixture.n_components)
        return Mixture(mixture.logits, mixture.means, factor, validate_args=False), low.expand(mixture.n_components)
