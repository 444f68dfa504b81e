"""Reductions by the engine that was chosen, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmmkeops._checks import as_tensor, concrete
from gmmkeops.components import Moments
from gmmkeops.reductions.choice import arrange, engine
from gmmkeops.reductions.dense import engine as _dense
from gmmkeops.reductions.derivatives import recordable
from gmmkeops.reductions.keops import engine as _keops
from gmmkeops.reductions.problem import Exponents, factor_tensor
from gmmkeops.reductions.truncation.truncation import Truncation

__all__ = ["ASSIGNMENTS"]

ASSIGNMENTS = ("soft", "hard", "stochastic")

R = TypeVar("R")

_Setup = tuple[Exponents, Truncation | None]


def _setup(x: Any, offsets: Any, means: Any, factor: Any, truncate: float | None, best: int = 0) -> _Setup:
    """The exponents, with points in kd-tree order if they are sorted, and the truncation or None.

    ``best`` is the rank of the exponent (1 for the largest) for which candidate lists must be complete; 0 for the log-sum-exp.
    """
    if not all(map(concrete, _arguments(x, offsets, means, factor))):
        raise ValueError(
            "torch.func.vmap and torch.compile support log-densities and their sums only; compute labels, largest exponents, "
            "moments and reductions of arranged points outside of them, for all points at once."
        )
    if isinstance(x, Truncation):
        problem, blocks = Exponents.of(x.cloud.points, offsets, means, factor), x
    else:
        problem = Exponents.of(x, offsets, means, factor)
        arranged = arrange(problem.x, problem.shape[1], truncate)
        if isinstance(arranged, Tensor):
            return problem, None
        problem, blocks = replace(problem, x=arranged.cloud.points), arranged
    if blocks.minima is None:
        rows = blocks.sample()
        few = problem.rows(rows.reshape(-1))
        best = min(best, problem.shape[1])
        values = _dense.topk(few, best)[0][:, -1] if best else _dense.logsumexp(few)
        blocks.suppose(values.view(rows.shape))
    return problem, blocks


def _values(problem: Exponents, blocks: Truncation | None, backend: str) -> Tensor:
    def keops() -> Tensor:
        return _planned(_keops.accurate(problem), blocks)[0].to(problem.x.dtype)

    return _run(problem, backend, lambda: _dense.logsumexp(problem, blocks), keops)


def _run(problem: Exponents, backend: str, dense: Callable[[], R], keops: Callable[[], R]) -> R:
    """Call the function of the engine chosen by :func:`engine`; if KeOps fails, call that of the dense engine."""
    if engine(problem, backend) == "keops":
        with suppress(_keops.Broken):
            return keops()
        # This call warns, since the reason is known now.
        engine(problem, backend)
    return dense()


def _planned(problem: Exponents, blocks: Truncation | None) -> tuple[Tensor, Any, Tensor]:
    """ℓ (N,) by KeOps, the schedules that were used or None, and the rows (n,) that were computed by the dense engine."""
    values, plans = _keops.logsumexp(problem, blocks)
    far = _keops.far(problem, values)
    if len(far):
        values[far] = _dense.logsumexp(problem.rows(far))
    return values, plans, far


def _largest(problem: Exponents, k: int, blocks: Truncation | None) -> tuple[Tensor, Tensor]:
    """The k largest exponents (N, k) and their components (N, k), by KeOps."""
    accurate = _keops.accurate(problem)
    values, indices = _keops.topk(accurate, k, blocks)
    far = _keops.far(accurate, values[:, 0])
    if len(far):
        values[far], indices[far] = _dense.topk(accurate.rows(far), k)
    return values.to(problem.x.dtype), indices


def _moments(
    problem: Exponents,
    blocks: Truncation | None,
    weights: Tensor | None,
    backend: str,
    assignment: str = "soft",
    seed: int = 0,
) -> Moments:
    """Moments of points and weights, both in kd-tree order if the points are sorted."""
    x = problem.x
    count = x.shape[0] if blocks is None else len(blocks.cloud.rank)
    mass = torch.tensor(float(count), dtype=torch.float64, device=x.device) if weights is None else weights.sum()
    if weights is None and len(x) > count:
        assert blocks is not None, "only a cloud repeats points"
        weights = blocks.cloud.enter(x.new_ones(count, dtype=torch.float64))

    def dense() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _dense.moments(problem, weights, assignment, seed, blocks)

    def keops() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        accurate = _keops.accurate(problem)
        values, plans, far = _planned(accurate, blocks)
        g = torch.ones_like(values, dtype=torch.float64) if weights is None else weights
        total = (values.double() * g).sum()
        values[far] = _keops.NO_SHARE
        S0, S1, S2 = _keops.moments(accurate, values, g, plans)
        S2 = S2.sum(1) if accurate.U.shape[1:] == (1,) and x.shape[1] > 1 else S2
        if len(far):
            rest = _dense.moments(accurate.rows(far), g[far], "soft", 0)
            S0, S1, S2 = S0 + rest[0], S1 + rest[1], S2 + rest[2].reshape(S2.shape)
        return S0, S1, S2, total

    S0, S1, S2, total = _run(problem, backend if assignment == "soft" else "dense", dense, keops)
    if problem.U.shape[1:] == (1,):
        S2 = S2.reshape(-1)
    return Moments(S0, S1, S2, problem.means + problem.centre, total, mass)


def _parameter_gradients(U: Tensor, sums: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ g ℓ in the offsets (K,), means (K, D) and U (K, ...), float64."""
    if U.ndim == 3:
        return sums.S0, (U @ (U.mT @ sums.S1[:, :, None]))[:, :, 0], -sums.S2 @ U
    return sums.S0, U**2 * sums.S1, -sums.S2.reshape(U.shape) * U


