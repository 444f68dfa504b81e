"""Mixtures of every number of components from one fit with too many: the levels of a merge tree, refined by EM steps.

Reference: Hennig 2010, *Methods for merging Gaussian mixture components*, Advances in Data Analysis and Classification 4, for
selection by merging.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.fitting.rounds import Climber, Found, best_of
from gmmkeops.fitting.search import Search
from gmmkeops.models import MergeTree, Mixture, cheapest_merges, merge_down, merged_by

__all__ = ["FIRST", "Judge", "Level", "Levels", "find_levels", "sound_levels"]

# Number of components of the first fit. It is doubled as long as the best level has more than half of them.
FIRST = 16

# EM steps and tolerances (nats per point): of the first fit, of each of several merges, of the best of them, and of a level
# without the prior before it is judged.
_OVERFIT, _TRIED, _KEPT, _AS_FITTED = (30, 1e-3), (2, 1e-4), (5, 1e-4), (5, 1e-4)

# One of this many components is merged at a time, at least one.
_AT_ONCE = 48

# Levels of at most this many components are always computed, and others only down to half of the components of the best one.
_SMALL = 16


@dataclass(frozen=True)
class Level:
    """A level of a merge tree.

    Args:
        mixtures: A mixture for each sample, float64, data units.
        log_likelihood: Mean log-likelihood of the points that the judge evaluates, nats per point.
        value: Criterion (lower is better).
        seconds: Wall time.
        densities: Log-densities of points (n,), nats, for judges that compare them point by point; else None.
        sound: Whether no component has very few points or is very narrow.
    """

    mixtures: tuple[Mixture, ...]
    log_likelihood: float
    value: float
    seconds: float = 0.0
    densities: Tensor | None = None
    sound: bool = True

    @property
    def mixture(self) -> Mixture:
        """The mixture of the first sample."""
        return self.mixtures[0]


class Judge:
    r"""The Bayesian information criterion of all points, from a sample of them.

    A mixture fitted to a sample of weight n has a log-likelihood that is too high by about P / (2 n) per point, which the
    criterion corrects:

    .. math:: -2 G \bar\ell + P \left( \frac{G}{n} - 1 \right) + P \log G

    with the mean log-likelihood of the sample, P parameters, and the weight G of all points.

    Args:
        x: Sample of the points (n, D), data units.
        weights: Their relative weights (n,), or None.
        total: Total weight G of all points.
        share: Fraction of all points that are in the sample.
    """

    def __init__(self, x: Tensor, weights: Tensor | None, total: float, share: float) -> None:
        self.x, self.weights, self.total, self.share = x, weights, total, share

    def level(self, mixtures: tuple[Mixture, ...], seconds: float = 0.0) -> Level:
        """Evaluate a mixture in data units, or one for each sample."""
        likelihood = self.mean(mixtures[0].log_prob(self.x).double())
        return Level(mixtures, likelihood, self.bic(mixtures[0], likelihood), seconds)

    def mean(self, values: Tensor) -> float:
        """Return the weighted mean of one value for each point (n,)."""
        return float(values.mean() if self.weights is None else values @ self.weights / self.weights.sum())

    def bic(self, mixture: Mixture, likelihood: float) -> float:
        """Return the Bayesian information criterion for a mean log-likelihood of the sample."""
        return -2 * self.total * likelihood + self.optimism(mixture) + mixture.parameter_count * math.log(self.total)

    def optimism(self, mixture: Mixture) -> float:
        """Return the correction for the likelihood of the sample, which is higher than that of all points."""
        return mixture.parameter_count * (1 / self.share - 1)

    def best(self, levels: dict[int, Level]) -> int:
        """Return the key of the best level; levels that are not sound are considered only if there are no others."""
        return self.lowest(sound_levels(levels))

    def lowest(self, levels: dict[int, Level]) -> int:
        """Return the key of the level of the lowest criterion."""
        return min(levels, key=lambda n: levels[n].value)


def sound_levels(levels: dict[int, Level]) -> dict[int, Level]:
    """Return the levels that are sound, or all if none is."""
    return {n: level for n, level in levels.items() if level.sound} or levels


@dataclass(frozen=True)
class Levels:
    """The levels of merge trees, one for each sample.

    Args:
        levels: Levels by their numbers of components, the largest first.
        trees: The merges for each sample.
        best: Number of components of the best level.
        judge: The judge of the levels.
        searches: The searches of the first fits.
    """

    levels: dict[int, Level]
    trees: tuple[MergeTree, ...]
    best: int
    judge: Judge
    searches: tuple[Search, ...]

    @property
    def most(self) -> int:
        """Number of components of the first fits."""
        return self.searches[0].K

    def at(self, n_components: int) -> Mixture:
        """Return the first mixture of a level, or merge that of the next level with more components.

        Args:
            n_components: At least one, and at most as many as the first fit has.
        """
        more = min(n for n in self.levels if n >= n_components)
        mixture = self.levels[more].mixture
        if more == n_components:
            return mixture
        return merged_by(mixture, merge_down(mixture, n_components).labels(n_components), n_components)


def find_levels(
    stage: Callable[[int], tuple[tuple[Search, ...], Judge]],
    most: int,
    first: int = FIRST,
    *,
    verbose: bool | None = False,
) -> Levels:
    """Fit a mixture with enough components to each sample, and merge it step by step.

    Args:
        stage: Function that returns searches for K components, one for each sample, and a judge of their mixtures.
        most: Maximum number of components.
        first: Number of components of the first fit.
        verbose: Whether to show a progress bar; None for one in a terminal.
    """
    with reductions.one_thread(), torch.no_grad():
        K = min(first, most)
        while True:
            searches, judge = stage(K)
            descents = [_Descent(search) for search in searches]
            levels: dict[int, Level] = {}
            bar, began = _bar(K, verbose), time.perf_counter()
            for found in zip(*(descent.levels() for descent in descents), strict=True):
                mixtures, sound = tuple(mixture for mixture, _ in found), all(sound for _, sound in found)
                n = mixtures[0].n_components
                levels[n] = replace(judge.level(mixtures, time.perf_counter() - began), sound=sound)
                best, began = judge.best(levels), time.perf_counter()
                # The criterion needs room for more components, or has become much worse.
                if bar is not None:
                    bar.set_postfix(components=n, best=best, refresh=False)
                    bar.update()
                grows, worse = best > K // 2 and most > K, n > _SMALL and 2 * n <= best
                # A level that is not sound is not compared, so that it does not show whether the criterion has become worse.
                if n <= K // 2 and levels[n].sound and (grows or worse):
                    break
            if bar is not None:
                bar.close()
            if best <= K // 2 or most <= K:
                return Levels(levels, tuple(descent.tree for descent in descents), best, judge, searches)
            K = min(2 * K, most)


def _bar(total: int, verbose: bool | None) -> Any:
    """Create a progress bar over the levels; None if it is disabled."""
    if verbose is not None and not verbose:
        return None
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc="levels", unit="level", disable=None if verbose is None else False)
    return None if bar.disable else bar


class _Descent:
    """The merges from a first fit down to one component.

    Args:
        search: A search for the number of components of the first fit.
    """

    def __init__(self, search: Search) -> None:
        self.search, self.objective = search, search.climber().objective
        self.K = search.K
        self.merges: list[np.ndarray] = []
        self.costs: list[float] = []
        # Node of the tree for each component.
        self.nodes = np.arange(self.K)

    @property
    def tree(self) -> MergeTree:
        """The merges so far."""
        merges = np.array(self.merges, dtype=np.int64).reshape(-1, 2)
        return MergeTree(torch.from_numpy(merges), torch.tensor(self.costs, dtype=torch.float64), self.K)

    def levels(self) -> Iterator[tuple[Mixture, bool]]:
        """Yield the mixture of each level, data units, and whether it is sound."""
        n = self.K
        climber = self._climber(n)
        found = best_of(climber.climbs(self.search.clusters.begun(1), *_OVERFIT))
        yield self._shown(found)
        while n > 1:
            fewer = n - max(1, n // _AT_ONCE)
            found = self._merged(found, fewer)
            n = fewer
            yield self._shown(found)

    def _shown(self, found: Found) -> tuple[Mixture, bool]:
        """Return a level in data units, and whether it is sound."""
        mixture = self._as_fitted(found.mixture)
        return self.search.plain.frame.leave(mixture), not self.search.degenerate(mixture)

    def _as_fitted(self, mixture: Mixture) -> Mixture:
        """Perform EM steps on the objective of the fit that will follow, if the level has a prior that the fit does not have."""
        search = self.search
        if mixture.n_components == 1 or not search.has_few_points(mixture.n_components):
            return mixture
        if search.prior is None:
            objective = replace(self.objective, penalty=search.penalty)
        else:
            objective = search.narrowed(self.objective, mixture)
        return Climber(search.method, objective).climbed(mixture, *_AS_FITTED).mixture

    def _climber(self, n: int) -> Climber:
        """Return the EM steps for n components."""
        return Climber(self.search.method, self.search.judged(self.objective, n))

    def _merged(self, found: Found, n: int) -> Found:
        """Merge a mixture until n components are left, in the best of several ways."""
        climber, before = self._climber(n), found.mixture
        trees = cheapest_merges(before) if n == before.n_components - 1 else [merge_down(before, n)]
        merged = [merged_by(before, tree.labels(n), n) for tree in trees]
        if len(trees) == 1:
            self._remember(trees[0])
            return climber.climbed(merged[0], _TRIED[0] + _KEPT[0], _KEPT[1])
        ways = climber.climbs(merged, *_TRIED)
        best = best_of(ways)
        self._remember(next(tree for way, tree in zip(ways, trees, strict=True) if way is best))
        return climber.climbed(best.mixture, *_KEPT)

    def _remember(self, tree: MergeTree) -> None:
        """Append the merges of a step to the tree."""
        first = self.K + len(self.costs)
        nodes = np.concatenate([self.nodes, first + np.arange(len(tree.merges))])
        merges = nodes[tree.merges.cpu().numpy()]
        self.merges.extend(np.sort(merges, 1))
        # A lower bound on a divergence may be negative.
        self.costs.extend(tree.costs.clamp(min=0).tolist())
        labels = tree.labels(tree.n_components).numpy()
        parent = {int(node): first + m for m, pair in enumerate(merges) for node in pair}
        current = np.empty(tree.n_components, dtype=np.int64)
        for component, node in zip(labels, self.nodes, strict=True):
            top = int(node)
            while top in parent:
                top = parent[top]
            current[component] = top
        self.nodes = current
