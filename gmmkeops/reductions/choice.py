"""Choice of the engine: one table, and what happens where the preferred engine cannot be used."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_choice, warn
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.keops import keops
from gmmkeops.reductions.native import native
from gmmkeops.reductions.problem import Exponents, Form
from gmmkeops.reductions.protocol import Engine, Request, Statistics
from gmmkeops.reductions.triton import triton

__all__ = ["BACKENDS", "ENGINES", "TABLE", "Line", "choose", "engine", "fallback", "unavailable"]

# Engines by name. The dense engine supports all requests on all devices.
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (native, keops, triton, dense)}

BACKENDS = ("auto", *ENGINES)


@dataclass(frozen=True)
class Line:
    """The engines that ``backend="auto"`` uses for some problems, and why.

    Args:
        device: Type of the device.
        full: Whether the factors are matrices.
        features: Largest number of features D.
        engines: Names of the engines, the fastest one first. The next ones are used where it cannot run.
        figure: Measured times behind this order.
    """

    device: str
    full: bool
    features: float
    engines: tuple[str, ...]
    figure: str


# The first line that applies is used. Times on a CPU are those of an EM iteration with two threads (bench/results/report.md);
# those on CUDA are calls of moments of 1e6 points and 1000 components on an H200 (bench/results/gpu.md).
TABLE = (
    Line("cpu", True, math.inf, ("native", "dense"), "D = 3, 3e5 x 30: native 1.89 ms, dense 33.7 ms, keops 93.6 ms"),
    Line("cpu", False, math.inf, ("native", "dense"), "D = 8, 1e5 x 64: native 2.3 ms, dense 26.5 ms, keops 143 ms"),
    Line("cuda", True, 8, ("triton", "keops", "dense"), "D = 3: triton 3.45 ms, keops 7.08 ms, dense 28.3 ms"),
    Line("cuda", False, 32, ("triton", "keops", "dense"), "D = 16: triton 11.6 ms, keops 15.3 ms, dense 30.2 ms"),
    Line("cuda", True, math.inf, ("triton", "dense"), "D = 16: triton 24.4 ms, dense 39.8 ms, keops 81.8 ms"),
    Line("cuda", False, math.inf, ("triton", "dense"), "D = 64: triton 11.6 ms, dense 37.8 ms"),
)

_told: set[str] = set()

_logger = logging.getLogger("gmmkeops")


def engine(
    problem: Any,
    backend: str = "auto",
    *,
    features: int = 0,
    full: bool = True,
    dtype: torch.dtype = torch.float32,
    assignment: str = "soft",
) -> str:
    """Return the name of the engine that will be used: ``"native"``, ``"keops"``, ``"triton"`` or ``"dense"``.

    On a CPU ``"auto"`` chooses the native engine, and the dense engine where the native one has not been compiled. On CUDA it
    chooses Triton; where Triton cannot run, KeOps in few dimensions (up to 8 with full factors, 32 with diagonal ones) if it is
    installed, and the dense engine otherwise. ``gmmkeops doctor --measure`` compares the engines on this machine.

    Args:
        problem: The points (N, D), validated exponents, or a device.
        backend: ``"auto"``, ``"native"``, ``"keops"``, ``"triton"`` or ``"dense"``.
        features: Number of features D, if ``problem`` is a device.
        full: Whether factors are full matrices, if ``problem`` is not exponents.
        dtype: Data type of the points, if ``problem`` is a device.
        assignment: Assignment of the moments that will be computed: ``"soft"``, ``"hard"`` or ``"stochastic"``.

    Raises:
        ValueError: The name of the backend is unknown.

    Warns:
        UserWarning: An engine was chosen but cannot run, so that another one is used. Each reason is reported once.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.engine(torch.zeros(5, 3))
        'native'
    """
    form = _form(problem, features, full, dtype)
    return _chosen(form, Statistics(assignment=assignment), backend)[0].name


def fallback(
    problem: Any,
    backend: str = "auto",
    *,
    features: int = 0,
    full: bool = True,
    dtype: torch.dtype = torch.float32,
    assignment: str = "soft",
) -> str | None:
    """Return the reason why the preferred engine is not used; None if it is. Arguments and warnings as for :func:`engine`.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.fallback(torch.zeros(5, 3)) is None
        True
    """
    form = _form(problem, features, full, dtype)
    return _chosen(form, Statistics(assignment=assignment), backend)[1]


def unavailable(name: str, x: Tensor, *, full: bool = True) -> str | None:
    """Return the reason, one clause, why an engine cannot compute moments of points (N, D); None if it can."""
    found, form = ENGINES[name], _form(x, 0, full, x.dtype)
    return found.unavailable(form.device) or found.unsupported(form, Statistics())


def _form(problem: Any, features: int, full: bool, dtype: torch.dtype) -> Form:
    if isinstance(problem, Exponents):
        return problem.form
    if isinstance(problem, Tensor):
        return Form(problem.device, problem.dtype, len(problem), 1, problem.shape[1], full)
    return Form(problem, dtype, 1, 1, features, full)


def choose(problem: Exponents, request: Request, backend: str) -> Engine:
    """Return the engine that computes a request: the first of the preferred ones that supports the request and can run.

    Warns:
        UserWarning: As for :func:`engine`.
    """
    return _chosen(problem.form, request, backend)[0]


def _chosen(form: Form, request: Request, backend: str) -> tuple[Engine, str | None]:
    """Return the engine, and why it is not the preferred one; each such reason is reported once."""
    if not isinstance(backend, str):
        as_choice(backend, "backend", BACKENDS)
    missed: tuple[Engine, str, bool] | None = None
    for name in _preferred(form.device.type, form.full, form.features, backend):
        found = ENGINES[name]
        clause = found.unsupported(form, request)
        is_missing = clause is None and (clause := found.unavailable(form.device)) is not None
        if clause is None:
            break
        if missed is None:
            missed = found, clause, is_missing
    return found, None if missed is None else _reported(*missed, found, backend)


def _reported(missed: Engine, clause: str, is_missing: bool, found: Engine, backend: str) -> str:
    """Return why the preferred engine is not used; report it if it has not been reported: a failure by a warning."""
    why = clause
    if is_missing:
        why = f"{missed.title} {'is the faster engine here' if backend == 'auto' else 'was requested'} but {clause}"
    if clause not in _told:
        _told.add(clause)
        message = f"{why}; using {'the dense engine' if found is dense else found.title}."
        if is_missing:
            warn(message, UserWarning)
        else:
            _logger.info(message)
    return why


@functools.lru_cache(maxsize=256)
def _preferred(device: str, full: bool, features: int, backend: str) -> tuple[str, ...]:
    """Return the names of the engines in the order of preference."""
    if backend != "auto":
        return as_choice(backend, "backend", ("auto", *ENGINES)), dense.name
    for line in TABLE:
        if line.device == device and line.full == full and features <= line.features:
            return line.engines
    return (dense.name,)
