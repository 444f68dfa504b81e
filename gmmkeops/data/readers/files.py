"""Reader of several files as one data set, with columns matched by name."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from gmmkeops.data.batch import Batch
from gmmkeops.data.chunks import Unit
from gmmkeops.data.columns import listed, named_alike
from gmmkeops.data.readers.base import ColumnError, Damage, Reader, reason

__all__ = ["Files"]


class Files(Reader):
    """Reader of several files or arrays, in the given order."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        first = readers[0]
        self.readers = [first]
        for reader in readers[1:]:
            if (reader.names is None) is not (first.names is None):
                with_names, without = (reader, first) if first.names is None else (first, reader)
                raise ValueError(
                    f"the columns of {with_names.name} have names ({listed(with_names.columns)}) but those of "
                    f"{without.name} do not, so they cannot be matched; pass files of one kind."
                )
            if reader.features != first.features and reader.names is None:
                raise ValueError(
                    f"{reader.name} has {reader.features} columns but {first.name} has {first.features}; "
                    "select the same columns with columns=."
                )
            if first.names is not None and reader.names is not None and reader.names != first.names:
                named_alike(reader.names, first.names, reader.name, first.name)
                reader = reader.chosen(first.names)
            self.readers.append(reader)
        self.columns, self.known = first.columns, first.known
        self.name = f"{len(readers)} files from {first.name}"
        self.features = first.features
        self.starts = np.concatenate([[0], np.cumsum([reader.rows for reader in readers])]).tolist()
        self.rows = self.starts[-1]
        self.grain, self.stored = max(reader.grain for reader in readers), max(reader.stored for reader in readers)
        self.paths = tuple(path for reader in readers for path in reader.paths)

    def chosen(self, columns: Sequence[str]) -> Files:
        return Files([reader.chosen(columns) for reader in self.readers])

    def units(self, size: int) -> list[Unit]:
        return [
            Unit(start + unit.first, unit.rows)
            for start, reader in zip(self.starts, self.readers, strict=False)
            for unit in reader.units(size)
        ]

    def path(self, unit: Unit) -> int:
        return bisect_right(self.starts, unit.first) - 1

    def load(self, unit: Unit) -> Batch:
        which = self.path(unit)
        reader = self.readers[which]
        try:
            return reader.load(Unit(unit.first - self.starts[which], unit.rows))
        except ColumnError:
            raise
        except Exception as error:
            raise Damage(f"{reader.name}: {reason(error) or 'it is damaged'}") from error
