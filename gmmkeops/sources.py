r"""Points that are too many for memory: files, memory maps, loaders and functions, read a chunk at a time, pass after pass.

Rows are counted on every pass, so that a file that is cut short, grows or changes is an error and not a shorter fit. The
first pass takes a sample that stands for all rows.
"""

from __future__ import annotations

import copy
import ctypes
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmmkeops._arguments import as_integer
from gmmkeops._checks import as_points, as_tensor, as_weights, check_finite
from gmmkeops._columns import table_names, table_of
from gmmkeops._declared import Damage
from gmmkeops._forks import mind_fork
from gmmkeops._readers import (
    SUFFIXES,
    Arrays,
    Chunk,
    ColumnError,
    Files,
    Reader,
    Streams,
    Table,
    Unit,
    open_file,
    reason,
)
from gmmkeops._survey import SAMPLE, Reservoir, Survey, fingerprint

__all__ = ["NUMBERS", "Chunk", "Source", "chunked", "readable"]

# Numbers in a chunk: enough for long sweeps, little beside the rest of a process.
NUMBERS = 1 << 20
# How far sums of the same numbers in another order may be apart, as a share of the sum of their magnitudes.
_ROUNDING = 1e-11
# Numbers that are summed at a time.
_SUMMED = 1 << 16
# Places that a chunk of a pass in random order is read from.
_PLACES = 256


