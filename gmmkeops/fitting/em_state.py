"""State of EM, masks of frozen components, and random perturbations for annealing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmmkeops._checks import as_integer, as_number
from gmmkeops.components import Moments, as_tensor
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.population import Population
from gmmkeops.fitting.state_file import known
from gmmkeops.models import Mixture

__all__ = ["EMState", "EMStep", "check_temperature", "is_tied", "mask_of", "shaken"]

# Standard deviation of the noise that is added to the means in each iteration of annealing, in standardized coordinates. At a
# low inverse temperature all means coincide; this is a fixed point of EM, which only noise can leave.
_SHAKE = 1e-2


@known("EM")
@dataclass(frozen=True)
class EMState:
    """State of EM: the active mixture, and for stepwise EM the running averages of the moments.

    ``counts`` (K or 1,) are the expected fractions of the points for each covariance at the last M-step, which weight the
    ``reg_covar`` term of the objective. ``drift`` is added to the objective to compensate changes of this term that are caused by
    changes of the fractions alone, nats per point.
    """

    population: Population
    mixture: Mixture
    floored: Tensor
    iteration: int = 0
    batches: int = 0
    memory: Moments | None = None
    average: Moments | None = None
    counts: Tensor | None = None
    drift: float = 0.0

    def to(self, device: torch.device) -> EMState:
        """Copy the state to a device."""
        mixture, parked = self.mixture.to(device), self.population.parked
        parked = mixture if parked is self.mixture else parked.to(device)
        return replace(
            self,
            population=Population(parked, self.population.live.to(device)),
            mixture=mixture,
            floored=self.floored.to(device),
            memory=None if self.memory is None else self.memory.to(device),
            average=None if self.average is None else self.average.to(device),
            counts=None if self.counts is None else self.counts.to(device),
        )


class EMStep(NamedTuple):
    """Result of an M-step: the active mixture, a mask (K,) of components that were regularized, and the fraction of the points
    (K or 1,) that each covariance was estimated from."""

    mixture: Mixture
    hit: Tensor
    counts: Tensor


def is_tied(state: EMState) -> bool:
    """Return whether all components share one covariance."""
    whole = state.population.parked
    return whole.factor.leading == 1 and whole.n_components > 1


def mask_of(value: Any, mixture: Mixture, name: str) -> Tensor | None:
    """Convert True, False or a sequence of booleans to a mask (K,); False becomes None."""
    if value is False:
        return None
    if value is True:
        return torch.ones(mixture.n_components, dtype=torch.bool, device=mixture.means.device)
    mask = as_tensor(value, name=name, dtype=torch.float64, device=mixture.means.device)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name} must be True, False or {mixture.n_components} booleans, got other numbers.")
    mask = mask.bool()
    if mask.ndim == 0:
        return mask.expand(mixture.n_components)
    if mask.shape != (mixture.n_components,):
        raise ValueError(
            f"{name} must be True, False or {mixture.n_components} booleans, got shape {tuple(mask.shape)}."
        )
    if name == "frozen_covariances" and mixture.factor.leading == 1 and bool(mask.any()) and not bool(mask.all()):
        raise ValueError("frozen_covariances must be True or False for a tied covariance, got different values.")
    return mask


def shaken(objective: Objective, state: EMState) -> EMState:
    """Add noise to the means of a state."""
    mixture, generator = state.mixture, objective.passes.generator
    noise = torch.randn(mixture.means.shape, generator=generator, dtype=torch.float64, device=generator.device)
    means = mixture.means + _SHAKE * noise.to(mixture.means.device)
    return replace(state, mixture=Mixture(mixture.logits, means, mixture.factor, validate_args=False))


def check_temperature(temperature: Any) -> None:
    """Check a pair (β, n): the initial inverse temperature, and the number of iterations until it is one.

    Raises:
        ValueError: The argument is not such a pair.
    """
    if temperature is None:
        return
    if not isinstance(temperature, (tuple, list)) or len(temperature) != 2:
        raise ValueError(f"temperature must be a pair (β, n), got {temperature!r}.")
    beta = as_number(temperature[0], "the β of temperature=(β, n)", 0, above=True)
    as_integer(temperature[1], "the n of temperature=(β, n)", 0)
    if beta > 1:
        raise ValueError(f"temperature must be (β, n) with 0 < β <= 1 and n >= 0, got {temperature}.")
