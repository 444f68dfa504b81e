r"""Full precision factors: any covariance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_tensor, check_finite, concrete
from gmmkeops.components.base import Factor, _positive, _stored

__all__ = ["FullFactor"]


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


def _square(value: Any, name: str) -> Tensor:
    tensor = as_tensor(value, name=name)
    if tensor.ndim < 3 or tensor.shape[-1] != tensor.shape[-2]:
        raise ValueError(f"{name} must have shape (K, D, D), or (1, D, D) when tied, got {tuple(tensor.shape)}.")
    check_finite(tensor, name=name, rows="component")
    return tensor


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
