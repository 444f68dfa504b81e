"""The native engine: what is passed to the compiled library, and what is left to the dense engine.

Rows that are too far from all components for float32 are evaluated in float64, and rows beyond its range by the dense engine.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops.reductions.comparison import Comparison
from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.library import OUT_OF_MEMORY, Call, load, reason, run
from gmmkeops.reductions.problem import Exponents, Form
from gmmkeops.reductions.protocol import Argmax, Broken, LogSumExp, PointGradient, Request, Result, Statistics, TopK
from gmmkeops.reductions.truncation.bounds import Schedule
from gmmkeops.reductions.truncation.passes import evaluate

__all__ = ["ASSIGNMENTS", "LONG", "RATIO", "Native", "scaled"]

# Numbers of requests in source/interface.hpp.
_REQUESTS = {LogSumExp: 0, Argmax: 1, TopK: 2, PointGradient: 6}
ASSIGNMENTS = {"soft": 3, "hard": 4, "stochastic": 5}

# Rows of a range of the schedule, and pairs of a row and a component.
_ROWS, _PAIRS = 512, 1 << 21

# Largest ratio of weights whose products with responsibilities float32 holds, and exponent of weights that need no scaling.
RATIO, _ORDINARY = 2.0**50, 40

# Dimensions from which kernels without AVX2 are slower than the dense engine.
_MANY = 6

# Product of rows, components and dimensions from which a call may take longer than a tenth of a second.
LONG = 100_000_000

# Two numbers; ctypes creates a new type, which is a cycle of references, whenever it is asked for an array.
_Counts = ctypes.c_int64 * 2


class Native:
    """The engine of compiled kernels, for CPUs."""

    name, title = "native", "The native engine"
    one_pass = True

    def __init__(self) -> None:
        self._comparison = Comparison(_Evaluation)
        # Dtypes and kinds of factors for which EM steps have been asked for and a comparison has been made.
        self._begun: set[tuple[torch.dtype, bool]] = set()

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on a CPU only, not on {device.type}"
        return self._comparison.failure or reason()

    def unsupported(self, form: Form, request: Request) -> str | None:
        if form.device.type == "cpu" and reason() is None and _is_slow(form.full, form.features):
            return "the native engine is slower than the dense one without AVX2"
        return None

    def begin(self, problem: Exponents, request: Request) -> _Evaluation:
        self._comparison.once(problem, request)
        return _Evaluation(problem, request)

    def runs(self, x: Tensor, full: bool, backend: str, problem: Callable[[], Exponents]) -> bool:
        """Return whether this engine computes the moments of points for a backend, after its comparison with the dense engine.

        Args:
            x: Points (N, D).
            full: Whether factors are matrices.
            backend: Name of the backend.
            problem: Function that returns the exponents, called if none of this kind have been compared yet.
        """
        if x.device.type != "cpu" or backend not in ("auto", self.name) or self.unavailable(x.device) is not None:
            return False
        if _is_slow(full, x.shape[1]):
            return False
        if (x.dtype, full) not in self._begun:
            with suppress(Broken):
                if self._comparison.once(problem(), LogSumExp()):
                    self._begun.add((x.dtype, full))
        return self._comparison.failure is None


def _is_slow(full: bool, features: int) -> bool:
    """Return whether the dense engine is faster, because the machine lacks AVX2."""
    return full and features >= _MANY and load()[1] == 0


class _Evaluation:
    """An evaluation that adds up the results of several schedules."""

    def __init__(self, problem: Exponents, request: Request, double: bool = False) -> None:
        self.problem, self.request, self._double = problem, request, double
        self._sums: tuple[Tensor, ...] = ()
        x, width = problem.x, (request.k,) if isinstance(request, TopK) else ()
        # Log-sum-exps or exponents of all requests, since their rows without a finite value are evaluated again.
        self.values = x.new_empty(len(x), *width)
        self.labels = (
            torch.empty(len(x), *width, dtype=torch.int64, device="cpu") if isinstance(request, Argmax | TopK) else None
        )
        self.gradient = torch.empty_like(x) if isinstance(request, PointGradient) else None

    def whole(self) -> Result:
        """The result over every pair."""
        self.add(None)
        return self.result()

    def add(self, schedule: Schedule | None) -> tuple[Schedule, Tensor] | None:
        if schedule is None:
            self._run(None)
            return None
        schedule = schedule.split(_PAIRS, _ROWS)
        minima = self._run(schedule)
        assert minima is not None, "a schedule has minima"
        return schedule, minima

    def result(self) -> Result:
        return (*self._sums, *(part for part in self._rows() if part is not None))

    def _rows(self) -> tuple[Tensor | None, ...]:
        """The tensors of the result that have one row for each point."""
        match self.request:
            case Argmax():
                return (self.labels,)
            case PointGradient():
                return (self.gradient, self.values) if self.request.values else (self.gradient,)
            case Statistics():
                return (self.values,) if self.request.values else ()
        return self.values, self.labels

    def _run(self, schedule: Schedule | None) -> Tensor | None:
        """Evaluate every pair or a schedule; return the minima over its row ranges."""
        sums, minima, left = _call(self, schedule, self._double)
        if not self._double and sums and not math.isfinite(sums[2].sum().item()):
            self._double = True
            sums, minima, left = _call(self, schedule, True)
        if left:
            sums = self._with_left(sums, schedule, minima)
        self._sums = tuple(a + b for a, b in zip(self._sums, sums, strict=True)) if self._sums else sums
        return minima

    def _with_left(
        self, sums: tuple[Tensor, ...], schedule: Schedule | None, minima: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluate the rows that the library has left out: in float64, or by the dense engine if that does not suffice."""
        values = self.values if self.values.ndim == 1 else self.values[:, 0]
        rows = (
            torch.arange(len(values))
            if schedule is None or minima is None
            else schedule.only(schedule.good(minima)).rows
        )
        rows = rows[~values[rows].isfinite()]
        if not len(rows):
            return sums
        request, few = self.request, self.problem.rows(rows)
        if isinstance(request, Statistics | PointGradient) and request.weights is not None:
            request = replace(request, weights=request.weights[rows])
        if self._double or few.x.dtype == torch.float64:
            found = evaluate(dense, few, request)
        else:
            found = _Evaluation(few, request, double=True).whole()
        for own, part in zip(self._rows(), found[len(sums) :], strict=False):
            assert own is not None, "only log-sum-exps have no labels"
            own[rows] = part
        return tuple(a + b for a, b in zip(sums, found, strict=False))


