r"""Full precision factors, for unrestricted covariances."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from gmmkeops.components.arrays import as_tensor, check_finite, concrete, ordinary, transformed
from gmmkeops.components.base import FAMILIES, Factor
from gmmkeops.components.parameters import gamma, positive, stored

__all__ = ["FullFactor", "bartlett"]


class FullFactor(Factor):
    r"""Upper-triangular precision factors, :math:`\Sigma_k^{-1} = U_k U_k^\top`, for unrestricted covariances.

    Args:
        log_diagonal: Logarithm of the diagonal of U (*B, K or 1, D).
        upper: Entries above the diagonal, row by row (*B, K or 1, D(D-1)/2), 1 / data units; zeros by default.

    Raises:
        ValueError: The shapes do not match; in ``from_covariances`` and similar, a matrix is not positive definite.

    Example:
        >>> import torch, gmmkeops as gk
        >>> factor = gk.FullFactor.from_covariances(torch.tensor([[[4.0, 1.0], [1.0, 2.0]]]))
        >>> factor.covariances().round(decimals=4).tolist()
        [[[4.0, 1.0], [1.0, 2.0]]]
    """

    family = "full"
    names = ("full",)
    coupled = True

    def __init__(self, log_diagonal: Tensor, upper: Tensor | None = None) -> None:
        self.log_diagonal = log_diagonal = stored(log_diagonal, "log_diagonal")
        self.features = log_diagonal.shape[-1]
        pairs = self.features * (self.features - 1) // 2
        self.upper = (
            log_diagonal.new_zeros(*log_diagonal.shape[:-1], pairs) if upper is None else stored(upper, "upper")
        )
        if self.upper.shape != (*log_diagonal.shape[:-1], pairs):
            raise ValueError(
                f"upper must have shape {(*log_diagonal.shape[:-1], pairs)} for log_diagonal "
                f"{tuple(log_diagonal.shape)}, got {tuple(self.upper.shape)}."
            )

    @classmethod
    def type_name(cls, tied: bool = False) -> str:
        # scikit-learn's name of one full covariance for all components.
        return "tied" if tied else "full"

    @classmethod
    def shapes(cls, leading: int, features: int) -> dict[str, tuple[int, ...]]:
        return {"log_diagonal": (leading, features), "upper": (leading, features * (features - 1) // 2)}

    @classmethod
    def rescaling(cls, scale: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        return super().rescaling(scale) | {"upper": (scale[_rows(len(scale), scale)], None)}

    @classmethod
    def spread_shape(cls, features: int) -> tuple[int, ...]:
        return (features, features)

    @classmethod
    def second_moments(cls, matrices: Tensor) -> Tensor:
        return matrices

    @classmethod
    def variances(cls, covariances: Tensor) -> Tensor:
        return covariances.diagonal(dim1=-2, dim2=-1)

    @classmethod
    def outer(cls, z: Tensor) -> Tensor:
        return z.unsqueeze(-1) * z.unsqueeze(-2)

    @classmethod
    def directions(cls, features: int) -> Tensor:
        row, column = torch.tril_indices(features, features)
        eye = torch.eye(features, dtype=torch.float64)
        E = eye[row][:, :, None] * eye[column][:, None, :]
        return torch.where((row == column)[:, None, None], E, E + E.mT)

    @classmethod
    def quadratics(cls, y: Tensor) -> Tensor:
        row, column = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        return torch.where(row == column, 1.0, 2.0).to(y) * y[..., row] * y[..., column]

    @property
    def U(self) -> Tensor:
        return self._placed(self.log_diagonal.exp(), self.upper)

    @staticmethod
    def _placed(diagonal: Tensor, upper: Tensor) -> Tensor:
        """Return the upper triangular matrices (*B, K or 1, D, D) with given diagonals and entries above them, row by row."""
        matrices = torch.diag_embed(diagonal)
        return matrices.flatten(-2).index_add(-1, _places(diagonal.shape[-1], upper), upper).view(matrices.shape)

    def matrices(self) -> Tensor:
        return self.U

    def scaled(self, scale: Tensor) -> FullFactor:
        return FullFactor(self.log_diagonal + scale.log().unsqueeze(-1), self.upper * scale.unsqueeze(-1))

    @staticmethod
    def times(U: Tensor, z: Tensor) -> Tensor:
        return (z.unsqueeze(-2) @ U).squeeze(-2)

    def row_norms(self) -> Tensor:
        return self.U.norm(dim=-1)

    def trace(self, spreads: Tensor) -> Tensor:
        return (self.precisions() * spreads).sum()

    def largest(self) -> Tensor:
        parts = [self.log_diagonal.amax().exp()]
        if self.upper.numel():
            parts += [self.upper.amax(), -self.upper.amin()]
        return torch.stack(parts).amax()

    def precision_diagonals(self) -> Tensor:
        return self.U.square().sum(-1)

    def whiten(self, residuals: Tensor) -> Tensor:
        return (self.U.mT @ residuals.unsqueeze(-1)).squeeze(-1)

    def unwhiten_all(self, noise: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.U.mT, noise.unsqueeze(-1), upper=False).squeeze(-1)

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

    def marginal(self, columns: list[int]) -> Factor:
        return FullFactor.from_covariances(self.covariances()[..., columns, :][..., columns])

    def conditional(self, given: list[int], rest: list[int]) -> tuple[Factor, Tensor | None]:
        P = self.precisions()[..., rest, :]
        own = P[..., rest]
        return FullFactor.from_precisions(own), torch.linalg.solve(own, P[..., given])

    @classmethod
    def student(cls, degrees: Tensor, features: int) -> tuple[Tensor, Tensor]:
        return degrees + 1 - features, (degrees + 1 - features) / degrees

    @classmethod
    def student_width(cls, features: int) -> int:
        return features

    def wishart(self, degrees: Tensor, generator: torch.Generator | None) -> FullFactor:
        root = self.U / degrees[:1].sqrt()[..., None, None]
        return FullFactor.from_factors(root @ bartlett(degrees, self.features, generator))

    def distribution(self, means: Tensor) -> Distribution:
        return MultivariateNormal(means, scale_tril=self.cholesky().expand(*means.shape, self.features))

    @torch.no_grad()
    def floored(self, minimum: float) -> tuple[Factor, Tensor]:
        ceiling = minimum**-0.5
        # The Frobenius norm bounds the singular values, so only factors with a large norm need a decomposition.
        squares = (2 * self.log_diagonal).exp().sum(-1) + self.upper.square().sum(-1)
        low = squares > ceiling**2
        if not bool(low.any()):
            return self, low
        U = self.U
        suspects = low.nonzero()[:, 0]
        left, values, _ = torch.linalg.svd(U[suspects])
        over = values[:, 0] > ceiling * (1 + 1e-12)
        low[suspects] = over
        if not bool(over.any()):
            return self, low
        A = left[over] * values[over].clamp(1e-10 * ceiling, ceiling)[:, None, :]
        fixed = FullFactor.from_factors(A)
        return (fixed if self.leading == 1 else self.scatter(suspects[over], fixed)), low

    def natural_gradient(
        self, means: Tensor, slopes: dict[str, Tensor], U: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        U, D = self.U if U is None else U, self.features
        G = FullFactor._placed(slopes["log_diagonal"] / U.diagonal(dim1=-2, dim2=-1), slopes["upper"])
        # For U (I + E) with upper triangular E and z = Uᵀ(x - μ), the scores of E are 1 - z_i² on the diagonal and -z_i z_j
        # elsewhere; they are uncorrelated, with variances 2 and 1.
        E = (U.mT @ G) * _variances(D, U)
        upper = (U @ E).flatten(-2).index_select(-1, _places(D, U))
        found = {"log_diagonal": E.diagonal(dim1=-2, dim2=-1), "upper": upper}
        inner = torch.linalg.solve_triangular(U, means.unsqueeze(-1), upper=True)
        return torch.linalg.solve_triangular(U.mT, inner, upper=False).squeeze(-1), found

    @classmethod
    def nearest(cls, covariances: Tensor, features: int, floor: float | Tensor) -> tuple[FullFactor, Tensor]:
        floor = torch.as_tensor(floor).to(covariances).expand(len(covariances))
        covariances = 0.5 * (covariances + covariances.mT)
        # Columns without variance are treated separately, because a joint decomposition would add rounding errors to them.
        variances = covariances.diagonal(dim1=1, dim2=2)
        flat = variances < floor[:, None]
        if bool(flat.any()):
            covariances = covariances.masked_fill(flat[:, :, None] | flat[:, None, :], 0.0)
            covariances = covariances + torch.diag_embed(floor[:, None] * flat)
            variances = covariances.diagonal(dim1=1, dim2=2)
        L, info = torch.linalg.cholesky_ex(covariances)
        # A pivot is the variance of a column given the columns before it. A tiny fraction of the variance is rounding error.
        noise = 4 * features * torch.finfo(covariances.dtype).eps
        broken = (info > 0) | (L.diagonal(dim1=1, dim2=2).square() <= noise * variances).any(1)
        hit = broken | flat.any(1)
        if not bool(broken.any()):
            return cls._of_cholesky(L, covariances.dtype), hit
        # The columns may have different units, so the correlation matrix is decomposed.
        unit = variances[broken].clamp(min=1e-300).sqrt()
        values, vectors = torch.linalg.eigh(covariances[broken] / (unit[:, :, None] * unit[:, None, :]))
        fixed = cls.from_factors(vectors / unit[:, :, None] * values.clamp(min=noise).rsqrt()[:, None, :])
        if len(covariances) == 1:
            return fixed, hit
        sound = torch.where(broken[:, None, None], torch.eye(features).to(covariances), covariances)
        whole = cls.from_covariances(sound).scatter(broken.nonzero()[:, 0], fixed)
        assert isinstance(whole, FullFactor), "scatter keeps the family"
        return whole, hit

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
        # All steps are in float64, since the errors of a Cholesky factorization grow with the condition number.
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
        positive(L.diagonal(dim1=-2, dim2=-1), "the diagonals of cholesky")
        eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
        return cls._of_matrix(torch.linalg.solve_triangular(L, eye, upper=False).mT, "cholesky", dtype)

    @classmethod
    def _of_matrix(cls, U: Tensor, name: str, dtype: torch.dtype) -> FullFactor:
        diagonal = positive(U.diagonal(dim1=-2, dim2=-1), f"the diagonals of the factors of {name}")
        row, column = torch.triu_indices(U.shape[-1], U.shape[-1], 1, device=U.device)
        return cls(diagonal.log().to(dtype), U[..., row, column].to(dtype))

    @classmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        return (1 if tied else components) * features * (features + 1) // 2


FAMILIES["tied"] = (FullFactor, True)


def _may_be_kept(like: Tensor) -> bool:
    """Return whether constants on the device of a tensor may be computed once for all calls."""
    return not transformed() and (like.is_cuda or ordinary(like))


def _places(features: int, like: Tensor) -> Tensor:
    """Return the places of the entries above the diagonal in a matrix (D, D), row by row, on the device of ``like``."""
    if _may_be_kept(like):
        return _kept_places(features, like.device)
    row, column = torch.triu_indices(features, features, 1, device=like.device)
    return row * features + column


def _rows(features: int, like: Tensor) -> Tensor:
    """Return the rows of the entries above the diagonal of a matrix (D, D), row by row, on the device of ``like``."""
    if _may_be_kept(like):
        return _kept_rows(features, like.device)
    return torch.triu_indices(features, features, 1, device=like.device)[0]


@cache
def _kept_rows(features: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.triu_indices(features, features, 1)[0].to(device)


@cache
def _kept_places(features: int, device: torch.device) -> Tensor:
    # Autograd cannot save tensors of the inference mode.
    with torch.inference_mode(False):
        row, column = torch.triu_indices(features, features, 1)
        # This copy ends before it returns, so that other streams may use the result.
        return (row * features + column).to(device)


@cache
def _kept_variances(features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        ones = torch.ones(features, features, dtype=dtype)
        return (ones.triu() - 0.5 * torch.eye(features, dtype=dtype)).to(device)


def _variances(features: int, like: Tensor) -> Tensor:
    """Return the reciprocal variances (D, D) of the scores of an upper triangular matrix, zero below the diagonal."""
    if _may_be_kept(like):
        return _kept_variances(features, like.device, like.dtype)
    ones = torch.ones(features, features, dtype=like.dtype, device=like.device)
    return ones.triu() - 0.5 * torch.eye(features, dtype=like.dtype, device=like.device)


def _square(value: Any, name: str) -> Tensor:
    tensor = as_tensor(value, name=name)
    if tensor.ndim < 3 or tensor.shape[-1] != tensor.shape[-2]:
        raise ValueError(f"{name} must have shape (K, D, D), or (1, D, D) when tied, got {tuple(tensor.shape)}.")
    check_finite(tensor, name=name, rows="component")
    return tensor


def _cholesky(matrices: Tensor, name: str) -> Tensor:
    asymmetry = (matrices - matrices.mT).detach().abs().amax((-1, -2))
    size = matrices.detach().abs().amax((-1, -2))
    # A symmetric matrix computed in float32 is asymmetric by up to this much, also after a cast to float64.
    skew = asymmetry > 1e-5 * size
    known = concrete(matrices)
    if known and bool(skew.any()):
        raise ValueError(
            f"{name} must be symmetric, component {int(skew.nonzero()[0, -1])} is not (entries differ by "
            f"{float(asymmetry.max()):.3g}); symmetrize with (S + S.T) / 2."
        )
    L, info = torch.linalg.cholesky_ex(0.5 * (matrices + matrices.mT))
    if known and bool((info > 0).any()):
        component = int((info > 0).nonzero()[0, -1])
        raise ValueError(
            f"{name} must be positive definite, component {component} is not; add a small ridge to its diagonal."
        )
    return L


def bartlett(degrees: Tensor, features: int, generator: torch.Generator | None) -> Tensor:
    """Draw lower-triangular matrices A (..., D, D) for which A Aᵀ has the distribution Wishart(I, degrees).

    Reference: Bartlett 1933, *On the theory of statistical regression*.
    """
    steps = torch.arange(features, dtype=degrees.dtype, device=degrees.device)
    diagonal = (2 * gamma(0.5 * (degrees[..., None] - steps), generator)).sqrt()
    shape = (*degrees.shape, features, features)
    noise = torch.randn(shape, generator=generator, dtype=degrees.dtype, device=degrees.device)
    return noise.tril(-1) + torch.diag_embed(diagonal)
