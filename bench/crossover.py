"""Which engine for which dimension: one E-step by each over a grid of dimensions, and the dense engine's tile size.

    python bench/crossover.py --device cuda [--json FILE]

Every time is that of one ``moments`` call, warm, the best of three; both engines' sums are compared with the float64 dense
engine's on a part of the points. "float32" is the dense engine with float32 products, which are tensor cores' on CUDA.
``auto`` on CUDA takes KeOps up to the dimensions that this
table shows; where it shows others on your device, pass ``backend=``.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.reductions.dense import engine as _dense

GRID = {"full": (1, 2, 3, 4, 6, 8, 10, 16), "diag": (2, 4, 8, 16, 24, 32)}
TILES = (1 << 20, 1 << 21, 1 << 22, 1 << 23, 1 << 24, 1 << 25)


def problem(N: int, K: int, D: int, family: str, device: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(K, D, generator=generator)
    x = means[torch.randint(K, (N,), generator=generator)] + torch.randn(N, D, generator=generator)
    shape = torch.eye(D).expand(K, D, D) if family == "full" else torch.ones(K, D)
    kind = gk.FullFactor if family == "full" else gk.DiagonalFactor
    return tuple(part.to(device) for part in (x, torch.zeros(K), means, kind.from_factors(shape.contiguous())))


def measure(arguments: tuple[Any, ...], backend: str, precision: str = "highest") -> float:
    torch.set_float32_matmul_precision(precision)
    best = float("inf")
    for repeat in range(4):
        began = time.perf_counter()
        sums = reductions.moments(*arguments, backend=backend, truncate=0)
        float(sums.total)
        if repeat:
            best = min(best, time.perf_counter() - began)
    torch.set_float32_matmul_precision("highest")
    return best


def error(arguments: tuple[Any, ...], backend: str) -> float:
    few = (arguments[0][:2000], *arguments[1:])
    truth = reductions.moments(few[0].double(), *few[1:], backend="dense", truncate=0)
    sums = reductions.moments(*few, backend=backend, truncate=0)
    return max(
        float((getattr(sums, n) - getattr(truth, n)).abs().max() / getattr(truth, n).abs().max()) for n in ("S0", "S2")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--components", type=int, default=1000)
    parser.add_argument("--json", help="write the results here as well")
    options = parser.parse_args()
    N, K, device = options.points, options.components, options.device
    rows = []
    for family, dimensions in GRID.items():
        for D in dimensions:
            arguments = problem(N, K, D, family, device)
            row: dict[str, Any] = {"family": family, "D": D}
            for backend in ("dense", "keops"):
                if reductions.engine(arguments[0], backend) != backend:
                    continue
                try:
                    if backend == "dense":
                        row["float32"] = measure(arguments, backend, "high")
                    row[backend], row[f"{backend}_error"] = measure(arguments, backend), error(arguments, backend)
                except RuntimeError as failure:
                    row[f"{backend}_failure"] = str(failure).splitlines()[0]
            rows.append(row)
            print(row, flush=True)
    tiles = {}
    arguments = problem(N, K, 16, "full", device)
    name = "_TILE_CUDA" if device == "cuda" else "_TILE_CPU"
    for size in TILES:
        setattr(_dense, name, size)
        tiles[size] = measure(arguments, "dense")
    print("dense tiles, pairs: seconds", tiles)
    if options.json:
        record = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "N": N, "K": K}
        with open(options.json, "w") as file:
            json.dump({**record, "rows": rows, "tiles": tiles}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
