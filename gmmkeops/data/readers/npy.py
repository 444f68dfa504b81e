"""Reader of NumPy's ``.npy`` files, as memory maps; the format is that of :func:`numpy.lib.format.write_array`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmmkeops.data.chunks import Unit
from gmmkeops.data.readers.arrays import Arrays
from gmmkeops.data.readers.base import ColumnError, Columns, Damage, Weights

__all__ = ["npy"]


def npy(path: Path, columns: Columns = None, weights: Weights = None) -> Arrays:
    """Return a reader of a ``.npy`` file.

    Raises:
        Damage, ValueError, OSError: The file is damaged.
        ColumnError: The file is not numeric, or a column does not exist.
    """
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise Damage("it does not begin as .npy files do")
    with warnings.catch_warnings():
        # Parsing a damaged header may cause warnings of Python.
        warnings.simplefilter("ignore")
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
    if whole.dtype.itemsize == 0:
        raise Damage("its rows have no bytes")
    if whole.dtype.names is None and whole.dtype.kind not in "fiub":
        raise ColumnError(f"{path} must be numeric, got dtype {whole.dtype}; convert its columns to numbers first.")
    if not whole.flags.c_contiguous or whole.ndim != 2:
        return Arrays(whole, str(path), columns, weights, path=path)
    # A placeholder for the file, whose address space does not grow with the file.
    placeholder = np.broadcast_to(np.zeros((), whole.dtype), whole.shape)
    remap = _Rows(path, whole.dtype, whole.shape[1], whole.offset)
    return Arrays(placeholder, str(path), columns, weights, path=path, remap=remap)


@dataclass(frozen=True)
class _Rows:
    """Function that maps only the rows of a unit of a ``.npy`` file into memory.

    Args:
        path: The file.
        dtype: Type of its numbers.
        width: Number of entries in a row.
        offset: Bytes before the first row.
    """

    path: Path
    dtype: np.dtype[Any]
    width: int
    offset: int

    def __call__(self, unit: Unit) -> np.memmap:
        first = self.offset + unit.first * self.width * self.dtype.itemsize
        return np.memmap(self.path, self.dtype, "r", first, (unit.rows, self.width))
