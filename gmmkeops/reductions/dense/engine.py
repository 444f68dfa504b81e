"""The dense engine: reductions over cache-sized tiles of points and components, on any device.

The points, or the schedule of a truncation, are split into tiles, which are distributed over the cores. A reduction reads one
tile after the other, and no N x K array is stored.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from itertools import chain, count, pairwise

import torch
from torch import Tensor

from gmmkeops._checks import PrecisionWarning
from gmmkeops.reductions.cores import on_cores
from gmmkeops.reductions.dense.products import asked
from gmmkeops.reductions.dense.rounding import Sizes
from gmmkeops.reductions.dense.tile import Tile, least_limit
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.truncation.bounds import Plan
from gmmkeops.reductions.truncation.truncation import Truncation

__all__ = ["argmax", "logsumexp", "moments", "point_gradient", "topk"]

_logger = logging.getLogger("gmmkeops")

# Entries and rows of one tile: few enough to stay in cache with their copies, enough to outweigh the overhead of torch calls
# (2 cores, moments of 1e6 x 30, D = 3: 79 ms at 256Ki, 63 at 768Ki, 62 at 1536Ki; 1e5 x 100, D = 10: 44, 39, 40). A GPU needs
# long kernels.
_TILE_CPU, _ROWS_CPU = 3 << 18, 1 << 14

_TILE_CUDA = 1 << 24

# Smallest number of pairs for which another thread saves time.
_PAIRS_PER_THREAD = 500_000

# Overhead of a tile, in pairs.
_PAIRS_PER_TILE = 10_000

# Largest error of a point's log-sum-exp ℓ by float32 products, as a fraction of max(1, |ℓ|); number of points at which it is
# tested; and largest ratio of a size to the sizes at these points.
_IMPRECISE, _LOOKED_AT, _FURTHER = 1e-4, 256, 8.0


def _tile_rows(problem: Exponents, halvings: int = 0) -> int:
    N, K, D = problem.shape
    width = K + (D * (D + 1) // 2 if problem.is_full else D)
    size = _TILE_CUDA if problem.x.is_cuda else _TILE_CPU
    rows = max(1, min(N, max(32, size // width), _ROWS_CPU if not problem.x.is_cuda else N))
    return max(min(rows, 32), rows >> halvings)


_Body = Callable[[Tile, int, int], None]

# First row, last-plus-one row, components (None for all), and the smallest log-sum-exp for which the list is long enough.
_Stretch = tuple[int, int, Tensor | None, float]


def _sweep(
    problem: Exponents,
    body: _Body,
    blocks: Truncation | None = None,
    *,
    clamp: bool,
    featured: bool = False,
    single: bool = False,
) -> list[Tile]:
    """Run ``body`` over all tiles, on as many threads as torch has; return the workers' tiles in order of rows.

    Args:
        problem: Points and components.
        body: Called with the loaded tile and its first and last-plus-one row. It must not write or add results unless
            ``tile.sees(values)`` returns True, which means that the candidate list of the tile is long enough.
        blocks: Truncation that chooses the components of each tile; None for all components.
        clamp: Keep exponents beyond the dtype's range finite.
        featured: Compute the features even if the exponents do not need them.
        single: As in :meth:`Truncation.begin`.
    """
    for halvings in count():
        try:
            return _swept(problem, body, blocks, clamp, featured, single, halvings)
        except (MemoryError, RuntimeError) as error:
            # The pass is repeated with smaller tiles; below 32 rows they would save no more memory.
            if not _is_out_of_memory(error) or _tile_rows(problem, halvings) <= 32:
                raise
            _logger.warning("out of memory: tiles are halved")
            if problem.x.is_cuda:
                torch.cuda.empty_cache()
    raise AssertionError("halving ends")


def _float32_limit(problem: Exponents, halvings: int) -> float | None:
    """Largest sizes of components (:class:`Sizes`) for which products of float32 points may be taken in float32, or None.

    None if torch's setting does not allow them, or if they are not accurate enough at a sample of the points. Errors grow with
    the square of the size.
    """
    N = problem.shape[0]
    if problem.x.dtype != torch.float32 or not asked(problem.x.device) or N < 32 * _LOOKED_AT:
        return None
    few = problem.rows(torch.arange(_LOOKED_AT, device=problem.x.device) * (N - 1) // (_LOOKED_AT - 1))
    found = [few.x.new_empty(_LOOKED_AT, dtype=torch.float64) for _ in range(2)]
    label = torch.empty(_LOOKED_AT, dtype=torch.int64, device=problem.x.device)
    for values, limit in zip(found, (math.inf, None), strict=True):

        def body(tile: Tile, start: int, stop: int, values: Tensor = values) -> None:
            label[start:stop] = tile.E.argmax(0)
            values[start:stop] = tile.softmax()

        _run(few, body, _whole(few, halvings), limit is None, False, limit)
    error = float(((found[0] - found[1]).abs() / found[1].abs().clamp(min=1)).max())
    if error <= _IMPRECISE / 2:
        sizes = Sizes(problem)
        own = (sizes.lengths[label] * (few.x - problem.centre).abs()).sum(1) + sizes.own[label]
        # The median, since a sample may contain points that are far from all components.
        return float(own.median()) * min(_FURTHER, math.sqrt(_IMPRECISE / max(error, 1e-300)))
    warnings.warn(
        "torch.set_float32_matmul_precision asks for float32 products, which are not accurate enough here: log-densities l "
        f"would change by more than {_IMPRECISE / 2:g} * max(1, |l|) nats; float64 products are used.",
        PrecisionWarning,
        stacklevel=2,
    )
    _logger.info("float32 products would change log-densities l by %.1g * max(1, |l|) nats", error)
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _swept(
    problem: Exponents,
    body: _Body,
    blocks: Truncation | None,
    clamp: bool,
    featured: bool,
    single: bool,
    halvings: int,
) -> list[Tile]:
    # Exponents beyond the range of float32 cannot be computed by float32 products.
    limit = None if clamp else _float32_limit(problem, halvings)
    plan = None if blocks is None else blocks.begin(problem, single)
    if blocks is None or plan is None:
        return _run(problem, body, _whole(problem, halvings), clamp, featured, limit)
    workers: list[Tile] = []
    while plan is not None:
        plan = plan.split(_TILE_CPU >> halvings)
        new = _run(problem, body, _stretches(plan, blocks.floor(problem, plan, single)), clamp, featured, limit)
        workers += new
        minima = torch.tensor([least for tile in new for least in tile.minima], dtype=torch.float64)
        plan = blocks.again(problem, plan, minima.to(plan.dropped.device), single)
    return workers


def _whole(problem: Exponents, halvings: int = 0) -> list[_Stretch]:
    """Tiles of all components."""
    N, size = problem.shape[0], _tile_rows(problem, halvings)
    if size < N and not problem.x.is_cuda:
        # The same number of tiles for each thread, all of about the same size.
        threads = torch.get_num_threads()
        size = -(-N // (-(-N // (size * threads)) * threads))
    return [(start, min(N, start + size), None, -math.inf) for start in range(0, N, size)]


def _stretches(plan: Plan, floors: Tensor) -> list[_Stretch]:
    """Row range, components and smallest admissible value of each tile of a schedule."""
    ends = plan.pointer.tolist()
    lists = [plan.index[a:b] for a, b in pairwise(ends)]
    rows = zip(plan.spans.tolist(), plan.owner.tolist(), floors.tolist(), strict=True)
    return [(start, stop, lists[owner], floor) for (start, stop), owner, floor in rows]


def _run(
    problem: Exponents,
    body: _Body,
    tiles: list[_Stretch],
    clamp: bool,
    featured: bool,
    limit: float | None,
) -> list[Tile]:
    """Run ``body`` over tiles, with float32 products for tiles whose sizes are within ``limit``; None for float64 products."""
    K = problem.shape[1]
    rows = [stop - start for start, stop, _, _ in tiles]
    pairs = [n * (K if index is None else len(index)) for n, (_, _, index, _) in zip(rows, tiles, strict=True)]
    # Each tile has a constant overhead.
    work = torch.tensor(pairs).add_(_PAIRS_PER_TILE).cumsum(0)
    threads = 1 if problem.x.is_cuda else torch.get_num_threads()
    workers = max(1, min(threads, len(tiles), sum(pairs) // _PAIRS_PER_THREAD))
    cuts = torch.searchsorted(work, torch.arange(1, workers) * (int(work[-1]) / workers)).tolist()
    cuts = [0, *cuts, len(tiles)]

    bounds: Sizes | None = (sizes := Sizes(problem))
    if problem.x.is_cuda and bool(
        sizes.most((problem.x - problem.centre).abs().amax(0)) <= least_limit(problem, limit)
    ):
        # One test for all points avoids a synchronization of the device in each tile.
        bounds = None

    def new(limit: float | None) -> Tile:
        return Tile(problem, max(rows), max(pairs), clamp, featured, bounds, limit, limit is None)

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


def logsumexp(problem: Exponents, blocks: Truncation | None = None) -> Tensor:
    """Log-sum-exps ℓ (N,), nats, in the dtype of the points."""
    values = problem.x.new_empty(problem.shape[0])

    def body(tile: Tile, start: int, stop: int) -> None:
        found = tile.softmax()
        if tile.sees(found):
            values[start:stop] = found

    _sweep(problem, body, blocks, clamp=False)
    if not bool(torch.isfinite(values).all()):
        _sweep(problem, body, blocks, clamp=True)
    return values


def argmax(problem: Exponents, blocks: Truncation | None = None) -> Tensor:
    """Index of the largest exponent (N,), int64."""
    labels = torch.empty(problem.shape[0], dtype=torch.int64, device=problem.x.device)

    def body(tile: Tile, start: int, stop: int) -> None:
        best = tile.E.max(0)
        if tile.sees(best.values):
            labels[start:stop] = tile.components(best.indices)

    _sweep(problem, body, blocks, clamp=True, single=True)
    return labels


def topk(problem: Exponents, k: int, blocks: Truncation | None = None) -> tuple[Tensor, Tensor]:
    """The k largest exponents (N, k), nats, in descending order, and their indices (N, k), int64."""
    values = problem.x.new_empty(problem.shape[0], k)
    indices = torch.empty(problem.shape[0], k, dtype=torch.int64, device=problem.x.device)

    def body(tile: Tile, start: int, stop: int) -> None:
        best = tile.E.topk(min(k, tile.height), dim=0)
        if tile.sees(best.values[-1] if tile.height >= k else best.values[-1] - math.inf):
            values[start:stop], indices[start:stop] = best.values.T, tile.components(best.indices).T

    _sweep(problem, body, blocks, clamp=True, single=True)
    return values, indices


def moments(
    problem: Exponents, weights: Tensor | None, assignment: str, seed: int, blocks: Truncation | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moments S0 (K,), S1 (K, D) and S2 about the components' means, and Σ g ℓ, all float64."""
    D = problem.shape[2]
    unit = 1.0
    if weights is not None:
        # Weights are divided by a power of two, so that products with weights of any size stay in range.
        unit = 2.0 ** max(-1000, min(1000, int(torch.frexp(weights.abs().amax()).exponent)))
        weights = weights / unit

    def body(tile: Tile, start: int, stop: int) -> None:
        if assignment == "soft":
            values = tile.softmax()
        elif assignment == "hard":
            values = tile.onehot()
        else:
            values = tile.draw(seed + start)
        if tile.sees(values):
            tile.add(values, None if weights is None else weights[start:stop])

    options = {"featured": True, "single": assignment == "hard"}
    workers = _sweep(problem, body, blocks, clamp=False, **options)
    total = torch.stack([tile.total for tile in workers]).sum()
    if not bool(torch.isfinite(total)):
        workers = _sweep(problem, body, blocks, clamp=True, **options)
        total = torch.stack([tile.total for tile in workers]).sum()
    sums = torch.stack([tile.sums for tile in workers]).sum(0) * unit
    S0, S1, S2 = sums[:, 0], sums[:, 1 : D + 1], sums[:, D + 1 :]
    mu = problem.means
    S2 = workers[0].shaped(S2)
    if workers[0].full:
        cross = S1[:, :, None] * mu[:, None, :]
        S2 = S2 - cross - cross.mT + S0[:, None, None] * mu[:, :, None] * mu[:, None, :]
    elif workers[0].spherical:
        S2 = S2 - 2 * (S1 * mu).sum(1) + S0 * (mu**2).sum(1)
    else:
        S2 = S2 - 2 * S1 * mu + S0[:, None] * mu**2
    S1 = S1 - S0[:, None] * mu
    for tile in workers:
        if tile.own is not None:
            own = tile.own * unit
            S0, S1, S2 = S0 + own[:, 0], S1 + own[:, 1 : D + 1], S2 + tile.shaped(own[:, D + 1 :])
    return S0, S1, S2, total * unit


