r"""Initial mixtures: centers by k-means or k-means++, and the weights, means and covariances of their clusters.

k-means is hard EM with a frozen, tied, spherical factor, so a Lloyd iteration is one call of ``moments(assignment="hard")``.
Centers are initialized by greedy k-means++ on a subsample, several at a time if there are many. References: Arthur and
Vassilvitskii 2007, *k-means++: the advantages of careful seeding*; Bahmani et al. 2012, *Scalable k-means++*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops._checks import accepts, as_choice, as_integer, renamed
from gmmkeops.components import Moments, SphericalFactor, factor_class, mind_fork
from gmmkeops.data import (
    NOISE,
    Batch,
    Source,
    World,
    readable,
    representatives,
    running_sum,
    table_names,
    trimmed_spread,
)
from gmmkeops.models import Mixture

__all__ = ["STRATEGIES", "initialize"]

STRATEGIES = ("random", "kmeans", "kmeans++", "responsibilities")

# Smallest subsample for k-means; larger ones have 20 points per component.
_SAMPLE = 20_000

# Number of rounds of k-means++ if there are more centers than that.
_ROUNDS = 64

# Fraction of the average cluster's weight with which a typical cluster is added to each cluster.
_SHARE = 0.01

# Relative to a typical variance within clusters: the number that is added to the variances of the typical cluster, and the
# largest mean variance with which a cluster contributes to it.
_FLOOR, _LARGE = 1e-6, 10.0


# Names of arguments in version 0.1, and in other libraries.
_OLD = {"components": "n_components", "weights": "sample_weight", "runs": "n_init"}
_WRONG = {name: "n_components" for name in ("k", "K", "n_clusters", "num_components", "n_mixtures")} | {
    "init": "strategy"
}
# Names with one meaning.
_SAME = {"k-means": "kmeans", "k-means++": "kmeans++"}


@accepts(old=_OLD, also={"random_state": "generator"}, wrong=_WRONG)
def initialize(
    x: Any,
    n_components: int,
    strategy: str = "kmeans",
    *,
    covariance_type: str = "full",
    sample_weight: Any = None,
    n_init: int = 3,
    generator: torch.Generator | int | None = None,
    refine: int = 0,
    backend: str = "auto",
) -> Mixture:
    r"""Compute an initial mixture whose components are clusters of the data.

    .. math:: \min_{\mu} \sum_n g_n \min_k \lVert x_n - \mu_k \rVert^2 \qquad \text{(the objective of k-means)}

    Args:
        x: Points (N, D), N >= K, data units; or anything that :meth:`gmmkeops.Source.of` accepts.
        n_components: Number of components K.
        strategy: ``"random"`` (K random points as centers), ``"k-means++"`` (K points that are far apart), ``"kmeans"``
            (k-means++, followed by Lloyd's iterations), or ``"responsibilities"`` (random responsibilities).
        covariance_type: As for :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`.
        sample_weight: Weight of each point (N,), or None.
        n_init: Number of runs of k-means or k-means++ on a sample of the points, of which the best one is kept.
        generator: Random number generator, or a seed. None uses a fixed seed, so that the same call gives the same mixture in
            every process. Torch's global random state is not used or changed.
        refine: Number of additional EM steps.
        backend: ``"auto"``, ``"keops"`` or ``"dense"``.

    Returns:
        A float64 mixture in data units with the weight, mean and covariance of each cluster. Covariances are regularized: each
        is averaged with that of a typical cluster, which enters with a hundredth of the average cluster's weight, so that a
        cluster of a single point has a covariance, too. The typical cluster is robust to outliers.

    Raises:
        TypeError, ValueError: Points or weights are invalid, fewer than K points have positive weight, or the strategy is
            unknown.

    Reference:
        Arthur and Vassilvitskii 2007, *k-means++: the advantages of careful seeding*, SODA.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> gk.initialize(x, 2, "kmeans").means.sort(0).values.round(decimals=2).tolist()
        [[0.05], [5.05]]
    """
    mind_fork()
    world = World()
    with world.together():
        strategy = as_choice(
            _SAME.get(strategy, strategy) if isinstance(strategy, str) else strategy, "strategy", STRATEGIES
        )
        kind, tied = factor_class(covariance_type)
        K = as_integer(n_components, "n_components")
        as_integer(K, "n_components", 1, clause="must be at least 1")
        runs, refine = as_integer(n_init, "n_init", 1), as_integer(refine, "refine", 0)
        as_choice(backend, "backend", reductions.BACKENDS)
        settings: dict[str, Any] = {
            "call": "initialize",
            "n_components": K,
            "strategy": strategy,
            "covariance_type": covariance_type,
        }
        settings |= {"n_init": runs, "refine": refine, "sample_weight": "none" if sample_weight is None else "given"}
        world.agree(settings)
        if readable(x):
            with renamed("weights", "sample_weight"):
                x, sample_weight = Source.of(x, weights=sample_weight), None
        names = world.tell(x.columns if isinstance(x, Source) else table_names(x))[0]
        with renamed("weights", "sample_weight"):
            rows, mass, some, chunks = representatives(x, sample_weight, max(_SAMPLE, 20 * K), world, minimum=K)
        if some < K:
            raise ValueError(f"{K} components need at least {K} points with positive weight, got {some}.")
        generator = world.generator(generator, rows.device)
        robust = trimmed_spread(rows, mass)
        if strategy == "responsibilities":
            return _mixture_of(_shared(rows, mass, K, kind, generator), kind, tied, *robust).named(names)
        points, masses = _distinct(rows, mass)
        if strategy == "kmeans":
            centers = _kmeans(points, masses, K, generator, backend, runs)
        elif strategy == "kmeans++":
            tries = [_seed(points, masses, K, generator, spread=True) for _ in range(runs if K > 1 else 1)]
            centers = min(tries, key=lambda seeds: float(_nearest(points, seeds) @ masses))
        else:
            centers = _seed(points, masses, K, generator, spread=False)
        mixture = _mixture_of(world.added(_clusters(chunks(), centers, kind, backend)), kind, tied, *robust)
        for _ in range(refine):
            mixture = _mixture_of(world.added(_shares(chunks(), mixture, backend)), kind, tied, *robust)
        return mixture.named(names)


def _distinct(rows: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    """The distinct points (M, D) among rows, float64, and their total weights (M,).

    Equal points are merged and sorted, so that with the same random numbers the result does not depend on the order of the rows,
    and a repeated point has the same effect as a weighted one.
    """
    if mass is None:
        mass = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    rows, mass = rows[mass > 0], mass[mass > 0]
    points, inverse = torch.unique(rows, dim=0, return_inverse=True)
    return points.double(), mass.new_zeros(len(points)).index_add(0, inverse, mass)


def _draw(mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices drawn with probabilities proportional to ``mass``, by inverting its cumulative sum."""
    total = running_sum(mass)
    u = torch.rand(count, generator=generator, dtype=torch.float64, device=mass.device)
    return torch.searchsorted(total, u * total[-1]).clamp(max=len(mass) - 1)


def _seed(points: Tensor, mass: Tensor, K: int, generator: torch.Generator, spread: bool) -> Tensor:
    """K centers (K, D) among the points: drawn by their weights, or by greedy k-means++ if ``spread``."""
    if not spread:
        # The K smallest of Exponential / mass are draws without replacement; with fewer distinct points, some are repeated.
        u = torch.rand(len(mass), generator=generator, dtype=torch.float64, device=mass.device)
        order = (-torch.log1p(-u) / mass).argsort()
        return points[order[torch.arange(K, device=mass.device) % len(order)]]
    first = _draw(mass, 1, generator)
    chosen, distance = [first], ((points - points[first]) ** 2).sum(1)
    while (left := K - sum(map(len, chosen))) > 0:
        chance = mass * distance
        # Many centers are chosen several at a time; few are chosen one by one, each as the best of some candidates.
        several = min(left, K // _ROUNDS)
        candidates = _draw(chance if float(chance.sum()) > 0 else mass, max(several, 2 + int(math.log(K))), generator)
        if several > 1:
            chosen.append(candidates[:several])
            distance = torch.minimum(distance, _nearest(points, points[chosen[-1]]))
            continue
        reach = torch.minimum(distance, ((points[candidates, None] - points) ** 2).sum(-1))
        best = (reach @ mass).argmin()
        chosen.append(candidates[best : best + 1])
        distance = reach[best]
    return points[torch.cat(chosen)]


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    """Squared distance of each point (N,) to the nearest center."""
    unit = torch.ones(1, 1, dtype=torch.float64, device=points.device)
    best, _ = reductions.topk(points, centers.new_zeros(len(centers)), centers, unit, 1)
    return -2 * best[:, 0]


def _lloyd(points: Tensor, mass: Tensor, centers: Tensor, backend: str, iterations: int = 30) -> tuple[Tensor, float]:
    """Lloyd's iterations until the inertia decreases by a fraction of less than 10⁻⁴; the centers and the inertia."""
    cloud = reductions.arrange(points, len(centers), sweeps=iterations)
    factor = SphericalFactor(centers.new_zeros(1, 1), centers.shape[1])
    last = math.inf
    for _ in range(iterations):
        offsets = centers.new_zeros(len(centers))
        arguments = (cloud, offsets, centers, factor)
        sums = reductions.moments(*arguments, weights=mass, assignment="hard", backend=backend)
        centers, inertia = sums.means, -float(sums.total)
        if last - inertia < 1e-4 * inertia:
            break
        last = inertia
    return centers, inertia


def _kmeans(points: Tensor, mass: Tensor, K: int, generator: torch.Generator, backend: str, runs: int) -> Tensor:
    """Centers (K, D) of the best one of ``runs`` runs of k-means on centered points."""
    offset = mass @ points / mass.sum()
    points = points - offset
    found = [
        _lloyd(points, mass, _seed(points, mass, K, generator, spread=True), backend)
        for _ in range(runs if K > 1 else 1)
    ]
    # Runs that are equal up to rounding count as equal; the first of them is taken.
    least = min(inertia for _, inertia in found)
    return next(centers for centers, inertia in found if inertia <= least * (1 + 1e-9)) + offset


def _shared(x: Tensor, g: Tensor | None, K: int, kind: Any, generator: torch.Generator) -> Moments:
    """Moments for uniformly drawn and normalized responsibilities, computed in chunks of rows."""
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


def _clusters(chunks: Iterable[Batch], centers: Tensor, kind: Any, backend: str) -> Moments:
    """Moments of the clusters: each point belongs to its nearest center."""
    K, D = centers.shape
    factor = kind.from_covariances(kind.compact(torch.eye(D).to(centers))[None], features=D)
    sums = Moments.nothing(centers, kind)
    for chunk in chunks:
        if len(chunk.points):
            arguments = (chunk.points, centers.new_zeros(K), centers, factor)
            part = reductions.moments(*arguments, weights=chunk.weights, assignment="hard", backend=backend)
            sums = sums + part
    return sums


def _shares(chunks: Iterable[Batch], mixture: Mixture, backend: str) -> Moments:
    """Moments for the responsibilities of a mixture (an E-step)."""
    sums = Moments.nothing(mixture.means, type(mixture.factor))
    for chunk in chunks:
        if len(chunk.points):
            arguments = (chunk.points, mixture.offsets, mixture.means, mixture.factor)
            sums = sums + reductions.moments(*arguments, weights=chunk.weights, backend=backend)
    return sums


def _mixture_of(sums: Moments, kind: Any, tied: bool, center: Tensor, spread: Tensor) -> Mixture:
    """The mixture of clusters with given moments, with regularized covariances (see :func:`initialize`).

    ``center`` and ``spread`` (D,) are the robust centers and standard deviations of the columns.
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
    # In these units a typical cluster has variances of about one. The contribution of each cluster to the pooled scatter is
    # limited, so that a single outlier or a small cluster does not determine it.
    scatter = scatter / kind.outer(unit)
    share = _SHARE * mass / K
    limit = torch.ones_like(counts) if tied else _LARGE / (variances / unit**2).mean(1).clamp(min=_LARGE)
    pooled = (limit.reshape(-1, *[1] * (scatter.ndim - 1)) * scatter).sum(0, keepdim=True) / mass
    pooled = pooled + _FLOOR * kind.second_moments(torch.eye(D).to(pooled))
    # An empty cluster gets this share as its weight, so that the logarithm is finite.
    logits = counts.clamp(min=share).log()
    # In directions in which a cluster has no extent, rounding may make its variance smaller than the added one.
    floor = (_FLOOR * share / (counts + share)).clamp(min=_FLOOR if tied else 0.0)
    if tied:
        scatter, counts, floor = pooled, torch.ones_like(mass)[None], floor[:1]
    else:
        scatter, counts = scatter + share * pooled, counts + share
    spreads = kind.variances(kind.mean_scatter(scatter, D)) / counts[:, None]
    floor = torch.maximum(floor, 1e-15 * spreads.amax(1))
    factor, _ = kind.maximize(scatter, counts, D, ridge=spread.new_zeros(D), floor=floor)
    return Mixture(torch.log_softmax(logits, 0), sums.means, factor.rescale(1 / unit.expand(D)))


def _unit(counts: Tensor, variances: Tensor, spread: Tensor) -> Tensor:
    """A typical standard deviation within clusters for each column (D or 1,), data units.

    It is the weighted median over the clusters. If that is zero, because most points are clusters of their own or a column is
    constant, it is the standard deviation of the whole data, or the largest value of the other columns.
    """
    order = variances.argsort(0)
    below = running_sum(counts[order])
    place = (below >= 0.5 * below[-1]).int().argmax(0)
    median = variances.gather(0, order).gather(0, place[None])[0].sqrt()
    unit = torch.where(median > 0, median, spread)
    largest = float(unit.amax())
    return torch.where(unit > 0, unit, largest if largest > 0 else 1e-3)