class Source:
    """Points (N, D) that can be read again and again, a chunk at a time; everything that fits and scores takes one.

    Made by :meth:`of`, or by handing what it takes to :func:`gmmkeops.fit` and the like.

    Attributes:
        name: How messages call it.
        features: Number of columns D.
        columns: Their names, in the order in which they are read, or None where the data have no names.
        paths: The files that it reads.

    Example:
        >>> import numpy as np, gmmkeops as gk
        >>> source = gk.Source.of(lambda: (np.full((4, 2), float(part)) for part in range(3)))
        >>> source.features, source.survey().rows
        (2, 12)
    """

    def __init__(self, reader: Reader | Streams, weights: Any = None, chunk_rows: int | None = None) -> None:
        self.reader, self.name, self.features = reader, reader.name, reader.features
        self.columns, self.paths, self.chunk_rows = reader.names, reader.paths, chunk_rows
        self.size = max(1, NUMBERS // self.features) if chunk_rows is None else as_integer(chunk_rows, "chunk_rows", 1)
        given = None if weights is None else as_tensor(weights, name="weights", dtype=torch.float64)
        self.weights = None if given is None else given.detach().cpu().numpy()
        self.rows = None if isinstance(reader, Streams) else reader.rows
        self.share, self.first = (0, 1), 0
        self.classes: Sequence[int] | None = None
        self._survey: Survey | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._stamps: list[tuple[int, int]] | None = None

    @classmethod
    def of(
        cls,
        x: Any,
        *,
        columns: Sequence[str | int] | None = None,
        classes: Sequence[int] | None = None,
        weights: Any = None,
        chunk_rows: int | None = None,
    ) -> Source:
        """A source from anything that holds points.

        Args:
            x: An array, a tensor or a memory map (N, D); the path of a ``.npy``, Parquet, LAS, LAZ or PLY file, a folder or
                a pattern such as ``"scan/*.laz"``, or a list of these; a torch DataLoader; or a function that returns a new
                iterator at each call. Loaders and functions give arrays (n, D), or pairs (points, weights) with one weight
                per point, (n,) or (n, 1), as floats: integers beside the points are refused, since they may be labels.
            columns: Which columns are the coordinates: names, or numbers of an array's. By default all that are not the
                weights; x, y and z of LAS and PLY. The labels of rows that pandas saves in Parquet files are left out.
                Files of one source are matched by the names of their columns, to the order of the first file.
            classes: Which classes of a LAS file's points are read; all if left out.
            weights: Name or number of the column with the points' weights; or an array (N,) of them.
            chunk_rows: Rows that are read at a time; about a million numbers' worth if left out.

        Raises:
            TypeError: Nothing that can be read twice, such as a generator; or values that are not numbers.
            FileNotFoundError, ImportError: The file is not there, or the library for its format is not.
            ValueError: The file is damaged, a column is not there, or shapes do not fit; in one sentence.

        Example:
            >>> import numpy as np, os, tempfile, gmmkeops as gk
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = os.path.join(folder, "points.npy")
            ...     np.save(path, np.arange(12.0).reshape(6, 2))
            ...     gk.Source.of(path).survey().rows
            6
        """
        if isinstance(x, Source):
            if any(choice is not None for choice in (columns, classes, weights, chunk_rows)):
                raise ValueError("x is a Source already; choose columns, classes and weights where it is made.")
            return x
        if columns is not None and (isinstance(columns, str) or not hasattr(columns, "__len__")):
            raise TypeError(f"columns must be a list of names or numbers, got {columns!r}; pass [{columns!r}].")
        if classes is not None:
            several = isinstance(classes, Iterable) and not isinstance(classes, (str, bytes))
            if not several:
                raise TypeError(f"classes must be a list of integers, got {classes!r}; pass [{classes!r}].")
            classes = [as_integer(item, "each of the classes", 0) for item in classes]
        column = weights if isinstance(weights, (str, int, np.integer)) and not isinstance(weights, bool) else None
        given = None if column is not None else weights
        reader = _reader(x, columns, classes, column)
        if isinstance(reader, Streams) and (columns is not None or column is not None):
            raise ValueError(
                "columns and weights are chosen by the function itself; it may give pairs (points, weights)."
            )
        source = cls(reader, given, chunk_rows)
        source.classes = classes
        if source.weights is not None:
            if classes is not None or isinstance(reader, Streams):
                raise ValueError("an array of weights needs rows of known number; name a column, or give pairs.")
            if source.weights.shape != (reader.rows,):
                raise ValueError(
                    f"weights must have shape ({reader.rows},), one per row of {source.name}, got {source.weights.shape}."
                )
        return source

    def units(self, places: int = 1) -> list[list[Unit]] | None:
        """What is read at a time, of this process's share; None for what streams.

        Args:
            places: Into how many stretches what is read at a time falls.
        """
        if isinstance(self.reader, Streams):
            return None
        rank, count = self.share
        size = max(-(-self.size // places), self.reader.grain if places > 1 else 1)
        if count > 1:
            size = min(size, max(1, (self.reader.rows or 0) // (8 * count)))
        units = self.reader.units(size)
        return _grouped(units[len(units) * rank // count : len(units) * (rank + 1) // count], self.size)

    def matched(self, columns: Sequence[str] | None) -> Source:
        """Return a source of the same rows with the columns of a model, matched by name.

        Args:
            columns: Names of the model's columns, or None where they are not known.

        Returns:
            A source of these columns in this order; the same source where one side has no names, so that columns are
            matched by their places.

        Raises:
            ValueError: A column is missing; the sentence names it and lists those that exist.

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

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the thread that reads, which the copy starts when it needs it."""
        return {**vars(self), "_pool": None}

    def in_chunks(self, rows: int) -> Source:
        """The same, read at most so many rows at a time."""
        part = copy.copy(self)
        part.size = min(self.size, rows)
        return part

    def shared(self, rank: int, count: int, first: int = 0) -> Source:
        """Part number ``rank`` of ``count`` of the rows, numbered from ``first`` on."""
        part = copy.copy(self)
        part.share, part.first, part._survey = (rank, count), first, None
        return part

    @property
    def slice(self) -> slice:
        """The rows of this process's share."""
        units = [unit for group in self.units() or [] for unit in group]
        return slice(units[0].first, units[-1].first + units[-1].rows) if units else slice(0, 0)

    def identity(self) -> Any:
        """What tells this source from others without reading it; of an array, a number of all that is in it."""
        if isinstance(self.reader, Streams):
            return None
        if self.reader.paths:
            self._check_stamps()
            return [[str(path) for path in self.reader.paths], [list(stamp) for stamp in self._stamps or []]]
        weights = None if self.weights is None else torch.from_numpy(self.weights)
        points = self.reader.load(Unit(0, self.rows or 0)).points
        return fingerprint(points, weights)

    def shuffled(self, generator: torch.Generator) -> list[list[Unit]] | None:
        """The same in random order, each chunk from several places."""
        units = [unit for group in self.units(_PLACES) or [] for unit in group]
        order = torch.randperm(len(units), generator=generator).tolist()
        return _grouped([units[i] for i in order], self.size) if units else self.units()

    def chunks(
        self, skip: int = 0, order: list[list[Unit]] | None = None, prepare: Callable[[Chunk], Any] | None = None
    ) -> Iterator[Any]:
        """The chunks of one pass, each loaded while the one before is in use; checked, and counted at the end.

        Args:
            skip: Chunks that are left out at the beginning.
            order: What is read at a time, in another order than that of the rows.
            prepare: What is done with each chunk as part of its loading.

        Raises:
            ValueError: A chunk cannot be read, has entries that are not finite, or the pass was not like the first.
        """
        mind_fork()
        self._check_stamps()
        tally = _Tally()
        loaded = self._loaded(self.units() if order is None else order, skip)

        def one() -> Any:
            chunk = next(loaded, None)
            if chunk is None:
                return None
            tally.add(chunk)
            return chunk if prepare is None else prepare(chunk)

        loading = self._ahead(one)
        while (item := loading()) is not None:
            loading = self._ahead(one)
            yield item
        self._check_stamps()
        if skip == 0 and self._survey is not None:
            self._compare(tally)

    def _ahead(self, load: Callable[[], Any]) -> Callable[[], Any]:
        """Begins to load in the reader's thread; returns what waits for it."""
        if self._pool is None or self._process != os.getpid():
            # One thread for all passes: a new one each time would take, and keep, memory of its own. A forked process has
            # none of its parent's threads.
            _share_arenas()
            self._pool, self._process = ThreadPoolExecutor(1, thread_name_prefix="gmmkeops-reader"), os.getpid()
        try:
            return self._pool.submit(load).result
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            # A process with little memory left has no room for a thread's stack: the caller loads when it needs to.
            self._pool = None
            return load

    def _loaded(self, units: list[list[Unit]] | None, skip: int) -> Iterator[Chunk]:
        if isinstance(self.reader, Streams):
            pieces: Iterator[Chunk] = islice(_whole(self.reader.chunks(), self.size), skip, None)
        else:
            pieces = (_joined([self._load(unit) for unit in group]) for group in (units or [])[skip:])
        # A loop would keep the last chunk while the next one is read.
        return map(self._checked, pieces)

    def _checked(self, chunk: Chunk) -> Chunk:
        check_finite(chunk.points, name=self.name, first=chunk.first)
        name = f"weights of {self.name}"
        return replace(chunk, weights=as_weights(chunk.weights, chunk.points, name=name, some=False, first=chunk.first))

    def _load(self, unit: Unit) -> Chunk:
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
                f"{self.name} cannot be read from row {unit.first} to {unit.first + unit.rows}{why}; "
                "it may be cut short or damaged, or have changed since it was opened."
            ) from error
        if self.weights is not None:
            chunk = replace(chunk, weights=torch.from_numpy(self.weights[unit.first : unit.first + unit.rows]))
        return replace(chunk, first=self.first + unit.first)

    def _check_stamps(self, which: int | None = None) -> None:
        """Size and time of every file, or of one, are what they were at first."""
        paths = self.reader.paths
        if self._stamps is None:
            self._stamps = [_stamp(path) for path in paths]
        for i in range(len(paths)) if which is None else [which]:
            old, new = self._stamps[i], _stamp(paths[i])
            if old != new:
                what = f"it had {old[0]} bytes and has {new[0]}" if old[0] != new[0] else "it was written to"
                raise Damage(f"{paths[i]} changed while it was read: {what}; begin again once it is complete.")

    def _compare(self, tally: _Tally) -> None:
        survey = self._survey
        assert survey is not None, "there was a first pass"
        if tally.rows != survey.rows:
            raise ValueError(
                f"{self.name} gave {tally.rows} rows on this pass and {survey.rows} on the first; "
                "it must give the same points each time."
            )
        if abs(tally.total - survey.total[0]) > _ROUNDING * max(survey.total[1], tally.magnitude):
            raise ValueError(
                f"{self.name} gave other numbers on this pass (their sum is {tally.total!r}) than on the first "
                f"({survey.total[0]!r}); it must give the same points each time."
            )

    def survey(self, size: int = SAMPLE, *, alone: bool = True) -> Survey:
        """What one pass over all of it shows; remembered.

        Args:
            size: Rows that the sample must have, if there are so many.
            alone: Whether these are all points, of which there must be some, rather than those of one of several ranks.

        Raises:
            ValueError: There are no rows, or they cannot be read; as :meth:`chunks`.
        """
        mind_fork()
        if self._survey is not None and self._survey.reservoir.size >= size:
            return self._survey
        reservoir, tally, squares, mark, single = Reservoir(size), _Tally(), 0.0, 0, True
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
        """The error about a source that has no rows, or none with a weight."""
        if rows:
            return ValueError(
                f"weights of {self.name} must not all be zero; leave weights out to weigh all points alike."
            )
        if self.classes is not None:
            return ValueError(
                f"{self.name} has no points of classes={list(self.classes)}; choose classes that the file has, or leave "
                "classes out."
            )
        return ValueError(f"{self.name} has no rows; pass at least one point.")


def _share_arenas() -> None:
    """Lets all threads take their memory from two pools.

    The C library would otherwise reserve 64 MB of address space for each thread that ever allocates, which is most of what a
    process with a limit of a gigabyte or two has to give (glibc's ``mallopt``; elsewhere nothing happens).
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-8, 2)


def _grouped(units: list[Unit], size: int) -> list[list[Unit]]:
    """Units that are read together, in order, so that each group has about ``size`` rows."""
    groups: list[list[Unit]] = []
    room = 0
    for unit in units:
        if unit.rows > room:
            groups.append([])
            room = size
        groups[-1].append(unit)
        room -= unit.rows
    return groups


def _joined(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    weights = None
    if any(chunk.weights is not None for chunk in chunks):
        one = torch.ones((), dtype=torch.float64)
        weights = torch.cat([one.expand(len(c.points)) if c.weights is None else c.weights for c in chunks])
    return Chunk(torch.cat([chunk.points for chunk in chunks]), weights, chunks[0].first)


def _whole(chunks: Iterator[Chunk], size: int) -> Iterator[Chunk]:
    """The same rows, numbered, with large chunks cut and small ones joined so that each has about ``size``."""
    few: list[Chunk] = []
    first = rows = 0
    for chunk in chunks:
        for start in range(0, len(chunk.points), size):
            part = slice(start, start + size)
            few.append(Chunk(chunk.points[part], None if chunk.weights is None else chunk.weights[part]))
            rows += len(few[-1].points)
            if rows >= size:
                yield replace(_joined(few), first=first)
                few, first, rows = [], first + rows, 0
    if few:
        yield replace(_joined(few), first=first)


class _Tally:
    """What is counted on every pass."""

    def __init__(self) -> None:
        self.rows, self.mass, self.total, self.magnitude = 0, 0.0, 0.0, 0.0

    def add(self, chunk: Chunk) -> None:
        self.rows += len(chunk.points)
        self.mass += float(len(chunk.points)) if chunk.weights is None else float(chunk.weights.sum())
        for part in chunk.points.split(max(1, _SUMMED // chunk.points.shape[1])):
            self.total += float(part.sum(dtype=torch.float64))
            self.magnitude += float(part.abs().sum(dtype=torch.float64))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        raise Damage(f"{path} is gone; put it back and begin again.") from None
    return status.st_size, status.st_mtime_ns


def readable(x: Any) -> bool:
    """Whether these are points to be read a chunk at a time, rather than numbers in memory.

    Raises:
        TypeError: It can be read only once.
    """
    if isinstance(x, Iterator):
        raise TypeError(
            f"x is a {type(x).__name__}, which can be read only once, and a fit reads its points many times; "
            "pass a function that makes a new one at each call."
        )
    if isinstance(x, (Source, str, os.PathLike, np.memmap, torch.utils.data.DataLoader)):
        return True
    if isinstance(x, (list, tuple)):
        return len(x) > 0 and all(isinstance(item, (str, os.PathLike)) for item in x)
    return callable(x) and not hasattr(x, "__array__")


def chunked(
    x: Any, weights: Any = None, *, features: int | None = None, columns: Sequence[str] | None = None
) -> Iterator[Chunk]:
    """Points in memory as one chunk, or those of a source one after the other; checked.

    Args:
        x: Points (N, D), or what :meth:`Source.of` takes.
        weights: Weight of each point (N,), or None.
        features: Expected D, if known.
        columns: Names of the model's columns, if known, which data with names are matched to.

    Raises:
        TypeError, ValueError: Bad points or weights, or a column that is missing.
    """
    if not readable(x):
        points = as_points(table_of(x, columns), features=features)
        return iter([Chunk(points, as_weights(weights, points))])
    source = Source.of(x, weights=weights).matched(columns)
    if features not in (None, source.features):
        raise ValueError(
            f"{source.name} has {source.features} columns, expected {features} as in the model; pass the same columns."
        )
    return _some(source)


def _some(source: Source) -> Iterator[Chunk]:
    """The chunks of a source that have rows, of which there must be one."""
    tally = _Tally()
    for chunk in source.chunks():
        if len(chunk.points):
            tally.rows += len(chunk.points)
            tally.mass += float(len(chunk.points)) if chunk.weights is None else float(chunk.weights.sum())
            yield chunk
    if not tally.mass > 0:
        raise source.nothing(tally.rows)


def _reader(x: Any, columns: Any, classes: Any, weights: Any) -> Reader | Streams:
    if not readable(x):
        return Arrays(x, "x", columns, weights) if table_names(x) is None else Table(x, "x", columns, weights)
    if isinstance(x, np.memmap):
        return Arrays(x, f"the memory map of {x.filename}", columns, weights)
    if isinstance(x, torch.utils.data.DataLoader):
        return Streams(_Again(x), "the DataLoader", fields=True)
    if callable(x):
        return Streams(x, f"the function {getattr(x, '__name__', type(x).__name__)}")
    files = [path for item in (x if isinstance(x, (list, tuple)) else [x]) for path in _paths(item)]
    readers = [open_file(path, columns, classes, weights) for path in files]
    return readers[0] if len(readers) == 1 else Files(readers)


@dataclass(frozen=True)
class _Again:
    """A function that returns the same iterable at each call.

    Args:
        iterable: What can be iterated over again and again.
    """

    iterable: Any

    def __call__(self) -> Any:
        return self.iterable


def _paths(item: str | os.PathLike[str]) -> list[Path]:
    """The files that a path, a folder or a pattern names, in order."""
    path = Path(item)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"the folder {path} has no files of {', '.join(SUFFIXES)}.")
        return found
    if not path.exists() and any(sign in str(item) for sign in "*?["):
        names = sorted(glob.glob(str(item), recursive=True))
        if not names:
            raise FileNotFoundError(f"no file matches {item}.")
        return [Path(name) for name in names]
    return [path]
