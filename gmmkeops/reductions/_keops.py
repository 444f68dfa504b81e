r"""The KeOps engine: the exponents as LazyTensor formulas, compiled once per dimension, family and dtype.

.. math:: z = x_i - \mu_j, \qquad y = U_j^\top z, \qquad e = c_j - \tfrac12 |y|^2

float32 coordinates are held in two parts, so that :math:`z` is as accurate as float32 is for its own size, wherever it lies.
Two formulas do the work: a log-sum-exp over j, and one Sum over i of :math:`\exp(e - \ell_i)\, g_i\, (1, z, z z^\top)`.
Spherical factors go through the diagonal formula and tied ones are expanded. This is the only file that imports pykeops,
and it does so on first use. Reference: Charlier et al. 2021, *Kernel operations on the GPU, with autodiff, without memory
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

from gmmkeops.reductions._exponents import Exponents
from gmmkeops.reductions._keops_cache import cache_folder, compiler_failure, refusing_damage, renewed_folder
from gmmkeops.reductions._lists import Plan
from gmmkeops.reductions._truncation import Truncation

__all__ = ["NO_SHARE", "Broken", "accurate", "far", "logsumexp", "moments", "point_gradient", "topk", "unavailable"]

# Compile flags worth 1.4-1.7x at D <= 3 (never -ffast-math: with gcc < 13 it sets flush-to-zero for the whole process).
_FLAGS = "-march=native -include math.h -fno-math-errno -fno-trapping-math"
# Rows that one partial sum adds up in the points' own dtype; partial sums meet in float64.
_ROWS_PER_SUM = 4096
# Blocks that keep a GPU busy; a Sum into K rows alone fills K / 192 of them.
_BLOCKS_CUDA = 1300
# Most memory for the partial sums of one call, bytes, and what each of their numbers takes, in float32 and in float64.
_SLAB, _BYTES = 1 << 26, 12
# A log-sum-exp that makes every responsibility of a padding row zero, whatever its exponents.
NO_SHARE = 1e30
# Largest condition number of factors for which float32 will do: 128 costs 2e-5 nats (measured, in 3 and 10 dimensions).
_CONDITION = 128.0
# Nats below the largest possible exponent from which on float32 exponents are too coarse to be subtracted.
_DEEPEST = 300.0

_compiled: set[tuple[Any, ...]] = set()
_state: dict[str, Any] = {"reason": None, "lazy": None, "pid": None, "lock": None, "own": False, "folder": None}
# Seconds after which a cache that could not be read, perhaps because another process was writing it, is read again.
_PATIENCE = 0.5

R = TypeVar("R")


def unavailable(device: torch.device) -> str | None:
    """Why KeOps cannot run on this device, in one clause, or None when it can (imports pykeops on first use).

    Raises:
        RuntimeError: In a process forked after KeOps has started.
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
    """Return the library that KeOps misses on a machine where torch sees CUDA, in one clause, found as the linker does."""
    for name, owner in (("nvrtc", "the CUDA toolkit"), ("cuda", "the NVIDIA driver")):
        if find_library(name) is None:
            return f"pykeops does not see CUDA, though torch does: there is no lib{name}.so of {owner} where the linker looks"
    return "pykeops does not see CUDA, though torch does"


