"""The native engine beside the dense one, and an EM iteration of the estimator beside scikit-learn's, on this CPU.

    python bench/engines.py     about five minutes; results in bench/results/engines.json, and the tables of the README

Engines alternate in one process, and so do the estimators, which begin with the same parameters, on float32 points. A time is the
smallest of several, in seconds of wall-clock time on all cores.
"""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gmmkeops as gk
from gmmkeops import reductions
from run import machine  # the record of the machine, as in cpu.json

RESULTS = Path(__file__).parent / "results/engines.json"
README = Path(__file__).parent.parent / "README.md"
MARKS = "<!-- engines -->", "<!-- end of engines -->"

# Covariances, points, components, dimensions; small problems are fitted as wholes below.
CASES = (
    ("full", 1_000_000, 30, 2),
    ("full", 1_000_000, 30, 3),
    ("full", 300_000, 60, 6),
    ("full", 100_000, 100, 10),
    ("full", 100_000, 64, 16),
    ("full", 50_000, 30, 32),
    ("full", 20_000, 30, 64),
    ("diag", 500_000, 64, 8),
    ("diag", 50_000, 256, 64),
    ("spherical", 50_000, 100, 128),
)
EM = {("full", 2), ("full", 3), ("full", 10), ("full", 32), ("diag", 8), ("diag", 64), ("spherical", 128)}
LONG = {"gmmkeops": (2, 22), "scikit-learn": (1, 3)}
SHORT = {"gmmkeops": (2, 20), "scikit-learn": (2, 20)}
SMALL = ((300, 3, 2), (1000, 2, 2), (1000, 10, 16))


def problem(kind: str, N: int, K: int, D: int) -> tuple[torch.Tensor, gk.Mixture]:
    """Clusters of unit variance with centers three units apart, and a mixture that is near the truth."""
    rng = np.random.default_rng(0)
    centers = 3 * rng.normal(size=(K, D))
    x = (centers[rng.integers(0, K, N)] + rng.normal(size=(N, D))).astype(np.float32)
    means = torch.as_tensor(centers + 0.3 * rng.normal(size=centers.shape))
    kind_class, _ = gk.components.factor_class(kind)
    covariances = kind_class.second_moments(torch.eye(D).double().expand(K, D, D))
    covariances = covariances / D if kind == "spherical" else covariances
    return torch.as_tensor(x), gk.Mixture(
        torch.ones(K).double(), means, kind_class.from_covariances(covariances, features=D)
    )


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Alternate between calls; return the smallest time of each, seconds."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def sweeps(kind: str, N: int, K: int, D: int) -> dict[str, Any]:
    """One pass over every pair, for two requests and both engines."""
    x, mixture = problem(kind, N, K, D)
    arguments = x, mixture.offsets, mixture.means, mixture.factor
    row: dict[str, Any] = {"covariances": kind, "N": N, "K": K, "D": D}
    for name, function in (("moments", reductions.moments), ("log_sum_exp", reductions.logsumexp)):
        calls = {
            backend: (lambda f=function, b=backend: f(*arguments, backend=b, truncate=0))
            for backend in ("native", "dense")
        }
        row[name] = fastest(calls, 7)
    return row


def estimators(
    kind: str, N: int, K: int, D: int, iterations: dict[str, tuple[int, int]], repeats: int
) -> dict[str, Any]:
    """An EM iteration: the difference of a long and a short fit, by that of their iterations (more for a fast peer)."""
    from sklearn.mixture import GaussianMixture

    x, mixture = problem(kind, N, K, D)
    points = x.numpy()
    precisions = mixture.factor.compact(mixture.factor.precisions()).numpy().astype(np.float32)
    options = {
        "weights_init": mixture.weights.numpy().astype(np.float32),
        "means_init": mixture.means.numpy().astype(np.float32),
        "precisions_init": precisions.reshape(K) if kind == "spherical" else precisions,
        "covariance_type": kind,
        "tol": 0.0,
    }
    calls = {}
    for name, kind_of in (("gmmkeops", gk.GaussianMixture), ("scikit-learn", GaussianMixture)):
        for count in iterations[name]:
            calls[f"{name} {count}"] = lambda c=kind_of, n=count: c(K, max_iter=n, **options).fit(points)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fastest(calls, repeats)
        likelihoods = {
            name: float(kind_of(K, max_iter=3, **options).fit(points).score(points))
            for name, kind_of in (("gmmkeops", gk.GaussianMixture), ("scikit-learn", GaussianMixture))
        }
    row: dict[str, Any] = {"covariances": kind, "N": N, "K": K, "D": D, "log_likelihood_after_3": likelihoods}
    for name, (few, many) in iterations.items():
        row["iterations"] = many
        row[name] = {
            "iteration": (found[f"{name} {many}"] - found[f"{name} {few}"]) / (many - few),
            "fit": found[f"{name} {many}"],
        }
    return row


def tables(record: dict[str, Any]) -> str:
    """The tables of the README."""
    lines = [
        "| one pass over every pair | moments: native | dense | log-densities: native | dense |",
        "|---|---|---|---|---|",
    ]
    for row in record["sweeps"]:
        cells = [f"{row['covariances']}, {row['N']:.0e} x {row['K']}, D={row['D']}".replace("e+0", "e")]
        for name in ("moments", "log_sum_exp"):
            native, dense = row[name]["native"], row[name]["dense"]
            cells += [f"{1e3 * native:.1f} ms", f"{1e3 * dense:.1f} ms ({dense / native:.1f}x)"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| the estimator, equal starts | gmmkeops | scikit-learn |", "|---|---|---|"]
    for row in record["estimators"]:
        ours, theirs = row["gmmkeops"]["iteration"], row["scikit-learn"]["iteration"]
        what = f"one EM iteration, {row['covariances']}, {row['N']:.0e} x {row['K']}, D={row['D']}".replace("e+0", "e")
        lines.append(f"| {what} | {1e3 * ours:.1f} ms | {1e3 * theirs:.0f} ms ({theirs / ours:.0f}x) |")
    for row in record["small"]:
        ours, theirs = row["gmmkeops"]["fit"], row["scikit-learn"]["fit"]
        what = f"a fit of {row['iterations']} iterations, {row['N']} x {row['K']}, D={row['D']}"
        lines.append(f"| {what} | {1e3 * ours:.1f} ms | {1e3 * theirs:.1f} ms ({theirs / ours:.1f}x) |")
    return "\n".join(lines)


def main() -> None:
    record = {
        "machine": machine("cpu"),
        "python": platform.python_version(),
        "instruction_set": reductions.instruction_set(),
        "sweeps": [sweeps(*case) for case in CASES],
        "estimators": [estimators(*case, iterations=LONG, repeats=2) for case in CASES if (case[0], case[3]) in EM],
        "small": [estimators("full", *case, iterations=SHORT, repeats=5) for case in SMALL],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    page = README.read_text()
    if all(mark in page for mark in MARKS):
        head, rest = page.split(MARKS[0])
        README.write_text(head + MARKS[0] + "\n" + tables(record) + "\n" + MARKS[1] + rest.split(MARKS[1])[1])
    print(tables(record))


if __name__ == "__main__":
    main()
