r"""Penalties: what a fit adds to the mean negative log-likelihood, in nats per point.

A penalty is a function of a :class:`~gmmkeops.Mixture` in the user's units. Penalties add and scale,
``2 * SqrtWeights(20) + Dirichlet(2.0)``, and any callable that takes a mixture and returns a scalar is one. Priors are
densities of the parameters, so their share per point falls with the number of points N: a fit minimises

.. math:: -\frac1N \sum_n \log p(x_n) + \text{penalty}(\text{mixture}, N).

Bounds (:class:`EigenvalueFloor`) cost nothing and are enforced after every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_tensor
from gmmkeops.factors import Factor
from gmmkeops.mixture import Mixture

__all__ = [
    "Dirichlet",
    "EigenvalueFloor",
    "NormalInverseWishart",
    "Penalty",
    "PrecisionRidge",
    "SqrtWeights",
    "WeightEntropy",
    "as_penalty",
]


class Penalty(ABC):
    """A function of a mixture, in nats per point."""

    @property
    def bounds(self) -> bool:
        """Whether :meth:`project` may move a mixture."""
        return False

    @abstractmethod
    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        """The penalty of a mixture.

        Args:
            mixture: In the user's units.
            points: N, the total weight of the points that the fit sees; priors divide by it.

        Returns:
            A scalar, nats per point, differentiable in the mixture's parameters.
        """

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        """The nearest mixture within this penalty's bounds, and which components (K,) had to move; most have none."""
        return mixture, torch.zeros(mixture.components, dtype=torch.bool, device=mixture.means.device)

    def __add__(self, other: Any) -> Penalty:
        if other == 0:
            return self
        return _Sum((self, as_penalty(other))) if callable(other) else NotImplemented

    __radd__ = __add__

    def __mul__(self, factor: float) -> Penalty:
        return _Scaled(float(factor), self)

    __rmul__ = __mul__


