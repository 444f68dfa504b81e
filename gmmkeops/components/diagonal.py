r"""Diagonal precision factors: independent columns."""

from __future__ import annotations

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
