"""One EM iteration, this package against scikit-learn and tgmm, float32, same data, same start, in one run.

    python bench/em.py [--json FILE] [--repeats 3]

Each measurement is a process of its own with a time limit; in it the same number of iterations is run from the same start
with the tolerance at zero, and the time of an iteration is the difference between a long and a short run divided by the
difference of their iterations, so that starting costs cancel. Peak memory is the process's own above imports and data. The
final mean log-likelihood is recomputed in float64 by one referee. A peer that is not installed, fails, or takes too long is a
row that says so. ``--fit`` compares whole fits instead: k-means start to convergence at the same tolerance.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time

CASES = {
    "1e6 x 30, D=2": (1_000_000, 30, 2),
    "1e6 x 30, D=3": (1_000_000, 30, 3),
    "1e5 x 100, D=10": (100_000, 100, 10),
    "5e4 x 30, D=32": (50_000, 30, 32),
}
PEERS = ("gmmkeops", "scikit-learn", "tgmm")
SHORT, LONG = 1, 4


def data(N, K, D):
    import numpy as np

    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(K, D))
    x = centres[rng.integers(K, size=N)] + rng.normal(size=(N, D)) * rng.uniform(0.5, 1.5, size=D)
    return x.astype(np.float32), (centres + 0.5 * rng.normal(size=(K, D))).astype(np.float32)


def ours(x, means, iterations, tol=0.0):
    import numpy as np

    import gmmkeops as gk

    K, D = means.shape
    start = (
        {}
        if tol
        else {
            "weights_init": np.full(K, 1 / K),
            "means_init": means,
            "precisions_init": np.stack([np.eye(D)] * K),
        }
    )
    # With a given start k-means++ is only there to be thrown away, so the cheapest one is asked for.
    init = "kmeans" if tol else "random_from_data"
    return gk.GaussianMixture(K, max_iter=iterations, tol=tol, init_params=init, random_state=0, **start).fit(x)


def sklearns(x, means, iterations, tol=0.0):
    import numpy as np
    from sklearn.mixture import GaussianMixture

    K, D = means.shape
    start = (
        {}
        if tol
        else {
            "weights_init": np.full(K, 1 / K, dtype=x.dtype),
            "means_init": means,
            "precisions_init": np.stack([np.eye(D, dtype=x.dtype)] * K),
        }
    )
    init = "kmeans" if tol else "random_from_data"
    return GaussianMixture(K, max_iter=iterations, tol=tol, init_params=init, random_state=0, **start).fit(x)


def tgmms(x, means, iterations, tol=0.0):
    import torch
    from tgmm import GaussianMixture

    K, D = means.shape
    model = GaussianMixture(
        n_components=K,
        n_features=D,
        covariance_type="full",
        max_iter=iterations,
        tol=tol or 1e-300,
        init_means="kmeans" if tol else torch.from_numpy(means),
        device="cpu",
    )
    model.fit(torch.from_numpy(x))
    return model


def parameters(model):
    import numpy as np

    return [np.asarray(getattr(model, name)) for name in ("weights_", "means_", "covariances_")]


def measure(peer, case, whole):
    """Runs in the child: prints one JSON line."""
    import resource
    import warnings

    warnings.simplefilter("ignore")
    run = {"gmmkeops": ours, "scikit-learn": sklearns, "tgmm": tgmms}[peer]
    x, means = data(*CASES[case])
    small = slice(0, 2000)
    run(x[small], means, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if whole:
        began = time.perf_counter()
        model = run(x, means, 1000, tol=1e-4)
        seconds = time.perf_counter() - began
    else:
        times = {}
        for iterations in (SHORT, LONG):
            began = time.perf_counter()
            model = run(x, means, iterations)
            times[iterations] = time.perf_counter() - began
        seconds = (times[LONG] - times[SHORT]) / (LONG - SHORT)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    import torch

    import gmmkeops as gk

    referee = gk.Mixture.from_parameters(*[torch.from_numpy(p).double() for p in parameters(model)])
    likelihood = float(referee.log_prob(torch.from_numpy(x).double()).mean())
    print(
        json.dumps(
            {"seconds": seconds, "peak_MB": peak, "log_likelihood": likelihood, "iterations": int(model.n_iter_)}
        )
    )


def versions():
    found = {"python": platform.python_version()}
    for name in ("gmmkeops", "torch", "numpy", "scikit-learn", "tgmm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results here as well")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, help="seconds for each measurement")
    parser.add_argument("--fit", action="store_true", help="whole fits of 1e6 x 30 in D=3 instead of iterations")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(*options.child, options.fit)
        return
    rows = []
    for case in ["1e6 x 30, D=3"] if options.fit else CASES:
        best = {}
        for _ in range(options.repeats):
            for peer in PEERS:
                found = child(peer, case, options)
                if peer not in best or found.get("seconds", 1e9) < best[peer].get("seconds", 1e9):
                    best[peer] = found
        for peer in PEERS:
            row = {"case": case, "peer": peer, **best[peer]}
            if "seconds" in row:
                row["ratio"] = row["seconds"] / best["gmmkeops"]["seconds"]
                print(
                    f"{case:>16}  {peer:>12}  {row['seconds']:8.3f} s  {row['ratio']:6.1f}x  {row['peak_MB']:7.0f} MB  "
                    f"log-likelihood {row['log_likelihood']:.5f}  {row['iterations']} iterations",
                    flush=True,
                )
            else:
                print(f"{case:>16}  {peer:>12}  {row['error']}", flush=True)
            rows.append(row)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {
                    "what": "whole fit, tol 1e-4" if options.fit else "one EM iteration, full covariance, same start",
                    "dtype": "float32",
                    "rows": rows,
                    "versions": versions(),
                    "cores": os.cpu_count(),
                },
                file,
                indent=1,
            )
            file.write("\n")


def child(peer, case, options):
    command = [sys.executable, __file__, "--child", peer, case] + (["--fit"] if options.fit else [])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {options.limit:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed without a word"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
