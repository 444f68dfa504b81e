"""What is measured: data, sizes, starts. Who is measured is another file's matter (adapters.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["CASES", "Case", "cloud", "find", "start"]


@dataclass(frozen=True)
class Case:
    """One problem that all peers get alike.

    Args:
        name: Its key in the results.
        kind: "em" (seconds per iteration from a given start), "bayes" (the same of variational Bayes, or a sweep of Gibbs
            sampling), "loss" (one loss and its gradient), "score" (log-densities of all points), "fit" (from k-means to a
            tolerance of 1e-4) or "target" (seconds to a mean log-likelihood, start included).
        data: "clusters", "surface" or "uniform".
        N, K, D: Points, components, dimensions.
        peers: Names of adapters.
        family: Covariance type, as scikit-learn names it.
        device: "cpu" or "cuda".
        iterations: A short and a long run of an "em" case; an iteration is the difference by the difference.
        target: Mean log-likelihood, nats per point, of a "target" case.
        limit: Seconds that one measurement may take.
        repeats: Measurements of each peer, taken in turns, of which the fastest counts; what takes long is taken once.
    """

    name: str
    kind: str
    data: str
    N: int
    K: int
    D: int
    peers: tuple[str, ...]
    family: str = "full"
    device: str = "cpu"
    iterations: tuple[int, int] = (1, 4)
    target: float | None = None
    limit: float = 75.0
    repeats: int = 2


def cloud(case: Case) -> np.ndarray:
    """The points (N, D), float32."""
    rng = np.random.default_rng(0)
    if case.data == "uniform":
        return rng.random((case.N, case.D), dtype=np.float32)
    if case.data == "clusters":
        centers = 3 * rng.normal(size=(case.K, case.D))
        x = centers[rng.integers(case.K, size=case.N)]
        x += rng.normal(size=x.shape) * rng.uniform(0.5, 1.5, size=case.D)
        return x.astype(np.float32)
    out = np.empty((case.N, 3), np.float32)
    for first in range(0, case.N, 1 << 20):
        part = out[first : first + (1 << 20)]
        u, v = 2 * math.pi * rng.random((2, len(part)))
        R = 1 + 0.3 * np.sin(3 * u) + 0.1 * np.cos(7 * v)
        rim = 2 + R / 2 * np.cos(v)
        x = np.stack([rim * np.cos(u), rim * np.sin(u), R / 2 * np.sin(v) + 0.3 * np.sin(2 * u)], 1)
        part[:] = x + 0.005 * rng.normal(size=x.shape)
    return out


def start(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (K,), means (K, D) and covariances (K, D, D) that every peer begins with, float64."""
    rng = np.random.default_rng(1)
    K, D = case.K, case.D
    if case.data == "clusters":
        means = 3 * np.random.default_rng(0).normal(size=(K, D)) + 0.5 * rng.normal(size=(K, D))
        width = 1.0
    elif case.data == "surface":
        means, width = x[rng.choice(len(x), K, replace=False)].astype(float), 3 / math.sqrt(K)
    else:
        means, width = rng.random((K, D)), 0.3
    return np.full(K, 1 / K), means, np.stack([width**2 * np.eye(D)] * K)


