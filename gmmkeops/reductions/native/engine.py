"""The native engine: what is passed to the compiled library, and what is left to the dense engine.

Rows that are too far from all components for float32 are evaluated in float64, and rows beyond its range by the dense engine.
"""

from __future__ import annotations

import ctypes
import math
import signal
import threading
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops._checks import PrecisionWarning
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.native.library import Call, load, reason
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Argmax, LogSumExp, PointGradient, Request, Result, Statistics, TopK
from gmmkeops.reductions.truncation.bounds import Schedule
from gmmkeops.reductions.truncation.passes import evaluate

__all__ = ["Native"]

# Numbers of requests in source/interface.hpp.
_LOG_SUM_EXP, _ARGMAX, _TOP_K, _POINT_GRADIENT = 0, 1, 2, 6
_ASSIGNMENTS = {"soft": 3, "hard": 4, "stochastic": 5}

# Rows of a range of the schedule, and pairs of a row and a component.
_ROWS, _PAIRS = 512, 1 << 21

# Largest ratio of weights whose products with responsibilities float32 holds.
_RATIO = 2.0**50

# Rows at which the first evaluation of each kind is compared with the dense engine, and the largest errors relative to
# max(1, |value|).
_COMPARED, _TOLERANCE = 256, {torch.float32: 1e-4, torch.float64: 1e-8}

# Dimensions from which kernels without AVX2 are slower than the dense engine.
_MANY = 6

_OUT_OF_MEMORY, _INTERRUPTED = 1, 2

_Interrupted = ctypes.CFUNCTYPE(ctypes.c_int32)


class Native:
    """The engine of compiled kernels, for CPUs."""

    name, title = "native", "The native engine"

    def __init__(self) -> None:
        self._compared: set[tuple[object, ...]] = set()
        self._mistrusted: str | None = None

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on a CPU only, not on {device.type}"
        return self._mistrusted or reason()

    def unsupported(self, problem: Exponents, request: Request) -> str | None:
        if problem.x.device.type == "cpu" and reason() is None and load()[1] == 0 and problem.is_full and problem.shape[2] >= _MANY:
            return "the native engine is slower than the dense one without AVX2"
        return None

    def begin(self, problem: Exponents, request: Request) -> _Evaluation:
        kind = (problem.x.dtype, problem.is_full, type(request))
        if kind not in self._compared:
            self._compared.add(kind)
            self._compare(problem, request)
        return _Evaluation(problem, request)

    def _compare(self, problem: Exponents, request: Request) -> None:
        """Compare the log-sum-exps of a few rows with those of the dense engine; a difference beyond rounding is a warning."""
        rows = torch.arange(min(_COMPARED, len(problem.x))) * len(problem.x) // min(_COMPARED, len(problem.x))
        few = problem.rows(rows)
        (own,), (expected,) = _Evaluation(few, LogSumExp()).whole(), evaluate(dense, few, LogSumExp())
        error = float(((own - expected).abs() / expected.abs().clamp(min=1)).max())
        if not error <= _TOLERANCE[problem.x.dtype]:
            self._mistrusted = f"its results differ from those of the dense engine by {error:.1g} times max(1, |l|) nats"
            warnings.warn(
                f"The native engine is not used: {self._mistrusted}. Please report this.", PrecisionWarning, stacklevel=2
            )


class _Evaluation:
    """An evaluation that adds up the results of several schedules."""

    def __init__(self, problem: Exponents, request: Request, double: bool = False) -> None:
        self.problem, self.request, self._double = problem, request, double
        self._sums: list[Tensor] = []
        N, x = problem.shape[0], problem.x
        width = (request.k,) if isinstance(request, TopK) else ()
        self.values = x.new_empty(N, *width)
        self.labels = torch.empty(N, *width, dtype=torch.int64) if request.rank and not isinstance(request, Statistics) else None
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
        return schedule, self._run(schedule)

    def result(self) -> Result:
        match self.request:
            case LogSumExp():
                return (self.values,)
            case Argmax():
                assert self.labels is not None
                return (self.labels,)
            case TopK():
                assert self.labels is not None
                return self.values, self.labels
            case PointGradient():
                assert self.gradient is not None
                return (self.gradient,)
            case Statistics():
                return tuple(self._sums)

    def _run(self, schedule: Schedule | None) -> Tensor:
        """Evaluate every pair or a schedule; return the minima over its row ranges."""
        sums, minima, odd = _call(self, schedule, self._double)
        if not self._double and sums and not bool(sums[2].isfinite().all()):
            self._double = True
            sums, minima, odd = _call(self, schedule, True)
        if odd:
            self._left(sums, schedule, minima)
        if sums:
            self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        return minima

    def _left(self, sums: list[Tensor], schedule: Schedule | None, minima: Tensor) -> None:
        """Evaluate the rows that the library has left out: in float64, or by the dense engine if that does not suffice."""
        values = self.values if self.values.ndim == 1 else self.values[:, 0]
        rows = torch.arange(len(values)) if schedule is None else schedule.only(schedule.good(minima)).rows
        rows = rows[~values[rows].isfinite()]
        if not len(rows):
            return
        request, few = self.request, self.problem.rows(rows)
        if isinstance(request, Statistics | PointGradient) and request.weights is not None:
            request = replace(request, weights=request.weights[rows])
        if self._double or few.x.dtype == torch.float64:
            found = evaluate(dense, few, request)
        else:
            found = _Evaluation(few, request, double=True).whole()
        match request:
            case Statistics():
                for own, other in zip(sums, found, strict=True):
                    own += other
            case TopK():
                self.values[rows], self.labels[rows] = found
            case Argmax():
                self.labels[rows] = found[0]
            case PointGradient():
                self.gradient[rows] = found[0]
            case LogSumExp():
                self.values[rows] = found[0]


