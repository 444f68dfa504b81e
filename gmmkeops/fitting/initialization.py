r"""Initial mixtures, computed from data."""

from __future__ import annotations

import time
from typing import Any

import torch

from gmmkeops import reductions
from gmmkeops._checks import accepts, as_choice, as_integer, renamed
from gmmkeops.components import Factor, factor_class, mind_fork
from gmmkeops.data import (
    Source,
    World,
    readable,
    representatives,
    table_names,
)
from gmmkeops.fitting.candidates import clustered_size
from gmmkeops.fitting.em import EM
from gmmkeops.fitting.kmeans import (
    clusters,
    distinct,
    kmeans,
    mixture_of,
    nearest,
    random_responsibilities,
    responsibilities,
    seeds,
)
from gmmkeops.fitting.result import Start, StartReport
from gmmkeops.fitting.search import Search, sample_size
from gmmkeops.fitting.state_file import state_bytes, state_of
from gmmkeops.models import Mixture

__all__ = ["SEARCHED", "STRATEGIES", "initialize", "shared_mixture", "start_of", "started"]

STRATEGIES = ("auto", "random", "kmeans", "kmeans++", "responsibilities", "annealed", "split-merge")

# Strategies that search on a sample.
SEARCHED = ("auto", "annealed", "split-merge")

# Number of columns of points in lists, for the size of the sample.
_FEATURES = 8

# Argument names of version 0.1, and of other libraries.
_OLD = {"components": "n_components", "weights": "sample_weight", "runs": "n_init"}
_WRONG = {name: "n_components" for name in ("k", "K", "n_clusters", "num_components", "n_mixtures")} | {
    "init": "strategy"
}
# Alternative names of strategies.
_SAME = {"k-means": "kmeans", "k-means++": "kmeans++", "random_from_data": "random"}


@accepts(old=_OLD, also={"random_state": "generator"}, wrong=_WRONG)
def initialize(
    x: Any,
    n_components: int,
    strategy: str = "auto",
    *,
    covariance_type: str = "full",
    sample_weight: Any = None,
    n_init: int = 1,
    generator: torch.Generator | int | None = None,
    refine: int = 0,
    backend: str = "auto",
    penalty: Any = None,
    prior: str | None = None,
) -> Mixture:
    r"""Compute an initial mixture from data, by a search or from clusters.

    .. math:: \min_{\mu} \sum_n g_n \min_k \lVert x_n - \mu_k \rVert^2 \qquad \text{for "kmeans"}

    Args:
        x: Points (N, D), N >= K, data units; or anything that :meth:`gmmkeops.Source.of` accepts.
        n_components: Number of components K.
        strategy: ``"auto"``: k-means in two metrics, that of the standardized columns and that of whitened coordinates (in
            which the covariance of all points is the identity), followed by up to three rounds in which all components are
            split, fitted, merged back to K and fitted again, as long as that increases the (penalized) likelihood. If
            components overlap and there are six or more columns, a third metric, which neglects directions without clusters,
            is tried, too (invariant coordinate selection). With ten or more points per parameter, up to 30 iterations of
            accelerated EM follow. There are no rounds with less than one point per parameter, and with less than ten for more
            than 300 components in up to three dimensions, where k-means of the coordinates as they are given is a candidate,
            too. With less than one, if the points are few, there are four runs of k-means in each metric, and a metric is
            dropped if its runs agree much less than those of the other one. ``"split-merge"`` performs the rounds also then,
            ``"annealed"`` performs deterministic annealing instead. Without a search: ``"kmeans"`` (k-means++ followed by
            Lloyd iterations), ``"k-means++"`` (points chosen by k-means++), ``"random"`` or ``"random_from_data"`` (K random
            points as centers), or ``"responsibilities"`` (random responsibilities, which is ``"random"`` in scikit-learn).
        covariance_type: As for :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`.
        sample_weight: Weight of each point (N,), or None.
        n_init: Number of runs, of which the best one is used. A search uses other candidates in each run, and ends when it has
            found the best optimum twice, or no better one in four runs.
        generator: Random number generator or seed; by default one with a fixed seed, so that repeated calls give equal
            mixtures. Torch's global random state is neither used nor changed.
        refine: Number of additional EM steps; zero for strategies with a search.
        backend: ``"auto"``, ``"native"``, ``"keops"``, ``"triton"`` or ``"dense"``.
        penalty: Penalty of the fit that follows, as for :func:`gmmkeops.fit`, which counts in the objective of a search.
        prior: With fewer than ten points per parameter, a search uses weak priors of the covariances, since the likelihood
            favors components that contain few points: first one of the covariance of all points, then, with further rounds
            unless the components are well separated, one of the mean covariance within components. ``"auto"`` also chooses the
            result by this prior; None chooses the candidate of the best likelihood among those that are not degenerate.

    Returns:
        A float64 mixture in data units. A search, which runs on a sample of at least 500 points and 20 points per parameter for
        each component, returns the best mixture that it found. Otherwise the mixture has the weight, mean and covariance of each
        cluster; each covariance is averaged with a pooled covariance of all clusters, whose weight is a hundredth of the average
        cluster weight, so that the covariance of a small cluster is not singular. The pooled covariance is robust to outliers.

    Raises:
        TypeError, ValueError: Points or weights are invalid, fewer than K points have positive weight, or the strategy is
            unknown.

    References:
        Arthur and Vassilvitskii 2007, *k-means++: the advantages of careful seeding*, SODA; Tyler, Critchley, Dümbgen and Oja
        2009, *Invariant co-ordinate selection*, JRSS B 71.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> gk.initialize(x, 2, "kmeans").means.sort(0).values.round(decimals=2).tolist()
        [[0.05], [5.05]]
    """
    mixture, _ = start_of(
        x,
        n_components,
        strategy,
        covariance_type=covariance_type,
        sample_weight=sample_weight,
        n_init=n_init,
        generator=generator,
        refine=refine,
        backend=backend,
        penalty=penalty,
        prior=prior,
    )
    return mixture


