"""Data sets that may be larger than memory: files, memory maps, loaders and functions, read chunk by chunk on every pass.

Rows are counted on every pass, so that a file that is truncated, grows or changes raises an error. The first pass draws a random
sample of the rows.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmmkeops._checks import as_integer
from gmmkeops.components import as_tensor, check_finite, mind_fork
from gmmkeops.data.batch import Batch
from gmmkeops.data.chunks import Unit, grouped, joined, resized
from gmmkeops.data.columns import table_of
from gmmkeops.data.points import as_points, as_weights
from gmmkeops.data.readers.base import ColumnError, Damage, Reader, reason
from gmmkeops.data.readers.formats import external, reader_of
from gmmkeops.data.readers.streams import Streams
from gmmkeops.data.reading import ReadingThread
from gmmkeops.data.survey import SAMPLE, Reservoir, Survey, Tally, fingerprint

__all__ = ["NUMBERS", "Source", "chunked", "readable"]

# Number of entries of a chunk: large enough for efficient reductions, small compared with the memory of a process.
NUMBERS = 1 << 20

# In a pass in random order, each chunk combines this number of row ranges.
_PLACES = 256


class Source:
    """Points (N, D) that can be read repeatedly, chunk by chunk.

    All functions that fit or score accept a source. They create a source themselves for data that are not in memory.

    Args:
        x: An array, a tensor or a memory map (N, D); the path of a ``.npy``, Parquet, LAS, LAZ or PLY file, a folder or
            a glob pattern such as ``"scan/*.laz"``, or a list of these; a torch DataLoader; or a function that returns a new
            iterator at each call. Loaders and functions yield arrays (n, D), or pairs (points, weights) with float weights
            (n,) or (n, 1). Integer weights are rejected, since they may be labels.
        columns: Columns to read: names, or indices of the columns of an array. By default all columns except the
            weights, or x, y and z of LAS and PLY files. Index columns that pandas saves in Parquet files are omitted. The
            columns of several files are matched by name, in the order of the first file.
        classes: Classes of the points to read from LAS files; None for all.
        weights: Name or index of the column of weights, or an array of weights (N,).
        chunk_rows: Chunk size in rows; None for chunks of about a million numbers.

    Attributes:
        name: Name of the data in messages.
        features: Number of columns D.
        columns: Column names in the order of reading, or None if the data have no column names.
        paths: The files that are read.

    Raises:
        TypeError: The data can be read only once, such as a generator, or are not numeric.
        FileNotFoundError, ImportError: The file does not exist, or the library for its format is not installed.
        ValueError: The file is damaged, a column is missing, or shapes do not match.

    Example:
        >>> import numpy as np, gmmkeops as gk
        >>> source = gk.Source(lambda: (np.full((4, 2), float(part)) for part in range(3)))
        >>> source.features, source.survey().rows
        (2, 12)
    """

    def __init__(
        self,
        x: Any,
        *,
        columns: Sequence[str | int] | None = None,
        classes: Sequence[int] | None = None,
        weights: Any = None,
        chunk_rows: int | None = None,
    ) -> None:
        if isinstance(x, Source):
            raise TypeError("x is already a Source; pass it without creating a new Source.")
        if columns is not None and (isinstance(columns, str) or not hasattr(columns, "__len__")):
            raise TypeError(f"columns must be a list of names or numbers, got {columns!r}; pass [{columns!r}].")
        if classes is not None:
            if isinstance(classes, (str, bytes)) or not isinstance(classes, Iterable):
                raise TypeError(f"classes must be a list of integers, got {classes!r}; pass [{classes!r}].")
            classes = [as_integer(item, "each of the classes", 0) for item in classes]
        named = isinstance(weights, (str, int, np.integer)) and not isinstance(weights, bool)
        column, given = (weights, None) if named else (None, weights)
        reader = reader_of(x, columns, column, classes)
        if isinstance(reader, Streams) and (columns is not None or column is not None):
            raise ValueError(
                "columns= and weights= cannot be used with a loader or a function; yield only these columns, or pairs "
                "(points, weights)."
            )
        self.reader, self.name, self.features = reader, reader.name, reader.features
        self.columns, self.paths, self.chunk_rows = reader.names, reader.paths, chunk_rows
        self.size = max(1, NUMBERS // self.features) if chunk_rows is None else as_integer(chunk_rows, "chunk_rows", 1)
        self.rows = None if isinstance(reader, Streams) else reader.rows
        self.share, self.first = (0, 1), 0
        self.classes = classes
        self.weights = None if given is None else self._own_weights(given)
        self._survey: Survey | None = None
        self._thread = ReadingThread()
        self._stamps: list[tuple[int, int]] | None = None

    def _own_weights(self, given: Any) -> np.ndarray:
        """Validate an array of weights (N,) for data with a known number of rows."""
        weights: np.ndarray = as_tensor(given, name="weights", dtype=torch.float64).detach().cpu().numpy()
        if self.classes is not None or isinstance(self.reader, Streams):
            raise ValueError(
                "weights can only be an array for data with a known number of rows, not for functions or with classes=; pass the "
                "name of a column of weights, or yield pairs (points, weights)."
            )
        if weights.shape != (self.reader.rows,):
            raise ValueError(
                f"weights must have shape ({self.reader.rows},), one per row of {self.name}, got {weights.shape}."
            )
        return weights

    @classmethod
    def of(cls, x: Any, **choices: Any) -> Source:
        """Return a source of the data: ``x`` itself if it is one.

        Args:
            x: As for :class:`Source`, or a source.
            **choices: Keyword arguments of :class:`Source`.

        Raises:
            TypeError, ValueError: As for :class:`Source`; or ``x`` is a source and a keyword argument is given.
        """
        if not isinstance(x, Source):
            return cls(x, **choices)
        if any(choice is not None for choice in choices.values()):
            raise ValueError("x is already a Source; pass columns, classes, weights and chunk_rows to Source instead.")
        return x

    def __repr__(self) -> str:
        rows = "" if self.rows is None else f"{self.rows} rows, "
        return f"Source({self.name}: {rows}{self.features} columns)"

    def units(self, places: int = 1) -> list[list[Unit]] | None:
        """Return groups of units that are read together, for the shard of this process; None for loaders and functions.

        Args:
            places: Number of row ranges in each group.
        """
        if isinstance(self.reader, Streams):
            return None
        rank, count = self.share
        size = max(-(-self.size // places), self.reader.grain if places > 1 else 1)
        if count > 1:
            size = min(size, max(1, (self.reader.rows) // (8 * count)))
        units = self.reader.units(size)
        return grouped(units[len(units) * rank // count : len(units) * (rank + 1) // count], self.size)

    def matched(self, columns: Sequence[str] | None) -> Source:
        """Return a source of the same rows with the columns of a model, matched by name.

        Args:
            columns: Column names of the model, or None if it has no names.

        Returns:
            A source of these columns in this order; the same source if the model or the data have no column names (columns are
            then matched by position).

        Raises:
            ValueError: A column is missing; the message lists the existing columns.

        Example:
            >>> import numpy as np, gmmkeops as gk
            >>> rows = np.array([(1.0, 2.0, 3.0)], [("a", "f8"), ("b", "f8"), ("c", "f8")])
            >>> gk.Source.of(rows).matched(["c", "a"]).survey().reservoir.sample()[0].tolist()
            [[3.0, 1.0]]
        """
        if columns is None or self.columns is None or self.columns == tuple(columns):
            return self
        part = copy.copy(self)
        part.reader = self.reader.chosen(columns)
        part.columns, part.features = tuple(columns), len(columns)
        part.size = self.size if self.chunk_rows else max(1, self.size * self.features // part.features)
        part._survey = None
        return part

    def in_chunks(self, rows: int) -> Source:
        """Return the same source with chunks of at most ``rows`` rows."""
        part = copy.copy(self)
        part.size = min(self.size, rows)
        return part

    def shared(self, rank: int, count: int, first: int = 0) -> Source:
        """Return shard ``rank`` of ``count`` shards of the rows, which are numbered from ``first``."""
        part = copy.copy(self)
        part.share, part.first, part._survey = (rank, count), first, None
        return part

    @property
    def slice(self) -> slice:
        """Row range of the shard of this process."""
        units = [unit for group in self.units() or [] for unit in group]
        return slice(units[0].first, units[-1].first + units[-1].rows) if units else slice(0, 0)

    def identity(self) -> Any:
        """Return an identifier for a comparison between ranks: paths, sizes and times of files, or a hash of an array."""
        if isinstance(self.reader, Streams):
            return None
        if self.reader.paths:
            self._check_stamps()
            return [[str(path) for path in self.reader.paths], [list(stamp) for stamp in self._stamps or []]]
        weights = None if self.weights is None else torch.from_numpy(self.weights)
        points = self.reader.load(Unit(0, self.rows or 0)).points
        return fingerprint(points, weights)

    def shuffled(self, generator: torch.Generator) -> list[list[Unit]] | None:
        """Return the groups of :meth:`units` in random order, each with rows from several parts of the data."""
        units = [unit for group in self.units(_PLACES) or [] for unit in group]
        order = torch.randperm(len(units), generator=generator).tolist()
        return grouped([units[i] for i in order], self.size) if units else self.units()

    def chunks(
        self, skip: int = 0, order: list[list[Unit]] | None = None, prepare: Callable[[Batch], Any] | None = None
    ) -> Iterator[Any]:
        """Iterate over the validated chunks of one pass; the next chunk is loaded while the current one is in use.

        Args:
            skip: Number of chunks to skip at the beginning.
            order: Groups of units in the order of reading; None for the order of the rows.
            prepare: Function that is applied to each chunk in the loading thread, and whose results are yielded.

        Raises:
            ValueError: A chunk cannot be read or has entries that are not finite, or the data differ from those of the first
                pass.
        """
        mind_fork()
        self._check_stamps()
        tally = Tally()
        loaded = self._loaded(self.units() if order is None else order, skip)

        def one() -> Any:
            chunk = next(loaded, None)
            if chunk is None:
                return None
            tally.add(chunk)
            return chunk if prepare is None else prepare(chunk)

        loading = self._thread.start(one)
        while (item := loading()) is not None:
            loading = self._thread.start(one)
            yield item
        self._check_stamps()
        if skip == 0 and self._survey is not None:
            tally.compare(self._survey, self.name)

    def _loaded(self, units: list[list[Unit]] | None, skip: int) -> Iterator[Batch]:
        if isinstance(self.reader, Streams):
            pieces: Iterator[Batch] = islice(resized(self.reader.chunks(), self.size), skip, None)
        else:
            pieces = (joined([self._load(unit) for unit in group]) for group in (units or [])[skip:])
        # No loop variable is used, since it would keep the last chunk in memory while the next one is read.
        return map(self._checked, pieces)

    def _checked(self, chunk: Batch) -> Batch:
        check_finite(chunk.points, name=self.name, first=chunk.first)
        name = f"weights of {self.name}"
        return replace(chunk, weights=as_weights(chunk.weights, chunk.points, name=name, some=False, first=chunk.first))

    def _load(self, unit: Unit) -> Batch:
        assert isinstance(self.reader, Reader), "units are loaded by a reader"
        try:
            if self.reader.paths:
                self._check_stamps(self.reader.path(unit))
            chunk = self.reader.load(unit)
        except Exception as error:
            if isinstance(error, ColumnError) or not self.reader.paths:
                raise
            why = f" ({found})" if (found := reason(error)) else ""
            raise ValueError(
                f"{self.name} cannot be read from row {unit.first} to {unit.first + unit.rows}{why}; the file may be truncated, "
                "damaged, or have changed since it was opened; write it again."
            ) from error
        if self.weights is not None:
            chunk = replace(chunk, weights=torch.from_numpy(self.weights[unit.first : unit.first + unit.rows]))
        return replace(chunk, first=self.first + unit.first)

    def _check_stamps(self, which: int | None = None) -> None:
        """Check that size and modification time of all files, or of one, have not changed."""
        paths = self.reader.paths
        if self._stamps is None:
            self._stamps = [_stamp(path) for path in paths]
        for i in range(len(paths)) if which is None else [which]:
            old, new = self._stamps[i], _stamp(paths[i])
            if old != new:
                what = f"it had {old[0]} bytes and has {new[0]}" if old[0] != new[0] else "it was written to"
                raise Damage(f"{paths[i]} changed while it was read: {what}; start again when the file is complete.")

    def survey(self, size: int = SAMPLE, *, alone: bool = True) -> Survey:
        """Read all rows once; return their number, total weight, checksums and a random sample. The result is cached.

        Args:
            size: Minimum size of the sample, if there are enough rows.
            alone: Whether these are all points (at least one is required), rather than the shard of a rank.

        Raises:
            ValueError: There are no rows of positive weight, or they cannot be read (:meth:`chunks`).
        """
        mind_fork()
        if self._survey is not None and self._survey.reservoir.size >= size:
            return self._survey
        reservoir, tally, squares, mark, single = Reservoir(size), Tally(), 0.0, 0, True
        for chunk in self.chunks():
            reservoir.add(chunk.points, chunk.weights, chunk.first)
            tally.add(chunk)
            squares += len(chunk.points) if chunk.weights is None else float(chunk.weights.square().sum())
            mark += fingerprint(chunk.points, chunk.weights)
            single &= chunk.points.dtype == torch.float32
        if not (tally.rows and tally.mass > 0) and alone:
            raise self.nothing(tally.rows)
        total = (tally.total, tally.magnitude)
        self._survey = Survey(tally.rows, tally.mass, squares, total, mark % (1 << 64), single, reservoir)
        return self._survey

    def nothing(self, rows: int = 0) -> ValueError:
        """Return the error for a source without rows, or without rows of positive weight."""
        if rows:
            return ValueError(f"weights of {self.name} must not all be zero; omit weights for equal weights.")
        if self.classes is not None:
            return ValueError(
                f"{self.name} has no points of classes={list(self.classes)}; pass classes that the file contains, or omit "
                "classes."
            )
        return ValueError(f"{self.name} has no rows; pass at least one point.")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        raise Damage(f"{path} no longer exists; restore the file and start again.") from None
    return status.st_size, status.st_mtime_ns


def readable(x: Any) -> bool:
    """Return whether data are read chunk by chunk, rather than passed as numbers in memory.

    Raises:
        TypeError: The data can be read only once (an iterator).
    """
    return isinstance(x, Source) or external(x)


def chunked(
    x: Any, weights: Any = None, *, features: int | None = None, columns: Sequence[str] | None = None
) -> Iterator[Batch]:
    """Return validated chunks: points in memory as one chunk, or the chunks of a source.

    Args:
        x: Points (N, D), or anything that :meth:`Source.of` accepts.
        weights: Weight of each point (N,), or None.
        features: Expected D, if known.
        columns: Column names of the model, to which data with names are matched; None if the model has no names.

    Raises:
        TypeError, ValueError: Points or weights are invalid, or a column is missing.
    """
    if not readable(x):
        points = as_points(table_of(x, columns), features=features)
        return iter([Batch(points, as_weights(weights, points))])
    source = Source.of(x, weights=weights).matched(columns)
    if features not in (None, source.features):
        raise ValueError(
            f"{source.name} has {source.features} columns, expected {features} as in the model; pass the same columns."
        )
    return _some(source)


def _some(source: Source) -> Iterator[Batch]:
    """Iterate over the nonempty chunks of a source; raise an error if no row has positive weight."""
    rows, mass = 0, 0.0
    for chunk in source.chunks():
        if len(chunk.points):
            rows, mass = rows + len(chunk.points), mass + chunk.mass
            yield chunk
    if not mass > 0:
        raise source.nothing(rows)
