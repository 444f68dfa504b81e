"""Active and pruned components of a fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gmmkeops.fitting.method import Evaluation
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.state_file import known
from gmmkeops.models import Mixture

__all__ = ["DEAD_POINTS", "Population", "evaluation"]

# A component is pruned when its expected count is below this; its weight is then set to (almost) zero.
DEAD_POINTS = 1e-3
DEAD_LOG_WEIGHT = -100.0


@known("Population")
@dataclass(frozen=True)
class Population:
    """Parameters of all K components of a fit, and indices of the active ones.

    Args:
        parked: Mixture of all K components, standardized coordinates. Only its pruned components are up to date.
        live: Indices of the active components.
    """

    parked: Mixture
    live: Tensor

    @classmethod
    def of(cls, mixture: Mixture) -> Population:
        """Create a population in which all components are active."""
        return cls(mixture, torch.arange(mixture.n_components, device=mixture.means.device))

    def whole(self, live: Mixture) -> Mixture:
        """Return the mixture of all K components, with the active ones from ``live`` and the pruned ones from ``parked``."""
        if len(self.live) == self.parked.n_components:
            return live
        return Mixture(
            self.parked.logits.index_copy(0, self.live, live.log_weights),
            self.parked.means.index_copy(0, self.live, live.means),
            self.parked.factor.scatter(self.live, live.factor),
            validate_args=False,
        )

    def retire(self, live: Mixture, keep: Tensor) -> Population:
        """Prune the active components that are not in the mask ``keep``."""
        parked = self.whole(live).detach()
        parked.logits[self.live[~keep]] = DEAD_LOG_WEIGHT
        return Population(parked, self.live[keep])


def evaluation(objective: Objective, population: Population, active: Mixture, floored: Tensor) -> Evaluation:
    """Evaluate the exact objective of active components, by a pass over the data.

    Args:
        objective: The objective.
        population: All components.
        active: Mixture of the active components, standardized coordinates.
        floored: Boolean mask (K,) of components whose covariance has been regularized.
    """
    with torch.no_grad():
        whole = population.whole(active).detach()
        negative = float(objective.negative_log_likelihood(active))
        value = negative + float(objective.penalized(whole))
    return Evaluation(whole, value, -negative, population.live, floored)
