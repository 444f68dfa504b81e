"""The interface of readers: units of rows that are loaded one by one, in any order, with columns chosen by name or index."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gmmkeops.components import as_tensor, check_unmasked
from gmmkeops.data.batch import Batch
from gmmkeops.data.chunks import Unit, cut
from gmmkeops.data.columns import listed, places

__all__ = ["ColumnError", "Columns", "Damage", "Reader", "Tabular", "Weights", "reason", "stack"]

Columns = Sequence[str | int] | None

Weights = str | int | None


class ColumnError(ValueError):
    """The requested columns do not exist, or are not numeric."""


class Damage(ValueError):
    """A file is damaged; the message describes the damage without naming the file."""


class Tabular(ABC):
    """Rows with columns, which may have names.

    Attributes:
        name: Name of the data in messages.
        features: Number of columns D that are read.
        columns: The columns that are read: names, or indices if the columns have no names.
        known: Names of the columns that can be read; None if the columns have no names.
        paths: The files that are read.
        stored: Bytes of a row in its file, with unused columns; 0 if only the needed columns are read.
    """

    name: str
    features: int
    columns: list[Any]
    known: tuple[str, ...] | None = None
    paths: tuple[Path, ...] = ()
    stored: int = 0

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the columns in the order in which they are read; None if they have no names."""
        return None if self.known is None else tuple(self.columns)

    def chosen(self, columns: Sequence[str]) -> Self:
        """Return a reader of the same rows with other columns, given by name.

        Raises:
            ValueError: A column is missing, or the columns have no names.
        """
        places(columns, self.known, self.name)
        part = copy.copy(self)
        part.columns, part.features = list(columns), len(columns)
        return part


class Reader(Tabular):
    """Abstract reader of rows, in units. A concrete reader defines ``name``, ``rows``, the columns and :meth:`load`.

    Attributes:
        weights: The column of weights, or None.
        rows: Number of rows before filtering.
        grain: Number of rows below which smaller units take no less time to read.
    """

    weights: Any
    rows: int
    grain: int = 1

    def choose(self, known: Sequence[Any], columns: Columns, weights: Weights, default: Columns = None) -> None:
        """Set the columns to read, and the column of weights.

        Args:
            known: All columns: names, or indices if the columns have no names.
            columns: The columns that the user asks for, or None.
            weights: The column of weights, or None.
            default: The columns to read if ``columns`` is None; by default all columns except the weights.

        Raises:
            ColumnError: A column does not exist, exists twice, or none is left.
        """
        wanted = default if columns is None else columns
        self.columns, self.weights = _chosen(self.name, known, wanted, weights)
        self.features = len(self.columns)
        if isinstance(known[0], str):
            self.known = tuple(known if columns is None else self.columns)

    def path(self, unit: Unit) -> int:
        """Index of the file that contains a unit."""
        return 0

    def units(self, size: int) -> list[Unit]:
        """All rows in units of at most about ``size``."""
        return cut(0, self.rows, size)

    @abstractmethod
    def load(self, unit: Unit) -> Batch:
        """The rows of a unit."""

    def assembled(self, column: Callable[[Any], Any]) -> Batch:
        """A chunk of the chosen columns, each of which ``column`` returns as an array (n,)."""
        points = stack([column(name) for name in self.columns], self.name)
        if self.weights is None:
            return Batch(points)
        return Batch(points, as_tensor(np.array(column(self.weights)), name="weights"))


def _chosen(name: str, known: Sequence[Any], columns: Columns, weights: Weights) -> tuple[list[Any], Any]:
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


def stack(arrays: Sequence[Any], name: str) -> Tensor:
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
