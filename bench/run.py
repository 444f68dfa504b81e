"""The benchmark: every case by every peer that is installed, each measurement in a process of its own.

    python bench/run.py                      all CPU cases (about ten minutes on two cores), results in bench/results/cpu.json
    python bench/run.py --device cuda        the GPU cases, results in bench/results/cuda.json
    python bench/run.py --only surface       cases with this in their names
    python bench/report.py                   the table and the plots, from the results

All peers of a case get the same points, the same start and the same number of iterations. A process first runs the short
run cold, then the short and the long run warm; an iteration is the difference of the warm times by the difference of their
iterations, so that starting costs cancel. Peak memory is the process's own above imports and data. The final mean
log-likelihood is recomputed from the parameters in float64 by one referee. A peer that is not installed, fails, takes too
long or needs too much memory is a row that says so. The machine's rates of exponentials and matrix products are measured in
the same run, for what fraction of them an engine reaches.
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

RESULTS = HERE / "results"
# Seconds after which a measurement is not repeated.
_LONG = 20
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
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A file on the path has no version.
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


def measure(name: str, peer: str, limit: float, memory: float) -> dict[str, Any]:
    """One row, from a child process; or what went wrong, in one line."""
    package = adapters.PACKAGES.get(peer.split(",")[0], peer)
    if name != "roofline" and installed(package) is None:
        return {"error": "is not installed"}
    command = [sys.executable, str(HERE / "measure.py"), name, peer, str(memory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"takes more than {limit:g} s"}
    if done.returncode < 0:
        return {"error": f"was killed by signal {-done.returncode}"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed without a word"])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    head = f"{row['case']:>26}  {row['peer']:>22}"
    if "error" in row:
        return f"{head}  {row['error']}"
    parts = [f"{head}  {row['seconds']:9.4f} s", f"{row['peak_MB']:7.0f} MB"]
    if "log_likelihood" in row:
        parts.append(f"log-likelihood {row['log_likelihood']:.5f}")
    if row.get("pairs", 1) < 1:
        parts.append(f"{row['pairs']:.2%} of pairs")
    return "  ".join(parts)


def run_case(case: cases.Case, memory: float) -> list[dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    spent: dict[str, float] = {}
    for repeat in range(case.repeats):
        for peer in case.peers:
            # Who failed will fail again, and what takes long is less disturbed by others.
            if repeat and ("error" in best[peer] or spent[peer] > _LONG):
                continue
            began = time.perf_counter()
            row = measure(case.name, peer, case.limit, memory)
            spent[peer] = time.perf_counter() - began
            if peer not in best or row.get("seconds", 1e9) < best[peer].get("seconds", 1e9):
                best[peer] = row
    size = {"kind": case.kind, "N": case.N, "K": case.K, "D": case.D, "family": case.family}
    rows = [{"case": case.name, "peer": peer, **size, **best[peer]} for peer in case.peers]
    for row in rows:
        print(line(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="run the cases with this in their names, and only print")
    parser.add_argument(
        "--save", action="store_true", help="with --only: put these cases' rows in the place of the saved ones"
    )
    parser.add_argument(
        "--memory", type=float, default=16, help="GB of address space that a process on the CPU may take"
    )
    options = parser.parse_args()
    chosen = [case for case in cases.CASES if case.device == options.device and options.only in case.name]
    if not chosen:
        parser.error(f"no {options.device} case has {options.only!r} in its name")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device; `gmmkeops doctor` says what is missing.")
    path = RESULTS / f"{options.device}.json"
    record = {
        "what": "seconds per EM iteration, per loss and gradient, or per fit, by kind; float32; the fastest of the repeats",
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.device),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "roofline": measure("roofline", "", 60, 0),
        "rows": [],
    }
    if options.only and options.save:
        here, record = record["machine"], json.loads(path.read_text())
        if record["machine"] != here:
            parser.error(
                f"{path.name} is of another machine ({record['machine']}, this is {here}), whose rows do not compare with this "
                "one's; run all cases here instead."
            )
    for case in chosen:
        rows = run_case(case, options.memory)
        place = next((n for n, row in enumerate(record["rows"]) if row["case"] == case.name), len(record["rows"]))
        others = [row for row in record["rows"] if row["case"] != case.name]
        record["rows"] = others[:place] + rows + others[place:]
        # After each case, so that an interrupted run keeps what it has.
        if options.save or not options.only:
            path.write_text(json.dumps(record, indent=1) + "\n")
    print("python bench/report.py makes the tables and the plots")


if __name__ == "__main__":
    main()
