r"""What the loop and its methods say to each other: the problem, one evaluation, and the method's contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops.factors import floor_eigenvalues
from gmmkeops.fitting._frame import Frame
from gmmkeops.mixture import Mixture
from gmmkeops.penalties import Penalty, Surrogate, as_penalty

__all__ = ["Evaluation", "Method", "Population", "Problem"]

S = TypeVar("S")

# Least eigenvalue of a covariance in the frame, where the data's own variance is about one: a fit may not put a
# component on a single point and send its density to infinity.
RELATIVE_FLOOR = 1e-12
# A component is dead when it would own fewer points than this; its weight is then brought to nothing.
DEAD_POINTS = 1e-3
DEAD_LOG_WEIGHT = -100.0


@dataclass(frozen=True)
class Problem:
    """The data of a fit, in the frame, and what is asked of it.

    Args:
        x: Points (N, D) in the frame, in the dtype of the work.
        weights: g (N,) float64, or None.
        mass: Σ g.
        count: Effective number of points, (Σ g)² / Σ g².
        frame: The way back to the user's units.
        penalty: In the user's units, nats per point; or None.
        backend: The engine to use.
        generator: Source of randomness.
        truncate: What sweeps may leave out, as the fit was asked.
        cloud: The points arranged for sweeps that leave components out, or None.
    """

    x: Tensor
    weights: Tensor | None
    mass: float
    count: float
    frame: Frame
    penalty: Penalty | None
    backend: str
    generator: torch.Generator
    truncate: float | None = None
    cloud: reductions.Truncation | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        weights: Tensor | None,
        penalty: Any,
        backend: str,
        generator: torch.Generator | None,
        *,
        isotropic: bool,
    ) -> Problem:
        """The problem that checked points (N, D) of the user pose, with a frame of their own, read exactly."""
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(torch.initial_seed() % (1 << 63))
        mass = float(x.shape[0]) if weights is None else float(weights.sum())
        count = mass if weights is None else mass**2 / float(weights.square().sum())
        penalty = None if penalty is None else as_penalty(penalty)
        frame = Frame.of(x, weights, isotropic=isotropic)
        return cls(frame.points(x, x.dtype), weights, mass, count, frame, penalty, backend, generator, truncate=0)

    def truncated(self, truncate: float | None, mixture: Mixture, sweeps: int) -> Problem:
        """The same, read with what truncation allows over so many sweeps of all points from a mixture of the frame on."""
        K, labels = mixture.components, None
        many = mixture.features > reductions.FEW
        if many and (reductions.pays(self.x, K, sweeps, labelled=True) if truncate is None else truncate > 0):
            arguments = (self.x, mixture.offsets, mixture.means, mixture.factor)
            labels = reductions.argmax(*arguments, backend=self.backend, truncate=0)
        arranged = reductions.arrange(self.x, K, truncate, sweeps=sweeps, labels=labels)
        return replace(self, truncate=truncate, cloud=None if isinstance(arranged, Tensor) else arranged)

    def read(self, rows: Tensor | None = None) -> tuple[Tensor | reductions.Truncation, dict[str, Any]]:
        """What the reductions take for all points, or for some rows: points, and the keywords that go with them."""
        g = self.weights if rows is None or self.weights is None else self.weights[rows]
        keywords = {"weights": g, "backend": self.backend, "truncate": self.truncate}
        if rows is not None:
            return self.x[rows], keywords
        # Arranging has been decided for all points, not for each sweep.
        return (self.x, keywords | {"truncate": 0}) if self.cloud is None else (self.cloud, keywords)

    def negative_log_likelihood(self, mixture: Mixture, rows: Tensor | None = None) -> Tensor:
        """Mean over the points (or some of them), nats per point in the user's units; float64, differentiable."""
        x, keywords = self.read(rows)
        g = keywords["weights"]
        mass = float(len(x)) if g is None else float(g.sum())
        total = reductions.total(x, mixture.offsets, mixture.means, mixture.factor, **keywords)
        return self.frame.log_volume - total / max(mass, 1e-300)

    def penalised(self, mixture: Mixture) -> Tensor:
        """The penalty of a mixture of the frame, nats per point."""
        if self.penalty is None:
            return mixture.means.new_zeros(())
        return self.penalty(self.frame.leave(mixture), self.mass)

    def surrogate(self, mixture: Mixture) -> Surrogate:
        """What the penalty adds to an M-step at a mixture of the frame, in the frame."""
        if self.penalty is None:
            return Surrogate.none(mixture)
        return self.frame.surrogate(self.penalty.m_step(self.frame.leave(mixture), self.mass))

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        """The mixture (of the frame) within all bounds, and the components (K,) that hit one."""
        factor, low = floor_eigenvalues(mixture.factor, RELATIVE_FLOOR)
        hit = low.expand(mixture.components)
        if bool(low.any()):
            mixture = Mixture(mixture.logits, mixture.means, factor, validate_args=False)
        if self.penalty is None or not self.penalty.bounds:
            return mixture, hit
        bounded, moved = self.penalty.project(self.frame.leave(mixture))
        return (self.frame.enter(bounded), hit | moved) if bool(moved.any()) else (mixture, hit)


