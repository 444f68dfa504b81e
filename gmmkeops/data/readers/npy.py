"""Reader of NumPy's ``.npy`` files, as memory maps; the format is that of :func:`numpy.lib.format.write_array`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from gmmkeops.data.readers.arrays import Arrays, Place
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
            raise Damage("it does not begin with the signature of .npy files")
    with warnings.catch_warnings():
        # Parsing a damaged header can cause Python warnings.
        warnings.simplefilter("ignore")
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
    if whole.dtype.itemsize == 0:
        raise Damage("its rows have no bytes")
    if whole.dtype.names is None and whole.dtype.kind not in "fiub":
        raise ColumnError(f"{path} must be numeric, got dtype {whole.dtype}; convert its columns to numbers first.")
    if not whole.flags.c_contiguous or whole.ndim != 2:
        return Arrays(whole, str(path), columns, weights, path=path)
    # The file is mapped unit by unit to limit the address space.
    return Arrays(Place(path, whole.dtype, whole.shape, whole.offset), str(path), columns, weights)
