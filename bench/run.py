"""The benchmark: every case by every peer that is installed, each measurement in a process of its own.

    make bench          all of it: python bench/run.py, choose.py and report.py with the libraries of bench/requirements.txt
    make bench-quick    small variants of some cases, to check that everything runs; results in build/bench

    python bench/run.py                      all CPU cases (half an hour on two cores), results in bench/results/cpu.json
    python bench/run.py --threads 1          with one thread
    python bench/run.py --device cuda        the GPU cases, results in bench/results/cuda.json
    python bench/run.py --only surface       cases with this in their names, printed only; with --save they replace saved rows
    python bench/report.py                   the tables and the plots, from the results

All peers of a case get the same points, initial parameters and number of iterations. Waiting threads of a library use CPU time
that would be counted as that of another library in the same process. Therefore each measurement has its own process; peers take
turns. A process first runs the short run cold, then short and long runs in turn. An iteration is the difference of the shortest
times, divided by the difference of the iterations, so that setup costs cancel. The final mean log-likelihood is computed from the
parameters in float64. A peer that is not installed, fails, takes too long or needs too much memory is a row that says so. The
machine's peaks are measured with the same threads, for the rooflines of the engines.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import adapters
import cases

RESULTS, QUICK = HERE / "results", HERE.parent / "build/bench"
# Seconds after which a measurement is not repeated.
_LONG = 5
PACKAGES = (
    "gmmkeops",
    "torch",
    "numpy",
    "pykeops",
    "scikit-learn",
    "tgmm",
    "pomegranate",
    "torchgmm",
    "gmmx",
    "jax",
    "zuko",
)


def installed(package: str) -> str | None:
    """Return the version of a package, an empty string for a module without one, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "" if importlib.util.find_spec(package) else None


def machine(device: str) -> dict[str, Any]:
    found = {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["processor"] = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        found["processor"] = platform.processor()
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a measurement: the number of threads, and no choice of OpenBLAS kernels for another processor."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    return {**kept, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))}


def measure(
    name: str, peer: str, limit: float, memory: float, *, threads: int = 2, quick: bool = False
) -> dict[str, Any]:
    """Measure a row in a process of its own; return it, or the error in one line."""
    if name != "peaks" and installed(adapters.package(peer)) is None:
        return {"error": "is not installed"}
    command = [sys.executable, str(HERE / "measure.py"), name, peer, str(memory), *(["quick"] if quick else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment(threads))
    except subprocess.TimeoutExpired:
        return {"error": f"takes more than {limit:g} s"}
    if done.returncode < 0:
        return {"error": f"was killed by signal {-done.returncode}"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed without a message"])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    head = f"{row['case']:>26}  {row['peer']:>22}"
    if "error" in row:
        return f"{head}  {row['error']}"
    parts = [f"{head}  {row['seconds']:10.6f} s", f"{row['cpu_seconds']:10.6f} s CPU", f"{row['peak_MB']:6.0f} MB"]
    if "log_likelihood" in row:
        parts.append(f"log-likelihood {row['log_likelihood']:.5f}")
    if row.get("pairs", 1) < 1:
        parts.append(f"{row['pairs']:.2%} of pairs")
    return "  ".join(parts)


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Combine two measurements of a peer: the smaller wall-clock time and the smaller CPU time."""
    if "error" in new:
        return old or new
    if old is None or "error" in old:
        return new
    return {**new, **{name: min(old[name], new[name]) for name in ("seconds", "cpu_seconds", "peak_MB")}}


def run_case(case: cases.Case, memory: float, **options: Any) -> list[dict[str, Any]]:
    """Measure all peers of a case, in turns."""
    found: dict[str, dict[str, Any]] = {}
    spent: dict[str, float] = {}
    for repeat in range(case.repeats):
        for peer in case.peers:
            # A peer that failed would fail again, and a long measurement is less disturbed by other processes.
            failed = "disturbed" not in found.get(peer, {}).get("error", "disturbed")
            if repeat and (failed or spent[peer] > _LONG):
                continue
            began = time.perf_counter()
            found[peer] = merged(found.get(peer), measure(case.name, peer, case.limit, memory, **options))
            spent[peer] = time.perf_counter() - began
    size = {"kind": case.kind, "N": case.N, "K": case.K, "D": case.D, "family": case.family}
    rows = [{"case": case.name, "peer": peer, **size, **found[peer]} for peer in case.peers]
    for row in rows:
        print(line(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of threads of each library")
    parser.add_argument("--quick", action="store_true", help="small variants of some cases; results in build/bench")
    parser.add_argument("--only", default="", help="run the cases with this in their names, and only print")
    parser.add_argument("--save", action="store_true", help="with --only: replace the saved rows of these cases")
    parser.add_argument("--memory", type=float, default=16, help="GB of address space of a process on the CPU")
    options = parser.parse_args()
    chosen = [case for case in cases.CASES if case.device == options.device and options.only in case.name]
    chosen = [small for case in chosen if (small := cases.quick(case))] if options.quick else chosen
    if not chosen:
        parser.error(f"no {options.device} case has {options.only!r} in its name")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device; `gmmkeops doctor` says what is missing.")
    folder = QUICK if options.quick else RESULTS
    path = folder / f"{options.device}.json"
    how = {"threads": options.threads, "quick": options.quick}
    record = {
        "what": "seconds per EM iteration, fit, loss and gradient, or call, by kind; float32; smallest of the repetitions",
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.device),
        "threads": options.threads,
        "versions": {name: version for name in PACKAGES if (version := installed(name)) is not None},
        "roofline": measure("peaks", "", 60, 0, **how),
        "rows": [],
    }
    if options.quick:
        record["what"] += "; variants of the cases with at most 2000 points and 30 components"
    if options.only and options.save:
        here, record = record["machine"], json.loads(path.read_text())
        if record["machine"] != here:
            parser.error(
                f"{path.name} is of another machine ({record['machine']}, this is {here}), whose rows do not compare with this "
                "one's; run all cases here instead."
            )
    for case in chosen:
        began = time.perf_counter()
        rows = run_case(case, options.memory, **how)
        print(f"{time.perf_counter() - began:.0f} s for {case.name}", flush=True)
        place = next((n for n, row in enumerate(record["rows"]) if row["case"] == case.name), len(record["rows"]))
        others = [row for row in record["rows"] if row["case"] != case.name]
        record["rows"] = others[:place] + rows + others[place:]
        # After each case, so that an interrupted run keeps its rows.
        if options.save or not options.only:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
    print("python bench/report.py makes the tables and the plots")


if __name__ == "__main__":
    main()