def _load() -> str | None:
    """Imports pykeops quietly, with its cache in our own folder; returns the reason if that fails."""
    if sys.platform == "win32":
        return "pykeops does not run on native Windows"
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed (pip install pykeops)"
    if "pykeops" not in sys.modules and shutil.which(os.environ.get("CXX", "c++")) is None and not shutil.which("g++"):
        return "no C++ compiler was found (install g++)"
    if "pykeops" in sys.modules and not _state["own"]:
        # The user has imported it: its cache folder and what is damaged there are the user's.
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
        # A list of formulas that is cut short breaks the import. Perhaps another process is writing it just now.
        time.sleep(_PATIENCE)
        reason = _begin(folder)
        if reason is not None and (renewed := renewed_folder(folder, flags)) is not None:
            reason = _begin(renewed)
    if reason is not None and (compiler := shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")):
        # The import itself runs the compiler.
        return compiler_failure(compiler, f"{flags} -shared -fPIC") or reason
    return reason


def _begin(folder: Path | None) -> str | None:
    """Imports pykeops with a cache folder, or as it is, and remembers it; returns the reason if that fails."""
    with warnings.catch_warnings():
        # An import that fails leaves the file open that it could not read.
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
        # KeOps finds formulas by name on this path, where those of a folder that is no longer used must not be.
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
    """KeOps cannot compile or load a formula; :func:`unavailable` says why from then on."""


class _Unusable(Exception):
    """A formula could not be compiled or loaded."""


def _renewed() -> bool:
    """Begins again with a cache folder in which nothing is damaged; returns whether there is one."""
    if _state["folder"] is None:
        return False
    folder = renewed_folder(_state["folder"], os.environ.get("CXXFLAGS", _FLAGS))
    importlib.invalidate_caches()
    return folder is not None and _begin(folder) is None


def _unwritable(folder: Path) -> str | None:
    """Why KeOps cannot compile into a folder, in one clause; None where it can."""
    if os.access(folder, os.W_OK):
        return None
    return f"its cache folder {folder} cannot be written to (set KEOPS_CACHE_FOLDER to one that can)"


def _failure() -> str:
    """Why a formula cannot be compiled or loaded though the compiler works, in one clause."""
    folder = _state["lock"].parent
    return _unwritable(folder) or (
        f"it cannot compile or load a formula in {folder} (set KEOPS_CACHE_FOLDER to an empty folder; if that does not help, "
        "install the headers of Python)"
    )


def _healing(function: Callable[..., R]) -> Callable[..., R]:
    """Calls a function once more, with formulas that are compiled anew, where those in the cache folder do not work.

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
    """One call of a formula: while it may have to be compiled one process works at a time; nothing foreign escapes.

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
    """The residuals, their exponents and the family: over N points, over B batches of them, or over the boxes of a plan."""

    def __init__(
        self, LazyTensor: Any, problem: Exponents, batches: int | None = None, plan: Plan | None = None
    ) -> None:
        _, K, D = problem.shape
        self.kind: dict[str, Any] = {"dtype": problem.x.dtype, "device": problem.x.device}
        x = problem.x if plan is None else problem.x[plan.rows]
        x = x.double() - problem.centre
        U = problem.U.expand(K, D) if problem.U.shape[1:] == (1,) else problem.U
        # matvecmult reads its matrix row by row, so Uᵀ is what is laid out.
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
            # Two parts of each coordinate, so that residuals keep their digits far from the center.
            rests = x - heads[0], problem.means - heads[1]
            rest = rests[0].to(heads[0]).unsqueeze(-2).contiguous()
            self.z = self.z + (LazyTensor(rest) - self.j(rests[1]))
        U_j = self.j(U.reshape(K, -1))
        y = U_j.matvecmult(self.z) if self.full else U_j * self.z
        self.e = self.j(problem.offsets[:, None]) - 0.5 * (y**2).sum(-1)
        if plan is not None:
            self.e.ranges = plan.ranges()

    def j(self, values: Tensor) -> Any:
        """Numbers of each component as a LazyTensor; those of a plan's lists one after the other."""
        values = values if self.plan is None else values[self.plan.index]
        return self.LazyTensor(values.to(**self.kind).reshape(*self.lead, 1, len(values), -1).contiguous())

    def i(self, values: Tensor, padding: float = 0.0) -> Any:
        """A per-point number as a LazyTensor, and what it is at padding points."""
        values = (values if self.plan is None else values[self.plan.rows]).to(self.kind["dtype"])
        if self.batches is not None:
            values = _padded(values, self.batches * self.rows, padding).view(self.batches, self.rows)
        return self.LazyTensor(values[..., None, None].contiguous())

    def shares(self, values: Tensor) -> Any:
        """Responsibilities exp(e - ℓ), given ℓ; none at padding points, where an exponent may be beyond the dtype's range."""
        return (self.e - self.i(values, NO_SHARE)).exp()


def accurate(problem: Exponents) -> Exponents:
    """The same problem in a dtype in which residuals of float32 do not lose what matters: their own, or float64.

    Rounding x - μ to float32 changes an exponent by a multiple of the factor's condition number, whatever its scale.
    """
    if problem.x.dtype != torch.float32 or not problem.is_full:
        return problem
    inverse, _ = torch.linalg.inv_ex(problem.U)
    condition = (problem.U.abs().mT @ inverse.abs().mT).sum(2).amax()
    return problem if bool(condition <= _CONDITION) else replace(problem, x=problem.x.double())


def far(problem: Exponents, values: Tensor) -> Tensor:
    """Rows (n,) at which log-sum-exps or largest exponents (N,) are too large for differences of float32 exponents."""
    if problem.x.dtype != torch.float32:
        return (~torch.isfinite(values)).nonzero()[:, 0]
    return (~((values - problem.offsets.amax()).abs() <= _DEEPEST)).nonzero()[:, 0]


def _padded(values: Tensor, rows: int, padding: float = 0.0) -> Tensor:
    return torch.cat([values, values.new_full((rows - values.shape[0], *values.shape[1:]), padding)])


def _called(problem: Exponents, reduction: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """A reduction of KeOps, after what torch has queued for its inputs is done."""
    if problem.x.is_cuda:
        torch.cuda.current_stream(problem.x.device).synchronize()
    return reduction(*arguments, **options)


def _width(problem: Exponents) -> int:
    """Numbers in the moments of one component."""
    D = problem.shape[2]
    return 1 + D + (D * D if problem.is_full else D)


def _slabs(problem: Exponents, plan: Plan) -> Iterator[Plan]:
    """Parts of a plan, each with so few components in its lists that their numbers fit into one slab of memory."""
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
    """What ``look`` finds of all points, the first of it being judged by the plans; and the plans it was found with.

    A plan's part that fails is looked at again with longer lists. Without blocks, or where they do not pay, there are none.
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
    """ℓ (N,), nats, in the dtype of the points, not finite where float32 overflows; and the plans by which it was found."""

    def look(plan: Plan | None) -> tuple[Tensor]:
        return (_called(problem, _Formula(LazyTensor, problem, plan=plan).e.logsumexp, dim=1).view(-1),)

    with _guarded(problem, "logsumexp") as LazyTensor:
        found, plans = _looked(problem, blocks, False, look)
    return found[0], plans


@_healing
def topk(problem: Exponents, k: int, blocks: Truncation | None = None) -> tuple[Tensor, Tensor]:
    """The k largest exponents (N, k), nats, in falling order, and their indices (N, k)."""

    def look(plan: Plan | None) -> tuple[Tensor, Tensor]:
        values, places = _called(problem, (-_Formula(LazyTensor, problem, plan=plan).e).Kmin_argKmin, k, dim=1)
        # Of a list shorter than k the places beyond it mean nothing.
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

    The points are split into batches, or into the boxes of plans: each sums few enough rows to keep its digits, and a GPU
    has enough rows to fill. The partial sums of some of them are made at a time, so that they take little memory.
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
