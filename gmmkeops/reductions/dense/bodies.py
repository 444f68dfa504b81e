"""Operations of the dense engine on one tile, and the results from all tiles, for each request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from gmmkeops.reductions.dense.tile import Tile
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Argmax, LogSumExp, PointGradient, Request, Result, Statistics, TopK

__all__ = ["Body", "body_of"]


class Body(Protocol):
    """Operations for one request.

    Args:
        clamp: Whether exponents are clamped to the range of the dtype.
        featured: Whether features are required even if the exponents do not require them.
    """

    clamp: bool
    featured: bool

    def __call__(self, tile: Tile, start: int, stop: int) -> None:
        """Process a loaded tile of the rows from ``start`` to ``stop``.

        Results are stored only if ``tile.sees(values)`` returns True, that is, if the candidate list of the tile is long enough.
        """

    def overflowed(self, tiles: Sequence[Tile]) -> bool:
        """Return whether results of these tiles are not finite, so that exponents must be clamped."""

    def result(self, tiles: Sequence[Tile]) -> Result:
        """Return the result of the request, given the tiles of all workers in the order of their rows."""


def body_of(problem: Exponents, request: Request) -> Body:
    """Create the operations for a request."""
    match request:
        case LogSumExp():
            return _LogSumExps(problem)
        case Argmax():
            return _Labels(problem)
        case TopK():
            return _Largest(problem, request.k)
        case Statistics():
            return _Moments(problem, request)
        case PointGradient():
            return _Gradient(problem, request)


class _LogSumExps:
    clamp = featured = False

    def __init__(self, problem: Exponents) -> None:
        # Initialized by zeros, since ``overflowed`` also tests rows that have not been evaluated yet.
        self.values = problem.x.new_zeros(problem.shape[0])

    def __call__(self, tile: Tile, start: int, stop: int) -> None:
        found = tile.logsumexps()
        if tile.sees(found):
            self.values[start:stop] = found

    def overflowed(self, tiles: Sequence[Tile]) -> bool:
        return not bool(torch.isfinite(self.values).all())

    def result(self, tiles: Sequence[Tile]) -> Result:
        return (self.values,)


class _Labels:
    clamp, featured = True, False

    def __init__(self, problem: Exponents) -> None:
        self.labels = torch.empty(problem.shape[0], dtype=torch.int64, device=problem.x.device)

    def __call__(self, tile: Tile, start: int, stop: int) -> None:
        best = tile.E.max(0)
        if tile.sees(best.values):
            self.labels[start:stop] = tile.components(best.indices)

    def overflowed(self, tiles: Sequence[Tile]) -> bool:
        return False

    def result(self, tiles: Sequence[Tile]) -> Result:
        return (self.labels,)


class _Largest:
    clamp, featured = True, False

    def __init__(self, problem: Exponents, k: int) -> None:
        self.k = k
        self.values = problem.x.new_empty(problem.shape[0], k)
        self.indices = torch.empty(problem.shape[0], k, dtype=torch.int64, device=problem.x.device)

    def __call__(self, tile: Tile, start: int, stop: int) -> None:
        best = tile.E.topk(min(self.k, tile.height), dim=0)
        if tile.sees(best.values[-1] if tile.height >= self.k else best.values[-1] - math.inf):
            self.values[start:stop], self.indices[start:stop] = best.values.T, tile.components(best.indices).T

    def overflowed(self, tiles: Sequence[Tile]) -> bool:
        return False

    def result(self, tiles: Sequence[Tile]) -> Result:
        return self.values, self.indices


class _Moments:
    clamp, featured = False, True

    def __init__(self, problem: Exponents, request: Statistics) -> None:
        self.problem, self.assignment, self.seed = problem, request.assignment, request.seed
        self.unit, self.weights = 1.0, request.weights
        if self.weights is not None:
            # Weights are divided by a power of two, so that products with weights of any size stay in range.
            exponent = int(torch.frexp(self.weights.abs().amax()).exponent)
            self.unit = 2.0 ** max(-1000, min(1000, exponent))
            self.weights = self.weights / self.unit
        self.values = problem.x.new_zeros(problem.shape[0]) if request.values else None

    def __call__(self, tile: Tile, start: int, stop: int) -> None:
        weights = None if self.weights is None else self.weights[start:stop]
        if self.assignment == "soft":
            values = tile.assign(weights)
        elif self.assignment == "hard":
            values = tile.onehot()
        else:
            values = tile.draw(self.seed + start)
        if tile.sees(values):
            tile.add(values, weights)
            if self.values is not None:
                self.values[start:stop] = values

    def overflowed(self, tiles: Sequence[Tile]) -> bool:
        return not all(math.isfinite(float(tile.total)) for tile in tiles)

    def result(self, tiles: Sequence[Tile]) -> Result:
        first, mu = tiles[0], self.problem.means
        D = mu.shape[1]
        total = torch.stack([tile.total for tile in tiles]).sum()
        sums = torch.stack([tile.sums for tile in tiles]).sum(0) * self.unit
        S0, S1, S2 = sums[:, 0], sums[:, 1 : D + 1], first.shaped(sums[:, D + 1 :])
        # Convert moments about the common center to moments about the means.
        if first.full:
            cross = S1[:, :, None] * mu[:, None, :]
            S2 = S2 - cross - cross.mT + S0[:, None, None] * mu[:, :, None] * mu[:, None, :]
        elif first.spherical:
            S2 = S2 - 2 * (S1 * mu).sum(1) + S0 * (mu**2).sum(1)
        else:
            S2 = S2 - 2 * S1 * mu + S0[:, None] * mu**2
        S1 = S1 - S0[:, None] * mu
        for tile in tiles:
            if tile.own is not None:
                own = tile.own * self.unit
                S0, S1, S2 = S0 + own[:, 0], S1 + own[:, 1 : D + 1], S2 + tile.shaped(own[:, D + 1 :])
        return S0, S1, S2, total * self.unit, *(() if self.values is None else (self.values,))


class _Gradient:
    clamp, featured = True, False

    def __init__(self, problem: Exponents, request: PointGradient) -> None:
        U, mu = problem.U, problem.means
        P = U @ U.mT if problem.is_full else U**2
        linear = (P @ mu[:, :, None])[:, :, 0] if problem.is_full else P * mu
        # Coefficients (K, D + D² or D + D or D + 1) of the gradient of each exponent for 1 and x.
        self.slopes = torch.cat([linear, P.reshape(len(mu), -1)], 1)
        self.full, self.weights = problem.is_full, request.weights
        self.gradient = torch.empty_like(problem.x)
        self.values = problem.x.new_empty(problem.shape[0]) if request.values else None

    def __call__(self, tile: Tile, start: int, stop: int) -> None:
        values = tile.softmax()
        if not tile.sees(values):
            return
        if self.values is not None:
            self.values[start:stop] = values
        D = len(tile.X)
        shares = tile.shares()
        pull_apart = tile.pull(shares)
        averages = tile.chosen(self.slopes).T @ shares
        pull = averages[D:].reshape((D, D, -1) if self.full else (1, self.slopes.shape[1] - D, -1))
        found = averages[:D] - ((pull * tile.X).sum(1) if self.full else pull[0] * tile.X)
        if pull_apart is not None:
            found = found - pull_apart
        self.gradient[start:stop] = (found if self.weights is None else found * self.weights[start:stop]).T

    def overflowed(self, tiles: Sequence[Tile]) -> bool:
        return False

    def result(self, tiles: Sequence[Tile]) -> Result:
        return (self.gradient,) if self.values is None else (self.gradient, self.values)