def _call(
    evaluation: _Evaluation, schedule: Schedule | None, double: bool = False
) -> tuple[tuple[Tensor, ...], Tensor | None, int]:
    """Call the library: the moments and the total if they are requested, the minima, and the number of rows without value."""
    problem, request = evaluation.problem, evaluation.request
    (N, K, D), x = problem.shape, problem.x
    weights, unit = getattr(request, "weights", None), 1.0
    if weights is not None:
        weights, unit, ratio = scaled(weights.detach())
        double = double or ratio > RATIO
    U = problem.U
    shared, family = K > 1 and U.stride(0) == 0, 0 if problem.is_full else 2 if U.shape[1] == 1 else 1
    U = (U[:1] if shared else U).contiguous()
    S0 = S1 = S2 = total = minima = None
    if isinstance(request, Statistics):
        kind = ASSIGNMENTS[request.assignment]
        S0, S1, total = _doubles(K), _doubles(K, D), _doubles()
        S2 = _doubles(*((K, D, D), (K, D), (K,))[family])
    else:
        kind = _REQUESTS[type(request)]
    offsets, means, center = problem.offsets.contiguous(), problem.means.contiguous(), problem.center.contiguous()
    lists: list[Tensor] | list[None] = [None] * 5
    if schedule is not None:
        lists, minima = _lists(schedule), _doubles(len(schedule.spans))
    # The numbers of rows without value, and of components in float64.
    counts = _Counts()
    call = Call(
        kind, family, x.dtype == torch.float64, double, getattr(request, "k", 0), cores(),
        N, K, D, x.data_ptr(), offsets.data_ptr(), means.data_ptr(), U.data_ptr(), center.data_ptr(),
        0 if shared else U.stride(0) if K > 1 else U.numel(), _pointer(weights), unit,
        getattr(request, "seed", 0) & (2**64 - 1), 0 if minima is None else len(minima), *map(_pointer, lists), _pointer(minima),
        evaluation.values.data_ptr(), _pointer(evaluation.labels), _pointer(evaluation.gradient),
        _pointer(S0), _pointer(S1), _pointer(S2), _pointer(total),
        ctypes.addressof(counts), ctypes.addressof(counts) + ctypes.sizeof(ctypes.c_int64),
    )  # fmt: skip
    if run("gmmkeops_evaluate", call, is_long=N * K * D >= LONG) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory for reductions over {K} components in {D} dimensions.")
    sums = () if S0 is None or S1 is None or S2 is None or total is None else (S0, S1, S2, total)
    return sums, minima, counts[0]


def _doubles(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device="cpu")


def _lists(schedule: Schedule) -> list[Tensor]:
    """The row ranges, their owners, the pointers, the components and the floors of a schedule."""
    assert schedule.floor is not None, "a truncation sets the floors of the schedules that it returns"
    parts = schedule.spans, schedule.owner, schedule.pointer, schedule.index, schedule.floor
    return [part.contiguous() for part in parts]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def scaled(weights: Tensor) -> tuple[Tensor, float, float]:
    """Weights of ordinary size, the power of two that they have been divided by, and the ratio of the extreme nonzero weights."""
    least, most = (float(value) for value in weights.aminmax()) if len(weights) else (0.0, 0.0)
    largest = max(-least, most)
    if largest == 0:
        return weights.contiguous(), 1.0, 1.0
    if least <= 0:
        sizes = weights.abs()
        least = float(torch.where(sizes > 0, sizes, math.inf).amin())
    ratio = largest / least
    exponent = math.frexp(largest)[1]
    unit = 1.0 if abs(exponent) <= _ORDINARY else 2.0 ** max(-1000, min(1000, exponent))
    return (weights.contiguous() if unit == 1 else weights / unit), unit, ratio
