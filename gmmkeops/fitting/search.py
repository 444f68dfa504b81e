r"""Search for an initial mixture: k-means in several metrics, then rounds of splitting and merging.

A round splits every component, performs EM steps, merges the least distinct pairs until K components are left, and performs EM
steps again. Its result is kept only if the objective is better; it ends early if components are so well separated that their
halves would be merged again. With six or more columns, overlapping components are also searched for from k-means in a third
metric, which neglects directions without clusters. With many points per parameter, accelerated EM iterations follow. With few
points per parameter, a prior of the covariances counts in the objective, since the likelihood alone would favor components
that contain few points: first one of the covariance of all points, then one of the mean covariance within components, without
further rounds if they are well separated. References: Zhou, Xu, Fazel and Du 2025, arXiv 2506.06584; Ueda, Nakano, Ghahramani
and Hinton 2000, *SMEM algorithm for mixture models*, Neural Computation 12.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import Factor
from gmmkeops.fitting.candidates import Candidates, clustered_size
from gmmkeops.fitting.em import EM
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.preparation import prepared
from gmmkeops.fitting.result import StartReport
from gmmkeops.fitting.rounds import CANDIDATE, MERGED, ROUNDS, Climber, Found, best_of, best_sound, without_copies
from gmmkeops.models import Mixture
from gmmkeops.penalties import CovariancePrior, Penalty, as_penalty

__all__ = ["Search", "has_few_points", "sample_size", "within_prior"]

# Points per parameter of a component below which the objective of the search contains a prior, and below which no rounds are
# performed, since they would only fit single points.
_FEW, _TOO_FEW = 10.0, 1.0

# Number of components above which, and largest dimension in which no rounds are performed, either, where points per parameter are
# few: on 8 data sets of 200 to 1000 components in three dimensions, rounds changed the held-out likelihood by -0.04 to +0.02 nats
# per point and took two to three times the time. Such data are often scans, whose columns have the same unit, so that clusters of
# the given coordinates are candidates, too.
_MANY, _LOW = 300, 3

# Points of the sample for each component: at least this many, and this many for each of its parameters; and numbers of a sample.
_PER_COMPONENT, _PER_PARAMETER, _NUMBERS = 500, 20, 1 << 26

# Columns from which overlapping components are also searched for in a metric that neglects columns without clusters.
_COLUMNS = 6

# Points times parameters from which such runs take longer than what they may gain.
_COSTLY = 3_000_000

# Maximum number of rounds for several initializations.
_MORE_ROUNDS = 8

# Largest dimension in which points are sorted by a kd-tree, and expected number of E-steps.
_TREE, _SWEEPS = 4, 100

# Points times parameters from which E-steps in float32 save time: a tenth of a search for 30 000, and a quarter for 180 000.
_LONG = 50_000

# Ratio of reg_covar and the smallest variance of a column, for fits that have no reg_covar.
_RIDGE = 1e-6

# Difference of objectives that are the same optimum, nats per point; and number of runs without a better one after which a search
# ends.
_SAME, _PATIENCE = 1e-3, 4

# Ratio of the least eigenvalues of a covariance and of that of all points below which a component is degenerate.
_THIN = 1e-4

# Number of components above which clusters are candidates as they are, rather than after EM steps with the prior.
_WIDE = 100

# EM steps on the likelihood alone and their tolerance: for candidates that a search with a prior has found, for those that no
# rounds improve, and for a single candidate of well separated components.
_PLAIN, _ALONE, _SINGLE = (100, 1e-3), (100, 1e-4), (1, 0.0)

# Accelerated iterations at the end of a search with many points per parameter, and their tolerance.
_LAST = (30, 1e-5)


def sample_size(K: int, D: int, kind: type[Factor]) -> int:
    """Return the number of points (rows) on which K components are searched for."""
    rows = K * max(_PER_COMPONENT, _PER_PARAMETER * _parameters(kind, D))
    return max(clustered_size(K), min(rows, _NUMBERS // D))


def prior_of(covariance: Tensor, K: int) -> CovariancePrior:
    """Return a weak prior of the covariances: D + 2 points with the covariance (D, D) of all points divided by K^(2/D)."""
    D = len(covariance)
    return CovariancePrior.from_valid(covariance / K ** (2 / D), D + 2.0)


def has_few_points(rows: float, mixture: Mixture) -> bool:
    """Return whether there are fewer than ten points per parameter of a component."""
    return rows < _FEW * mixture.n_components * _parameters(type(mixture.factor), mixture.n_features)


def within_prior(mixture: Mixture) -> tuple[Tensor, float]:
    """Return covariance and number of the points of a prior: D + 2 points with the mean covariance within components."""
    covariances = mixture.factor.covariances().expand(mixture.n_components, -1, -1)
    return (mixture.weights[:, None, None] * covariances).sum(0), mixture.n_features + 2.0


def _parameters(kind: type[Factor], D: int) -> int:
    """Count the parameters of a component: weight, mean and covariance."""
    return 1 + D + kind.count(1, D)


class Search:
    """A search for K components on a sample of the points.

    Args:
        x: Sample of the points (n, D), data units.
        weights: Weights (n,), or None.
        K: Number of components.
        kind, tied: Family of the components, and whether they share a covariance.
        method: EM with the ``reg_covar`` of the fit; None for a small fraction of the smallest variance of a column.
        penalty: Penalty of the fit, or None.
        prior: ``"auto"`` to judge candidates with a prior of the covariances where points per parameter are few; None to judge
            them finally by the likelihood (and the penalty) alone.
        generator: Random number generator.
        backend: Name of the engine.
        followed: Whether plain EM steps without the prior follow.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Tensor | None,
        K: int,
        kind: type[Factor],
        tied: bool,
        *,
        method: EM | None,
        penalty: Any,
        prior: str | None,
        generator: torch.Generator,
        backend: str,
        followed: bool = False,
    ) -> None:
        self.began = time.perf_counter()
        self.x, self.weights, self.K, self.kind, self.tied = x, weights, K, kind, tied
        # Centers and standard deviations of the columns (D,), data units.
        self.spread = reductions.spread_of(x, weights)
        # Splits and k-means compare the columns, so that their scale must not depend on their units.
        frame = Frame.of(x, weights, isotropic=kind.isotropic, rounded=False, spread=self.spread)
        # Whether a fit by EM begins with the result, and whether it begins with plain steps.
        self.fits, self.followed = method is not None, followed
        method = EM(reg_covar=_RIDGE * float(frame.scale.min()) ** 2) if method is None else method
        self.method = method.plain()
        self.generator, self.backend, self.prior = generator, backend, prior
        self.penalty = self._supported(penalty, K)
        self.doubles = K > 1 and (self.penalty is None or self._accepts(self.penalty, 2 * K))
        # The library is twice as fast in float32; the points are evaluated in float64 if they are too coarse for that.
        size = len(x) * K * _parameters(kind, x.shape[1])
        single = torch.float32 if size >= _LONG and x.device.type == "cpu" else None
        settings: Any = {"isotropic": kind.isotropic, "dtype": single, "frame": frame, "spread": self.spread}
        self.plain = prepared(x, weights, self.penalty, backend, generator, **settings)
        self.D = x.shape[1]
        self.ratio = self.plain.count / (K * _parameters(kind, self.D))
        self.few = self.ratio < _FEW and not tied and K > 1
        # Whether a search is only a choice between clusters.
        many = self.few and K > _MANY and self.D <= _LOW and prior is None
        self.keeps_clusters = self.ratio < _TOO_FEW or many
        compares = self.ratio < _TOO_FEW and K > 1 and size < _COSTLY
        given: Any = {"compares": compares, "as_given": many, "generator": generator, "backend": backend}
        self.clusters = Candidates(self.plain, weights, self.spread, K, kind, tied, **given)
        self.objective = (
            self._with(self.plain, prior_of(self._spread, K)) if self.few and self.ratio >= _TOO_FEW else self.plain
        )

    def judged(self, objective: Objective, K: int) -> Objective:
        """Return an objective, with the weak prior if there are few points per parameter of K components."""
        few = self.has_few_points(K)
        return self._with(objective, prior_of(self._spread, K)) if few else replace(objective, penalty=self.penalty)

    def has_few_points(self, K: int) -> bool:
        """Return whether there are few points per parameter of K components."""
        return self.ratio * self.K < _FEW * K and not self.tied

    def narrowed(self, objective: Objective, mixture: Mixture) -> Objective:
        """Return an objective with a prior of the mean covariance within the components of a standardized mixture."""
        within, points = within_prior(mixture)
        return self._with(objective, CovariancePrior.from_valid(self._in_data_units(within), points))

    def _with(self, objective: Objective, added: CovariancePrior) -> Objective:
        return replace(objective, penalty=added if self.penalty is None else self.penalty + added)

    def _in_data_units(self, covariance: Tensor) -> Tensor:
        """Convert a covariance (D, D) from standardized coordinates to data units."""
        scale = self.plain.frame.scale
        return covariance * scale * scale[:, None]

    @cached_property
    def _spread(self) -> Tensor:
        """Robust covariance of all points (D, D), data units."""
        return self._in_data_units(self.clusters.covariance)

    def _supported(self, penalty: Any, K: int) -> Penalty | None:
        """Return the penalty, or None if there is none or EM does not support it."""
        if penalty is None:
            return None
        penalty = as_penalty(penalty)
        try:
            penalty.m_step(self._any(K), 1.0)
        except TypeError:
            return None
        return penalty

    def _accepts(self, penalty: Penalty, K: int) -> bool:
        """Return whether a penalty applies to K components."""
        try:
            penalty.m_step(self._any(K), 1.0)
        except ValueError:
            return False
        return True

    def _any(self, K: int) -> Mixture:
        """Return a mixture of K components of the family."""
        D = self.x.shape[1]
        means = torch.zeros(K, D, dtype=torch.float64, device=self.x.device)
        eye = torch.eye(D).to(means).expand(1 if self.tied else K, D, D)
        return Mixture(means.new_zeros(K), means, self.kind.from_covariances(self.kind.compact(eye), features=D))

    def run(self, strategy: str, n_init: int, rows: int) -> tuple[Mixture, StartReport]:
        """Search, and return the best mixture in data units, and a report.

        Args:
            strategy: ``"auto"``; ``"split-merge"`` performs rounds also with very few points per parameter; ``"annealed"``
                performs deterministic annealing from k-means instead.
            n_init: Number of searches from different candidates; fewer if the best optimum has been found twice, or if four runs
                have found no better one.
            rows: Number of all points.
        """
        # Operations of torch are on the K components only, or take a small part of the time.
        with reductions.one_thread():
            return self._run(strategy, n_init, rows)

    def _run(self, strategy: str, n_init: int, rows: int) -> tuple[Mixture, StartReport]:
        stays = strategy == "auto" and ((self.K == 1 and self.penalty is None) or self.keeps_clusters)
        # Clusters are compared by the likelihood alone.
        climber = self.climber(self.plain if stays else self.objective)
        most = _MORE_ROUNDS if n_init >= 5 else ROUNDS
        enough = _ALONE if self.clusters.compares else CANDIDATE
        best: Found | None = None
        starts: list[Found] = []
        seen: list[float] = []
        for run in range(n_init):
            rounds = most if self.doubles and strategy != "annealed" and not stays else 0
            # A single candidate needs no objective by which it is chosen.
            candidates, found = self._searched(climber, run, enough, rounds, not stays or n_init > 1)
            if rounds and not run and self.D >= _COLUMNS and not found.separated:
                candidates, found = self._in_invariant_metric(climber, candidates, found, rounds, enough)
            starts += candidates
            if strategy == "annealed":
                found = self._annealed(climber, found)
            elif stays:
                # The fit begins at the clusters themselves.
                found = Found(found.origin, found.value, found.origin, found.origin)
            if self.K > 1 and self.ratio >= _FEW and (self.penalty is None or self.penalty.constant):
                found = self._accelerated(climber, found)
            seen.append(found.value)
            best = found if best is None else best_of([best, found])
            same = [place for place, value in enumerate(seen) if value - best.value < _SAME]
            if len(same) > 1 or run - min(same, default=run) >= _PATIENCE:
                break
        assert best is not None, "there is at least one run"
        searched_with_prior = not stays and self.objective is not self.plain
        if searched_with_prior:
            narrowed = self._narrowed(climber, best, most) if self.doubles and strategy != "annealed" else best
            best = narrowed if self.prior is not None else self._by_likelihood(climber, [narrowed, best], starts)
        report = StartReport(
            strategy,
            self.clusters.count,
            climber.rounds,
            climber.work / self.K,
            len(self.x),
            rows,
            searched_with_prior,
            time.perf_counter() - self.began,
        )
        return self.plain.frame.leave(best.mixture), report

    def _searched(
        self, climber: Climber, run: int, enough: tuple[int, float], most: int, climbs_one: bool
    ) -> tuple[list[Found], Found]:
        """Search from the clusters of a run; arguments and results are those of :meth:`Climber.searched`."""
        in_one_call = self.clusters.in_one_call(run, climbs_one)
        if in_one_call is not None:
            found = climber.searched_from_clusters(*in_one_call, *enough, most)
            if found is not None:
                self.clusters.count += len(in_one_call[1].roots)
                return found
        return climber.searched(self.clusters.begun(run), *enough, most, climbs_one)

    def climber(self, objective: Objective | None = None) -> Climber:
        """Return the steps that improve an objective; None for that of the search."""
        return Climber(self.method, self._arranged(self.objective if objective is None else objective))

    def _arranged(self, objective: Objective) -> Objective:
        """Return an objective, with points sorted by a kd-tree for truncation if that saves time."""
        if self.D > _TREE or not reductions.may_arrange(len(self.x), self.K, self.D):
            return objective
        x: Tensor = self.plain.data.x  # type: ignore[attr-defined]
        factor = self.kind.from_covariances(self.kind.compact(torch.eye(self.D).to(x).double())[None], features=self.D)
        means = x[: self.K].double()
        return objective.truncated(None, Mixture(means.new_zeros(self.K), means, factor, validate_args=False), _SWEEPS)

    def _in_invariant_metric(
        self, climber: Climber, candidates: list[Found], found: Found, most: int, enough: tuple[int, float]
    ) -> tuple[list[Found], Found]:
        """Search from k-means in a metric that neglects directions without clusters, if that is a better candidate.

        With clusters in few of many columns, neither of the other metrics shows them. In 200 simulated data sets of 6 to 32
        columns, of which one to four contain clusters, searches without it were 0.036 nats per point below EM from the true
        clusters on average, and with it 0.027; they took 20 % more time.

        Returns:
            All candidates, and the best mixture.
        """
        different = without_copies([*(each.origin for each in candidates), self.clusters.in_invariant_metric()])
        if len(different) == len(candidates):
            return candidates, found
        others = climber.sound([*candidates, climber.climbed(different[-1], *enough)])
        best = best_of(others)
        if best not in candidates:
            found = best_of([found, climber.searched([best.mixture], *MERGED, most)[1]])
        return others, found

    @cached_property
    def _least(self) -> float:
        """Least eigenvalue of the robust covariance of all points."""
        return float(torch.linalg.eigvalsh(self.clusters.covariance)[0])

    def _narrowed(self, climber: Climber, found: Found, most: int) -> Found:
        """Perform rounds with a prior of the mean covariance within components.

        With many components or columns the first prior is much wider than the components, so that its optimum merges some. This
        does not happen if the components are well separated: the points then determine the components with either prior. They
        remain as they are for a choice by the likelihood, and receive the second prior without rounds otherwise. Of 2420 random
        problems, 483 had well separated components. Rounds with the second prior had the same result in 480 of them, a higher
        likelihood in two with outliers or heavy tails, and a lower one in one.
        """
        if found.separated and self.prior is None:
            return found
        narrow = Climber(self.method, self.narrowed(climber.objective, found.mixture))
        found = narrow.searched([found.mixture], *MERGED, 0 if found.separated else most)[1]
        climber.work += narrow.work
        climber.rounds += narrow.rounds
        return found

    def _accelerated(self, climber: Climber, found: Found) -> Found:
        """Perform accelerated iterations, which pass plateaus of the likelihood on which plain EM steps and fits end."""
        fast = Climber(replace(self.method, accelerate=True), climber.objective)
        reached = fast.climbed(found.mixture, *_LAST)
        # An iteration takes up to three passes over the points.
        climber.work += 3 * fast.work
        return best_sound([reached, found], lambda each: not self.degenerate(each.mixture)) or found

    def _annealed(self, climber: Climber, found: Found) -> Found:
        """Perform deterministic annealing from a candidate; return the better one of both."""
        heated = replace(self.method, temperature=(0.3, CANDIDATE[0]))
        state = heated.init(climber.objective, found.mixture)
        for _ in range(CANDIDATE[0]):
            state, _ = heated.step(climber.objective, state)
        climber.work += 2 * CANDIDATE[0] * self.K
        return best_of([found, climber.climbed(state.population.whole(state.mixture), *MERGED)])

    def _by_likelihood(self, climber: Climber, found: list[Found], starts: list[Found]) -> Found:
        """Return the candidate with the best likelihood (and penalty) after EM steps without the prior.

        Candidates are the results of the search, and those of EM steps with the prior from the clusters. If these are all the
        same, of well separated components, one step without the prior reaches its optimum, and a fit that follows improves it.
        """
        # With many components the prior is so wide that its optimum is worse than that of EM from the clusters themselves.
        begun = [each.mixture if self.K <= _WIDE else each.origin for each in starts]
        different = without_copies([*(each.mixture for each in found), *begun])
        single = len(different) == 1 and found[0].separated
        if single and self.followed:
            return found[0]
        # The points are in the same order.
        plain = Climber(self.method, replace(climber.objective, penalty=self.penalty))
        climbed = plain.climbs(different, *(_SINGLE if single and self.fits else _PLAIN))
        climber.work += plain.work
        if len(climbed) == 1:
            return climbed[0]
        # Well separated components of many points are sound, even if they are thin.
        separated = climbed[0] if found[0].separated and not self._is_small(climbed[0].mixture) else None
        sound = best_sound(climbed, lambda each: each is separated or not self.degenerate(each.mixture))
        return sound or best_of(plain.sound(climbed))

    def degenerate(self, mixture: Mixture, count: float | None = None) -> bool:
        """Return whether a component has fewer than 2 (D + 1) points, or a very small variance in some direction.

        Args:
            mixture: A mixture in standardized coordinates.
            count: Effective number of points to which the mixture was fitted; None for that of the sample.
        """
        if self._is_small(mixture, count):
            return True
        factors = mixture.factor.matrices()
        # Bounds that are computed faster: the Frobenius norm, and the least variance of a column.
        if float(factors.square().sum((1, 2)).amax()) < 1 / (_THIN * float(self.clusters.covariance.diagonal().amin())):
            return False
        limit = 1 / (_THIN * self._least)
        # If all precisions are smaller, the difference is positive definite; this takes less time than singular values.
        eye = torch.eye(self.D).to(factors)
        return bool((torch.linalg.cholesky_ex(limit * eye - factors @ factors.mT).info > 0).any())

    def _is_small(self, mixture: Mixture, count: float | None = None) -> bool:
        """Return whether a component has fewer than 2 (D + 1) points; arguments as for :meth:`degenerate`."""
        return float(mixture.weights.min()) * (self.plain.count if count is None else count) < 2 * (self.D + 1)
