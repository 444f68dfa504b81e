"""The points of a fit, in its frame: all in memory, or read a chunk at a time; in pieces either way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.fitting._frame import Frame
from gmmkeops.sources import Chunk, Source

__all__ = ["Data", "Memory", "Piece", "Stream"]


@dataclass(frozen=True)
class Piece:
    """Some points, as the reductions take them.

    Args:
        x: Points (n, D) in the frame, or what has been arranged of them.
        weights: (n,) float64, or None.
        truncate: What sweeps may leave out.
        first: Number of its first row among all.
    """

    x: Tensor | reductions.Truncation
    weights: Tensor | None
    truncate: float | None
    first: int = 0


class Data(ABC):
    """What a fit reads, pass after pass.

    Attributes:
        dtype: What the points are computed in.
        device: Where.
        features: D.
    """

    dtype: torch.dtype
    device: torch.device
    features: int

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All points, once."""

    @abstractmethod
    def batches(self, size: int, seed: int) -> Iterator[Piece]:
        """All points, once, in an order drawn with ``seed``, at most ``size`` at a time."""


@dataclass(frozen=True)
class Memory(Data):
    """Points in memory.

    Args:
        x: Points (N, D) in the frame.
        weights: g (N,) float64, or None.
        truncate: What sweeps over some of the points may leave out.
        cloud: All points arranged for sweeps that leave components out, or None.
        first: Number of the first row among all processes'.
    """

    x: Tensor
    weights: Tensor | None
    truncate: float | None = 0
    cloud: reductions.Truncation | None = None
    first: int = 0

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.x.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.x.device

    @property
    def features(self) -> int:  # type: ignore[override]
        return self.x.shape[1]

    def pieces(self) -> Iterator[Piece]:
        # Arranging has been decided for all points, not for each sweep.
        if len(self.x):
            yield Piece(self.x if self.cloud is None else self.cloud, self.weights, 0, self.first)

    def batches(self, size: int, seed: int) -> Iterator[Piece]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed)).to(self.device)
        for rows in order.split(size):
            weights = None if self.weights is None else self.weights[rows]
            yield Piece(self.x[rows], weights, self.truncate, self.first + int(rows[0]))

    def arranged(self, truncate: float | None, mixture: Any, sweeps: int, backend: str) -> Memory:
        """The same, read with what truncation allows over so many sweeps of all points from a mixture of the frame on."""

        def labels() -> Tensor:
            arguments = (self.x if self.cloud is None else self.cloud, mixture.offsets, mixture.means, mixture.factor)
            return reductions.argmax(*arguments, backend=backend, truncate=0)

        found = reductions.arrange(self.x, mixture.components, truncate, sweeps=sweeps, labels=labels)
        return replace(self, truncate=truncate, cloud=None if isinstance(found, Tensor) else found)


@dataclass(frozen=True)
class Stream(Data):
    """Points that are read anew on every pass.

    Args:
        source: Where they are read.
        frame: What they are brought into.
        dtype, device: What they are computed in, and where.
        truncate: What sweeps may leave out.
    """

    source: Source
    frame: Frame
    dtype: torch.dtype
    device: torch.device
    truncate: float | None = None

    @property
    def features(self) -> int:  # type: ignore[override]
        return self.source.features

    def _enter(self, chunk: Chunk) -> Piece:
        points = self.frame.points(chunk.points.to(self.device), self.dtype)
        weights = None if chunk.weights is None else chunk.weights.to(self.device)
        return Piece(points, weights, self.truncate, chunk.first)

    def pieces(self) -> Iterator[Piece]:
        return self.source.chunks(prepare=self._enter)

    def batches(self, size: int, seed: int) -> Iterator[Piece]:
        generator = torch.Generator().manual_seed(seed)
        left: Piece | None = None
        for piece in self.source.chunks(order=self.source.shuffled(generator), prepare=self._enter):
            piece = piece if left is None else _joined(left, piece)
            order = torch.randperm(len(piece.x), generator=generator).to(self.device)
            parts = list(order.split(size))
            left = _rows(piece, parts.pop()) if len(parts[-1]) < size else None
            for rows in parts:
                yield _rows(piece, rows)
        if left is not None:
            yield left


def _rows(piece: Piece, rows: Tensor) -> Piece:
    assert isinstance(piece.x, Tensor), "only points that are not arranged are taken apart"
    return replace(piece, x=piece.x[rows], weights=None if piece.weights is None else piece.weights[rows])


def _joined(a: Piece, b: Piece) -> Piece:
    assert isinstance(a.x, Tensor), "only points that are not arranged are joined"
    assert isinstance(b.x, Tensor), "only points that are not arranged are joined"
    weights = None
    if a.weights is not None or b.weights is not None:
        weights = torch.cat(
            [p.x.new_ones(len(p.x), dtype=torch.float64) if p.weights is None else p.weights for p in (a, b)]
        )
    return replace(b, x=torch.cat([a.x, b.x]), weights=weights)
