"""Partial sums of moments over chunks of rows, and their float64 totals without atomic operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gmmkeops.reductions.triton.loading import launch
from gmmkeops.reductions.triton.packing import Blocks
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = ["MOST_CHUNKS", "SLAB", "Piece", "add_moments", "add_up"]

# Maximum memory for the partial sums of one launch, bytes.
SLAB = 1 << 26

# Largest number of chunks of one launch: the limit of CUDA for the second axis of a grid.
MOST_CHUNKS = 65_535

# Numbers of columns and of partial sums of a program that adds them.
_COLUMNS, _SUMS = 32, 32


@dataclass(frozen=True)
class Piece:
    """Chunks of rows whose partial sums are computed by one launch.

    Args:
        rows: Rows of all chunks.
        chunks: Number of chunks.
        components: Largest number of components of a chunk.
        width: Number of partial sums W for each pair of chunk and component.
        columns: Number of columns M, at least the number of these pairs.
        table: Rows and list of each chunk (chunks, 3), int32; None for all components.
        pointer: Position of the first entry of each list in ``index``, and of the end of the last list.
        index: Components of all lists.
        ends: Last-plus-one column of each chunk (chunks,), with the columns of the pieces before.
        component: Component of each column (M,), int32, which the kernel sets; K for columns that are not used.
        origin: Number of columns of the pieces before.
    """

    rows: slice
    chunks: int
    components: int
    width: int
    columns: int
    table: Tensor | None = None
    pointer: Tensor | None = None
    index: Tensor | None = None
    ends: Tensor | None = None
    component: Tensor | None = None
    origin: int = 0

    def lists(self, x: Tensor) -> tuple[Tensor | int, ...]:
        """Return table, pointer, index, ends, component and origin; empty tensors on the device of x if there are no lists."""
        none = x.new_empty(0, dtype=torch.int32)
        parts = self.table, self.pointer, self.index, self.ends, self.component
        return *(none if part is None else part for part in parts), self.origin


def add_moments(
    x: Tensor, sums: Tensor, schedules: Sequence[Schedule] | None, chunk: int, partial: Callable[[Piece], Tensor]
) -> None:
    """Add the moments of all pairs, or over the candidate lists of schedules, to ``sums`` (W, K), float64.

    Args:
        x: Points (N, D).
        sums: The sums.
        schedules: Schedules of all rows; None for all pairs.
        chunk: Number of rows for each partial sum.
        partial: Function that computes the partial sums (W, M) of a piece, in the dtype of the points.
    """
    N, (width, K) = len(x), sums.shape
    most = max(1, SLAB // (x.element_size() * width))
    if schedules is None:
        some = min(max(1, most // K), MOST_CHUNKS) * chunk
        for start in range(0, N, some):
            chunks = -(-(min(N, start + some) - start) // chunk)
            piece = Piece(slice(start, start + some), chunks, K, width, chunks * K)
            add_up(partial(piece), sums, chunks)
        return
    for schedule in schedules:
        for piece in _pieces(schedule, N, K, width, chunk, most):
            part = partial(piece)
            assert piece.component is not None, "the pieces of a schedule have lists"
            component, order = piece.component.sort(stable=True)
            pointer = torch.searchsorted(component, torch.arange(K + 1, dtype=component.dtype, device=x.device))
            add_up(part, sums, 0, (order, pointer))


def _pieces(schedule: Schedule, rows: int, components: int, width: int, chunk: int, most: int) -> Iterator[Piece]:
    """Split a schedule into pieces of about ``most`` columns."""
    table, whole = Blocks.of(schedule, chunk).table, schedule.whole
    lengths = schedule.pointer.diff()[table[:, 2]]
    ends, chunks = lengths.cumsum(0), len(table)
    cuts = [0, chunks]
    if whole is not None and chunks <= MOST_CHUNKS:
        # An upper bound, since a chunk of each leaf may be shorter. It is known without waiting for the device.
        longest, columns = whole.longest, [0, whole.pairs // chunk + len(schedule.index)]
    if whole is None or chunks > MOST_CHUNKS or columns[-1] > most:
        # The numbers on which the sizes of the launches depend.
        total, longest = torch.stack([ends[-1], lengths.amax()]).tolist()
        most, columns = max(most, 2 * longest), [0, total]
        places = []
        if total > most:
            limits = torch.arange(most, total, most - longest, device=ends.device)
            places.append(torch.searchsorted(ends, limits, right=True))
        if chunks > MOST_CHUNKS:
            places.append(torch.arange(MOST_CHUNKS, chunks, MOST_CHUNKS, device=ends.device))
        if places:
            inner = torch.cat(places).unique()
            before = torch.where(inner > 0, ends[(inner - 1).clamp(min=0)], 0)
            cuts, columns = [0, *inner.tolist(), chunks], [0, *before.tolist(), total]
    for (first, last), (start, stop) in zip(pairwise(cuts), pairwise(columns), strict=True):
        if start == stop:
            continue
        component = torch.full((stop - start,), components, dtype=torch.int32, device=ends.device)
        given = table[first:last], schedule.pointer, schedule.index, ends[first:last], component, start
        yield Piece(slice(0, rows), last - first, longest, width, stop - start, *given)


def add_up(part: Tensor, sums: Tensor, chunks: int, listed: tuple[Tensor, Tensor] | None = None) -> None:
    """Add partial sums (W, M) to ``sums`` (W, K), float64, in the order of their columns.

    Args:
        part: Partial sums; without lists, the K columns of each chunk follow one another.
        sums: The sums.
        chunks: Number of chunks, without lists.
        listed: The columns of each component, one component after another, and their ranges (K + 1,).
    """
    if listed is None and part.stride(0) == 1 and part.stride(1) == len(part):
        # Neighboring numbers are added by neighboring threads.
        part, sums = part.T.reshape(1, -1), sums.T.view(1, -1)
    width, K = sums.shape
    none = part.new_empty(0, dtype=torch.int64)
    order, pointer = (none, none) if listed is None else listed
    launch(
        "sums", "add_partial_sums", part.device, (-(-K // _COLUMNS), width), part, sums, order, pointer, K, chunks,
        part.stride(1), part.stride(0), sums.stride(1), sums.stride(0), LISTS=listed is not None, BK=_COLUMNS, BJ=_SUMS, warps=4,
    )  # fmt: skip
