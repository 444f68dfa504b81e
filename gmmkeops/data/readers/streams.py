"""Reader of functions, iterables and data loaders, which can only be read in their own order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from gmmkeops.components import as_tensor, check_unmasked
from gmmkeops.data.batch import Batch
from gmmkeops.data.columns import listed, named_alike, table_names, table_of
from gmmkeops.data.readers.base import Tabular

__all__ = ["Streams"]


class Streams(Tabular):
    """Reader of a DataLoader, or of a function that returns an iterator of chunks; each pass starts at the beginning."""

    def __init__(self, make: Callable[[], Any], name: str, fields: bool = False) -> None:
        # Whether a list always consists of points and weights (as in a DataLoader), never of rows.
        self.fields = fields
        self.make, self.name, self.features = make, name, 0
        first, second = self._begin(), self._begin()
        if first is second:
            raise TypeError(
                f"{name} returned the same iterator twice, but an iterator can be read only once; return a new one at each call."
            )
        try:
            item = next(first)
        except StopIteration:
            raise ValueError(f"{name} gave no chunks; yield arrays of shape (n, D).") from None
        self.known = table_names(self._parts(item)[0])
        self.columns = list(self.known or ())
        self.features = int(self._chunk(item).points.shape[1])

    def _begin(self) -> Iterator[Any]:
        """Call the function and return its iterator; raise an error if it needs arguments or returns another type."""
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

    def chunks(self) -> Iterator[Batch]:
        """Iterate over all chunks, from the beginning."""
        return map(self._chunk, self._begin())

    def _chunk(self, item: Any) -> Batch:
        item, weights = self._parts(item)
        if self.known is not None:
            own = table_names(item)
            if own is None:
                raise ValueError(
                    f"{self.name} gave a table with the columns {listed(self.known)} first and then a chunk without "
                    "column names; yield tables with the same columns."
                )
            if own != self.known:
                named_alike(own, self.known, f"a chunk of {self.name}", "its first chunk")
            item = table_of(item, self.names, self.name)
        points = as_tensor(item, name=f"what {self.name} gives").detach()
        if points.ndim != 2 or points.shape[1] == 0:
            raise ValueError(f"{self.name} must give arrays of shape (n, D), got {tuple(points.shape)}.")
        if self.features not in (0, points.shape[1]):
            raise ValueError(f"{self.name} gave {points.shape[1]} columns, expected {self.features} as before.")
        return Batch(points, None if weights is None else self._weights(weights, points))

    def _parts(self, item: Any) -> tuple[Any, Any]:
        """Split an item of the iterator into points and weights (or None)."""
        if not isinstance(item, (tuple, list)):
            return item, None
        # A list of rows is an array. A tuple, or a list whose first item is an array of points, contains points and weights.
        if isinstance(item, list) and not (item and self._are_points(item)):
            return item, None
        if len(item) not in (1, 2):
            raise ValueError(
                f"{self.name} must give points, or pairs (points, weights), got {len(item)} items at a time; "
                "omit the others."
            )
        return item[0], item[1] if len(item) == 2 else None

    def _are_points(self, item: list[Any]) -> bool:
        """Return whether the first item of a list is an array of points, rather than a row."""
        if self.fields or hasattr(item[0], "columns"):
            return True
        ndim = np.ndim(item[0]) if not isinstance(item[0], Tensor) else item[0].ndim
        if ndim == 1 and len(item) == 2 and isinstance(item[0], (np.ndarray, Tensor)) and not self.features:
            raise ValueError(
                f"{self.name} gave a list of two arrays of one dimension, which may be two rows, or points and weights; yield "
                "an array (n, D), or a pair (points, weights) with points of shape (n, D)."
            )
        return ndim >= 2

    def _weights(self, weights: Any, points: Tensor) -> Tensor:
        name = f"the weights of {self.name}"
        if isinstance(weights, np.ma.MaskedArray):
            weights = check_unmasked(weights, name=name)
        kind = weights if isinstance(weights, Tensor) else np.asarray(weights)
        real = kind.is_floating_point() if isinstance(kind, Tensor) else kind.dtype.kind in "fO"
        if not real:
            dtype = str(kind.dtype).removeprefix("torch.")
            raise TypeError(
                f"{name} must be floats, got {dtype}, which may be labels; yield the points alone, or weights as floats."
            )
        found = as_tensor(weights, name=name)
        if found.shape == (len(points), 1):
            found = found[:, 0]
        if found.shape != points.shape[:1]:
            raise ValueError(
                f"{name} must have shape ({len(points)},), one per point, got {tuple(found.shape)}; "
                "yield the points alone, or an array of weights (n,)."
            )
        return found


def _check_callable(make: Callable[[], Any], name: str) -> None:
    """Raise a TypeError for a function that needs arguments."""
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
            f"{name} must be callable without arguments, but needs {', '.join(needed)}; pass lambda: function(...)."
        ) from None
