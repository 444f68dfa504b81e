r"""Diagonal precision factors: independent columns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_tensor
from gmmkeops.components.base import Factor, _positive, _stored

__all__ = ["DiagonalFactor"]


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
    names = ("diag", "diagonal")

    def __init__(self, log_diagonal: Tensor) -> None:
        self.log_diagonal = log_diagonal = _stored(log_diagonal, "log_diagonal")
        self.features = log_diagonal.shape[-1]

    @classmethod
    def shapes(cls, leading: int, features: int) -> dict[str, tuple[int, ...]]:
        return {"log_diagonal": (leading, features)}

    @classmethod
    def spread_shape(cls, features: int) -> tuple[int, ...]:
        return (features,)

    @classmethod
    def second_moments(cls, matrices: Tensor) -> Tensor:
        return matrices.diagonal(dim1=-2, dim2=-1)

    @classmethod
    def variances(cls, covariances: Tensor) -> Tensor:
        return covariances

    @classmethod
    def outer(cls, z: Tensor) -> Tensor:
        return z.square()

    @classmethod
    def directions(cls, features: int) -> Tensor:
        return torch.diag_embed(torch.eye(features, dtype=torch.float64))

    @classmethod
    def quadratics(cls, y: Tensor) -> Tensor:
        return y.square()

    @classmethod
    def nearest(cls, covariances: Tensor, features: int, floor: float | Tensor) -> tuple[DiagonalFactor, Tensor]:
        floor = torch.as_tensor(floor).to(covariances).expand(len(covariances))[:, None]
        return cls.from_covariances(torch.maximum(covariances, floor)), (covariances < floor).any(1)

    @classmethod
    def student_width(cls, features: int) -> int:
        return 1

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

    @torch.no_grad()
    def floored(self, minimum: float) -> tuple[DiagonalFactor, Tensor]:
        limit = -0.5 * math.log(minimum)
        low = (self.log_diagonal > limit + 1e-12).any(-1)
        return (self.replace(log_diagonal=self.log_diagonal.clamp(max=limit)) if bool(low.any()) else self), low

    def marginal(self, columns: list[int]) -> DiagonalFactor:
        return DiagonalFactor(self.log_diagonal[..., columns])

    def unwhiten_all(self, noise: Tensor) -> Tensor:
        return noise / self.U

    def covariances(self) -> Tensor:
        return torch.diag_embed((-2 * self.log_diagonal).exp())

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