def point_gradient(problem: Exponents, weights: Tensor, blocks: Truncation | None = None) -> Tensor:
    """∂(Σ g ℓ)/∂x = -g_n Σ_k r_nk U_k U_kᵀ (x_n - μ_k), (N, D) in the dtype of the points."""
    _, K, D = problem.shape
    U, mu = problem.U, problem.means
    P = U @ U.mT if problem.is_full else U**2
    linear = (P @ mu[:, :, None])[:, :, 0] if problem.is_full else P * mu
    slopes = torch.cat([linear, P.reshape(K, -1)], 1)
    gradient = torch.empty_like(problem.x)

    def body(tile: Tile, start: int, stop: int) -> None:
        if not tile.sees(tile.softmax()):
            return
        shares = tile.shares()
        pull_apart = tile.pull(shares)
        averages = tile.chosen(slopes).T @ shares
        shape = (D, D, -1) if problem.is_full else (1, slopes.shape[1] - D, -1)
        pull = averages[D:].reshape(shape)
        pulled = (pull * tile.X).sum(1) if problem.is_full else pull[0] * tile.X
        found = averages[:D] - pulled
        if pull_apart is not None:
            found = found - pull_apart
        gradient[start:stop] = (found * weights[start:stop]).T

    _sweep(problem, body, blocks, clamp=True)
    return gradient
