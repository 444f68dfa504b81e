r"""Spherical precision factors: one standard deviation for all columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_tensor
from gmmkeops.components.base import Factor, _features, _positive, _stored

__all__ = ["SphericalFactor"]


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
