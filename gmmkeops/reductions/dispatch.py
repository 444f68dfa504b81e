"""Computation of requests by the chosen engine, for the public functions and their derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_fraction
from gmmkeops.components import Moments, as_tensor, concrete, transferred
from gmmkeops.data import Batch
from gmmkeops.reductions.arrangement import sorted_points
from gmmkeops.reductions.choice import choose
from gmmkeops.reductions.cores import alone
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.derivatives import recordable
from gmmkeops.reductions.problem import Exponents, factor_tensor
from gmmkeops.reductions.protocol import (
    Broken,
    Continued,
    Evaluation,
    LogSumExp,
    PointGradient,
    Request,
    Result,
    Statistics,
    TopK,
)
from gmmkeops.reductions.truncation.passes import evaluate
from gmmkeops.reductions.truncation.truncation import Truncation

__all__ = ["ASSIGNMENTS", "Dispatch", "as_arguments", "compute", "parameter_gradients", "setup", "statistics"]

ASSIGNMENTS = ("soft", "hard", "stochastic")

# Largest number of entries of the factors whose gradients are computed on the CPU for points on a GPU. On one core, products of
# 1000 full factors in 16 dimensions take milliseconds.
_FEW = 50_000

_Setup = tuple[Exponents, Truncation | None]


def setup(x: Any, offsets: Any, means: Any, factor: Any, truncate: float | None, rank: int = 0) -> _Setup:
    """Validate arguments; return the exponents, with points in kd-tree order if they are sorted, and the truncation or None.

    ``rank`` is the rank of the exponents for which candidate lists must be complete (1 for the largest one), or 0 for the
    log-sum-exp.
    """
    given = as_arguments(x, offsets, means, factor)
    if not all(map(concrete, given)):
        raise ValueError(
            "torch.func.vmap and torch.compile support only logsumexp and total of points that are not arranged; compute argmax, "
            "topk, moments and reductions of arranged points outside of them, for all points at once."
        )
    points = x.points if isinstance(x, Batch) else x
    if isinstance(points, Truncation):
        problem = Exponents.of(Batch(points.cloud.points), *given[1:])
        return problem, _bounded(problem, points, rank)
    return arranged(Exponents.of(x, *given[1:]), truncate, rank)


def arranged(problem: Exponents, truncate: float | None, rank: int = 0) -> _Setup:
    """Sort the points of validated exponents if that saves time; results and ``rank`` as for :func:`setup`."""
    found = sorted_points(problem.x, problem.shape[1], as_fraction(truncate, "truncate"))
    if isinstance(found, Tensor):
        return problem, None
    problem = replace(problem, x=found.cloud.points)
    return problem, _bounded(problem, found, rank)


def _bounded(problem: Exponents, blocks: Truncation, rank: int) -> Truncation:
    """Set the initial bounds of a truncation that has not been evaluated before."""
    if blocks.minima is None:
        rows = blocks.sample()
        few = problem.rows(rows.reshape(-1))
        request: Request = TopK(min(rank, problem.shape[1])) if rank > 0 else LogSumExp()
        values = evaluate(dense, few, request)[0].view(len(few.x), -1)[:, -1]
        blocks.set_initial_bounds(values.view(rows.shape))
    return blocks


def evaluated(problem: Exponents, request: Request, backend: str, truncate: float | None) -> Result:
    """Compute a request for each point of validated exponents, in the order of the points."""
    problem, blocks = arranged(problem, truncate, request.rank)
    found = compute(problem, blocks, request, backend)
    return found if blocks is None else tuple(blocks.cloud.leave(part) for part in found)


def compute(
    problem: Exponents,
    blocks: Truncation | None,
    request: Request,
    backend: str,
    instead: Request | None = None,
    evaluations: list[Evaluation] | None = None,
) -> Result:
    """Compute a request by the chosen engine, or by the dense one if that fails.

    An engine that computes log-sum-exps together with moments or point gradients in one pass computes the request ``instead``.
    A completed evaluation is appended to ``evaluations`` if that is a list.
    """
    try:
        engine = choose(problem, request, backend)
        wanted = instead if instead is not None and engine.one_pass else request
        return evaluate(engine, problem, wanted, blocks, evaluations)
    except Broken:
        pass
    # The engine is unavailable from now on, so that ``choose`` returns another one and issues a warning.
    return evaluate(choose(problem, request, backend), problem, request, blocks)


def statistics(
    problem: Exponents,
    blocks: Truncation | None,
    weights: Tensor | None,
    backend: str,
    assignment: str = "soft",
    seed: int = 0,
    device: torch.device | None = None,
    mass: float | None = None,
    evaluation: Continued | None = None,
) -> Moments:
    """Compute the moments for points and weights, both in kd-tree order if the points are sorted.

    The result is on ``device``, or on that of the points if it is None. ``mass`` is the total weight if it is known, or NaN if it
    is not needed. ``evaluation`` is one of the log-sum-exps of the same problem, from which they are computed if that is faster.
    """
    x, host = problem.x, problem.host
    device = device or x.device
    count = x.shape[0] if blocks is None else len(blocks.cloud.rank)
    mass = float(count) if weights is None else mass
    if weights is not None and mass is None:
        weight = weights.sum()
    else:
        assert mass is not None, "it is the number of points without weights"
        weight = torch.full((), mass, dtype=torch.float64, device=device)
    if weights is None and len(x) > count:
        assert blocks is not None, "only a cloud repeats points"
        weights = blocks.cloud.ones

    # Sums that the library converts on the CPU, and copies back, take less time than many operations on the device.
    away = x.device.type != "cpu" and (device.type == "cpu" or host is not None)
    request = Statistics(weights, assignment, seed, on_cpu=away)
    found = None if evaluation is None else _continued(evaluation, request)
    S0, S1, S2, total = found or compute(problem, blocks, request, backend)
    given = host if host is not None and host.means.device in (device, S0.device) else problem
    return Moments(S0, S1, S2, given.means + given.center, total, weight).to(device)


def _continued(evaluation: Continued, request: Statistics) -> Result | None:
    """Compute moments from an evaluation of the log-sum-exps; None if that would take longer, or if its engine fails."""
    try:
        return evaluation.moments(request)
    except Broken:
        return None


def _total(
    problem: Exponents,
    blocks: Truncation | None,
    weights: Tensor | None,
    backend: str,
    evaluation: Continued | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Compute Σ g ℓ and its gradients with respect to offsets, means and U, on the device of the points.

    The gradients of few parameters are computed on the CPU if there is a copy there, and copied to the device together.
    """
    given = problem if problem.host is None or problem.entries > _FEW else problem.host
    sums = statistics(
        problem, blocks, weights, backend, device=given.means.device, mass=math.nan, evaluation=evaluation
    )
    total, *gradients = transferred(
        [sums.total, *parameter_gradients(given.U, sums.S0, sums.S1, sums.S2)], problem.x.device
    )
    return total.clone(), (gradients[0], gradients[1], gradients[2])