def as_penalty(penalty: Penalty | Callable[[Mixture], Any]) -> Penalty:
    """A penalty from a penalty, or from any callable on a mixture.

    Raises:
        TypeError: It cannot be called.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if callable(penalty):
        return _Function(penalty)
    raise TypeError(f"penalty must be a Penalty or a function of a mixture, got {type(penalty).__name__}.")


@dataclass(frozen=True)
class _Sum(Penalty):
    parts: tuple[Penalty, ...]

    @property
    def bounds(self) -> bool:
        return any(part.bounds for part in self.parts)

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return sum((part(mixture, points) for part in self.parts), mixture.means.new_zeros(()))

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        moved = torch.zeros(mixture.components, dtype=torch.bool, device=mixture.means.device)
        for part in self.parts:
            mixture, hit = part.project(mixture)
            moved |= hit
        return mixture, moved


@dataclass(frozen=True)
class _Scaled(Penalty):
    factor: float
    part: Penalty

    @property
    def bounds(self) -> bool:
        return self.part.bounds

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return self.factor * self.part(mixture, points)

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        return self.part.project(mixture)


@dataclass(frozen=True)
class _Function(Penalty):
    function: Callable[[Mixture], Any]

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        value = self.function(mixture)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"a penalty must return a scalar tensor, got {got}; end it with .sum() or .mean().")
        return value


def _finite(name: str, value: float, least: float, *, strict: bool = False) -> None:
    ok = value > least if strict else value >= least
    if not (ok and value < float("inf")):
        bound = "greater than" if strict else "at least"
        raise ValueError(f"{name} must be finite and {bound} {least:g}, got {value!r}.")


@dataclass(frozen=True)
class SqrtWeights(Penalty):
    r"""Sparsity prior of the KeOps tutorial on the square roots of the weights.

    .. math:: \frac{s}{K} \sum_k \sqrt{W_k}

    Its slope grows without bound as a weight falls, so components that explain little die out and the rest share their
    weight; s = 0 does nothing, the tutorial takes 20.

    Args:
        strength: s >= 0, nats per point.

    Reference:
        KeOps documentation, *Fitting a Gaussian Mixture Model* (log-likelihood plus sparsity cost).

    Example:
        >>> import torch, gmmkeops as gk
        >>> even = gk.Mixture.from_parameters([0.25] * 4, torch.zeros(4, 1), torch.ones(4, 1), "diag")
        >>> float(gk.penalties.SqrtWeights(20)(even))
        10.0
    """

    strength: float

    def __post_init__(self) -> None:
        _finite("strength", self.strength, 0)

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return self.strength * (0.5 * mixture.log_weights).exp().mean()


@dataclass(frozen=True)
class WeightEntropy(Penalty):
    r"""Entropy of the weights, which falls as few components take all.

    .. math:: -s \sum_k W_k \log W_k

    A positive strength favours few components, a negative one even weights.

    Args:
        strength: s, dimensionless (the entropy is in nats).

    Reference:
        Brand 1999, *Structure learning in conditional probability models via an entropic prior*, Neural Computation 11.

    Example:
        >>> import torch, gmmkeops as gk
        >>> even = gk.Mixture.from_parameters([0.5, 0.5], torch.zeros(2, 1), torch.ones(2, 1), "diag")
        >>> round(float(gk.penalties.WeightEntropy(1.0)(even)), 4)
        0.6931
    """

    strength: float

    def __post_init__(self) -> None:
        _finite("strength", self.strength, -1e300)

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return -self.strength * (mixture.weights * mixture.log_weights).sum()


@dataclass(frozen=True)
class Dirichlet(Penalty):
    r"""Dirichlet prior on the weights, up to its normalising constant.

    .. math:: -\frac1N \sum_k (\alpha_k - 1) \log W_k

    Concentrations above one pull the weights together (and keep every component alive), below one apart; one is flat.

    Args:
        concentration: α > 0, one number or one per component (K,).

    Reference:
        Gelman et al. 2013, *Bayesian Data Analysis*, 3rd ed., §22.

    Example:
        >>> import torch, gmmkeops as gk
        >>> even = gk.Mixture.from_parameters([0.5, 0.5], torch.zeros(2, 1), torch.ones(2, 1), "diag")
        >>> round(float(gk.penalties.Dirichlet(2.0)(even, points=10)), 4)
        0.1386
    """

    concentration: Any

    def __post_init__(self) -> None:
        alpha = as_tensor(self.concentration, name="concentration")
        if alpha.ndim > 1 or not bool(((alpha > 0) & torch.isfinite(alpha)).all()):
            raise ValueError(
                f"concentration must be positive and finite, one number or (K,), got {self.concentration}."
            )

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        alpha = as_tensor(self.concentration, name="concentration").to(mixture.logits)
        if alpha.ndim == 1 and alpha.shape[0] != mixture.components:
            raise ValueError(
                f"concentration has {alpha.shape[0]} entries, the mixture {mixture.components} components."
            )
        return -((alpha - 1) * mixture.log_weights).sum() / points


@dataclass(frozen=True)
class NormalInverseWishart(Penalty):
    r"""Normal-inverse-Wishart prior on each component's mean and covariance, up to its normalising constant.

    .. math::

        \frac1N \sum_k \tfrac{\nu + D + 2}{2} \log |\Sigma_k| + \tfrac12 \mathrm{tr}(\Psi \Sigma_k^{-1})
        + \tfrac{\kappa}{2} (\mu_k - m)^\top \Sigma_k^{-1} (\mu_k - m)

    It pulls means to m as if by κ points there, and covariances to Ψ / (ν + D + 2); no covariance can collapse. A tied
    covariance counts once, with one mean term for each component.

    Args:
        mean: m (D,) or (K, D), data units.
        mean_precision: κ >= 0, in points.
        scale: Ψ (D, D), squared data units; a number means that multiple of the identity.
        degrees_of_freedom: ν > D - 1.

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
        _finite("mean_precision", self.mean_precision, 0)
        _finite("degrees_of_freedom", self.degrees_of_freedom, 0, strict=True)
        scale = as_tensor(self.scale, name="scale", dtype=torch.float64)
        if scale.ndim not in (0, 2) or (scale.ndim == 0 and not float(scale) > 0):
            raise ValueError(f"scale must be a positive number or a matrix (D, D), got {self.scale}.")
        if scale.ndim == 2 and int(torch.linalg.cholesky_ex(scale).info) > 0:
            raise ValueError("scale must be positive definite; add a small ridge to its diagonal.")

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        D = mixture.features
        if self.degrees_of_freedom <= D - 1:
            raise ValueError(f"degrees_of_freedom must exceed D - 1 = {D - 1}, got {self.degrees_of_freedom}.")
        like = mixture.means
        centre = as_tensor(self.mean, name="mean").to(like)
        psi = as_tensor(self.scale, name="scale").to(like)
        psi = psi * torch.eye(D, dtype=like.dtype, device=like.device) if psi.ndim == 0 else psi
        factor = mixture.factor
        U = factor.matrices()
        log_determinant = -(self.degrees_of_freedom + D + 2) * factor.log_determinant().sum()
        trace = 0.5 * (U * (psi @ U)).sum()
        pull = 0.5 * self.mean_precision * factor.whiten((like - centre).expand_as(like)).square().sum()
        return (log_determinant + trace + pull) / points


