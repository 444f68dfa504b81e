r"""K-means, and mixtures of the clusters that it finds.

A Lloyd iteration is one call of ``moments`` with ``assignment="hard"``. Centers are initialized by greedy k-means++ on a
subsample; if there are many, several are chosen at a time. References: Arthur and Vassilvitskii 2007, *k-means++: the
advantages of careful seeding*; Bahmani et al. 2012, *Scalable k-means++*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import Moments, SphericalFactor
from gmmkeops.data import NOISE, Batch, running_sum
from gmmkeops.models import Mixture

__all__ = [
    "agreements",
    "clusters",
    "distinct",
    "kmeans",
    "labels",
    "lloyd",
    "mixture_of",
    "native_limits",
    "nearest",
    "pool_of",
    "random_responsibilities",
    "responsibilities",
    "runs_at_once",
    "seeds",
]

# Maximum number of rounds of k-means++. With more centers than rounds, several centers are chosen per round.
_ROUNDS = 64

# Largest number of Lloyd iterations, and decrease of the inertia, as a fraction, below which they end.
_ITERATIONS, _CHANGE = 30, 1e-4

# Number of values up to which all are counted, which takes less time than sorting.
_COUNTED = 1 << 16

# Weight of the pooled covariance in the covariance of each cluster, as a fraction of the average cluster weight.
_SHARE = 0.01

# Constants relative to a typical variance within clusters: the number added to the pooled variances, and the mean variance above
# which the contribution of a cluster to the pooled covariance is reduced.
_FLOOR, _LARGE = 1e-6, 10.0


def distinct(rows: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge and sort equal rows; return the distinct points (M, D), float64, and their total weights (M,).

    With the same random numbers, the result of k-means then does not depend on the order of the rows, and a repeated point has
    the same effect as a point of larger weight.
    """
    rows = rows.double()
    if mass is None:
        mass = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    else:
        rows, mass = rows[mass > 0], mass[mass > 0]
    # Rows are sorted by the first column, and those where it is equal by the others, from the last column to the first.
    order = rows[:, 0].argsort(stable=True)
    first = rows[order, 0]
    equal = (first[1:] == first[:-1]).nonzero()[:, 0]
    if len(equal):
        tied = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        tied[equal] = tied[equal + 1] = True
        group = order[tied]
        for column in reversed(rows.unbind(1)):
            group = group[column[group].argsort(stable=True)]
        order[tied] = group
    rows, mass = rows[order], mass[order]
    same = equal[(rows[equal] == rows[equal + 1]).all(1)]
    if not len(same):
        return rows, mass
    new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    new[same + 1] = False
    points = rows[new]
    return points, mass.new_zeros(len(points)).index_add(0, new.cumsum(0) - 1, mass)


