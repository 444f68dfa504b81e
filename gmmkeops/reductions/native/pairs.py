"""Costs of merging pairs of components, in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops.components import DiagonalFactor, Factor, FullFactor, SphericalFactor
from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.library import OUT_OF_MEMORY, PairCall, reason, run

__all__ = ["BLOCK", "pair_costs", "table_of"]

# Number of points in a block, as in source/pairs.hpp.
BLOCK = 24

_KINDS = (FullFactor, DiagonalFactor, SphericalFactor)


def pair_costs(
    weights: Tensor, means: Tensor, spreads: Tensor, kind: type[Factor], pairs: Tensor, points: Tensor | None
) -> Tensor | None:
    """Compute the costs of merging pairs of components; None if the library does not compute them.

    Args:
        weights, means: Weights (K,) and means (K, D), float64.
        spreads: Covariances (K, D, D), (K, D) or (K,), float64.
        kind: Family of the components.
        pairs: Pairs of components (P, 2), int64.
        points: Points (blocks * BLOCK, D) of the standard normal distribution; None for the upper bound.
    """
    if kind not in _KINDS or means.device.type != "cpu" or reason() is not None:
        return None
    D = means.shape[1]
    found = torch.empty(len(pairs), dtype=torch.float64, device="cpu")
    table = None if points is None else table_of(points, D)
    parts = [part.contiguous() for part in (weights, means, spreads, pairs)]
    call = PairCall(
        kind is FullFactor,
        kind is SphericalFactor,
        cores(),
        0,
        len(means),
        D,
        1 if kind is SphericalFactor else D,
        len(pairs),
        0 if table is None else len(table),
        *(part.data_ptr() for part in parts[:3]),
        None if table is None else table.data_ptr(),
        parts[3].data_ptr(),
        found.data_ptr(),
    )
    if run("gmmkeops_pairs", call) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory for the costs of {len(pairs)} pairs in {D} dimensions.")
    return found


def table_of(points: Tensor, features: int) -> Tensor:
    """Return points (blocks * BLOCK, D) as (blocks, D, BLOCK), so that points are neighbors in memory."""
    return points.view(-1, BLOCK, features).mT.contiguous()
