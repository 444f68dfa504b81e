r"""What the loop and its methods say to each other: the problem, one evaluation, and the method's contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops._checks import weight_unit
from gmmkeops._floor import floor_eigenvalues
from gmmkeops._spread import check_range
from gmmkeops._survey import fingerprint, sample
from gmmkeops.distributed import World
from gmmkeops.factors import Factor
from gmmkeops.fitting._checkpoint import Journal, known
from gmmkeops.fitting._data import Data, Ledger, Memory, Piece, Stream
from gmmkeops.fitting._frame import Frame
from gmmkeops.fitting._identity import describe
from gmmkeops.mixture import Mixture
from gmmkeops.moments import Moments
from gmmkeops.penalties import Penalty, Surrogate, as_penalty
from gmmkeops.sources import Source

__all__ = ["Evaluation", "Method", "Population", "Problem"]

S = TypeVar("S")

# Least eigenvalue of a covariance in standardized coordinates: about the square of what rounding hides there. A component that
# collapses to a single point keeps a finite density, and no covariance that the points determine is changed: two sites that are
# 1e8 deviations apart have variances of 1e-16.
FLOOR = 1e-28
# A component is dead when it would own fewer points than this; its weight is then brought to nothing.
DEAD_POINTS = 1e-3
DEAD_LOG_WEIGHT = -100.0
# Fractions of the tolerance that the objective may still change by over the last half of the iterations: measured, so that
# a thousand further iterations gain at most three tolerances on most data sets.
_PLATEAU, _PRUNING = 0.25, 0.1
# Changes over half of the iterations, nats per point, that never count; and iterations over which smaller tolerances do.
_NEGLIGIBLE, _RECENT = 1e-5, 10


@dataclass(frozen=True)
class Problem:
    """The data of a fit, in the frame, and what is asked of it.

    Args:
        data: The points in the frame, of this rank.
        rows: How many there are, of all ranks.
        mass: Σ g.
        count: Effective number of points, (Σ g)² / Σ g².
        frame: The way back to the user's units.
        penalty: In the user's units, nats per point; or None.
        backend: The engine to use.
        generator: Source of randomness, in step on all ranks.
        world: The ranks.
        ledger: What truncation has done.
        fingerprint: A number of the points and weights, where there is a checkpoint.
        journal: What is written down for one.
        show: Told how many rows of a source a sweep has read.
        unit: What weights and masses are counted in here; penalties and reports have the user's own.
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
        """The problem that checked points (N, D) of the user pose, with a frame of their own if none is given.

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
                # Squares of the weights themselves are out of range; those of the sample stand for them.
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
        """What an M-step needs to know of points whose moments others have found."""
        data = Memory(frame.shift.new_empty(0, len(frame.shift)), None)
        penalty = None if penalty is None else as_penalty(penalty)
        return cls(data, 0, mass, mass, frame, penalty, "dense", torch.Generator(frame.shift.device))

    def truncated(self, truncate: float | None, mixture: Mixture, sweeps: int) -> Problem:
        """The same, read with what truncation allows over so many sweeps of all points from a mixture of the frame on."""
        if not isinstance(self.data, Memory):
            return self
        return replace(self, data=self.data.arranged(truncate, mixture, sweeps, self.backend))

    def settled(self, mixture: Mixture) -> Problem:
        """The same, with points that were grouped by the components of the start grouped by those it has led to."""
        cloud = self.data.cloud if isinstance(self.data, Memory) else None
        return self if cloud is None or not cloud.cloud.labelled else self.truncated(cloud.epsilon, mixture, 1)

    def batches(self, size: int, memo: Callable[[], Any]) -> Iterator[list[Piece]]:
        """All points, once, in random order, about ``size`` of them at a time on all ranks together.

        Every rank takes the same number of steps; one that has run out of points takes them with none.

        Args:
            size: Points of a batch.
            memo: What the caller needs to go on after the batch that it has come to (:meth:`resumed`).
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
        """The memo of the batch that the pass goes on from; ``beginning`` where it begins."""
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
        """Moments of all points, or of some, on all ranks."""
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
        sums = self.world.added(Moments.nothing(means, factor.family) if sums is None else sums)
        if batch is None:
            vars(self.ledger).update(vars(ledger))
            self.journal.swept(sums)
        return sums

    def negative_log_likelihood(self, mixture: Mixture, batch: Iterable[Piece] | None = None) -> Tensor:
        """Mean over the points (or some of them), nats per point in the user's units; float64, differentiable."""
        sums = self.moments(mixture.offsets, mixture.means, mixture.factor, batch)
        total = reductions.attached(sums, mixture.offsets, mixture.means, mixture.factor)
        return self.frame.log_volume - total / max(float(sums.mass), 1e-300)

    def penalised(self, mixture: Mixture) -> Tensor:
        """The penalty of a mixture of the frame, nats per point."""
        if self.penalty is None:
            return mixture.means.new_zeros(())
        return self.penalty(self.frame.leave(mixture), self.mass * self.unit)

    def surrogate(self, mixture: Mixture) -> Surrogate:
        """What the penalty adds to an M-step at a mixture of the frame, in the frame."""
        if self.penalty is None:
            return Surrogate.none(mixture)
        added = self.penalty.m_step(self.frame.leave(mixture), self.mass * self.unit)
        return self.frame.surrogate(added if self.unit == 1 else added.counted_in(self.unit))

    def project(self, mixture: Mixture) -> tuple[Mixture, Tensor]:
        """The mixture (of the frame) within all bounds, and the components (K,) that hit one."""
        factor, low = floor_eigenvalues(mixture.factor, FLOOR)
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


