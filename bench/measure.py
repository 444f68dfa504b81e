"""One measurement, in a process that run.py starts: the case, the peer, the memory limit in GB, and "quick" or nothing.

It prints one line of JSON. ``seconds`` are wall-clock time and ``cpu_seconds`` the time of all threads of the process, each the
smallest of several runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import adapters
import cases
import ours

# Seconds that repetitions of a call take in all, and the largest number of repetitions.
_ENOUGH, _MOST = 1.0, 200
# Seconds by which the long run of an EM case should take longer than the short one, and the largest factor by which it is
# lengthened for it.
_LENGTH, _FACTOR = 0.4, 16
# Largest number of repetitions of an EM case, and seconds after which repetitions of any case end.
_REPEATS, _LONG = 5, 3.0


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[np.ndarray, Any]:
    """Call a function; return its wall-clock time and CPU time in seconds, and its value."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = function(*arguments)
    return np.array([time.perf_counter() - wall, time.process_time() - cpu]), value


def fastest(function: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Return the smallest wall-clock time and the smallest CPU time of several calls, at least three unless they are long."""
    best, spent, count = np.full(2, np.inf), 0.0, 0
    while (count < 3 and spent < _LONG) or (spent < _ENOUGH and count < _MOST):
        took, _ = timed(function, *arguments)
        best, spent, count = np.minimum(best, took), spent + took[0], count + 1
    return best


def peak() -> float:
    """Return the largest memory of the process since the last :func:`forget`, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget() -> None:
    """Reset the largest memory to that in use, where the system can, so that memory for making the points is not counted."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def times(best: np.ndarray) -> dict[str, float]:
    return {"seconds": float(best[0]), "cpu_seconds": float(best[1])}


def referee(case: Any, x: np.ndarray, parameters: Any) -> float:
    """Compute the mean log-likelihood of parameters in float64, of all points or of every n-th of many."""
    import torch

    import gmmkeops as gk

    weights, means, covariances = (np.asarray(part, dtype=float) for part in parameters)
    matrices = cases.dense(covariances, case.K, case.D, case.family)
    mixture = gk.Mixture.from_parameters(weights / weights.sum(), means, (matrices + matrices.swapaxes(1, 2)) / 2)
    points = torch.from_numpy(x[:: max(1, len(x) // 1_000_000)]).double().to(case.device)
    with torch.no_grad():
        return float(mixture.to(case.device).log_prob(points, truncate=1e-10).mean())


def peaks() -> dict[str, float]:
    """Measure the largest rates of this machine with the given threads: products, exponentials, and copies of memory."""
    import torch

    def best(function: Callable[[], Any], repeats: int) -> float:
        return min(timed(function)[0][0] for _ in range(repeats))

    found: dict[str, float] = {"threads": torch.get_num_threads()}
    values = torch.rand(1 << 22)
    out = torch.empty_like(values)
    found["exp_per_s"] = len(values) / best(lambda: torch.exp(values, out=out), 20)
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        a = torch.rand(1536, 1536, dtype=dtype)
        c = torch.empty_like(a)
        found[f"{name}_flops"] = 2 * 1536**3 / best(lambda a=a, c=c: torch.mm(a, a, out=c), 8)
    # Larger than any cache; every byte is read once and written once.
    values = torch.zeros(1 << 27)
    out = torch.empty_like(values)
    found["bytes_per_s"] = 2 * 4 * len(values) / best(lambda: out.copy_(values), 6)
    return found


def em(case: Any, peer: str, x: np.ndarray) -> dict[str, Any]:
    """Time an iteration: a long run minus a short one, by the difference of their iterations."""
    run = {"em": adapters.EM, "bayes": adapters.BAYES}[case.kind][peer](case, x, cases.start(case, x))
    short, long = case.iterations
    before = peak()
    cold, _ = timed(run, short)
    warm, (*parameters, note) = timed(run, long)
    if (done := note.pop("done", long)) < long:
        return {"error": f"stops after {done} of {long} iterations"}
    first, _ = timed(run, short)
    # The difference should be as long as the setup, or noise of the setup would hide the iterations.
    each = max((warm[0] - first[0]) / (long - short), 1e-6)
    many = min(max(short + math.ceil(max(_LENGTH, first[0]) / each), long), _FACTOR * long)
    second = warm if many == long else timed(run, many)[0]
    began = time.perf_counter()
    for _ in range(_REPEATS):
        if time.perf_counter() - began > _LONG or second[0] > _LONG:
            break
        first = np.minimum(first, timed(run, short)[0])
        second = np.minimum(second, timed(run, many)[0])
    if (second <= first).any():
        return {
            "error": f"{many} iterations did not take longer than {short}: another process disturbed the measurement"
        }
    return {
        **times((second - first) / (many - short)),
        "cold_seconds": float(cold[0]),
        "peak_MB": peak() - before,
        "log_likelihood": referee(case, x, parameters),
        "iterations": long,
        "timed_iterations": many,
        **note,
    }


def small(case: Any, peer: str, x: np.ndarray) -> dict[str, Any]:
    run, long = adapters.EM[peer](case, x, cases.start(case, x)), case.iterations[1]
    before = peak()
    cold, (*parameters, note) = timed(run, long)
    if (done := note.pop("done", long)) < long:
        return {"error": f"stops after {done} of {long} iterations"}
    found = {**times(fastest(run, long)), "cold_seconds": float(cold[0]), "peak_MB": peak() - before}
    return {**found, "log_likelihood": referee(case, x, parameters), "iterations": long, **note}


def loss(case: Any, peer: str, x: np.ndarray) -> dict[str, Any]:
    run = adapters.LOSS[peer](case, x)
    before = peak()
    cold, value = timed(run)
    return {**times(fastest(run)), "cold_seconds": float(cold[0]), "peak_MB": peak() - before, "loss": value}


def score(case: Any, peer: str, x: np.ndarray) -> dict[str, Any]:
    scores = adapters.SCORE[peer](case, x, cases.start(case, x))

    def run() -> Any:
        # A copy to the CPU waits for the device.
        return scores().cpu() if case.device == "cuda" else scores()

    before = peak()
    cold, value = timed(run)
    found = {**times(fastest(run)), "cold_seconds": float(cold[0]), "peak_MB": peak() - before}
    return {**found, "log_likelihood": float(np.asarray(value, dtype=float).mean())}


def fit(case: Any, peer: str, x: np.ndarray) -> dict[str, Any]:
    before = peak()
    best, (*parameters, iterations) = timed(adapters.FIT[peer], case, x)
    found = {**times(best), "peak_MB": peak() - before, "iterations": iterations}
    return {**found, "log_likelihood": referee(case, x, parameters)}


def target(case: Any, peer: str, x: np.ndarray) -> dict[str, Any]:
    before = peak()
    best, found = timed(ours.until, case, x)
    parameters = found.pop("parameters")
    return {**times(best), **found, "peak_MB": peak() - before, "log_likelihood": referee(case, x, parameters)}


KINDS = {"em": em, "bayes": em, "small": small, "loss": loss, "score": score, "fit": fit, "target": target}


def restrict() -> None:
    """Run on as many cores as OMP_NUM_THREADS says, for libraries that do not read it."""
    if hasattr(os, "sched_setaffinity") and (threads := os.environ.get("OMP_NUM_THREADS")):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])


def main() -> None:
    name, peer, memory, quickly = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:] == ["quick"]
    warnings.simplefilter("ignore")
    restrict()
    if name == "peaks":
        print(json.dumps(peaks()))
        return
    case = cases.find(name, quickly)
    if quickly:
        global _ENOUGH, _LENGTH, _REPEATS
        _ENOUGH, _LENGTH, _REPEATS = 0.1, 0.1, 1
    if case.device == "cpu" and memory:
        resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30), int(memory * 2**30)))
    if peer == "KeOps tutorial":
        # Before gmmkeops, so that the tutorial's formula is compiled with KeOps' own flags.
        import pykeops.torch  # noqa: F401
    if case.device == "cuda":
        import torch

        torch.zeros(1, device="cuda")
    x = cases.cloud(case)
    forget()
    try:
        row = KINDS[case.kind](case, peer, x)
        if case.device == "cuda":
            row["peak_MB"] = torch.cuda.max_memory_allocated() / 2**20
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or "memory" in text or "allocate" in text:
            row = {"error": f"needs more than {memory:g} GB of memory"}
        else:
            raise
    if any(isinstance(value, float) and not math.isfinite(value) for value in row.values()):
        row = {"error": "gives values that are not finite"}
    print(json.dumps(row, default=float))


if __name__ == "__main__":
    main()
