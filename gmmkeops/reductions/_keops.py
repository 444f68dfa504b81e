r"""The KeOps engine: the exponents as LazyTensor formulas, compiled once per dimension, family and dtype.

.. math:: z = x_i - \mu_j, \qquad y = U_j^\top z, \qquad e = c_j - \tfrac12 |y|^2

Two formulas do the work: a log-sum-exp over j, and one Sum over i of :math:`\exp(e - \ell_i)\, g_i\, (1, z, z z^\top)`.
Spherical factors go through the diagonal formula and tied ones are expanded. This is the only file that imports pykeops,
and it does so on first use. Reference: Charlier et al. 2021, *Kernel operations on the GPU, with autodiff, without memory
overflows* (JMLR 22).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions._exponents import Exponents

__all__ = ["argmax", "logsumexp", "moments", "point_gradient", "topk", "unavailable"]

# Compile flags worth 1.4-1.7x at D <= 3 (never -ffast-math: with gcc < 13 it sets flush-to-zero for the whole process).
_FLAGS = "-march=native -include math.h -fno-math-errno -fno-trapping-math"
# Rows that one partial sum adds up in the points' own dtype; partial sums meet in float64.
_ROWS_PER_SUM = 4096
# Blocks that keep a GPU busy; a Sum into K rows alone fills K / 192 of them.
_BLOCKS_CUDA = 1300

_compiled: set[tuple[Any, ...]] = set()
_state: dict[str, Any] = {"reason": None, "lazy": None, "pid": None, "lock": None}


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
            return "pykeops does not see CUDA, though torch does (are nvcc's headers and libnvrtc installed?)"
    return None


def _load() -> str | None:
    """Imports pykeops quietly, with its cache in our own folder; returns the reason if that fails."""
    if sys.platform == "win32":
        return "pykeops does not run on native Windows"
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed (pip install pykeops)"
    if "pykeops" not in sys.modules and shutil.which(os.environ.get("CXX", "c++")) is None and not shutil.which("g++"):
        return "no C++ compiler was found (install g++)"
    settings, folder = {}, None
    flags = os.environ.get("CXXFLAGS", _FLAGS)
    if "pykeops" not in sys.modules:
        if "KEOPS_CACHE_FOLDER" not in os.environ:
            base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
            folder = base / "gmmkeops" / f"keops-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
            if " " in str(folder):
                return f"the cache folder {folder} has a space in its name (set KEOPS_CACHE_FOLDER to one without)"
            settings["KEOPS_CACHE_FOLDER"] = str(folder)
        settings |= {"CXXFLAGS": flags, "KEOPS_VERBOSE": "0", "PYKEOPS_VERBOSE": "0"}
    try:
        try:
            lazy = _import(settings)
        except Exception:
            if folder is None:
                raise
            # A cache that was cut short while being written breaks the import itself: ours can be made anew.
            shutil.rmtree(folder, ignore_errors=True)
            lazy = _import(settings)
    except Exception as error:
        return f"importing pykeops failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    _state["lazy"] = lazy
    _state["lock"] = Path(sys.modules["pykeops"].get_build_folder()) / "gmmkeops.lock"
    return None


def _import(settings: dict[str, str]) -> Any:
    for name in [name for name in sys.modules if settings and name.split(".")[0] in ("pykeops", "keopscore")]:
        del sys.modules[name]
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        return importlib.import_module("pykeops.torch").LazyTensor
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _guarded(problem: Exponents, *formula: Any) -> Iterator[Any]:
    """One call of a formula: while it may have to be compiled one process works at a time; nothing foreign escapes."""
    import fcntl

    _state["pid"] = os.getpid()
    key = (*formula, problem.shape[2], problem.is_full, problem.x.dtype, problem.x.device.type)
    try:
        if key in _compiled:
            yield _state["lazy"]
            return
        with open(_state["lock"], "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield _state["lazy"]
        _compiled.add(key)
    except (ImportError, OSError) as error:
        raise RuntimeError(
            "KeOps could not compile or load its formula; check that g++ works and that the cache folder "
            f"{_state['lock'].parent} is writable, or pass backend='dense'."
        ) from error


class _Formula:
    """The residuals, their exponents and the family, over N points, or over B batches of them."""

    def __init__(self, LazyTensor: Any, problem: Exponents, batches: int | None = None) -> None:
        N, K, D = problem.shape
        kind = {"dtype": problem.x.dtype, "device": problem.x.device}
        x = (problem.x.double() - problem.centre).to(problem.x.dtype)
        U = problem.U.expand(K, D) if problem.U.shape[1:] == (1,) else problem.U
        # matvecmult reads its matrix row by row, so Uᵀ is what is laid out.
        U = U.mT if problem.is_full else U
        lead: tuple[int, ...] = ()
        self.rows = N
        if batches is not None:
            lead, self.rows = (1,), -(-N // batches)
            x = _padded(x, batches * self.rows).view(batches, self.rows, D)
        self.x = x
        self.LazyTensor, self.batches, self.full = LazyTensor, batches, problem.is_full
        self.z = LazyTensor(x.unsqueeze(-2).contiguous()) - self._j(problem.means, lead, K, kind)
        U_j = self._j(U.reshape(K, -1), lead, K, kind)
        y = U_j.matvecmult(self.z) if self.full else U_j * self.z
        self.e = self._j(problem.offsets[:, None], lead, K, kind) - 0.5 * (y**2).sum(-1)

    def _j(self, values: Tensor, lead: tuple[int, ...], K: int, kind: dict[str, Any]) -> Any:
        return self.LazyTensor(values.to(**kind).reshape(*lead, 1, K, -1).contiguous())

    def i(self, values: Tensor) -> Any:
        """A per-point number as a LazyTensor; padding points get zero."""
        values = values.to(self.x.dtype)
        if self.batches is not None:
            values = _padded(values, self.batches * self.rows).view(self.batches, self.rows)
        return self.LazyTensor(values[..., None, None].contiguous())


def _padded(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, values.new_zeros(rows - values.shape[0], *values.shape[1:])])


def logsumexp(problem: Exponents) -> Tensor:
    """ℓ (N,), nats, in the dtype of the points; not finite where float32 overflows."""
    with _guarded(problem, "logsumexp") as LazyTensor:
        return _Formula(LazyTensor, problem).e.logsumexp(dim=1).view(-1)


def argmax(problem: Exponents) -> Tensor:
    """Index of the largest exponent (N,), int64."""
    with _guarded(problem, "argmax") as LazyTensor:
        return _Formula(LazyTensor, problem).e.argmax(dim=1).view(-1)


def topk(problem: Exponents, k: int) -> tuple[Tensor, Tensor]:
    """The k largest exponents (N, k), nats, in falling order, and their indices (N, k)."""
    with _guarded(problem, "topk", k) as LazyTensor:
        values, indices = (-_Formula(LazyTensor, problem).e).Kmin_argKmin(k, dim=1)
    return -values, indices.long()


def moments(problem: Exponents, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S0 (K,), S1 (K, D), S2 (K, D, D) or (K, D) about the components' means, float64, given ℓ (N,) and g (N,).

    The points are split into batches: each sums few enough rows to keep its digits, and a GPU has enough rows to fill.
    """
    N, K, D = problem.shape
    batches = -(-N // _ROWS_PER_SUM)
    if problem.x.is_cuda:
        batches = min(N, max(batches, -(-_BLOCKS_CUDA // -(-K // 192))))
    with _guarded(problem, "moments") as LazyTensor:
        f = _Formula(LazyTensor, problem, batches)
        r = (f.e - f.i(values)).exp() * f.i(weights)
        square = f.z.tensorprod(f.z) if f.full else f.z * f.z
        sums = (r * LazyTensor.concatenate((f.z, square), axis=-1)).concat(r).sum(dim=1)
    sums = sums.double().sum(0)
    S1, S2, S0 = sums[:, :D], sums[:, D:-1], sums[:, -1]
    return S0, S1, S2.reshape(K, D, D) if f.full else S2


def point_gradient(problem: Exponents, values: Tensor, weights: Tensor) -> Tensor:
    """∂(Σ g ℓ)/∂x (N, D), in the dtype of the points, given ℓ (N,)."""
    N, K, D = problem.shape
    kind = {"dtype": problem.x.dtype, "device": problem.x.device}
    with _guarded(problem, "point_gradient") as LazyTensor:
        f = _Formula(LazyTensor, problem)
        P = problem.U @ problem.U.mT if problem.is_full else problem.U.expand(K, D) ** 2
        P_j = f._j(P.reshape(K, -1), (), K, kind)
        pull = P_j.matvecmult(f.z) if f.full else P_j * f.z
        averages = ((f.e - f.i(values)).exp() * pull).sum(dim=1)
    return -weights.to(averages)[:, None] * averages.view(N, D)
