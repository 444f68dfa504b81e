"""Benchmark problems: data, sizes and initial parameters. The libraries that are measured are in ours.py and peers.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["CASES", "Case", "cloud", "dense", "find", "quick", "start"]


@dataclass(frozen=True)
class Case:
    """A problem that is given to all peers.

    Args:
        name: Its key in the results.
        kind: "em" (seconds per iteration from given parameters), "small" (a whole fit from given parameters), "bayes" (an
            iteration of variational Bayes, or a sweep of Gibbs sampling), "loss" (a loss and its gradient), "score"
            (log-densities of all points), "fit" (from k-means to a tolerance of 1e-4) or "target" (seconds to a mean
            log-likelihood, initialization included).
        data: "clusters", "surface", "uniform" or "iris".
        N, K, D: Numbers of points, components and dimensions.
        peers: Names of adapters.
        family: Covariance type, as in scikit-learn.
        device: "cpu" or "cuda".
        iterations: Iterations of a short and a long run of an "em" case, and of the fit of a "small" one (the second number).
            Likelihoods are compared after the second number of iterations.
        target: Mean log-likelihood, nats per point, of a "target" case.
        limit: Largest number of seconds of a measurement.
        repeats: Measurements of each peer, in turns with the other peers.
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
    iterations: tuple[int, int] = (1, 3)
    target: float | None = None
    limit: float = 75.0
    repeats: int = 2


def cloud(case: Case) -> np.ndarray:
    """Return the points (N, D), float32."""
    rng = np.random.default_rng(0)
    if case.data == "iris":
        from sklearn.datasets import load_iris

        return load_iris().data.astype(np.float32)
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
    """Return the initial weights (K,), means (K, D), and covariances in scikit-learn's shape of the family, float64.

    Except on the surface, weights and covariances differ between components, so that a peer that ignores them is found out.
    """
    rng = np.random.default_rng(1)
    K, D = case.K, case.D
    weights, scale = np.full(K, 1 / K), np.ones(K)
    if case.data == "clusters":
        means = 3 * np.random.default_rng(0).normal(size=(K, D)) + 0.5 * rng.normal(size=(K, D))
        weights, scale = rng.uniform(0.5, 1.5, size=K), rng.uniform(0.7, 1.4, size=K)
        weights /= weights.sum()
    elif case.data == "uniform":
        means, scale = rng.random((K, D)), np.full(K, 0.09)
    else:
        means = x[rng.choice(len(x), K, replace=False)].astype(float)
        scale = np.full(K, 9 / K if case.data == "surface" else 0.3)
    if case.family == "spherical":
        return weights, means, scale
    if case.family == "diag":
        return weights, means, scale[:, None] * np.linspace(0.8, 1.2, D)
    shape = np.eye(D) if case.data == "surface" else np.eye(D) + 0.1 / D
    return weights, means, shape * scale.mean() if case.family == "tied" else shape * scale[:, None, None]


def dense(covariances: np.ndarray, K: int, D: int, family: str) -> np.ndarray:
    """Return covariances of any family, or matrices (1 or K, D, D), as matrices (K, D, D)."""
    if covariances.ndim == 3:
        return np.broadcast_to(covariances, (K, D, D))
    if family == "spherical":
        return covariances[:, None, None] * np.eye(D)
    if family == "diag":
        return covariances[:, :, None] * np.eye(D)
    return np.broadcast_to(covariances, (K, D, D))


# Families of the peers that do not have all four.
_FAMILIES = {"pomegranate": ("full", "diag"), "gmmx": ("full", "diag"), "torch in chunks": ("full",)}
_PEERS = ("scikit-learn", "tgmm", "pomegranate", "torchgmm", "gmmx", "torch in chunks")
_ENGINES = ("gmmkeops", "gmmkeops, native", "gmmkeops, dense")
_KEOPS, _SINGLE = ("gmmkeops, keops",), ("gmmkeops, float32 products",)


def _peers(family: str) -> tuple[str, ...]:
    return tuple(peer for peer in _PEERS if family in _FAMILIES.get(peer, (family,)))


def _short(number: int) -> str:
    """Write 300000 as 3e5."""
    return f"{number:.0e}".replace("e+0", "e") if number >= 10_000 else str(number)


def _em(family: str, N: int, K: int, D: int, own: tuple[str, ...] = _ENGINES, **options) -> Case:
    name = f"{family}, {_short(N)} x {K}, D={D}"
    return Case(name, "em", "clusters", N, K, D, (*own, *_peers(family)), family, **options)


def _surface(N: int, K: int, *peers: str, **options) -> Case:
    options = {"iterations": (3, 9), "repeats": 1, **options}
    return Case(
        f"surface, {N:.0e} x {K}".replace("e+0", "e"), "em", "surface", N, K, 3, ("gmmkeops, 1e-4", *peers), **options
    )


def _small(data: str, N: int, K: int, D: int) -> Case:
    peers = (_ENGINES[0], "gmmkeops, estimator", *_ENGINES[2:], *_KEOPS, *_PEERS[:-1])
    name = f"{'iris' if data == 'iris' else N} x {K}, D={D}"
    return Case(name, "small", data, N, K, D, peers, iterations=(1, 20))


def _score(N: int, K: int = 30, D: int = 3) -> Case:
    peers = (*_ENGINES[1:], *_KEOPS, "torch.distributions", "zuko", *_PEERS[:-1])
    return Case(f"score, {_short(N)} x {K}, D={D}", "score", "clusters", N, K, D, peers)


