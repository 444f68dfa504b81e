"""One loss and its gradient, this package against the KeOps tutorial's formula, warm, in one run.

    python bench/tutorial.py [--json FILE] [--repeats 5]

The tutorial's formula is ``-(Vi(x).weightedsqdist(Vj(mu), Vj(A Aᵀ / 2))).logsumexp(dim=1, weight=...)`` with KeOps'
autograd for the factors, the means and the weights; ours is the same quantity through ``Mixture.log_prob`` for ``GMM``
parameters, and through the fused value and gradient that :func:`gmmkeops.fit` runs. All are float32 on the CPU, from the
same parameters, and their losses are compared before a time is believed. Each time is the best of the repeats, taken in
turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time

import torch

# Before gmmkeops, so that the tutorial's formula is compiled as its readers compile it, with KeOps' own flags.
try:
    import pykeops
    from pykeops.torch import Vi, Vj
except ImportError:
    raise SystemExit("the tutorial's formula needs pykeops: pip install pykeops") from None

import gmmkeops as gk

CASES = [(1_000_000, 30, 2), (1_000_000, 30, 3), (100_000, 100, 10)]
TARGETS = {2: 6.0, 3: 10.0, 10: 60.0}


def problem(N, K, D):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N, D, generator=generator)
    means = torch.rand(K, D, generator=generator)
    A = 3 * torch.eye(D) + 0.3 * torch.randn(K, D, D, generator=generator).triu()
    return x, torch.ones(K), means, A


def tutorial(x, w, mu, A):
    w, mu, A = (p.clone().requires_grad_() for p in (w, mu, A))

    def run():
        for p in (w, mu, A):
            p.grad = None
        gamma = (A @ A.mT) / 2
        weights = (w.softmax(0) * torch.linalg.det(gamma).sqrt())[:, None]
        exponents = -Vi(x).weightedsqdist(Vj(mu), Vj(gamma.reshape(len(A), -1)))
        loss = -exponents.logsumexp(dim=1, weight=Vj(weights)).mean()
        loss.backward()
        return float(loss.detach()) + 0.5 * x.shape[1] * math.log(math.pi)

    return run


def module(x, w, mu, A):
    start = gk.Mixture(w, mu, gk.FullFactor.from_factors(A))
    model = gk.GMM(x.shape[1], components=len(w), epsilon=0.0).assign(start)

    def run():
        model.zero_grad()
        loss = -model().log_prob(x).mean()
        loss.backward()
        return float(loss.detach())

    return run


def fused(x, w, mu, A):
    factor = gk.FullFactor.from_factors(A)
    leaves = [p.clone().requires_grad_() for p in (w, mu, *factor.tensors.values())]

    def run():
        for p in leaves:
            p.grad = None
        mixture = gk.Mixture(leaves[0], leaves[1], gk.FullFactor(*leaves[2:]), validate_args=False)
        loss = -gk.reductions.total(x, mixture.offsets, mixture.means, mixture.factor) / len(x)
        loss.backward()
        return float(loss.detach())

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results here as well")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = []
    print(
        f"{'points':>9} {'K':>4} {'D':>3} | {'tutorial':>10} {'module':>10} {'fit':>10} | {'ratio (fit)':>11} {'target':>7}"
    )
    for N, K, D in CASES:
        arguments = problem(N, K, D)
        runs = {"tutorial": tutorial(*arguments), "module": module(*arguments), "fit": fused(*arguments)}
        losses = {name: run() for name, run in runs.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4 * max(1.0, abs(losses["fit"])):
            raise SystemExit(f"the losses differ, so the times mean nothing: {losses}")
        seconds = dict.fromkeys(runs, math.inf)
        for _ in range(options.repeats):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], time.perf_counter() - began)
        ratio = seconds["tutorial"] / seconds["fit"]
        print(
            f"{N:>9} {K:>4} {D:>3} | {seconds['tutorial']:>8.3f} s {seconds['module']:>8.3f} s {seconds['fit']:>8.3f} s | "
            f"{ratio:>10.1f}x {TARGETS[D]:>6.0f}x",
            flush=True,
        )
        rows.append({"N": N, "K": K, "D": D, "seconds": seconds, "ratio": ratio, "loss": losses})
    if options.json:
        record = {
            "what": "one loss and gradient, float32, CPU, best of repeats, seconds",
            "rows": rows,
            "versions": {
                "gmmkeops": gk.__version__,
                "torch": torch.__version__,
                "pykeops": pykeops.__version__,
                "python": platform.python_version(),
            },
            "keops_flags": os.environ.get("CXXFLAGS", "KeOps' own"),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "processor": processor(),
        }
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
