"""The compiled library: its calls, how it is loaded and interrupted, and the choice of the instruction set."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = [
    "OUT_OF_MEMORY",
    "Call",
    "ClimbCall",
    "DigitCall",
    "ExtentCall",
    "Level",
    "ListCall",
    "PairCall",
    "ParameterCall",
    "RecordCall",
    "SeedCall",
    "SpreadCall",
    "StepCall",
    "TreeCall",
    "WhiteCall",
    "instruction_set",
    "load",
    "reason",
    "run",
]

# Must equal the number in native/source/interface.hpp.
_ABI = 15

# Status of a call in native/source/interface.hpp.
OUT_OF_MEMORY = 1

_FOLDER = Path(__file__).parent / "native"

# Instruction sets by the names that GMMKEOPS_ISA accepts, and their numbers in the library.
_SETS = {"avx512": 2, "avx2": 1, "base": 0}


class Call(ctypes.Structure):
    """The arguments of one evaluation; native/source/interface.hpp describes the fields."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("request", "family", "double_points", "double_arithmetic", "top", "threads")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "components", "dimensions")),
        *((name, ctypes.c_void_p) for name in ("points", "offsets", "means", "factor", "center")),
        ("factor_stride", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("unit", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("ranges", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("range", "owner", "pointer", "index", "floor", "minima")),
        *(
            (name, ctypes.c_void_p)
            for name in ("values", "labels", "gradient", "S0", "S1", "S2", "total", "odd", "doubles")
        ),
        ("stop", ctypes.c_void_p),
    )


class StepCall(ctypes.Structure):
    """The arguments of EM steps."""

    _fields_ = (
        ("sweep", Call),
        *(
            (name, ctypes.c_int32)
            for name in ("tied", "fixed_weights", "fixed_means", "fixed_covariances", "bare", "accelerated")
        ),
        *((name, ctypes.c_int64) for name in ("steps", "done")),
        *(
            (name, ctypes.c_double)
            for name in ("mass", "scale", "least", "floor", "ceiling", "coarse", "degrees", "tolerance", "relative")
        ),
        *((name, ctypes.c_double) for name in ("pool_below", "pool_weight", "pool_floor", "pool_limit")),
        *((name, ctypes.c_void_p) for name in ("ridge", "rounding", "scatter")),
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "means", "log_diagonal", "upper", "counts", "total", "cost", "prior", "drift")
        ),
    )


class ClimbCall(ctypes.Structure):
    """The arguments of EM steps from several mixtures, and of rounds of splitting and merging from the best one."""

    _fields_ = (
        ("steps", StepCall),
        ("starts", ctypes.c_int64),
        ("done", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("after", "split_steps", "merged_steps")),
        *((name, ctypes.c_double) for name in ("split_tolerance", "merged_tolerance", "half")),
        ("points", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("blocks", "most", "rounds", "best")),
        ("known", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("accepted", "ended", "work")),
        *((name, ctypes.c_double) for name in ("value", "constant", "gain", "tie", "count")),
        ("early", ctypes.c_int64),
        ("change", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("unchanged", "metrics", "candidates", "iterations", "climbs_one")),
        *((name, ctypes.c_void_p) for name in ("roots", "uniform")),
        *(
            (name, ctypes.c_double)
            for name in ("relative", "pool_below", "pool_weight", "pool_floor", "pool_limit", "copies")
        ),
    )


class KMeansCall(ctypes.Structure):
    """The arguments of runs of k-means."""

    _fields_ = (
        ("steps", StepCall),
        *((name, ctypes.c_int64) for name in ("metrics", "runs", "candidates")),
        *((name, ctypes.c_void_p) for name in ("roots", "uniform", "centers", "labels")),
        *((name, ctypes.c_int64) for name in ("points", "done")),
    )


