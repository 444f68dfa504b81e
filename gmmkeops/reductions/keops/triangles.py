r"""Triangular matrices in KeOps formulas: packed entries, products with vectors, and products of the entries of two vectors.

A lower triangular matrix (K, D, D) is stored as the concatenation of its rows without the zeros, so that D = 3 needs 6 numbers
instead of 9. In more than 16 dimensions a few consecutive rows have the same length, because each product of a row needs a
piece of generated code.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["lower_product", "outer_product", "pack", "packed_size", "symmetric", "upper_product"]

# Largest number of blocks of rows. Each takes a piece of generated code, and compilation takes longer.
_BLOCKS = 16


def _bounds(D: int) -> list[tuple[int, int]]:
    """Return the first row of each block and the row after its last one."""
    height = -(-D // _BLOCKS)
    return [(first, min(D, first + height)) for first in range(0, D, height)]


def packed_size(D: int) -> int:
    """Return the number P of packed entries, D (D + 1) / 2 if D <= 16."""
    return sum((last - first) * last for first, last in _bounds(D))


def pack(matrices: Tensor, lower: bool = True) -> Tensor:
    """Pack lower or upper triangular matrices (K, D, D) into (K, P)."""
    rows = ((row, first, last) for first, last in _bounds(matrices.shape[-1]) for row in range(first, last))
    # Views are concatenated by one kernel, and need no indices that would be copied to a GPU.
    return torch.cat([matrices[:, row, :last] if lower else matrices[:, row, first:] for row, first, last in rows], 1)


def symmetric(packed: Tensor, D: int) -> Tensor:
    """Return the symmetric matrices (K, D, D) whose lower triangles are packed in (K, P)."""
    starts = list(accumulate((last for first, last in _bounds(D) for _ in range(first, last)), initial=0))
    columns = packed.unbind(1)
    entries = [columns[starts[max(a, b)] + min(a, b)] for a in range(D) for b in range(D)]
    return torch.stack(entries, 1).view(-1, D, D)


def lower_product(LazyTensor: Any, packed: Any, begin: int, vector: Any, D: int) -> Any:
    """Create the product (D,) of a lower triangular matrix and a vector, as a LazyTensor.

    Args:
        LazyTensor: The class of KeOps.
        packed: A LazyTensor that contains the packed matrix (P,).
        begin: Position of its first entry. Slices of a slice would be copied twice, which takes longer than the products.
        vector: A LazyTensor (D,).
        D: Number of rows. The shape of a LazyTensor does not contain a last dimension of one.
    """
    return _product(LazyTensor, packed, begin, vector, [(first, last, 0, last) for first, last in _bounds(D)])


def upper_product(LazyTensor: Any, packed: Any, begin: int, vector: Any, D: int) -> Any:
    """Create the product (D,) of an upper triangular matrix and a vector; arguments as for :func:`lower_product`."""
    return _product(LazyTensor, packed, begin, vector, [(first, last, first, D) for first, last in _bounds(D)])


def _product(LazyTensor: Any, packed: Any, begin: int, vector: Any, blocks: list[tuple[int, int, int, int]]) -> Any:
    ends = list(accumulate(((last - first) * (stop - start) for first, last, start, stop in blocks), initial=begin))
    parts = [
        packed[entry:end].matvecmult(vector[start:stop])
        for (entry, end), (_, _, start, stop) in zip(pairwise(ends), blocks, strict=True)
    ]
    return LazyTensor.concatenate(tuple(parts), axis=-1)


def outer_product(LazyTensor: Any, left: Any, right: Any, D: int) -> Any:
    """Create the packed lower triangle (P,) of the outer product of two vectors (D,), all of them LazyTensors."""
    bounds = _bounds(D)
    return LazyTensor.concatenate(tuple(left[first:last].tensorprod(right[:last]) for first, last in bounds), axis=-1)
