"""Metrics of k-means: coordinates in which distances between points are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops.components import FullFactor

__all__ = ["factor_of", "inside", "outside", "robust_covariance", "whitening"]


def robust_covariance(z: Tensor, weights: Tensor | None) -> Tensor:
    """Compute the covariance (D, D), float64, of standardized points (n, D), which are clipped at ten standard deviations."""
    z = z.double().clamp(-10, 10)
    g = torch.ones(len(z), dtype=torch.float64, device=z.device) if weights is None else weights
    mass = len(z) if weights is None else weights.sum()
    z.sub_(g @ z / mass)
    products = (z.mT if weights is None else z.mT * g) @ z
    # A constant column would make the covariance singular.
    products.div_(mass).diagonal().add_(1e-6)
    return products


def whitening(covariance: Tensor) -> Tensor:
    """Return the upper triangular matrix (D, D) by which points of a covariance are multiplied to be white."""
    lower = torch.linalg.cholesky(covariance)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).mT


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
