"""Checks of all results on a CUDA device, and times of the engines there, in ten minutes.

    python bench/gpu.py                       all questions, results in bench/results/gpu.json
    python bench/gpu.py --only engines lists  some of them; the others keep their former answers
    python bench/gpu.py --device cpu --quick  small sizes on a CPU, to check this script

It installs nothing and needs no network. Packages that are missing are named, and questions that need them are skipped. The
answers are written after each question, so that a run that is cut short keeps what it has measured. ``bench/report.py`` makes
tables and a plot of them. Times are wall times of calls that wait for the device, the best of three after a first call.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import gpu_checks
import gpu_times
from gpu_run import Row, Run

# Packages that gmmkeops, or a part of it, needs, and what is skipped without them.
NEEDED = ("torch", "numpy", "tqdm", "matplotlib", "safetensors")
OPTIONAL = {
    "pykeops": "the KeOps engine and tutorial",
    "triton": "the Triton engine",
    "flash_gmm": "Flash-GMM (its file on PYTHONPATH, from github.com/IBM/Flash-GMM)",
    "gmmxx": "GMMXX (its module on PYTHONPATH, from github.com/OpsiClear/GMMXX)",
}


QUESTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    question.__name__: question
    for question in (
        gpu_checks.compilation,
        gpu_checks.correctness,
        gpu_times.engines,
        gpu_times.dimensions,
        gpu_times.batches,
        gpu_times.tiles,
        gpu_times.lists,
        gpu_times.iteration,
        gpu_times.setup,
        gpu_times.loss,
        gpu_times.peers,
    )
}


def missing() -> dict[str, str]:
    """Name the packages that cannot be imported, and what is skipped without them."""
    return {name: what for name, what in OPTIONAL.items() if importlib.util.find_spec(name) is None}


def environment(device: str) -> Row:
    """Describe the device and the versions of the packages."""
    import torch

    found: Row = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "CPU",
        "missing": missing(),
    }
    for name in ("triton", "pykeops"):
        if name not in found["missing"]:
            import importlib.metadata

            found[name] = importlib.metadata.version(name)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "CUDA": torch.version.cuda,
        }
    return found


def answer(run: Run, question: Callable[[Run], Iterator[Row]]) -> Row:
    """Ask a question; rows that were measured before a failure are kept."""
    began, found = time.perf_counter(), {"question": (question.__doc__ or "").strip(), "rows": []}
    if began > run.until:
        return found | {"skipped": "no time was left"}
    try:
        for row in question(run):
            found["rows"].append(row)
            print("  " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    except Exception as error:  # Other questions must still be answered.
        found["failure"] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        print(f"  failed: {found['failure']}", flush=True)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=tuple(QUESTIONS), help="ask only these questions")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no question is begun")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args(arguments)
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"gmmkeops needs {', '.join(absent)}, which this Python ({sys.executable}) does not have.")
        return 1
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; `python -m gmmkeops.cli doctor` says what is missing.")
        return 1
    run = Run(options.device, options.quick, time.perf_counter() + options.budget)
    former = json.loads(options.json.read_text()) if options.only and options.json.exists() else {"questions": {}}
    record = {"environment": environment(options.device), "questions": former["questions"]}
    for name, what in record["environment"]["missing"].items():
        print(f"{name} is missing: {what} is skipped.")
    for name in options.only or QUESTIONS:
        print(f"{name}: {(QUESTIONS[name].__doc__ or '').strip()}", flush=True)
        record["questions"][name] = answer(run, QUESTIONS[name])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    failed = [name for name, found in record["questions"].items() if "failure" in found]
    print(f"wrote {options.json}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
