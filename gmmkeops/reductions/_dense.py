r"""The dense engine: cache-sized tiles of torch, on any device, and the float64 oracle.

For float32 points both halves of a sweep are one matrix product with the quadratic features
:math:`\Phi(x) = (1, x, x x^\top)` of a tile, taken in float64 about the common centre:

.. math:: E = B\,\Phi^\top, \qquad (S^0, S^1, S^2) = R\,\Phi,

with B the natural parameters of the components. In float64 the cancellation of :math:`x^\top P x - 2\mu^\top P x + \dots`
costs :math:`10^{-16} (|U| |x|)^2` nats, less than the rounding of the points themselves. For float64 points, where that
would be felt, the exponents come from whitened residuals :math:`U_k^\top x - U_k^\top \mu_k` instead. Where a tile sees so few
components that their matrices are smaller than the features, both halves do without :math:`x x^\top`. Between the two products a
tile is only ever touched by a softmax. No array of N x K numbers exists.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions._cores import on_cores
from gmmkeops.reductions._exponents import Exponents
from gmmkeops.reductions._lists import Plan
from gmmkeops.reductions._truncation import Truncation

__all__ = ["argmax", "logsumexp", "moments", "point_gradient", "topk"]

_logger = logging.getLogger("gmmkeops")

# Numbers in one tile: few enough to stay in cache with their copies, enough to outweigh the cost of a torch call
# (2 cores: 4-5e8 pairs/s at 256Ki against 1.6-1.9e8 at 32Ki, D = 2 and 3). A GPU wants long kernels.
_TILE_CPU = 262_144
_TILE_CUDA = 1 << 24
# Pairs below which starting threads costs more than they save.
_PAIRS_PER_THREAD = 500_000
# Dimensions for each component of a tile from which on its residuals cost less than the features of the points (measured in 10
# to 64 dimensions).
_FEW = 6
# What a tile costs beside its pairs, in pairs.
_PAIRS_PER_TILE = 10_000


class _Tile:
    """One worker's buffers, and the exponents of one tile at a time: some rows, and all components or a list of them."""

    def __init__(self, problem: Exponents, rows: int, pairs: int, clamp: bool, featured: bool) -> None:
        _, K, D = problem.shape
        x = problem.x
        self.problem, self.clamp, self.featured = problem, clamp, featured
        wide: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
        self.full, self.spherical = problem.is_full, problem.U.shape[1:] == (1,)
        # Spherical features carry |x|² in one column; with D = 1 every family is the diagonal one.
        products = D * (D + 1) // 2 if self.full else 1 if self.spherical else D
        self._features = torch.empty((1 + D + products) * rows, **wide)
        self._wide = torch.empty(pairs, **wide)
        self._e = torch.empty(pairs, dtype=x.dtype, device=x.device)
        self._r = torch.empty_like(self._e)
        self._truths: Tensor | None = None
        self.products: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self.width = self.height = 0
        self.floor, self.minima = -math.inf, list[float]()
        self.row, self.column = torch.triu_indices(D, D, device=x.device)
        self.sums = torch.zeros(K, 1 + D + products, **wide)
        self.total = torch.zeros((), **wide)
        self.quadratic = x.dtype == torch.float32
        # How far below a point's largest exponent others still count, nats, and what they count then.
        self.depth = 80.0 if self.quadratic else 700.0
        self.nothing = math.exp(-self.depth) * (1 + 1e-5)
        self.offsets = problem.offsets
        if self.quadratic:
            self.natural = self._natural()
        else:
            self.whitening = self._whitening()

    def _natural(self) -> Tensor:
        """B (K, P): the exponent's coefficients on 1, x and xxᵀ (upper triangle), about the centre."""
        p = self.problem
        if self.full:
            P = p.U @ p.U.mT
            linear = (P @ p.means[:, :, None])[:, :, 0]
            square = -P[:, self.row, self.column] * torch.where(self.row == self.column, 0.5, 1.0)
        else:
            P = p.U**2
            linear = P * p.means
            square = -0.5 * P
        constant = p.offsets - 0.5 * (linear * p.means).sum(1)
        return torch.cat([constant[:, None], linear, square], 1)

    def _whitening(self) -> list[tuple[Tensor, Tensor, slice]]:
        """For each whitened coordinate: its row of Uᵀ (K, D or 1), Uᵀμ (K, 1), and the columns of x it reads."""
        p = self.problem
        D = p.means.shape[1]
        if self.full:
            shift = p.U.mT @ p.means[:, :, None]
            return [(p.U[:, :, d].contiguous(), shift[:, d], slice(0, D)) for d in range(D)]
        U = p.U.expand_as(p.means)
        return [(U[:, d : d + 1].contiguous(), (U * p.means)[:, d : d + 1], slice(d, d + 1)) for d in range(D)]

    def _narrow(self, rows: int, components: int) -> None:
        """Views of the buffers for a tile of another shape than the last one's."""
        D = self.problem.means.shape[1]
        if rows != self.width:
            # Φ (P, rows): a row of ones, the points X (D, rows), then the products of their coordinates.
            P = self.sums.shape[1]
            self.F = self._features[: P * rows].view(P, rows)
            self.F[0] = 1
            self.X = self.F[1 : D + 1]
            self.products = None
        self.width, self.height = rows, components
        pairs = rows * components
        self.W = self._wide[:pairs].view(components, rows)
        self.E, self.R = self._e[:pairs].view(components, rows), self._r[:pairs].view(components, rows)

    def load(self, start: int, stop: int, index: Tensor | None = None) -> None:
        """Brings rows start:stop in, centred, with their features and their exponents ``self.E`` (components, rows)."""
        p, self.index = self.problem, index
        height = p.means.shape[0] if index is None else len(index)
        if (stop - start, height) != (self.width, self.height):
            self._narrow(stop - start, height)
        torch.sub(p.x[start:stop].T, p.centre[:, None], out=self.X)
        self.few = self.full and _FEW * self.height <= len(self.X)
        if self.few:
            self._residuals()
            return
        if self.quadratic or self.featured:
            self._multiply()
        if self.quadratic:
            torch.mm(self.chosen(self.natural), self.F, out=self.W)
            if self.clamp:
                self.W.clamp_(min=-3e38)
            self.E.copy_(self.W)
            return
        self.E.copy_(self.chosen(self.offsets)[:, None].expand_as(self.E))
        for U, shift, columns in self.whitening:
            torch.addmm(self.chosen(shift), self.chosen(U), self.X[columns], beta=-1, out=self.W)
            self.E.addcmul_(self.W, self.W, value=-0.5)
        if self.clamp:
            self.E.nan_to_num_(nan=-1e300, neginf=-1e300)

    def _multiply(self) -> None:
        """Fills the products of coordinates in."""
        D, square = len(self.X), self.F[len(self.X) + 1 :]
        if self.spherical:
            torch.sum(self.X * self.X, 0, out=self.F[-1])
            return
        if self.products is None:
            parts = square.split(list(range(D, 0, -1))) if self.full else [square]
            lefts = [self.X[d:] for d in range(D)] if self.full else [self.X]
            self.products = list(zip(lefts, self.X if self.full else lefts, parts, strict=True))
        for left, right, out in self.products:
            torch.mul(left, right, out=out)

    def _room(self) -> Tensor:
        """A buffer (components, D, rows), in the place of the products of coordinates."""
        D = len(self.X)
        return self.F[D + 1 :].view(-1)[: self.height * self.X.numel()].view(self.height, D, -1)

    def _residuals(self) -> None:
        """Fills ``self.E`` from whitened residuals, all components in one product."""
        p, y = self.problem, self._room()
        U = self.chosen(p.U).mT
        shift = U @ self.chosen(p.means)[:, :, None]
        torch.addmm(shift.reshape(-1, 1), U.reshape(-1, len(self.X)), self.X, beta=-1, out=y.flatten(0, 1))
        torch.sum(y.square_(), 1, out=self.W)
        torch.sub(self.chosen(self.offsets)[:, None], self.W, alpha=0.5, out=self.W)
        if self.clamp:
            self.W.nan_to_num_(nan=-1e300, neginf=-1e300).clamp_(min=-3e38 if self.quadratic else -1e300)
        self.E.copy_(self.W)

    def chosen(self, rows: Tensor) -> Tensor:
        """Of one row for each component, those of the components in the tile."""
        return rows if self.index is None else rows.index_select(0, self.index)

    def components(self, places: Tensor) -> Tensor:
        """The components at places in the tile."""
        return places if self.index is None else self.index[places]

    def sees(self, values: Tensor) -> bool:
        """Whether the tile's list is long enough for the values (rows,) found with it; they are remembered."""
        if self.index is None:
            return True
        least = float(values.amin())
        self.minima.append(least)
        return not least < self.floor

    def add(self, values: Tensor, weights: Tensor | None) -> None:
        """Adds the values (rows,) to the total, and the tile's responsibilities times its features to the sums."""
        self.total += values.sum() if weights is None else values @ weights
        self.W.copy_(self.R)
        if self.few:
            self._add(self.W if weights is None else self.W * weights)
            return
        features = self.F if weights is None else self.F * weights
        # Of a thin product the thin side goes first.
        sums = (features @ self.W.T).T if len(features) < self.height else self.W @ features.T
        self._keep(sums)

    def _add(self, shares: Tensor) -> None:
        """The same of few components' shares (components, rows), all in one product."""
        D, z = len(self.X), self._room()
        torch.mul(shares[:, None], self.X, out=z)
        products = (z.flatten(0, 1) @ self.X.T).view(-1, D * D).index_select(1, D * self.row + self.column)
        self._keep(torch.cat([shares @ self.F[: D + 1].T, products], 1))

    def _keep(self, sums: Tensor) -> None:
        if self.index is None:
            self.sums += sums
        else:
            self.sums.index_add_(0, self.index, sums)

    def softmax(self) -> Tensor:
        """Fills ``self.R`` with responsibilities; returns the log-sum-exps (rows,), from the largest entry of each."""
        largest = self.E.amax(0)
        # Exponentials that underflow take up to eighty times as long as others (measured); they are zero without asking.
        torch.maximum(self.E, largest - self.depth, out=self.E)
        torch.softmax(self.E, 0, out=self.R)
        torch.threshold_(self.R, self.nothing, 0.0)
        return largest - self.R.amax(0).log_()

    def onehot(self) -> Tensor:
        """Fills ``self.R`` with hard responsibilities; returns the largest exponents (rows,)."""
        best, label = self.E.max(0)
        self.R.zero_().scatter_(0, label[None], 1)
        return best

    def _below(self) -> Tensor:
        """A buffer of truth values (components, rows)."""
        if self._truths is None:
            self._truths = torch.empty(self._e.shape, dtype=torch.bool, device=self._e.device)
        return self._truths[: self.height * self.width].view(self.height, self.width)

    def draw(self, seed: int) -> Tensor:
        """Fills ``self.R`` with one drawn label per point; returns the log-sum-exps (rows,)."""
        values = self.softmax()
        generator = torch.Generator(self.E.device).manual_seed(seed)
        torch.cumsum(self.R, 0, out=self.E)
        # The first component whose cumulative share reaches a uniform number in (0, 1] has a share of its own.
        u = 1 - torch.rand(self.width, generator=generator, dtype=self.E.dtype, device=self.E.device)
        label = torch.lt(self.E, u * self.E[-1], out=self._below()).sum(0)
        self.R.zero_().scatter_(0, label[None], 1)
        return values


