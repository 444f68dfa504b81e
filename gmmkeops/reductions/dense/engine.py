"""The dense engine: the points, or the row ranges of a schedule, are split into tiles, which are distributed over the cores."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from functools import cached_property
from itertools import chain, pairwise

import torch
from torch import Tensor

from gmmkeops._checks import PrecisionWarning, warn
from gmmkeops.reductions.cores import cores, on_cores
from gmmkeops.reductions.dense.bodies import body_of
from gmmkeops.reductions.dense.products import asked, has_slow_double
from gmmkeops.reductions.dense.rounding import Sizes, size_limits
from gmmkeops.reductions.dense.tile import Columns, Tile
from gmmkeops.reductions.problem import Exponents, Form
from gmmkeops.reductions.protocol import Request, Result
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = ["Dense"]

_logger = logging.getLogger("gmmkeops")

# Maximum number of entries and rows of a tile, so that its buffers stay in cache and the overhead of torch calls is small. Times
# on 2 cores for 256Ki, 768Ki and 1536Ki entries: moments of 1e6 x 30, D = 3: 79, 63 and 62 ms; of 1e5 x 100, D = 10: 44, 39 and
# 40 ms. A GPU needs large kernels: moments of 1e6 x 1000, D = 16, take 65, 34, 28, 26 and 24 ms on an H200 for 4, 8, 16, 32 and
# 64 Mi entries. The exponents and features of a tile take at most this fraction of the memory.
_TILE_CPU, _ROWS_CPU = 3 << 18, 1 << 14

_TILE_CUDA, _MEMORY = 1 << 26, 1 / 64

# Smallest number of pairs for which another thread saves time.
_PAIRS_PER_THREAD = 500_000

# Overhead of a tile, in pairs.
_PAIRS_PER_TILE = 10_000

# Largest error of log-sum-exps ℓ by float32 products, as a fraction of max(1, |ℓ|), if torch's settings allow them, and if they
# are used because float64 products are slow; number of points for which the error is measured; and largest ratio of the size
# limit to the sizes at these points.
_IMPRECISE, _CLOSE, _LOOKED_AT, _FURTHER = 1e-4, 1e-5, 256, 8.0


# Function of a loaded tile, its first row, and its last-plus-one row.
_Work = Callable[[Tile, int, int], None]

# First row, last-plus-one row, components (None for all), and smallest log-sum-exp for which the list is long enough.
_RowRange = tuple[int, int, Tensor | None, float]


class Dense:
    """Engine of torch operations, which supports all requests and devices."""

    name, title = "dense", "The dense engine"
    one_pass = False

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def unsupported(self, form: Form, request: Request) -> str | None:
        return None

    def begin(self, problem: Exponents, request: Request, columns: Columns | None = None) -> _Evaluation:
        """Begin an evaluation; other engines pass a kernel for the sums of exponentials over the ``columns`` of a tile."""
        return _Evaluation(problem, request, columns)


class _Evaluation:
    """Evaluation by tiles. It is repeated with smaller tiles if memory is exhausted, and with clamped exponents on overflow."""

    form = "dense"

    def __init__(self, problem: Exponents, request: Request, columns: Columns | None) -> None:
        self.problem, self._columns = problem, columns
        self._body = body_of(problem, request)
        self._clamp, self._halvings = self._body.clamp, 0
        self._tiles: list[Tile] = []

    def add(self, schedule: Schedule | None) -> tuple[Schedule, Tensor] | None:
        evaluated, tiles = self._run(schedule)
        if not self._clamp and self._body.overflowed(tiles):
            self._clamp = True
            evaluated, tiles = self._run(schedule)
        self._tiles += tiles
        if evaluated is None:
            return None
        minima = torch.tensor([least for tile in tiles for least in tile.minima], dtype=torch.float64)
        return evaluated, minima.to(evaluated.pruned.device)

    def result(self) -> Result:
        return self._body.result(self._tiles)

    def _run(self, schedule: Schedule | None) -> tuple[Schedule | None, list[Tile]]:
        """Evaluate all pairs or a schedule; return the schedule with long row ranges split, and the tiles of all workers."""
        while True:
            try:
                split = None if schedule is None else schedule.split(_TILE_CPU >> self._halvings)
                tiles = _whole(self.problem, self._halvings) if split is None else _row_ranges(split)
                # Exponents beyond the range of float32 cannot be computed by float32 products.
                limit = None if self._clamp else self._limit
                return split, _run(
                    self.problem, self._body, tiles, self._clamp, self._body.featured, limit, self._columns
                )
            except (MemoryError, RuntimeError) as error:
                # Tiles with fewer than 32 rows would not need less memory.
                if not _is_out_of_memory(error) or _tile_rows(self.problem, self._halvings) <= 32:
                    raise
                _logger.warning("out of memory; repeating with tiles of half the size")
                if self.problem.x.is_cuda:
                    torch.cuda.empty_cache()
                self._halvings += 1

    @cached_property
    def _limit(self) -> float | None:
        return _float32_limit(self.problem, self._halvings)


def _tile_rows(problem: Exponents, halvings: int = 0) -> int:
    N, K, D = problem.shape
    width = K + (D * (D + 1) // 2 if problem.is_full else D)
    size = _entries(problem.x.device) if problem.x.is_cuda else _TILE_CPU
    # Multiples of 32 align the rows of matrices on CUDA.
    rows = max(1, min(N, max(32, size // width // 32 * 32), _ROWS_CPU if not problem.x.is_cuda else N))
    return max(min(rows, 32), rows >> halvings)


@functools.cache
def _entries(device: torch.device) -> int:
    """Return the maximum number of float64 entries of a tile on a CUDA device."""
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(_TILE_CUDA, int(memory * _MEMORY) // 8)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _float32_limit(problem: Exponents, halvings: int) -> float | None:
    """Compute the largest size (:class:`Sizes`) for which products of float32 points may be computed in float32.

    The result is None if float64 products are fast and torch's settings do not allow float32 ones, or if these are not accurate
    enough for a sample of the points. Errors grow with the square of the size.
    """
    N = problem.shape[0]
    if problem.x.dtype != torch.float32 or N < 32 * _LOOKED_AT:
        return None
    allowed = asked(problem.x.device)
    if not allowed and not has_slow_double(problem.x.device):
        return None
    largest = _IMPRECISE if allowed else _CLOSE
    few = problem.rows(torch.arange(_LOOKED_AT, device=problem.x.device) * (N - 1) // (_LOOKED_AT - 1))
    found = [few.x.new_empty(_LOOKED_AT, dtype=torch.float64) for _ in range(2)]
    label = torch.empty(_LOOKED_AT, dtype=torch.int64, device=problem.x.device)
    for values, limit in zip(found, (math.inf, None), strict=True):

        def body(tile: Tile, start: int, stop: int, values: Tensor = values) -> None:
            label[start:stop] = tile.E.argmax(0)
            values[start:stop] = tile.softmax()

        _run(few, body, _whole(few, halvings), limit is None, False, limit)
    error = float(((found[0] - found[1]).abs() / found[1].abs().clamp(min=1)).max())
    if error <= largest / 2:
        sizes = Sizes(problem)
        own = (sizes.lengths[label] * (few.x - problem.center).abs()).sum(1) + sizes.own[label]
        # The median is robust to points that are far from all components.
        return float(own.median()) * min(_FURTHER, math.sqrt(largest / max(error, 1e-300)))
    if allowed:
        warn(
            "torch.set_float32_matmul_precision allows float32 products, which are not accurate enough for these data: "
            f"log-densities l would change by more than {largest / 2:g} * max(1, |l|) nats; using float64 products.",
            PrecisionWarning,
        )
    _logger.info("float32 products would change log-densities l by %.1g * max(1, |l|) nats", error)
    return None


def _whole(problem: Exponents, halvings: int = 0) -> list[_RowRange]:
    """Split all rows into tiles with all components."""
    N, size = problem.shape[0], _tile_rows(problem, halvings)
    if size < N and not problem.x.is_cuda:
        # Every thread gets the same number of tiles of about the same size.
        threads = cores()
        size = -(-N // (-(-N // (size * threads)) * threads))
    return [(start, min(N, start + size), None, -math.inf) for start in range(0, N, size)]


def _row_ranges(schedule: Schedule) -> list[_RowRange]:
    """Convert a schedule to a list of tiles."""
    assert schedule.floor is not None, "a truncation sets the floors of the schedules that it returns"
    ends = schedule.pointer.tolist()
    lists = [schedule.index[a:b] for a, b in pairwise(ends)]
    rows = zip(schedule.spans.tolist(), schedule.owner.tolist(), schedule.floor.tolist(), strict=True)
    return [(start, stop, lists[owner], floor) for (start, stop), owner, floor in rows]


def _run(
    problem: Exponents,
    body: _Work,
    tiles: list[_RowRange],
    clamp: bool,
    featured: bool,
    limit: float | None,
    columns: Columns | None = None,
) -> list[Tile]:
    """Run ``body`` over tiles, with float32 products for tiles whose sizes are within ``limit``; None for float64 products."""
    K = problem.shape[1]
    rows = [stop - start for start, stop, _, _ in tiles]
    pairs = [n * (K if index is None else len(index)) for n, (_, _, index, _) in zip(rows, tiles, strict=True)]
    # Each tile has a constant overhead.
    work = torch.tensor(pairs).add_(_PAIRS_PER_TILE).cumsum(0)
    threads = 1 if problem.x.is_cuda else cores()
    workers = max(1, min(threads, len(tiles), sum(pairs) // _PAIRS_PER_THREAD))
    cuts = torch.searchsorted(work, torch.arange(1, workers) * (int(work[-1]) / workers)).tolist()
    cuts = [0, *cuts, len(tiles)]

    bounds: Sizes | None = (sizes := Sizes(problem))
    if problem.x.is_cuda:
        # One test for all points avoids a synchronization of the device in each tile.
        most = min(size_limits(problem.x.dtype)) if limit is None else limit
        bounds = None if bool(sizes.most((problem.x - problem.center).abs().amax(0)) <= most) else sizes

    def new(limit: float | None) -> Tile:
        return Tile(problem, max(rows), max(pairs), clamp, featured, bounds, limit, limit is None, columns)

    def run(worker: int) -> list[Tile]:
        tile, deputy = new(limit), None
        for start, stop, index, floor in tiles[cuts[worker] : cuts[worker + 1]]:
            doing = tile
            if not tile.load(start, stop, index):
                deputy = doing = new(None) if deputy is None else deputy
                deputy.minima = tile.minima
                deputy.load(start, stop, index)
            doing.floor = floor
            body(doing, start, stop)
        if deputy is None:
            return [tile]
        deputy.minima = []
        return [tile, deputy]

    return list(chain.from_iterable(on_cores(run, workers, problem.x.device)))
