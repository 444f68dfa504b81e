r"""The dense engine: cache-sized tiles of torch, on any device, and the float64 oracle.

For float32 points both halves of a sweep are one matrix product with the quadratic features
:math:`\Phi(x) = (1, x, x x^\top)` of a tile, taken in float64 about the common centre:

.. math:: E = B\,\Phi^\top, \qquad (S^0, S^1, S^2) = R\,\Phi,

with B the natural parameters of the components. In float64 the cancellation of :math:`x^\top P x - 2\mu^\top P x + \dots`
costs :math:`10^{-16} (|U| |x|)^2` nats, less than the rounding of the points themselves. For float64 points, where that
would be felt, the exponents come from whitened residuals :math:`U_k^\top x - U_k^\top \mu_k` instead. Between the two
products a tile is only ever touched by a softmax. No array of N x K numbers exists.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions._exponents import Exponents

__all__ = ["argmax", "logsumexp", "moments", "point_gradient", "topk"]

# Numbers in one tile: few enough to stay in cache with their copies, enough to outweigh the cost of a torch call
# (2 cores: 4-5e8 pairs/s at 256Ki against 1.6-1.9e8 at 32Ki, D = 2 and 3). A GPU wants long kernels.
_TILE_CPU = 262_144
_TILE_CUDA = 1 << 24
# Pairs below which starting threads costs more than they save.
_PAIRS_PER_THREAD = 500_000


class _Tile:
    """One worker's buffers, and the exponents of one tile of rows at a time."""

    def __init__(self, problem: Exponents, rows: int, clamp: bool, featured: bool) -> None:
        _, K, D = problem.shape
        x = problem.x
        self.problem, self.clamp, self.featured = problem, clamp, featured
        wide: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
        self.full, self.spherical = problem.is_full, problem.U.shape[1:] == (1,)
        # Spherical features carry |x|² in one column; with D = 1 every family is the diagonal one.
        pairs = D * (D + 1) // 2 if self.full else 1 if self.spherical else D
        self._features = torch.empty(1 + D + pairs, rows, **wide)
        self._wide = torch.empty(K * rows, **wide)
        self._e = torch.empty(K * rows, dtype=x.dtype, device=x.device)
        self._r = torch.empty_like(self._e)
        self.width = 0
        self.row, self.column = torch.triu_indices(D, D, device=x.device)
        self.sums = torch.zeros(1 + D + pairs, K, **wide)
        self.total = torch.zeros((), **wide)
        self.quadratic = x.dtype == torch.float32
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

    def _narrow(self, n: int) -> None:
        """Views of the buffers for n rows; the last tile may be short, all others share theirs."""
        K, D = self.problem.means.shape
        self.width = n
        # Φ (P, n): a row of ones, the points X (D, n), then the products of their coordinates.
        self.F = self._features[:, :n]
        self.F[0] = 1
        self.X, square = self.F[1 : D + 1], self.F[D + 1 :]
        self.W = self._wide[: K * n].view(K, n)
        self.E, self.R = self._e[: K * n].view(K, n), self._r[: K * n].view(K, n)
        if self.full:
            starts = [d * D - d * (d - 1) // 2 for d in range(D)]
            self.products = [(self.X[d:], self.X[d], square[s : s + D - d]) for d, s in enumerate(starts)]
        else:
            self.products = [] if self.spherical else [(self.X, self.X, square)]

    def load(self, start: int, stop: int) -> None:
        """Brings rows start:stop in, centred, and computes their features and exponents ``self.E`` (K, rows)."""
        p = self.problem
        if stop - start != self.width:
            self._narrow(stop - start)
        torch.sub(p.x[start:stop].T, p.centre[:, None], out=self.X)
        if self.quadratic or self.featured:
            for left, right, out in self.products:
                torch.mul(left, right, out=out)
            if self.spherical:
                torch.sum(self.X * self.X, 0, out=self.F[-1])
        if self.quadratic:
            torch.mm(self.natural, self.F, out=self.W)
            if self.clamp:
                self.W.clamp_(min=-3e38)
            self.E.copy_(self.W)
            return
        self.E.copy_(p.offsets[:, None].expand_as(self.E))
        for U, shift, columns in self.whitening:
            torch.addmm(shift, U, self.X[columns], beta=-1, out=self.W)
            self.E.addcmul_(self.W, self.W, value=-0.5)
        if self.clamp:
            self.E.nan_to_num_(nan=-1e300, neginf=-1e300)

    def softmax(self) -> Tensor:
        """Fills ``self.R`` with responsibilities; returns the log-sum-exps (rows,), from the largest entry of each."""
        torch.softmax(self.E, 0, out=self.R)
        return self.E.amax(0) - self.R.amax(0).log_()

    def onehot(self) -> Tensor:
        """Fills ``self.R`` with hard responsibilities; returns the largest exponents (rows,)."""
        best, label = self.E.max(0)
        self.R.zero_().scatter_(0, label[None], 1)
        return best

    def draw(self, seed: int) -> Tensor:
        """Fills ``self.R`` with one drawn label per point; returns the log-sum-exps (rows,)."""
        values = self.softmax()
        generator = torch.Generator(self.E.device).manual_seed(seed)
        # The largest of e - log(Exponential) is a draw from softmax(e) (Gumbel's trick).
        label = self.E.sub_(self.R.exponential_(generator=generator).log_()).argmax(0)
        self.R.zero_().scatter_(0, label[None], 1)
        return values


def _tile_rows(problem: Exponents) -> int:
    N, K, D = problem.shape
    width = K + (D * (D + 1) // 2 if problem.is_full else D)
    size = _TILE_CUDA if problem.x.is_cuda else _TILE_CPU
    return max(1, min(N, max(32, size // width), 8192 if not problem.x.is_cuda else N))


def _sweep(
    problem: Exponents, body: Callable[[_Tile, int, int], None], *, clamp: bool, featured: bool = False
) -> list[_Tile]:
    """Runs ``body`` over all tiles, on as many threads as torch has; returns the workers' tiles in order of rows.

    ``clamp`` keeps exponents beyond the dtype's range finite; ``featured`` asks for the features where exponents do
    without them.
    """
    N, K, _ = problem.shape
    rows = _tile_rows(problem)
    tiles = -(-N // rows)
    threads = 1 if problem.x.is_cuda else torch.get_num_threads()
    workers = max(1, min(threads, tiles, N * K // _PAIRS_PER_THREAD))
    per_worker = -(-tiles // workers)

    def work(worker: int) -> _Tile:
        with torch.no_grad():
            tile = _Tile(problem, rows, clamp, featured)
            for index in range(worker * per_worker, min(tiles, (worker + 1) * per_worker)):
                start, stop = index * rows, min(N, (index + 1) * rows)
                tile.load(start, stop)
                body(tile, start, stop)
        return tile

    if problem.x.is_cuda:
        return [work(0)]

    def on_one_core(worker: int) -> _Tile:
        torch.set_num_threads(1)
        return work(worker)

    # Each tile stays on one core: threads inside a torch call would wait for each other at its end, which on a busy
    # machine takes longer than the call (measured: 30x on a small fit).
    try:
        if workers == 1:
            return [on_one_core(0)]
        with ThreadPoolExecutor(workers, thread_name_prefix="gmmkeops") as pool:
            return list(pool.map(on_one_core, range(workers)))
    finally:
        # Torch hands the last setting to new threads, and part of it to all: it is restored once nobody works.
        torch.set_num_threads(threads)


def logsumexp(problem: Exponents) -> Tensor:
    """ℓ (N,), nats, in the dtype of the points."""
    values = problem.x.new_empty(problem.shape[0])

    def body(tile: _Tile, start: int, stop: int) -> None:
        values[start:stop] = tile.softmax()

    _sweep(problem, body, clamp=False)
    if not bool(torch.isfinite(values).all()):
        _sweep(problem, body, clamp=True)
    return values


def argmax(problem: Exponents) -> Tensor:
    """Index of the largest exponent (N,), int64."""
    labels = torch.empty(problem.shape[0], dtype=torch.int64, device=problem.x.device)

    def body(tile: _Tile, start: int, stop: int) -> None:
        torch.argmax(tile.E, 0, out=labels[start:stop])

    _sweep(problem, body, clamp=True)
    return labels


def topk(problem: Exponents, k: int) -> tuple[Tensor, Tensor]:
    """The k largest exponents (N, k), nats, in falling order, and their indices (N, k)."""
    values = problem.x.new_empty(problem.shape[0], k)
    indices = torch.empty(problem.shape[0], k, dtype=torch.int64, device=problem.x.device)

    def body(tile: _Tile, start: int, stop: int) -> None:
        best = tile.E.topk(k, dim=0)
        values[start:stop], indices[start:stop] = best.values.T, best.indices.T

    _sweep(problem, body, clamp=True)
    return values, indices


def moments(
    problem: Exponents, weights: Tensor | None, assignment: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S0 (K,), S1 (K, D), S2 about the components' means, and Σ g ℓ, all float64."""
    _, K, D = problem.shape

    def body(tile: _Tile, start: int, stop: int) -> None:
        if assignment == "soft":
            values = tile.softmax().double()
        elif assignment == "hard":
            values = tile.onehot().double()
        else:
            values = tile.draw(seed + start).double()
        tile.W.copy_(tile.R)
        if weights is None:
            tile.sums.addmm_(tile.F, tile.W.T)
            tile.total += values.sum()
        else:
            g = weights[start:stop]
            tile.sums.addmm_(tile.F * g, tile.W.T)
            tile.total += values @ g

    workers = _sweep(problem, body, clamp=False, featured=True)
    total = torch.stack([tile.total for tile in workers]).sum()
    if not bool(torch.isfinite(total)):
        workers = _sweep(problem, body, clamp=True, featured=True)
        total = torch.stack([tile.total for tile in workers]).sum()
    sums = torch.stack([tile.sums for tile in workers]).sum(0)
    S0, S1, S2 = sums[0], sums[1 : D + 1].T, sums[D + 1 :]
    mu = problem.means
    if workers[0].full:
        dense = S2.new_empty(K, D, D)
        row, column = workers[0].row, workers[0].column
        dense[:, row, column] = dense[:, column, row] = S2.T
        cross = S1[:, :, None] * mu[:, None, :]
        S2 = dense - cross - cross.mT + S0[:, None, None] * mu[:, :, None] * mu[:, None, :]
    elif workers[0].spherical:
        S2 = S2[0] - 2 * (S1 * mu).sum(1) + S0 * (mu**2).sum(1)
    else:
        S2 = S2.T - 2 * S1 * mu + S0[:, None] * mu**2
    return S0, S1 - S0[:, None] * mu, S2, total


def point_gradient(problem: Exponents, weights: Tensor) -> Tensor:
    """∂(Σ g ℓ)/∂x = -g_n Σ_k r_nk U_k U_kᵀ (x_n - μ_k), (N, D) in the dtype of the points."""
    _, K, D = problem.shape
    U, mu = problem.U, problem.means
    P = U @ U.mT if problem.is_full else U**2
    linear = (P @ mu[:, :, None])[:, :, 0] if problem.is_full else P * mu
    slopes = torch.cat([linear, P.reshape(K, -1)], 1).T.contiguous()
    gradient = torch.empty_like(problem.x)

    def body(tile: _Tile, start: int, stop: int) -> None:
        tile.softmax()
        averages = slopes @ tile.W.copy_(tile.R)
        shape = (D, D, -1) if problem.is_full else (1, slopes.shape[0] - D, -1)
        pull = averages[D:].reshape(shape)
        pulled = (pull * tile.X).sum(1) if problem.is_full else pull[0] * tile.X
        gradient[start:stop] = ((averages[:D] - pulled) * weights[start:stop]).T

    _sweep(problem, body, clamp=True)
    return gradient