@dataclass(frozen=True)
class PrecisionRidge(Penalty):
    r"""Ridge on the precision factors, that is on the traces of the precision matrices.

    .. math:: \frac{s}{K} \sum_k \lVert U_k \rVert_F^2 = \frac{s}{K} \sum_k \mathrm{tr}\, \Sigma_k^{-1}

    It keeps covariances from shrinking: in effect 2 s / W_k is added to the variances of component k.

    Args:
        strength: s >= 0, squared data units times nats per point.

    Reference:
        Yuan and Lin 2007, *Model selection and estimation in the Gaussian graphical model*, Biometrika 94 (penalised
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


@dataclass(frozen=True)
class EigenvalueFloor(Penalty):
    r"""A bound: every eigenvalue of every covariance stays at or above a floor. It costs nothing.

    .. math:: \lambda_{\min}(\Sigma_k) \ge \text{minimum}

    After each step the covariances that fell below are replaced by the nearest ones (in Frobenius norm) that do not:
    their small eigenvalues are raised to the floor.

    Args:
        minimum: Least eigenvalue, squared data units.

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

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        factor, low = floor_eigenvalues(mixture.factor, self.minimum)
        if not bool(low.any()):
            return mixture, low.expand(mixture.components)
        return Mixture(mixture.logits, mixture.means, factor, validate_args=False), low.expand(mixture.components)


@torch.no_grad()
def floor_eigenvalues(factor: Factor, minimum: float) -> tuple[Factor, Tensor]:
    """The factor with the covariances' eigenvalues raised to ``minimum``, and which of them (K or 1,) were below."""
    ceiling = minimum**-0.5
    if factor.family != "full":
        log_diagonal = factor.tensors["log_diagonal"]
        limit = torch.tensor(ceiling, dtype=torch.float64).log().item()
        low = (log_diagonal > limit + 1e-12).any(-1)
        return (factor.replace(log_diagonal=log_diagonal.clamp(max=limit)), low) if bool(low.any()) else (factor, low)
    # Only factors whose Frobenius norm allows a large singular value are decomposed.
    U = factor.U
    low = U.square().sum((-1, -2)) > ceiling**2
    if bool(low.any()):
        suspects = low.nonzero()[:, 0]
        left, values, _ = torch.linalg.svd(U[suspects])
        over = values[:, 0] > ceiling * (1 + 1e-12)
        low[suspects] = over
        if bool(over.any()):
            A = left[over] * values[over].clamp(1e-10 * ceiling, ceiling)[:, None, :]
            index = suspects[over]
            fixed = type(factor).from_factors(A)
            if factor.leading == 1:
                return fixed, low
            return factor.scatter(index, fixed), low
    return factor, low
