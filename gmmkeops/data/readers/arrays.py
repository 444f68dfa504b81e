"""Readers of arrays and tables in memory, and of memory maps."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from gmmkeops.components import as_tensor, check_dense, check_unmasked
from gmmkeops.data.batch import Batch
from gmmkeops.data.chunks import Unit
from gmmkeops.data.columns import places, table_names, table_of
from gmmkeops.data.points import shape_hint
from gmmkeops.data.readers.base import Columns, Reader, Weights, stack

__all__ = ["Arrays", "Place", "Table"]


class Arrays(Reader):
    """Reader of an array or tensor in memory, or of a memory map; also of structured arrays.

    Args:
        x: The rows (N, D), or a structured array (N,); or the location of an array in a file, which is mapped unit by unit.
        name: Name of the data in messages.
        columns, weights: The columns to read, and the column of weights.
        path: The file of the numbers, unless ``x`` is a memory map of it.
        default: The columns to read if ``columns`` is None; by default all except the weights.
    """

    def __init__(
        self,
        x: Any,
        name: str = "x",
        columns: Columns = None,
        weights: Weights = None,
        *,
        path: Path | None = None,
        default: Columns = None,
    ) -> None:
        self.place = x if isinstance(x, Place) else None
        if isinstance(x, Place):
            path, x = x.path, x.placeholder()
        if isinstance(x, np.ma.MaskedArray):
            x = check_unmasked(x, name=name)
        if isinstance(x, Tensor):
            check_dense(x, name=name)
        elif not isinstance(x, np.ndarray) or x.dtype == object:
            x = as_tensor(x, name=name)
        x = x.detach() if isinstance(x, Tensor) else x
        self.x, self.name, self.rows = x, name, len(x) if x.ndim else 0
        path = getattr(x, "filename", None) if path is None else path
        self.paths = () if path is None else (Path(path),)
        if isinstance(x, np.ndarray) and self.paths:
            self.stored = x.dtype.itemsize * math.prod(x.shape[1:])
        self.fields = x.dtype.names if isinstance(x, np.ndarray) else None
        if self.fields and x.ndim != 1:
            raise ValueError(f"{name} must have shape (N,) as a structured array, got {x.shape}; flatten it first.")
        if not self.fields:
            if x.ndim != 2:
                raise ValueError(f"{name} must have shape (N, D), got {tuple(x.shape)}; {shape_hint(x.ndim, name)}.")
            as_tensor(x[:0], name=name)
        known: Sequence[Any] = self.fields or range(x.shape[1])
        self.choose(known, columns, weights, default)
        self.all = self.columns == list(known) and self.weights is None
        if self.fields:
            stack([x[column][:0] for column in self.columns], name)

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes, with a memory map replaced by its location in the file."""
        return {**vars(self), "x": self.place or (Place.of(self.x) if isinstance(self.x, np.memmap) else self.x)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self.x, Place):
            self.x = self.x.placeholder() if self.place else self.x.array()

    def load(self, unit: Unit) -> Batch:
        part = self.place.rows(unit) if self.place else self.x[unit.first : unit.first + unit.rows]
        if self.fields:
            chunk = self.assembled(lambda column: part[column])
        else:
            points = as_tensor(part if self.all else part[:, self.columns], name=self.name)
            chunk = Batch(points, None if self.weights is None else as_tensor(part[:, self.weights], name="weights"))
        if isinstance(part, np.memmap):
            if np.shares_memory(chunk.points.numpy(), part):
                chunk = replace(chunk, points=chunk.points.clone())
            # The pages are released; otherwise they would count as memory of the process.
            if part.mode in ("r", "r+") and hasattr(mmap, "MADV_DONTNEED"):
                cast(Any, part)._mmap.madvise(mmap.MADV_DONTNEED)
        return chunk


class Table(Reader):
    """Reader of a table in memory with named columns: pandas, polars, pyarrow."""

    def __init__(self, x: Any, name: str = "x", columns: Columns = None, weights: Weights = None) -> None:
        self.table, self.name, self.rows = x, name, len(x)
        self.choose(table_names(x) or (), columns, weights)

    @cached_property
    def numbers(self) -> Arrays:
        """Array of the columns that are read; the other columns need not be numeric."""
        kept = list(dict.fromkeys([*self.columns, *([] if self.weights is None else [self.weights])]))
        found = as_tensor(table_of(self.table, kept, self.name), name=self.name)
        where = None if self.weights is None else kept.index(self.weights)
        return Arrays(found, self.name, [kept.index(column) for column in self.columns], where)

    def chosen(self, columns: Sequence[str]) -> Table:
        places(columns, self.known or (), self.name)
        return Table(self.table, self.name, columns, self.weights)

    def load(self, unit: Unit) -> Batch:
        return self.numbers.load(unit)


@dataclass(frozen=True)
class Place:
    """Location of the numbers of an array in a file.

    Args:
        path: The file.
        dtype, shape: Type and shape of the array.
        offset: Position of its first number, bytes.
        mode: Mode of the memory map.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int = 0
    mode: str = "r"

    @classmethod
    def of(cls, x: np.memmap) -> Place | np.ndarray:
        """Return the location of a memory map, or a copy of its numbers if they are not contiguous in the file."""
        root = x
        while isinstance(root.base, np.memmap):
            root = root.base
        # Changes to a copy-on-write memory map are not in the file.
        if root.filename is None or root.mode == "c" or not x.flags.c_contiguous:
            return np.array(x)
        away = x.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        return cls(Path(root.filename), x.dtype, x.shape, root.offset + away, root.mode)

    def rows(self, unit: Unit) -> np.memmap:
        """Map the rows of a unit into memory."""
        first = self.offset + unit.first * self.dtype.itemsize * math.prod(self.shape[1:])
        return np.memmap(self.path, self.dtype, "r", first, (unit.rows, *self.shape[1:]))

    def array(self) -> np.ndarray:
        """Map the whole array into memory."""
        return np.memmap(self.path, self.dtype, self.mode, self.offset, self.shape)  # type: ignore[call-overload]

    def placeholder(self) -> np.ndarray:
        """Return an array of this dtype and shape that takes no memory and no address space."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)
