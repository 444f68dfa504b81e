r"""Where a fit begins: centres from the data, and the mixture of their clusters.

k-means is hard EM with a frozen, tied, spherical factor, so Lloyd's step is one ``moments(assignment="hard")``; the seeding is
greedy k-means++ on a subsample. Reference: Arthur and Vassilvitskii 2007, *k-means++: the advantages of careful seeding*.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops._checks import as_points, as_weights
from gmmkeops.factors import SphericalFactor, factor_class
from gmmkeops.mixture import Mixture

__all__ = ["STRATEGIES", "initialise"]

STRATEGIES = ("random", "kmeans", "kmeans++")

# Of the average cluster's mass: how much of the average cluster is mixed into each.
_SHARE = 0.01


def initialise(
    x: Any,
    components: int,
    strategy: str = "kmeans",
    *,
    covariance_type: str = "full",
    weights: Any = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Mixture:
    r"""A mixture whose components are clusters of the data.

    Args:
        x: Points (N, D), N >= K, data units.
        components: K.
        strategy: ``"random"`` (K points of the data as centres), ``"kmeans++"`` (K points, far apart), ``"kmeans"``
            (those, improved by Lloyd's iterations).
        covariance_type: As for :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`.
        weights: Weight of each point (N,), or None.
        generator: Source of randomness. Without one the seed is torch's initial seed, and torch's own state is left
            alone, so that the same call gives the same start.
        backend: ``"auto"``, ``"keops"`` or ``"dense"``.

    Returns:
        A float64 mixture with each cluster's weight, mean and covariance. To every cluster a hundredth of the average
        cluster's weight is added, spread like the clusters on average, so that one point alone has a covariance too.

    Raises:
        TypeError, ValueError: Bad points, more components than points, or an unknown strategy.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> gk.initialise(x, 2, "kmeans").means.sort(0).values.round(decimals=2).tolist()
        [[0.05], [5.05]]
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}.")
    kind, tied = factor_class(covariance_type)
    if int(components) < 1:
        raise ValueError(f"components must be at least 1, got {components}.")
    x = as_points(x, minimum=int(components))
    g = as_weights(weights, x)
    generator = _generator(generator, x.device)
    centres = _seed(x, g, int(components), generator, spread=strategy != "random")
    if strategy == "kmeans":
        centres = _lloyd(x, g, centres, backend)
    return _clusters(x, g, centres, kind, tied, backend)


def _generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    if generator is None:
        return torch.Generator(device).manual_seed(torch.initial_seed() % (1 << 63))
    if generator.device.type != device.type:
        seed = int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))
        return torch.Generator(device).manual_seed(seed)
    return generator


def _seed(x: Tensor, g: Tensor | None, K: int, generator: torch.Generator, spread: bool) -> Tensor:
    """K points of the data (K, D), float64: any K, or by greedy k-means++ on a subsample of some 20 K."""
    # Points without weight are no candidates, as if their rows were not there.
    rows = torch.arange(x.shape[0], device=x.device) if g is None else (g > 0).nonzero()[:, 0]
    if rows.shape[0] < K:
        raise ValueError(f"{K} components need at least {K} points with positive weight, got {rows.shape[0]}.")
    size = max(20 * K, 20_000) if spread else K
    if rows.shape[0] > size:
        rows = rows[torch.randperm(rows.shape[0], generator=generator, device=x.device)[:size]]
    points = x[rows].double()
    if not spread:
        return points
    points = points - (offset := points.mean(0))
    share = torch.ones(len(points), dtype=torch.float64, device=x.device) if g is None else g[rows]
    trials = 2 + int(math.log(K))
    first = torch.multinomial(share, 1, generator=generator)
    chosen, distance = [first[0]], ((points - points[first]) ** 2).sum(1)
    for _ in range(K - 1):
        mass = share * distance
        candidates = torch.multinomial(mass if float(mass.sum()) > 0 else share, trials, True, generator=generator)
        reach = torch.minimum(distance, torch.cdist(points[candidates], points).square())
        best = (reach @ share).argmin()
        chosen.append(candidates[best])
        distance = reach[best]
    return points[torch.stack(chosen)] + offset


def _lloyd(x: Tensor, g: Tensor | None, centres: Tensor, backend: str, iterations: int = 10) -> Tensor:
    """Lloyd's iterations until the mean squared distance falls by less than a thousandth."""
    factor = SphericalFactor(centres.new_zeros(1, 1), centres.shape[1])
    last = -math.inf
    for _ in range(iterations):
        sums = reductions.moments(
            x, centres.new_zeros(len(centres)), centres, factor, weights=g, assignment="hard", backend=backend
        )
        centres, inertia = sums.means, float(sums.total)
        if inertia - last < 1e-3 * abs(inertia):
            break
        last = inertia
    return centres


def _clusters(x: Tensor, g: Tensor | None, centres: Tensor, kind: Any, tied: bool, backend: str) -> Mixture:
    K, D = centres.shape
    unit = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    shape = {"full": unit[..., None] * torch.eye(D, device=x.device), "diagonal": unit.expand(1, D), "spherical": unit}
    sums = reductions.moments(
        x, centres.new_zeros(K), centres, shape[kind.family], weights=g, assignment="hard", backend=backend
    )
    about = sums.recentre(sums.means)
    counts, scatter, mass = about.S0, about.S2, about.mass
    if kind.family == "spherical":
        scatter = scatter / D
    pooled = scatter.sum(0, keepdim=True) / mass
    # Even the average cluster can be flat (constant columns, K = N): a share of the whole cloud's variance is added.
    mean = about.means.T @ counts / mass
    whole = (counts @ (about.means - mean) ** 2) / mass
    variance = float(whole.mean() + _mean_variance(pooled))
    floor = 1e-6 * variance if variance > 0 else 1e-12
    pooled = pooled + floor * (torch.eye(D, dtype=torch.float64, device=x.device) if pooled.ndim == 3 else 1)
    column = (-1, *[1] * (scatter.ndim - 1))
    share = _SHARE * mass / K
    covariances = pooled if tied else (scatter + share * pooled) / (counts + share).reshape(column)
    # An empty cluster keeps that share as its weight, so that its logarithm is finite.
    logits = counts.clamp(min=share).log()
    return Mixture(torch.log_softmax(logits, 0), sums.means, kind.from_covariances(covariances, features=D))


def _mean_variance(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1).mean() if covariance.ndim == 3 else covariance.mean()
