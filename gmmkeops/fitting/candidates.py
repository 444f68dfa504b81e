"""Mixtures of clusters, from which a search begins: k-means in several metrics, and the moments of its clusters."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import Factor, FullFactor, Moments
from gmmkeops.data import Batch
from gmmkeops.fitting.kmeans import (
    agreements,
    clusters,
    distinct,
    kmeans,
    labels,
    mixture_of,
    native_limits,
    pool_of,
    runs_at_once,
    seeds,
)
from gmmkeops.fitting.metric import factor_of, inside, invariant_metric, outside, white_metric
from gmmkeops.fitting.objective import FLOOR, Objective
from gmmkeops.fitting.rounds import SAME, without_copies
from gmmkeops.models import Mixture

__all__ = ["Candidates", "clustered_size"]

# Points on which k-means runs: at least this many, and this many for each component.
_CLUSTERED, _EACH = 20_000, 20

# Runs of k-means in each metric where points are too few for rounds; and the ratio of the agreement between the runs in a metric
# and of that in the other one below which a metric is not used.
_RUNS, _AGREEMENT = 4, 0.3


def clustered_size(K: int) -> int:
    """Return the number of points on which k-means for K clusters runs."""
    return max(_CLUSTERED, _EACH * K)


class Candidates:
    """Mixtures of clusters of the standardized points of a search.

    Args:
        objective: Objective whose points are in memory.
        weights: Weights of the points (n,), or None.
        spread: Centers and standard deviations (D,) of the columns, data units.
        K: Number of components.
        kind, tied: Family of the components, and whether they share a covariance.
        compares: Whether several runs of k-means are compared in each metric.
        as_given: Whether the metric of the given coordinates is used, too, as if all columns had the same unit.
        generator: Random number generator.
        backend: Name of the engine.

    Attributes:
        count: Number of candidates so far.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Tensor | None,
        spread: tuple[Tensor, Tensor],
        K: int,
        kind: type[Factor],
        tied: bool,
        *,
        compares: bool,
        as_given: bool,
        generator: torch.Generator,
        backend: str,
    ) -> None:
        self.objective, self.weights, self.spread = objective, weights, spread
        self.K, self.kind, self.tied, self.compares, self.as_given = K, kind, tied, compares, as_given
        self.generator, self.backend = generator, backend
        self.D = self.x.shape[1]
        self.count = 0

    @property
    def x(self) -> Tensor:
        """The standardized points (n, D), in float64 from the time at which float32 has been too coarse for a mixture."""
        points: Tensor = self.objective.data.x  # type: ignore[attr-defined]
        return points

    def begun(self, run: int) -> list[Mixture]:
        """Return the initial mixtures of a run, standardized coordinates, at least one for each metric that is used.

        Runs 0, 3, ... use k-means, runs 1, 4, ... only its initial centers, and runs 2, 5, ... random points.
        """
        if run % 3:
            found = [(self._centers(run, root), root) for root in self._roots]
        elif self.compares:
            found = self._agreed()
        else:
            found = self._centered(self._roots)
        self.count += len(found)
        return without_copies(self._clustered(found))

    def in_one_call(self, run: int, climbs_one: bool) -> tuple[Mixture, reductions.Clusters] | None:
        """Return an example of the initial mixtures of a run, and how a call that performs EM steps finds them itself.

        The result is None if such a call cannot find them. ``climbs_one`` is whether it performs steps from a single mixture.
        """
        if run % 3 or self.compares or self.tied or not self._are_few:
            return None
        limits = native_limits(self.K)
        if limits is None or (len(self._roots) > 1 and self.kind is not FullFactor):
            return None
        own: dict[str, Any] = {
            "pool": self._pool,
            "copies": SAME,
            "climbs_one": climbs_one,
            "generator": self.generator,
        }
        return self._unit, reductions.Clusters(self._matrices(self._roots), **limits, **own)

    @property
    def _are_few(self) -> bool:
        """Whether k-means runs on all points, on a CPU."""
        return len(self.x) <= clustered_size(self.K) and self.x.device.type == "cpu"

    @property
    def _pool(self) -> reductions.Pool:
        """How covariances of clusters of few points are regularized."""
        return pool_of(self.objective.mass, self.K, 4 * (self.D + 1) / self.objective.count)

    @cached_property
    def _unit(self) -> Mixture:
        """A mixture of components of unit covariance at the origin."""
        logits = self.x.new_zeros(self.K, dtype=torch.float64)
        tensors = {name: logits.new_zeros(shape) for name, shape in self.kind.shapes(self.K, self.D).items()}
        return Mixture.from_valid(logits, logits.new_zeros(self.K, self.D), self.kind.of(tensors, self.D), False)

    def _centered(self, roots: list[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
        """Return the centers of a run of k-means in each of some metrics, and the metric."""
        return [(each.centers, root) for (each,), root in zip(self._kmeans(1, roots), roots, strict=True)]

    def in_invariant_metric(self) -> Mixture:
        """Return the mixture of the clusters of k-means in a metric that neglects directions without clusters."""
        points, masses = self._different
        self.count += 1
        white = self._roots[1]
        assert white is not None, "there are several columns and clusters"
        root = invariant_metric(points, masses, white)
        return self._clustered(self._centered([root]))[0]

    def _agreed(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return the different centers of several runs of k-means, and their metrics.

        A metric is omitted if its runs agree much less than those of the other one. The likelihood of very few points does not
        show whether there are clusters; agreement between runs does.
        """
        found, means = [], []
        for runs, root in zip(self._kmeans(_RUNS, self._roots), self._roots, strict=True):
            parts = [each.labels for each in runs if each.labels is not None]
            pairs = agreements(parts, self.K)
            means.append(sum(map(sum, pairs)) / sum(map(len, pairs)))
            chosen = [each.centers for each, same in zip(runs, pairs, strict=True) if max(same, default=0) < 1]
            found.append([(centers, root) for centers in chosen])
        best = max(means)
        least = min(best, _AGREEMENT * best)
        return [each for some, value in zip(found, means, strict=True) if value >= least for each in some]

    def _kmeans(self, runs: int, roots: list[Tensor | None]) -> list[list[reductions.Clustering]]:
        """Perform runs of k-means in each metric. With several runs, the different points are labeled."""
        if self._are_few:
            arguments = self.K, self.generator, self.backend, runs
            native = runs_at_once(self._batch, self._matrices(roots), *arguments)
            if native is not None:
                return native
        results = []
        for root in roots:
            found = []
            for _ in range(runs):
                centers = self._centers(0, root)
                own = None if runs == 1 else labels(self._points_in(root), inside(centers, root))
                found.append(reductions.Clustering(centers, own))
            results.append(found)
        return results

    def _centers(self, run: int, root: Tensor | None) -> Tensor:
        """Return the centers (K, D) of a run for the different points in a metric."""
        z, (_, masses) = self._points_in(root), self._different
        if run % 3 == 0:
            centers = kmeans(z, masses, self.K, self.generator, self.backend, 1, self.objective.data.dtype)
        else:
            centers = seeds(z, masses, self.K, self.generator, spread=run % 3 == 1)
        return outside(centers, root)

    def _points_in(self, root: Tensor | None) -> Tensor:
        """Return the different points in the coordinates of a metric."""
        points, _ = self._different
        return inside(points, root)

    def _matrices(self, roots: list[Tensor | None]) -> Tensor:
        """Return metrics as matrices (C, D, D)."""
        eye = torch.eye(self.D, dtype=torch.float64, device=self.x.device)
        return torch.stack([eye if root is None else root for root in roots])

    @property
    def _batch(self) -> Batch:
        """The points, standardized coordinates, and their weights."""
        return Batch(self.x, self.objective.data.weights)  # type: ignore[attr-defined]

    @property
    def covariance(self) -> Tensor:
        """Robust covariance of all points, standardized coordinates, in which columns have deviations of about one."""
        return self._white[0]

    @cached_property
    def _white(self) -> tuple[Tensor, Tensor]:
        """This covariance, and the metric in which points of this covariance are white."""
        return white_metric(self.x, self.weights)

    @cached_property
    def _roots(self) -> list[Tensor | None]:
        """The metrics of k-means: that of the standardized columns (None), and that in which all points are white.

        With ``as_given``, there is also that of the given coordinates. Metrics are upper triangular matrices (D, D), by which
        points are multiplied.
        """
        if self.D == 1 or self.K == 1:
            return [None]
        roots = [None, self._white[1]]
        scale = self.objective.frame.scale
        return [*roots, (scale / scale.amax()).diag()] if self.as_given else roots

    @cached_property
    def _different(self) -> tuple[Tensor, Tensor]:
        """Different points for k-means, standardized coordinates, and their weights."""
        x, g, most = self.x, self.weights, clustered_size(self.K)
        if len(x) > most:
            rows = torch.randperm(len(x), generator=self.generator, device=x.device)[:most]
            x, g = x[rows], None if g is None else g[rows]
        return distinct(x, g)

    def _clustered(self, found: list[tuple[Tensor, Tensor | None]]) -> list[Mixture]:
        """Return the mixtures of the clusters about centers (K, D), standardized coordinates, in metrics."""
        batch = self._batch
        given = [(centers, None if root is None else factor_of(root)) for centers, root in found]
        fast = self._by_one_step(batch, given) or [None] * len(given)
        return [
            self._of_clusters(batch, *each) if mixture is None else mixture
            for each, mixture in zip(given, fast, strict=True)
        ]

    def _of_clusters(self, batch: Batch, centers: Tensor, metric: FullFactor | None) -> Mixture:
        """Return the mixture of the clusters about centers in a metric, from their moments."""
        if metric is None:
            sums = clusters([batch], centers, self.kind, self.backend)
        else:
            arguments = (batch.points, centers.new_zeros(len(centers)), centers, metric)
            hard = reductions.moments(
                *arguments, weights=batch.weights, assignment="hard", backend=self.backend, truncate=0
            )
            sums = Moments(hard.S0, hard.S1, self.kind.second_moments(hard.S2), hard.centers, hard.total, hard.mass)
        return mixture_of(sums, self.kind, self.tied, *self.objective.frame.of_columns(*self.spread))

    def _by_one_step(self, batch: Batch, found: list[tuple[Tensor, FullFactor | None]]) -> list[Mixture | None] | None:
        """Return the mixtures of the clusters by one step of hard EM; None if the native engine does not perform it.

        Covariances are averaged with a pooled one if a cluster has few points.
        """
        own = (
            [] if self.tied else [i for i, (_, metric) in enumerate(found) if metric is None or self.kind is FullFactor]
        )
        if not own:
            return None
        unit, pool, starts = self._unit.factor, self._pool, []
        for centers, metric in (found[i] for i in own):
            wide = {} if metric is None else metric.tensors
            tensors = {name: tensor.expand_as(unit.tensors[name]) for name, tensor in wide.items()}
            starts.append((self._unit.logits, centers, unit if metric is None else unit.replace(**tensors)))
        settings = reductions.StepSettings(
            self.objective.mass,
            centers.new_zeros(self.D),
            FLOOR,
            pool.weight / self.objective.mass,
            assignment="hard",
            bare=True,
            pool=pool,
        )
        steps = reductions.em_climb(
            batch, starts, settings, steps=1, tolerance=-math.inf, after=True, backend=self.backend
        )
        if steps is None:
            return None
        results: list[Mixture | None] = [None] * len(found)
        for i, step in zip(own, steps.reached, strict=True):
            results[i] = None if step is None else Mixture.from_valid(*step.reached, validate_args=False)
        return results