def _call(evaluation: _Evaluation, schedule: Schedule | None, double: bool = False) -> tuple[list[Tensor], Tensor, int]:
    """Call the library: the moments and the total if they are requested, the minima, and the number of rows without value."""
    problem, request = evaluation.problem, evaluation.request
    (N, K, D), x = problem.shape, problem.x
    wide = {"dtype": torch.float64}
    weights = getattr(request, "weights", None)
    unit = 1.0
    if weights is not None:
        weights = weights.contiguous()
        unit, ratio = _unit(weights)
        double = double or ratio > _RATIO
        # Weights of ordinary size need no copy.
        weights = weights if 2.0**-40 <= unit <= 2.0**40 else weights / unit
        unit = 1.0 if 2.0**-40 <= unit <= 2.0**40 else unit
    U = problem.U
    stride = 0 if K > 1 and U.stride(0) == 0 else U[0].numel()
    U = U[:1].contiguous() if stride == 0 else U.contiguous()
    offsets, means, center = problem.offsets.contiguous(), problem.means.contiguous(), problem.center.contiguous()
    family = 0 if problem.is_full else 2 if U.shape[1] == 1 else 1
    sums: list[Tensor] = []
    match request:
        case LogSumExp():
            kind = _LOG_SUM_EXP
        case Argmax():
            kind = _ARGMAX
        case TopK():
            kind = _TOP_K
        case PointGradient():
            kind = _POINT_GRADIENT
        case Statistics():
            kind = _ASSIGNMENTS[request.assignment]
            shape = {0: (K, D, D), 1: (K, D), 2: (K,)}[family]
            sums = [torch.empty(K, **wide), torch.empty(K, D, **wide), torch.empty(shape, **wide), torch.empty((), **wide)]
    S0, S1, S2, total = (_pointer(part) for part in (sums or [None] * 4))
    minima, tensors = torch.empty(0, **wide), []
    if schedule is not None:
        minima = torch.empty(len(schedule.spans), **wide)
        tensors = [part.contiguous() for part in (schedule.spans, schedule.owner, schedule.pointer, schedule.index, schedule.floor)]
    lists = [_pointer(part) for part in tensors] or [None] * 5
    counts = torch.zeros(2, dtype=torch.int64)
    caught: list[BaseException] = []
    callback = _Interrupted(lambda: _poll(caught))
    call = Call(
        kind, family, x.dtype == torch.float64, double, getattr(request, "k", 0), torch.get_num_threads(),
        N, K, D, x.data_ptr(), offsets.data_ptr(), means.data_ptr(), U.data_ptr(), center.data_ptr(), stride,
        _pointer(weights), unit, getattr(request, "seed", 0) & (2**64 - 1), len(minima), *lists, _pointer(minima),
        evaluation.values.data_ptr(), _pointer(evaluation.labels), _pointer(evaluation.gradient), S0, S1, S2, total,
        counts.data_ptr(), counts.data_ptr() + 8, ctypes.cast(callback, ctypes.c_void_p),
    )  # fmt: skip
    library, number = load()
    status = library.gmmkeops_evaluate(ctypes.byref(call), number)
    if caught:
        raise caught[0]
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"The memory does not suffice for sums over {K} components in {D} dimensions.")
    return sums, minima, int(counts[0])


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _unit(weights: Tensor) -> tuple[float, float]:
    """A power of two near the largest weight, and the ratio of the largest to the smallest weight that is not zero."""
    sizes = weights.abs()
    largest = float(sizes.amax()) if len(sizes) else 0.0
    if largest == 0:
        return 1.0, 1.0
    smallest = float(torch.where(sizes > 0, sizes, math.inf).amin())
    return 2.0 ** max(-1000, min(1000, math.frexp(largest)[1])), largest / smallest


def _poll(caught: list[BaseException]) -> int:
    """Let Python handle signals; return whether a handler has raised an exception, which is kept."""
    if threading.current_thread() is not threading.main_thread():
        return 0
    try:
        # Handlers run between two instructions of the interpreter.
        signal.getsignal(signal.SIGINT)
    except BaseException as error:
        caught.append(error)
    return bool(caught)
