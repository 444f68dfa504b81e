"""Points of a fit in standardized coordinates, in memory or read chunk by chunk from a source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.data import Batch, Copies, Source
from gmmkeops.fitting.frame import Frame
from gmmkeops.models import Mixture

__all__ = ["Data", "Memory", "Stream"]


class Data(ABC):
    """Base class for the points of a fit, which every pass iterates over in batches.

    Attributes:
        dtype: Precision of the points.
        device: Device of the computation.
        features: Number of columns D, including contexts.
    """

    dtype: torch.dtype
    device: torch.device
    features: int

    @abstractmethod
    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """Iterate over all points once, in batches, without the first ``skip`` batches."""

    @abstractmethod
    def minibatches(self, size: int, seed: int) -> Iterator[Batch]:
        """Iterate over all points once, in a random order given by ``seed``, in batches of at most ``size`` points."""


@dataclass
class Memory(Data):
    """Points in memory. When float32 is not accurate enough, they are replaced by float64 points for the rest of the fit.

    Args:
        x: Points (N, D) in standardized coordinates.
        weights: Weights g (N,) float64, or None.
        truncate: ε for reductions over batches of the points.
        cloud: Kd-tree of all points, for reductions with truncation, or None.
        first: Index of the first row among the points of all processes.
        by: Mixture by whose component labels the points were sorted, or None.
        rounding: Largest rounding error of each column by conversion to float32 (D,); None if there are none.
        enter: Function that returns the points in standardized coordinates in float64.
        extra: Number of columns at the end that are contexts.
    """

    x: Tensor
    weights: Tensor | None
    truncate: float | None = 0
    cloud: reductions.Truncation | None = None
    first: int = 0
    by: Mixture | None = None
    rounding: Tensor | None = None
    enter: Callable[[], Tensor] | None = None
    extra: int = 0

    @classmethod
    def of(
        cls, x: Tensor, weights: Tensor | None, frame: Frame, dtype: torch.dtype, truncate: float | None, first: int
    ) -> Memory:
        """Standardize points (N, D) in data units."""
        points, rounding = frame.points(x, dtype)
        enter = None if rounding is None else lambda: frame.points(x, torch.float64)[0]
        return cls(points, weights, truncate, None, first, None, rounding, enter, frame.extra)

    def refine(self) -> None:
        """Replace the points by float64 points without rounding errors, with the same truncation."""
        if self.enter is None:
            return
        self.x, self.rounding, self.enter = self.enter(), None, None
        if self.cloud is not None and self.by is not None:
            epsilon, self.cloud = self.cloud.epsilon, None
            self.cloud = self.arranged(epsilon, self.by, 1, "dense").cloud

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.x.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.x.device

    @property
    def features(self) -> int:  # type: ignore[override]
        return self.x.shape[1]

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        # All points are one batch. Whether truncation saves time is decided once, for all passes.
        if not skip:
            yield self._whole()

    def _whole(self) -> Batch:
        def exact() -> Batch:
            self.refine()
            return self._whole()

        if self.cloud is not None:
            return Batch(self.cloud, self.weights, self.first, None, 0, self.rounding, exact)
        return _split(Batch(self.x, self.weights, self.first, None, 0, self.rounding, exact), self.extra)

    def _some(self, rows: Tensor, first: int) -> Batch:
        weights = None if self.weights is None else self.weights[rows]

        def exact() -> Batch:
            self.refine()
            return self._some(rows, first)

        batch = Batch(self.x[rows], weights, self.first + first, None, self.truncate, self.rounding, exact)
        return _split(batch, self.extra)

    def minibatches(self, size: int, seed: int) -> Iterator[Batch]:
        if not len(self.x):
            return
        generator = torch.Generator(self.device).manual_seed(seed)
        order = torch.randperm(len(self.x), generator=generator, device=self.device)
        # The first rows of all batches are read at once, so that batches do not wait for the device.
        for rows, first in zip(order.split(size), order[::size].tolist(), strict=True):
            yield self._some(rows, first)

    def arranged(self, truncate: float | None, mixture: Mixture, sweeps: int, backend: str) -> Memory:
        """Sort the points for truncation by ``mixture`` (standardized), if that saves time over ``sweeps`` passes."""

        def labels() -> Tensor:
            batch = Batch(self.x if self.cloud is None else self.cloud)
            arguments = (batch, mixture.offsets, mixture.means, mixture.factor)
            return reductions.argmax(*arguments, backend=backend, truncate=0)

        if not len(self.x):
            return self
        found = reductions.arrange(self.x, mixture.n_components, truncate, sweeps=sweeps, labels=labels)
        return replace(self, truncate=truncate, cloud=None if isinstance(found, Tensor) else found, by=mixture)


@dataclass(frozen=True)
class Stream(Data):
    """Points that are read from a source in every pass.

    Args:
        source: Source of the points of this rank.
        frame: Transformation to standardized coordinates.
        dtype, device: Precision of the points, and device of the computation.
        truncate: ε as for :func:`gmmkeops.fit`.
        unit: Power of two by which the weights are divided.
    """

    source: Source
    frame: Frame
    dtype: torch.dtype
    device: torch.device
    truncate: float | None = None
    unit: float = 1.0

    @property
    def features(self) -> int:  # type: ignore[override]
        return self.source.features

    def _enter(self, batch: Batch) -> Batch:
        return self._standardized(batch, self.dtype)

    def _standardized(self, batch: Batch, dtype: torch.dtype) -> Batch:
        # This is a method, since a recursive local function would keep its batch alive until the garbage collector runs.
        weights = None if batch.weights is None else batch.weights.to(self.device, non_blocking=True)
        weights = weights if weights is None or self.unit == 1 else weights / self.unit
        points, rounding = self.frame.points(batch.points.to(self.device, non_blocking=True), dtype)
        exact = None if rounding is None else cache(lambda: self._standardized(batch, torch.float64))
        return _split(Batch(points, weights, batch.first, None, self.truncate, rounding, exact), self.frame.extra)

    def _chunks(self, skip: int = 0, order: list[Any] | None = None) -> Iterator[Batch]:
        """Iterate over the chunks of one pass, of which the next one is copied while the current one is in use."""
        copies = Copies(self.device)
        # No loop variable is used, since it would keep the last chunk in memory while the next one is read.
        return map(
            copies.received, self.source.chunks(skip, order, prepare=lambda chunk: copies.sent(chunk, self._enter))
        )

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        return self._chunks(skip)

    def minibatches(self, size: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        rows_of = generator if self.device.type == "cpu" else torch.Generator(self.device).manual_seed(seed)
        left: Batch | None = None
        for batch in self._chunks(order=self.source.shuffled(generator)):
            batch = batch if left is None else left.joined(batch)
            order = torch.randperm(len(batch), generator=rows_of, device=self.device)
            parts = list(order.split(size))
            left = batch.rows(parts.pop()) if len(parts[-1]) < size else None
            for rows in parts:
                yield batch.rows(rows)
        if left is not None and len(left):
            yield left


def _split(batch: Batch, extra: int) -> Batch:
    """Split off the last ``extra`` columns of a batch as contexts."""
    if not extra:
        return batch
    D = batch.points.shape[1] - extra
    return replace(batch, points=batch.points[:, :D], context=batch.points[:, D:], rounding=None, exact=None)
