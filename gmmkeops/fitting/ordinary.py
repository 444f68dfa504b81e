"""Ordinary EM steps, of which one call performs several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.components import Factor, Moments, solve_weights
from gmmkeops.data import Batch
from gmmkeops.fitting.em_state import EMState, is_tied
from gmmkeops.fitting.method import Evaluation
from gmmkeops.fitting.objective import FLOOR, Objective
from gmmkeops.fitting.placement import parameter_device
from gmmkeops.fitting.population import DEAD_POINTS
from gmmkeops.models import HALF, Mixture, merges_singly, noise

if TYPE_CHECKING:
    from gmmkeops.fitting.em import EM

__all__ = ["DEAD_SHARE", "Block", "BlockSteps", "Climbs", "climb", "climbs_of", "maximized"]

# Largest numbers of steps in the first block of a fit, and in the others: many fits end after few steps.
_FIRST, _MOST = 4, 16

# Number of steps on a GPU after one that was not ordinary that are not tried as ordinary ones.
_PAUSE = 8

# EM prunes components at this fraction of DEAD_POINTS, so that pruning changes the objective only by rounding errors.
DEAD_SHARE = 1e-3


@dataclass(frozen=True)
class Block:
    """Consecutive ordinary EM steps from a state.

    Args:
        method: The method.
        objective: The objective.
        state: The state before the first step.
        found: Results of the steps.
        penalty: Penalty of the mixture without the terms in ``found.priors``, nats per point; equal at all steps.
    """

    method: EM
    objective: Objective
    state: EMState
    found: reductions.Steps
    penalty: float

    @classmethod
    def of(
        cls,
        method: EM,
        objective: Objective,
        state: EMState,
        limit: int | None = None,
        tolerance: float = -math.inf,
        most: int = _MOST,
    ) -> Block | None:
        """Perform steps that need nothing but moments and their maximization; None if the next step needs more.

        Args:
            method, objective, state: As for :meth:`EM.step`.
            limit, tolerance: As for :func:`gmmkeops.reductions.em_steps`.
            most: Largest number of steps, unless there is a limit.
        """
        mixture = state.mixture
        own = _settings(method, objective, mixture, method.beta(state))
        if own is None:
            return None
        batch, settings = own
        objective.passes.seen(batch, mixture.n_components)
        found = reductions.em_steps(
            batch,
            mixture.logits,
            mixture.means,
            mixture.factor,
            settings,
            counts=state.counts,
            drift=state.drift,
            backend=objective.backend,
            limit=limit,
            most=min(max(state.iteration, _FIRST), _MOST, most),
            tolerance=tolerance,
        )
        return None if not found else cls.from_found(method, objective, state, found, settings)

    @classmethod
    def from_found(
        cls,
        method: EM,
        objective: Objective,
        state: EMState,
        found: reductions.Steps,
        settings: reductions.StepSettings,
    ) -> Block:
        """Return the block of steps that have been performed with constants from a state."""
        mixture = state.mixture
        whole = state.population.whole(mixture)
        if whole is mixture:
            penalty = _volume(objective, settings, mixture)
        else:
            penalty = float(objective.penalized(whole)) - found.priors[0] / objective.mass
        return cls(method, objective, state, found, penalty)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.found)

    def likelihood(self, t: int) -> float:
        """Return the mean log-likelihood before step t, nats per point."""
        return self.found.totals[t] / self.objective.mass - self.objective.frame.log_volume

    def value(self, t: int) -> float:
        """Return the objective before step t, nats per point."""
        # The value must not depend on the step at which the block begins, so that fits resume bit by bit.
        return self._with_drift(t, self.found.drifts[t])

    def plain_value(self, t: int) -> float:
        """Return the objective before step t without the changes of the ``reg_covar`` term by those of the fractions."""
        return self._with_drift(t, 0.0)

    def _with_drift(self, t: int, drift: float) -> float:
        penalty = self.penalty + self.found.priors[t] / self.objective.mass
        return penalty + self.found.costs[t] + drift - self.likelihood(t)

    def after(self, t: int) -> EMState:
        """Return the state after the first t steps."""
        if not t:
            return self.state
        found = self.found
        mixture = Mixture.from_valid(found.logits(t), found.means(t), found.factor(t), validate_args=False)
        now = self.state
        # ``replace`` takes three times as long, which counts in fits of few points.
        return EMState(
            now.population,
            mixture,
            now.floored,
            now.iteration + t,
            now.batches,
            now.memory,
            now.average,
            found.counts(t),
            found.drifts[t],
        )

    def evaluation(self, state: EMState, t: int) -> Evaluation:
        """Return the evaluation of the state before step t."""
        whole, population = state.population.whole(state.mixture), state.population
        exact = self.method.assignment != "hard"
        return Evaluation(whole, self.value(t), self.likelihood(t), population.live, state.floored, exact)


class BlockSteps(Iterator[tuple[EMState, Evaluation]]):
    """Iterator over the steps of EM, which performs ordinary steps in blocks.

    Args:
        method, objective, state, most: As for :meth:`EM.steps`.
    """

    def __init__(self, method: EM, objective: Objective, state: EMState, most: int) -> None:
        self.method, self.objective, self.state = method, objective, state
        # The E-step after the last step evaluates the result.
        self._left = most if method.accelerate else most + 1
        self._block: Block | None = None
        self._done = self._pause = 0

    def __next__(self) -> tuple[EMState, Evaluation]:
        if self._block is None or self._done == len(self._block):
            self._block, self._done = self._begun(), 0
        if self._block is None:
            self.state, now = self.method.step(self.objective, self.state)
        else:
            now, self._done = self._block.evaluation(self.state, self._done), self._done + 1
            self.state = self._block.after(self._done)
        self._left -= 1
        return self.state, now

    def _begun(self) -> Block | None:
        """Return the next block, or None if the next step is not an ordinary one."""
        if self._pause:
            self._pause -= 1
            return None
        block = Block.of(self.method, self.objective, self.state, most=self._left)
        if block is None and self.objective.data.device != self.objective.device:
            # The E-step is performed again; steps that follow are probably not ordinary ones, either. A step on its own has the
            # same result as one of a block.
            self._pause = _PAUSE
        return block

    def ahead(self) -> Evaluation | None:
        """Return the evaluation of the state after the last step, if it has been computed."""
        if self._block is None or self._done == len(self._block):
            return None
        return self._block.evaluation(self.state, self._done)


def _settings(
    method: EM, objective: Objective, mixture: Mixture, beta: float
) -> tuple[Batch, reductions.StepSettings] | None:
    """Return the points and the constants of ordinary steps from a mixture; None if its steps are not ordinary ones.

    ``beta`` is the inverse temperature.
    """
    if method.assignment == "stochastic" or (method.accelerate and objective.data.device != objective.device):
        return None
    settings = _constants(method, objective, mixture, beta)
    batch = None if settings is None else objective.whole()
    return None if settings is None or batch is None else (batch, settings)


def _constants(method: EM, objective: Objective, mixture: Mixture, beta: float) -> reductions.StepSettings | None:
    """Return the constants of the M-step from a mixture; None if it needs priors that change, or masks."""
    frozen = method.frozen
    if (
        (objective.penalty is not None and not objective.penalty.constant)
        or method.batch_size is not None
        or beta < 1
        or frozen is None
    ):
        return None
    scatter, degrees = objective.pseudo_points(mixture)
    return reductions.StepSettings(
        objective.mass,
        method.ridge(objective),
        FLOOR,
        DEAD_SHARE * DEAD_POINTS / objective.count,
        frozen,
        method.assignment,
        scatter=scatter,
        degrees=degrees,
        accelerate=method.accelerate,
    )


def maximized(
    method: EM, objective: Objective, state: EMState, sums: Moments
) -> tuple[EMState, float, float | None] | None:
    """Perform an ordinary M-step in the library, from moments that another engine has computed.

    Returns:
        The next state; and the ``reg_covar`` term and the objective of the given one, nats per point. The latter is None if the
        penalty is not constant. The result is None if the M-step is not an ordinary one, or the library does not compute it.
    """
    if objective.data.device == objective.device or state.counts is None:
        # All steps for points on a CPU are tried in blocks.
        return None
    settings = _constants(method, objective, state.mixture, method.beta(state))
    if settings is None:
        penalized = _penalized(method, objective, state, sums)
        return None if penalized is None else (*penalized, None)
    found = _native(state, sums, settings)
    if not found:
        return None
    # As in a block, so that fits resume bit by bit.
    block = Block.from_found(method, objective, state, found, settings)
    return replace(block.after(1), iteration=state.iteration), found.costs[0], block.value(0)


def _native(state: EMState, sums: Moments, settings: reductions.StepSettings) -> reductions.Steps | None:
    """Perform one M-step in the library."""
    assert state.counts is not None, "the E-step has computed them"
    mixture = state.mixture
    arguments = (mixture.logits, mixture.means, mixture.factor, settings, state.counts, state.drift)
    return reductions.native_m_step(sums, *arguments)


def _penalized(method: EM, objective: Objective, state: EMState, sums: Moments) -> tuple[EMState, float] | None:
    """Perform the M-step with a penalty whose terms change: means and covariances in the library, weights in torch.

    Pseudo-points of the means are points of their components, so that they are added to the moments. Results are the first two of
    :func:`maximized`.
    """
    mixture, penalty, frozen = state.mixture, objective.penalty, method.frozen
    if (
        penalty is None
        or penalty.bounds
        or method.beta(state) < 1
        or frozen is None
        or len(state.population.live) < state.population.parked.n_components
    ):
        return None
    prior, kind, scale = objective.surrogate(mixture), type(mixture.factor), objective.mass / float(sums.mass)
    with_points, kappa = sums, 0.0
    for points, mean in prior.means:
        away, count = mean - mixture.means, points / scale
        with_points = replace(
            with_points,
            S0=with_points.S0 + count,
            S1=with_points.S1 + count * away,
            S2=with_points.S2 + count * kind.outer(away),
        )
        kappa += points
    copies = mixture.n_components if is_tied(state) else 1
    settings = reductions.StepSettings(
        objective.mass,
        method.ridge(objective),
        FLOOR,
        -1.0,
        (True, *frozen[1:]),
        method.assignment,
        scatter=None if prior.scatter is None else kind.second_moments(prior.scatter),
        degrees=prior.degrees + copies * (prior.degrees_per_component - kappa),
    )
    found = _native(state, with_points, settings)
    if not found:
        return None
    after = Mixture.from_valid(found.logits(1), found.means(1), found.factor(1), validate_args=False)
    state = replace(state, mixture=after, counts=found.counts(1), drift=found.drifts[1])
    if frozen[0]:
        return state, found.costs[0]
    weights = solve_weights(scale * sums.S0 + prior.counts, objective.mass * prior.slopes, mixture.log_weights)
    after = Mixture(weights, after.means, after.factor, validate_args=False)
    return method.pruned(objective, replace(state, mixture=after)), found.costs[0]


def _volume(objective: Objective, settings: reductions.StepSettings, mixture: Mixture) -> float:
    """Return the penalty that is the same at all steps, nats per point.

    The determinants of covariances in data units differ by those of the scales.
    """
    return settings.degrees * mixture.factor.leading * objective.frame.log_volume / objective.mass


def _offset(objective: Objective, settings: reductions.StepSettings, mixture: Mixture) -> float:
    """Return the part of the objective that is the same for all mixtures, nats per point."""
    return _volume(objective, settings, mixture) + objective.frame.log_volume


@dataclass(frozen=True)
class Climbs:
    """EM steps from several mixtures in one call, and rounds of splitting and merging from the best one.

    Args:
        origins: The mixtures from which the steps begin.
        reached: The mixture that was reached from each one, its objective (as for :func:`climb`), and the number of E-steps; None
            if a step is not an ordinary one, or the engine does not compute them.
        rounds: The result of the rounds; None if the first one is not an ordinary one, or there are none.
        pair: The mixtures before and after the last steps of the last accepted round, or None without one.
    """

    origins: list[Mixture]
    reached: list[tuple[Mixture, float, int] | None]
    rounds: reductions.Rounds | None = None
    pair: tuple[Mixture, Mixture] | None = None


def climbs_of(
    method: EM,
    objective: Objective,
    mixtures: list[Mixture],
    steps: int,
    tolerance: float,
    rounds: dict[str, Any] | None = None,
    clusters: reductions.Clusters | None = None,
) -> Climbs | None:
    """Perform the steps of :func:`climb` from several mixtures of equal shape in the native engine, and rounds from the best one.

    Args:
        method: EM without annealing.
        objective, steps, tolerance: As for :func:`climb`.
        mixtures: Mixtures of which no component is pruned or singular, standardized coordinates.
        rounds: Constants of :class:`~gmmkeops.reductions.RoundSettings` for the rounds of
            :class:`~gmmkeops.fitting.rounds.Climber`; None for no rounds. If the objective of the only mixture is among them, no
            steps are performed before the rounds.
        clusters: How the mixtures are found, of which ``mixtures[0]`` is then only an example of the same shape; None if they
            are given.

    Returns:
        The results; None if the engine does not find the mixtures.
    """
    first = mixtures[0]
    nothing = Climbs(mixtures, [None] * len(mixtures)) if clusters is None else None
    own = _settings(method, objective, first, 1.0)
    if own is None:
        return nothing
    batch, settings = own
    if clusters is None:
        # The library performs no step if the points are too coarse for a component.
        batch = batch.accurate(lambda: torch.cat([each.factor.row_norms() for each in mixtures]))
    offset, chosen = _offset(objective, settings, first), None
    # The halves of one component of a common covariance have it, too.
    if rounds is not None and first.factor.leading > 1 and merges_singly(2 * first.n_components):
        points = noise(first.n_features)
        chosen = reductions.RoundSettings(half=HALF, points=points, size=objective.count, constant=offset, **rounds)
    elif rounds is not None and "known" in rounds:
        return nothing
    found = reductions.em_climb(
        batch,
        [(each.logits, each.means, each.factor) for each in mixtures],
        settings,
        steps=steps + 1,
        tolerance=tolerance,
        rounds=chosen,
        clusters=clusters,
        backend=objective.backend,
    )
    if found is None:
        return nothing
    objective.passes.seen(batch, first.n_components)
    results, after, begun = found
    origins = mixtures if clusters is None else [_mixture(each) for each in begun]
    reached = [
        None
        if each is None
        else (_mixture(each.reached), offset + (each.prior - each.total) / objective.mass + each.cost, each.steps)
        for each in results
    ]
    if after is None or after.merged is None or after.reached is None:
        return Climbs(origins, reached, after)
    return Climbs(origins, reached, after, (_mixture(after.merged), _mixture(after.reached)))


def _mixture(parameters: tuple[Tensor, Tensor, Factor]) -> Mixture:
    """Return the mixture of parameters that the engine has computed."""
    return Mixture.from_valid(*parameters, validate_args=False)


def climb(
    method: EM,
    objective: Objective,
    state: EMState,
    steps: int,
    tolerance: float,
    pause: tuple[int, Callable[[EMState], bool]] | None = None,
) -> tuple[EMState, float]:
    """Perform EM steps until one decreases the objective by less than a tolerance, at most ``steps``.

    With ``pause``, a function is called with the state after a number of steps, which are the last ones if it returns True.

    Returns:
        The last state whose objective is known, and this objective (without the changes of the ``reg_covar`` term that are
        caused only by changes of the fractions), nats per point.
    """
    there = state.mixture.means.device
    here = parameter_device(state.mixture, method, objective.penalty, None)
    if here != there:
        # Few parameters on a GPU are moved once, for all steps.
        best, last = climb(method, objective.placed(here), state.to(here), steps, tolerance, pause)
        return best.to(there), last
    best, last = state, math.inf
    # The objective of a mixture is known after the E-step of the next step.
    left = steps + 1
    while left > 0:
        until = left - (steps + 1 - pause[0]) if pause is not None else 0
        block = Block.of(method, objective, state, until if until > 0 else left, tolerance)
        if block is None:
            # The drift is not part of the values, and may be so large that it would take all their digits.
            after, now = method.step(objective, replace(state, drift=0.0))
            values, reached = [now.objective], state
        else:
            values = [block.plain_value(t) for t in range(len(block))]
            # The first step of a block is not compared with the one before it.
            count = 1 if last - values[0] < tolerance else len(block)
            values, reached, after = values[:count], block.after(count - 1), block.after(count)
        before = values[-2] if len(values) > 1 else last
        best, last, state = reached, values[-1], after
        left -= len(values)
        if before - last < tolerance or (pause is not None and left == steps + 1 - pause[0] and pause[1](state)):
            break
    return best, last
