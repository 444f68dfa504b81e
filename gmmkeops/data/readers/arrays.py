"""Readers of arrays and tables in memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from gmmkeops._checks import as_tensor, check_dense, check_unmasked
from gmmkeops.data.columns import places, table_names, table_of
from gmmkeops.data.points import shape_hint
from gmmkeops.data.readers.base import Chunk, Columns, Reader, Unit, _chosen, _Place, _stack

__all__ = ["Arrays", "Table"]


@dataclass(frozen=True)
class _Rows:
    """A function that maps only the rows of a unit of a ``.npy`` file into memory.

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


class Arrays(Reader):
    """Reader of an array or tensor in memory, or of a memory map; also of structured arrays."""

    def __init__(
        self,
        x: Any,
        name: str = "x",
        columns: Columns = None,
        weights: str | int | None = None,
        path: Any = None,
        remap: Callable[[Unit], np.memmap] | None = None,
    ) -> None:
        if isinstance(x, np.ma.MaskedArray):
            x = check_unmasked(x, name=name)
        if isinstance(x, Tensor):
            check_dense(x, name=name)
        elif not isinstance(x, np.ndarray) or x.dtype == object:
            x = as_tensor(x, name=name)
        x = x.detach() if isinstance(x, Tensor) else x
        self.x, self.name, self.rows, self.remap = x, name, len(x) if x.ndim else 0, remap
        path = getattr(x, "filename", None) if path is None else path
        self.paths = () if path is None else (Path(path),)
        if isinstance(x, np.ndarray) and self.paths:
            self.stored = x.dtype.itemsize * math.prod(x.shape[1:])
        if isinstance(x, np.ndarray) and x.dtype.names:
            known: list[Any] = list(x.dtype.names)
            if x.ndim != 1:
                raise ValueError(f"{name} must be one row of named columns per point, got shape {x.shape}.")
        else:
            if x.ndim != 2:
                raise ValueError(f"{name} must have shape (N, D), got {tuple(x.shape)}; {shape_hint(x.ndim, name)}.")
            as_tensor(x[:0], name=name)
            known = list(range(x.shape[1]))
        self.columns, self.weights = _chosen(name, known, columns, weights)
        if isinstance(x, np.ndarray) and x.dtype.names:
            self.known = tuple(known if columns is None else self.columns)
        self.all = self.columns == list(range(len(known))) and self.weights is None
        self.features = len(self.columns)
        if isinstance(x, np.ndarray) and x.dtype.names:
            _stack([x[column][:0] for column in self.columns], name)

    def __getstate__(self) -> dict[str, Any]:
        """All attributes; a memory map is replaced by its location in the file."""
        state = dict(vars(self))
        if isinstance(self.x, np.memmap) or self.remap is not None:
            state["x"] = _Place.of(self.x)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        x = state["x"]
        vars(self).update(state, x=x.array() if isinstance(x, _Place) else x)

    def load(self, unit: Unit) -> Chunk:
        part = self.x[unit.first : unit.first + unit.rows] if self.remap is None else self.remap(unit)
        if isinstance(part, Tensor) or self.x.dtype.names is None:
            points = as_tensor(part if self.all else part[:, self.columns], name=self.name)
            weights = None if self.weights is None else as_tensor(part[:, self.weights], name="weights")
        else:
            points = _stack([part[column] for column in self.columns], self.name)
            weights = None if self.weights is None else as_tensor(part[self.weights].copy(), name="weights")
        if isinstance(part, np.memmap):
            points = points.clone() if np.shares_memory(points.numpy(), part) else points
            # Pages that have been read would otherwise count as memory of the process.
            if part.mode in ("r", "r+") and hasattr(mmap, "MADV_DONTNEED"):
                cast(Any, part)._mmap.madvise(mmap.MADV_DONTNEED)
        return Chunk(points, weights)


class Table(Reader):
    """Reader of a table in memory with named columns: pandas, polars, pyarrow."""

    def __init__(self, x: Any, name: str, columns: Columns = None, weights: str | int | None = None) -> None:
        names = table_names(x) or ()
        self.table, self.name, self.rows = x, name, len(x)
        self.columns, self.weights = _chosen(name, names, columns, weights)
        self.known, self.features = names if columns is None else tuple(self.columns), len(self.columns)

    @cached_property
    def numbers(self) -> Arrays:
        """The columns that are read, as an array; the other columns need not be numeric."""
        kept = list(dict.fromkeys([*self.columns, *([] if self.weights is None else [self.weights])]))
        found = as_tensor(table_of(self.table, kept, self.name), name=self.name)
        where = None if self.weights is None else kept.index(self.weights)
        return Arrays(found, self.name, [kept.index(column) for column in self.columns], where)

    def chosen(self, columns: Sequence[str]) -> Reader:
        places(columns, self.known or (), self.name)
        return Table(self.table, self.name, columns, self.weights)

    def load(self, unit: Unit) -> Chunk:
        return self.numbers.load(unit)
