"""Readers of points from arrays, files and functions, with one interface.

A reader divides its rows into units and loads them one by one, in any order. Functions and loaders can only be read from the
beginning (:class:`Streams`). The library for a file format is imported when a file of that format is opened.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import mmap
import os
import sys
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gmmkeops._checks import as_tensor, check_dense, check_unmasked, shape_hint
from gmmkeops._columns import listed, named_alike, places, table_names, table_of
from gmmkeops._declared import Damage, check_las, check_ply

__all__ = [
    "SUFFIXES",
    "Arrays",
    "Chunk",
    "ColumnError",
    "Files",
    "Reader",
    "Streams",
    "Table",
    "Unit",
    "open_file",
    "reason",
]

Columns = Sequence[str | int] | None

# Bytes of the buffer for reading a column of a Parquet file.
_BUFFER = 1 << 18


@dataclass(frozen=True)
class Chunk:
    """A block of rows.

    Args:
        points: Points (n, D), float32 or float64, data units.
        weights: Weights (n,), or None for weights of one.
        first: Index of the first row among all rows.
    """

    points: Tensor
    weights: Tensor | None = None
    first: int = 0


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


class Parquet(Reader):
    """Reader of a Parquet file, by row groups."""

    def __init__(self, path: Path, columns: Columns, weights: str | int | None) -> None:
        ParquetFile = _parquet_file()
        self._open = ParquetFile
        self.name, self.paths = str(path), (path,)
        with ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
            index = _saved_index(file.schema_arrow.metadata)
            sizes = _checked_rows(metadata, path.stat().st_size)
        plain = [name for name in names if name not in index and name != weights] if columns is None else columns
        self.columns, self.weights = _chosen(self.name, names, plain, weights)
        self.known = tuple(names if columns is None else self.columns)
        self.features, self.rows = len(self.columns), sum(sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self.grain = max(sizes, default=1)
        # Batches of the row group that is being read, the rest of the last batch, and the index of the next row.
        self._batches: Iterator[Any] = iter(())
        self._left: Any = None
        self._next = -1

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except the state of reading."""
        return {**vars(self), "_batches": iter(()), "_left": None, "_next": -1}

    def units(self, size: int) -> list[Unit]:
        # A group that is at most a quarter larger than a unit is not split, since the rest would be a small unit.
        groups = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [unit for a, b in groups for unit in _cut(a, b, b - a if 4 * (b - a) <= 5 * size else size)]

    def load(self, unit: Unit) -> Chunk:
        group = bisect_right(self.starts, unit.first) - 1
        first, stop = self.starts[group : group + 2]
        if unit.rows == stop - first:
            self._batches, self._left, self._next = iter(()), None, -1
            with self._open(self.paths[0], pre_buffer=False) as file:
                batches = file.read_row_group(group, columns=self._names, use_threads=False).to_batches()
        else:
            if unit.first == first or unit.first != self._next:
                # A group is read from its beginning, unless the unit follows the last one.
                self._batches, self._left, self._next = self._rows(group, unit.rows), None, first
                self._take(unit.first - first)
            batches = self._take(unit.rows)
        rows = sum(batch.num_rows for batch in batches)
        if rows != unit.rows:
            raise Damage(f"a row group has {rows} rows and promises {unit.rows}")
        arrays = [_column(batches, name) for name in self.columns]
        weights = None if self.weights is None else as_tensor(_column(batches, self.weights), name="weights")
        return Chunk(_stack(arrays, self.name), weights)

    def _take(self, count: int) -> list[Any]:
        """The next rows of the group, in batches."""
        batches = []
        self._next += count
        while count:
            batch = next(self._batches, None) if self._left is None else self._left
            if batch is None:
                raise Damage(f"a row group ends {count} rows early")
            batches.append(batch.slice(0, count))
            self._left = batch.slice(count) if batch.num_rows > count else None
            count -= len(batches[-1])
        return batches

    def _rows(self, group: int, size: int) -> Iterator[Any]:
        # With a buffer, pages are read one after the other; without one, a whole compressed row group is held in memory.
        with self._open(self.paths[0], pre_buffer=False, buffer_size=_BUFFER) as file:
            yield from file.iter_batches(size, row_groups=[group], columns=self._names, use_threads=False)

    @property
    def _names(self) -> list[str]:
        return [*self.columns, *([] if self.weights is None else [self.weights])]


