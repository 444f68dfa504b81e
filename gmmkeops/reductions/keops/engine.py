r"""The KeOps engine: the exponents as LazyTensor formulas, compiled once per dimension, family and dtype.

.. math:: z = x_i - \mu_j, \qquad y = U_j^\top z, \qquad e = c_j - \tfrac12 |y|^2

float32 coordinates are stored as the sum of two float32 numbers, so that the relative error of :math:`z` is that of float32
also far from the origin. There are two main formulas: a log-sum-exp over j, and a sum over i of
:math:`\exp(e - \ell_i)\, g_i\, (1, z, z z^\top)`.
Spherical factors use the diagonal formula, and tied ones are expanded. This is the only file that imports pykeops, and it does
so on first use. Reference: Charlier et al. 2021, *Kernel operations on the GPU, with autodiff, without memory
overflows* (JMLR 22).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmmkeops.reductions.keops.cache import cache_folder, compiler_failure, refusing_damage, renewed_folder
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.truncation.bounds import Plan
from gmmkeops.reductions.truncation.truncation import Truncation

__all__ = ["NO_SHARE", "Broken", "accurate", "far", "logsumexp", "moments", "point_gradient", "topk", "unavailable"]

# Compile flags worth 1.4-1.7x at D <= 3 (never -ffast-math: with gcc < 13 it sets flush-to-zero for the whole process).
_FLAGS = "-march=native -include math.h -fno-math-errno -fno-trapping-math"

# Rows that are summed in the dtype of the points; these partial sums are added in float64.
_ROWS_PER_SUM = 4096

# Number of thread blocks that fill a GPU; a sum into K rows uses only K / 192 of them.
_BLOCKS_CUDA = 1300

# Largest memory for the partial sums of one call, bytes, and bytes of each number in them (float32 and its float64 copy).
_SLAB, _BYTES = 1 << 26, 12

# Log-sum-exp of padding rows, with which all their responsibilities are zero.
NO_SHARE = 1e30

# Largest condition number of factors for which float32 is accurate enough: 128 costs 2e-5 nats (measured in 3 and 10 dimensions).
_CONDITION = 128.0

# Depth (nats) below the largest possible exponent from which differences of float32 exponents are too coarse.
_DEEPEST = 300.0

_compiled: set[tuple[Any, ...]] = set()

_state: dict[str, Any] = {"reason": None, "lazy": None, "pid": None, "lock": None, "own": False, "folder": None}

# Seconds to wait before an unreadable cache is read again, in case another process is writing it.
_PATIENCE = 0.5

R = TypeVar("R")


def unavailable(device: torch.device) -> str | None:
    """Reason why KeOps cannot run on this device, in one clause, or None if it can (imports pykeops on first use).

    Raises:
        RuntimeError: The process was forked after KeOps had started.
    """
    if _state["lazy"] is None and _state["reason"] is None:
        _state["reason"] = _load()
    if _state["reason"] is not None:
        return _state["reason"]
    if _state["pid"] not in (None, os.getpid()):
        raise RuntimeError(
            "KeOps cannot run in a process forked after it has started (its threads hang there); start workers with the "
            "'spawn' method, or pass backend='dense'."
        )
    if device.type == "cuda":
        pykeops = sys.modules["pykeops"]
        if not pykeops.config.gpu_available:
            return _without_cuda()
    return None


def _without_cuda() -> str:
    """Reason why KeOps does not see CUDA while torch does, with the library that the linker cannot find, in one clause."""
    for name, owner in (("nvrtc", "the CUDA toolkit"), ("cuda", "the NVIDIA driver")):
        if find_library(name) is None:
            return f"pykeops does not see CUDA, though torch does: there is no lib{name}.so of {owner} where the linker looks"
    return "pykeops does not see CUDA, though torch does"


def _load() -> str | None:
    """Import pykeops without output, with its cache in this package's folder; return the reason if that fails."""
    if sys.platform == "win32":
        return "pykeops does not run on native Windows"
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed (pip install pykeops)"
    if "pykeops" not in sys.modules and shutil.which(os.environ.get("CXX", "c++")) is None and not shutil.which("g++"):
        return "no C++ compiler was found (install g++)"
    if "pykeops" in sys.modules and not _state["own"]:
        # The user has imported pykeops before: its cache folder belongs to the user and is not repaired.
        return _begin(None)
    _state["own"] = True
    flags = os.environ.get("CXXFLAGS", _FLAGS)
    folder = cache_folder(flags)
    if " " in str(folder):
        return f"the cache folder {folder} has a space in its name (set KEOPS_CACHE_FOLDER to one without)"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if (reason := _unwritable(folder)) is not None:
        return reason
    reason = _begin(folder)
    if reason is not None and any(folder.rglob("*.pkl")):
        # A truncated list of formulas breaks the import. Another process may be writing it.
        time.sleep(_PATIENCE)
        reason = _begin(folder)
        if reason is not None and (renewed := renewed_folder(folder, flags)) is not None:
            reason = _begin(renewed)
    if reason is not None and (compiler := shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")):
        # The import itself runs the compiler, which may be the reason.
        return compiler_failure(compiler, f"{flags} -shared -fPIC") or reason
    return reason


def _begin(folder: Path | None) -> str | None:
    """Import pykeops with a cache folder (None for its own), and store it; return the reason if that fails."""
    with warnings.catch_warnings():
        # A failed import leaves the unreadable file open.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            lazy = _import(folder)
            lock = Path(sys.modules["pykeops"].get_build_folder()) / "gmmkeops.lock"
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else ""
            return f"importing pykeops failed ({type(error).__name__}: {said})"
    _state.update(lazy=lazy, lock=lock, folder=folder)
    return None


def _import(folder: Path | None) -> Any:
    if folder is None:
        return importlib.import_module("pykeops.torch").LazyTensor
    for name in [name for name in sys.modules if name.split(".")[0] in ("pykeops", "keopscore")]:
        del sys.modules[name]
    if _state["folder"] is not None:
        # KeOps finds formulas by name on this path, from which a folder that is no longer used must be removed.
        sys.path[:] = [entry for entry in sys.path if not entry.startswith(f"{_state['folder']}{os.sep}")]
    settings = {
        "KEOPS_CACHE_FOLDER": str(folder),
        "CXXFLAGS": os.environ.get("CXXFLAGS", _FLAGS),
        "KEOPS_VERBOSE": "0",
        "PYKEOPS_VERBOSE": "0",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with refusing_damage():
            return importlib.import_module("pykeops.torch").LazyTensor
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


class Broken(RuntimeError):
    """KeOps cannot compile or load a formula; :func:`unavailable` returns the reason from then on."""


class _Unusable(Exception):
    """A formula could not be compiled or loaded."""


def _renewed() -> bool:
    """Import KeOps again with a cache folder without damaged files; return whether that succeeded."""
    if _state["folder"] is None:
        return False
    folder = renewed_folder(_state["folder"], os.environ.get("CXXFLAGS", _FLAGS))
    importlib.invalidate_caches()
    return folder is not None and _begin(folder) is None


def _unwritable(folder: Path) -> str | None:
    """Reason why KeOps cannot compile into a folder, in one clause; None if it can."""
    if os.access(folder, os.W_OK):
        return None
    return f"its cache folder {folder} cannot be written to (set KEOPS_CACHE_FOLDER to one that can)"


def _failure() -> str:
    """Reason why a formula cannot be compiled or loaded although the compiler works, in one clause."""
    folder = _state["lock"].parent
    return _unwritable(folder) or (
        f"it cannot compile or load a formula in {folder} (set KEOPS_CACHE_FOLDER to an empty folder; if that does not help, "
        "install the headers of Python)"
    )


def _healing(function: Callable[..., R]) -> Callable[..., R]:
    """Decorator that repeats a call with newly compiled formulas if those in the cache folder do not work.

    Raises:
        Broken: The compiler fails, or the second call does.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> R:
        try:
            return function(*arguments)
        except _Unusable as unusable:
            config = sys.modules["pykeops"].config.pykeops_base
            reason = compiler_failure(config.get_cxx_compiler(), config.get_cpp_flags())
            if reason is None and _renewed():
                with contextlib.suppress(_Unusable):
                    return function(*arguments)
            _state["reason"] = reason or _failure()
            raise Broken(_state["reason"]) from unusable

    return call


@contextlib.contextmanager
def _guarded(problem: Exponents, *formula: Any) -> Iterator[Any]:
    """Context of one call of a formula: a file lock while it may be compiled, and errors of KeOps as ``_Unusable``.

    KeOps launches its kernels on the default stream of CUDA, which does not wait for what torch has queued on another one,
    and leaves the context of the device that it used current. It synchronizes that device before it returns.
    """
    import fcntl

    _state["pid"] = os.getpid()
    key = (*formula, problem.shape[2], problem.is_full, problem.x.dtype, problem.x.device.type)
    try:
        with contextlib.ExitStack() as stack:
            if problem.x.is_cuda:
                stack.enter_context(torch.cuda.device(problem.x.device))
            if key not in _compiled:
                lock = stack.enter_context(open(_state["lock"], "a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                stack.enter_context(refusing_damage())
            yield _state["lazy"]
        _compiled.add(key)
    except (ImportError, OSError, ValueError, SyntaxError) as error:
        raise _Unusable from error


class _Formula:
    """Residuals and exponents as LazyTensors: over N points, over batches of them, or over the kd-tree leaves of a schedule."""

    def __init__(
        self, LazyTensor: Any, problem: Exponents, batches: int | None = None, plan: Plan | None = None
    ) -> None:
        _, K, D = problem.shape
        self.kind: dict[str, Any] = {"dtype": problem.x.dtype, "device": problem.x.device}
        x = problem.x if plan is None else problem.x[plan.rows]
        x = x.double() - problem.centre
        U = problem.U.expand(K, D) if problem.U.shape[1:] == (1,) else problem.U
        # matvecmult reads its matrix row by row, so Uᵀ is stored.
        U = U.mT if problem.is_full else U
        self.lead: tuple[int, ...] = ()
        self.rows = len(x)
        if batches is not None:
            self.lead, self.rows = (1,), -(-len(x) // batches)
            x = _padded(x, batches * self.rows).view(batches, self.rows, D)
        self.LazyTensor, self.batches, self.plan, self.full = LazyTensor, batches, plan, problem.is_full
        heads = x.to(problem.x.dtype), problem.means.to(problem.x.dtype)
        self.z = LazyTensor(heads[0].unsqueeze(-2).contiguous()) - self.j(heads[1])
        if problem.x.dtype == torch.float32:
            # A second float32 number for each coordinate, so that residuals are accurate far from the center.
            rests = x - heads[0], problem.means - heads[1]
            rest = rests[0].to(heads[0]).unsqueeze(-2).contiguous()
            self.z = self.z + (LazyTensor(rest) - self.j(rests[1]))
        U_j = self.j(U.reshape(K, -1))
        y = U_j.matvecmult(self.z) if self.full else U_j * self.z
        self.e = self.j(problem.offsets[:, None]) - 0.5 * (y**2).sum(-1)
        if plan is not None:
            self.e.ranges = plan.ranges()

    def j(self, values: Tensor) -> Any:
        """Values of each component as a LazyTensor; with a schedule, those of its candidate lists one after the other."""
        values = values if self.plan is None else values[self.plan.index]
        return self.LazyTensor(values.to(**self.kind).reshape(*self.lead, 1, len(values), -1).contiguous())

    def i(self, values: Tensor, padding: float = 0.0) -> Any:
        """A value of each point as a LazyTensor; ``padding`` is the value at padding points."""
        values = (values if self.plan is None else values[self.plan.rows]).to(self.kind["dtype"])
        if self.batches is not None:
            values = _padded(values, self.batches * self.rows, padding).view(self.batches, self.rows)
        return self.LazyTensor(values[..., None, None].contiguous())

    def shares(self, values: Tensor) -> Any:
        """Responsibilities exp(e - ℓ), given ℓ; zero at padding points, where an exponent may exceed the dtype's range."""
        return (self.e - self.i(values, NO_SHARE)).exp()


def accurate(problem: Exponents) -> Exponents:
    """The same problem, in float64 if float32 residuals are not accurate enough.

    Rounding x - μ to float32 changes an exponent by a multiple of the factor's condition number, at any scale.
    """
    if problem.x.dtype != torch.float32 or not problem.is_full:
        return problem
    inverse, _ = torch.linalg.inv_ex(problem.U)
    condition = (problem.U.abs().mT @ inverse.abs().mT).sum(2).amax()
    return problem if bool(condition <= _CONDITION) else replace(problem, x=problem.x.double())


def far(problem: Exponents, values: Tensor) -> Tensor:
    """Rows (n,) whose log-sum-exps or largest exponents (N,) are too far from zero for differences of float32 exponents."""
    if problem.x.dtype != torch.float32:
        return (~torch.isfinite(values)).nonzero()[:, 0]
    return (~((values - problem.offsets.amax()).abs() <= _DEEPEST)).nonzero()[:, 0]


def _padded(values: Tensor, rows: int, padding: float = 0.0) -> Tensor:
    return torch.cat([values, values.new_full((rows - values.shape[0], *values.shape[1:]), padding)])


def _called(problem: Exponents, reduction: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Call a reduction of KeOps after the operations that torch has queued for its inputs."""
    if problem.x.is_cuda:
        torch.cuda.current_stream(problem.x.device).synchronize()
    return reduction(*arguments, **options)


def _width(problem: Exponents) -> int:
    """Number of entries in the moments of one component."""
    D = problem.shape[2]
    return 1 + D + (D * D if problem.is_full else D)


def _slabs(problem: Exponents, plan: Plan) -> Iterator[Plan]:
    """Parts of a schedule, each with so few listed components that their moments fit into the memory of one slab."""
    most = max(1, _SLAB // (_BYTES * _width(problem)))
    if len(plan.index) <= most:
        yield plan
        return
    cuts, size = [0], 0
    for stretch, length in enumerate(plan.lengths.tolist()):
        if size and size + length > most:
            cuts.append(stretch)
            size = 0
        size += length
    for first, last in pairwise([*cuts, len(plan.owner)]):
        chosen = torch.zeros_like(plan.owner, dtype=torch.bool)
        chosen[first:last] = True
        yield plan.only(chosen)


def _looked(
    problem: Exponents, blocks: Truncation | None, single: bool, look: Callable[[Plan | None], tuple[Tensor, ...]]
) -> tuple[tuple[Tensor, ...], list[Plan] | None]:
    """Apply ``look`` to all points with truncation; return its results and the schedules that were used.

    The first result is compared with the bounds of the schedules: leaves whose lists were too short are repeated with longer
    lists. Without blocks, or if truncation does not save time, ``look`` is called once and the schedules are None.
    """
    plan = None if blocks is None else blocks.begin(problem, single)
    if blocks is None or plan is None:
        return look(None), None
    found: tuple[Tensor, ...] = ()
    passed = []
    while plan is not None:
        slabs = [look(part) for part in _slabs(problem, plan)]
        parts = tuple(torch.cat(columns) for columns in zip(*slabs, strict=True))
        if not found:
            found = tuple(part.new_empty(len(problem.x), *part.shape[1:]) for part in parts)
        for all_, part in zip(found, parts, strict=True):
            all_[plan.rows] = part
        judged = parts[0] if parts[0].ndim == 1 else parts[0][:, -1]
        minima = plan.minima(judged)
        passed.append(plan.only(blocks.good(problem, plan, minima, single)))
        plan = blocks.again(problem, plan, minima, single)
    return found, passed


@_healing
def logsumexp(problem: Exponents, blocks: Truncation | None = None) -> tuple[Tensor, list[Plan] | None]:
    """Log-sum-exps ℓ (N,), nats, in the dtype of the points (not finite where float32 overflows), and the schedules or None."""

    def look(plan: Plan | None) -> tuple[Tensor]:
        return (_called(problem, _Formula(LazyTensor, problem, plan=plan).e.logsumexp, dim=1).view(-1),)

    with _guarded(problem, "logsumexp") as LazyTensor:
        found, plans = _looked(problem, blocks, False, look)
    return found[0], plans


@_healing
def topk(problem: Exponents, k: int, blocks: Truncation | None = None) -> tuple[Tensor, Tensor]:
    """The k largest exponents (N, k), nats, in descending order, and their indices (N, k), int64."""

    def look(plan: Plan | None) -> tuple[Tensor, Tensor]:
        values, places = _called(problem, (-_Formula(LazyTensor, problem, plan=plan).e).Kmin_argKmin, k, dim=1)
        # Positions beyond the end of a list shorter than k are meaningless.
        index = places.long() if plan is None else plan.index[places.long().clamp(0, len(plan.index) - 1)]
        return -values, index

    with _guarded(problem, "topk", k) as LazyTensor:
        (values, indices), _ = _looked(problem, blocks, True, look)
    return values, indices


@_healing
def moments(
    problem: Exponents, values: Tensor, weights: Tensor, plans: list[Plan] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """S0 (K,), S1 (K, D), S2 (K, D, D) or (K, D) about the components' means, float64, given ℓ (N,) and g (N,).

    The points are split into batches, or into the kd-tree leaves of schedules, so that each partial sum has few rounding errors
    and a GPU is filled. Partial sums are computed in blocks to limit their memory.
    """
    N, K, D = problem.shape
    width = _width(problem)

    def look(problem: Exponents, rows: slice, batches: int | None, plan: Plan | None) -> Tensor:
        f = _Formula(LazyTensor, problem, batches, plan)
        r = f.shares(values[rows]) * f.i(weights[rows])
        square = f.z.tensorprod(f.z) if f.full else f.z * f.z
        summand = (r * LazyTensor.concatenate((f.z, square), axis=-1)).concat(r)
        return _called(problem, summand.sum, dim=1 if plan is None else 0).double()

    sums = torch.zeros(K, width, dtype=torch.float64, device=problem.x.device)
    with _guarded(problem, "moments", plans is None) as LazyTensor:
        if plans is None:
            batches = -(-N // _ROWS_PER_SUM)
            if problem.x.is_cuda:
                batches = min(N, max(batches, -(-_BLOCKS_CUDA // -(-K // 192))))
            # Rows of a batch, components of a slab, and rows of all its batches.
            size = -(-N // batches)
            some = max(1, min(K, _SLAB // (_BYTES * width)))
            most = size * max(1, _SLAB // (_BYTES * width * some))
            for first in range(0, K, some):
                part = problem.components(slice(first, first + some))
                for start in range(0, N, most):
                    rows = slice(start, min(N, start + most))
                    partial = look(part.rows(rows), rows, -(-(rows.stop - start) // size), None)
                    sums[first : first + some] += partial.sum(0)
        else:
            for plan in plans:
                for slab in _slabs(problem, plan):
                    sums.index_add_(0, slab.index, look(problem, slice(None), None, slab))
    S1, S2, S0 = sums[:, :D], sums[:, D:-1], sums[:, -1]
    return S0, S1, S2.reshape(K, D, D) if problem.is_full else S2


@_healing
def point_gradient(problem: Exponents, values: Tensor, weights: Tensor, plans: list[Plan] | None = None) -> Tensor:
    """∂(Σ g ℓ)/∂x (N, D), in the dtype of the points, given ℓ (N,)."""
    N, K, D = problem.shape
    P = problem.U @ problem.U.mT if problem.is_full else problem.U.expand(K, D) ** 2
    averages = problem.x.new_empty(N, D)
    with _guarded(problem, "point_gradient") as LazyTensor:
        for plan in [None] if plans is None else chain.from_iterable(_slabs(problem, plan) for plan in plans):
            f = _Formula(LazyTensor, problem, plan=plan)
            P_j = f.j(P.reshape(K, -1))
            pull = P_j.matvecmult(f.z) if f.full else P_j * f.z
            rows = slice(None) if plan is None else plan.rows
            averages[rows] = _called(problem, (f.shares(values) * pull).sum, dim=1).view(-1, D)
    return -weights.to(averages)[:, None] * averages
