"""Numbers of components that are chosen for data with known numbers of clusters, and the computing time of the choices.

    OMP_NUM_THREADS=1 python bench/how_many.py    some minutes on one core; bench/results/how_many.json and how_many.md
    python bench/how_many.py --report             tables from the committed results

The data sets are those of starts.py with labels. For a list of numbers, mixtures with 1 to 2 K components are compared, where
K is the known number. CPU times are those of one thread. The known numbers are those of classes or of simulated clusters. Classes
that overlap may be one cluster, and a simulated cluster that nearly coincides with another one cannot be found.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from starts import RESULTS, SETS, grid, heading

import gmmkeops as gk

THEIRS = "scikit-learn, BIC of a list"
SEEDS = 3
# Known numbers that differ from the numbers of components in starts.py: breast cancer has two classes.
_KNOWN = {"breast cancer": 2}
# Largest known number of components for scikit-learn, whose fits take long.
_THEIRS_MOST = 10


def choices(x: np.ndarray, K: int, seed: int) -> dict[str, Callable[[], int]]:
    """Return the ways to choose, each of which returns a number of components."""
    numbers = range(1, 2 * K + 1)

    def ours(**options: Any) -> Callable[[], int]:
        return lambda: gk.analysis.select(x, generator=seed, **options).best.n_components

    def theirs() -> int:
        fits = [GaussianMixture(n, random_state=seed).fit(x) for n in numbers]
        return 1 + int(np.argmin([fit.bic(x) for fit in fits]))

    found = {
        "default": ours(),
        "BIC": ours(criterion="bic"),
        "held-out": ours(criterion="held_out"),
        "ICL": ours(criterion="icl"),
        "BIC of a list": ours(n_components=numbers),
        "BIC of a list, k-means": ours(n_components=numbers, strategy="kmeans", runs=3),
    }
    return found | ({THEIRS: theirs} if K <= _THEIRS_MOST else {})


def measured(name: str, seed: int) -> list[dict[str, Any]]:
    """Choose the number of components of a set in each way; return one row for each."""
    x, _, K = SETS[name]()
    K = _KNOWN.get(name, K)
    rows = []
    for which, call in choices(x, K, seed).items():
        began = time.process_time()
        found = call()
        taken = time.process_time() - began
        size = {"set": name, "N": len(x), "D": x.shape[1], "K": K, "seed": seed}
        rows.append({**size, "choice": which, "found": found, "cpu_seconds": taken})
    return rows


def page(record: dict[str, Any]) -> str:
    """The tables of the page "How to choose": found numbers and CPU times of each set, and how often the number was right."""
    rows = record["rows"]
    names, sets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("choice", "set"))

    def of(name: str, which: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["set"] == name and row["choice"] == which]

    found, cpu = [], []
    for name in sets:
        first = of(name, names[0])[0]
        head = f"{name} ({first['N']} x {first['D']})"
        cells = [", ".join(str(row["found"]) for row in of(name, which)) for which in names]
        found.append([head, str(first["K"]), *cells])
        times = [[row["cpu_seconds"] for row in of(name, which)] for which in names]
        cpu.append([head, *(f"{min(part):.2f}" if part else "" for part in times)])
    right, near = [], []
    for which in names:
        own = [row for row in rows if row["choice"] == which]
        right.append(f"{sum(row['found'] == row['K'] for row in own)} of {len(own)}")
        near.append(f"{sum(abs(row['found'] - row['K']) <= 1 for row in own)} of {len(own)}")
    found += [["right", "", *right], ["within one", "", *near]]
    heads = ["known", *names]
    parts = [grid(["found number", *heads], found), grid(["CPU seconds", *names], cpu)]
    return "<!-- numbers -->\n\n" + "\n\n".join(parts) + "\n\n<!-- end of numbers -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the tables from the committed results")
    path = RESULTS / "how_many.json"
    if parser.parse_args().report:
        (RESULTS / "how_many.md").write_text(page(json.loads(path.read_text())))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # fits that do not converge, or have components of few points
    gk.analysis.select(np.random.default_rng(0).normal(size=(100, 2)))  # imports
    record = heading(
        "numbers of components chosen for data with known numbers of clusters, and CPU time of one thread in seconds"
    )
    for name in SETS:
        if SETS[name]()[1] is None:
            continue
        for seed in range(SEEDS):
            record["rows"] += measured(name, seed)
        print(name, [(row["choice"], row["found"]) for row in record["rows"][-7:]], flush=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "how_many.md").write_text(page(record))


if __name__ == "__main__":
    main()
