"""Interface of the fitting algorithms (methods), and the evaluations of the objective that their steps return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from gmmkeops._checks import as_integer, as_number
from gmmkeops.components import Factor
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.state_file import known
from gmmkeops.models import Mixture

if TYPE_CHECKING:
    from gmmkeops.fitting.result import StartReport

__all__ = ["Evaluation", "Method", "check_settings"]

S = TypeVar("S")

# Fractions of the tolerance by which the objective may change over the last half of the iterations. With these values a
# thousand further iterations improve the objective by at most three tolerances on most data sets (measured).
_PLATEAU, _PRUNING = 0.25, 0.1
# Change over half of the iterations that is always accepted, nats per point; and number of iterations over which the change must
# also be below the tolerance.
_NEGLIGIBLE, _RECENT = 1e-5, 10

# Entries of the covariances from which operations of torch on the parameters are performed on the device of the points. On one
# core of a CPU, an iteration of Adam for 5e4 entries takes 1 ms around its pass, and one for 256 000 takes 4 ms.
_FEW = 50_000


@known("Evaluation")
@dataclass(frozen=True)
class Evaluation:
    """Objective of a mixture during a fit; a step evaluates the mixture that it starts from.

    Args:
        mixture: All K components in standardized coordinates, detached.
        objective: Mean negative log-likelihood plus penalty, nats per point.
        log_likelihood: Mean log-likelihood in data units, nats per point.
        live: Indices of the active components; None if all are active.
        floored: Mask (K,) of components whose covariance has been regularized so far; None if there are none.
        exact: Whether the objective is that of this mixture over all points, rather than a running mean over minibatches.
        answer: The full result of methods that fit more than a mixture (a posterior, a network), in a form that checkpoints
            can store and :meth:`Method.answer` converts; None for other methods.
    """

    mixture: Mixture
    objective: float
    log_likelihood: float
    live: Tensor | None = None
    floored: Tensor | None = None
    exact: bool = True
    answer: Any = None

    @property
    def active(self) -> Tensor:
        """Indices of the active components."""
        if self.live is not None:
            return self.live
        return torch.arange(self.mixture.n_components, device=self.mixture.means.device)


class Method(ABC, Generic[S]):
    """Base class of fitting algorithms: immutable objects with the settings of the algorithm.

    A method implements :meth:`init`, :meth:`step` and :meth:`current`, and may override :meth:`finished`; :func:`gmmkeops.fit`
    calls them. Its state must consist of values that checkpoints can store: tensors, mixtures, numbers and strings, dicts and
    tuples of them, and dataclasses that are registered by :func:`known`. Methods access the data only through an
    :class:`Objective` and its batches.

    Attributes:
        max_iter: Default of the maximum number of iterations.
        tol: Default tolerance, nats per point; with zero, all iterations are performed.
        relative_tol: Tolerance as a fraction of the objective.
        patience: Minimum number of iterations over which the change of the objective is measured.
        returns_last: Whether the result is the last mixture, because each step decreases the objective, rather than the best
            one.
    """

    returns_last: ClassVar[bool] = False

    max_iter: int
    tol: float
    relative_tol: float
    patience: int

    @property
    def portable(self) -> bool:
        """Whether the parameters may be on the CPU if the points are on another device; by default they are on that device.

        A method then uses the devices of the mixture and of the moments, and draws random numbers on that of the generator.
        """
        return False

    def few_parameters(self, factor: Factor) -> float:
        """Return the number of entries of the covariances below which the parameters are on the CPU, for a portable method.

        Args:
            factor: Factors of the components.
        """
        return _FEW

    def __repr__(self) -> str:
        """Show the settings that differ from their defaults."""
        return f"{type(self).__name__}({', '.join(_changes(self))})"

    def start(
        self, x: Any, n_components: int, *, covariance_type: str = "full", **options: Any
    ) -> tuple[Mixture, StartReport] | None:
        """Find an initial mixture in a way of its own; None for :func:`gmmkeops.initialize`.

        Args:
            x, n_components, covariance_type: As for :func:`gmmkeops.initialize`.
            **options: The arguments ``sample_weight``, ``generator``, ``backend``, ``truncate``, ``dtype`` and ``max_memory``.
        """
        return None

    @abstractmethod
    def init(self, objective: Objective, mixture: Mixture) -> S:
        """Return the state before the first step.

        Args:
            objective: The objective.
            mixture: Initial mixture, float64, standardized coordinates.
        """

    @abstractmethod
    def step(self, objective: Objective, state: S) -> tuple[S, Evaluation]:
        """Perform one pass over the data; return the next state, and the evaluation of the mixture of ``state``."""

    def steps(self, objective: Objective, state: S, most: int) -> Iterator[tuple[S, Evaluation]]:
        """Iterate :meth:`step`. A method may compute several steps at a time, with results that do not depend on their number.

        Args:
            objective, state: As for :meth:`step`, before the first step.
            most: Largest number of steps that will be asked for.
        """
        while True:
            state, now = self.step(objective, state)
            yield state, now

    @abstractmethod
    def current(self, objective: Objective, state: S) -> Mixture:
        """Return the mixture of a state, with all K components, in standardized coordinates."""

    def evaluate(self, objective: Objective, state: S) -> Evaluation:
        """Evaluate the exact objective of the current mixture, by another pass over the data."""
        mixture = self.current(objective, state).detach()
        with torch.no_grad():
            negative = float(objective.negative_log_likelihood(mixture))
            value = negative + float(objective.penalized(mixture))
        return Evaluation(mixture, value, -negative)

    def last(self, objective: Objective, state: S, steps: Iterator[tuple[S, Evaluation]]) -> Evaluation:
        """Evaluate the state after the last step; ``steps`` is the iterator that performed it, and may know the evaluation."""
        return self.evaluate(objective, state)

    def pack(self, state: S) -> Any:
        """Convert the state to a value that a checkpoint can store and that later steps do not modify."""
        return state

    def unpack(self, objective: Objective, packed: Any) -> S:
        """Restore a state from the result of :meth:`pack`."""
        found: S = packed
        return found

    def answer(self, objective: Objective, found: Any) -> Any:
        """Convert the ``answer`` of an :class:`Evaluation` to data units."""
        return found

    def finished(self, objectives: list[float], tol: float, objective: Objective) -> bool:
        """Return whether the objective has changed by less than a quarter of a tolerance over the last half of the iterations.

        A single small step does not imply convergence: EM may improve the objective very slowly for many iterations, and faster
        afterwards. The window is therefore at least ``patience`` iterations long and grows with the number of iterations.
        With a penalty that prunes components the limit is a tenth of the tolerance, since the objective hardly changes before a
        component is pruned. Changes below 1e-5 nats per point over half of the iterations are always accepted; for smaller
        tolerances, the change over the last ten iterations is compared with the tolerance.

        Args:
            objectives: Objective of each iteration, nats per point.
            tol: Tolerance, nats per point.
            objective: The data and the penalty.
        """
        prunes = objective.penalty is not None and objective.penalty.prunes
        tol = self._tolerance(objectives, tol)
        half = len(objectives) // 2
        return self._still(
            objectives, half, max((_PRUNING if prunes else _PLATEAU) * tol, _NEGLIGIBLE)
        ) and self._still(objectives, min(half, _RECENT), tol)

    def _tolerance(self, objectives: list[float], tol: float) -> float:
        """Return the larger one of the absolute and the relative tolerance, nats per point."""
        return max(tol, self.relative_tol * abs(objectives[-1])) if objectives else tol

    def _still(self, objectives: list[float], window: int, tol: float) -> bool:
        """Return whether the objective has changed by less than ``tol`` over a window of at least ``patience`` iterations."""
        window = max(self.patience, window)
        return len(objectives) > window and abs(objectives[-1 - window] - objectives[-1]) < tol


def _changes(value: Any) -> list[str]:
    """List the fields of a dataclass that differ from their defaults, as ``name=value``."""
    shown = []
    for part in fields(value) if is_dataclass(value) else ():
        now = getattr(value, part.name)
        if part.default is MISSING or (
            now is not part.default and not (type(now) is type(part.default) and now == part.default)
        ):
            shown.append(f"{part.name}={getattr(now, '__qualname__', None) or repr(now)}")
    return shown


def check_settings(method: Any) -> None:
    """Check the settings that all methods have, and those of methods with an M-step.

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
    if hasattr(method, "step_exponent"):
        if not 0.5 < as_number(method.step_exponent, "step_exponent") <= 1:
            raise ValueError(f"step_exponent must be above 0.5 and at most 1, got {method.step_exponent}.")
        as_number(method.step_offset, "step_offset", 0, above=True)
        as_number(method.reg_covar, "reg_covar", 0)