def parameter_gradients(
    U: Tensor, S0: Tensor, S1: Tensor, S2: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``scale`` times the gradients of Σ g ℓ with respect to offsets (K,), means (K, D) and U (K, ...), float64."""
    if scale != 1:
        S0, S1 = scale * S0, scale * S1
    if U.ndim == 3:
        return S0, U.bmm(U.mT.bmm(S1.unsqueeze(-1))).squeeze(-1), torch.baddbmm(S2, S2, U, beta=0, alpha=-scale)
    return S0, U**2 * S1, -scale * S2.reshape(U.shape) * U


def as_arguments(x: Any, offsets: Any, means: Any, factor: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convert points (sorted ones in kd-tree order), offsets, means and factors to tensors."""
    x = x.points if isinstance(x, Batch) else x
    points = x.cloud.points if isinstance(x, Truncation) else as_tensor(x, name="x")
    named = {"offsets": offsets, "means": means, "factor": factor_tensor(factor)}
    found = [points, *(as_tensor(value, name=name, abstract=True) for name, value in named.items())]
    points, offsets, means, U = map(recordable, found)
    return points, offsets, means, U


@dataclass
class Dispatch:
    """Requests of one call, with the interface that :mod:`gmmkeops.reductions.derivatives` requires.

    Args:
        blocks: The sorted points that the user passed, or None.
        backend, truncate: As for :func:`logsumexp`.
        valid: Whether the points have been validated.
        setup: Cached result of :func:`setup`, or None.
        fused: Whether gradients with respect to the parameters will probably follow the log-sum-exps.
        pointwise: Whether only gradients with respect to the points will probably follow.
        sums: Moments for weights of one, S0, S1 and S2, if they were computed together with the log-sum-exps.
        slopes: Gradients (N, D) of the log-sum-exps with respect to the points, if they were.
        evaluation: The evaluation of the log-sum-exps, if moments take less time from it, until they have been computed.
    """

    blocks: Truncation | None
    backend: str
    truncate: float | None
    valid: bool = False
    setup: _Setup | None = None
    fused: bool = False
    pointwise: bool = False
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    slopes: Tensor | None = None
    evaluation: Continued | None = None

    @classmethod
    def of(cls, x: Any, backend: str, truncate: float | None) -> Dispatch:
        """The requests for points as a public function takes them; those of a batch have been validated."""
        return cls(x if isinstance(x, Truncation) else None, backend, truncate, isinstance(x, Batch))

    def anew(self) -> Dispatch:
        return replace(self, setup=None, sums=None, slopes=None, evaluation=None)

    def unordered(self, x: Tensor) -> Tensor:
        return x if self.blocks is None else self.blocks.cloud.leave(x)

    def _problem(self, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor) -> _Setup:
        if self.setup is None:
            points = self.blocks if self.blocks is not None else Batch(x) if self.valid else x
            self.setup = setup(points, offsets, means, U, self.truncate)
        return self.setup

    def values(self, *arguments: Tensor) -> Tensor:
        with alone(arguments[0]):
            problem, blocks = self._problem(*arguments)
            instead: Request | None = None
            if blocks is None and (self.fused or self.pointwise):
                instead = Statistics(values=True) if self.fused else PointGradient(values=True)
            made: list[Evaluation] = []
            *more, values = compute(problem, blocks, LogSumExp(), self.backend, instead, made if self.fused else None)
        # There is none if the engine has failed.
        own = made[0] if made and not more else None
        self.evaluation = own if isinstance(own, Continued) and own.is_small else None
        self.sums = (more[0], more[1], more[2]) if len(more) > 1 else None
        self.slopes = more[0] if len(more) == 1 else None
        return values if blocks is None else blocks.cloud.leave(values)

    def total(
        self, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        with alone(x):
            problem, blocks = self._problem(x, offsets, means, U)
            weights = weights if weights is None or blocks is None else blocks.cloud.enter(weights)
            return _total(problem, blocks, weights, self.backend)

    def parameter_gradients(self, g: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with alone(arguments[0]):
            problem, blocks = self._problem(*arguments)
            g = g.double() if blocks is None else blocks.cloud.enter(g.double())
            # The graph may live longer than its gradients are needed.
            evaluation, self.evaluation = self.evaluation, None
            return _total(problem, blocks, g, self.backend, evaluation)[1]

    def known(self, g: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.sums is None or not len(g) or not concrete(g):
            return None
        least, most = (bound.item() for bound in g.detach().aminmax())
        return parameter_gradients(self._problem(*arguments)[0].U, *self.sums, scale=most) if least == most else None

    def point_gradient(self, g: Tensor, *arguments: Tensor) -> Tensor:
        if self.slopes is not None and concrete(g):
            single = g.to(self.slopes.dtype)
            # Weights beyond the range of float32 may have products within it.
            g = single if bool(single.sum().isfinite()) else g
            return g.unsqueeze(1).mul(self.slopes).to(self.slopes.dtype)
        with alone(arguments[0]):
            problem, blocks = self._problem(*arguments)
            g = g.double() if blocks is None else blocks.cloud.enter(g.double())
            (gradient,) = compute(problem, blocks, PointGradient(g), self.backend)
        return gradient if blocks is None else blocks.cloud.leave(gradient)
