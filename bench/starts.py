"""Initial mixtures compared: how good the fits are that begin with them, and how much computing time both take.

    OMP_NUM_THREADS=1 python bench/starts.py      a few minutes on one core; bench/results/starts.json, starts.md and starts.png,
                                                  and the table of the README
    python bench/starts.py --report               tables and plot from the committed results

Each strategy of ``gk.initialize`` is followed by EM with a tolerance of 1e-4, and compared with scikit-learn's default fit. A
third of the points of each set is held out. CPU times are those of initialization and fit on one thread. The fits of a set and
seed alternate, the smallest of several times counts, and times are only reported relative to scikit-learn's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

import gmmkeops as gk
from gmmkeops import reductions
from run import installed, machine

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MARKS = "<!-- starts -->", "<!-- end of starts -->"
THEIRS = "scikit-learn"
STRATEGIES = ("kmeans", "k-means++", "random_from_data", "annealed", "split-merge", "auto")
# The estimator with prior="auto", which begins with a search as well.
PRIOR = 'auto, prior="auto"'
SEEDS = 3
TOL, MOST = 1e-4, 500
# Times are repeated until this many seconds have passed, but at most this often.
_LONG, _REPEATS = 1.0, 5

# Points (N, D), labels (N,) or None, and number of components. A label of -1 is noise.
Set = tuple[np.ndarray, np.ndarray | None, int]


def standardized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def digits() -> Set:
    """Handwritten digits, in their first 12 principal components."""
    x, labels = load_digits(return_X_y=True)
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    z = (x - x.mean(0)) @ axes[:12].T
    return z / z.std(), labels, 10


def breast_cancer() -> Set:
    x, labels = load_breast_cancer(return_X_y=True)
    return standardized(x[:, [23, 24, 27]]), labels, 3


def iris() -> Set:
    x, labels = load_iris(return_X_y=True)
    return x, labels, 3


def wine() -> Set:
    x, labels = load_wine(return_X_y=True)
    return standardized(x), labels, 3


def clusters(N: int, K: int, D: int, spread: float, *, unequal: bool = False, noise: float = 0.0) -> Callable[[], Set]:
    """Draw from a mixture of K components with random centers and covariances; a fraction ``noise`` is uniform."""

    def drawn() -> Set:
        rng = np.random.default_rng(K)
        centers = spread * rng.normal(size=(K, D))
        roots = np.linalg.qr(rng.normal(size=(K, D, D)))[0] * np.exp(rng.uniform(-1, 0.5, (K, 1, D)))
        weights = rng.dirichlet(np.full(K, 1.0)) + 0.1 / K if unequal else np.ones(K)
        labels = rng.choice(K, N, p=weights / weights.sum())
        x = centers[labels] + np.einsum("nij,nj->ni", roots[labels], rng.normal(size=(N, D)))
        where = rng.random(N) < noise
        low, high = x.min(0), x.max(0)
        x[where] = rng.uniform(low, high, (int(where.sum()), D))
        labels[where] = -1
        return x, labels, K

    return drawn


def curves() -> Set:
    """Six noisy closed curves in three dimensions, K = 60."""
    rng = np.random.default_rng(6)
    N = 12_000
    t, which = rng.uniform(0, 2 * np.pi, N), rng.integers(0, 6, N)
    a, b, shift = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), 2 * rng.normal(size=(6, 3))
    c = 0.4 * rng.normal(size=(6, 3))
    t = t[:, None]
    x = shift[which] + a[which] * np.cos(t) + b[which] * np.sin(t) + c[which] * np.cos(3 * t)
    return x + 0.05 * rng.normal(size=(N, 3)), None, 60


SETS: dict[str, Callable[[], Set]] = {
    "iris": iris,
    "wine": wine,
    "breast cancer": breast_cancer,
    "digits": digits,
    "8 clusters and noise": clusters(4_000, 8, 2, 4.0, noise=0.05),
    "20 overlapping clusters": clusters(6_000, 20, 2, 3.0),
    "30 unequal clusters": clusters(9_000, 30, 5, 2.0, unequal=True),
    "50 clusters": clusters(12_000, 50, 8, 2.0),
    "noisy curves": curves,
}


def fits(x: np.ndarray, K: int, seed: int) -> dict[str, Callable[[], tuple[gk.Mixture, int]]]:
    """Return the fits to compare, each of which returns a mixture and the number of iterations."""

    def theirs() -> tuple[gk.Mixture, int]:
        model = GaussianMixture(K, random_state=seed).fit(x)
        return gk.from_sklearn(model).mixture_, model.n_iter_

    def ours(strategy: str) -> tuple[gk.Mixture, int]:
        start = gk.initialize(x, K, strategy, generator=seed)
        result = gk.fit(start, x, gk.EM(tol=TOL), max_iter=MOST, generator=seed)
        return result.mixture, result.n_iter

    def with_prior() -> tuple[gk.Mixture, int]:
        model = gk.GaussianMixture(K, tol=TOL, max_iter=MOST, prior="auto", random_state=seed).fit(x)
        return model.mixture_, model.n_iter_

    calls = {THEIRS: theirs} | {name: (lambda strategy=name: ours(strategy)) for name in STRATEGIES}
    return calls | {PRIOR: with_prior}


def measured(name: str, seed: int) -> list[dict[str, Any]]:
    """Compare all fits of a set with two thirds of its points; return one row for each."""
    x, labels, K = SETS[name]()
    order = np.random.default_rng(seed).permutation(len(x))
    used, unseen = np.split(order, [2 * len(x) // 3])
    calls = fits(x[used], K, seed)
    models, best = {}, dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()  # imports, and allocates memory
    began = time.perf_counter()
    for repeat in range(_REPEATS):
        for which, call in calls.items():
            start = time.process_time()
            models[which] = call()
            best[which] = min(best[which], time.process_time() - start)
        if repeat > 0 and time.perf_counter() - began > _LONG:
            break
    rows = []
    for which, (mixture, iterations) in models.items():
        row: dict[str, Any] = {"set": name, "N": len(used), "D": x.shape[1], "K": K, "seed": seed, "start": which}
        row["iterations"] = iterations
        row |= {"log_likelihood": gk.analysis.score(mixture, x[used]), "unseen": gk.analysis.score(mixture, x[unseen])}
        if labels is not None:
            known = labels >= 0
            row["rand"] = float(adjusted_rand_score(labels[known], mixture.predict(x[known])))
        rows.append(row | {"relative_cpu": best[which] / best[THEIRS]})
    return rows


def summaries(record: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Average the seeds: for each set and start the held-out log-likelihood, its gain, the Rand index and the CPU time."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in record["rows"]:
        found.setdefault(row["set"], {}).setdefault(row["start"], []).append(row)  # type: ignore[attr-defined]
    for starts in found.values():
        for name, rows in list(starts.items()):
            keys = [key for key in ("log_likelihood", "unseen", "rand") if key in rows[0]]
            starts[name] = {key: float(np.mean([row[key] for row in rows])) for key in keys}
            starts[name]["cpu"] = float(np.exp(np.mean([np.log(row["relative_cpu"]) for row in rows])))
        for values in starts.values():
            values["gain"] = values["unseen"] - starts[THEIRS]["unseen"]
    return found


def grid(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows])


def code(name: str) -> str:
    return " and ".join(f"`{part}`" for part in name.replace("auto, ", "auto,").split(","))


def overview(record: dict[str, Any]) -> str:
    """The table of the README: each start, over all sets."""
    found = summaries(record)
    lines = []
    for name in (*STRATEGIES, PRIOR):
        values = [starts[name] for starts in found.values()]
        gains = sorted(each["gain"] for each in values)
        rand = [each["rand"] for each in values if "rand" in each]
        cpu = sorted(each["cpu"] for each in values)
        lines.append(
            [
                code(name),
                f"{np.median(gains):+.3f}",
                f"{gains[0]:+.3f} to {gains[-1]:+.3f}",
                f"{np.mean(rand):.2f}",
                f"{np.median(cpu):.2f} ({cpu[0]:.2f} to {cpu[-1]:.2f})",
            ]
        )
    theirs = np.mean([starts[THEIRS]["rand"] for starts in found.values() if "rand" in starts[THEIRS]])
    lines.append(["scikit-learn's default", "0", "", f"{theirs:.2f}", "1"])
    heads = ["start", "held-out nats per point gained (median)", "on single sets", "adjusted Rand index", "CPU time"]
    return grid(heads, lines)


def page(record: dict[str, Any]) -> str:
    """The tables of the page "How to choose": likelihoods and Rand indices of each set."""
    found = summaries(record)
    names = (*STRATEGIES, PRIOR)
    heads = ["held-out nats per point", THEIRS, *(code(name) for name in names)]
    unseen, rand, cpu = [], [], []
    for name, starts in found.items():
        unseen.append([name, f"{starts[THEIRS]['unseen']:.3f}", *(f"{starts[each]['gain']:+.3f}" for each in names)])
        cpu.append([name, "1", *(f"{starts[each]['cpu']:.2f}" for each in names)])
        if "rand" in starts[THEIRS]:
            rand.append([name, *(f"{starts[each]['rand']:.2f}" for each in (THEIRS, *names))])
    parts = [
        grid(heads, unseen),
        grid(["adjusted Rand index", *heads[1:]], rand),
        grid(["CPU time, relative", *heads[1:]], cpu),
    ]
    return "<!-- starts -->\n\n" + "\n\n".join(parts) + "\n\n<!-- end of starts -->\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Gain of held-out likelihood against relative CPU time: a color for each strategy, a marker for each set."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    found = summaries(record)
    names = (*STRATEGIES, PRIOR)
    figure, axes = plt.subplots(figsize=(9.5, 5.2), layout="constrained")
    marks = "os^DvP*X<"
    for starts, mark in zip(found.values(), marks, strict=True):
        for number, name in enumerate(names):
            x, y = starts[name]["cpu"], starts[name]["gain"]
            # The results of "split-merge" and "auto" are often equal; an open marker lets the other one be seen.
            face = "none" if name == "split-merge" else f"C{number}"
            edge = f"C{number}" if name == "split-merge" else "w"
            axes.plot(
                x, y, mark, mfc=face, mec=edge, ms=12 if face == "none" else 8, mew=1.2 if face == "none" else 0.6
            )
    axes.axhline(0, color="k", lw=0.8)
    axes.axvline(1, color="k", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.03, linscale=1.2)
    times = [0.1, 0.2, 0.5, 1, 2, 5]
    axes.set_xlim(0.06, 7)
    axes.set_xticks(times, [f"{value:g}x" for value in times])
    axes.set_xticks([], minor=True)
    axes.set_ylim(-2, 3)
    ticks = [-1, -0.3, -0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3]
    axes.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axes.set_xlabel("CPU time of start and fit, relative to scikit-learn's default (left is faster)")
    axes.set_ylabel("gain in held-out log-likelihood (nats per point)")
    colors = [
        Line2D([], [], marker="o", ls="", mec=f"C{n}", mfc="none" if name == "split-merge" else f"C{n}", label=name)
        for n, name in enumerate(names)
    ]
    shapes = [Line2D([], [], marker=m, ls="", color="0.4", label=name) for m, name in zip(marks, found, strict=True)]
    first = figure.legend(handles=colors, loc="outside right upper", title="start")
    figure.add_artist(first)
    figure.legend(handles=shapes, loc="outside right lower", title="data set")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def heading(what: str) -> dict[str, Any]:
    """Return a record without rows: what was measured, when, and where."""
    return {
        "what": what,
        "date": datetime.date.today().isoformat(),
        "machine": machine("cpu"),
        "instruction_set": reductions.instruction_set(),
        "versions": {name: installed(name) for name in ("gmmkeops", "torch", "numpy", "scikit-learn")},
        "rows": [],
    }


def write(record: dict[str, Any]) -> None:
    """Write the tables and the plot."""
    import matplotlib
    import matplotlib.style

    matplotlib.use("Agg")
    matplotlib.style.use(README.parent / "gallery/gallery.mplstyle")
    (RESULTS / "starts.md").write_text(page(record))
    plot(record, RESULTS / "starts.png")
    text = README.read_text()
    head, rest = text.split(MARKS[0])
    README.write_text(head + MARKS[0] + "\n" + overview(record) + "\n" + MARKS[1] + rest.split(MARKS[1])[1])
    print(overview(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write tables and plot from the committed results")
    path = RESULTS / "starts.json"
    if parser.parse_args().report:
        write(json.loads(path.read_text()))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # fits that do not converge, which are counted as they are
    record = heading(
        "log-likelihoods (nats per point), adjusted Rand index, and CPU time of start and fit on one thread as a ratio "
        "to scikit-learn's default fit; the fits of a set and seed alternate in one process, and the smallest of several times "
        "counts"
    )
    for name in SETS:
        for seed in range(SEEDS):
            record["rows"] += measured(name, seed)
        print(name, {key: each for key, each in summaries(record)[name].items()}, flush=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    write(record)


if __name__ == "__main__":
    main()
