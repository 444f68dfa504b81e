r"""Interface between the loop and the methods: the problem, an evaluation of the objective, and the abstract method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops._checks import as_integer, as_number
from gmmkeops.components import Factor, Moments
from gmmkeops.data import Source, World, check_range, fingerprint, sample, weight_unit
from gmmkeops.fitting.checkpoint import Journal, known
from gmmkeops.fitting.data import Data, Ledger, Memory, Piece, Stream
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.identity import describe
from gmmkeops.models import Mixture
from gmmkeops.penalties import Penalty, Surrogate, as_penalty

__all__ = ["DEAD_POINTS", "FLOOR", "Evaluation", "Method", "Population", "Problem", "check_settings"]


def check_settings(method: Any) -> None:
    """Checks what all methods are constructed with.

    Raises:
        ValueError: A setting is out of its range.
    """
    if method.batch_size is not None:
        as_integer(method.batch_size, "batch_size")
        as_integer(method.batch_size, "batch_size", 1, clause="must be at least 1")
    as_integer(method.max_iter, "max_iter", 0)
    as_integer(method.patience, "patience", 1)
    as_number(method.tol, "tol", 0)
    as_number(method.relative_tol, "relative_tol", 0)


S = TypeVar("S")

# Smallest eigenvalue of a covariance in standardized coordinates, about the square of the rounding error there. A component that
# collapses to a single point keeps a finite density, and no covariance that the points determine is changed: two sites that are
# 1e8 deviations apart have variances of 1e-16.
FLOOR = 1e-28

# A component is pruned when its expected count is below this; its weight is then set to (almost) zero.
DEAD_POINTS = 1e-3

DEAD_LOG_WEIGHT = -100.0

# Fractions of the tolerance by which the objective may change over the last half of the iterations. They were chosen from
# measurements: on most data sets a thousand further iterations then gain at most three tolerances.
_PLATEAU, _PRUNING = 0.25, 0.1

# Changes over half of the iterations that are always accepted, nats per point; and the number of iterations over which smaller
# tolerances bound the change.
_NEGLIGIBLE, _RECENT = 1e-5, 10


@dataclass(frozen=True)
class Problem:
    """The data of a fit in standardized coordinates, with the penalty and the settings of their evaluation.

    Args:
        data: The points of this rank in standardized coordinates.
        rows: Number of points on all ranks.
        mass: Total weight Σ g of all points, in units of ``unit``.
        count: Effective number of points, (Σ g)² / Σ g².
        frame: The transformation between data units and standardized coordinates.
        penalty: Function of a mixture in data units, nats per point; or None.
        backend: Name of the engine.
        generator: Random number generator, in the same state on all ranks.
        world: The ranks.
        ledger: Error bounds of truncation in the last pass.
        fingerprint: Hash of the points and weights if there is a checkpoint, else None.
        journal: The state that is written to checkpoints.
        show: Called with the number of rows that a pass over a source has read.
        unit: Unit of weights here, a power of two; penalties and reports use the weights as they were given.
    """

    data: Data
    rows: int
    mass: float
    count: float
    frame: Frame
    penalty: Penalty | None
    backend: str
    generator: torch.Generator
    world: World = field(default_factory=World.alone)
    ledger: Ledger = field(default_factory=Ledger)
    fingerprint: int | None = None
    journal: Journal = field(default_factory=lambda: Journal(None, World.alone()))
    show: Callable[[int], None] | None = None
    unit: float = 1.0

    @classmethod
    def of(
        cls,
        x: Tensor | Source,
        weights: Tensor | None,
        penalty: Any,
        backend: str,
        generator: torch.Generator | None,
        *,
        isotropic: bool,
        extra: int = 0,
        dtype: torch.dtype | None = None,
        device: Any = None,
        world: World | None = None,
        truncate: float | None = 0,
        frame: Frame | None = None,
        journal: Journal | None = None,
    ) -> Problem:
        """Create the problem from validated points (N, D) in data units; the frame is computed from them if none is given.

        The last ``extra`` columns are contexts.
        """
        world = World.alone() if world is None else world
        device = x.device if isinstance(x, Tensor) else torch.device("cpu" if device is None else device)
        generator = world.generator(generator, device)
        journal = Journal(None, world) if journal is None else journal
        data: Data
        if isinstance(x, Tensor) and world.size == 1:
            check_range(x)
            unit = 1.0 if weights is None else weight_unit(float(weights.max()))
            given = weights
            weights = weights if weights is None or unit == 1 else weights / unit
            rows, mass = len(x), float(len(x)) if weights is None else float(weights.sum())
            effective = mass if weights is None else mass**2 / float(weights.square().sum())
            frame = Frame.of(*sample(x, weights), isotropic=isotropic, extra=extra) if frame is None else frame
            mark = None if journal.checkpoint is None else fingerprint(x, given)
            points, rows_at_once = x, 0
        else:
            source = x if isinstance(x, Source) else world.share(Source.of(x, weights=weights))
            survey = world.merged(source.survey(alone=world.size == 1))
            unit = weight_unit(survey.mass / max(survey.rows, 1))
            rows, mass = survey.rows, survey.mass / unit
            points, masses = survey.reservoir.sample()
            masses = masses / unit
            if unit == 1:
                effective = mass**2 / max(survey.squares, 1e-300)
            else:
                # Squares of the weights themselves may be out of range, so they are estimated from the sample.
                effective = rows * float(masses.mean()) ** 2 / max(float(masses.square().mean()), 1e-300)
            cloud = points.to(device), masses.to(device)
            frame = Frame.of(*cloud, isotropic=isotropic, extra=extra) if frame is None else frame
            single, mark = survey.single, survey.fingerprint
            rows_at_once = source.size
        if journal.checkpoint is not None:
            journal.layout = f"{describe(sample(points, None)[0])}, {rows_at_once} rows at a time"
        if isinstance(x, Tensor):
            first = 0
            if world.size > 1:
                part, first = source.slice, source.first
                x, weights = x[part], None if weights is None else weights[part] / unit
            data = Memory.of(x, weights, frame, x.dtype if dtype is None else dtype, truncate, first)
        else:
            kept = torch.float32 if single else torch.float64
            data = Stream(x, frame, kept if dtype is None else dtype, device, truncate, unit)
        penalty = None if penalty is None else as_penalty(penalty)
        return cls(
            data,
            rows,
            mass,
            effective,
            frame,
            penalty,
            backend,
            generator,
            world,
            fingerprint=mark,
            journal=journal,
            unit=unit,
        )

    @classmethod
    def without_points(cls, frame: Frame, mass: float, penalty: Any) -> Problem:
        """Create a problem without points, for an M-step from given moments of total weight ``mass``."""
        data = Memory(frame.shift.new_empty(0, len(frame.shift)), None)
        penalty = None if penalty is None else as_penalty(penalty)
        return cls(data, 0, mass, mass, frame, penalty, "dense", torch.Generator(frame.shift.device))

    def truncated(self, truncate: float | None, mixture: Mixture, sweeps: int) -> Problem:
        """The problem with points sorted for truncation by a standardized mixture, if that saves time over ``sweeps`` passes."""
        if not isinstance(self.data, Memory):
            return self
        return replace(self, data=self.data.arranged(truncate, mixture, sweeps, self.backend))

    def settled(self, mixture: Mixture) -> Problem:
        """The problem with points regrouped by the components of ``mixture``, if they were grouped by initial ones."""
        cloud = self.data.cloud if isinstance(self.data, Memory) else None
        return self if cloud is None or not cloud.cloud.labelled else self.truncated(cloud.epsilon, mixture, 1)

    def batches(self, size: int, memo: Callable[[], Any]) -> Iterator[list[Piece]]:
        """Iterate over all points once, in random order, in batches of about ``size`` points of all ranks together.

        Every rank makes the same number of steps; a rank without points left makes them with empty batches.

        Args:
            size: Number of points in a batch.
            memo: Returns the state from which the caller can resume after the current batch (:meth:`resumed`).
        """
        seed = int(torch.randint(1 << 62, (1,), generator=self.generator, device=self.generator.device))
        pieces = self.data.batches(-(-size // self.world.size), seed + self.world.rank)
        inside, self.journal.inside = self.journal.inside, None
        behind = 0 if inside is None else inside["batches"]
        for number in count(1):
            piece = next(pieces, None)
            more, due = self.world.any(piece is not None, self.world.rank == 0 and self.journal.due)
            if not more:
                return
            if number <= behind:
                if number == behind and inside is not None:
                    self.generator.set_state(inside["generator"].cpu())
                continue
            yield [] if piece is None else [piece]
            if due:
                self.journal.write({"batches": number, "memo": memo(), "generator": self.generator.get_state()})

    def resumed(self, beginning: Any) -> Any:
        """State of the caller at the batch from which the pass resumes, or ``beginning`` for a new pass."""
        return beginning if self.journal.inside is None else self.journal.inside["memo"]

    def moments(
        self,
        offsets: Tensor,
        means: Tensor,
        factor: Factor,
        batch: Iterable[Piece] | None = None,
        *,
        assignment: str = "soft",
    ) -> Moments:
        """Moments of all points, or of the batch, summed over all ranks; standardized coordinates, float64."""
        seed = 0
        if assignment == "stochastic":
            seed = int(torch.randint(1 << 62, (1,), generator=self.generator, device=self.generator.device))
        if batch is None and self.journal.replay:
            return self.journal.replay.pop(0)
        sums, ledger, behind = self.journal.resumed() if batch is None else (None, Ledger(), 0)
        pieces = self.data.pieces(behind) if batch is None else batch
        for number, piece in enumerate(pieces, behind + 1):
            if not len(piece.x):
                continue
            self.world.look()
            accurate = piece.accurate(factor)
            ledger.wide = max(ledger.wide, float(accurate is not piece))
            piece, x = accurate, accurate.x
            if isinstance(x, Tensor) and piece.truncate != 0:
                x = reductions.arrange(x, len(means), piece.truncate)
            part = reductions.moments(
                x,
                offsets,
                means,
                factor,
                weights=piece.weights,
                assignment=assignment,
                seed=seed + piece.first,
                backend=self.backend,
                truncate=0,
            )
            sums = part if sums is None else sums + part
            ledger.add(x, len(means))
            if batch is None and isinstance(self.data, Stream):
                self.journal.tick(sums, ledger, number)
                if self.show is not None:
                    self.show(piece.first + len(piece.x))
        sums = self.world.added(Moments.nothing(means, type(factor)) if sums is None else sums)
        if batch is None:
            vars(self.ledger).update(vars(ledger))
            self.journal.swept(sums)
        return sums

    def negative_log_likelihood(self, mixture: Mixture, batch: Iterable[Piece] | None = None) -> Tensor:
        """Mean negative log-likelihood of all points or of the batch, nats per point in data units; float64, differentiable."""
        sums = self.moments(mixture.offsets, mixture.means, mixture.factor, batch)
        total = reductions.attached(sums, mixture.offsets, mixture.means, mixture.factor)
        return self.frame.log_volume - total / max(float(sums.mass), 1e-300)

    def penalised(self, mixture: Mixture) -> Tensor:
        """Penalty of a mixture in standardized coordinates, nats per point."""
        if self.penalty is None:
            return mixture.means.new_zeros(())
        return self.penalty(self.frame.leave(mixture), self.mass * self.unit)

    def surrogate(self, mixture: Mixture) -> Surrogate:
        """Terms that the penalty adds to an M-step at a mixture; both in standardized coordinates."""
        if self.penalty is None:
            return Surrogate.none(mixture)
        added = self.penalty.m_step(self.frame.leave(mixture), self.mass * self.unit)
        return self.frame.surrogate(added if self.unit == 1 else added.counted_in(self.unit))

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        """Project a mixture (standardized) onto the bounds of covariances; return it and a mask (K,) of changed components."""
        factor, low = mixture.factor.floored(FLOOR)
        hit = low.expand(mixture.components)
        if bool(low.any()):
            mixture = Mixture(mixture.logits, mixture.means, factor, validate_args=False)
        if self.penalty is None or not self.penalty.bounds:
            return mixture, hit
        bounded, moved = self.penalty.project(self.frame.leave(mixture))
        return (self.frame.enter(bounded), hit | moved) if bool(moved.any()) else (mixture, hit)


@known("Population")
@dataclass(frozen=True)
class Population:
    """All K components of a fit and the indices of the active ones.

    Args:
        parked: All K components in standardized coordinates; active ones as they were when one was last pruned.
        live: Indices of the active components.
    """

    parked: Mixture
    live: Tensor

    @classmethod
    def of(cls, mixture: Mixture) -> Population:
        """A population in which all components are active."""
        return cls(mixture, torch.arange(mixture.components, device=mixture.means.device))

    def whole(self, live: Mixture) -> Mixture:
        """The mixture of all K components, with the active ones from ``live`` and the pruned ones from ``parked``."""
        if len(self.live) == self.parked.components:
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


@known("Evaluation")
@dataclass(frozen=True)
class Evaluation:
    """Objective of a mixture during a fit; a step evaluates the mixture that it starts from.

    Args:
        mixture: All K components in standardized coordinates, detached.
        objective: Mean negative log-likelihood plus penalty, nats per point.
        log_likelihood: Mean log-likelihood in data units, nats per point.
        live: Indices of the active components.
        floored: Mask (K,) of components whose covariance has been regularized so far.
        exact: Whether the objective is that of this mixture over all points, rather than a running mean over minibatches.
        answer: The full result of methods that fit more than a mixture (a posterior, a network), in a form that checkpoints
            can store and :meth:`Method.answer` converts; None for other methods.
    """

    mixture: Mixture
    objective: float
    log_likelihood: float
    live: Tensor
    floored: Tensor
    exact: bool
    answer: Any = None


class Method(ABC, Generic[S]):
    """An algorithm that improves a mixture step by step, as an immutable value; the loop is :func:`gmmkeops.fit`.

    Attributes:
        max_iter: Default for the largest number of iterations.
        tol: Default tolerance, nats per point; with zero, all iterations are performed.
        relative_tol: Tolerance as a fraction of the objective.
        patience: The objective is compared with that of at least this many iterations before.
        returns_last: Whether the result is the last mixture, because each step decreases the objective, rather than the best
            one.
    """

    returns_last: ClassVar[bool] = False

    max_iter: int
    tol: float
    relative_tol: float
    patience: int

    @abstractmethod
    def init(self, problem: Problem, mixture: Mixture) -> S:
        """State before the first step, from a float64 mixture in standardized coordinates."""

    @abstractmethod
    def step(self, problem: Problem, state: S) -> tuple[S, Evaluation]:
        """Perform one pass over the data; return the next state and the evaluation of the mixture of ``state``."""

    @abstractmethod
    def pack(self, state: S) -> Any:
        """The state as a value that a checkpoint can store and that later steps do not modify."""

    @abstractmethod
    def unpack(self, problem: Problem, packed: Any) -> S:
        """The state from the result of :meth:`pack`."""

    @abstractmethod
    def current(self, problem: Problem, state: S) -> tuple[Population, Mixture, Tensor]:
        """The population, the current mixture of its active components, and a mask (K,) of regularized components."""

    def answer(self, found: Any, frame: Frame) -> Any:
        """Convert the ``answer`` of an :class:`Evaluation` to data units."""
        return found

    def evaluate(self, problem: Problem, state: S) -> Evaluation:
        """Evaluate the exact objective of the current mixture, by another pass over the data."""
        population, live, floored = self.current(problem, state)
        with torch.no_grad():
            whole = population.whole(live).detach()
            negative = float(problem.negative_log_likelihood(live))
            objective = negative + float(problem.penalised(whole))
        return Evaluation(whole, objective, -negative, population.live, floored, exact=True)

    def finished(self, objectives: list[float], tol: float, problem: Problem) -> bool:
        """Return whether the objective has changed by less than a quarter of a tolerance over the last half of the iterations.

        A single small step does not show convergence: on plateaus, EM gains less than any tolerance in a step, and much more
        later. The window is therefore at least ``patience`` iterations long and grows with their number.
        With a penalty that prunes components the limit is a tenth of the tolerance: before a component is pruned, the objective
        hardly changes. Changes below 1e-5 nats per point over half of the iterations are accepted; smaller tolerances
        bound the change over the last ten iterations.

        Args:
            objectives: One for each iteration, nats per point.
            tol: Tolerance, nats per point.
            problem: The data and the penalty.
        """
        prunes = problem.penalty is not None and problem.penalty.prunes
        tol = self._tolerance(objectives, tol)
        half = len(objectives) // 2
        return self._still(
            objectives, half, max((_PRUNING if prunes else _PLATEAU) * tol, _NEGLIGIBLE)
        ) and self._still(objectives, min(half, _RECENT), tol)

    def _tolerance(self, objectives: list[float], tol: float) -> float:
        """The larger one of the absolute and the relative tolerance, nats per point."""
        return max(tol, self.relative_tol * abs(objectives[-1])) if objectives else tol

    def _still(self, objectives: list[float], window: int, tol: float) -> bool:
        """Return whether the objective has changed by less than ``tol`` over a window of at least ``patience`` iterations."""
        window = max(self.patience, window)
        return len(objectives) > window and abs(objectives[-1 - window] - objectives[-1]) < tol
