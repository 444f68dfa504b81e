"""Comparison of a compiled engine with the dense one in float64, at its first use on a device and for a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops.reductions.accuracy import DEEPEST
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

# Largest errors for each dtype of the points: of log-densities relative to their size and to their distance from the largest
# offset, of sums and gradients relative to the largest one.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}

# Sizes for each dtype above which numbers are equal: the dense engine limits exponents to -3e38 or -1e300, others to -inf.
_LARGEST = {torch.float32: 2.9e38, torch.float64: 1e299}

# Largest value for each dtype of half the squared whitened residual of points that are compared, less its mean D / 2.
_DEPTH = {torch.float32: DEEPEST, torch.float64: _LARGEST[torch.float64]}

_NAMES = {
    LogSumExp: "the log-sum-exps",
    TopK: "the largest exponents",
    Statistics: "the moments",
    PointGradient: "the gradients of the points",
}


# Ratio of second moments and squared coordinates below which they may be rounding errors.
_ROUNDING = 1e-3

# Largest number of calls without a comparison after one whose points were all far.
_MOST = 64

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
        # Calls for which no comparison is tried since all points were far, and the number of them after the next one.
        self._pauses: dict[tuple[object, ...], tuple[int, int]] = {}
        self.failure: str | None = None

    def once(self, problem: Exponents, request: Request, form: str = "") -> bool:
        """Compare the results of a request for some of the points, if that has not been done for such a problem and request.

        All pairs of these points and all components are evaluated, without weights. Points that are far from all components are
        left out, since the dense engine may evaluate them instead, and since their moments would be much larger than those of
        other points. If all of these points are far, one of the next problems is compared. ``form`` names the formulas that the
        engine uses for all pairs of this problem, if it has several.

        Returns:
            Whether results for such a problem and request have been compared, now or before.

        Raises:
            Broken: The results differ by more than rounding errors.
        """
        x, same = problem.x, _without_chance(request)
        key = x.device, x.dtype, problem.is_full, problem.width, x.shape[1], same, form
        if key in self._done or not len(x):
            return key in self._done
        pause, following = self._pauses.get(key, (0, 0))
        if pause:
            self._pauses[key] = pause - 1, following
            return False
        count = min(_POINTS, len(x), max(_LEAST, _WORK // problem.entries))
        few, squares = _near(problem.rows(torch.arange(count, device=x.device) * len(x) // count))
        if not len(few.x):
            self._pauses[key] = following, min(max(1, 2 * following), _MOST)
            return False
        evaluation = self._begin(few, same)
        evaluation.add(None)
        expected = evaluate(dense, replace(few, x=few.x.double()), same)
        error = _error(few, same, evaluation.result(), expected, squares)
        self._done.add(key)
        if not error <= _TOLERANCE[x.dtype]:
            found = f"a relative error of {error:.1g} in {_NAMES[type(same)]}"
            self.failure = f"a check of {len(few.x)} points at its first use found {found}"
            raise Broken(self.failure)
        return True


def _near(problem: Exponents) -> tuple[Exponents, Tensor]:
    """Select the points that are not far from the component of their largest exponent; return half their squares (n,), too."""
    best, label = evaluate(dense, replace(problem, x=problem.x.double()), TopK(1))
    squares = problem.offsets[label[:, 0]] - best[:, 0]
    near = (squares <= _DEPTH[problem.x.dtype] + 0.5 * problem.shape[2]).nonzero()[:, 0]
    return problem.rows(near), squares[near]


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


def _error(problem: Exponents, request: Request, own: Result, expected: Result, squares: Tensor) -> float:
    """Compute the largest relative error of the results of a request; NaN if a result is, unless the expected one is too.

    ``squares`` are half the squares of the whitened residuals (n,) of the points from the components of their largest exponents.
    """
    if isinstance(request, Statistics):
        return _error_of_moments(problem, own[:3], expected[:3])
    limit = _LARGEST[problem.x.dtype]
    error, values = _difference(own[0], expected[0], limit), _limited(expected[0], limit)
    if isinstance(request, PointGradient):
        # The terms of a gradient are of about the size of the largest entry of the factors also where they cancel.
        return float(error.amax() / values.abs().amax().clamp(min=max(float(problem.U.abs().amax()), _TINY)))
    # The squares of residuals, and their rounding errors, may be much larger than their sum with the offset.
    if isinstance(request, TopK):
        squares = problem.offsets[expected[1]] - values
    return float((error / torch.maximum(values.abs(), squares).clamp(min=1)).amax())


def _error_of_moments(problem: Exponents, own: Result, expected: Result) -> float:
    """Compute the largest relative error of S0, S1 and S2."""
    limit = _LARGEST[torch.float64]
    errors = [_difference(a, b, limit).amax() for a, b in zip(own, expected, strict=True)]
    first, second = (_limited(expected[place], limit).abs().amax() for place in (0, 2))
    # Residuals of points that are equal to means are rounding errors of coordinates relative to the center of the means.
    farthest = (problem.x.double() - problem.center).abs().amax()
    # Squares that are no normal numbers are zero in kernels.
    lost = torch.finfo(problem.x.dtype).tiny / _TOLERANCE[problem.x.dtype]
    second = torch.maximum(second, first * (_ROUNDING * farthest.square() + lost)).clamp(max=limit)
    # S1, about the means, may be much smaller than its terms.
    scales = torch.stack([first, first.sqrt() * second.sqrt(), second])
    return float((torch.stack(errors) / scales.clamp(min=_TINY)).amax())


def _limited(values: Tensor, limit: float) -> Tensor:
    """Limit the sizes of numbers; those that are undefined (NaN) become zero."""
    return values.double().nan_to_num(nan=0.0, posinf=limit, neginf=-limit).clamp(-limit, limit)


def _difference(own: Tensor, expected: Tensor, limit: float) -> Tensor:
    """Compute absolute differences, float64: of two numbers beyond the limit zero; zero if the expected number is NaN."""
    difference = (own.double().clamp(-limit, limit) - _limited(expected, limit)).abs()
    return difference.masked_fill(expected.isnan(), 0.0)
