"""Reader of Parquet files."""

from __future__ import annotations

import json
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gmmkeops.data.batch import Batch
from gmmkeops.data.chunks import Unit, cut
from gmmkeops.data.readers.base import Columns, Damage, Reader, Weights

__all__ = ["Parquet"]

# Size of the buffer for reading a column, bytes.
_BUFFER = 1 << 18


class Parquet(Reader):
    """Reader of a Parquet file, by row groups."""

    def __init__(self, path: Path, columns: Columns = None, weights: Weights = None) -> None:
        ParquetFile = _parquet_file()
        self._open = ParquetFile
        self.name, self.paths = str(path), (path,)
        with ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
            index = _saved_index(file.schema_arrow.metadata)
            sizes = _checked_rows(metadata, path.stat().st_size)
        plain = [name for name in names if name not in index and name != weights]
        self.choose(names, columns, weights, default=plain)
        self.rows = sum(sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self.grain = max(sizes, default=1)
        # Remaining batches of the current row group, remaining rows of the last batch, and index of the next row.
        self._batches: Iterator[Any] = iter(())
        self._left: Any = None
        self._next = -1

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes except the state of reading."""
        return {**vars(self), "_batches": iter(()), "_left": None, "_next": -1}

    def units(self, size: int) -> list[Unit]:
        # A group that is at most a quarter larger than a unit is not split, since the remainder would be a small unit.
        groups = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [unit for a, b in groups for unit in cut(a, b, b - a if 4 * (b - a) <= 5 * size else size)]

    def load(self, unit: Unit) -> Batch:
        group = bisect_right(self.starts, unit.first) - 1
        first, stop = self.starts[group : group + 2]
        if unit.rows == stop - first:
            self._batches, self._left, self._next = iter(()), None, -1
            with self._open(self.paths[0], pre_buffer=False) as file:
                batches = file.read_row_group(group, columns=self._names, use_threads=False).to_batches()
        else:
            if unit.first == first or unit.first != self._next:
                # Reading starts at the beginning of the group, unless the unit directly follows the previous one.
                self._batches, self._left, self._next = self._rows(group, unit.rows), None, first
                self._take(unit.first - first)
            batches = self._take(unit.rows)
        rows = sum(batch.num_rows for batch in batches)
        if rows != unit.rows:
            raise Damage(f"a row group has {rows} rows but declares {unit.rows}")
        return self.assembled(
            lambda name: np.concatenate([batch.column(name).to_numpy(zero_copy_only=False) for batch in batches])
        )

    def _take(self, count: int) -> list[Any]:
        """Read the next rows of the row group, in batches."""
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
        # With a buffer, pages are read one by one; without it, a whole compressed row group is kept in memory.
        with self._open(self.paths[0], pre_buffer=False, buffer_size=_BUFFER) as file:
            yield from file.iter_batches(size, row_groups=[group], columns=self._names, use_threads=False)

    @property
    def _names(self) -> list[str]:
        return [*self.columns, *([] if self.weights is None else [self.weights])]


def _saved_index(metadata: dict[bytes, bytes] | None) -> set[str]:
    """Return the names of the columns in which pandas has stored the index, from the metadata of the file."""
    noted = json.loads((metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    # Entries that are not strings describe a range index, which is not stored as a column.
    return {column for column in noted if isinstance(column, str)}


def _checked_rows(metadata: Any, size: int) -> list[int]:
    """Return the number of rows of each row group, after a check against the values and bytes of its columns.

    Raises:
        Damage: The numbers are inconsistent with each other or with the size of the file.
    """
    rows = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            # A column of lists can contain more values than rows.
            flat = column.path_in_schema.count(".") == 0
            start, stored = column.data_page_offset, column.total_compressed_size
            # A page contains less than 2³¹ values, after a header of several bytes.
            fits = 0 <= start < size and 0 <= stored <= size and column.num_values <= (1 + stored // 8) << 31
            if not fits or (flat and column.num_values != group.num_rows):
                raise Damage(f"row group {number} declares {group.num_rows} rows, which do not match its columns")
        if group.num_rows < 0:
            raise Damage(f"row group {number} declares {group.num_rows} rows")
        rows.append(group.num_rows)
    return rows


def _parquet_file() -> Any:
    """Import pyarrow's reader with the system allocator, since its default allocator does not release memory."""
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
