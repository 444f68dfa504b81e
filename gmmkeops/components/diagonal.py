"""Diagonal precision factors: independent columns."""

from __future__ import annotations

from torch import Tensor

from gmmkeops.components.base import Factor
from gmmkeops.components.parameters import stored

__all__ = ["DiagonalFactor"]


class DiagonalFactor(Factor):
    r"""Diagonal precision factors, :math:`U_k = \mathrm{diag}(1/\sigma_{k1}, \dots, 1/\sigma_{kD})`.

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
        self.log_diagonal = log_diagonal = stored(log_diagonal, "log_diagonal")
        self.features = log_diagonal.shape[-1]

    @classmethod
    def shapes(cls, leading: int, features: int) -> dict[str, tuple[int, ...]]:
        return {"log_diagonal": (leading, features)}

    @classmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        return (1 if tied else components) * features

    def marginal(self, columns: list[int]) -> DiagonalFactor:
        return DiagonalFactor(self.log_diagonal[..., columns])
