"""Spherical precision factors: one standard deviation for all columns."""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops.components.base import Factor
from gmmkeops.components.parameters import stored

__all__ = ["SphericalFactor"]


class SphericalFactor(Factor):
    r"""Spherical precision factors, :math:`U_k = I/\sigma_k`.

    Args:
        log_diagonal: :math:`-\log \sigma` (*B, K or 1, 1).
        features: Number of columns D.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.SphericalFactor.from_covariances(torch.tensor([4.0]), features=2).covariances().tolist()
        [[[4.0, 0.0], [0.0, 4.0]]]
    """

    family = "spherical"
    names = ("spherical",)
    isotropic = True

    def __init__(self, log_diagonal: Tensor, features: int) -> None:
        log_diagonal = stored(log_diagonal, "log_diagonal")
        if log_diagonal.shape[-1:] != (1,):
            raise ValueError(f"log_diagonal must have shape (*, 1), got {tuple(log_diagonal.shape)}.")
        self.log_diagonal = log_diagonal
        self.features = int(features)

    @classmethod
    def shapes(cls, leading: int, features: int) -> dict[str, tuple[int, ...]]:
        return {"log_diagonal": (leading, 1)}

    @classmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        return 1 if tied else components

    @classmethod
    def of(cls, tensors: dict[str, Tensor], features: int | None) -> SphericalFactor:
        logs = tensors["log_diagonal"]
        if features is None:
            raise ValueError(
                f"a spherical factor of shape {tuple(logs.shape)} needs features=D, its number of columns."
            )
        return cls(logs, features)

    @classmethod
    def rescaling(cls, scale: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        return super().rescaling(scale[:1])

    @classmethod
    def spread_shape(cls, features: int) -> tuple[int, ...]:
        return ()

    @classmethod
    def second_moments(cls, matrices: Tensor) -> Tensor:
        return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)

    @classmethod
    def outer(cls, z: Tensor) -> Tensor:
        return z.square().sum(-1)

    @classmethod
    def compact(cls, matrices: Tensor) -> Tensor:
        return matrices.diagonal(dim1=-2, dim2=-1).mean(-1)

    @classmethod
    def variances(cls, covariances: Tensor) -> Tensor:
        return covariances.unsqueeze(-1)

    @classmethod
    def mean_scatter(cls, scatter: Tensor, features: int) -> Tensor:
        return scatter / features

    @classmethod
    def directions(cls, features: int) -> Tensor:
        return torch.eye(features, dtype=torch.float64)[None]

    @classmethod
    def quadratics(cls, y: Tensor) -> Tensor:
        return y.square().sum(-1, keepdim=True)

    def compact_covariances(self) -> Tensor:
        return (-2 * self.log_diagonal).exp().squeeze(-1)

    def marginal(self, columns: list[int]) -> SphericalFactor:
        return SphericalFactor(self.log_diagonal, len(columns))

    @classmethod
    def student(cls, degrees: Tensor, features: int) -> tuple[Tensor, Tensor]:
        return features * degrees, torch.ones_like(degrees)

    @classmethod
    def student_width(cls, features: int) -> int:
        return features