class SpreadCall(ctypes.Structure):
    """The arguments for centers and standard deviations of columns."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("double_points", "unused")),
        *((name, ctypes.c_int64) for name in ("rows", "dimensions", "rounds")),
        *((name, ctypes.c_void_p) for name in ("points", "weights")),
        *((name, ctypes.c_double) for name in ("largest", "least", "most", "smallest", "noise")),
        *((name, ctypes.c_void_p) for name in ("center", "deviation")),
        ("ordinary", ctypes.c_int64),
    )


class WhiteCall(ctypes.Structure):
    """The arguments for the covariance of points, and for the matrix that makes them white."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("double_points", "unused")),
        *((name, ctypes.c_int64) for name in ("rows", "dimensions")),
        *((name, ctypes.c_void_p) for name in ("points", "weights")),
        *((name, ctypes.c_double) for name in ("limit", "added")),
        *((name, ctypes.c_void_p) for name in ("covariance", "root")),
        ("regular", ctypes.c_int64),
    )


class SeedCall(ctypes.Structure):
    """The arguments of greedy k-means++."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("points", "dimensions", "centers", "candidates")),
        *((name, ctypes.c_void_p) for name in ("x", "mass", "uniform", "chosen")),
    )


class PairCall(ctypes.Structure):
    """The arguments of the costs of merging pairs of components."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("full", "trace", "threads", "unused")),
        *((name, ctypes.c_int64) for name in ("components", "dimensions", "columns", "pairs", "blocks")),
        *((name, ctypes.c_void_p) for name in ("weights", "means", "spreads", "points", "pair", "cost")),
    )


class RecordCall(ctypes.Structure):
    """The arguments for records of components, and for the moments of a GPU engine."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("family", "double_points", "threads", "unused")),
        *((name, ctypes.c_int64) for name in ("components", "dimensions", "records")),
        *((name, ctypes.c_void_p) for name in ("offsets", "means", "factor", "center")),
        ("factor_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("record", "rest")),
        *((name, ctypes.c_double) for name in ("base", "usual", "condition")),
        *((name, ctypes.c_void_p) for name in ("sums", "S0", "S1", "S2")),
        ("triangular", ctypes.c_int64),
    )


class DigitCall(ctypes.Structure):
    """The arguments for digits of components, and for the moments of the kernels that read them."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("spherical", "threads")),
        *((name, ctypes.c_int64) for name in ("components", "dimensions", "rows", "padded")),
        *((name, ctypes.c_void_p) for name in ("offsets", "means", "factor", "center")),
        ("factor_stride", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("depth", "most_unit", "most_spread", "most_binary")),
        *((name, ctypes.c_void_p) for name in ("digits", "centers", "numbers", "grid", "mean", "scale", "square")),
        *((name, ctypes.c_double) for name in ("base", "usual")),
        ("sums", ctypes.c_void_p),
        ("unit", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("S0", "S1", "S2")),
        ("accurate", ctypes.c_int64),
    )


class ParameterCall(ctypes.Structure):
    """The arguments for offsets and factors of a mixture."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("family", "tied", "threads", "unused")),
        *((name, ctypes.c_int64) for name in ("components", "dimensions")),
        *((name, ctypes.c_void_p) for name in ("logits", "means", "log_diagonal", "upper", "rounding")),
        ("coarse", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("offsets", "factor")),
        ("valid", ctypes.c_int64),
    )


class ExtentCall(ctypes.Structure):
    """The arguments for bounds on parameters."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("components", "dimensions", "numbers")),
        *((name, ctypes.c_void_p) for name in ("offsets", "means", "factor")),
        *((name, ctypes.c_double) for name in ("least", "most", "mean", "largest")),
        ("central", ctypes.c_int64),
    )


class Level(ctypes.Structure):
    """A level of the kd-tree."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "children", "leaves")),
        *((name, ctypes.c_void_p) for name in ("center", "axes", "half", "semi", "reach")),
    )


class Lists(ctypes.Structure):
    """Candidate lists in memory of the library."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("total", ctypes.c_int64),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("boxes", "index", "lengths")),
        ("pruned", ctypes.POINTER(ctypes.c_double)),
    )


class ListCall(ctypes.Structure):
    """The arguments of a search for candidate lists."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("full", "spherical", "single", "threads")),
        *((name, ctypes.c_int64) for name in ("components", "dimensions", "levels")),
        ("level", ctypes.POINTER(Level)),
        *((name, ctypes.c_void_p) for name in ("limit", "offsets", "means", "factor", "center", "sizes")),
        ("factor_stride", ctypes.c_int64),
        ("result", Lists),
    )


class TreeCall(ctypes.Structure):
    """The arguments for a kd-tree, or for boxes only."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("double_points", "threads")),
        *((name, ctypes.c_int64) for name in ("rows", "dimensions", "depth", "levels")),
        *((name, ctypes.c_void_p) for name in ("x", "points", "rank", "starts")),
        ("level", ctypes.POINTER(Level)),
        ("stop", ctypes.c_void_p),
    )


