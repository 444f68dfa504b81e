"""Column names of tables in memory, and matching of the columns of data to those of a model by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["listed", "named_alike", "places", "table_names", "table_of"]

# Maximum number of names in a message.
_LISTED = 40


def table_names(x: Any) -> tuple[str, ...] | None:
    """Return the column names of a table in memory (pandas, polars, pyarrow), or None if it has no names.

    Only strings are names, since pandas numbers unnamed columns.
    """
    if isinstance(x, (np.ndarray, Tensor)):
        return None
    # The attribute ``columns`` of a pyarrow table contains its data.
    names = getattr(x, "column_names", None)
    names = getattr(x, "columns", None) if names is None else names
    if names is None or isinstance(names, dict) or callable(names):
        return None
    found = tuple(names)
    return tuple(map(str, found)) if found and all(isinstance(name, str) for name in found) else None


def listed(names: Sequence[Any]) -> str:
    """Format column names for a message; a long list is shortened."""
    if len(names) > 2 and list(names) == list(range(len(names))):
        return f"0 to {len(names) - 1}"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(str, names[:_LISTED])) + more


def places(wanted: Sequence[str], known: Sequence[str] | None, name: str) -> list[int]:
    """Return the indices of the columns of a model among the columns of data.

    Args:
        wanted: Column names of the model.
        known: Column names of the data, or None if they have no names.
        name: Name of the data in messages.

    Raises:
        ValueError: The columns have no names, one is missing, or two have the same name; the message lists the existing columns.
    """
    if known is None:
        raise ValueError(f"{name} has no column names, expected {listed(wanted)}; pass a table, or name the columns.")
    missing = [column for column in wanted if column not in known]
    if missing:
        noun = "column" if len(missing) == 1 else "columns"
        raise ValueError(
            f"{name} lacks the {noun} {listed(missing)} of the model, whose columns are {listed(wanted)}; it has the "
            f"columns {listed(known)}."
        )
    for column in wanted:
        if list(known).count(column) > 1:
            raise ValueError(f"{name} has {list(known).count(column)} columns named {column}; rename them.")
    return [list(known).index(column) for column in wanted]


def table_of(x: Any, columns: Sequence[str] | None, name: str = "x") -> Any:
    """Select columns of a table in memory, in the given order; data without column names are returned unchanged.

    Raises:
        ValueError: A column is missing, or two have the same name.
    """
    names = None if columns is None else table_names(x)
    if columns is None or names is None or names == tuple(columns):
        return x
    places(columns, names, name)
    return x.select(list(columns)) if not hasattr(x, "loc") and hasattr(x, "select") else x[list(columns)]


def named_alike(columns: Sequence[str], first: Sequence[str], name: str, first_name: str) -> None:
    """Check that two data sets have the same columns, in any order.

    Raises:
        ValueError: The columns differ; the message names the data sets and the columns that only one of them has.
    """
    if set(columns) == set(first) and len(columns) == len(first):
        return
    only = [column for column in columns if column not in first]
    missing = [column for column in first if column not in columns]
    differences = [f"lacks {listed(missing)}"] * bool(missing) + [f"has the additional {listed(only)}"] * bool(only)
    raise ValueError(
        f"{name} has other columns than {first_name}, which has {listed(first)}: it "
        f"{' and '.join(differences) or 'has a column twice'}; select common columns with columns=."
    )