def _tile_rows(problem: Exponents, halvings: int = 0) -> int:
    N, K, D = problem.shape
    width = K + (D * (D + 1) // 2 if problem.is_full else D)
    size = _TILE_CUDA if problem.x.is_cuda else _TILE_CPU
    rows = max(1, min(N, max(32, size // width), 8192 if not problem.x.is_cuda else N))
    return max(min(rows, 32), rows >> halvings)


_Body = Callable[[_Tile, int, int], None]
# First row, last-plus-one row, components (None for all), least value that they may find.
_Stretch = tuple[int, int, Tensor | None, float]


def _sweep(
    problem: Exponents,
    body: _Body,
    blocks: Truncation | None = None,
    *,
    clamp: bool,
    featured: bool = False,
    single: bool = False,
) -> list[_Tile]:
    """Runs ``body`` over all tiles, on as many threads as torch has; returns the workers' tiles in order of rows.

    Args:
        problem: What is swept.
        body: Called with the loaded tile and its first and last-plus-one row. It may write or add only after
            ``tile.sees(values)`` has said that the tile's list is long enough for what it read.
        blocks: Which components the tiles may leave out; None for none.
        clamp: Keep exponents beyond the dtype's range finite.
        featured: Load features also where the exponents do without them.
        single: As in :meth:`Truncation.begin`.
    """
    for halvings in count():
        try:
            return _swept(problem, body, blocks, clamp, featured, single, halvings)
        except (MemoryError, RuntimeError) as error:
            # With less memory, smaller tiles; at thirty-two rows there is nothing left to save.
            if not _is_out_of_memory(error) or _tile_rows(problem, halvings) <= 32:
                raise
            _logger.warning("out of memory: tiles are halved")
            if problem.x.is_cuda:
                torch.cuda.empty_cache()
    raise AssertionError("halving ends")


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
) -> list[_Tile]:
    plan = None if blocks is None else blocks.begin(problem, single)
    if blocks is None or plan is None:
        N, size = problem.shape[0], _tile_rows(problem, halvings)
        tiles: list[_Stretch] = [(start, min(N, start + size), None, -math.inf) for start in range(0, N, size)]
        return _run(problem, body, tiles, clamp, featured)
    workers: list[_Tile] = []
    while plan is not None:
        plan = plan.split(2 * _TILE_CPU >> halvings)
        new = _run(problem, body, _stretches(plan, blocks.floor(problem, plan, single)), clamp, featured)
        workers += new
        minima = torch.tensor([least for tile in new for least in tile.minima], dtype=torch.float64)
        plan = blocks.again(problem, plan, minima.to(plan.dropped.device), single)
    return workers


def _stretches(plan: Plan, floors: Tensor) -> list[_Stretch]:
    """Rows, components and the least value that each tile of a plan may find."""
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
) -> list[_Tile]:
    K = problem.shape[1]
    rows = [stop - start for start, stop, _, _ in tiles]
    pairs = [n * (K if index is None else len(index)) for n, (_, _, index, _) in zip(rows, tiles, strict=True)]
    # A tile costs something whatever it holds.
    work = torch.tensor(pairs).add_(_PAIRS_PER_TILE).cumsum(0)
    threads = 1 if problem.x.is_cuda else torch.get_num_threads()
    workers = max(1, min(threads, len(tiles), sum(pairs) // _PAIRS_PER_THREAD))
    cuts = torch.searchsorted(work, torch.arange(1, workers) * (int(work[-1]) / workers)).tolist()
    cuts = [0, *cuts, len(tiles)]

    def run(worker: int) -> _Tile:
        tile = _Tile(problem, max(rows), max(pairs), clamp, featured)
        for start, stop, index, floor in tiles[cuts[worker] : cuts[worker + 1]]:
            tile.load(start, stop, index)
            tile.floor = floor
            body(tile, start, stop)
        return tile

    return on_cores(run, workers, problem.x.device)


def logsumexp(problem: Exponents, blocks: Truncation | None = None) -> Tensor:
    """ℓ (N,), nats, in the dtype of the points."""
    values = problem.x.new_empty(problem.shape[0])

    def body(tile: _Tile, start: int, stop: int) -> None:
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

    def body(tile: _Tile, start: int, stop: int) -> None:
        best = tile.E.max(0)
        if tile.sees(best.values):
            labels[start:stop] = tile.components(best.indices)

    _sweep(problem, body, blocks, clamp=True, single=True)
    return labels


def topk(problem: Exponents, k: int, blocks: Truncation | None = None) -> tuple[Tensor, Tensor]:
    """The k largest exponents (N, k), nats, in falling order, and their indices (N, k)."""
    values = problem.x.new_empty(problem.shape[0], k)
    indices = torch.empty(problem.shape[0], k, dtype=torch.int64, device=problem.x.device)

    def body(tile: _Tile, start: int, stop: int) -> None:
        best = tile.E.topk(min(k, tile.height), dim=0)
        if tile.sees(best.values[-1] if tile.height >= k else best.values[-1] - math.inf):
            values[start:stop], indices[start:stop] = best.values.T, tile.components(best.indices).T

    _sweep(problem, body, blocks, clamp=True, single=True)
    return values, indices


def moments(
    problem: Exponents, weights: Tensor | None, assignment: str, seed: int, blocks: Truncation | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S0 (K,), S1 (K, D), S2 about the components' means, and Σ g ℓ, all float64."""
    _, K, D = problem.shape

    def body(tile: _Tile, start: int, stop: int) -> None:
        if assignment == "soft":
            values = tile.softmax()
        elif assignment == "hard":
            values = tile.onehot()
        else:
            values = tile.draw(seed + start)
        if tile.sees(values):
            tile.add(values.double(), None if weights is None else weights[start:stop])

    options = {"featured": True, "single": assignment == "hard"}
    workers = _sweep(problem, body, blocks, clamp=False, **options)
    total = torch.stack([tile.total for tile in workers]).sum()
    if not bool(torch.isfinite(total)):
        workers = _sweep(problem, body, blocks, clamp=True, **options)
        total = torch.stack([tile.total for tile in workers]).sum()
    sums = torch.stack([tile.sums for tile in workers]).sum(0)
    S0, S1, S2 = sums[:, 0], sums[:, 1 : D + 1], sums[:, D + 1 :]
    mu = problem.means
    if workers[0].full:
        dense = S2.new_empty(K, D, D)
        row, column = workers[0].row, workers[0].column
        dense[:, row, column] = dense[:, column, row] = S2
        cross = S1[:, :, None] * mu[:, None, :]
        S2 = dense - cross - cross.mT + S0[:, None, None] * mu[:, :, None] * mu[:, None, :]
    elif workers[0].spherical:
        S2 = S2[:, 0] - 2 * (S1 * mu).sum(1) + S0 * (mu**2).sum(1)
    else:
        S2 = S2 - 2 * S1 * mu + S0[:, None] * mu**2
    return S0, S1 - S0[:, None] * mu, S2, total


def point_gradient(problem: Exponents, weights: Tensor, blocks: Truncation | None = None) -> Tensor:
    """∂(Σ g ℓ)/∂x = -g_n Σ_k r_nk U_k U_kᵀ (x_n - μ_k), (N, D) in the dtype of the points."""
    _, K, D = problem.shape
    U, mu = problem.U, problem.means
    P = U @ U.mT if problem.is_full else U**2
    linear = (P @ mu[:, :, None])[:, :, 0] if problem.is_full else P * mu
    slopes = torch.cat([linear, P.reshape(K, -1)], 1)
    gradient = torch.empty_like(problem.x)

    def body(tile: _Tile, start: int, stop: int) -> None:
        if not tile.sees(tile.softmax()):
            return
        averages = tile.chosen(slopes).T @ tile.W.copy_(tile.R)
        shape = (D, D, -1) if problem.is_full else (1, slopes.shape[1] - D, -1)
        pull = averages[D:].reshape(shape)
        pulled = (pull * tile.X).sum(1) if problem.is_full else pull[0] * tile.X
        gradient[start:stop] = ((averages[:D] - pulled) * weights[start:stop]).T

    _sweep(problem, body, blocks, clamp=True)
    return gradient