# The calls in the order of ``gmmkeops_size`` in native/source/native.cpp.
_CALLS = (
    Call,
    ListCall,
    TreeCall,
    StepCall,
    PairCall,
    RecordCall,
    ExtentCall,
    ParameterCall,
    ClimbCall,
    SeedCall,
    DigitCall,
    KMeansCall,
    SpreadCall,
    WhiteCall,
)


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or one clause that says why it cannot be used."""
    path = _FOLDER / "_native.so"
    if not path.exists():
        log = _FOLDER / "unbuilt.txt"
        why = log.read_text(encoding="utf-8").strip() if log.exists() else "no C++ compiler was found at installation"
        return f"its library has not been compiled ({why})"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"its library cannot be loaded ({error})"
    other = library.gmmkeops_abi() != _ABI
    if not other:
        library.gmmkeops_size.restype = ctypes.c_int64
        sizes = [*map(ctypes.sizeof, _CALLS), 0]
        other = sizes != [library.gmmkeops_size(i) for i in range(len(sizes))]
    if other:
        return "its library belongs to another version; install gmmkeops again"
    return library


@cache
def _chosen(wanted: str | None) -> int | str:
    """The number of the instruction set, or one clause that says why there is none."""
    library = _library()
    if isinstance(library, str):
        return library
    if wanted is not None and wanted not in _SETS:
        return f"GMMKEOPS_ISA is {wanted!r}, expected one of {', '.join(_SETS)}"
    for name, number in _SETS.items():
        if wanted in (None, name) and library.gmmkeops_supports(number):
            return number
    return f"this machine lacks the instruction set {wanted} that GMMKEOPS_ISA names"


def reason() -> str | None:
    """None, or one clause that says why the library cannot be used."""
    chosen = _chosen(os.environ.get("GMMKEOPS_ISA"))
    return chosen if isinstance(chosen, str) else None


def load() -> tuple[ctypes.CDLL, int]:
    """The library and the number of the instruction set.

    Raises:
        RuntimeError: The library cannot be used.
    """
    library, chosen = _library(), _chosen(os.environ.get("GMMKEOPS_ISA"))
    if isinstance(library, str) or isinstance(chosen, str):
        raise RuntimeError(f"The native engine cannot be used: {reason()}.")
    return library, chosen


def run(function: str, call: ctypes.Structure, *, is_long: bool = False) -> int:
    """Call a function of the library, and return its status.

    Long calls from the main thread run in another one, so that signals such as Ctrl-C end them.
    """
    library, chosen = load()
    compiled = getattr(library, function)
    stop = ctypes.c_int32(0)
    # Climbs and k-means contain the call of steps, and these that of a sweep.
    sweep = call.steps.sweep if isinstance(call, ClimbCall | KMeansCall) else getattr(call, "sweep", call)
    sweep.stop = ctypes.addressof(stop)
    if not is_long or threading.current_thread() is not threading.main_thread():
        return int(compiled(ctypes.byref(call), chosen))
    found: list[int] = []
    # An interrupted Thread.join counts the thread as finished, so that the end is an event.
    finished = threading.Event()

    def work() -> None:
        try:
            found.append(compiled(ctypes.byref(call), chosen))
        finally:
            finished.set()

    threading.Thread(target=work, name="gmmkeops-native").start()
    try:
        finished.wait()
    except BaseException:
        # The call reads and writes the memory of tensors, so that it must have ended before they are released.
        stop.value = 1
        while not finished.is_set():
            with suppress(BaseException):
                finished.wait()
        raise
    return found[0]


def instruction_set() -> str:
    """Name of the instruction set that the kernels use: ``"avx512"``, ``"avx2"`` or ``"base"``."""
    chosen = load()[1]
    return next(name for name, number in _SETS.items() if number == chosen)