@dataclass(frozen=True)
class Population:
    """All K components of a fit, of which the live ones are in the work.

    Args:
        parked: All K, in the frame; the live ones as they were when the last one died.
        live: Their indices.
    """

    parked: Mixture
    live: Tensor

    @classmethod
    def of(cls, mixture: Mixture) -> Population:
        """Everybody lives."""
        return cls(mixture, torch.arange(mixture.components, device=mixture.means.device))

    def whole(self, live: Mixture) -> Mixture:
        """All K components: the live ones in their places, the dead as they were but for their weight."""
        if len(self.live) == self.parked.components:
            return live
        return Mixture(
            self.parked.logits.index_copy(0, self.live, live.log_weights),
            self.parked.means.index_copy(0, self.live, live.means),
            self.parked.factor.scatter(self.live, live.factor),
            validate_args=False,
        )

    def retire(self, live: Mixture, keep: Tensor) -> Population:
        """Those not kept leave the work, and what is left of their weight goes to the others."""
        parked = self.whole(live).detach()
        parked.logits[self.live[~keep]] = DEAD_LOG_WEIGHT
        return Population(parked, self.live[keep])


@dataclass(frozen=True)
class Evaluation:
    """What is known of a mixture on the way; a step's evaluation is of the mixture that it started from.

    Args:
        mixture: All K components, in the frame, detached.
        objective: Mean negative log-likelihood plus penalty, nats per point.
        log_likelihood: Mean log-likelihood, nats per point, in the user's units.
        live: Indices of the components still in the work.
        floored: Which components (K,) hit a bound on the way here.
        exact: Whether the objective is this mixture's over all points, rather than a running mean over minibatches.
    """

    mixture: Mixture
    objective: float
    log_likelihood: float
    live: Tensor
    floored: Tensor
    exact: bool


class Method(ABC, Generic[S]):
    """How a mixture is improved: a small frozen value; the loop (:func:`gmmkeops.fit`) does everything else.

    Attributes:
        max_iter: Iterations unless the fit says otherwise.
        tol: Tolerance unless the fit says otherwise, nats per point; zero runs all iterations.
        relative_tol: Tolerance as a share of the objective.
        patience: The objective is compared with that of this many iterations before.
    """

    max_iter: int
    tol: float
    relative_tol: float
    patience: int

    @abstractmethod
    def init(self, problem: Problem, mixture: Mixture) -> S:
        """The state before the first step, from a mixture of the frame in float64."""

    @abstractmethod
    def step(self, problem: Problem, state: S) -> tuple[S, Evaluation]:
        """One pass over the data: the next state, and the evaluation of the one before."""

    @abstractmethod
    def current(self, problem: Problem, state: S) -> tuple[Population, Mixture, Tensor]:
        """The population, its live mixture (what would be returned now), and the components (K,) that hit a bound."""

    def evaluate(self, problem: Problem, state: S) -> Evaluation:
        """The exact objective of the current mixture, by one more pass over the data."""
        population, live, floored = self.current(problem, state)
        with torch.no_grad():
            whole = population.whole(live).detach()
            negative = float(problem.negative_log_likelihood(live))
            objective = negative + float(problem.penalised(whole))
        return Evaluation(whole, objective, -negative, population.live, floored, exact=True)

    def finished(self, objectives: list[float], tol: float) -> bool:
        """Whether the objective has stopped moving: less than a tolerance over ``patience`` iterations."""
        if len(objectives) <= self.patience:
            return False
        change = abs(objectives[-1 - self.patience] - objectives[-1])
        return change < tol or change < self.relative_tol * abs(objectives[-1])
