"""The points of a fit, in its frame: all in memory, or read a chunk at a time; in pieces either way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.distributed import World
from gmmkeops.fitting._frame import Frame
from gmmkeops.mixture import Mixture
from gmmkeops.sources import Chunk, Source

__all__ = ["Data", "Ledger", "Memory", "Piece", "Stream"]


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


@dataclass
class Ledger:
    """What the last sweep over all points left out.

    Args:
        epsilon: The largest ε of its truncations.
        certificate: Most that it may have lost of any point's log-likelihood, nats.
        pairs, looked: Pairs of point and component, and how many of them were looked at.
    """

    epsilon: float = 0.0
    certificate: float = 0.0
    pairs: float = 0.0
    looked: float = 0.0

    def add(self, x: Tensor | reductions.Truncation, components: int) -> None:
        """Enters a sweep over points, or what was arranged of them."""
        pairs = float(len(x) * components)
        self.pairs += pairs
        if isinstance(x, Tensor):
            self.looked += pairs
            return
        self.looked += x.share * pairs
        self.epsilon = max(self.epsilon, x.epsilon)
        self.certificate = max(self.certificate, x.certificate)

    @property
    def numbers(self) -> list[float]:
        """All of it."""
        return [self.epsilon, self.certificate, self.pairs, self.looked]

    def of_all(self, world: World) -> Ledger:
        """What truncation has done on all ranks."""
        said = world.tell(self.numbers)
        epsilon, certificate, pairs, looked = zip(*said, strict=True)
        return Ledger(max(epsilon), max(certificate), sum(pairs), sum(looked))


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
    def pieces(self, skip: int = 0) -> Iterator[Piece]:
        """All points, once, but for so many pieces at the beginning."""

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
        by: The mixture that they were arranged by, or None.
    """

    x: Tensor
    weights: Tensor | None
    truncate: float | None = 0
    cloud: reductions.Truncation | None = None
    first: int = 0
    by: Mixture | None = None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.x.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.x.device

    @property
    def features(self) -> int:  # type: ignore[override]
        return self.x.shape[1]

    def pieces(self, skip: int = 0) -> Iterator[Piece]:
        # Arranging has been decided for all points, not for each sweep.
        if not skip:
            yield Piece(self.x if self.cloud is None else self.cloud, self.weights, 0, self.first)

    def batches(self, size: int, seed: int) -> Iterator[Piece]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed)).to(self.device)
        for rows in order.split(size) if len(order) else ():
            weights = None if self.weights is None else self.weights[rows]
            yield Piece(self.x[rows], weights, self.truncate, self.first + int(rows[0]))

    def arranged(self, truncate: float | None, mixture: Mixture, sweeps: int, backend: str) -> Memory:
        """The same, read with what truncation allows over so many sweeps of all points from a mixture of the frame on."""

        def labels() -> Tensor:
            arguments = (self.x if self.cloud is None else self.cloud, mixture.offsets, mixture.means, mixture.factor)
            return reductions.argmax(*arguments, backend=backend, truncate=0)

        if not len(self.x):
            return self
        found = reductions.arrange(self.x, mixture.components, truncate, sweeps=sweeps, labels=labels)
        return replace(self, truncate=truncate, cloud=None if isinstance(found, Tensor) else found, by=mixture)


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

    def pieces(self, skip: int = 0) -> Iterator[Piece]:
        return self.source.chunks(skip, prepare=self._enter)

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
        if left is not None and len(left.x):
            yield left


def _rows(piece: Piece, rows: Tensor) -> Piece:
    assert isinstance(piece.x, Tensor), "only points that are not arranged are taken apart"
    return replace(piece, x=piece.x[rows], weights=None if piece.weights is None else piece.weights[rows])


def _joined(a: Piece, b: Piece) -> Piece:
    assert isinstance(a.x, Tensor), "only points that are not arranged are joined"
    assert isinstance(b.x, Tensor), "only points that are not arranged are joined"
    weights = None
    if a.weights is not None or b.weights is not None:
        one = torch.ones((), dtype=torch.float64, device=a.x.device)
        weights = torch.cat([one.expand(len(piece.x)) if piece.weights is None else piece.weights for piece in (a, b)])
    return replace(b, x=torch.cat([a.x, b.x]), weights=weights)
