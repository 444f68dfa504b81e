"""How much memory a fit takes beside the points that it is given, and how to keep below a limit."""

from __future__ import annotations

import re
from typing import Any

import torch

from gmmkeops._arguments import as_integer, as_number
from gmmkeops._checks import as_dtype
from gmmkeops.factors import factor_class
from gmmkeops.reductions import may_arrange
from gmmkeops.sources import NUMBERS

__all__ = ["as_bytes", "chunk_rows", "estimate_memory"]

# Copies of all parameters that a step holds at once: moments, their shifts, factors, a history of one.
_COPIES = 24
# What tiles, threads and torch's own buffers take, whatever the problem.
_FIXED = 80 << 20
# Factor by which the memory of chunks is counted: what one thread frees is not available to another thread at once.
_ROOM = 2
# Bytes of each number of a row while it is read: as it is stored, converted, and stacked with the others.
_READ = 24
# Points that a start looks at, and copies of them.
_SAMPLE, _SAMPLE_COPIES = 20_000, 6
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def estimate_memory(
    n: int, k: int, d: int, *, covariance_type: str = "full", dtype: Any = "float32", streamed: bool = False
) -> int:
    """Bytes that a fit takes at its peak beside imports and the given points; an upper estimate.

    Args:
        n, k, d: Points, components, dimensions.
        covariance_type: As for :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`.
        dtype: What the points are computed in.
        streamed: Whether they are read from a source, chunk by chunk; then n does not matter.

    Returns:
        Bytes.

    Raises:
        ValueError: A number below one, or an unknown covariance type or dtype.

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
    family, tied = factor_class(covariance_type)[0].family, factor_class(covariance_type)[1]
    shape = {"full": d * d, "diagonal": d, "spherical": 1}[family]
    moments = 8 * k * (1 + d + shape) * _COPIES
    return _FIXED + (moments // 2 if tied else moments) + 8 * max(_SAMPLE, 20 * k) * d * _SAMPLE_COPIES


def _per_row(rows: int, k: int, d: int, dtype: torch.dtype) -> int:
    """Bytes of a row in standardized coordinates; where points are sorted into boxes, of a second copy and their order."""
    size = torch.finfo(dtype).bits // 8
    return d * size * 3 + 32 if may_arrange(rows, k, d) else d * size


def _per_streamed_row(rows: int, k: int, d: int, dtype: torch.dtype, stored: int = 0) -> int:
    """Bytes of a row while it is read, in the previous chunk, and of its weight and its place in a random order.

    Args:
        rows, k, d: Rows of a chunk, components, dimensions.
        dtype: What the points are computed in.
        stored: Bytes of a row in its file, where columns that are not needed are read too.
    """
    size = torch.finfo(dtype).bits // 8
    return _ROOM * (stored + _READ * (d + 1) + d * size + 24 + _per_row(rows, k, d, dtype))


def as_bytes(limit: int | float | str) -> int:
    """Bytes from a number, or from text such as "1.5GB" or "800MiB".

    Raises:
        ValueError: It is neither, or not positive.
    """
    if isinstance(limit, str):
        found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", limit.upper())
        if found is None:
            raise ValueError(f"max_memory looks like 2e9, '1.5GB' or '800MiB', got {limit!r}.")
        try:
            limit = float(found[1]) * _UNITS[found[2]]
        except ValueError:
            raise ValueError(f"max_memory looks like 2e9, '1.5GB' or '800MiB', got {limit!r}.") from None
    return int(as_number(limit, "max_memory", 0, above=True))


def chunk_rows(limit: int, k: int, d: int, covariance_type: str, dtype: torch.dtype, stored: int = 0) -> int:
    """Rows of a chunk with which a streamed fit stays below a limit in bytes.

    Args:
        limit: Bytes.
        k, d: Components and dimensions.
        covariance_type: As for :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`.
        dtype: What the points are computed in.
        stored: Bytes of a row in its file, where columns that are not needed are read too.

    Raises:
        ValueError: Not even a small chunk would.
    """
    left = limit - _components(k, d, covariance_type)
    rows = min(NUMBERS // d, left // _per_streamed_row(NUMBERS // d, k, d, dtype, stored))
    if rows < 1000:
        least = _components(k, d, covariance_type) + 1000 * _per_streamed_row(1000, k, d, dtype, stored)
        raise ValueError(
            f"a fit of {k} components in {d} dimensions takes at least {least / 1e6:.0f} MB, max_memory allows "
            f"{limit / 1e6:.0f} MB; raise it, or use fewer components or a simpler covariance type."
        )
    return int(rows)
