"""Interface of readers: units of rows can be loaded in any order, and columns are selected by name or index."""

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
    """Error that requested columns do not exist, or are not numeric."""


class Damage(ValueError):
    """Error that a file is damaged; the message describes the damage without the name of the file."""


class Tabular(ABC):
    """Base class of data with rows and columns, which may have names.

    Attributes:
        name: Name of the data in messages.
        features: Number of columns D that are read.
        columns: The columns that are read: names, or indices if the columns have no names.
        known: Names of all columns of the data; None if the columns have no names.
        paths: The files that are read.
        stored: Bytes of a row in its file, including unused columns; 0 if only the needed columns are read.
    """

    name: str
    features: int
    columns: list[Any]
    known: tuple[str, ...] | None = None
    paths: tuple[Path, ...] = ()
    stored: int = 0

    @property
    def names(self) -> tuple[str, ...] | None:
        """Column names in the order of reading; None if the columns have no names."""
        return None if self.known is None else tuple(self.columns)

    def chosen(self, columns: Sequence[str]) -> Self:
        """Return a reader of the same rows with the named columns.

        Raises:
            ValueError: A column is missing, or the columns have no names.
        """
        places(columns, self.known, self.name)
        part = copy.copy(self)
        part.columns, part.features = list(columns), len(columns)
        return part


class Reader(Tabular):
    """Base class of readers that load rows in units. A reader defines ``name``, ``rows``, the columns and :meth:`load`.

    Attributes:
        weights: The column of weights, or None.
        rows: Number of rows before filtering.
        grain: Smallest useful number of rows of a unit; smaller units take as much time to read.
    """

    weights: Any
    rows: int
    grain: int = 1

    def choose(self, known: Sequence[Any], columns: Columns, weights: Weights, default: Columns = None) -> None:
        """Set the columns to read, and the column of weights.

        Args:
            known: All columns: names, or indices if the columns have no names.
            columns: The columns that the user has requested, or None.
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
        """Return the index of the file that contains a unit."""
        return 0

    def units(self, size: int) -> list[Unit]:
        """Split all rows into units of at most about ``size`` rows."""
        return cut(0, self.rows, size)

    @abstractmethod
    def load(self, unit: Unit) -> Batch:
        """Load the rows of a unit."""

    def assembled(self, column: Callable[[Any], Any]) -> Batch:
        """Create a chunk of the chosen columns; ``column`` returns each of them as an array (n,)."""
        points = stack([column(name) for name in self.columns], self.name)
        if self.weights is None:
            return Batch(points)
        return Batch(points, as_tensor(np.array(column(self.weights)), name="weights"))


def _chosen(name: str, known: Sequence[Any], columns: Columns, weights: Weights) -> tuple[list[Any], Any]:
    """Validate the requested columns and the column of weights."""
    # A name that consists of digits may have been parsed as an index.
    written = {str(column): column for column in known if isinstance(column, str)}
    weights = written.get(str(weights), weights) if isinstance(weights, int) else weights
    wanted = [column for column in known if column != weights] if columns is None else list(columns)
    wanted = [written.get(str(column), column) if isinstance(column, int) else column for column in wanted]
    for column in [*wanted, *([] if weights is None else [weights])]:
        if column not in known:
            raise ColumnError(f"{name} has no column {column!r}; choose from its columns {listed(known)}.")
        if list(known).count(column) > 1:
            raise ColumnError(f"{name} has {list(known).count(column)} columns named {column}; rename them.")
    if len(set(wanted)) < len(wanted):
        raise ColumnError(f"columns must be distinct, got {listed(wanted)} for {name}; remove the duplicates.")
    if not wanted:
        raise ColumnError(f"columns must contain at least one column of {name}, got none; choose from {listed(known)}.")
    return wanted, weights


def stack(arrays: Sequence[Any], name: str) -> Tensor:
    """Stack columns (n,) to points (n, D), float32 if all columns are float32, else float64."""
    single = all(array.dtype == np.float32 for array in arrays)
    out = np.empty((len(arrays[0]), len(arrays)), np.float32 if single else np.float64)
    for d, array in enumerate(arrays):
        if isinstance(array, np.ma.MaskedArray):
            array = check_unmasked(array, name=name)
        if array.dtype.kind not in "fiub":
            raise ColumnError(f"{name} must be numeric, got a column of {array.dtype}; select others with columns=.")
        out[:, d] = array
    return torch.from_numpy(out)


def reason(error: Exception) -> str:
    """Return the reason why a file cannot be read; empty for errors of other libraries, whose texts vary."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for the size that it declares"
    return str(error).rstrip(".") if isinstance(error, (Damage, ColumnError)) else ""
