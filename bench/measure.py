"""One measurement in a process of its own: prints one line of JSON. Started by run.py; see there for what is measured."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import adapters
import cases

# Seconds below which a run is repeated within its process.
_QUICK = 2.0


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - began, value


def peak() -> float:
    """Most memory that the process has held so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def referee(x: Any, parameters: Any, device: str) -> float:
    """Mean log-likelihood recomputed in float64 from a peer's parameters, of all points or of every n-th of many."""
    import torch

    import gmmkeops as gk

    weights, means, covariances = (torch.as_tensor(part).double() for part in parameters)
    weights = weights / weights.sum()
    if covariances.ndim == 1:
        mixture = gk.Mixture.from_parameters(weights, means, covariances, covariance_type="spherical")
    else:
        mixture = gk.Mixture.from_parameters(weights, means, 0.5 * (covariances + covariances.mT))
    points = torch.from_numpy(x[:: max(1, len(x) // 1_000_000)]).double().to(device)
    with torch.no_grad():
        return float(mixture.to(device).log_prob(points, truncate=1e-10).mean())


def roofline() -> dict[str, float]:
    """This machine's rates with all cores: exponentials a second, and floating-point operations in matrix products."""
    import torch

    found = {}
    values = torch.rand(1 << 22)
    out = torch.empty_like(values)
    found["exp_per_s"] = len(values) / min(timed(lambda: torch.exp(values, out=out))[0] for _ in range(20))
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        a = torch.rand(1536, 1536, dtype=dtype)
        c = torch.empty_like(a)
        found[f"{name}_flops"] = 2 * 1536**3 / min(timed(lambda a=a, c=c: torch.mm(a, a, out=c))[0] for _ in range(8))
    return found


def em(case: Any, peer: str, x: Any) -> dict[str, Any]:
    peers = {"em": adapters.EM, "bayes": adapters.BAYES}[case.kind]
    run = peers[peer](case, x, cases.start(case, x))
    short, long = case.iterations
    before = peak()
    cold, _ = timed(run, short)
    # What is quick is easily disturbed: the fastest of several counts.
    first, second = math.inf, math.inf
    for _ in range(3 if cold < _QUICK else 2 if cold < 4 * _QUICK else 1):
        first = min(first, timed(run, short)[0])
        seconds, (*parameters, note) = timed(run, long)
        second = min(second, seconds)
    if (second - first) / (long - short) < 0.05 * first / short:
        return {"error": "stops before its iterations are done"}
    return {
        "seconds": (second - first) / (long - short),
        "cold_seconds": cold,
        "peak_MB": peak() - before,
        "log_likelihood": referee(x, parameters, case.device),
        "iterations": long,
        **note,
    }


def loss(case: Any, peer: str, x: Any) -> dict[str, Any]:
    run = adapters.LOSS[peer](case, x)
    before = peak()
    cold, value = timed(run)
    found = {"seconds": min(timed(run)[0] for _ in range(5)), "cold_seconds": cold, "peak_MB": peak() - before}
    return found if getattr(run, "other_loss", False) else {**found, "loss": value}


def score(case: Any, peer: str, x: Any) -> dict[str, Any]:
    run = adapters.SCORE[peer](case, x, cases.start(case, x))

    def mean() -> float:
        return float(run().double().mean())

    before = peak()
    cold, value = timed(mean)
    seconds = min(timed(mean)[0] for _ in range(5))
    return {"seconds": seconds, "cold_seconds": cold, "peak_MB": peak() - before, "log_likelihood": value}


def fit(case: Any, peer: str, x: Any) -> dict[str, Any]:
    before = peak()
    seconds, (*parameters, iterations) = timed(adapters.FIT[peer], case, x)
    likelihood = referee(x, parameters, case.device)
    return {"seconds": seconds, "peak_MB": peak() - before, "log_likelihood": likelihood, "iterations": iterations}


def target(case: Any, peer: str, x: Any) -> dict[str, Any]:
    before = peak()
    found = adapters.ours_until(case, x)
    likelihood = referee(x, found.pop("parameters"), case.device)
    return {**found, "peak_MB": peak() - before, "log_likelihood": likelihood}


def main() -> None:
    name, peer, memory = sys.argv[1], sys.argv[2], float(sys.argv[3])
    warnings.simplefilter("ignore")
    if name == "roofline":
        print(json.dumps(roofline()))
        return
    case = cases.find(name)
    if case.device == "cpu" and memory:
        resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30), int(memory * 2**30)))
    if peer == "KeOps tutorial":
        # Before gmmkeops, so that the tutorial's formula is compiled as its readers compile it, with KeOps' own flags.
        import pykeops.torch  # noqa: F401
    import torch

    if case.device == "cuda":
        torch.zeros(1, device="cuda")
    x = cases.cloud(case)
    try:
        row = {"em": em, "bayes": em, "loss": loss, "score": score, "fit": fit, "target": target}[case.kind](
            case, peer, x
        )
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