def start_of(x: Any, n_components: int, strategy: str = "auto", **options: Any) -> tuple[Mixture, StartReport]:
    """Compute an initial mixture and a report; arguments as for :func:`started`."""
    mixture, report, _ = started(x, n_components, strategy, **options)
    assert report is not None, "the mixture was not given"
    return mixture, report


def started(
    x: Any,
    n_components: int,
    strategy: str = "auto",
    *,
    covariance_type: str = "full",
    sample_weight: Any = None,
    n_init: int = 1,
    generator: torch.Generator | int | None = None,
    refine: int = 0,
    backend: str = "auto",
    penalty: Any = None,
    prior: str | None = None,
    method: EM | None = None,
    iterations: int = 0,
) -> Start:
    """Compute an initial mixture, and a report of how it was found; arguments as for :func:`initialize`.

    Args:
        method: EM with the settings of the fit that follows; None for a fit without ``reg_covar``.
        iterations: Largest number of iterations of this fit.
    """
    began = time.perf_counter()
    mind_fork()
    world = World()
    with world.together(), reductions.threads_for(x):
        strategy = as_choice(strategy, "strategy", (*STRATEGIES, *_SAME))
        strategy = _SAME.get(strategy, strategy)
        kind, tied = factor_class(covariance_type)
        K = as_integer(n_components, "n_components")
        as_integer(K, "n_components", 1, clause="must be at least 1")
        runs, refine = as_integer(n_init, "n_init", 1), as_integer(refine, "refine", 0)
        as_choice(backend, "backend", reductions.BACKENDS)
        if refine and strategy in SEARCHED:
            raise ValueError(
                f"refine={refine} requires a strategy without a search, got {strategy!r}, which performs EM steps itself; omit "
                'refine, or pass strategy="kmeans".'
            )
        if prior is not None:
            as_choice(prior, "prior", ("auto",))
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
            rows, mass, some, chunks = representatives(x, sample_weight, _rows(strategy, K, x, kind), world, minimum=K)
        if some < K:
            raise ValueError(
                f"n_components={K} requires at least {K} points with positive weight, got {some}; use fewer components."
            )
        generator = world.generator(generator, rows.device)
        if strategy in SEARCHED:
            options: Any = {"penalty": penalty, "prior": prior, "generator": generator, "backend": backend}
            # The first of several plain steps does what the last one of a search would do.
            options["followed"] = iterations > 1 and method is not None and method.plain() is method
            search = Search(rows, mass, K, kind, tied, method=method, **options)
            mixture, report = search.run(strategy, runs, some)
            mixture = shared_mixture(mixture, world, rows.device)
            # A part of the points has another spread.
            whole = isinstance(x, torch.Tensor) and len(rows) == len(x) and world.size == 1
            return Start(mixture.named(names), report, search.spread if whole else None)
        robust = reductions.spread_of(rows, mass)
        if strategy == "responsibilities":
            mixture = mixture_of(random_responsibilities(rows, mass, K, kind, generator), kind, tied, *robust)
            return Start(mixture.named(names), _report(strategy, 1, len(rows), some, began))
        points, masses = distinct(rows, mass)
        if strategy == "kmeans":
            centers = kmeans(points, masses, K, generator, backend, runs)
        elif strategy == "kmeans++":
            tries = [seeds(points, masses, K, generator, spread=True) for _ in range(runs if K > 1 else 1)]
            centers = min(tries, key=lambda seeds: float(nearest(points, seeds) @ masses))
        else:
            centers = seeds(points, masses, K, generator, spread=False)
        mixture = mixture_of(world.added(clusters(chunks(), centers, kind, backend)), kind, tied, *robust)
        for _ in range(refine):
            mixture = mixture_of(world.added(responsibilities(chunks(), mixture, backend)), kind, tied, *robust)
        tried = runs if strategy.startswith("kmeans") else 1
        return Start(mixture.named(names), _report(strategy, tried, len(rows), some, began))


def shared_mixture(mixture: Mixture, world: World, device: torch.device) -> Mixture:
    """Return the mixture of rank 0, since rounding errors may differ between the machines of the ranks."""
    if world.size == 1:
        return mixture
    found: Mixture = state_of(world.gather_bytes(state_bytes(mixture))[0], device)
    return found


def _rows(strategy: str, K: int, x: Any, kind: type[Factor]) -> int:
    """Return the maximum number of points of the sample."""
    if strategy not in SEARCHED:
        return clustered_size(K)
    shape: tuple[int, ...] = () if getattr(x, "is_nested", False) else tuple(getattr(x, "shape", ()))
    features = x.features if isinstance(x, Source) else shape[1] if len(shape) == 2 else _FEATURES
    return sample_size(K, features, kind)


def _report(strategy: str, candidates: int, points: int, rows: int, began: float) -> StartReport:
    """Return the report of a strategy without a search."""
    return StartReport(strategy, candidates, 0, 0.0, points, rows, False, time.perf_counter() - began)