OURS = ("gmmkeops", "gmmkeops, every pair")
FAST = "gmmkeops, float32 products"
KNOWN = ("scikit-learn", "tgmm", "pomegranate", "torchgmm", "gmmx", "torch in chunks")
CASES = (
    Case("1e6 x 30, D=2", "em", "clusters", 1_000_000, 30, 2, (*OURS, FAST, "gmmkeops, KeOps", *KNOWN)),
    Case("1e6 x 30, D=3", "em", "clusters", 1_000_000, 30, 3, (*OURS, FAST, "gmmkeops, KeOps", *KNOWN)),
    Case("1e5 x 100, D=10", "em", "clusters", 100_000, 100, 10, (*OURS, FAST, *KNOWN), iterations=(3, 9)),
    # Runs of eight iterations and more leave components out by themselves here; these are shorter, so it is asked for.
    Case(
        "5e4 x 30, D=32",
        "em",
        "clusters",
        50_000,
        30,
        32,
        ("gmmkeops, 1e-6", *OURS[1:], FAST, *KNOWN),
        iterations=(3, 9),
    ),
    Case(
        "surface, 1e6 x 1000",
        "em",
        "surface",
        1_000_000,
        1000,
        3,
        ("gmmkeops, 1e-4", *OURS, "gmmkeops, KeOps 1e-4", *KNOWN),
        iterations=(3, 9),
        repeats=1,
    ),
    Case("surface, 1e6 x 2000", "em", "surface", 1_000_000, 2000, 3, ("gmmkeops, 1e-4",), iterations=(3, 9), repeats=1),
    Case("surface, 1e6 x 4000", "em", "surface", 1_000_000, 4000, 3, ("gmmkeops, 1e-4",), iterations=(3, 9), repeats=1),
    Case(
        "surface, 1e6 x 8000",
        "em",
        "surface",
        1_000_000,
        8000,
        3,
        ("gmmkeops, 1e-4", *OURS, "scikit-learn"),
        iterations=(2, 4),
        limit=240,
        repeats=1,
    ),
    Case(
        "surface, 1e6 x 16000", "em", "surface", 1_000_000, 16000, 3, ("gmmkeops, 1e-4",), iterations=(3, 9), repeats=1
    ),
    Case(
        "surface, 1e6 x 32000", "em", "surface", 1_000_000, 32000, 3, ("gmmkeops, 1e-4",), iterations=(3, 9), repeats=1
    ),
    Case(
        "surface, 1e7 x 10000",
        "em",
        "surface",
        10_000_000,
        10000,
        3,
        ("gmmkeops, 1e-4",),
        iterations=(2, 6),
        limit=180,
        repeats=1,
    ),
    Case("to -0.077, 1e6 x 1000", "target", "surface", 1_000_000, 1000, 3, ("gmmkeops",), target=-0.077, repeats=1),
    Case(
        "to 0.146, 1e6 x 8000",
        "target",
        "surface",
        1_000_000,
        8000,
        3,
        ("gmmkeops",),
        target=0.146,
        limit=300,
        repeats=1,
    ),
    Case(
        "whole fit, 1e6 x 30, D=3",
        "fit",
        "clusters",
        1_000_000,
        30,
        3,
        ("gmmkeops", "scikit-learn", "tgmm"),
        limit=200,
        repeats=1,
    ),
    Case(
        "posterior, 1e6 x 30, D=3",
        "bayes",
        "clusters",
        1_000_000,
        30,
        3,
        ("gmmkeops", "gmmkeops, Gibbs", "scikit-learn"),
        iterations=(2, 6),
        limit=150,
        repeats=1,
    ),
    Case(
        "loss, 1e6 x 30, D=2", "loss", "uniform", 1_000_000, 30, 2, ("gmmkeops", "GMM module", "KeOps tutorial", "zuko")
    ),
    Case(
        "loss, 1e6 x 30, D=3", "loss", "uniform", 1_000_000, 30, 3, ("gmmkeops", "GMM module", "KeOps tutorial", "zuko")
    ),
    Case(
        "loss, 1e5 x 100, D=10",
        "loss",
        "uniform",
        100_000,
        100,
        10,
        ("gmmkeops", "GMM module", "KeOps tutorial", "zuko"),
    ),
    Case(
        "score, 1e6 x 30, D=3",
        "score",
        "clusters",
        1_000_000,
        30,
        3,
        ("gmmkeops", "torch.distributions", "scikit-learn"),
    ),
    Case(
        "gpu score, 1e6 x 1000, D=3",
        "score",
        "clusters",
        1_000_000,
        1000,
        3,
        ("gmmkeops", "torch.distributions"),
        device="cuda",
    ),
    Case(
        "gpu loss, 1e6 x 1000, D=3",
        "loss",
        "uniform",
        1_000_000,
        1000,
        3,
        ("gmmkeops", "KeOps tutorial"),
        device="cuda",
    ),
    Case(
        "gpu 1e6 x 1000, D=3",
        "em",
        "clusters",
        1_000_000,
        1000,
        3,
        ("gmmkeops, every pair", "gmmkeops, KeOps", "gmmkeops, dense", FAST, "tgmm", "torch in chunks"),
        device="cuda",
        iterations=(5, 45),
    ),
    Case(
        "gpu 1e6 x 1000, D=16",
        "em",
        "clusters",
        1_000_000,
        1000,
        16,
        ("gmmkeops, every pair", "gmmkeops, KeOps", "gmmkeops, dense", FAST, "tgmm", "torch in chunks"),
        device="cuda",
        iterations=(2, 12),
    ),
    Case(
        "gpu 1e6 x 1024, D=128 spherical",
        "em",
        "clusters",
        1_000_000,
        1024,
        128,
        ("gmmkeops, every pair", "gmmkeops, dense", FAST, "Flash-GMM", "Flash-GMM, H100"),
        family="spherical",
        device="cuda",
        iterations=(2, 12),
    ),
    Case(
        "gpu surface, 1e8 x 10000",
        "em",
        "surface",
        100_000_000,
        10000,
        3,
        ("gmmkeops, 1e-4",),
        device="cuda",
        iterations=(2, 12),
        limit=300,
        repeats=1,
    ),
)


def find(name: str) -> Case:
    """The case of a name."""
    return next(case for case in CASES if case.name == name)
