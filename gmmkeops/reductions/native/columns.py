"""Statistics of columns in the compiled library, for so few points that operations of torch take longer to start than to run."""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops.data import LIMITS, trimmed_spread
from gmmkeops.reductions.library import OUT_OF_MEMORY, SpreadCall, WhiteCall, reason, run
from gmmkeops.reductions.native.seeds import FEW, PRODUCTS

__all__ = ["native_white", "spread_of"]


def spread_of(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the result of :func:`~gmmkeops.data.trimmed_spread`, in the library if there are few points."""
    if _are_few(x, weights):
        x, weights = x.contiguous(), None if weights is None else weights.contiguous()
        center, spread = torch.empty(2, x.shape[1], dtype=torch.float64, device="cpu")
        call = SpreadCall(
            x.dtype == torch.float64,
            rows=len(x),
            dimensions=x.shape[1],
            points=x.data_ptr(),
            weights=None if weights is None else weights.data_ptr(),
            center=center.data_ptr(),
            deviation=spread.data_ptr(),
            **LIMITS,
        )
        _run("gmmkeops_spread", call, x)
        # Torch names the column whose range is too large, and keeps the digits of constant columns.
        if call.ordinary:
            return center, spread
    return trimmed_spread(x, weights)


def native_white(z: Tensor, weights: Tensor | None, limit: float, added: float) -> tuple[Tensor, Tensor] | None:
    """Compute the covariance of points, and the matrix by which they are multiplied to be white.

    Args:
        z: Points (n, D).
        weights: Weights (n,), or None.
        limit: Absolute value to which entries of the points are clipped.
        added: Constant that is added to the variances.

    Returns:
        The covariance (D, D) and the upper triangular matrix (D, D), float64; None if the library does not compute them.
    """
    N, D = z.shape
    if N * D * D > PRODUCTS or not _are_few(z, weights):
        return None
    z, weights = z.contiguous(), None if weights is None else weights.contiguous()
    covariance, root = torch.empty(2, D, D, dtype=torch.float64, device="cpu")
    call = WhiteCall(
        z.dtype == torch.float64,
        rows=N,
        dimensions=D,
        points=z.data_ptr(),
        weights=None if weights is None else weights.data_ptr(),
        limit=limit,
        added=added,
        covariance=covariance.data_ptr(),
        root=root.data_ptr(),
    )
    _run("gmmkeops_whiten", call, z)
    return (covariance, root) if call.regular else None


def _are_few(x: Tensor, weights: Tensor | None) -> bool:
    """Return whether the library computes statistics of points faster than torch."""
    if x.device.type != "cpu" or x.numel() > FEW or x.dtype not in (torch.float32, torch.float64):
        return False
    return (weights is None or weights.dtype == torch.float64) and reason() is None


def _run(function: str, call: SpreadCall | WhiteCall, x: Tensor) -> None:
    """Call the library."""
    if run(function, call) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory for the statistics of {len(x)} points.")
