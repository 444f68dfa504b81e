"""The interface of readers: units of rows that are loaded one by one, in any order."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops._checks import check_unmasked
from gmmkeops.data.batch import Batch
from gmmkeops.data.columns import listed, places
from gmmkeops.data.readers.declared import Damage

__all__ = ["Chunk", "ColumnError", "Columns", "Reader", "Unit", "reason"]

Columns = Sequence[str | int] | None

# Bytes of the buffer for reading a column of a Parquet file.
_BUFFER = 1 << 18


# The name of version 0.1.
Chunk = Batch


@dataclass(frozen=True)
class Unit:
    """A row range that is loaded at once.

    Args:
        first: Index of the first row among all rows of the reader.
        rows: Number of rows before filtering.
    """

    first: int
    rows: int


class Reader(ABC):
    """Abstract reader of rows, in units.

    Attributes:
        name: Name of the data in messages.
        features: Number of columns D that are read.
        columns: The columns that are read: names, or indices if the columns have no names.
        known: Names of the columns that can be read; None if the columns have no names.
        rows: Number of rows before filtering; None if it is not known before reading.
        paths: The files that are read.
        grain: Number of rows below which smaller units take no less time to read.
        stored: Bytes of a row in its file, with unused columns; 0 if only the needed columns are read.
    """

    name: str
    features: int
    columns: list[Any]
    known: tuple[str, ...] | None = None
    rows: int | None
    paths: tuple[Path, ...] = ()
    grain: int = 1
    stored: int = 0

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the columns in the order in which they are read; None if they have no names."""
        return None if self.known is None else tuple(self.columns)

    def chosen(self, columns: Sequence[str]) -> Reader:
        """Return a reader of the same rows with other columns, given by name.

        Raises:
            ValueError: A column is missing, or the columns have no names.
        """
        places(columns, self.known, self.name)
        part = copy.copy(self)
        part.columns, part.features = list(columns), len(columns)
        return part

    def path(self, unit: Unit) -> int:
        """Index of the file that contains a unit."""
        return 0

    def units(self, size: int) -> list[Unit]:
        """All rows in units of at most about ``size``."""
        return _cut(0, self.rows or 0, size)

    @abstractmethod
    def load(self, unit: Unit) -> Chunk:
        """The rows of a unit."""


def _cut(first: int, stop: int, size: int) -> list[Unit]:
    return [Unit(start, min(size, stop - start)) for start in range(first, stop, size)]


@dataclass(frozen=True)
class _Place:
    """Location of an array's numbers in a file, in a form that can be pickled.

    Args:
        path: The file; None for an array that only stands for one.
        dtype, shape: Of the array.
        offset: Bytes before its first number.
        mode: Of the memory map.
    """

    path: str | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int = 0
    mode: str = "r"

    @classmethod
    def of(cls, x: np.ndarray) -> _Place | np.ndarray:
        """Location of a memory map or of its placeholder; a copy of the array if it is not a contiguous part of a file."""
        if not isinstance(x, np.memmap):
            return cls(None, x.dtype, x.shape)
        root = x
        while isinstance(root.base, np.memmap):
            root = root.base
        # Changes to a private memory map are not in the file.
        if root.filename is None or root.mode == "c" or not x.flags.c_contiguous:
            return np.array(x)
        away = x.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        return cls(str(root.filename), x.dtype, x.shape, root.offset + away)

    def array(self) -> np.ndarray:
        """Open the array again."""
        if self.path is None:
            return np.broadcast_to(np.zeros((), self.dtype), self.shape)
        return np.memmap(self.path, self.dtype, self.mode, self.offset, self.shape)  # type: ignore[call-overload]


def _check_callable(make: Callable[[], Any], name: str) -> None:
    """Raises a TypeError for a function that needs arguments."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return
    try:
        signature.bind()
    except TypeError:
        needed = [
            p.name for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
        ]
        raise TypeError(
            f"{name} must take no arguments, got one that needs {', '.join(needed)}; wrap it, as lambda: function(...)."
        ) from None


class ColumnError(ValueError):
    """The requested columns do not exist, or are not numeric."""


def _chosen(name: str, known: Sequence[Any], columns: Columns, weights: str | int | None) -> tuple[list[Any], Any]:
    """Validate the columns to read, and the column of weights, against the known ones."""
    # A name that consists of digits may have been parsed as an index.
    written = {str(column): column for column in known if isinstance(column, str)}
    weights = written.get(str(weights), weights) if isinstance(weights, int) else weights
    wanted = [column for column in known if column != weights] if columns is None else list(columns)
    wanted = [written.get(str(column), column) if isinstance(column, int) else column for column in wanted]
    for column in [*wanted, *([] if weights is None else [weights])]:
        if column not in known:
            raise ColumnError(f"there is no column {column!r} in {name}; it has the columns {listed(known)}.")
        if list(known).count(column) > 1:
            raise ColumnError(f"{name} has {list(known).count(column)} columns named {column}; give each its own name.")
    if len(set(wanted)) < len(wanted):
        raise ColumnError(f"columns must name each column once, got {listed(wanted)} for {name}.")
    if not wanted:
        raise ColumnError(f"no columns of {name} are left to read; it has the columns {listed(known)}.")
    return wanted, weights


def _stack(arrays: list[Any], name: str) -> Tensor:
    """Stack columns (n,) to points (n, D): float32 if all columns are, else float64."""
    single = all(array.dtype == np.float32 for array in arrays)
    out = np.empty((len(arrays[0]), len(arrays)), np.float32 if single else np.float64)
    for d, array in enumerate(arrays):
        if isinstance(array, np.ma.MaskedArray):
            array = check_unmasked(array, name=name)
        if array.dtype.kind not in "fiub":
            raise ColumnError(f"{name} must be numeric, got a column of {array.dtype}; choose others with columns=.")
        out[:, d] = array
    return torch.from_numpy(out)


def reason(error: Exception) -> str:
    """Reason why a file cannot be read, in one clause; empty for errors of other libraries, whose texts vary."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for what it declares"
    return str(error).rstrip(".") if isinstance(error, (Damage, ColumnError)) else ""