def _draw(mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw indices with probabilities proportional to ``mass``, by inversion of its cumulative sum."""
    total = running_sum(mass)
    u = torch.rand(count, generator=generator, dtype=torch.float64, device=mass.device)
    return torch.searchsorted(total, u * total[-1]).clamp(max=len(mass) - 1)


def _rates(K: int) -> tuple[int, int]:
    """Return the number of centers that a round of k-means++ chooses, and the number of candidates for each of them.

    Many centers are chosen several at a time. Few centers are chosen one by one, each as the best of several candidates.
    """
    return K // _ROUNDS, 2 + int(math.log(K))


def seeds(points: Tensor, mass: Tensor, K: int, generator: torch.Generator, spread: bool) -> Tensor:
    """Choose K centers (K, D) among the points: at random by weight, or by greedy k-means++ if ``spread``."""
    if not spread:
        # The K smallest of Exponential(1) / mass are draws without replacement; with fewer distinct points, some are repeated.
        u = torch.rand(len(mass), generator=generator, dtype=torch.float64, device=mass.device)
        order = (-torch.log1p(-u) / mass).argsort()
        return points[order[torch.arange(K, device=mass.device) % len(order)]]
    at_once, tries = _rates(K)
    native = reductions.chosen_seeds(points, mass, K, tries, generator) if at_once < 2 else None
    if native is not None:
        return points[native]
    first = _draw(mass, 1, generator)
    chosen, distance = [first], ((points - points[first]) ** 2).sum(1)
    columns, squares = points.mT.contiguous(), points.square().sum(1)
    while (left := K - sum(map(len, chosen))) > 0:
        chance = mass * distance
        several = min(left, at_once)
        candidates = _draw(chance if float(chance.sum()) > 0 else mass, max(several, tries), generator)
        if several > 1:
            chosen.append(candidates[:several])
            distance = torch.minimum(distance, nearest(points, points[chosen[-1]]))
            continue
        # The squared distances (candidates, M); errors by cancellation are small where points are near the origin.
        reach = torch.addmm(squares, points[candidates], columns, alpha=-2).add_(squares[candidates, None])
        reach = torch.minimum(distance, reach.clamp_(min=0))
        best = (reach @ mass).argmin()
        chosen.append(candidates[best : best + 1])
        distance = reach[best]
    return points[torch.cat(chosen)]


def nearest(points: Tensor, centers: Tensor) -> Tensor:
    """Compute the squared distances (N,) of the points to their nearest centers."""
    unit = torch.ones(1, 1, dtype=torch.float64, device=points.device)
    best, _ = reductions.topk(points, centers.new_zeros(len(centers)), centers, unit, 1)
    return -2 * best[:, 0]


def labels(points: Tensor, centers: Tensor) -> Tensor:
    """Return for each of the points (N, D) the index (N,) of the nearest center, int64."""
    return reductions.argmax(points, centers.new_zeros(len(centers)), centers, centers.new_ones(1, 1))


def agreements(parts: list[Tensor], K: int) -> list[list[float]]:
    """Compute the adjusted Rand indices of partitions, which are labels (N,) from 0 to K - 1.

    An index is 1 for equal partitions, and 0 on average for random ones. Reference: Hubert and Arabie 1985, *Comparing
    partitions*, Journal of Classification 2.

    Returns:
        For each partition, its indices with those before it.
    """
    labels = [part.cpu().numpy() for part in parts]
    pairs = [_pairs(each, K) for each in labels]
    found: list[list[float]] = []
    for i, one in enumerate(labels):
        row = []
        for j, other in enumerate(labels[:i]):
            total = len(one) * (len(one) - 1.0)
            expected, largest = pairs[i] * pairs[j] / max(total, 1.0), (pairs[i] + pairs[j]) / 2
            both = _pairs(one * K + other, K * K)
            row.append((both - expected) / (largest - expected) if largest > expected else 1.0)
        found.append(row)
    return found


def _pairs(values: np.ndarray, count: int) -> float:
    """Return twice the number of pairs of equal values, which are integers from 0 to ``count`` - 1."""
    n = np.bincount(values) if count <= _COUNTED else np.unique(values, return_counts=True)[1]
    # The sum of n (n - 1).
    return float(n @ n) - len(values)


def lloyd(
    points: Tensor, mass: Tensor, centers: Tensor, backend: str, iterations: int = _ITERATIONS
) -> tuple[Tensor, float]:
    """Iterate k-means until the inertia decreases by a fraction of less than 1e-4; return the centers and the inertia."""
    cloud = reductions.arrange(points, len(centers), sweeps=iterations)
    offsets, factor = centers.new_zeros(len(centers)), SphericalFactor(centers.new_zeros(1, 1), centers.shape[1])
    settings = reductions.lloyd_settings(float(mass.sum()), centers.shape[1])
    left, last, inertia = iterations, math.inf, math.inf
    limits: dict[str, Any] = {"limit": left, "tolerance": 0.0, "relative": _CHANGE}
    steps = reductions.em_steps(Batch(cloud, mass), offsets, centers, factor, settings, backend=backend, **limits)
    if steps:
        centers, inertia = steps.means(len(steps)), -steps.totals[-1]
        last = -steps.totals[-2] if len(steps) > 1 else math.inf
        left -= len(steps)
    # If the library cannot compute a step, it cannot compute the next ones either.
    while left > 0 and not last - inertia < _CHANGE * inertia:
        sums = reductions.moments(cloud, offsets, centers, factor, weights=mass, assignment="hard", backend=backend)
        centers, last, inertia = sums.means, inertia, -float(sums.total)
        left -= 1
    return centers, inertia


def kmeans(
    points: Tensor,
    mass: Tensor,
    K: int,
    generator: torch.Generator,
    backend: str,
    runs: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Compute the centers (K, D) of the best one of ``runs`` runs of k-means on centered points; Lloyd iterations use a dtype."""
    offset = mass @ points / mass.sum()
    points = points - offset
    cast = points.to(dtype)
    found = [
        lloyd(cast, mass, seeds(points, mass, K, generator, spread=True), backend) for _ in range(runs if K > 1 else 1)
    ]
    # Among runs whose inertia is equal up to rounding, the first one is used.
    least = min(inertia for _, inertia in found)
    return next(centers for centers, inertia in found if inertia <= least + 1e-9 * abs(least)) + offset


def runs_at_once(
    batch: Batch, roots: Tensor, K: int, generator: torch.Generator, backend: str, runs: int
) -> list[list[reductions.Clustering]] | None:
    """Perform runs of k-means in several metrics, in the native engine; None if it does not compute them.

    Args:
        batch: All points (N, D) and their weights. Equal points are merged, as by :func:`distinct`.
        roots: Upper triangular matrices (C, D, D), by which the points are multiplied in each metric.
        K, generator, backend: As for :func:`kmeans`.
        runs: Number of runs in each metric. With several ones, the points are labeled.
    """
    limits = native_limits(K)
    if limits is None:
        return None
    return reductions.kmeans_runs(batch, roots, K, generator, runs=runs, backend=backend, labeled=runs > 1, **limits)


def native_limits(K: int) -> dict[str, Any] | None:
    """Return the limits of a run of k-means in the native engine; None if it does not choose centers several at a time."""
    at_once, tries = _rates(K)
    return None if at_once > 1 else {"candidates": tries, "iterations": _ITERATIONS, "relative": _CHANGE}


def random_responsibilities(x: Tensor, g: Tensor | None, K: int, kind: Any, generator: torch.Generator) -> Moments:
    """Compute moments for random responsibilities (uniform numbers, normalized), in chunks of rows."""
    D = x.shape[1]
    center = x[: 1 << 16].double().mean(0)
    S0, S1, S2 = torch.zeros(K), torch.zeros(K, D), torch.zeros(K, D, D)
    sums = [part.to(dtype=torch.float64, device=x.device) for part in (S0, S1, S2)]
    rows = max(1, (1 << 22) // (K + D * D))
    for start in range(0, len(x), rows):
        z = x[start : start + rows].double() - center
        r = torch.rand(len(z), K, generator=generator, dtype=torch.float64, device=x.device)
        r = r / r.sum(1, keepdim=True)
        r = r if g is None else r * g[start : start + rows, None]
        sums[0] += r.sum(0)
        sums[1] += r.mT @ z
        sums[2] += (r.mT @ (z[:, :, None] * z[:, None, :]).flatten(1)).unflatten(1, (D, D))
    mass = sums[0].sum()
    return Moments(sums[0], sums[1], kind.second_moments(sums[2]), center.expand(K, D), torch.zeros_like(mass), mass)


def clusters(chunks: Iterable[Batch], centers: Tensor, kind: Any, backend: str) -> Moments:
    """Compute the moments of the clusters, in which each point belongs to its nearest center."""
    K, D = centers.shape
    factor = kind.from_covariances(kind.compact(torch.eye(D).to(centers))[None], features=D)
    sums = Moments.nothing(centers, kind)
    for chunk in chunks:
        if len(chunk.points):
            arguments = (chunk.points, centers.new_zeros(K), centers, factor)
            part = reductions.moments(*arguments, weights=chunk.weights, assignment="hard", backend=backend)
            sums = sums + part
    return sums


def responsibilities(chunks: Iterable[Batch], mixture: Mixture, backend: str) -> Moments:
    """Compute the moments for the responsibilities of a mixture (E-step)."""
    sums = Moments.nothing(mixture.means, type(mixture.factor))
    for chunk in chunks:
        if len(chunk.points):
            arguments = (chunk.points, mixture.offsets, mixture.means, mixture.factor)
            sums = sums + reductions.moments(*arguments, weights=chunk.weights, backend=backend)
    return sums


def mixture_of(sums: Moments, kind: Any, tied: bool, center: Tensor, spread: Tensor) -> Mixture:
    """Build a mixture from the moments of clusters, with regularized covariances (see :func:`initialize`).

    ``center`` and ``spread`` (D,) are robust centers and standard deviations of the columns.
    """
    K, D = sums.centers.shape
    about = sums.recenter(sums.means)
    counts, scatter, mass = about.S0, about.S2, about.mass
    if kind.isotropic:
        center, spread = center.abs().amax()[None], spread.norm()[None] / D**0.5
    variances = kind.variances(kind.mean_scatter(scatter, D)).clamp(min=0) / counts.clamp(min=1e-300)[:, None]
    noise = NOISE * (sums.means.abs().amax(1, keepdim=True) if kind.isotropic else sums.means.abs())
    variances = torch.where(variances > noise**2, variances, 0.0)
    unit = _unit(counts, variances, torch.where(spread > NOISE * center.abs(), spread, 0.0))
    # In these units a typical cluster has variances of about one. The contribution of each cluster to the pooled covariance is
    # limited, so that a single outlier or a small cluster does not dominate it.
    scatter = scatter / kind.outer(unit)
    share = _SHARE * mass / K
    limit = torch.ones_like(counts) if tied else _LARGE / (variances / unit**2).mean(1).clamp(min=_LARGE)
    pooled = (limit.reshape(-1, *[1] * (scatter.ndim - 1)) * scatter).sum(0, keepdim=True) / mass
    pooled = pooled + _FLOOR * kind.second_moments(torch.eye(D).to(pooled))
    # An empty cluster gets this weight, so that its logarithm is finite.
    logits = counts.clamp(min=share).log()
    # Where a cluster has zero variance, rounding may make the regularized variance smaller than the added constant.
    floor = (_FLOOR * share / (counts + share)).clamp(min=_FLOOR if tied else 0.0)
    if tied:
        scatter, counts, floor = pooled, torch.ones_like(mass)[None], floor[:1]
    else:
        scatter, counts = scatter + share * pooled, counts + share
    spreads = kind.variances(kind.mean_scatter(scatter, D)) / counts[:, None]
    floor = torch.maximum(floor, 1e-15 * spreads.amax(1))
    factor, _ = kind.maximize(scatter, counts, D, ridge=spread.new_zeros(D), floor=floor)
    return Mixture(torch.log_softmax(logits, 0), sums.means, factor.rescale(1 / unit.expand(D)))


def pool_of(mass: float, K: int, below: float) -> reductions.Pool:
    """Return the constants with which the native engine regularizes covariances as :func:`mixture_of`.

    Args:
        mass: Total weight of the points.
        K: Number of clusters.
        below: Weight of a cluster, as a fraction, up to which covariances are regularized.
    """
    return reductions.Pool(below, _SHARE * mass / K, _FLOOR, _LARGE)


def _unit(counts: Tensor, variances: Tensor, spread: Tensor) -> Tensor:
    """Compute a typical standard deviation within clusters for each column (D or 1,), data units.

    It is the weighted median over the clusters. If this is zero, because most clusters are single points or a column is constant,
    it is the standard deviation of all points, or the largest value of the other columns.
    """
    order = variances.argsort(0)
    below = running_sum(counts[order])
    place = (below >= 0.5 * below[-1]).int().argmax(0)
    median = variances.gather(0, order).gather(0, place[None])[0].sqrt()
    unit = torch.where(median > 0, median, spread)
    largest = float(unit.amax())
    return torch.where(unit > 0, unit, largest if largest > 0 else 1e-3)
