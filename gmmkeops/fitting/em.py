"""Expectation-maximization (EM) and its variants, computed from the sufficient statistics of the E-step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops._checks import FormerName, PrecisionWarning, accepts, as_choice, warn
from gmmkeops.components import Factor, Frozen, Moments, m_step, solve_weights
from gmmkeops.data import DEFAULT_SEED, Batch, as_points, as_weights, table_of, weight_unit
from gmmkeops.fitting.em_state import EMState, EMStep, check_temperature, is_tied, mask_of, shaken
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.method import Evaluation, Method, check_settings
from gmmkeops.fitting.objective import FLOOR, Objective
from gmmkeops.fitting.ordinary import DEAD_SHARE, Block, BlockSteps, maximized
from gmmkeops.fitting.placement import parameter_device
from gmmkeops.fitting.population import DEAD_POINTS, Population, evaluation
from gmmkeops.fitting.preparation import prepared
from gmmkeops.fitting.ridge import dominated
from gmmkeops.fitting.rounds import CANDIDATE, ROUNDS, Climber
from gmmkeops.fitting.squarem import extrapolated
from gmmkeops.models import Mixture, as_mixture, split

__all__ = ["EM"]

_FROZEN = ("frozen_weights", "frozen_means", "frozen_covariances")


@dataclass(frozen=True, repr=False)
class EM(Method[EMState]):
    r"""Expectation-maximization (EM). All options can be combined.

    .. math::

        W_k = \frac{S^0_k}{\sum_j S^0_j}, \qquad \mu_k^+ = \mu_k + \frac{S^1_k}{S^0_k}, \qquad
        \Sigma_k = \frac{S^2_k}{S^0_k} - \frac{S^1_k {S^1_k}^\top}{(S^0_k)^2} + \text{reg\_covar}\, I

    with the responsibility-weighted :class:`~gmmkeops.Moments` about :math:`\mu_k`. Penalties add terms to these formulas.

    Args:
        assignment: ``"soft"`` is EM. ``"hard"`` assigns each point to its most probable component and maximizes the
            classification likelihood (classification EM; k-means if the covariance is tied, spherical and frozen).
            ``"stochastic"`` draws the component of each point (SEM).
        batch_size: Points per step of stepwise EM, or None for full EM. Moments of the t-th batch enter the running average
            with weight :math:`(t + t_0)^{-\kappa}`. An iteration is one pass over the data in both cases.
        step_exponent: κ, above 0.5 and at most 1.
        step_offset: t_0 > 0.
        average: Whether to return the M-step of the moments averaged over all batches (Polyak-Ruppert averaging).
        temperature: (β, n): exponents are multiplied by an inverse temperature that rises from β to 1 over the first n
            iterations, and a small random perturbation is added to the means each time (deterministic annealing); or None.
            During these iterations no component is pruned, and concave penalties on the weights have no effect.
        accelerate: Whether to extrapolate after every two EM steps by SQUAREM. An extrapolation that increases the objective is
            discarded. An iteration then takes three passes over the data. Ignored if ``batch_size`` is given.
        refine: Whether to improve the initial mixture before the first iteration, by up to three rounds in which every component
            is split, the least distinct pairs are merged until K are left, and EM steps follow; a round is kept only if the
            objective is better (:func:`gmmkeops.initialize`). Components of weight zero are used again. Not combined with
            ``batch_size``, ``temperature``, frozen parameters or another assignment than ``"soft"``.
        reg_covar: Constant added to the diagonal of each covariance in every M-step, squared data units, as in scikit-learn; all
            eigenvalues are at least as large. With reg_covar, an EM step may increase the negative log-likelihood. It decreases
            the sum of the objective and the term :math:`\frac{1}{2} \text{reg\_covar} \sum_k c_k \operatorname{tr}
            \Sigma_k^{-1}`, where :math:`c_k` is the fraction of the points that component k is responsible for. The history
            contains this sum as "objective", without changes of the term that are caused only by changes of :math:`c_k`.
        frozen_weights, frozen_means, frozen_covariances: True, or a boolean mask (K,): these parameters keep their initial
            values. A tied covariance is frozen for all components or for none.
        max_iter: Maximum number of iterations, if not passed to :func:`gmmkeops.fit`.
        tol: Tolerance, nats per point: the fit has converged when the objective changed by less than the larger one of tol / 4
            and 1e-5 over the last half of the iterations, and by less than tol over the last ten. With a penalty that prunes
            components, tol / 10 replaces tol / 4.
        relative_tol: Tolerance as a fraction of the objective; the larger one of the two tolerances applies.
        patience: Minimum number of iterations over which the change is measured.

    Raises:
        ValueError: An argument is out of its range.

    Reference:
        Dempster, Laird and Rubin 1977, *Maximum likelihood from incomplete data via the EM algorithm*, JRSS B 39; stepwise:
        Cappé and Moulines 2009, *On-line expectation-maximization algorithm for latent data models*, JRSS B 71; hard and
        stochastic: Celeux and Govaert 1992; SQUAREM: Varadhan and Roland 2008, Scandinavian Journal of Statistics 35;
        annealed: Ueda and Nakano 1998, Neural Networks 11.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> result = gk.fit(gk.initialize(x, 2), x, gk.EM(), penalty=gk.penalties.SqrtWeights(0.1), max_iter=2000)
        >>> objective = torch.tensor(result.history["objective"], dtype=torch.float64)
        >>> result.converged, bool((objective.diff() <= 1e-12).all())  # monotone up to rounding
        (True, True)
    """

    returns_last: ClassVar[bool] = True

    assignment: str = "soft"
    batch_size: int | None = None
    step_exponent: float = 0.6
    step_offset: float = 2.0
    average: bool = False
    temperature: tuple[float, int] | None = None
    accelerate: bool = False
    refine: bool = False
    reg_covar: float = 1e-6
    frozen_weights: bool | Sequence[bool] = False
    frozen_means: bool | Sequence[bool] = False
    frozen_covariances: bool | Sequence[bool] = False
    max_iter: int = 100
    tol: float = 1e-3
    relative_tol: float = 0.0
    patience: int = 1

    def __post_init__(self) -> None:
        as_choice(self.assignment, "assignment", reductions.ASSIGNMENTS)
        check_settings(self)
        check_temperature(self.temperature)
        frozen = any(getattr(self, name) is not False for name in _FROZEN)
        if self.refine and (self.assignment != "soft" or self.batch_size or self.temperature or frozen):
            raise ValueError(
                "refine=True cannot be combined with batch_size, temperature, frozen parameters or another assignment than "
                "'soft'; refine the mixture first, in a fit of its own."
            )

    @property
    def portable(self) -> bool:
        return True

    def few_parameters(self, factor: Factor) -> float:
        # The library performs ordinary M-steps on all cores. On one core they take 1.4 ms for 1000 components in 16 dimensions,
        # and 20 to 30 ms for 1e5 components in 3 dimensions. A pass over all points usually takes longer, since there are many
        # more points than parameters.
        ordinary = self.batch_size is None and self.temperature is None and self.frozen is not None
        return math.inf if ordinary and reductions.maximizes(factor) else super().few_parameters(factor)

    @property
    def frozen(self) -> tuple[bool, bool, bool] | None:
        """Whether all weights, means and covariances are frozen; None if those of single components are."""
        given = self.frozen_weights, self.frozen_means, self.frozen_covariances
        return given if all(isinstance(each, bool) for each in given) else None  # type: ignore[return-value]

    def plain(self) -> EM:
        """Return EM of which each iteration is one EM step with all points."""
        if (self.assignment, self.batch_size, self.temperature, self.accelerate) == ("soft", None, None, False):
            return self
        return replace(self, assignment="soft", batch_size=None, temperature=None, accelerate=False)

    def init(self, objective: Objective, mixture: Mixture) -> EMState:
        if objective.penalty is not None:
            objective.surrogate(mixture)  # raises for a penalty without an M-step, before the first pass
        for name in _FROZEN:
            mask_of(getattr(self, name), mixture, name)
        if self.refine and objective.rows:
            mixture = self._refined(objective, mixture)
        mixture, floored = objective.project(mixture)
        population = Population.of(mixture)
        alive = mixture.log_weights.exp() > 0
        if not bool(alive.all()):
            population, mixture = population.retire(mixture, alive), mixture.select(alive.nonzero()[:, 0])
        return EMState(population, mixture, floored)

    def _refined(self, objective: Objective, mixture: Mixture) -> Mixture:
        """Improve a mixture by rounds of splitting and merging."""
        climber = Climber(replace(self.plain(), refine=False), objective)
        try:
            objective.surrogate(split(mixture))
        except ValueError as error:
            raise ValueError(f"refine=True needs a penalty that applies to any number of components: {error}") from None
        return climber.searched([mixture], *CANDIDATE, ROUNDS)[1].mixture

    def current(self, objective: Objective, state: EMState) -> Mixture:
        return state.population.whole(self._active(objective, state))

    def _active(self, objective: Objective, state: EMState) -> Mixture:
        """Return the mixture of the active components, computed from the averaged moments if ``average`` is True."""
        average = state.average if self.average else None
        return state.mixture if average is None else self._m_step(objective, state, average).mixture

    def last(self, objective: Objective, state: EMState, steps: Iterator[tuple[EMState, Evaluation]]) -> Evaluation:
        known = steps.ahead() if isinstance(steps, BlockSteps) and self.assignment == "soft" else None
        return self.evaluate(objective, state) if known is None else known

    def evaluate(self, objective: Objective, state: EMState) -> Evaluation:
        if self.assignment == "soft" and (self.average is False or state.average is None):
            # A plain step takes one pass over the points, and an accelerated one up to three.
            method = replace(self, accelerate=False) if self.accelerate else self
            block = Block.of(method, objective, state, limit=1)
            if block is not None:
                return block.evaluation(state, 0)
        return evaluation(objective, state.population, self._active(objective, state), state.floored)

    def finished(self, objectives: list[float], tol: float, objective: Objective) -> bool:
        heated = 0 if self.temperature is None else self.temperature[1]
        return super().finished(objectives[heated:], tol, objective)

    def step(self, objective: Objective, state: EMState) -> tuple[EMState, Evaluation]:
        if self.batch_size is not None:
            return self._pass(objective, state)
        whole = state.population.whole(state.mixture)
        state, sums, likelihood = self._expect(objective, state)
        ordinary = maximized(self, objective, state, sums)
        _, ridge, known = (None, None, None) if ordinary is None else ordinary
        value = self._value(objective, state, likelihood, ridge) if known is None else known
        exact = self.assignment != "hard"
        now = Evaluation(whole, value, likelihood, state.population.live, state.floored, exact)
        heated = self.beta(state) < 1
        state = self._maximize(objective, state, sums) if ordinary is None else ordinary[0]
        if heated:
            state = shaken(objective, state)
        elif self.accelerate:
            state = self._extrapolate(objective, now, state)
        return replace(state, iteration=state.iteration + 1), now

    def steps(self, objective: Objective, state: EMState, most: int) -> Iterator[tuple[EMState, Evaluation]]:
        return BlockSteps(self, objective, state, most)

    def _expect(self, objective: Objective, state: EMState) -> tuple[EMState, Moments, float]:
        """Perform the E-step; return the state, its moments, and the mean log-likelihood of its mixture."""
        sums = self._moments(objective, state, None)
        likelihood = float(sums.total / sums.mass) - objective.frame.log_volume
        if self.beta(state) < 1:
            with torch.no_grad():
                likelihood = -float(objective.negative_log_likelihood(state.mixture))
        if state.counts is None:
            fractions = sums.S0 / sums.mass
            state = replace(state, counts=fractions.sum(0, keepdim=True) if is_tied(state) else fractions)
        return state, sums, likelihood

    def _value(self, objective: Objective, state: EMState, likelihood: float, ridge: float | None = None) -> float:
        """Return the objective of a state with a mean log-likelihood; its ``reg_covar`` term is computed if it is not given."""
        ridge = self._ridge_cost(objective, state.counts, state.mixture.factor) if ridge is None else ridge
        penalty = 0.0
        if objective.penalty is not None:
            penalty = float(objective.penalized(state.population.whole(state.mixture)))
        return penalty - likelihood + (ridge + state.drift)

    def _look(self, objective: Objective, state: EMState) -> tuple[EMState, Moments, float]:
        """Perform the E-step; return the state, its moments, and the objective of its mixture."""
        state, sums, likelihood = self._expect(objective, state)
        return state, sums, self._value(objective, state, likelihood)

    def beta(self, state: EMState) -> float:
        """Return the inverse temperature of an iteration."""
        if self.temperature is None or state.iteration >= self.temperature[1]:
            return 1.0
        start, iterations = self.temperature
        return start + (1 - start) * state.iteration / iterations

    def _moments(self, objective: Objective, state: EMState, batch: list[Batch] | None) -> Moments:
        mixture, beta = state.mixture, self.beta(state)
        if beta == 1:
            return objective.mixture_moments(mixture, batch, assignment=self.assignment)
        factor = mixture.factor.rescale(torch.full_like(objective.frame.scale, beta**0.5))
        return objective.moments(beta * mixture.offsets, mixture.means, factor, batch, assignment=self.assignment)

    def _move(self, objective: Objective, state: EMState, sums: Moments) -> EMState:
        """Perform the M-step, enforce the bounds on the covariances, and prune components of negligible weight."""
        ordinary = maximized(self, objective, state, sums)
        return self._maximize(objective, state, sums) if ordinary is None else ordinary[0]

    def _maximize(self, objective: Objective, state: EMState, sums: Moments) -> EMState:
        """Perform the M-step of :meth:`_move` in torch, for steps that the library does not compute."""
        new = self._m_step(objective, state, sums)
        mixture, before = new.mixture, state.mixture.factor
        floored = state.floored.clone()
        floored[state.population.live[new.hit]] = True
        # The reg_covar term is weighted by the fractions c_k; ``drift`` compensates the change of the objective by their change.
        change = None if state.counts is None else state.counts - new.counts
        drift = state.drift + self._ridge_cost(objective, change, before)
        return self.pruned(objective, replace(state, mixture=mixture, floored=floored, counts=new.counts, drift=drift))

    def pruned(self, objective: Objective, state: EMState) -> EMState:
        """Prune components of negligible weight after an M-step."""
        mixture = state.mixture
        keep = mixture.weights > DEAD_SHARE * DEAD_POINTS / objective.count
        frozen = mask_of(self.frozen_weights, state.population.parked, "frozen_weights")
        keep = keep if frozen is None else keep | frozen[state.population.live]
        if self.beta(state) < 1 or bool(keep.all()) or not bool(keep.any()):
            return state
        index = keep.nonzero()[:, 0]
        counts = state.counts
        return replace(
            state,
            population=state.population.retire(mixture, keep),
            mixture=mixture.select(index),
            counts=counts if counts is None or is_tied(state) else counts[index],
            memory=None if state.memory is None else state.memory.select(index),
            average=None if state.average is None else state.average.select(index),
        )

    def _m_step(self, objective: Objective, state: EMState, sums: Moments) -> EMStep:
        live, old = state.population.live, state.mixture
        whole = state.population.whole(old)
        prior = objective.surrogate(whole)
        if self.beta(state) < 1:
            # During annealing all components have similar responsibilities, and a concave penalty would prune some of them.
            prior = replace(prior, slopes=torch.zeros_like(prior.slopes), counts=prior.counts.clamp(min=0))
        tied, pruned = is_tied(state), None
        if tied and len(live) < whole.n_components:
            # Pruned components have no data, but their means still contribute to the prior of the tied covariance.
            rest = torch.ones(whole.n_components, dtype=torch.bool, device=live.device)
            rest[live] = False
            index = rest.nonzero()[:, 0]
            spread = prior.select(index).spread_about(whole.means[index], type(whole.factor))
            pruned = len(index) * prior.degrees_per_component, spread.sum(0, keepdim=True)
        frozen = Frozen(*(mask_of(getattr(self, name), whole, name) for name in _FROZEN))
        if len(live) < whole.n_components:
            prior, frozen = prior.select(live), frozen.select(live)
        new = m_step(
            sums,
            old.log_weights,
            old.means,
            old.factor,
            prior,
            mass=objective.mass,
            frozen=frozen,
            ridge=self.ridge(objective),
            floor=FLOOR,
            tied=tied,
            pruned=pruned,
        )
        mixture, low = objective.project(Mixture(new.log_weights, new.means, new.factor, validate_args=False))
        return EMStep(mixture, low | new.repaired, new.counts / objective.mass)

    def ridge(self, objective: Objective) -> Tensor:
        """Convert ``reg_covar`` to standardized coordinates (D,)."""
        return objective.frame.variances(self.reg_covar)

    def _ridge_cost(self, objective: Objective, counts: Tensor | None, factor: Factor) -> float:
        """Compute ½ reg_covar Σ_k c_k tr Σ_k⁻¹ for fractions c (K or 1,) of the points, nats per point; 0 in stepwise EM."""
        if not self.reg_covar or counts is None:
            return 0.0
        return 0.5 * float(counts @ (factor.precision_diagonals() @ self.ridge(objective)))

    def _extrapolate(self, objective: Objective, start: Evaluation, first: EMState) -> EMState:
        """Extrapolate from two EM steps by SQUAREM; return the extrapolated state if it is not worse, else the EM state."""
        first, sums, value = self._look(objective, first)
        second = self._move(objective, first, sums)
        if len(second.population.live) < len(start.active) or value > start.objective:
            return second
        leap = extrapolated(start.mixture.select(start.active), first.mixture, second.mixture)
        if leap is None:
            return second
        # Normalizing the extrapolated weights must not change those that are frozen.
        frozen = mask_of(self.frozen_weights, second.population.parked, "frozen_weights")
        frozen = None if frozen is None else frozen[second.population.live]
        logits = solve_weights(leap.weights, torch.zeros_like(leap.logits), second.mixture.log_weights, frozen)
        leap, _ = objective.project(Mixture(logits, leap.means, leap.factor, validate_args=False))
        third, sums, there = self._look(objective, replace(second, mixture=leap))
        # ``value`` is the objective after the first EM step.
        return self._move(objective, third, sums) if there <= value else second

    def _pass(self, objective: Objective, state: EMState) -> tuple[EMState, Evaluation]:
        """Perform one shuffled pass of stepwise EM, which updates the running average of the moments by each batch."""
        assert self.batch_size is not None, "a pass is made of batches"

        def update(reached: tuple[EMState, float, float], batch: list[Batch]) -> tuple[EMState, float, float]:
            state, total, seen = reached
            sums = self._moments(objective, state, batch)
            if not float(sums.mass) > 0:
                return reached
            state = self._blend(state, sums)
            assert state.memory is not None, "just blended"
            return self._move(objective, state, state.memory), total + float(sums.total), seen + float(sums.mass)

        state, total, seen = objective.passes.fold(objective.data, self.batch_size, (state, 0.0, 0.0), update)
        whole, likelihood = (
            state.population.whole(state.mixture),
            total / max(seen, 1e-300) - objective.frame.log_volume,
        )
        value = float(objective.penalized(whole)) - likelihood
        now = Evaluation(whole, value, likelihood, state.population.live, state.floored, exact=False)
        return replace(state, iteration=state.iteration + 1), now

    def _blend(self, state: EMState, sums: Moments) -> EMState:
        """Update the running average of moments by a batch; its initial value is the expected moments of the mixture."""
        m = state.mixture
        before = Moments.expected(m.weights, m.means, m.factor) if state.memory is None else state.memory
        memory = before.blended(sums, (state.batches + self.step_offset) ** -self.step_exponent)
        batches = state.batches + 1
        average = memory if state.average is None else state.average * (1 - 1 / batches) + memory * (1 / batches)
        return replace(state, memory=memory, average=average, batches=batches)

    def maximize(self, mixture: Mixture, moments: Moments, *, penalty: Any = None) -> Mixture:
        """Perform the M-step from the moments of all points, for example moments that were added over several machines.

        Args:
            mixture: The mixture for which the moments were computed.
            moments: Sum of the results of :func:`gmmkeops.reductions.moments`, data units.
            penalty: As for :func:`gmmkeops.fit`.

        Returns:
            The new mixture, float64, data units.

        Raises:
            ValueError: The total weight of the moments is not positive.

        Example:
            >>> import torch, gmmkeops as gk
            >>> x = torch.tensor([[0.0], [2.0]]).double()
            >>> m = gk.Mixture.from_parameters([1.0], [[0.5]], [1.0], "spherical")
            >>> halves = [gk.reductions.moments(part, m.offsets, m.means, m.factor) for part in x.split(1)]
            >>> gk.EM().maximize(m, sum(halves)).means.tolist()
            [[1.0]]
        """
        there, here = mixture.means.device, parameter_device(mixture, self, penalty, None)
        moments = moments.to(here)
        mass = float(moments.mass)
        if not mass > 0:
            raise ValueError(
                f"moments must have a positive total weight, got {mass}; pass the sum over at least one point."
            )
        mixture = mixture.detach().to(device=here, dtype=torch.float64)
        frame = Frame.around(mixture.mean, mixture.variance.sqrt(), isotropic=mixture.factor.isotropic)
        objective = Objective.without_points(frame, mass, penalty)
        state = self.init(objective, frame.enter(mixture))
        new = self._m_step(objective, state, frame.enter_moments(moments)).mixture
        return frame.leave(new).to(there).named(mixture.columns)

    maximise = FormerName("maximize")

    @accepts(old={"weights": "sample_weight"})
    def update(
        self,
        mixture: Mixture,
        x: Any,
        memory: tuple[Moments, int, float] | None = None,
        *,
        penalty: Any = None,
        sample_weight: Any = None,
        backend: str = "auto",
    ) -> tuple[Mixture, tuple[Moments, int, float]]:
        """Perform one step of stepwise EM on a batch of a stream. Batches may have any size.

        Args:
            mixture: Mixture that the last update returned, or the initial mixture.
            x: Points (n, D) of this batch, data units.
            memory: Memory that the last update returned; None for the first batch.
            penalty, backend: As for :func:`gmmkeops.fit`. The penalty receives the total weight of all points so far.
            sample_weight: Weights (n,) of the points of this batch, or None.

        Returns:
            The new mixture (components are never pruned), and the memory for the next update: the running average of the
            moments in data units, the number of batches, and the total weight of all points so far.

        Raises:
            TypeError, ValueError: Invalid points or weights.
        """
        x = as_points(table_of(x, as_mixture(mixture).columns), features=mixture.n_features)
        if x.device != mixture.means.device:
            raise ValueError(f"x is on {x.device}, the mixture on {mixture.means.device}; move one of them with .to().")
        # The random numbers depend on the number of the batch only, so that they are the same in every process.
        generator = torch.Generator(x.device).manual_seed(DEFAULT_SEED + (0 if memory is None else memory[1]))
        g = as_weights(sample_weight, x, name="sample_weight")
        if g is not None and weight_unit(float(g.max())) != 1:
            raise ValueError(
                f"sample_weight must not be extremely large or small, got up to {float(g.max()):.3g}; divide the weights of all "
                "batches by the same number."
            )
        device = parameter_device(mixture, self, penalty, None)
        isotropic = mixture.factor.isotropic
        objective = prepared(x, g, penalty, backend, generator, isotropic=isotropic, parameters=device)
        state = replace(self, refine=False).init(objective, objective.frame.enter(mixture.detach().to(torch.float64)))
        seen = objective.mass
        if memory is not None:
            before = objective.frame.enter_moments(memory[0].to(device))
            state = replace(state, memory=before, batches=memory[1])
            seen += memory[2]
        objective = replace(objective, mass=seen)
        state = self._blend(state, self._moments(objective, state, None))
        assert state.memory is not None, "just blended"
        new = self._m_step(objective, state, state.memory).mixture
        mixture = objective.leave(new).named(mixture.columns)
        if warning := dominated(self, objective.frame.scale, mixture):
            warn(warning, PrecisionWarning)
        return mixture, (objective.frame.leave_moments(state.memory).to(x.device), state.batches, seen)
