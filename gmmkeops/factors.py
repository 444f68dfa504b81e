r"""Factors: parameterisations of the precision factor :math:`U_k` with :math:`\Sigma_k^{-1} = U_k U_k^\top`.

Full factors are upper triangular with a positive diagonal, whose logarithm is stored; diagonal and spherical ones keep
the logarithm of :math:`1/\sigma`. The leading dimension is K, or 1 when all components share one covariance (tied).
Reference: the KeOps Gaussian-mixture tutorial (:math:`\Sigma^{-1} = AA^\top`); scikit-learn's ``precisions_cholesky_`` is
the same upper factor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from gmmkeops._checks import as_tensor, check_finite, concrete

__all__ = [
    "DiagonalFactor",
    "Factor",
    "FullFactor",
    "SphericalFactor",
    "factor_class",
]


class Factor(ABC):
    r"""A precision factor U of each component, :math:`\Sigma_k^{-1} = U_k U_k^\top`, or one for all (leading dimension 1).

    What :class:`FullFactor`, :class:`DiagonalFactor` and :class:`SphericalFactor` have in common; U is upper triangular, in
    1 / data units. Any number of batch dimensions may come before the leading one. The idea of storing factors of the
    precisions is that of the KeOps mixture tutorial.

    Example:
        >>> import torch, gmmkeops as gk
        >>> factor = gk.FullFactor.from_covariances(torch.tensor([[[4.0, 0.0], [0.0, 1.0]]]).double())
        >>> isinstance(factor, gk.Factor), factor.log_determinant().exp()  # |det U|
        (True, tensor([0.5000], dtype=torch.float64))
        >>> factor.whiten(torch.tensor([[2.0, 1.0]]).double())
        tensor([[1., 1.]], dtype=torch.float64)
    """

    family: ClassVar[str]
    features: int

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored, unconstrained parameters by name; each (*B, K or 1, ...)."""

    @abstractmethod
    def replace(self, **tensors: Tensor) -> Factor:
        """The same kind of factor over other parameters."""

    @property
    @abstractmethod
    def U(self) -> Tensor:
        """The factor itself, (*B, K or 1, D, D) full, (*B, K or 1, D) diagonal, (*B, K or 1, 1) spherical; 1 / data units."""

    @abstractmethod
    def whiten(self, residuals: Tensor) -> Tensor:
        """U_kᵀ z for residuals z (*B, K, D), data units; returns (*B, K, D), unitless."""

    @abstractmethod
    def unwhiten(self, noise: Tensor, labels: Tensor) -> Tensor:
        """U_kᵀ⁻¹ y for rows y (S, D) that belong to components ``labels`` (S,); returns (S, D), data units."""

    @abstractmethod
    def covariances(self) -> Tensor:
        """Covariance matrices in dense form (*B, K or 1, D, D), squared data units."""

    @abstractmethod
    def rescale(self, scale: Tensor) -> Factor:
        """The factor in coordinates x / scale, with scale (D,); spherical factors need all entries of it equal."""

    @classmethod
    @abstractmethod
    def from_factors(cls, factors: Any, features: int | None = None) -> Factor:
        """From any A with Σ⁻¹ = A Aᵀ, in the shapes that ``U`` returns."""

    @classmethod
    @abstractmethod
    def from_covariances(cls, covariances: Any, features: int | None = None) -> Factor:
        """From covariances: (*B, K or 1, D, D) full, variances (*B, K or 1, D) diagonal, (*B, K or 1) spherical."""

    @classmethod
    @abstractmethod
    def from_precisions(cls, precisions: Any, features: int | None = None) -> Factor:
        """From precisions (inverse covariances), in the shapes of :meth:`from_covariances`."""

    @classmethod
    @abstractmethod
    def from_cholesky(cls, cholesky: Any, features: int | None = None) -> Factor:
        """From lower Cholesky factors of the covariances (full), or standard deviations (diagonal, spherical)."""

    @classmethod
    @abstractmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        """Number of free parameters."""

    @property
    def _log_diagonal(self) -> Tensor:
        return self.tensors["log_diagonal"]

    @property
    def leading(self) -> int:
        """K, or 1 when tied."""
        return self._log_diagonal.shape[-2]

    @property
    def batch_shape(self) -> torch.Size:
        """Batch dimensions before the leading one."""
        return self._log_diagonal.shape[:-2]

    @property
    def dtype(self) -> torch.dtype:
        return self._log_diagonal.dtype

    @property
    def device(self) -> torch.device:
        return self._log_diagonal.device

    def log_determinant(self) -> Tensor:
        """log |det U_k| (*B, K or 1), nats."""
        return self._log_diagonal.sum(-1)

    def largest(self) -> Tensor:
        """The largest size of an entry of any factor, a scalar; 1 / data units."""
        return self._log_diagonal.amax().exp()

    def precisions(self) -> Tensor:
        """Precision matrices in dense form (*B, K or 1, D, D), 1 / squared data units."""
        U = self.matrices()
        return U @ U.mT

    def precision_diagonals(self) -> Tensor:
        """Diagonals of the precision matrices (*B, K or 1, D), 1 / squared data units."""
        return self.U.square().expand(*self.U.shape[:-1], self.features)

    def matrices(self) -> Tensor:
        """The factor in dense form (*B, K or 1, D, D), 1 / data units."""
        return torch.diag_embed(self.U.expand(*self.U.shape[:-1], self.features))

    def cholesky(self) -> Tensor:
        """Dense lower-triangular Cholesky factors of the covariances (*B, K or 1, D, D), data units."""
        return torch.diag_embed(1 / self.U.expand(*self.U.shape[:-1], self.features))

    def select(self, index: Tensor) -> Factor:
        """The factors of some components (a tied factor stays as it is)."""
        if self.leading == 1:
            return self
        return self.replace(**{name: tensor[..., index, :] for name, tensor in self.tensors.items()})

    def scatter(self, index: Tensor, source: Factor) -> Factor:
        """This factor with the components ``index`` taken from ``source`` (differentiable in the source)."""
        if self.leading == 1:
            return source
        mine, theirs = self.tensors, source.tensors
        return self.replace(**{name: mine[name].index_copy(-2, index, theirs[name]) for name in mine})

    def to(self, *args: Any, **kwargs: Any) -> Factor:
        """Moves or casts the stored tensors, as :meth:`torch.Tensor.to`."""
        return self.replace(**{name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()})

    def detach(self) -> Factor:
        """The same factor outside any autograd graph, in its own memory."""
        return self.replace(**{name: tensor.detach().clone() for name, tensor in self.tensors.items()})

    def expand(self, batch_shape: Any) -> Factor:
        """The same factor for a larger batch, without a copy."""
        return self.replace(
            **{name: tensor.expand(*batch_shape, *tensor.shape[-2:]) for name, tensor in self.tensors.items()}
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(leading={self.leading}, features={self.features}, dtype={self.dtype})"


class FullFactor(Factor):
    r"""Upper-triangular factors, :math:`\Sigma_k^{-1} = U_k U_k^\top`, any covariance.

    Args:
        log_diagonal: Logarithm of the diagonal of U (*B, K or 1, D).
        upper: Entries above the diagonal, row by row (*B, K or 1, D(D-1)/2), 1 / data units; zeros if left out.

    Raises:
        ValueError: By ``from_covariances`` and the like: shapes that do not fit, matrices that are not positive definite.

    Example:
        >>> import torch, gmmkeops as gk
        >>> factor = gk.FullFactor.from_covariances(torch.tensor([[[4.0, 1.0], [1.0, 2.0]]]))
        >>> factor.covariances().round(decimals=4).tolist()
        [[[4.0, 1.0], [1.0, 2.0]]]
    """

    family = "full"

    def __init__(self, log_diagonal: Tensor, upper: Tensor | None = None) -> None:
        self.log_diagonal = log_diagonal = _stored(log_diagonal, "log_diagonal")
        self.features = log_diagonal.shape[-1]
        pairs = self.features * (self.features - 1) // 2
        self.upper = (
            log_diagonal.new_zeros(*log_diagonal.shape[:-1], pairs) if upper is None else _stored(upper, "upper")
        )
        if self.upper.shape != (*log_diagonal.shape[:-1], pairs):
            raise ValueError(
                f"upper must have shape {(*log_diagonal.shape[:-1], pairs)} for log_diagonal "
                f"{tuple(log_diagonal.shape)}, got {tuple(self.upper.shape)}."
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"log_diagonal": self.log_diagonal, "upper": self.upper}

    def replace(self, **tensors: Tensor) -> FullFactor:
        return FullFactor(**tensors)

    @property
    def U(self) -> Tensor:
        D = self.features
        row, column = torch.triu_indices(D, D, 1, device=self.device)
        diagonal = torch.diag_embed(self.log_diagonal.exp())
        return diagonal.flatten(-2).index_add(-1, row * D + column, self.upper).unflatten(-1, (D, D))

    def matrices(self) -> Tensor:
        return self.U

    def largest(self) -> Tensor:
        parts = [super().largest()]
        if self.upper.numel():
            parts += [self.upper.amax(), -self.upper.amin()]
        return torch.stack(parts).amax()

    def precision_diagonals(self) -> Tensor:
        return self.U.square().sum(-1)

    def whiten(self, residuals: Tensor) -> Tensor:
        return (self.U.mT @ residuals.unsqueeze(-1)).squeeze(-1)

    def unwhiten(self, noise: Tensor, labels: Tensor) -> Tensor:
        cholesky = self.cholesky()
        if self.leading == 1:
            return noise @ cholesky[0].mT
        return (cholesky[labels] @ noise.unsqueeze(-1)).squeeze(-1)

    def cholesky(self) -> Tensor:
        eye = torch.eye(self.features, dtype=self.dtype, device=self.device).expand(
            *self.log_diagonal.shape, self.features
        )
        return torch.linalg.solve_triangular(self.U, eye, upper=True).mT

    def covariances(self) -> Tensor:
        L = self.cholesky()
        return L @ L.mT

    def rescale(self, scale: Tensor) -> FullFactor:
        row = torch.triu_indices(self.features, self.features, 1, device=self.device)[0]
        return FullFactor(self.log_diagonal + scale.log(), self.upper * scale[row])

    @classmethod
    def from_factors(cls, factors: Any, features: int | None = None) -> FullFactor:
        given = _square(factors, "factors")
        A = given.double()
        # A = R Q with R upper triangular, so A Aᵀ = R Rᵀ: a QR of the row-reversed transpose.
        _, R = torch.linalg.qr(A.flip(-2).mT)
        U = R.mT.flip(-1, -2)
        U = U * torch.where(U.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
        return cls._of_matrix(U, "factors", given.dtype)

    @classmethod
    def from_covariances(cls, covariances: Any, features: int | None = None) -> FullFactor:
        given = _square(covariances, "covariances")
        # In float64 throughout: the errors of a Cholesky factorization grow with the condition number.
        return cls._of_cholesky(_cholesky(given.double(), "covariances"), given.dtype)

    @classmethod
    def from_precisions(cls, precisions: Any, features: int | None = None) -> FullFactor:
        given = _square(precisions, "precisions")
        P = given.double()
        # The upper factor of P is the reversed lower Cholesky factor of the reversed P.
        return cls._of_matrix(_cholesky(P.flip(-1, -2), "precisions").flip(-1, -2), "precisions", given.dtype)

    @classmethod
    def from_cholesky(cls, cholesky: Any, features: int | None = None) -> FullFactor:
        given = _square(cholesky, "cholesky")
        return cls._of_cholesky(given.double(), given.dtype)

    @classmethod
    def _of_cholesky(cls, L: Tensor, dtype: torch.dtype) -> FullFactor:
        _positive(L.diagonal(dim1=-2, dim2=-1), "the diagonals of cholesky")
        eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
        return cls._of_matrix(torch.linalg.solve_triangular(L, eye, upper=False).mT, "cholesky", dtype)

    @classmethod
    def _of_matrix(cls, U: Tensor, name: str, dtype: torch.dtype) -> FullFactor:
        diagonal = _positive(U.diagonal(dim1=-2, dim2=-1), f"the diagonals of the factors of {name}")
        row, column = torch.triu_indices(U.shape[-1], U.shape[-1], 1, device=U.device)
        return cls(diagonal.log().to(dtype), U[..., row, column].to(dtype))

    @classmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        return (1 if tied else components) * features * (features + 1) // 2


class DiagonalFactor(Factor):
    r"""Diagonal factors, :math:`U_k = \mathrm{diag}(1/\sigma_{k1}, \dots, 1/\sigma_{kD})`.

    Args:
        log_diagonal: :math:`-\log \sigma` (*B, K or 1, D).

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.DiagonalFactor.from_covariances(torch.tensor([[4.0, 0.25]])).U.tolist()
        [[0.5, 2.0]]
    """

    family = "diagonal"

    def __init__(self, log_diagonal: Tensor) -> None:
        self.log_diagonal = log_diagonal = _stored(log_diagonal, "log_diagonal")
        self.features = log_diagonal.shape[-1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"log_diagonal": self.log_diagonal}

    def replace(self, **tensors: Tensor) -> DiagonalFactor:
        return DiagonalFactor(**tensors)

    @property
    def U(self) -> Tensor:
        return self.log_diagonal.exp()

    def whiten(self, residuals: Tensor) -> Tensor:
        return self.U * residuals

    def unwhiten(self, noise: Tensor, labels: Tensor) -> Tensor:
        sigma = (-self.log_diagonal).exp()
        return noise * (sigma if self.leading == 1 else sigma[labels])

    def covariances(self) -> Tensor:
        return torch.diag_embed((-2 * self.log_diagonal).exp())

    def rescale(self, scale: Tensor) -> DiagonalFactor:
        return DiagonalFactor(self.log_diagonal + scale.log())

    @classmethod
    def from_factors(cls, factors: Any, features: int | None = None) -> DiagonalFactor:
        return cls(_positive(as_tensor(factors, name="factors"), "factors").log())

    @classmethod
    def from_covariances(cls, covariances: Any, features: int | None = None) -> DiagonalFactor:
        return cls(-0.5 * _positive(as_tensor(covariances, name="covariances"), "covariances").log())

    @classmethod
    def from_precisions(cls, precisions: Any, features: int | None = None) -> DiagonalFactor:
        return cls(0.5 * _positive(as_tensor(precisions, name="precisions"), "precisions").log())

    @classmethod
    def from_cholesky(cls, cholesky: Any, features: int | None = None) -> DiagonalFactor:
        return cls(-_positive(as_tensor(cholesky, name="cholesky"), "cholesky").log())

    @classmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        return (1 if tied else components) * features


class SphericalFactor(Factor):
    r"""Spherical factors, :math:`U_k = I/\sigma_k`.

    Args:
        log_diagonal: :math:`-\log \sigma` (*B, K or 1, 1).
        features: D, which the stored numbers do not tell.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.SphericalFactor.from_covariances(torch.tensor([4.0]), features=2).covariances().tolist()
        [[[4.0, 0.0], [0.0, 4.0]]]
    """

    family = "spherical"

    def __init__(self, log_diagonal: Tensor, features: int) -> None:
        log_diagonal = _stored(log_diagonal, "log_diagonal")
        if log_diagonal.shape[-1:] != (1,):
            raise ValueError(f"a spherical log_diagonal must end in one column, got {tuple(log_diagonal.shape)}.")
        self.log_diagonal = log_diagonal
        self.features = int(features)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"log_diagonal": self.log_diagonal}

    def replace(self, **tensors: Tensor) -> SphericalFactor:
        return SphericalFactor(tensors["log_diagonal"], self.features)

    @property
    def U(self) -> Tensor:
        return self.log_diagonal.exp()

    def log_determinant(self) -> Tensor:
        return self.features * self.log_diagonal.squeeze(-1)

    def whiten(self, residuals: Tensor) -> Tensor:
        return self.U * residuals

    def unwhiten(self, noise: Tensor, labels: Tensor) -> Tensor:
        sigma = (-self.log_diagonal).exp()
        return noise * (sigma if self.leading == 1 else sigma[labels])

    def covariances(self) -> Tensor:
        variances = (-2 * self.log_diagonal).exp()
        return torch.diag_embed(variances.expand(*variances.shape[:-1], self.features))

    def rescale(self, scale: Tensor) -> SphericalFactor:
        return SphericalFactor(self.log_diagonal + scale[..., :1].log(), self.features)

    @classmethod
    def from_factors(cls, factors: Any, features: int | None = None) -> SphericalFactor:
        scales = as_tensor(factors, name="factors")
        return cls(_positive(scales, "factors").log(), _features(features, scales))

    @classmethod
    def from_covariances(cls, covariances: Any, features: int | None = None) -> SphericalFactor:
        variances = as_tensor(covariances, name="covariances")
        return cls(-0.5 * _positive(variances, "covariances").log().unsqueeze(-1), _features(features, variances))

    @classmethod
    def from_precisions(cls, precisions: Any, features: int | None = None) -> SphericalFactor:
        scales = as_tensor(precisions, name="precisions")
        return cls(0.5 * _positive(scales, "precisions").log().unsqueeze(-1), _features(features, scales))

    @classmethod
    def from_cholesky(cls, cholesky: Any, features: int | None = None) -> SphericalFactor:
        sigma = as_tensor(cholesky, name="cholesky")
        return cls(-_positive(sigma, "cholesky").log().unsqueeze(-1), _features(features, sigma))

    @classmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        return 1 if tied else components


_FAMILIES: dict[str, tuple[type[Factor], bool]] = {
    "full": (FullFactor, False),
    "diag": (DiagonalFactor, False),
    "diagonal": (DiagonalFactor, False),
    "spherical": (SphericalFactor, False),
    "tied": (FullFactor, True),
    "tied_full": (FullFactor, True),
    "tied_diag": (DiagonalFactor, True),
    "tied_diagonal": (DiagonalFactor, True),
    "tied_spherical": (SphericalFactor, True),
}


def factor_class(covariance_type: str) -> tuple[type[Factor], bool]:
    """The factor class and whether it is tied, for a covariance type's name.

    Raises:
        ValueError: The name is unknown.
    """
    try:
        return _FAMILIES[covariance_type]
    except (KeyError, TypeError):
        shown = repr(covariance_type) if isinstance(covariance_type, (str, int)) else type(covariance_type).__name__
        names = ", ".join(repr(name) for name in _FAMILIES)
        raise ValueError(f"covariance_type must be one of {names}, got {shown}.") from None


def _features(features: int | None, given: Tensor) -> int:
    if features is None:
        raise ValueError(f"a spherical factor of shape {tuple(given.shape)} needs features=D, its number of columns.")
    return features


def _stored(value: Any, name: str) -> Tensor:
    """A factor's own numbers, with a leading dimension for the components."""
    tensor = value if isinstance(value, Tensor) else as_tensor(value, name=name)
    if tensor.ndim < 2:
        raise ValueError(f"{name} must have shape (K, ...), or (1, ...) when tied, got {tuple(tensor.shape)}.")
    return tensor


def _square(value: Any, name: str) -> Tensor:
    tensor = as_tensor(value, name=name)
    if tensor.ndim < 3 or tensor.shape[-1] != tensor.shape[-2]:
        raise ValueError(f"{name} must have shape (K, D, D), or (1, D, D) when tied, got {tuple(tensor.shape)}.")
    check_finite(tensor, name=name, rows="component")
    return tensor


def _positive(values: Tensor, name: str) -> Tensor:
    good = torch.isfinite(values) & (values > 0)
    if concrete(values) and not bool(good.all()):
        where = [int(i) for i in (~good).nonzero()[0]]
        raise ValueError(
            f"{name} must be positive and finite, got {float(values[tuple(where)]):.6g} in component "
            f"{where[0] if where else 0}; add a small ridge to the covariances."
        )
    return values


def _cholesky(matrices: Tensor, name: str) -> Tensor:
    asymmetry = (matrices - matrices.mT).detach().abs().amax((-1, -2))
    size = matrices.detach().abs().amax((-1, -2))
    # What float32 arithmetic leaves of a symmetric matrix, also where it has been cast to float64 since.
    skew = asymmetry > 1e-5 * size
    known = concrete(matrices)
    if known and bool(skew.any()):
        raise ValueError(
            f"{name} must be symmetric, component {int(skew.nonzero()[0, -1])} is not (entries differ by "
            f"{float(asymmetry.max()):.3g}); symmetrise with (S + S.T) / 2."
        )
    L, info = torch.linalg.cholesky_ex(0.5 * (matrices + matrices.mT))
    if known and bool((info > 0).any()):
        component = int((info > 0).nonzero()[0, -1])
        raise ValueError(
            f"{name} must be positive definite, component {component} is not; add a small ridge to its diagonal."
        )
    return L
