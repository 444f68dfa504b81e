"""Start of variational Bayes: the best of the levels of a merge tree and of k-means by the evidence lower bound."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gmmkeops._checks import ConvergenceWarning, renamed
from gmmkeops.components import factor_class
from gmmkeops.data import Source, World, as_generator, as_points, as_weights, readable, representatives, trimmed_spread
from gmmkeops.fitting import (
    FitResult,
    Judge,
    Search,
    StartReport,
    find_levels,
    fit,
    sample_size,
    shared_mixture,
    start_of,
)
from gmmkeops.models import Mixture

if TYPE_CHECKING:
    from gmmkeops.bayes.variational.method import VariationalBayes

__all__ = ["best_level"]

# Maximum number of iterations for each level.
_CAP = 100

# Logit of components without points, relative to the others.
_EMPTY = -700.0


def best_level(
    x: Any,
    K: int,
    method: VariationalBayes,
    covariance_type: str,
    *,
    sample_weight: Any,
    generator: torch.Generator | int | None,
    backend: str,
    **options: Any,
) -> tuple[Mixture, StartReport]:
    """Fit posteriors from k-means, from the level with the best information criterion and from its neighbors.

    Args:
        x: Points (N, D), data units; or anything that :meth:`gmmkeops.Source.of` accepts.
        K: Number of components. Those that a level does not have begin without points.
        method: The method.
        covariance_type, sample_weight, generator, backend: As for :func:`gmmkeops.fit` and :func:`gmmkeops.initialize`.
        **options: Further arguments of :func:`gmmkeops.fit`.

    Returns:
        The mixture of the posterior with the highest evidence lower bound, and a report; for very few points that of k-means.
    """
    began, world = time.perf_counter(), World()
    kind, tied = factor_class(covariance_type)
    if readable(x):
        with renamed("weights", "sample_weight"):
            x, sample_weight = Source.of(x, weights=sample_weight), None
        D, g = x.features, None
    else:
        x = as_points(x)
        D, g = x.shape[1], as_weights(sample_weight, x, name="sample_weight")
    rows, mass, count, _ = representatives(x, g, sample_size(K, D, kind), world, minimum=K)
    if count < K:
        raise ValueError(
            f"n_components={K} requires at least {K} points with positive weight, got {count}; use fewer components."
        )
    device = rows.device
    generator = as_generator(generator, device)
    settings: Any = {"method": None, "penalty": None, "prior": None, "generator": generator, "backend": backend}

    def stage(n: int) -> tuple[tuple[Search, ...], Judge]:
        return (Search(rows, mass, n, kind, tied, **settings),), Judge(rows, mass, float(count), len(rows) / count)

    most = min(K, count // (2 * (D + 1)))
    usual: Any = {"covariance_type": covariance_type, "sample_weight": g, "generator": generator, "backend": backend}
    if most < 2 or not bool((trimmed_spread(rows, mass)[1] > 0).any()):
        # There are too few points for levels, or all are equal.
        return start_of(x, K, "kmeans", **usual)
    levels = find_levels(stage, most)
    found: dict[int, FitResult] = {}
    best, center, most = 0, world.tell(levels.best)[0], levels.most
    capped = replace(method, max_iter=min(_CAP, method.max_iter), begin=None)

    def fitted(start: Mixture) -> FitResult:
        result = fit(start, x, capped, sample_weight=g, generator=generator, backend=backend, verbose=False, **options)
        if result.report.interrupted:
            raise KeyboardInterrupt
        return result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        while best != center:
            best = center
            for n in range(max(1, best - 1), min(best + 1, most) + 1):
                if n not in found:
                    found[n] = fitted(_with_empty(shared_mixture(levels.at(n), world, device), K))
            center = world.tell(min(found, key=lambda n: found[n].objective))[0]
        found[0] = fitted(start_of(x, K, "kmeans", **usual)[0])
    if found[0].objective < found[best].objective:
        best = 0
    sweeps = float(sum(result.n_iter for result in found.values()) * (3 if method.accelerate else 1))
    seconds = time.perf_counter() - began
    return found[best].mixture, StartReport("levels", len(found), 0, sweeps, len(rows), count, False, seconds)


def _with_empty(mixture: Mixture, K: int) -> Mixture:
    """Append components without points until there are K."""
    more = K - mixture.n_components
    if not more:
        return mixture
    index = torch.cat([torch.arange(mixture.n_components), torch.zeros(more, dtype=torch.int64)]).to(
        mixture.means.device
    )
    logits = torch.cat([mixture.log_weights, mixture.logits.new_full((more,), _EMPTY)])
    factor = mixture.factor if mixture.factor.leading == 1 and mixture.tied else mixture.factor.select(index)
    return Mixture(logits, mixture.means[index], factor).named(mixture.columns)
