"""What the page "How to choose" says, measured: methods, covariance types, engines and truncations of this package.

    python bench/choose.py      about four minutes on two cores; bench/results/choose.json
    python bench/report.py      the page's tables, bench/results/choose.md

Methods run from one start, each to its own tolerance. Covariance types are judged by points that they have not seen. The time of
an iteration is the median of the later ones: compiling and laying out points count for nothing.
"""

from __future__ import annotations

import datetime
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, cloud, start
from sklearn.datasets import load_digits, load_sample_image

import gmmkeops as gk
from run import installed, machine

RESULTS = Path(__file__).parent / "results"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pace(result: Any) -> float:
    """Seconds of an iteration, those after the first few."""
    return float(np.median(np.diff(result.history["seconds"])[2:]))


def methods() -> Iterator[dict[str, Any]]:
    """Overlapping clusters, 200 000 x 3, K = 20, from one k-means start."""
    x = torch.from_numpy(cloud(Case("", "em", "clusters", 200_000, 20, 3, ())))
    first = gk.initialize(x, 20, "kmeans", generator=seeded())
    gk.fit(first, x, gk.Adam(), max_iter=1)  # imports torch's optimizers
    choices = {
        "EM()": (gk.EM(tol=1e-6), 2000),
        "EM(accelerate=True)": (gk.EM(tol=1e-6, accelerate=True), 700),
        "EM(batch_size=20_000, average=True)": (gk.EM(batch_size=20_000, average=True, tol=0), 3),
        'EM(assignment="hard")': (gk.EM(tol=1e-6, assignment="hard"), 500),
        "Adam(lr=0.05)": (gk.Adam(lr=0.05), 300),
        "Adam(lr=0.01, batch_size=20_000)": (gk.Adam(lr=0.01, batch_size=20_000), 20),
        "bayes.VariationalBayes()": (gk.bayes.VariationalBayes(tol=1e-6), 2000),
    }
    for name, (method, most) in choices.items():
        began = time.perf_counter()
        result = gk.fit(first, x, method, max_iter=most, generator=seeded())
        spent = time.perf_counter() - began
        yield {
            "name": name,
            "passes": result.n_iter * (3 if "accelerate" in name else 1),
            "seconds": spent,
            "log_likelihood": gk.analysis.score(result.mixture, x),
        }


def covariances() -> Iterator[dict[str, Any]]:
    """Colors of a photograph (D = 3, K = 32), handwritten digits (D = 32, K = 10); half is fitted, the other half scored."""
    rng = np.random.default_rng(0)
    colors = (load_sample_image("china.jpg").reshape(-1, 3) + rng.random((273_280, 3))) / 256
    digits = load_digits().data
    _, _, axes = np.linalg.svd(digits - digits.mean(0), full_matrices=False)
    for data, x, K in (("colors", colors, 32), ("digits", digits @ axes[:32].T, 10)):
        x = torch.from_numpy(x[rng.permutation(len(x))])
        fitted, unseen = x[::2], x[1::2]
        for kind in ("full", "tied_full", "diag", "tied_diag", "spherical", "tied_spherical"):
            first = gk.initialize(fitted, K, "kmeans", covariance_type=kind, generator=seeded())
            result = gk.fit(first, fitted, gk.EM(tol=1e-5), max_iter=500, dtype="float32")
            yield {
                "data": data,
                "name": kind,
                "parameters": result.mixture.parameter_count,
                "seconds": pace(result),
                "log_likelihood": result.log_likelihood,
                "unseen": gk.analysis.score(result.mixture, unseen),
            }


def engines() -> Iterator[dict[str, Any]]:
    """Clusters, 200 000 points, K = 30, float32, every pair: seconds of an EM iteration on both engines."""
    for D in (2, 3, 6, 16):
        case = Case("", "em", "clusters", 200_000, 30, D, ())
        x = torch.from_numpy(cloud(case))
        weights, means, C = start(case, x.numpy())
        for kind, spread in (("full", C), ("diag", np.einsum("kdd->kd", C))):
            first = gk.Mixture.from_parameters(weights, means, spread, kind)
            row: dict[str, Any] = {"D": D, "name": kind}
            for backend in ("dense", "keops"):
                result = gk.fit(first, x, gk.EM(tol=0), max_iter=8, backend=backend, truncate=0)
                row[backend] = pace(result)
            yield row


def truncations() -> Iterator[dict[str, Any]]:
    """A surface, 200 000 points, K = 3000, float32: what ε saves, what it promises, and what it loses."""
    case = Case("", "em", "surface", 200_000, 3000, 3, ())
    x = torch.from_numpy(cloud(case))
    first = gk.Mixture.from_parameters(*start(case, x.numpy()))
    first = gk.fit(first, x, gk.EM(tol=0), max_iter=10, truncate=1e-4).mixture
    exact = first.log_prob(x.double(), truncate=0)
    for epsilon in (0, None, 1e-6, 1e-4, 1e-2):
        result = gk.fit(first, x, gk.EM(tol=0), max_iter=8, truncate=epsilon)
        lost = 0.0 if epsilon in (0, None) else float((exact - first.log_prob(x.double(), truncate=epsilon)).max())
        yield {
            "name": "None" if epsilon is None else f"{epsilon:g}",
            "seconds": pace(result),
            "pairs": result.report.evaluated_fraction,
            "certificate": result.report.certificate,
            "lost": lost,
            "log_likelihood": result.log_likelihood,
        }


def main() -> None:
    warnings.simplefilter("ignore", gk.ConvergenceWarning)
    record: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine("cpu")}
    record["versions"] = {name: installed(name) for name in ("gmmkeops", "torch", "pykeops", "numpy")}
    for part in (methods, covariances, engines, truncations):
        record[part.__name__] = rows = []
        for row in part():
            rows.append(row)
            print(part.__name__, row, flush=True)
    (RESULTS / "choose.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
