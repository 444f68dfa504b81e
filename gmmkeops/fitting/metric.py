"""Metrics of k-means: coordinates in which distances between points are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import FullFactor

__all__ = ["factor_of", "inside", "invariant_metric", "outside", "white_metric"]

# Smallest factor of a direction in which points seem to be normal; and variance of whitened points in a direction below which
# they do not vary in it, since a column is constant or depends on others.
_LEAST, _CONSTANT = 0.2, 0.1

# Number of standard deviations at which points are clipped, and variance that is added so that constant columns are not singular.
_CLIPPED, _ADDED = 10.0, 1e-6


def white_metric(z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute a robust covariance of standardized points, and the metric in which points of this covariance are white.

    Args:
        z: Points (n, D), which are clipped at ten standard deviations.
        weights: Weights (n,), or None.

    Returns:
        The covariance (D, D), float64; and the upper triangular matrix (D, D) by which points are multiplied to be white.
    """
    native = reductions.native_white(z, weights, _CLIPPED, _ADDED)
    if native is not None:
        return native
    z = z.double().clamp(-_CLIPPED, _CLIPPED)
    g = torch.ones(len(z), dtype=torch.float64, device=z.device) if weights is None else weights
    mass = len(z) if weights is None else weights.sum()
    z.sub_(g @ z / mass)
    covariance = (z.mT if weights is None else z.mT * g) @ z
    covariance.div_(mass).diagonal().add_(_ADDED)
    lower = torch.linalg.cholesky(covariance)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return covariance, torch.linalg.solve_triangular(lower, eye, upper=False).mT


def invariant_metric(points: Tensor, masses: Tensor, root: Tensor) -> Tensor:
    """Return a metric in which distances in directions that seem to contain no clusters are short.

    In whitened coordinates y all directions have the same variance, but for those in which the points do not vary, which are
    neglected. The eigenvalues of E[D y yᵀ / |y|²] are one for normal points; a direction is multiplied by the difference of
    its eigenvalue from one, relative to the largest difference.

    Args:
        points: Points (M, D), float64.
        masses: Their weights (M,), float64.
        root: Matrix (D, D) by which points are multiplied to be white.

    Returns:
        The upper triangular matrix (D, D) by which points are multiplied.

    Reference:
        Tyler, Critchley, Dümbgen and Oja 2009, *Invariant co-ordinate selection*, JRSS B 71.
    """
    fractions = masses / masses.sum()
    y = (points - fractions @ points) @ root
    variances, axes = torch.linalg.eigh(y.mT @ (fractions[:, None] * y))
    varies = variances > _CONSTANT
    if not bool(varies.any()):
        return root
    y = y @ axes[:, varies]
    shares = fractions * y.shape[1] / y.square().sum(1).clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(y.mT @ (shares[:, None] * y))
    away = (values - 1).abs()
    factors = (away / away.amax().clamp(min=1e-300)).clamp(min=_LEAST)
    directions = root @ torch.cat([axes[:, varies] @ vectors * factors, axes[:, ~varies] * _LEAST], 1)
    # The Cholesky factor of a matrix in reverse order is upper triangular in the given order.
    lower = torch.linalg.cholesky((directions @ directions.mT).flip(0, 1))
    return lower.flip(0, 1)


def factor_of(root: Tensor) -> FullFactor:
    """Return an upper triangular matrix (D, D) as the precision factor of one component."""
    row, column = torch.triu_indices(len(root), len(root), 1, device=root.device)
    return FullFactor(root.diagonal().log()[None], root[row, column][None])


def inside(points: Tensor, root: Tensor | None) -> Tensor:
    """Convert points (n, D) to the coordinates of a metric."""
    return points if root is None else points @ root


def outside(centers: Tensor, root: Tensor | None) -> Tensor:
    """Convert centers (K, D) from the coordinates of a metric to those of the points."""
    return centers if root is None else torch.linalg.solve_triangular(root, centers, upper=True, left=False)