def _point_gradient(problem: Exponents, blocks: Truncation | None, weights: Tensor, backend: str) -> Tensor:

    def keops() -> Tensor:
        accurate = _keops.accurate(problem)
        values, plans, far = _planned(accurate, blocks)
        values[far] = _keops.NO_SHARE
        gradient = _keops.point_gradient(accurate, values, weights, plans)
        if len(far):
            gradient[far] = _dense.point_gradient(accurate.rows(far), weights[far])
        return gradient.to(problem.x.dtype)

    return _run(problem, backend, lambda: _dense.point_gradient(problem, weights, blocks), keops)


def _arguments(x: Any, offsets: Any, means: Any, factor: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points (sorted ones in kd-tree order), offsets, means and factors as tensors."""
    points = x.cloud.points if isinstance(x, Truncation) else as_tensor(x, name="x")
    named = {"offsets": offsets, "means": means, "factor": factor_tensor(factor)}
    found = [points, *(as_tensor(value, name=name, abstract=True) for name, value in named.items())]
    points, offsets, means, U = map(recordable, found)
    return points, offsets, means, U


@dataclass
class _Sweep:
    """Engine of one call, with the interface that :mod:`gmmkeops.reductions.derivatives` needs.

    Args:
        blocks: The sorted points that the user passed, or None.
        backend, truncate: As for :func:`logsumexp`.
        setup: The exponents and their truncation, after they have been computed.
    """

    blocks: Truncation | None
    backend: str
    truncate: float | None
    setup: _Setup | None = None

    def anew(self) -> _Sweep:
        return replace(self, setup=None)

    def unordered(self, x: Tensor) -> Tensor:
        return x if self.blocks is None else self.blocks.cloud.leave(x)

    def _problem(self, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor) -> _Setup:
        if self.setup is None:
            points = x if self.blocks is None else self.blocks
            self.setup = _setup(points, offsets, means, U, self.truncate)
        return self.setup

    def values(self, *arguments: Tensor) -> Tensor:
        problem, blocks = self._problem(*arguments)
        values = _values(problem, blocks, self.backend)
        return values if blocks is None else blocks.cloud.leave(values)

    def total(
        self, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        problem, blocks = self._problem(x, offsets, means, U)
        weights = weights if weights is None or blocks is None else blocks.cloud.enter(weights)
        sums = _moments(problem, blocks, weights, self.backend)
        return sums.total.clone(), _parameter_gradients(problem.U, sums)

    def parameter_gradients(self, g: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem, blocks = self._problem(*arguments)
        g = g if blocks is None else blocks.cloud.enter(g)
        return _parameter_gradients(problem.U, _moments(problem, blocks, g, self.backend))

    def point_gradient(self, g: Tensor, *arguments: Tensor) -> Tensor:
        problem, blocks = self._problem(*arguments)
        g = g if blocks is None else blocks.cloud.enter(g)
        gradient = _point_gradient(problem, blocks, g, self.backend)
        return gradient if blocks is None else blocks.cloud.leave(gradient)
