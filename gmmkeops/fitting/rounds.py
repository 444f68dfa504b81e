"""EM steps from a mixture, and rounds of splitting and merging that improve it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gmmkeops.fitting.em_state import EMState
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.ordinary import climb, round_of
from gmmkeops.fitting.population import Population
from gmmkeops.models import Mixture, merge_down, merged_by, split

if TYPE_CHECKING:
    from gmmkeops.fitting.em import EM

__all__ = ["CANDIDATE", "MERGED", "ROUNDS", "Climber", "Found", "best_of"]

# Maximum number of rounds.
ROUNDS = 3

# EM steps and tolerances (nats per point) of candidates, after a split, and after a merge.
CANDIDATE, _SPLIT, MERGED = (15, 1e-3), (10, 1e-3), (15, 1e-4)

# Improvement of the objective by a round (nats per point) below which no further one is performed.
_GAIN = 1e-3

# Relative difference of objectives that are equal up to rounding.
_TIE = 1e-7


@dataclass(frozen=True)
class Found:
    """A candidate.

    Args:
        state: State of EM, whose mixture has been evaluated.
        value: Objective of this mixture, nats per point.
        origin: Mixture before the EM steps.
    """

    state: EMState
    value: float
    origin: Mixture

    @property
    def mixture(self) -> Mixture:
        """Mixture of all components, standardized coordinates."""
        return self.state.population.whole(self.state.mixture)


def best_of(found: list[Found]) -> Found:
    """Return the candidate of the lowest objective; the first one of those that are equal up to rounding."""
    least = min(each.value for each in found)
    return next((each for each in found if each.value <= least + _TIE * max(1.0, abs(least))), found[0])


class Climber:
    """EM steps and rounds for one objective.

    Args:
        method: EM without stepwise passes, annealing or extrapolation.
        objective: The objective.

    Attributes:
        work: Number of E-steps times the number of components in them.
        rounds: Number of rounds.
    """

    def __init__(self, method: EM, objective: Objective) -> None:
        self.method, self.objective = method, objective
        self.work, self.rounds = 0, 0

    def climbed(self, mixture: Mixture, steps: int, tolerance: float) -> Found:
        """Perform EM steps from a mixture in standardized coordinates."""
        state = self.state(mixture)
        if self.objective.penalty is not None and not self.objective.penalty.constant:
            state = self.method.init(self.objective, mixture)
        state, value = climb(self.method, self.objective, state, steps, tolerance)
        self.work += (state.iteration + 1) * mixture.n_components
        return Found(state, value, mixture)

    def state(self, mixture: Mixture) -> EMState:
        """Return the state of EM at a mixture of which no component is pruned or singular."""
        unchanged = torch.zeros(mixture.n_components, dtype=torch.bool, device=mixture.means.device)
        return EMState(Population.of(mixture), mixture, unchanged)

    def least(self, found: Found) -> float:
        """Return the expected number of points of the smallest component."""
        return float(found.mixture.weights.min()) * self.objective.count

    def sound(self, found: list[Found]) -> list[Found]:
        """Remove candidates with a component of fewer than D + 1 points, if there are others."""
        finite = [each for each in found if math.isfinite(each.value)]
        return [each for each in finite if self.least(each) >= each.origin.n_features + 1] or finite or found

    def improved(self, found: Found, most: int) -> Found:
        """Split every component, climb, merge and climb again, as long as that improves the objective."""
        for _ in range(most):
            other = self._round(found)
            self.rounds += 1
            if other is None or best_of([found, other]) is found:
                break
            if self.least(other) < min(found.origin.n_features + 1, self.least(found)):
                break
            gain, found = found.value - other.value, other
            if gain < _GAIN:
                break
        return found

    def _round(self, found: Found) -> Found | None:
        """Return the result of one round; None if fewer components are left after the split than before."""
        K = found.origin.n_components
        # After pruning, the merge leaves more components than were split, which the library does not support.
        whole = found.state.mixture.n_components == K
        fast = round_of(self.method, self.objective, found.state, _SPLIT, MERGED) if whole else None
        if fast is not None:
            merged, reached, value, work = fast
            self.work += work
            return Found(self.state(reached), value, merged)
        twice = self.climbed(split(found.state.mixture), *_SPLIT).state.mixture
        if twice.n_components < K:
            return None
        return self.climbed(merged_by(twice, merge_down(twice, K).labels(K), K), *MERGED)