@known("Evaluation")
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
        answer: What the mixture is a part of, for methods that find more (a posterior, a network), as a value that checkpoints
            hold and :meth:`Method.answer` understands.
    """

    mixture: Mixture
    objective: float
    log_likelihood: float
    live: Tensor
    floored: Tensor
    exact: bool
    answer: Any = None


class Method(ABC, Generic[S]):
    """How a mixture is improved: a small frozen value; the loop (:func:`gmmkeops.fit`) does everything else.

    Attributes:
        max_iter: Iterations unless the fit says otherwise.
        tol: Tolerance unless the fit says otherwise, nats per point; zero runs all iterations.
        relative_tol: Tolerance as a fraction of the objective.
        patience: The objective is compared with that of at least this many iterations before.
        returns_last: Whether the last mixture is the result, since each step lowers the objective in the history; otherwise
            the best one is.
    """

    returns_last: ClassVar[bool] = False

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
    def pack(self, state: S) -> Any:
        """The state as a value that a checkpoint can hold, and that the next step leaves alone."""

    @abstractmethod
    def unpack(self, problem: Problem, packed: Any) -> S:
        """The state from what :meth:`pack` made of it."""

    @abstractmethod
    def current(self, problem: Problem, state: S) -> tuple[Population, Mixture, Tensor]:
        """The population, its live mixture (what would be returned now), and the components (K,) that hit a bound."""

    def answer(self, found: Any, frame: Frame) -> Any:
        """In the user's units, what else than a mixture an evaluation has found."""
        return found

    def evaluate(self, problem: Problem, state: S) -> Evaluation:
        """The exact objective of the current mixture, by one more pass over the data."""
        population, live, floored = self.current(problem, state)
        with torch.no_grad():
            whole = population.whole(live).detach()
            negative = float(problem.negative_log_likelihood(live))
            objective = negative + float(problem.penalised(whole))
        return Evaluation(whole, objective, -negative, population.live, floored, exact=True)

    def finished(self, objectives: list[float], tol: float, problem: Problem) -> bool:
        """Return whether the objective has changed by less than a quarter of a tolerance over the last half of the iterations.

        A single small step is no sign of convergence: EM crosses plateaus on which a step gains less than any tolerance, and
        gains much more later. The window is therefore at least ``patience`` iterations long and grows with their number.
        With a penalty that prunes components the limit is a tenth of the tolerance: before a component is pruned, the objective
        stands almost still. Changes below 1e-5 nats per point over half of the iterations are accepted; smaller tolerances
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
