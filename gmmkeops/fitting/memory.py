"""Estimates of the memory that a fit needs in addition to the given points, and chunk sizes for a memory limit."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from gmmkeops._checks import as_integer, as_number
from gmmkeops.components import factor_class
from gmmkeops.data import NUMBERS, as_dtype
from gmmkeops.reductions import may_arrange

__all__ = ["as_bytes", "chunk_rows", "estimate_memory"]

# Number of copies of all parameters in a step: moments, shifted moments, factors, and the previous state.
_COPIES = 24

# Bytes of tiles, threads and torch's own buffers, for any problem.
_FIXED = 80 << 20

# Safety factor for the memory of chunks: memory that one thread frees is not immediately available to another one.
_ROOM = 2

# Bytes of each number of a row while it is read: as it is stored, converted, and stacked with the others.
_READ = 24

# Number of points in the sample for the initialization, and number of copies of it.
_SAMPLE, _SAMPLE_COPIES = 20_000, 6

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def estimate_memory(
    n: int, k: int, d: int, *, covariance_type: str = "full", dtype: Any = "float32", streamed: bool = False
) -> int:
    """Estimate an upper bound on the peak memory of a fit, without imports and the given points.

    Args:
        n, k, d: Numbers of points, components and dimensions.
        covariance_type: As for :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`.
        dtype: Precision of the points in the fit.
        streamed: Whether the points are read from a source chunk by chunk; the estimate then does not grow with n.

    Returns:
        Number of bytes.

    Raises:
        ValueError: A number is below one, or the covariance type or dtype is unknown.

    Example:
        >>> import gmmkeops as gk
        >>> gk.estimate_memory(10**8, 1000, 3) > 10**9 > gk.estimate_memory(10**8, 1000, 3, streamed=True)
        True
    """
    n, k, d = as_integer(n, "n", 1), as_integer(k, "k", 1), as_integer(d, "d", 1)
    kind = as_dtype(dtype) or torch.float64
    rows = min(n, NUMBERS // d) if streamed else n
    per_row = _per_streamed_row(rows, k, d, kind) if streamed else _per_row(rows, k, d, kind)
    return _components(k, d, covariance_type) + rows * per_row


def _components(k: int, d: int, covariance_type: str) -> int:
    kind, tied = factor_class(covariance_type)
    moments = 8 * k * (1 + d + math.prod(kind.spread_shape(d))) * _COPIES
    return _FIXED + (moments // 2 if tied else moments) + 8 * max(_SAMPLE, 20 * k) * d * _SAMPLE_COPIES


def _per_row(rows: int, k: int, d: int, dtype: torch.dtype) -> int:
    """Compute the bytes per row in standardized coordinates, with a sorted copy and its order if points may be sorted."""
    size = torch.finfo(dtype).bits // 8
    return d * size * 3 + 32 if may_arrange(rows, k, d) else d * size


def _per_streamed_row(rows: int, k: int, d: int, dtype: torch.dtype, stored: int = 0) -> int:
    """Compute the bytes per row of a chunk, with the copies during reading, the weight, and the index in a random order.

    Args:
        rows, k, d: Numbers of rows in a chunk, of components, and of dimensions.
        dtype: Precision of the points in the fit.
        stored: Bytes of a row in its file if unused columns are read, too; otherwise 0.
    """
    size = torch.finfo(dtype).bits // 8
    return _ROOM * (stored + _READ * (d + 1) + d * size + 24 + _per_row(rows, k, d, dtype))


def as_bytes(limit: int | float | str) -> int:
    """Convert a memory limit to bytes, from a number or from a string such as "1.5GB" or "800MiB".

    Raises:
        ValueError: The limit has another form, or is not positive.
    """
    if isinstance(limit, str):
        found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", limit.upper())
        if found is None:
            raise ValueError(
                f"max_memory must be a number of bytes, or a string such as '1.5GB' or '800MiB', got {limit!r}."
            )
        try:
            limit = float(found[1]) * _UNITS[found[2]]
        except ValueError:
            raise ValueError(
                f"max_memory must be a number of bytes, or a string such as '1.5GB' or '800MiB', got {limit!r}."
            ) from None
    return int(as_number(limit, "max_memory", 0, above=True))


def chunk_rows(limit: int, k: int, d: int, covariance_type: str, dtype: torch.dtype, stored: int = 0) -> int:
    """Compute the largest chunk size for which a fit from a source stays below a memory limit.

    Args:
        limit: Memory limit, bytes.
        k, d: Numbers of components and dimensions.
        covariance_type: As for :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`.
        dtype: Precision of the points in the fit.
        stored: Bytes of a row in its file if unused columns are read, too; otherwise 0.

    Raises:
        ValueError: The limit is too small even for chunks of 1000 rows.
    """
    left = limit - _components(k, d, covariance_type)
    rows = min(NUMBERS // d, left // _per_streamed_row(NUMBERS // d, k, d, dtype, stored))
    if rows < 1000:
        least = _components(k, d, covariance_type) + 1000 * _per_streamed_row(1000, k, d, dtype, stored)
        raise ValueError(
            f"a fit of {k} components in {d} dimensions needs at least {least / 1e6:.0f} MB, got max_memory of "
            f"{limit / 1e6:.0f} MB; increase it, or use fewer components or a simpler covariance type."
        )
    return int(rows)
