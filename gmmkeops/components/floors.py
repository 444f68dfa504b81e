"""Regularization of covariances that are singular, or nearly so, by a lower bound on their eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops.components.base import Factor
from gmmkeops.components.full import FullFactor

__all__ = ["floor_eigenvalues", "nearest_factor"]


@torch.no_grad()
def floor_eigenvalues(factor: Factor, minimum: float) -> tuple[Factor, Tensor]:
    """Raise the eigenvalues of covariances to at least ``minimum``.

    Args:
        factor: Precision factor of the covariances, without batch dimensions.
        minimum: Lower bound, squared units of the factor.

    Returns:
        The new factor, and a Boolean mask (K or 1,) of covariances with an eigenvalue below the bound.
    """
    ceiling = minimum**-0.5
    if factor.family != "full":
        log_diagonal = factor.tensors["log_diagonal"]
        limit = torch.tensor(ceiling, dtype=torch.float64).log().item()
        low = (log_diagonal > limit + 1e-12).any(-1)
        return (factor.replace(log_diagonal=log_diagonal.clamp(max=limit)), low) if bool(low.any()) else (factor, low)
    # Only factors whose Frobenius norm allows a large singular value are decomposed.
    U = factor.U
    low = U.square().sum((-1, -2)) > ceiling**2
    if bool(low.any()):
        suspects = low.nonzero()[:, 0]
        left, values, _ = torch.linalg.svd(U[suspects])
        over = values[:, 0] > ceiling * (1 + 1e-12)
        low[suspects] = over
        if bool(over.any()):
            A = left[over] * values[over].clamp(1e-10 * ceiling, ceiling)[:, None, :]
            index = suspects[over]
            fixed = type(factor).from_factors(A)
            if factor.leading == 1:
                return fixed, low
            return factor.scatter(index, fixed), low
    return factor, low


def nearest_factor(
    kind: type[Factor], covariances: Tensor, features: int, floor: float | Tensor
) -> tuple[Factor, Tensor]:
    """Precision factors of covariances that may not be positive definite because of rounding.

    Only where that is so are variances of columns raised to ``floor``, and eigenvalues of the correlation matrix to the rounding
    error.

    Args:
        kind: Class of the factor.
        covariances: (K, D, D), (K, D) or (K,), with K = 1 when tied.
        features: Number of columns D.
        floor: Lower bound of the variances: a number, or one per covariance (K,).

    Returns:
        The factor, and a Boolean mask (K or 1,) of covariances that were changed.
    """
    floor = torch.as_tensor(floor).to(covariances).expand(len(covariances))
    if kind is not FullFactor:
        low = covariances < (floor if covariances.ndim == 1 else floor[:, None])
        raised = torch.maximum(covariances, floor if covariances.ndim == 1 else floor[:, None])
        return kind.from_covariances(raised, features=features), low if low.ndim == 1 else low.any(1)
    covariances = 0.5 * (covariances + covariances.mT)
    # Columns without variance are treated separately: in a joint decomposition they would get the rounding errors of others.
    variances = covariances.diagonal(dim1=1, dim2=2)
    flat = variances < floor[:, None]
    if bool(flat.any()):
        covariances = covariances.masked_fill(flat[:, :, None] | flat[:, None, :], 0.0)
        covariances = covariances + torch.diag_embed(floor[:, None] * flat)
        variances = covariances.diagonal(dim1=1, dim2=2)
    L, info = torch.linalg.cholesky_ex(covariances)
    # A pivot is the variance of a column given the columns before it; a tiny fraction of the column's variance is rounding error.
    noise = 4 * features * torch.finfo(covariances.dtype).eps
    broken = (info > 0) | (L.diagonal(dim1=1, dim2=2).square() <= noise * variances).any(1)
    hit = broken | flat.any(1)
    if not bool(broken.any()):
        return FullFactor.from_covariances(covariances), hit
    # Columns may have any units, so the correlation matrix is decomposed.
    unit = variances[broken].clamp(min=1e-300).sqrt()
    values, vectors = torch.linalg.eigh(covariances[broken] / (unit[:, :, None] * unit[:, None, :]))
    fixed = FullFactor.from_factors(vectors / unit[:, :, None] * values.clamp(min=noise).rsqrt()[:, None, :])
    if len(covariances) == 1:
        return fixed, hit
    sound = torch.where(broken[:, None, None], torch.eye(features).to(covariances), covariances)
    return FullFactor.from_covariances(sound).scatter(broken.nonzero()[:, 0], fixed), hit
