"""The Triton engine: what its kernels compute, and what is left to the dense engine or computed in float64.

float32 residuals are not accurate enough for narrow rotated components, for points that are far from all components, and for
weights of very different sizes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops.reductions.comparison import Comparison
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.problem import Exponents, Form, upper_factor
from gmmkeops.reductions.protocol import Argmax, Evaluation, LogSumExp, PointGradient, Request, Result, Statistics, TopK
from gmmkeops.reductions.triton import loading
from gmmkeops.reductions.triton.packing import LN2
from gmmkeops.reductions.triton.residuals import FEW, FEW_FULL, NO_LABEL, NO_SHARE, Residuals
from gmmkeops.reductions.truncation.bounds import Schedule
from gmmkeops.reductions.truncation.passes import evaluate

__all__ = ["Triton"]

# Largest numbers of features, and largest k of the largest exponents, for which the registers of a thread suffice: for float32
# points; for their gradients; and for float64 points.
_FULL, _DIAGONAL, _TOP = 32, 128, 16
_FULL_GRADIENT, _DIAGONAL_GRADIENT = 16, 32
_FULL_DOUBLE, _DIAGONAL_DOUBLE = FEW_FULL, FEW // 2

# Exponents, base 2, above which kernels are exact: their running maximum begins at -1e38.
_LOWEST = -9.9e37

# Largest condition number of full factors for which float32 is used, with errors of about 2e-5 nats.
_CONDITION = 128.0

# Distance of log-sum-exps from their usual size, nats, beyond which differences of float32 exponents are not accurate enough.
_DEEPEST = 300.0

# Largest ratio of weights whose products with responsibilities float32 holds.
_RATIO = 2.0**50


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
        if isinstance(request, TopK) and request.k > _TOP:
            return f"Triton computes at most {_TOP} exponents of each point"
        if not self.has_kernels(D, form.full):
            return f"Triton has no kernels for {'full' if form.full else 'diagonal'} factors in {D} dimensions"
        most = _FULL_GRADIENT if form.full else _DIAGONAL_GRADIENT
        if isinstance(request, PointGradient) and most < D:
            return f"Triton has no kernel for gradients in {D} dimensions"
        if form.dtype != torch.float32 and not _runs_in_double(form):
            return f"Triton has kernels for float32 points only in {D} dimensions"
        if torch.version.hip is not None and form.full and FEW_FULL < D:
            return f"Triton has no kernels for full factors in {D} dimensions on ROCm"
        if N == 0 or max(N, K * (16 + 4 * D + 8 * D * D)) >= 1 << 31:
            return "Triton numbers points and parameters by 32 bits"
        return None

    def has_kernels(self, features: int, full: bool) -> bool:
        """Return whether there are kernels for a number of features D and for full or other factors."""
        return features <= (_FULL if full else _DIAGONAL)

    def begin(self, problem: Exponents, request: Request) -> Evaluation:
        self._comparison.once(problem, request)
        return _begun(problem, request)


def _begun(problem: Exponents, request: Request) -> Evaluation:
    """Begin an evaluation in the dtype of the points, in float64, or by the dense engine."""
    weights = getattr(request, "weights", None)
    found: list[Tensor] = []
    if problem.is_full:
        U = problem.U
        inverse, _ = torch.linalg.inv_ex(U)
        condition = (U.abs().mT @ inverse.abs().mT).sum(2).amax()
        found += [condition, U.tril(-1).abs().amax()]
    if weights is not None:
        sizes = weights.abs()
        least, most = torch.where(sizes > 0, sizes, torch.inf).amin(), sizes.amax()
        unit = torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent.clamp(-1000, 1000))
        found += [most / least]
    # One synchronization of the device for all of these numbers.
    numbers = torch.stack(found).tolist() if found else []
    ratio = numbers.pop() if weights is not None else 1.0
    condition, below = numbers if numbers else (1.0, 0.0)
    if not condition < torch.inf:
        # Moments of whitened residuals would not determine those of residuals.
        return dense.begin(problem, request)
    if below:
        problem = replace(problem, U=upper_factor(problem.U))
    double = problem.x.dtype == torch.float32 and (condition > _CONDITION or ratio > _RATIO)
    if double and not _runs_in_double(problem.form):
        return dense.begin(problem, request)
    wide = replace(problem, x=problem.x.double()) if double else problem
    return _Evaluation(wide, request, problem.x.dtype, None if weights is None else unit)


def _runs_in_double(form: Form) -> bool:
    """Return whether there are float64 kernels for a number of features."""
    return form.features <= (_FULL_DOUBLE if form.full else _DIAGONAL_DOUBLE)


class _Evaluation:
    """Evaluation in two steps: the log-sum-exps or largest exponents, then the sums that depend on them.

    Rows that are so far from all components that float32 exponents are not accurate enough are evaluated by the dense engine.
    """

    def __init__(self, problem: Exponents, request: Request, dtype: torch.dtype, unit: Tensor | None) -> None:
        self.problem, self._request, self._dtype, self._unit = problem, request, dtype, unit
        self._kernels = Residuals(problem)
        N, k = len(problem.x), request.rank
        # Base-2 log-sum-exps (N,) or largest exponents (N, k), and the components of the latter.
        self._values = problem.x.new_empty((N, k) if k else N)
        self._labels = problem.x.new_empty((N, k), dtype=torch.int32)
        # Schedules of row ranges whose lists were long enough; None if all pairs are evaluated.
        self._schedules: list[Schedule] | None = None

    def add(self, schedule: Schedule | None) -> tuple[Schedule, Tensor] | None:
        if self._request.rank:
            minima = self._kernels.largest(self._values, self._labels, schedule)
        else:
            minima = self._kernels.logsumexps(self._values, schedule)
        if schedule is None or minima is None:
            return None
        self._schedules = [] if self._schedules is None else self._schedules
        kept = schedule.only(schedule.good(minima))
        if len(kept.spans):
            self._schedules.append(kept)
        return schedule, minima

    def result(self) -> Result:
        request = self._request
        far = self._far()
        match request:
            case LogSumExp():
                return (self._nats(far),)
            case Argmax():
                labels = self._labels[:, 0].long()
                if len(far):
                    (labels[far],) = evaluate(dense, self.problem.rows(far), request)
                return (labels,)
            case TopK():
                values, labels = self._kernels.packed.nats(self._values).to(self._dtype), self._labels.long()
                if len(far):
                    found, labels[far] = evaluate(dense, self.problem.rows(far), request)
                    values[far] = found.to(self._dtype)
                return values, labels
            case Statistics():
                return self._moments(request, far)
            case PointGradient():
                return self._gradient(request, far)

    def _far(self) -> Tensor:
        """Return the rows (n,) whose log-sum-exps or largest exponents are beyond the accurate range of float32."""
        first = self._values if self._values.ndim == 1 else self._values[:, 0]
        if first.dtype == torch.float32:
            packed = self._kernels.packed
            far = first - ((packed.usual - packed.base) / LN2).to(first.dtype)
            return (~(far.abs() <= _DEEPEST / LN2)).nonzero()[:, 0]
        return (~(torch.isfinite(first) & (first > _LOWEST))).nonzero()[:, 0]

    def _nats(self, far: Tensor) -> Tensor:
        """Return the log-sum-exps or largest exponents (N,), nats, in the dtype of the request."""
        first = self._values if self._values.ndim == 1 else self._values[:, 0]
        values = self._kernels.packed.nats(first)
        if len(far):
            few, hard = self.problem.rows(far), self._request.rank > 0
            values[far] = evaluate(dense, few, TopK(1) if hard else LogSumExp())[0].view(-1).double()
        return values.to(self._dtype)

    def _moments(self, request: Statistics, far: Tensor) -> Result:
        values, weights = self._nats(far), request.weights
        g = None if weights is None or self._unit is None else weights / self._unit
        kernels = self._kernels
        if request.assignment == "soft":
            shares = self._values.index_fill(0, far, NO_SHARE)
            if len(far):
                # Residuals of these rows may be infinite, and their product with zero would not be a number.
                x = self.problem.x.clone()
                x[far] = (self.problem.means[0] + self.problem.center).to(x.dtype)
                kernels = Residuals(replace(self.problem, x=x))
            single = None if g is None else g.to(self.problem.x.dtype)
            S0, S1, S2 = kernels.moments(shares, single, self._schedules)
        else:
            labels = self._labels[:, 0] if request.assignment == "hard" else self._drawn(request.seed)
            S0, S1, S2 = self._kernels.hard_moments(labels.index_fill(0, far, NO_LABEL), g)
        if self._unit is not None:
            S0, S1, S2 = S0 * self._unit, S1 * self._unit, S2 * self._unit
        if len(far):
            few = replace(request, weights=None if weights is None else weights[far], values=False)
            rest = evaluate(dense, self.problem.rows(far), few)
            S0, S1, S2 = S0 + rest[0], S1 + rest[1], S2 + rest[2].reshape(S2.shape)
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