def _saved_index(metadata: dict[bytes, bytes] | None) -> set[str]:
    """Names of the columns in which pandas has saved its index, from the metadata of the file."""
    noted = json.loads((metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    # Entries that are not names describe a range index, which is not stored as a column.
    return {column for column in noted if isinstance(column, str)}


def _checked_rows(metadata: Any, size: int) -> list[int]:
    """The rows of each row group, checked against the values and bytes of its columns.

    Raises:
        Damage: They do not fit each other, or the file.
    """
    rows = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            # A column of lists may hold more values than rows.
            flat = column.path_in_schema.count(".") == 0
            start, stored = column.data_page_offset, column.total_compressed_size
            # A page holds less than 2³¹ values, behind a header of several bytes.
            fits = 0 <= start < size and 0 <= stored <= size and column.num_values <= (1 + stored // 8) << 31
            if not fits or (flat and column.num_values != group.num_rows):
                raise Damage(f"row group {number} promises {group.num_rows} rows, which do not fit its columns")
        if group.num_rows < 0:
            raise Damage(f"row group {number} promises {group.num_rows} rows")
        rows.append(group.num_rows)
    return rows


def _parquet_file() -> Any:
    """Import pyarrow's reader with the system allocator; its own one reserves a gigabyte of address space and frees no memory."""
    name = "ARROW_DEFAULT_MEMORY_POOL"
    if "pyarrow" in sys.modules or name in os.environ:
        from pyarrow.parquet import ParquetFile
    else:
        os.environ[name] = "system"
        try:
            from pyarrow.parquet import ParquetFile
        finally:
            del os.environ[name]
    return ParquetFile


def _column(batches: list[Any], name: str) -> np.ndarray:
    return np.concatenate([batch.column(name).to_numpy(zero_copy_only=False) for batch in batches])


class Las(Reader):
    """Reader of a LAS or LAZ file; coordinates are float64 with scales and offsets applied."""

    def __init__(self, path: Path, columns: Columns, classes: Sequence[int] | None, weights: str | int | None) -> None:
        import laspy

        self.name, self.paths = str(path), (path,)
        layout = check_las(path)
        # Very large chunks are decompressed point by point, which needs no memory for whole chunks.
        backend = None if layout.parallel else (laspy.LazBackend.Lazrs, laspy.LazBackend.Laszip)
        self._open = partial(laspy.open, read_evlrs=False, laz_backend=backend)
        with self._open(path) as file:
            header = file.header
            self.rows = int(header.point_count)
            names = ["x", "y", "z", *header.point_format.dimension_names]
            compressed = header.are_points_compressed
        self.layout, self.header = layout, header
        # First row and byte offset of each chunk, if chunks have different numbers of points.
        self.starts = [(0, layout.start)]
        for rows, size in layout.chunks or ():
            first, place = self.starts[-1]
            self.starts.append((first + rows, place + size))
        self.columns, self.weights = _chosen(self.name, names, ("x", "y", "z") if columns is None else columns, weights)
        self.known = tuple(names if columns is None else self.columns)
        self.grain = 50_000 if compressed else 1
        self.stored = int(header.point_format.size)
        self.classes = None if classes is None else np.asarray(list(classes))
        self.features = len(self.columns)

    def units(self, size: int) -> list[Unit]:
        if self.layout.chunks is None:
            return super().units(size)
        # Only large chunks are split, since each chunk is decompressed as a whole.
        found: list[Unit] = []
        for (first, _), (stop, _) in pairwise(self.starts):
            if found and stop - found[-1].first <= size:
                found[-1] = Unit(found[-1].first, stop - found[-1].first)
            elif stop > first:
                found += _cut(first, stop, stop - first if stop - first <= 2 * size else size)
        return found

    def _points(self, unit: Unit) -> Any:
        """The points of a unit, as a laspy record."""
        if self.layout.chunks is None:
            with self._open(self.paths[0]) as file:
                file.seek(unit.first)
                return file.read_points(unit.rows)
        # lazrs (0.8.2) seeks to wrong points if chunks have different lengths, so the bytes are located here.
        import lazrs
        from laspy.point.record import PackedPointRecord, ScaleAwarePointRecord

        begin = bisect_right(self.starts, unit.first, key=lambda start: start[0]) - 1
        end = bisect_left(self.starts, unit.first + unit.rows, key=lambda start: start[0])
        (first, place), (last, stop) = self.starts[begin], self.starts[end]
        with open(self.paths[0], "rb") as raw:
            raw.seek(place)
            data = raw.read(stop - place)
        out = np.zeros((last - first) * self.header.point_format.size, np.uint8)
        lazrs.decompress_points_with_chunk_table(data, self.layout.laszip, out, list(self.layout.chunks[begin:end]))
        array = PackedPointRecord.from_buffer(out, self.header.point_format).array
        array = array[unit.first - first :][: unit.rows]
        return ScaleAwarePointRecord(array, self.header.point_format, self.header.scales, self.header.offsets)

    def load(self, unit: Unit) -> Chunk:
        try:
            found = self._points(unit)
        except BaseException as error:
            # The decompressor raises a PanicException, which is not an Exception, for damaged data.
            if type(error).__name__ == "PanicException":
                raise Damage("its compressed points are damaged") from None
            raise
        if len(found) != unit.rows:
            raise Damage(f"it ends after {unit.first + len(found)} of the {self.rows} points that its header promises")
        if self.classes is not None:
            found = found[np.isin(np.asarray(found["classification"]), self.classes)]
        arrays = [np.asarray(getattr(found, name) if name in ("x", "y", "z") else found[name]) for name in self.columns]
        weights = None
        if self.weights is not None:
            weights = as_tensor(np.array(found[self.weights], dtype=np.float64), name="weights")
        return Chunk(_stack(arrays, self.name), weights)


class Files(Reader):
    """Reader of several files or arrays, one after the other."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        first = readers[0]
        self.readers = [first]
        for reader in readers[1:]:
            if (reader.names is None) is not (first.names is None):
                with_names, without = (reader, first) if first.names is None else (first, reader)
                raise ValueError(
                    f"the columns of {with_names.name} have names ({listed(with_names.columns)}) and those of "
                    f"{without.name} have none, so they cannot be matched; read these files one by one."
                )
            if reader.features != first.features and reader.names is None:
                raise ValueError(
                    f"{reader.name} has {reader.features} columns but {first.name} has {first.features}; "
                    "select the same ones with columns=."
                )
            if first.names is not None and reader.names is not None and reader.names != first.names:
                named_alike(reader.names, first.names, reader.name, first.name)
                reader = reader.chosen(first.names)
            self.readers.append(reader)
        self.columns, self.known = first.columns, first.known
        self.name = f"{len(readers)} files from {first.name}"
        self.features = first.features
        self.starts = np.concatenate([[0], np.cumsum([reader.rows or 0 for reader in readers])]).tolist()
        self.rows = self.starts[-1]
        self.grain, self.stored = max(reader.grain for reader in readers), max(reader.stored for reader in readers)
        self.paths = tuple(path for reader in readers for path in reader.paths)

    def chosen(self, columns: Sequence[str]) -> Reader:
        if self.known is None:
            return super().chosen(columns)
        return Files([reader.chosen(columns) for reader in self.readers])

    def units(self, size: int) -> list[Unit]:
        return [
            Unit(start + unit.first, unit.rows)
            for start, reader in zip(self.starts, self.readers, strict=False)
            for unit in reader.units(size)
        ]

    def path(self, unit: Unit) -> int:
        return bisect_right(self.starts, unit.first) - 1

    def load(self, unit: Unit) -> Chunk:
        which = self.path(unit)
        reader = self.readers[which]
        try:
            return reader.load(Unit(unit.first - self.starts[which], unit.rows))
        except ColumnError:
            raise
        except Exception as error:
            raise Damage(f"{reader.name}: {reason(error) or 'it is damaged'}") from error


class Streams:
    """Reader of a DataLoader or of a function that returns an iterator of chunks, always from the beginning."""

    paths: tuple[Path, ...] = ()
    stored = 0

    def __init__(self, make: Callable[[], Any], name: str, fields: bool = False) -> None:
        # Whether a list always consists of points and weights (as of a DataLoader), rather than of rows.
        self.fields = fields
        self.make, self.name, self.features = make, name, 0
        self.known: tuple[str, ...] | None = None
        self.names: tuple[str, ...] | None = None
        first, second = self._begin(), self._begin()
        if first is second:
            raise TypeError(
                f"{name} returned the same iterator twice, which can be read only once; make a new one at each call."
            )
        try:
            item = next(first)
        except StopIteration:
            raise ValueError(f"{name} gave no chunks; it must give arrays (n, D).") from None
        self.known = self.names = table_names(self._parts(item)[0])
        self.features = int(self._chunk(item).points.shape[1])

    def chosen(self, columns: Sequence[str]) -> Streams:
        """Return a reader of the same rows with other columns, given by name.

        Raises:
            ValueError: A column is missing, or the columns have no names.
        """
        places(columns, self.known, self.name)
        part = copy.copy(self)
        part.names, part.features = tuple(columns), len(columns)
        return part

    def _begin(self) -> Iterator[Any]:
        """Call the function and return its iterator; raises if it needs arguments or returns something else."""
        _check_callable(self.make, self.name)
        found = self.make()
        if isinstance(found, (np.ndarray, Tensor)) or hasattr(found, "to_numpy"):
            raise TypeError(
                f"{self.name} returned a {type(found).__name__}; it must return an iterator of arrays (n, D): pass the array "
                "itself, or yield it."
            )
        if not hasattr(found, "__iter__"):
            raise TypeError(
                f"{self.name} returned a {type(found).__name__}; it must return an iterator of arrays (n, D), "
                "for example by yield."
            )
        return iter(found)

    def chunks(self) -> Iterator[Chunk]:
        """Iterate over all chunks, from the beginning."""
        return map(self._chunk, self._begin())

    def _chunk(self, item: Any) -> Chunk:
        item, weights = self._parts(item)
        if self.known is not None:
            own = table_names(item)
            if own is None:
                raise ValueError(
                    f"{self.name} gave a table with the columns {listed(self.known)} first and then a chunk without "
                    "names of columns; give tables with the same columns."
                )
            if own != self.known:
                named_alike(own, self.known, f"a chunk of {self.name}", "its first chunk")
            item = table_of(item, self.names, self.name)
        points = as_tensor(item, name=f"what {self.name} gives").detach()
        if points.ndim != 2 or points.shape[1] == 0:
            raise ValueError(f"{self.name} must give arrays of shape (n, D), got {tuple(points.shape)}.")
        if self.features not in (0, points.shape[1]):
            raise ValueError(f"{self.name} gave {points.shape[1]} columns, {self.features} before; give the same ones.")
        return Chunk(points, None if weights is None else self._weights(weights, points))

    def _parts(self, item: Any) -> tuple[Any, Any]:
        """Split an item of the iterator into points and weights (or None)."""
        if not isinstance(item, (tuple, list)):
            return item, None
        # A list of rows is an array. A tuple, or a list whose first item is an array of rows, holds points and weights.
        if isinstance(item, list) and not (item and self._are_points(item)):
            return item, None
        if len(item) not in (1, 2):
            raise ValueError(
                f"{self.name} must give points, or pairs (points, weights), got {len(item)} items at a time; "
                "leave the others out."
            )
        return item[0], item[1] if len(item) == 2 else None

    def _are_points(self, item: list[Any]) -> bool:
        """Whether the first item of a list is an array of points, rather than a row."""
        if self.fields or hasattr(item[0], "columns"):
            return True
        ndim = np.ndim(item[0]) if not isinstance(item[0], Tensor) else item[0].ndim
        if ndim == 1 and len(item) == 2 and isinstance(item[0], (np.ndarray, Tensor)) and not self.features:
            raise ValueError(
                f"{self.name} gave a list of two arrays of one dimension, which may be two rows, or points and weights; give "
                "an array (n, D), or a pair (points, weights) with points of shape (n, D)."
            )
        return ndim >= 2

    def _weights(self, weights: Any, points: Tensor) -> Tensor:
        name = f"the weights that {self.name} gives beside its points"
        if isinstance(weights, np.ma.MaskedArray):
            weights = check_unmasked(weights, name=name)
        kind = weights if isinstance(weights, Tensor) else np.asarray(weights)
        real = kind.is_floating_point() if isinstance(kind, Tensor) else kind.dtype.kind in "fO"
        if not real:
            dtype = str(kind.dtype).removeprefix("torch.")
            raise TypeError(
                f"{name} must be floats, got {dtype}, which may be labels; give the points alone, or weights as floats."
            )
        found = as_tensor(weights, name=name)
        if found.shape == (len(points), 1):
            found = found[:, 0]
        if found.shape != points.shape[:1]:
            raise ValueError(
                f"{name} must have shape ({len(points)},), one per point, got {tuple(found.shape)}; "
                "give the points alone, or a flat array of weights."
            )
        return found


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


def _npy(path: Path, columns: Columns, classes: Any, weights: Any) -> Reader:
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
        return Arrays(whole, str(path), columns, weights, path)
    # A placeholder for the file, whose address space does not grow with the file.
    stand_in = np.broadcast_to(np.zeros((), whole.dtype), whole.shape)
    return Arrays(stand_in, str(path), columns, weights, path, _Rows(path, whole.dtype, whole.shape[1], whole.offset))


def _parquet(path: Path, columns: Columns, classes: Any, weights: Any) -> Reader:
    return Parquet(path, columns, weights)


def _las(path: Path, columns: Columns, classes: Any, weights: Any) -> Reader:
    return Las(path, columns, classes, weights)


def _ply(path: Path, columns: Columns, classes: Any, weights: Any) -> Reader:
    from plyfile import PlyData

    check_ply(path)
    data = PlyData.read(path, mmap="r")["vertex"].data
    reader = Arrays(data, str(path), ("x", "y", "z") if columns is None else columns, weights, path)
    reader.known = data.dtype.names if columns is None else reader.known
    return reader


# For each suffix, the function that opens a file, and the extra of this package that installs its library.
SUFFIXES: dict[str, tuple[Callable[[Path, Columns, Any, Any], Reader], str]] = {
    ".npy": (_npy, ""),
    ".parquet": (_parquet, "parquet"),
    ".pq": (_parquet, "parquet"),
    ".las": (_las, "las"),
    ".laz": (_las, "las"),
    ".ply": (_ply, "ply"),
}


def open_file(
    path: str | os.PathLike[str], columns: Columns, classes: Sequence[int] | None, weights: str | int | None
) -> Reader:
    """Open one file with the reader for its suffix.

    Raises:
        FileNotFoundError, ImportError, ValueError: The file does not exist, its library is not installed, or it cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path} has a suffix that is none of {', '.join(SUFFIXES)}; read it yourself and pass an array or a function."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if classes is not None and suffix not in (".las", ".laz"):
        raise ValueError(f"classes choose points of LAS and LAZ files, and {path} is neither; leave them out.")
    make, extra = SUFFIXES[suffix]
    try:
        return make(path, columns, classes, weights)
    except ImportError as error:
        raise ImportError(
            f'reading {path} needs {error.name}; type: pip install "gmmkeops[{extra}]"', name=error.name
        ) from None
    except ColumnError:
        raise
    except Exception as error:
        if _no_decompressor(error):
            raise ImportError(f'reading {path} needs lazrs; type: pip install "gmmkeops[las]"') from None
        why = reason(error)
        raise ValueError(
            f"{path} cannot be read as {suffix[1:]}{f' ({why})' if why else ''}; it may be cut short, damaged or of another kind."
        ) from error


def reason(error: Exception) -> str:
    """Reason why a file cannot be read, in one clause; empty for errors of other libraries, whose texts vary."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for what it declares"
    return str(error).rstrip(".") if isinstance(error, (Damage, ColumnError)) else ""


def _no_decompressor(error: Exception) -> bool:
    return "LazBackend" in str(error)
