"""Import of pykeops on first use, and recompilation of formulas that cannot be loaded.

This is the only file that imports pykeops.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Any, TypeVar

import torch

from gmmkeops.reductions.keops.cache import cache_folder, compiler_failure, refusing_damage, renewed_folder
from gmmkeops.reductions.keops.compilation import announced
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Broken

__all__ = ["guarded", "healing", "unavailable"]

# Compiler flags with a speedup of 1.4-1.7 at D <= 3. -ffast-math must not be used: with gcc < 13 it sets flush-to-zero for the
# whole process.
_FLAGS = "-march=native -include math.h -fno-math-errno -fno-trapping-math"

_compiled: set[tuple[Any, ...]] = set()

_state: dict[str, Any] = {"reason": None, "lazy": None, "pid": None, "lock": None, "own": False, "folder": None}

# Seconds to wait before an unreadable cache is read again, in case another process is writing it.
_PATIENCE = 0.5

R = TypeVar("R")


def unavailable(device: torch.device) -> str | None:
    """Return the reason, one clause, why KeOps cannot run on this device; None if it can. Imports pykeops on first use.

    Raises:
        RuntimeError: The process was forked after KeOps had been used.
    """
    if _state["lazy"] is None and _state["reason"] is None:
        _state["reason"] = _load()
    if _state["reason"] is not None:
        return _state["reason"]
    if _state["pid"] not in (None, os.getpid()):
        raise RuntimeError(
            "KeOps cannot run in a process that was forked after KeOps had been used (its threads would hang); start workers "
            "with the 'spawn' method, or pass backend='dense'."
        )
    if device.type == "cuda":
        pykeops = sys.modules["pykeops"]
        return _without_cuda() if not pykeops.config.gpu_available else _without_shared_library(os.environ.get("CXX"))
    return None


@functools.cache
def _without_shared_library(compiler: str | None) -> str | None:
    """Return the reason, one clause, why the C++ compiler (None for g++) must not compile formulas for CUDA; None if it may.

    With the static library of C++ in the compiled library of KeOps, beside the shared one of torch, the first compilation of a
    formula for CUDA ends the process.
    """
    try:
        command = shlex.split(compiler or "") or ["g++"]
    except ValueError:
        return None
    if sys.platform != "linux" or shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run([*command, "-print-file-name=libstdc++.so"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Compilers print the name alone if there is no such file.
    if done.returncode != 0 or done.stdout.strip() != "libstdc++.so":
        return None
    return (
        f"the C++ compiler {compiler or 'g++'} links the library of C++ statically, with which KeOps ends the process when it "
        "compiles a formula for CUDA (set CXX to another compiler, such as /usr/bin/g++)"
    )


def _without_cuda() -> str:
    """Return the reason, one clause, why KeOps does not see CUDA although torch does, with the missing library."""
    for name, owner in (("nvrtc", "the CUDA toolkit"), ("cuda", "the NVIDIA driver")):
        if find_library(name) is None:
            return f"pykeops does not see CUDA, although torch does: lib{name}.so of {owner} is not in the linker's search path"
    return "pykeops does not see CUDA, although torch does"


def _load() -> str | None:
    """Import pykeops without output, with the cache folder of this package; return the reason if that fails."""
    if sys.platform == "win32":
        return "pykeops does not run on native Windows"
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed (pip install pykeops)"
    if "pykeops" not in sys.modules and shutil.which(os.environ.get("CXX", "c++")) is None and not shutil.which("g++"):
        return "no C++ compiler was found (install g++)"
    if "pykeops" in sys.modules and not _state["own"]:
        # The user has already imported pykeops, with a cache folder that belongs to the user and is not repaired.
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
        # The import runs the compiler, which may have failed.
        return compiler_failure(compiler, f"{flags} -shared -fPIC") or reason
    return reason


def _begin(folder: Path | None) -> str | None:
    """Import pykeops with a cache folder (None for its default), and store it; return the reason if that fails."""
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
        # KeOps imports formulas by name from sys.path, from which the unused folder must be removed.
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


class _Unusable(Exception):
    """Error of a formula that could not be compiled or loaded."""


def _renewed() -> bool:
    """Import KeOps again with a repaired or new cache folder; return whether that succeeded."""
    if _state["folder"] is None:
        return False
    folder = renewed_folder(_state["folder"], os.environ.get("CXXFLAGS", _FLAGS))
    importlib.invalidate_caches()
    return folder is not None and _begin(folder) is None


def _unwritable(folder: Path) -> str | None:
    """Return the reason, one clause, why KeOps cannot write into a folder; None if it can."""
    if os.access(folder, os.W_OK):
        return None
    return f"its cache folder {folder} is not writable (set KEOPS_CACHE_FOLDER to a writable folder)"


def _failure() -> str:
    """Return the reason, one clause, why a formula cannot be compiled or loaded although the compiler works."""
    folder = _state["lock"].parent
    return _unwritable(folder) or (
        f"it cannot compile or load a formula in {folder} (set KEOPS_CACHE_FOLDER to an empty folder; if that does not help, "
        "install the headers of Python)"
    )


def healing(function: Callable[..., R]) -> Callable[..., R]:
    """Decorate a function so that its call is repeated with newly compiled formulas if a formula cannot be loaded.

    Raises:
        Broken: The compiler or the second call fails.
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
def guarded(problem: Exponents, *formula: Any) -> Iterator[Any]:
    """Call a formula within this context, which locks the cache during compilation and converts errors to ``_Unusable``.

    KeOps launches its kernels on the default CUDA stream, which does not wait for operations that torch has queued on another
    stream. It synchronizes the device before it returns, and leaves it as the current device.
    """
    import fcntl

    _state["pid"] = os.getpid()
    key = (*formula, problem.shape[2], problem.U.shape[1:], problem.x.dtype, problem.x.device.type)
    try:
        with contextlib.ExitStack() as stack:
            if problem.x.is_cuda:
                stack.enter_context(torch.cuda.device(problem.x.device))
            if key not in _compiled:
                lock = stack.enter_context(open(_state["lock"], "a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                stack.enter_context(refusing_damage())
                dtype = str(problem.x.dtype).removeprefix("torch.")
                described = f"the formula {formula[0]} (D = {problem.shape[2]}, {dtype}, {problem.x.device.type})"
                stack.enter_context(announced(described, _state["lock"].parent))
            yield _state["lazy"]
        _compiled.add(key)
    except (ImportError, OSError, ValueError, SyntaxError) as error:
        raise _Unusable from error