def _loss(N: int, K: int, D: int) -> Case:
    peers = ("gmmkeops", "GMM module", "KeOps tutorial", "zuko")
    return Case(f"loss, {_short(N)} x {K}, D={D}", "loss", "uniform", N, K, D, peers, repeats=1)


def _gpu(name: str, kind: str, data: str, N: int, K: int, D: int, *peers: str, **options) -> Case:
    return Case(f"gpu {name}", kind, data, N, K, D, peers, device="cuda", **options)


_GPU_EM = ("gmmkeops, every pair", "gmmkeops, keops", "gmmkeops, dense", *_SINGLE, "tgmm", "torch in chunks")
_FEW = _ENGINES + _KEOPS
CASES = (
    _em("full", 200_000, 30, 1, _FEW),
    _em("full", 200_000, 30, 2, _FEW),
    _em("full", 300_000, 30, 3, _FEW + _SINGLE),
    _em("full", 50_000, 100, 10, _ENGINES + _SINGLE),
    _em("full", 30_000, 30, 32),
    _em("full", 10_000, 16, 128),
    _em("full", 4_000, 4, 512),
    _em("diag", 100_000, 64, 8, _FEW),
    _em("diag", 20_000, 128, 64),
    _em("diag", 10_000, 32, 512),
    _em("spherical", 200_000, 30, 3, _FEW),
    _em("spherical", 30_000, 100, 128),
    _em("tied", 200_000, 30, 3, _FEW),
    _em("tied", 10_000, 30, 64),
    # Sizes for which another system publishes times (report.py).
    *(Case(f"{family}, 1048576 x {K}, D={D}", "em", "clusters", 1 << 20, K, D, ("gmmkeops, native",), family, repeats=1)
      for family, K, D in (("full", 32, 8), ("diag", 64, 32), ("tied", 64, 32), ("spherical", 64, 32))),
    _surface(1_000_000, 1000, "gmmkeops", "gmmkeops, native", "gmmkeops, keops 1e-4", *_PEERS, limit=30),
    _surface(1_000_000, 2000),
    _surface(1_000_000, 4000),
    _surface(1_000_000, 8000, "gmmkeops", "gmmkeops, native", "scikit-learn", iterations=(2, 4), limit=120),
    _surface(1_000_000, 16000),
    _surface(1_000_000, 32000),
    _surface(10_000_000, 10000, iterations=(2, 6), limit=180),
    _small("clusters", 300, 3, 2),
    _small("iris", 150, 3, 4),
    _small("clusters", 1000, 2, 2),
    _score(1),
    _score(1000),
    _score(1_000_000),
    _loss(1_000_000, 30, 2),
    _loss(1_000_000, 30, 3),
    _loss(100_000, 100, 10),
    Case("to -0.077, 1e6 x 1000", "target", "surface", 1_000_000, 1000, 3, ("gmmkeops",), target=-0.077, repeats=1),
    Case("to 0.146, 1e6 x 8000", "target", "surface", 1_000_000, 8000, 3, ("gmmkeops",), target=0.146, limit=300, repeats=1),
    Case("whole fit, 2e5 x 30, D=3", "fit", "clusters", 200_000, 30, 3, ("gmmkeops", "scikit-learn", "tgmm"), repeats=1),
    Case("posterior, 2e5 x 30, D=3", "bayes", "clusters", 200_000, 30, 3,
         ("gmmkeops", "gmmkeops, Gibbs", "scikit-learn"), iterations=(2, 6), repeats=1),
    _gpu("score, 1e6 x 1000, D=3", "score", "clusters", 1_000_000, 1000, 3, "gmmkeops", "torch.distributions"),
    _gpu("loss, 1e6 x 1000, D=3", "loss", "uniform", 1_000_000, 1000, 3, "gmmkeops", "KeOps tutorial"),
    _gpu("1e6 x 1000, D=3", "em", "clusters", 1_000_000, 1000, 3, *_GPU_EM, iterations=(5, 45)),
    _gpu("1e6 x 1000, D=16", "em", "clusters", 1_000_000, 1000, 16, *_GPU_EM, iterations=(2, 12)),
    _gpu("1e6 x 1024, D=128 spherical", "em", "clusters", 1_000_000, 1024, 128,
         "gmmkeops, every pair", "gmmkeops, dense", *_SINGLE, "Flash-GMM", "Flash-GMM, H100",
         family="spherical", iterations=(2, 12)),
    _gpu("surface, 1e8 x 10000", "em", "surface", 100_000_000, 10000, 3, "gmmkeops, 1e-4",
         iterations=(2, 12), limit=300, repeats=1),
)  # fmt: skip


def quick(case: Case) -> Case | None:
    """Return a variant of at most 2000 points that shows in seconds whether a kind of case runs; None if another one does."""
    chosen = (
        "full, 3e5 x 30, D=3",
        "tied, 1e4 x 30, D=64",
        "surface, 1e6 x 2000",
        "iris x 3, D=4",
        "score, 1000 x 30, D=3",
    )
    if case.name not in (*chosen, "loss, 1e5 x 100, D=10", "whole fit, 2e5 x 30, D=3"):
        return None
    # Formulas of KeOps are compiled when they are first used, which takes longer than the quick run should.
    peers = tuple(peer for peer in case.peers if "keops" not in peer.lower().removeprefix("gmmkeops"))
    return replace(case, N=min(case.N, 2000), K=min(case.K, 30), peers=peers, repeats=1, limit=60)


def find(name: str, quickly: bool = False) -> Case:
    """Return the case of a name, or its quick variant."""
    case = next(case for case in CASES if case.name == name)
    return quick(case) or case if quickly else case
