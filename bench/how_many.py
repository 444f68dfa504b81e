"""Numbers of components that are chosen for data with known numbers of clusters, and the computing time of the choices.

    OMP_NUM_THREADS=1 python bench/how_many.py    some minutes on one core; bench/results/how_many.json and how_many.md
    python bench/how_many.py --simulated          only the simulations of few points again
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


# Criteria that are compared for few points per parameter, by the names in the table.
_CRITERIA = {"AIC3": "aic3", "BIC": "bic", "held-out": "held_out"}
# Mixtures of each kind, and single Gaussians of each kind.
_MIXTURES, _SINGLE = 100, 200


def mixture(seed: int, skewed: bool) -> tuple[np.ndarray, int]:
    """Return 100 to 999 points of 2 to 6 overlapping clusters, fewer than 20 for each parameter of one, and their number."""
    rng = np.random.default_rng(seed)
    D, K = int(rng.integers(2, 14)), int(rng.integers(2, 7))
    most = min(999, 10 * (D + 1) * (D + 2) - 1)
    N = int(np.exp(rng.uniform(np.log(100), np.log(most)))) if most > 100 else 100
    weights = 0.5 / K + 0.5 * rng.dirichlet(np.ones(K))
    labels = rng.choice(K, N, p=weights)
    # The distances of means hardly depend on the number of columns.
    means = rng.normal(size=(K, D)) * rng.uniform(2.5, 5.0) / np.sqrt(D)
    shapes = np.eye(D) + rng.normal(size=(K, D, D)) * 0.5 / np.sqrt(D)
    noise = rng.gamma(3.0, size=(N, D)) / np.sqrt(3.0) - np.sqrt(3.0) if skewed else rng.normal(size=(N, D))
    return means[labels] + np.einsum("nij,nj->ni", shapes[labels], noise), K


def single(seed: int, few: bool) -> np.ndarray:
    """Return points of one Gaussian in 1 to 3 columns or in 4 to 13, fewer than 20 for each parameter."""
    rng = np.random.default_rng(seed)
    D = int(rng.integers(1, 4) if few else rng.integers(4, 14))
    most = min(999, 10 * (D + 1) * (D + 2) - 1)
    N = int(rng.integers(min(40, most // 2), most))
    return rng.normal(size=(N, D))


def simulated() -> list[dict[str, Any]]:
    """Choose the number of components of simulated sets with few points per parameter; return one row for each criterion."""
    kinds: dict[str, list[tuple[np.ndarray, int]]] = {
        "Gaussian clusters": [mixture(seed, False) for seed in range(_MIXTURES)],
        "skewed clusters": [mixture(1000 + seed, True) for seed in range(_MIXTURES)],
        "one Gaussian, 1 to 3 columns": [(single(2000 + seed, True), 1) for seed in range(_SINGLE)],
        "one Gaussian, 4 to 13 columns": [(single(3000 + seed, False), 1) for seed in range(_SINGLE)],
    }
    rows = []
    for kind, sets in kinds.items():
        for name, criterion in _CRITERIA.items():
            found = [gk.analysis.select(x, criterion=criterion, generator=0).best.n_components - K for x, K in sets]
            row = {"kind": kind, "sets": len(sets), "criterion": name, "right": found.count(0)}
            rows.append(row | {"within one": sum(abs(n) <= 1 for n in found), "too many": sum(n > 0 for n in found)})
            print(rows[-1], flush=True)
    return rows


def simulations(rows: list[dict[str, Any]]) -> str:
    """The table of simulated sets with few points per parameter."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = []
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        cells = [f"{row['right']}, {row['within one']}, {row['too many']}" for row in own]
        lines.append([f"{kind} ({own[0]['sets']} sets)", *cells])
    return grid(["right, within one, too many", *_CRITERIA], lines)


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
    few = "<!-- few points -->\n\n" + simulations(record["simulated"]) + "\n\n<!-- end of few points -->\n"
    return "<!-- numbers -->\n\n" + "\n\n".join(parts) + "\n\n<!-- end of numbers -->\n\n" + few


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the tables from the committed results")
    parser.add_argument("--simulated", action="store_true", help="only repeat the simulations of few points")
    path, given = RESULTS / "how_many.json", parser.parse_args()
    if given.report:
        (RESULTS / "how_many.md").write_text(page(json.loads(path.read_text())))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # fits that do not converge, or have components of few points
    gk.analysis.select(np.random.default_rng(0).normal(size=(100, 2)))  # imports
    if given.simulated:
        record = json.loads(path.read_text()) | {"simulated": simulated()}
        path.write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "how_many.md").write_text(page(record))
        return
    record = heading(
        "numbers of components chosen for data with known numbers of clusters, and CPU time of one thread in seconds"
    )
    for name in SETS:
        if SETS[name]()[1] is None:
            continue
        for seed in range(SEEDS):
            record["rows"] += measured(name, seed)
        print(name, [(row["choice"], row["found"]) for row in record["rows"][-7:]], flush=True)
    record["simulated"] = simulated()
    path.write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "how_many.md").write_text(page(record))


if __name__ == "__main__":
    main()
