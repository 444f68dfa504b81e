"""Runs of k-means in the compiled library, for few points: initial centers and Lloyd iterations without the interpreter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gmmkeops.components import SphericalFactor
from gmmkeops.data import Batch
from gmmkeops.reductions.library import OUT_OF_MEMORY, KMeansCall, run
from gmmkeops.reductions.native.seeds import FEW, PRODUCTS
from gmmkeops.reductions.native.steps import StepSettings, described

__all__ = ["Clustering", "kmeans_runs", "lloyd_settings", "performs_kmeans"]


class Clustering(NamedTuple):
    """The result of a run of k-means.

    Args:
        centers: Centers (K, D).
        labels: Index (M,) of the nearest center of each of the different points, int64; None if it was not asked for.
    """

    centers: Tensor
    labels: Tensor | None = None


def lloyd_settings(mass: float, features: int) -> StepSettings:
    """Return the constants of Lloyd iterations as EM steps, for points of a total weight."""
    ridge = torch.zeros(features, dtype=torch.float64, device="cpu")
    return StepSettings(mass, ridge, 1.0, -1.0, (True, False, True), "hard", bare=True)


def performs_kmeans(batch: Batch, centers: int) -> bool:
    """Return whether the library performs whole runs of k-means on points."""
    x = batch.points
    if not isinstance(x, Tensor) or x.device.type != "cpu":
        return False
    N, D = x.shape
    return N * D * centers <= FEW and N * D * D <= PRODUCTS


def kmeans_runs(
    batch: Batch,
    roots: Tensor,
    centers: int,
    generator: torch.Generator,
    *,
    runs: int,
    candidates: int,
    iterations: int,
    relative: float,
    backend: str,
    labeled: bool = False,
) -> list[list[Clustering]] | None:
    """Perform runs of k-means in several metrics.

    Args:
        batch: All points (N, D) and their weights.
        roots: Upper triangular matrices (C, D, D), float64, by which the points are multiplied in each metric.
        centers: Number of centers K.
        generator: Random number generator, which draws 1 + (K - 1) candidates numbers for each run.
        runs: Number of runs in each metric.
        candidates: As for :func:`chosen_seeds`.
        iterations: Largest number of Lloyd iterations.
        relative: Decrease of the inertia, as a fraction, below which they end.
        backend: Name of the engine.
        labeled: Whether to return the labels of the different points, which are sorted.

    Returns:
        The runs in each metric; None if the library does not compute them. The generator is then unchanged.
    """
    x, K = batch.points, centers
    (N, D), C = x.shape, len(roots)
    if not performs_kmeans(batch, K):
        return None
    means, factor = roots.new_zeros(K, D), SphericalFactor(roots.new_zeros(1, 1), D)
    own = described(batch, means, factor, lloyd_settings(batch.mass, D), backend)
    if own is None or own[0].sweep.unit != 1:
        return None
    inner, _kept = own
    inner.steps, inner.tolerance, inner.relative = iterations, 0.0, relative
    state = generator.get_state()
    uniform = torch.rand(C, runs, 1 + (K - 1) * candidates, generator=generator, dtype=torch.float64, device="cpu")
    roots, found = roots.contiguous(), roots.new_empty(C, runs, K, D)
    labels = torch.empty(C, runs, N, dtype=torch.int64, device="cpu") if labeled else None
    call = KMeansCall(
        inner,
        C,
        runs,
        candidates,
        roots.data_ptr(),
        uniform.data_ptr(),
        found.data_ptr(),
        None if labels is None else labels.data_ptr(),
    )
    if run("gmmkeops_kmeans", call) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory for k-means with {K} centers.")
    if call.done < C * runs:
        generator.set_state(state)
        return None
    return [
        [Clustering(found[c, r], None if labels is None else labels[c, r, : call.points]) for r in range(runs)]
        for c in range(C)
    ]
