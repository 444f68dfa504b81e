r"""Spherical precision factors: one standard deviation for all columns."""

from __future__ import annotations

import math
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
    names = ("spherical",)
    isotropic = True

    def __init__(self, log_diagonal: Tensor, features: int) -> None:
        log_diagonal = _stored(log_diagonal, "log_diagonal")
        if log_diagonal.shape[-1:] != (1,):
            raise ValueError(f"a spherical log_diagonal must end in one column, got {tuple(log_diagonal.shape)}.")
        self.log_diagonal = log_diagonal
        self.features = int(features)

    @classmethod
    def shapes(cls, leading: int, features: int) -> dict[str, tuple[int, ...]]:
        return {"log_diagonal": (leading, 1)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], features: int) -> SphericalFactor:
        return cls(tensors["log_diagonal"], features)

    @classmethod
    def rescaling(cls, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return super().rescaling(scale[:1])

    @classmethod
    def spread_shape(cls, features: int) -> tuple[int, ...]:
        return ()

    @classmethod
    def second_moments(cls, matrices: Tensor) -> Tensor:
        return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)

    @classmethod
    def variances(cls, covariances: Tensor) -> Tensor:
        return covariances.unsqueeze(-1)

    @classmethod
    def outer(cls, z: Tensor) -> Tensor:
        return z.square().sum(-1)

    @classmethod
    def compact(cls, matrices: Tensor) -> Tensor:
        return matrices.diagonal(dim1=-2, dim2=-1).mean(-1)

    @classmethod
    def mean_scatter(cls, scatter: Tensor, features: int) -> Tensor:
        return scatter / features

    @classmethod
    def directions(cls, features: int) -> Tensor:
        return torch.eye(features, dtype=torch.float64)[None]

    @classmethod
    def quadratics(cls, y: Tensor) -> Tensor:
        return y.square().sum(-1, keepdim=True)

    @classmethod
    def nearest(cls, covariances: Tensor, features: int, floor: float | Tensor) -> tuple[SphericalFactor, Tensor]:
        floor = torch.as_tensor(floor).to(covariances).expand(len(covariances))
        return cls.from_covariances(torch.maximum(covariances, floor), features=features), covariances < floor

    @classmethod
    def student(cls, degrees: Tensor, features: int) -> tuple[Tensor, Tensor]:
        return features * degrees, torch.ones_like(degrees)

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

    @torch.no_grad()
    def floored(self, minimum: float) -> tuple[SphericalFactor, Tensor]:
        limit = -0.5 * math.log(minimum)
        low = (self.log_diagonal > limit + 1e-12).any(-1)
        return (self.replace(log_diagonal=self.log_diagonal.clamp(max=limit)) if bool(low.any()) else self), low

    def marginal(self, columns: list[int]) -> SphericalFactor:
        return SphericalFactor(self.log_diagonal, len(columns))

    def unwhiten_all(self, noise: Tensor) -> Tensor:
        return noise / self.U

    def trace(self, spreads: Tensor) -> Tensor:
        return (self.U.square() * (spreads[..., None] * self.features)).sum()

    def compact_covariances(self) -> Tensor:
        return (-2 * self.log_diagonal).exp().squeeze(-1)

    def covariances(self) -> Tensor:
        variances = (-2 * self.log_diagonal).exp()
        return torch.diag_embed(variances.expand(*variances.shape[:-1], self.features))

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
