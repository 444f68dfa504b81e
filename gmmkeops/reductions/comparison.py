"""Comparison of a compiled engine with the dense one in float64, at its first use on a device and for a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import (
    Argmax,
    Broken,
    Evaluation,
    LogSumExp,
    PointGradient,
    Request,
    Result,
    Statistics,
    TopK,
)
from gmmkeops.reductions.truncation.passes import evaluate

__all__ = ["Comparison"]

# Number of points that are compared; fewer, but at least 16, if the product of points and entries of the factors would be large.
_POINTS, _LEAST, _WORK = 256, 16, 1 << 25

# Largest errors for each dtype of the points: of log-densities relative to max(1, |value|), of sums and gradients relative to the
# largest one.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}

_NAMES = {
    LogSumExp: "the log-sum-exps",
    TopK: "the largest exponents",
    Statistics: "the moments",
    PointGradient: "the gradients of the points",
}


# Ratio of second moments and squared coordinates below which they may be rounding errors.
_ROUNDING = 1e-3

# Least scale, so that results that are all zero can be compared.
_TINY = 1e-300


class Comparison:
    """Comparisons of an engine with the dense engine, each of which is made once.

    Args:
        begin: Function that begins an evaluation by the engine.

    Attributes:
        failure: What was found to be wrong, one clause; None if all results were right.
    """

    def __init__(self, begin: Callable[[Exponents, Request], Evaluation]) -> None:
        self._begin = begin
        self._done: set[tuple[object, ...]] = set()
        self.failure: str | None = None

    def once(self, problem: Exponents, request: Request, form: str = "") -> None:
        """Compare the results of a request for some of the points, if that has not been done for such a problem and request.

        All pairs of these points and all components are evaluated, without weights. ``form`` names the formulas that the engine
        uses for all pairs of this problem, if it has several.

        Raises:
            Broken: The results differ by more than rounding errors.
        """
        x, same = problem.x, _without_chance(request)
        key = x.device, x.dtype, problem.is_full, problem.width, x.shape[1], same, form
        if key in self._done or not len(x):
            return
        count = min(_POINTS, len(x), max(_LEAST, _WORK // problem.entries))
        few = problem.rows(torch.arange(count, device=x.device) * len(x) // count)
        evaluation = self._begin(few, same)
        evaluation.add(None)
        expected = evaluate(dense, replace(few, x=few.x.double()), same)
        sizes = float(problem.U.abs().amax()), float((few.x.double() - few.center).abs().amax())
        error = _error(same, evaluation.result(), expected, *sizes)
        self._done.add(key)
        if not error <= _TOLERANCE[x.dtype]:
            found = f"a relative error of {error:.1g} in {_NAMES[type(same)]}"
            self.failure = f"a check of {count} points at its first use found {found}"
            raise Broken(self.failure)


def _without_chance(request: Request) -> Request:
    """Return a request by the same formula, whose result depends neither on random numbers nor on ties nor on weights."""
    match request:
        case Argmax() | Statistics(assignment="hard"):
            return TopK(1)
        case Statistics(assignment="soft"):
            return Statistics()
        case PointGradient():
            return PointGradient()
        case TopK():
            return request
        case _:
            return LogSumExp()


def _error(request: Request, own: Result, expected: Result, steepest: float, farthest: float) -> float:
    """Compute the largest relative error of the results of a request; NaN if a result is.

    ``steepest`` is the largest entry of the factors, by which the terms of a gradient are of about this size also where they
    cancel. ``farthest`` is the largest coordinate of a point, relative to the center of the means: residuals of points that are
    equal to means are rounding errors of it.
    """
    if isinstance(request, Statistics):
        S0, S1, S2 = expected[:3]
        # S1, about the means, may be much smaller than its terms.
        first = S0.abs().amax()
        second = S2.abs().amax().clamp(min=_ROUNDING * float(first) * farthest * farthest)
        scales = first, (first * second).sqrt(), second
        pairs = zip(own[:3], (S0, S1, S2), scales, strict=True)
        return max(float((a - b).abs().amax() / scale.clamp(min=_TINY)) for a, b, scale in pairs)
    # Numbers beyond the range of the dtype are infinite in both.
    values = expected[0].to(own[0].dtype)
    error = torch.where(own[0] == values, 0.0, (own[0] - values).double().abs())
    if isinstance(request, PointGradient):
        return float(error.amax() / values.abs().amax().double().clamp(min=max(steepest, _TINY)))
    return float((error / values.double().abs().clamp(min=1)).amax())
