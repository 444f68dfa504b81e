"""The points of a fit in standardized coordinates, in memory or read chunk by chunk from a source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import Factor
from gmmkeops.data import Chunk, Source, World
from gmmkeops.fitting.frame import Frame
from gmmkeops.models import Mixture

__all__ = ["Data", "Ledger", "Memory", "Piece", "Stream"]

# Largest change of a whitened residual by rounding the points to float32: 3e-5 is about 1e-4 nats at three deviations.
_ROUNDING = 3e-5


@dataclass(frozen=True)
class Piece:
    """A block of points, the argument of a reduction.

    Args:
        x: Points (n, D) in standardized coordinates, or a kd-tree of them for truncation.
        weights: Weights (n,) float64, or None.
        truncate: ε as for :func:`gmmkeops.fit`, for points that are not sorted yet.
        first: Index of the first row among all points.
        rounding: Largest rounding error of each column by conversion to float32 (D,); None if nothing was rounded.
        exact: Returns the piece in float64, if rounding has changed it.
    """

    x: Tensor | reductions.Truncation
    weights: Tensor | None
    truncate: float | None
    first: int = 0
    rounding: Tensor | None = None
    exact: Callable[[], Piece] | None = None

    def accurate(self, factor: Factor) -> Piece:
        """The piece itself, or its float64 version if the rounding may change log-densities by more than about 1e-4 nats."""
        if self.rounding is None or self.exact is None or _harmless(self.rounding, factor):
            return self
        return self.exact()


def _harmless(rounding: Tensor, factor: Factor) -> bool:
    """Whether rounding errors (D,) of the columns change no whitened residual by more than the limit."""
    return bool((factor.detach().row_norms().double() @ rounding).amax() <= _ROUNDING)


@dataclass
class Ledger:
    """Error bounds and counts of the truncation in the last pass over all points.

    Args:
        epsilon: Largest ε of the pass.
        certificate: Upper bound on the error of any point's log-density, nats.
        pairs, looked: Number of pairs of point and component, and number of evaluated pairs.
        wide: 1 if some points were computed in float64 because float32 was not accurate enough, else 0.
    """

    epsilon: float = 0.0
    certificate: float = 0.0
    pairs: float = 0.0
    looked: float = 0.0
    wide: float = 0.0

    def add(self, x: Tensor | reductions.Truncation, components: int) -> None:
        """Add the counts and error bounds of a reduction over points or their kd-tree."""
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
        """All fields, as a list."""
        return [self.epsilon, self.certificate, self.pairs, self.looked, self.wide]

    def of_all(self, world: World) -> Ledger:
        """The ledger of all ranks together."""
        said = world.tell(self.numbers)
        epsilon, certificate, pairs, looked, wide = zip(*said, strict=True)
        return Ledger(max(epsilon), max(certificate), sum(pairs), sum(looked), max(wide))


class Data(ABC):
    """Points that can be read on every pass of a fit.

    Attributes:
        dtype: Precision of the points.
        device: Device of the computation.
        features: Number of columns D.
    """

    dtype: torch.dtype
    device: torch.device
    features: int

    @abstractmethod
    def pieces(self, skip: int = 0) -> Iterator[Piece]:
        """Iterate over all points once, without the first ``skip`` pieces."""

    @abstractmethod
    def batches(self, size: int, seed: int) -> Iterator[Piece]:
        """Iterate over all points once, in a random order given by ``seed``, in batches of at most ``size`` points."""


@dataclass
class Memory(Data):
    """Points in memory; they are converted to float64 permanently if float32 is no longer accurate enough.

    Args:
        x: Points (N, D) in standardized coordinates.
        weights: Weights g (N,) float64, or None.
        truncate: ε for reductions over batches of the points.
        cloud: Kd-tree of all points, for reductions with truncation, or None.
        first: Index of the first row among the points of all processes.
        by: The mixture whose components the points were sorted by, or None.
        rounding: Largest rounding error of each column by conversion to float32 (D,); None if nothing was rounded.
        enter: Returns the points in standardized coordinates in float64.
    """

    x: Tensor
    weights: Tensor | None
    truncate: float | None = 0
    cloud: reductions.Truncation | None = None
    first: int = 0
    by: Mixture | None = None
    rounding: Tensor | None = None
    enter: Callable[[], Tensor] | None = None

    @classmethod
    def of(
        cls, x: Tensor, weights: Tensor | None, frame: Frame, dtype: torch.dtype, truncate: float | None, first: int
    ) -> Memory:
        """Standardize points (N, D) in data units."""
        points, rounding = frame.points(x, dtype)
        return cls(
            points,
            weights,
            truncate,
            first=first,
            rounding=rounding,
            enter=None if rounding is None else lambda: frame.points(x, torch.float64)[0],
        )

    def refine(self) -> None:
        """Replace the points by float64 ones that have not been rounded, with the same truncation."""
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

    def pieces(self, skip: int = 0) -> Iterator[Piece]:
        # Whether truncation saves time has been decided for all passes, not for each.
        if not skip:
            yield self._whole()

    def _whole(self) -> Piece:
        x = self.x if self.cloud is None else self.cloud

        def exact() -> Piece:
            self.refine()
            return self._whole()

        return Piece(x, self.weights, 0, self.first, self.rounding, exact)

    def _some(self, rows: Tensor) -> Piece:
        weights = None if self.weights is None else self.weights[rows]

        def exact() -> Piece:
            self.refine()
            return self._some(rows)

        return Piece(self.x[rows], weights, self.truncate, self.first + int(rows[0]), self.rounding, exact)

    def batches(self, size: int, seed: int) -> Iterator[Piece]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed)).to(self.device)
        for rows in order.split(size) if len(order) else ():
            yield self._some(rows)

    def arranged(self, truncate: float | None, mixture: Mixture, sweeps: int, backend: str) -> Memory:
        """The points sorted for truncation by ``mixture`` (standardized), if that saves time over ``sweeps`` passes."""

        def labels() -> Tensor:
            arguments = (self.x if self.cloud is None else self.cloud, mixture.offsets, mixture.means, mixture.factor)
            return reductions.argmax(*arguments, backend=backend, truncate=0)

        if not len(self.x):
            return self
        found = reductions.arrange(self.x, mixture.components, truncate, sweeps=sweeps, labels=labels)
        return replace(self, truncate=truncate, cloud=None if isinstance(found, Tensor) else found, by=mixture)


@dataclass(frozen=True)
class Stream(Data):
    """Points that are read from a source on every pass.

    Args:
        source: The source, of this rank.
        frame: The transformation to standardized coordinates.
        dtype, device: Precision of the points, and device of the computation.
        truncate: ε as for :func:`gmmkeops.fit`.
        unit: Unit of the weights, a power of two.
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

    def _enter(self, chunk: Chunk) -> Piece:
        return self._piece(chunk, self.dtype)

    def _piece(self, chunk: Chunk, dtype: torch.dtype) -> Piece:
        # A method, because a local function that refers to itself would keep its chunk until the garbage collector runs.
        weights = None if chunk.weights is None else chunk.weights.to(self.device)
        weights = weights if weights is None or self.unit == 1 else weights / self.unit
        points, rounding = self.frame.points(chunk.points.to(self.device), dtype)
        exact = None if rounding is None else cache(lambda: self._piece(chunk, torch.float64))
        return Piece(points, weights, self.truncate, chunk.first, rounding, exact)

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
    assert isinstance(piece.x, Tensor), "only unsorted points are split"
    weights = None if piece.weights is None else piece.weights[rows]
    exact = None if piece.exact is None else lambda: _rows(_in_float64(piece), rows)
    return replace(piece, x=piece.x[rows], weights=weights, exact=exact)


def _joined(a: Piece, b: Piece) -> Piece:
    assert isinstance(a.x, Tensor), "only points that are not arranged are joined"
    assert isinstance(b.x, Tensor), "only points that are not arranged are joined"
    weights = None
    if a.weights is not None or b.weights is not None:
        one = torch.ones((), dtype=torch.float64, device=a.x.device)
        weights = torch.cat([one.expand(len(piece.x)) if piece.weights is None else piece.weights for piece in (a, b)])
    rounding, exact = _larger(a.rounding, b.rounding), None
    if rounding is not None:
        exact = cache(lambda: _joined(_in_float64(a), _in_float64(b)))
    return replace(b, x=torch.cat([a.x, b.x]), weights=weights, rounding=rounding, exact=exact)


def _larger(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Elementwise maximum of two rounding errors (D,)."""
    if a is None or b is None:
        return b if a is None else a
    return torch.maximum(a, b)


def _in_float64(piece: Piece) -> Piece:
    """The piece in float64; a piece without rounding errors is cast."""
    if piece.exact is not None:
        return piece.exact()
    assert isinstance(piece.x, Tensor), "only points that are not arranged are joined"
    return replace(piece, x=piece.x.double())
