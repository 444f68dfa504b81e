"""The batch: a block of rows that is passed from a source to the engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["ROUNDING", "Batch"]

# Largest norm of the change of a whitened residual due to float32 rounding of the points, whose errors in the columns are
# independent: 3e-5 is 1e-4 nats at three standard deviations.
ROUNDING = 3e-5


@dataclass(frozen=True)
class Batch:
    """A block of rows.

    Args:
        points: Points (n, D), float32 or float64; or points sorted into kd-tree leaves for truncation.
        weights: Weights (n,) float64, or None for weights of one.
        first: Index of the first row among all rows.
        context: Contexts (n, C) of the points, or None.
        truncate: Truncation as for :func:`gmmkeops.fit`, for points that are not sorted.
        rounding: Largest rounding error of each column by conversion to float32 (D,); None if nothing was rounded.
        exact: Function that returns the batch in float64, if the points were rounded.
    """

    points: Any
    weights: Tensor | None = None
    first: int = 0
    context: Tensor | None = None
    truncate: float | None = 0
    rounding: Tensor | None = None
    exact: Callable[[], Batch] | None = None

    @property
    def mass(self) -> float:
        """Total weight of the rows."""
        return float(len(self.points)) if self.weights is None else float(self.weights.sum())

    def __len__(self) -> int:
        return len(self.points)

    def accurate(self, norms: Callable[[], Tensor]) -> Batch:
        """Return the batch, in float64 if rounding to float32 may change log-densities by more than about 1e-4 nats.

        Args:
            norms: Function that returns the norms of the rows of the precision factors (K or 1, D), 1 / units of the points.
        """
        if self.rounding is None or self.exact is None:
            return self
        found = norms().double().square()
        changes = found @ self.rounding.to(found.device).square()
        return self if bool(changes.amax() <= ROUNDING**2) else self.exact()

    def in_float64(self) -> Batch:
        """Return the batch in float64."""
        return replace(self, points=self.points.double()) if self.exact is None else self.exact()

    def rows(self, index: Tensor) -> Batch:
        """Select rows of points that are not sorted."""
        return replace(
            self,
            points=self.points[index],
            weights=None if self.weights is None else self.weights[index],
            context=None if self.context is None else self.context[index],
            exact=None if self.exact is None else lambda: self.in_float64().rows(index),
        )

    def joined(self, after: Batch) -> Batch:
        """Concatenate the rows of this batch and of a later one."""
        parts = (self, after)
        weights = context = exact = None
        if any(part.weights is not None for part in parts):
            one = torch.ones((), dtype=torch.float64, device=self.points.device)
            weights = torch.cat([one.expand(len(part)) if part.weights is None else part.weights for part in parts])
        if self.context is not None and after.context is not None:
            context = torch.cat([self.context, after.context])
        errors = [part.rounding for part in parts if part.rounding is not None]
        if errors:
            exact = cache(lambda: self.in_float64().joined(after.in_float64()))
        return replace(
            after,
            points=torch.cat([self.points, after.points]),
            weights=weights,
            context=context,
            rounding=torch.stack(errors).amax(0) if errors else None,
            exact=exact,
        )
