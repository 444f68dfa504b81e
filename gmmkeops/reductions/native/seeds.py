"""Greedy k-means++ in the compiled library, for so few points that the operations of torch take longer to start than to run."""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops.reductions.library import OUT_OF_MEMORY, SeedCall, reason, run

__all__ = ["FEW", "PRODUCTS", "chosen_seeds"]

# Product of points, columns and centers up to which the library is faster than matrix products of torch.
FEW = 200_000

# Product of points and squared columns up to which it is faster where points are multiplied with a matrix, or with each other.
PRODUCTS = 30_000_000


def chosen_seeds(
    points: Tensor, mass: Tensor, centers: int, candidates: int, generator: torch.Generator
) -> Tensor | None:
    """Choose centers among points by greedy k-means++.

    Args:
        points: Points (M, D).
        mass: Weights (M,), positive.
        centers: Number of centers K.
        candidates: Number of points for each center but the first one, of which the best one is chosen.
        generator: Random number generator, which draws 1 + (K - 1) candidates numbers.

    Returns:
        Indices (K,), int64; None if the library does not compute them. The generator is then unchanged.
    """
    M, D = points.shape
    cpu, double = points.device.type == "cpu", points.dtype == mass.dtype == torch.float64
    if not cpu or not double or M * D * centers > FEW or reason() is not None:
        return None
    points, mass = points.contiguous(), mass.contiguous()
    uniform = torch.rand(1 + (centers - 1) * candidates, generator=generator, dtype=torch.float64, device="cpu")
    chosen = torch.empty(centers, dtype=torch.int64, device="cpu")
    call = SeedCall(
        M, D, centers, candidates, points.data_ptr(), mass.data_ptr(), uniform.data_ptr(), chosen.data_ptr()
    )
    if run("gmmkeops_seeds", call) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory to choose {centers} of {M} points.")
    return chosen
