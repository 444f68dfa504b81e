"""The KeOps engine, and the detection of points and factors for which its float32 formulas are not accurate enough."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops.reductions.accuracy import CONDITION, DEEPEST
from gmmkeops.reductions.comparison import Comparison
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.keops import formulas, loading
from gmmkeops.reductions.problem import Exponents, Form, upper_factor
from gmmkeops.reductions.protocol import Argmax, LogSumExp, PointGradient, Request, Result, Statistics, TopK
from gmmkeops.reductions.truncation.bounds import Schedule
from gmmkeops.reductions.truncation.passes import evaluate

__all__ = ["Keops"]

# Largest number of entries of factors whose condition numbers are computed on the CPU if the factors are there, in 0.2 ms.
_FEW = 10_000


class Keops:
    """Engine whose formulas KeOps compiles for the CPU or for CUDA."""

    name, title = "keops", "KeOps"
    one_pass = False

    def __init__(self) -> None:
        self._comparison = Comparison(_Evaluation)

    def unavailable(self, device: torch.device) -> str | None:
        return self._comparison.failure or loading.unavailable(device)

    def unsupported(self, form: Form, request: Request) -> str | None:
        if isinstance(request, Statistics) and request.assignment != "soft":
            return f"KeOps has no formula for {request.assignment} assignments"
        return None

    def begin(self, problem: Exponents, request: Request) -> _Evaluation:
        self._comparison.once(problem, request)
        return _Evaluation(problem, request)


class _Evaluation:
    """Evaluation in two steps: the log-sum-exps or largest exponents, then the sums that depend on them.

    Rows that are so far from all components that float32 exponents are not accurate enough are evaluated by the dense engine.
    """

    def __init__(self, problem: Exponents, request: Request) -> None:
        self.problem, self._request, self._dtype = _prepared(problem), request, problem.x.dtype
        self._found: tuple[Tensor, ...] = ()
        # Schedules of row ranges whose lists were long enough; None if all pairs are evaluated.
        self._schedules: list[Schedule] | None = None

    def add(self, schedule: Schedule | None) -> tuple[Schedule, Tensor] | None:
        found: tuple[Tensor, ...]
        if self._request.rank > 0:
            found = formulas.topk(self.problem, schedule, self._request.rank)
        else:
            found = formulas.logsumexp(self.problem, schedule)
        if schedule is None:
            self._found = found
            return None
        if self._schedules is None:
            self._schedules = []
            self._found = tuple(part.new_empty(len(self.problem.x), *part.shape[1:]) for part in found)
        rows = schedule.rows
        for whole, part in zip(self._found, found, strict=True):
            whole[rows] = part
        minima = schedule.minima(found[0] if found[0].ndim == 1 else found[0][:, -1])
        self._schedules.append(schedule.only(schedule.good(minima)))
        return schedule, minima

    def result(self) -> Result:
        match self._request:
            case LogSumExp():
                self._replace_far(LogSumExp())
                return (self._found[0].to(self._dtype),)
            case Argmax():
                self._replace_far(TopK(1))
                return (self._found[1][:, 0],)
            case TopK():
                self._replace_far(self._request)
                return self._found[0].to(self._dtype), self._found[1]
            case Statistics():
                return self._moments(self._request.weights, self._request.values)
            case PointGradient():
                return self._gradient(self._request.weights, self._request.values)

    def _replace_far(self, request: LogSumExp | TopK) -> Tensor:
        """Replace the values of rows that are far from all components by those of the dense engine; return these rows (n,)."""
        first = self._found[0]
        far = _far(self.problem, first if first.ndim == 1 else first[:, 0])
        if len(far):
            for found, right in zip(self._found, evaluate(dense, self.problem.rows(far), request), strict=True):
                found[far] = right
        return far

    def _moments(self, weights: Tensor | None, with_values: bool) -> Result:
        problem, values = self.problem, self._found[0]
        far = self._replace_far(LogSumExp())
        g = torch.ones_like(values, dtype=torch.float64) if weights is None else weights
        total = (values.double() * g).sum()
        after = (values.to(self._dtype, copy=True),) if with_values else ()
        values[far] = formulas.NO_SHARE
        S0, S1, S2 = formulas.moments(problem, values, g, self._schedules)
        if len(far):
            rest = evaluate(dense, problem.rows(far), Statistics(g[far]))
            S0, S1, S2 = S0 + rest[0], S1 + rest[1], S2 + rest[2].reshape(S2.shape)
        return S0, S1, S2, total, *after

    def _gradient(self, weights: Tensor | None, with_values: bool) -> Result:
        values = self._found[0]
        far = self._replace_far(LogSumExp())
        g = torch.ones_like(values) if weights is None else weights
        after = (values.to(self._dtype, copy=True),) if with_values else ()
        values[far] = formulas.NO_SHARE
        gradient = formulas.point_gradient(self.problem, values, g, self._schedules)
        if len(far):
            (gradient[far],) = evaluate(dense, self.problem.rows(far), PointGradient(g[far]))
        return gradient.to(self._dtype), *after


def _prepared(problem: Exponents) -> Exponents:
    """Make full factors upper triangular, and cast the points to float64 if float32 residuals are not accurate enough.

    Rounding x - μ to float32 changes an exponent by a multiple of the factor's condition number, at any scale.
    """
    if not problem.is_full:
        return problem
    # Both properties are read at once, because reading from a GPU waits for it; those of few factors are computed on the CPU.
    U = problem.host.U if problem.host is not None and problem.entries <= _FEW else problem.U
    checks = [(U.tril(-1) == 0).all()]
    if problem.x.dtype == torch.float32:
        inverse, _ = torch.linalg.inv_ex(U)
        checks.append((U.abs().mT @ inverse.abs().mT).sum(2).amax() <= CONDITION)
    is_upper, *is_accurate = torch.stack(checks).tolist()
    if not is_upper:
        return _prepared(problem.with_factors(upper_factor))
    return problem if all(is_accurate) else replace(problem, x=problem.x.double())


def _far(problem: Exponents, values: Tensor) -> Tensor:
    """Return the rows (n,) whose log-sum-exps or largest exponents (N,) are beyond the accurate range of float32."""
    if problem.x.dtype != torch.float32:
        return (~torch.isfinite(values)).nonzero()[:, 0]
    return (~((values - problem.offsets.amax()).abs() <= DEEPEST)).nonzero()[:, 0]
