r"""Search for an initial mixture: k-means in two metrics, then rounds of splitting and merging.

A round splits every component, performs EM steps, merges the least distinct pairs until K components are left, and performs EM
steps again. Its result is kept only if the objective is better. With few points per parameter, a prior of the covariances counts
in the objective, since the likelihood alone would favor components that contain few points: first one of the covariance of all
points, then one of the mean covariance within components. References: Zhou, Xu, Fazel and Du
2025, arXiv 2506.06584; Ueda, Nakano, Ghahramani and Hinton 2000, *SMEM algorithm for mixture models*, Neural Computation 12.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import Factor, FullFactor, Moments
from gmmkeops.data import Batch, trimmed_spread
from gmmkeops.fitting.em import EM
from gmmkeops.fitting.em_state import EMState
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.kmeans import clusters, distinct, kmeans, mixture_of, seeds
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.ordinary import climb
from gmmkeops.fitting.population import Population
from gmmkeops.fitting.preparation import prepared
from gmmkeops.fitting.result import StartReport
from gmmkeops.models import Mixture, merge_down, merged_by, split
from gmmkeops.penalties import CovariancePrior, Penalty, as_penalty

__all__ = ["Search", "has_few_points", "sample_size", "within_prior"]

# Points per parameter of a component below which the objective of the search contains a prior, and below which no rounds are
# performed, since they would only fit single points.
_FEW, _TOO_FEW = 10.0, 1.0

# Points of the sample for each component: at least this many, and this many for each of its parameters; and numbers of a sample.
_PER_COMPONENT, _PER_PARAMETER, _NUMBERS = 500, 20, 1 << 26

# Points on which k-means runs: at least this many, and this many for each component.
_CLUSTERED, _EACH = 20_000, 20

# Maximum number of rounds; for several initializations.
_ROUNDS, _MORE_ROUNDS = 3, 8

# Largest dimension in which points are sorted by a kd-tree, and expected number of E-steps.
_TREE, _SWEEPS = 4, 100

# EM steps and tolerances (nats per point) of candidates, after a split, and after a merge.
_CANDIDATE, _SPLIT, _MERGED = (15, 1e-3), (10, 1e-3), (15, 1e-4)

# Points times parameters from which E-steps in float32 save time.
_LONG = 2_000_000

# Improvement of the objective by a round (nats per point) below which no further one is performed.
_GAIN = 1e-3

# Ratio of reg_covar and the smallest variance of a column, for fits that have no reg_covar.
_RIDGE = 1e-6

# Relative difference of objectives that are equal up to rounding.
_TIE = 1e-7

# Difference of objectives that are the same optimum, nats per point.
_SAME = 1e-3

# Ratio of the least eigenvalues of a covariance and of that of all points below which a component is degenerate.
_THIN = 1e-4

# EM steps on the likelihood alone, for candidates that a search with a prior has found; and their tolerance.
_PLAIN = (100, 1e-3)


def sample_size(K: int, D: int, kind: type[Factor]) -> int:
    """Return the number of points (rows) on which K components are searched for."""
    rows = K * max(_PER_COMPONENT, _PER_PARAMETER * _parameters(kind, D))
    return max(_CLUSTERED, _EACH * K, min(rows, _NUMBERS // D))


def prior_of(x: Tensor, weights: Tensor | None, K: int) -> CovariancePrior:
    """Return a weak prior of the covariances: D + 2 points with the covariance of all points divided by K^(2/D)."""
    D = x.shape[1]
    return CovariancePrior(_robust_covariance(x, weights, *trimmed_spread(x, weights)) / K ** (2 / D), D + 2.0)


def has_few_points(rows: float, mixture: Mixture) -> bool:
    """Return whether there are fewer than ten points per parameter of a component."""
    return rows < _FEW * mixture.n_components * _parameters(type(mixture.factor), mixture.n_features)


def within_prior(mixture: Mixture) -> tuple[Tensor, float]:
    """Return covariance and number of the points of a prior: D + 2 points with the mean covariance within components."""
    covariances = mixture.factor.covariances().expand(mixture.n_components, -1, -1)
    return (mixture.weights[:, None, None] * covariances).sum(0), mixture.n_features + 2.0


def _robust_covariance(x: Tensor, weights: Tensor | None, center: Tensor, spread: Tensor) -> Tensor:
    """Compute the covariance (D, D) of points, with columns that are clipped at ten standard deviations."""
    spread = torch.where(spread > 0, spread, 1.0)
    z = ((x.double() - center) / spread).clamp_(-10, 10)
    g = torch.ones(len(z), dtype=torch.float64, device=x.device) if weights is None else weights
    z = z - g @ z / g.sum()
    # A constant column would make the covariance singular.
    covariance = (z.mT * g) @ z / g.sum() + 1e-6 * torch.eye(x.shape[1]).to(z)
    return covariance * spread * spread[:, None]


def _parameters(kind: type[Factor], D: int) -> int:
    """Count the parameters of a component: weight, mean and covariance."""
    return 1 + D + kind.count(1, D)


@dataclass(frozen=True)
class _Found:
    """A candidate: the state of EM, whose mixture has been evaluated; its objective, nats per point; and the initial mixture."""

    state: EMState
    value: float
    origin: Mixture


def _best(found: list[_Found]) -> _Found:
    """Return the candidate of the lowest objective; the first one of those that are equal up to rounding."""
    least = min(each.value for each in found)
    return next((each for each in found if each.value <= least + _TIE * max(1.0, abs(least))), found[0])


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
    ) -> None:
        self.began = time.perf_counter()
        self.x, self.weights, self.K, self.kind, self.tied = x, weights, K, kind, tied
        # Splits and k-means compare the columns, so that their scale must not depend on their units.
        frame = Frame.of(x, weights, isotropic=kind.isotropic, rounded=False)
        method = EM(reg_covar=_RIDGE * float(frame.scale.min()) ** 2) if method is None else method
        self.method = replace(method, tol=0.0, accelerate=False, temperature=None, batch_size=None, assignment="soft")
        self.generator, self.backend, self.prior = generator, backend, prior
        self.penalty = self._supported(penalty, K)
        self.doubles = K > 1 and (self.penalty is None or self._accepts(self.penalty, 2 * K))
        # The library is twice as fast in float32; the points are evaluated in float64 if they are too coarse for that.
        long = len(x) * K * _parameters(kind, x.shape[1]) >= _LONG
        single = torch.float32 if long and x.device.type == "cpu" else None
        settings: Any = {"isotropic": kind.isotropic, "dtype": single, "frame": frame}
        self.plain = prepared(x, weights, self.penalty, backend, generator, **settings)
        self.D = x.shape[1]
        self.ratio = self.plain.count / (K * _parameters(kind, self.D))
        self.few = self.ratio < _FEW and not tied and K > 1
        self.objective = self.plain
        if self.few and self.ratio >= _TOO_FEW:
            added = prior_of(x, weights, K)
            self.objective = replace(self.plain, penalty=added if self.penalty is None else self.penalty + added)
        self.sweeps, self.rounds, self.candidates = 0.0, 0, 0

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
            n_init: Number of searches from different candidates; fewer if the best optimum has been found twice.
            rows: Number of all points.
        """
        objective = self._arranged()
        most = _MORE_ROUNDS if n_init >= 5 else _ROUNDS
        best: _Found | None = None
        starts: list[_Found] = []
        seen: list[float] = []
        for run in range(n_init):
            candidates = self._sound([self._climbed(objective, each, *_CANDIDATE) for each in self._candidates(run)])
            starts += candidates
            found = _best(candidates)
            if strategy == "auto" and self.ratio < _TOO_FEW:
                # A fit of fewer points than parameters stays where it begins, which is the clusters themselves.
                found = _Found(self._state(found.origin), found.value, found.origin)
            if strategy == "annealed":
                found = self._annealed(objective, found)
            elif self.doubles and (strategy == "split-merge" or self.ratio >= _TOO_FEW):
                found = self._improved(objective, found, most)
            seen.append(found.value)
            best = found if best is None else _best([best, found])
            if sum(abs(value - best.value) < _SAME for value in seen) > 1:
                break
        assert best is not None, "there is at least one run"
        if self.few and self.ratio >= _TOO_FEW:
            narrowed = self._narrowed(objective, best, most) if self.doubles and strategy != "annealed" else best
            best = narrowed if self.prior is not None else self._by_likelihood([narrowed, best, *starts])
        mixture = self.plain.frame.leave(best.state.population.whole(best.state.mixture))
        return mixture, StartReport(
            strategy,
            self.candidates,
            self.rounds,
            self.sweeps,
            len(self.x),
            rows,
            self.few,
            time.perf_counter() - self.began,
        )

    def _arranged(self) -> Objective:
        """Return the objective, with points sorted by a kd-tree for truncation if that saves time."""
        if self.D > _TREE or not reductions.may_arrange(len(self.x), self.K, self.D):
            return self.objective
        x: Tensor = self.plain.data.x  # type: ignore[attr-defined]
        factor = self.kind.from_covariances(self.kind.compact(torch.eye(self.D).to(x).double())[None], features=self.D)
        means = x[: self.K].double()
        return self.objective.truncated(
            None, Mixture(means.new_zeros(self.K), means, factor, validate_args=False), _SWEEPS
        )

    def _candidates(self, run: int) -> list[Mixture]:
        """Return the initial mixtures of a run, standardized coordinates: one for each metric."""
        points, masses = self._different
        found = []
        for root in self._roots:
            z = points if root is None else points @ root
            if run % 3 == 0:
                centers = kmeans(z, masses, self.K, self.generator, self.backend, 1)
            else:
                centers = seeds(z, masses, self.K, self.generator, spread=run % 3 == 1)
            found.append(self._clustered(centers, root))
        self.candidates += len(found)
        return found

    @cached_property
    def _spread(self) -> tuple[Tensor, Tensor]:
        """Robust centers and standard deviations of the columns (D,), standardized coordinates."""
        return trimmed_spread(self.plain.data.x, self.weights)  # type: ignore[attr-defined]

    @cached_property
    def _covariance(self) -> Tensor:
        """Robust covariance of all points, standardized coordinates."""
        x: Tensor = self.plain.data.x  # type: ignore[attr-defined]
        return _robust_covariance(x, self.weights, *self._spread)

    @cached_property
    def _roots(self) -> list[Tensor | None]:
        """The metrics of k-means: that of the standardized columns (None), and that in which all points are white (D, D)."""
        if self.D == 1 or self.K == 1:
            return [None]
        values, vectors = torch.linalg.eigh(self._covariance)
        return [None, vectors * values.rsqrt()]

    @cached_property
    def _different(self) -> tuple[Tensor, Tensor]:
        """Different points for k-means, standardized coordinates, and their weights."""
        x: Tensor = self.plain.data.x  # type: ignore[attr-defined]
        g, most = self.weights, max(_CLUSTERED, _EACH * self.K)
        if len(x) > most:
            rows = torch.randperm(len(x), generator=self.generator, device=x.device)[:most]
            x, g = x[rows], None if g is None else g[rows]
        return distinct(x, g)

    def _clustered(self, centers: Tensor, root: Tensor | None) -> Mixture:
        """Return the mixture of the clusters about centers (K, D) in a metric."""
        batch = Batch(self.plain.data.x, self.plain.data.weights)  # type: ignore[attr-defined]
        if root is None:
            sums = clusters([batch], centers, self.kind, self.backend)
        else:
            means = torch.linalg.solve(root.mT, centers.mT).mT
            arguments = (batch.points, centers.new_zeros(len(centers)), means, FullFactor.from_factors(root[None]))
            found = reductions.moments(
                *arguments, weights=batch.weights, assignment="hard", backend=self.backend, truncate=0
            )
            spread = self.kind.second_moments(found.S2)
            sums = Moments(found.S0, found.S1, spread, found.centers, found.total, found.mass)
        return mixture_of(sums, self.kind, self.tied, *self._spread)

    def _climbed(self, objective: Objective, mixture: Mixture, steps: int, tolerance: float) -> _Found:
        """Perform EM steps from a mixture in standardized coordinates."""
        state = self._state(mixture)
        if objective.penalty is not None and not objective.penalty.constant:
            state = self.method.init(objective, mixture)
        state, value = climb(self.method, objective, state, steps, tolerance)
        self.sweeps += (state.iteration + 1) * mixture.n_components / self.K
        return _Found(state, value, mixture)

    def _state(self, mixture: Mixture) -> EMState:
        """Return the state of EM at a mixture of which no component is pruned or singular."""
        unchanged = torch.zeros(mixture.n_components, dtype=torch.bool, device=mixture.means.device)
        return EMState(Population.of(mixture), mixture, unchanged)

    def _sound(self, found: list[_Found]) -> list[_Found]:
        """Remove degenerate candidates, if there are others: those with a component of fewer than D + 1 points."""
        sound = [each for each in found if math.isfinite(each.value) and self._least(each) >= self.D + 1]
        return sound or [each for each in found if math.isfinite(each.value)] or found

    def _least(self, found: _Found) -> float:
        """Return the expected number of points of the smallest component."""
        return float(found.state.population.whole(found.state.mixture).weights.min()) * self.plain.count

    def _improved(self, objective: Objective, found: _Found, most: int) -> _Found:
        """Split, merge and climb, as long as that improves the objective."""
        for _ in range(most):
            other = self._round(objective, found.state.mixture)
            self.rounds += 1
            if other is None or _best([found, other]) is found:
                break
            if self._least(other) < min(self.D + 1, self._least(found)):
                break
            gain, found = found.value - other.value, other
            if gain < _GAIN:
                break
        return found

    def _narrowed(self, objective: Objective, found: _Found, most: int) -> _Found:
        """Perform rounds with a prior of the mean covariance within components.

        With many components or columns the first prior is much wider than the components, so that its optimum merges some.
        """
        whole = found.state.population.whole(found.state.mixture)
        added = CovariancePrior(*within_prior(self.plain.frame.leave(whole)))
        narrow = replace(objective, penalty=added if self.penalty is None else self.penalty + added)
        return self._improved(narrow, self._climbed(narrow, whole, *_MERGED), most)

    def _round(self, objective: Objective, mixture: Mixture) -> _Found | None:
        """Return the result of one round; None if fewer than K components are left after the split."""
        twice = self._climbed(objective, split(mixture), *_SPLIT).state.mixture
        if twice.n_components < self.K:
            return None
        tree = merge_down(twice, self.K)
        return self._climbed(objective, merged_by(twice, tree.labels(self.K), self.K), *_MERGED)

    def _annealed(self, objective: Objective, found: _Found) -> _Found:
        """Perform deterministic annealing from a candidate; return the better one of both."""
        heated = replace(self.method, temperature=(0.3, _CANDIDATE[0]))
        state = heated.init(objective, found.state.population.whole(found.state.mixture))
        for _ in range(_CANDIDATE[0]):
            state, _ = heated.step(objective, state)
        self.sweeps += 2 * _CANDIDATE[0]
        other = self._climbed(objective, state.population.whole(state.mixture), *_MERGED)
        return _best([found, other])

    def _by_likelihood(self, found: list[_Found]) -> _Found:
        """Return the candidate with the best likelihood (and penalty) after EM steps without the prior."""
        climbed = [
            self._climbed(self.plain, each.state.population.whole(each.state.mixture), *_PLAIN) for each in found
        ]
        sound = [each for each in climbed if not self._degenerate(each)]
        return _best(sound or self._sound(climbed))

    def _degenerate(self, found: _Found) -> bool:
        """Return whether a component has fewer than 2 (D + 1) points, or a very small variance in some direction."""
        if self._least(found) < 2 * (self.D + 1):
            return True
        least = torch.linalg.eigvalsh(self._covariance)[0]
        U = found.state.mixture.factor.matrices()
        return bool(torch.linalg.matrix_norm(U, 2).amax() ** -2 < _THIN * least)
