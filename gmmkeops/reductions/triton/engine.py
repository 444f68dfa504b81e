"""The Triton engine: what its kernels compute, what matrix products compute, and what is left to the dense engine.

float32 residuals are not accurate enough for narrow rotated components, for points that are far from all components, and for
weights of very different sizes. In many dimensions all pairs are evaluated by matrix products: for spherical and diagonal factors
by products of digits where these are accurate; otherwise, on GPUs with fast float64 arithmetic, by the products of the dense
engine, with a kernel for the sums of exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from gmmkeops.reductions.accuracy import CONDITION, DEEPEST
from gmmkeops.reductions.comparison import Comparison
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.dense.products import has_slow_double
from gmmkeops.reductions.library import reason
from gmmkeops.reductions.problem import Exponents, Form, upper_factor
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
from gmmkeops.reductions.triton import loading
from gmmkeops.reductions.triton.columns import Softmax
from gmmkeops.reductions.triton.lists import candidate_lists, checked
from gmmkeops.reductions.triton.moments_on_cpu import (
    LOWEST,
    RATIO,
    add_values,
    converted,
    extreme_sizes,
    moments_on_cpu,
    ratio_and_unit,
    suffices,
)
from gmmkeops.reductions.triton.packing import LN2
from gmmkeops.reductions.triton.residuals import FEW, FEW_FULL, NO_LABEL, NO_SHARE, Residuals, admits_digits
from gmmkeops.reductions.truncation.bounds import Schedule
from gmmkeops.reductions.truncation.passes import evaluate
from gmmkeops.reductions.truncation.tolerance import Tolerance
from gmmkeops.reductions.truncation.tree import Cloud
from gmmkeops.reductions.truncation.truncation import Check

__all__ = ["Triton"]

# Largest numbers of features, and largest k of the largest exponents, for which the registers of a thread suffice: for float32
# points; for their gradients; and for float64 points.
_FULL, _DIAGONAL, _TOP = 32, 128, 16
_FULL_GRADIENT, _DIAGONAL_GRADIENT = 16, 32
_FULL_DOUBLE, _DIAGONAL_DOUBLE = FEW_FULL, FEW // 2

# Smallest numbers of features, for full and for diagonal factors, for which float64 products take less time than kernels of
# residuals. H200, 1e6 points and 1000 components: log-sum-exps, full D = 32: 37 and 51 ms; moments, full D = 12: 21 and 62 ms,
# diagonal D = 64: 24 and 69 ms; labels, full D = 32: 45 and 91 ms.
# With few components, the products of the coordinates of each point take longer than kernels: this is estimated, not timed.
_PRODUCT_COMPONENTS = 48
_PRODUCTS = {LogSumExp: (17, 25), Statistics: (9, 25), Argmax: (24, 48)}

# Largest number of entries of the factors for which torch packs parameters on the CPU, to which those on the device are copied.
# On one core it takes 0.1 ms for few components, 0.35 ms for 1e4 entries and 1.2 ms for 5e4, and saves about forty kernels. The
# compiled library takes 0.15 ms for 5e4 entries.
_MANY = 10_000


class _WithForm(Evaluation, Protocol):
    """An evaluation that names the formulas by which all pairs are evaluated."""

    @property
    def form(self) -> str:
        """Name of the formulas."""


class Triton:
    """Engine of Triton kernels, for CUDA devices."""

    name, title = "triton", "Triton"
    one_pass = False

    def __init__(self) -> None:
        self._comparison = Comparison(_begun)

    def unavailable(self, device: torch.device) -> str | None:
        return self._comparison.failure or loading.unavailable(device)

    def unsupported(self, form: Form, request: Request) -> str | None:
        N, K, D = form.rows, form.components, form.features
        if N == 0 or max(N, K * (16 + 4 * D + 8 * D * D)) >= 1 << 31:
            return "Triton numbers points and parameters by 32 bits"
        if _by_products(form, request):
            return None
        if isinstance(request, TopK) and request.k > _TOP:
            return f"Triton computes at most {_TOP} exponents of each point"
        if (_FULL if form.full else _DIAGONAL) < D:
            return f"Triton has no kernels for {'full' if form.full else 'diagonal'} factors in {D} dimensions"
        most = _FULL_GRADIENT if form.full else _DIAGONAL_GRADIENT
        if isinstance(request, PointGradient) and most < D:
            return f"Triton has no kernel for gradients in {D} dimensions"
        if form.dtype != torch.float32 and not _runs_in_double(form):
            return f"Triton has kernels for float32 points only in {D} dimensions"
        if torch.version.hip is not None and form.full and FEW_FULL < D:
            return f"Triton has no kernels for full factors in {D} dimensions on ROCm"
        return None

    def begin(self, problem: Exponents, request: Request) -> Evaluation:
        evaluation = _begun(problem, request)
        self._comparison.once(problem, request, evaluation.form)
        if isinstance(evaluation, _Evaluation):
            evaluation.compare = partial(self._compare, problem)
        return evaluation

    def _compare(self, problem: Exponents, request: Request, form: str) -> None:
        """Compare the results of a request at its first use, unless the engine has failed since the evaluation began."""
        if (failure := self.unavailable(problem.x.device)) is not None:
            raise Broken(failure)
        self._comparison.once(problem, request, form)


def _begun(problem: Exponents, request: Request) -> _WithForm:
    """Begin an evaluation by products or by kernels."""
    problem = _placed(problem, request)
    return _MatrixProducts(problem, request) if _by_products(problem.form, request) else _by_kernels(problem, request)


def _placed(problem: Exponents, request: Request) -> Exponents:
    """Copy few parameters to the CPU, where they are packed; leave out a copy there of many.

    Many parameters that are on the CPU remain there if the library packs them as digits.
    """
    _, K, D = problem.shape
    by_digits = isinstance(request, LogSumExp | Statistics) and not request.rank and admits_digits(problem)
    count = K * D if by_digits else problem.entries
    if reason() is not None:
        few = count <= _MANY
    else:
        few = problem.is_small or (problem.host is not None and by_digits)
    return problem.with_host() if few else replace(problem, host=None)


def _by_products(form: Form, request: Request) -> bool:
    """Return whether all pairs are evaluated by matrix products."""
    if form.dtype != torch.float32 or (isinstance(request, Statistics) and request.assignment != "soft"):
        return False
    full, diagonal = _PRODUCTS.get(type(request), (math.inf, math.inf))
    if form.components < _PRODUCT_COMPONENTS and form.features <= (_FULL if form.full else _DIAGONAL):
        return False
    return form.features >= (full if form.full else diagonal) and form.rows > 0 and _has_fast_double(form.device)


def _has_fast_double(device: torch.device) -> bool:
    known = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return known and not has_slow_double(device)


class _MatrixProducts:
    """Evaluation of all pairs by products of digits if these are accurate, otherwise by float64 products.

    Candidate lists are evaluated by kernels of residuals, or by the dense engine where there are none.
    """

    def __init__(self, problem: Exponents, request: Request) -> None:
        self.problem, self._request = problem, request
        self._evaluation: Evaluation | None = None

    @cached_property
    def _digits(self) -> Residuals | None:
        """Kernels with products of digits, if these are accurate."""
        if self.problem.is_full or isinstance(self._request, Argmax):
            return None
        kernels = Residuals(self.problem)
        return None if kernels.products is None else kernels

    @property
    def form(self) -> str:
        """Name of the formulas by which all pairs are evaluated."""
        return "float64 products" if self._digits is None else "digits"

    def add(self, schedule: Schedule | None) -> tuple[Schedule, Tensor] | None:
        if self._evaluation is None:
            self._evaluation = self._begun(schedule)
        return self._evaluation.add(schedule)

    def result(self) -> Result:
        assert self._evaluation is not None, "points have been evaluated before the result"
        return self._evaluation.result()

    def _begun(self, schedule: Schedule | None) -> Evaluation:
        problem, request = self.problem, self._request
        if schedule is not None:
            has_kernels = problem.shape[2] <= (_FULL if problem.is_full else _DIAGONAL)
            return _by_kernels(problem, request) if has_kernels else dense.begin(problem, request)
        if self._digits is not None:
            return _Evaluation(problem, request, problem.x.dtype, self._digits)
        return dense.begin(problem, request, Softmax())


def _by_kernels(problem: Exponents, request: Request) -> _WithForm:
    """Begin an evaluation in the dtype of the points, in float64, or by the dense engine."""
    kernels = Residuals(problem)
    condition, is_triangular = kernels.condition()
    if not condition < math.inf:
        # Moments of whitened residuals would not determine those of residuals.
        return dense.begin(problem, request)
    if not is_triangular:
        problem = problem.with_factors(upper_factor)
        kernels = Residuals(problem)
    if problem.x.dtype == torch.float32 and condition > CONDITION:
        return _in_double(problem, request)
    return _Evaluation(problem, request, problem.x.dtype, kernels)


def _in_double(problem: Exponents, request: Request) -> _WithForm:
    """Begin an evaluation for float32 points in float64, or by the dense engine if there are no float64 kernels."""
    if not _runs_in_double(problem.form):
        return dense.begin(problem, request)
    wide = replace(problem, x=problem.x.double())
    return _Evaluation(wide, request, problem.x.dtype, Residuals(wide))


def _runs_in_double(form: Form) -> bool:
    """Return whether there are float64 kernels for a number of features."""
    return form.features <= (_FULL_DOUBLE if form.full else _DIAGONAL_DOUBLE)


class _Evaluation:
    """Evaluation in two steps: the log-sum-exps or largest exponents, then the sums that depend on them.

    Rows that are so far from all components that float32 exponents are not accurate enough are evaluated by the dense engine.
    """

    def __init__(self, problem: Exponents, request: Request, dtype: torch.dtype, kernels: Residuals) -> None:
        self.problem, self._request, self._dtype, self._kernels = problem, request, dtype, kernels
        N, k = len(problem.x), request.rank
        # Base-2 log-sum-exps (N,) or largest exponents (N, k), and the components of the latter.
        self._values = problem.x.new_empty((N, k) if k else N)
        self._labels = problem.x.new_empty((N, k), dtype=torch.int32)
        # Schedules of row ranges whose lists were long enough; None if all pairs are evaluated. The last one and its minima: only
        # if another one is added, some of its lists were too short.
        self._schedules: list[Schedule] | None = None
        self._last: tuple[Schedule, Tensor] | None = None
        # The tolerance of the lists. After a schedule of all leaves: its check, the ranges of values and weights, and the sums of
        # moments on the CPU.
        self._tolerance: Tolerance | None = None
        self.check: Check | None = None
        self._ranges: list[float] | None = None
        self._sums: Tensor | None = None
        # Function that compares moments by a form, which are computed from these log-sum-exps, at their first use.
        self.compare: Callable[[Request, str], None] | None = None

    @property
    def form(self) -> str:
        """Name of the formulas by which all pairs are evaluated."""
        soft = not self._request.rank and not isinstance(self._request, PointGradient)
        return "digits" if soft and self._kernels.products is not None else "residuals"

    def lists(self, cloud: Cloud, problem: Exponents, minima: Tensor, tolerance: Tolerance) -> Schedule:
        self._tolerance = tolerance
        return candidate_lists(cloud, problem, minima, tolerance)

    def add(self, schedule: Schedule | None) -> tuple[Schedule, Tensor] | None:
        if self._request.rank:
            minima = self._kernels.largest(self._values, self._labels, schedule)
        else:
            minima = self._kernels.logsumexps(self._values, schedule)
        self.check = self._ranges = self._sums = None
        if schedule is not None and schedule.whole is not None:
            minima = self._checked(schedule)
        if schedule is None or minima is None:
            return None
        if self._schedules is None or self._last is None:
            self._schedules = [schedule]
        else:
            last, least = self._last
            kept = last.only(last.good(least))
            self._schedules[-1:] = [kept, schedule] if len(kept.spans) else [schedule]
        self._last = schedule, minima
        return self._last

    @property
    def is_small(self) -> bool:
        """Whether there are neither digits of the points nor a copy of them in float64."""
        return self._kernels.products is None and self.problem.x.dtype == self._dtype

    def moments(self, request: Statistics) -> Result | None:
        if _by_products(self.problem.form, request):
            return None
        found = _Evaluation(self.problem, request, self._dtype, self._kernels)
        # The values are read only.
        found._values, found._schedules = self._values, self._schedules
        if self.compare is not None:
            self.compare(request, found.form)
        return found.result()

    def _checked(self, schedule: Schedule) -> Tensor:
        """Check the lists of all leaves, and read the range of values and weights; return the minima (B,), nats.

        If the moments will be needed on the CPU, their sums are computed before the check is known, and copied with it.
        """
        assert self._tolerance is not None, "the lists have been computed by this evaluation"
        request, kernels, values = self._request, self._kernels, self._values
        weights = request.weights if isinstance(request, Statistics) else None
        sums = values.new_empty(0, dtype=torch.float64)
        if isinstance(request, Statistics) and suffices(kernels, request, by_products=False):
            width, K = kernels.sums_shape
            sums = torch.zeros(width * K + 1, dtype=torch.float64, device=values.device)
            single = None if weights is None else weights.to(values.dtype).contiguous()
            kernels.add_sums(sums[:-1].view(width, K), values, single, [schedule])
            add_values(sums[-1], kernels.scale, values, weights)
        minima, self.check, self._ranges, sums = checked(
            schedule, values, weights, kernels.scale, self._tolerance, sums
        )
        self._sums = sums if len(sums) else None
        return minima

    def result(self) -> Result:
        request = self._request
        weights = request.weights if isinstance(request, Statistics) else None
        if isinstance(request, Statistics) and (moments := self._moments_on_cpu(request)) is not None:
            return moments
        far, ratio, unit = self._numbers(weights)
        if ratio > RATIO and self.problem.x.dtype == torch.float32:
            return self._repeated()
        match request:
            case LogSumExp():
                return (self._nats(far),)
            case Argmax():
                labels = self._labels[:, 0].long()
                if len(far):
                    (labels[far],) = evaluate(dense, self.problem.rows(far), request)
                return (labels,)
            case TopK():
                values, labels = self._kernels.scale.nats(self._values).to(self._dtype), self._labels.long()
                if len(far):
                    found, labels[far] = evaluate(dense, self.problem.rows(far), request)
                    values[far] = found.to(self._dtype)
                return values, labels
            case Statistics():
                return self._moments(request, far, unit)
            case PointGradient():
                return self._gradient(request, far)

    def _numbers(self, weights: Tensor | None) -> tuple[Tensor, float, float]:
        """Read the numbers by which the result is computed, with one synchronization of the device if no row is far.

        Returns:
            The rows (n,) whose log-sum-exps or largest exponents are beyond the accurate range of float32; and the ratio of the
            largest and the least positive size of weights, and the number by which weights are divided.
        """
        first = self._values if self._values.ndim == 1 else self._values[:, 0]
        single = first.dtype == torch.float32
        if self._ranges is not None:
            *found, middle = self._ranges
            found = found[: 2 if weights is None else 4]
        else:
            usual = self._kernels.scale.middle
            read = [*first.aminmax()]
            if weights is not None:
                read += extreme_sizes(weights)
            if single and usual.device == first.device:
                read.append(usual)
            found = torch.stack(read).tolist()
            middle = float(usual) if usual.device != first.device else found.pop() if single else 0.0
        depth = DEEPEST / LN2 if single else math.inf
        least, most = found[:2]
        far = torch.empty(0, dtype=torch.int64, device=first.device)
        if single and not (least - middle >= -depth and most - middle <= depth):
            far = (~((first - middle).abs() <= depth)).nonzero()[:, 0]
        elif not single and not (math.isfinite(least) and math.isfinite(most) and least > LOWEST):
            far = (~(torch.isfinite(first) & (first > LOWEST))).nonzero()[:, 0]
        return far, *((1.0, 1.0) if weights is None else ratio_and_unit(*found[2:]))

    def _repeated(self) -> Result:
        """Compute the result in float64 or by the dense engine, for weights of very different sizes."""
        wide = _in_double(self.problem, self._request)
        if self._schedules is None:
            wide.add(None)
        for schedule in self._schedules or []:
            # Their lists were long enough, whatever the rounding errors of other minima are.
            floor = torch.full_like(schedule.pruned[schedule.owner], -math.inf)
            wide.add(replace(schedule, floor=floor, whole=None))
        return wide.result()

    def _nats(self, far: Tensor) -> Tensor:
        """Return the log-sum-exps or largest exponents (N,), nats, in the dtype of the request."""
        first = self._values if self._values.ndim == 1 else self._values[:, 0]
        values = self._kernels.scale.nats(first)
        if len(far):
            few, hard = self.problem.rows(far), self._request.rank > 0
            values[far] = evaluate(dense, few, TopK(1) if hard else LogSumExp())[0].view(-1).double()
        return values.to(self._dtype)

    def _moments_on_cpu(self, request: Statistics) -> Result | None:
        """Compute moments for soft assignments on the CPU; None if :meth:`_moments` must compute them."""
        kernels = self._kernels
        if self._sums is not None:
            far, ratio, unit = self._numbers(request.weights)
            is_usual = not len(far) and unit == 1 and (ratio <= RATIO or self.problem.x.dtype != torch.float32)
            return converted(kernels, request.weights, self._values, self._sums) if is_usual else None
        if self._schedules is not None or not suffices(kernels, request, kernels.products is not None):
            return None
        return moments_on_cpu(kernels, request, self._values)

    def _moments(self, request: Statistics, far: Tensor, unit: float) -> Result:
        weights, kernels = request.weights, self._kernels
        g = weights if weights is None or unit == 1 else weights / unit
        if request.assignment == "soft":
            shares = self._values
            if len(far):
                shares = shares.index_fill(0, far, NO_SHARE)
            if len(far) and (self._schedules is not None or kernels.products is None):
                # Residuals of these rows may be infinite, and their product with zero would not be a number.
                x = self.problem.x.clone()
                x[far] = (self.problem.means[0] + self.problem.center).to(x.dtype)
                kernels = Residuals(replace(self.problem, x=x))
            single = None if g is None else g.to(self.problem.x.dtype).contiguous()
            S0, S1, S2 = kernels.moments(shares, single, self._schedules)
        else:
            labels = self._labels[:, 0] if request.assignment == "hard" else self._drawn(request.seed)
            S0, S1, S2 = self._kernels.hard_moments(labels.index_fill(0, far, NO_LABEL) if len(far) else labels, g)
        if unit != 1:
            S0, S1, S2 = S0 * unit, S1 * unit, S2 * unit
        if len(far):
            few = replace(request, weights=None if weights is None else weights[far], values=False)
            rest = evaluate(dense, self.problem.rows(far), few)
            S0, S1, S2 = S0 + rest[0], S1 + rest[1], S2 + rest[2].reshape(S2.shape)
        if not request.values and not len(far):
            first = self._values if self._values.ndim == 1 else self._values[:, 0]
            if weights is not None:
                return S0, S1, S2, kernels.scale.nats(first) @ weights
            total = torch.add(kernels.scale.base * len(first), first.sum(dtype=torch.float64), alpha=LN2)
            return S0, S1, S2, total
        values = self._nats(far)
        total = values.double().sum() if weights is None else values.double() @ weights
        return S0, S1, S2, total, *((values,) if request.values else ())

    def _drawn(self, seed: int) -> Tensor:
        """Draw a component (N,), int32, for each point, from its responsibilities."""
        x = self.problem.x
        generator = torch.Generator(x.device).manual_seed(seed)
        uniform = 1 - torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        labels = x.new_empty(len(x), dtype=torch.int32)
        self._kernels.draws(self._values, uniform, labels, self._schedules)
        return labels

    def _gradient(self, request: PointGradient, far: Tensor) -> Result:
        gradient, weights = self._kernels.gradients(self._values, self._schedules), request.weights
        if len(far):
            (gradient[far],) = evaluate(dense, self.problem.rows(far), PointGradient())
        if weights is not None:
            # Weights beyond the range of float32 may have products within it.
            gradient = weights[:, None] * gradient.double()
        return gradient.to(self._dtype), *((self._nats(far),) if request.values else ())
