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

from gmmkeops._checks import as_tensor, concrete

__all__ = ["Factor"]


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


def _positive(values: Tensor, name: str) -> Tensor:
    good = torch.isfinite(values) & (values > 0)
    if concrete(values) and not bool(good.all()):
        where = [int(i) for i in (~good).nonzero()[0]]
        raise ValueError(
            f"{name} must be positive and finite, got {float(values[tuple(where)]):.6g} in component "
            f"{where[0] if where else 0}; add a small ridge to the covariances."
        )
    return values
