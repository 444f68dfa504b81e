"""Interface of the engines: requests, and the evaluation of a request over all pairs or over schedules.

An engine creates an :class:`Evaluation` for each request. The function
:func:`gmmkeops.reductions.truncation.passes.evaluate` passes it either all pairs of point and component, or schedules of
candidate lists until all lists were long enough. A new engine is an object that implements :class:`Engine`, and an entry in
:mod:`gmmkeops.reductions.choice`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents, Form
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = [
    "Argmax",
    "Broken",
    "Continued",
    "Engine",
    "Evaluation",
    "LogSumExp",
    "PointGradient",
    "Request",
    "Result",
    "Statistics",
    "TopK",
]


@dataclass(frozen=True)
class LogSumExp:
    r"""Request of the log-sum-exps :math:`\ell_n`: one tensor (N,), nats, in the dtype of the points."""

    rank = 0


@dataclass(frozen=True)
class Argmax:
    """Request of the components of the largest exponents, with the lowest index if equal: one tensor (N,), int64."""

    rank = 1


@dataclass(frozen=True)
class TopK:
    """Request of the k largest exponents (N, k), nats, in descending order, and of their components (N, k), int64."""

    k: int

    @property
    def rank(self) -> int:
        """As for :data:`Request`."""
        return self.k


@dataclass(frozen=True)
class Statistics:
    r"""Request of the moments of weighted responsibilities and the total, as for :func:`gmmkeops.reductions.moments`.

    The result is S0 (K,), S1 (K, D), S2 (K, D, D), (K, D) or (K,) about the means of the components, and the scalar
    :math:`\sum_n g_n \ell_n`, all float64.

    Args:
        weights: Weights g (N,), float64, possibly negative; None for ones.
        assignment: ``"soft"``, ``"hard"`` or ``"stochastic"``.
        seed: Seed of the stochastic assignment.
        values: Whether to return the log-sum-exps (N,), nats, in the dtype of the points too, for soft assignments.
        on_cpu: Whether an engine may return the moments on the CPU if the parameters are there, after one transfer.
    """

    weights: Tensor | None = None
    assignment: str = "soft"
    seed: int = 0
    values: bool = False
    on_cpu: bool = False

    @property
    def rank(self) -> int:
        """As for :data:`Request`."""
        return 1 if self.assignment == "hard" else 0


@dataclass(frozen=True)
class PointGradient:
    r"""Request of the gradient of :math:`\sum_n g_n \ell_n` with respect to the points: one tensor (N, D), in their dtype.

    Args:
        weights: Weights g (N,), float64, possibly negative; None for ones.
        values: Whether to return the log-sum-exps (N,), nats, in the dtype of the points too.
    """

    weights: Tensor | None = None
    values: bool = False

    rank = 0


# ``rank`` is the rank of the exponents for which candidate lists must be complete (1 for the largest one), or 0 if the
# log-sum-exp must be complete up to the tolerance of the truncation.
Request = LogSumExp | Argmax | TopK | Statistics | PointGradient

# The tensors in the docstring of the request, in that order.
Result = tuple[Tensor, ...]


class Broken(RuntimeError):
    """Error of an engine that has become unavailable; :meth:`Engine.unavailable` then returns the reason."""


class Evaluation(Protocol):
    """Evaluation of one request by one engine."""

    @property
    def problem(self) -> Exponents:
        """Exponents as the engine evaluates them; the dtype of the points may be wider than in the request."""

    def add(self, schedule: Schedule | None) -> tuple[Schedule, Tensor] | None:
        """Evaluate all pairs, or the row ranges of a schedule.

        The results of a row range are valid only if its candidate list was long enough (:meth:`Schedule.good`); other row ranges
        are evaluated again by the next schedule. An engine may split the row ranges of a schedule.

        Args:
            schedule: Row ranges and their candidate lists; None for all pairs of point and component.

        Returns:
            For a schedule, the schedule with the evaluated row ranges, and the minimum over each row range (S,), float64,
            nats, of the log-sum-exps (rank 0) or of the exponents of the request's rank. The minimum is -inf if a list has fewer
            components than the rank.

        Raises:
            Broken: The engine has become unavailable.
        """

    def result(self) -> Result:
        """Return the result of the request, after all points have been evaluated.

        Raises:
            Broken: As for :meth:`add`.
        """


@runtime_checkable
class Continued(Evaluation, Protocol):
    """An evaluation of log-sum-exps from which moments for the same points take less time than anew."""

    @property
    def is_small(self) -> bool:
        """Whether it holds little memory besides the points."""

    def moments(self, request: Statistics) -> Result | None:
        """Compute moments for soft assignments; None if they take less time anew.

        Raises:
            Broken: As for :meth:`Evaluation.add`.
        """


class Engine(Protocol):
    """An implementation of the reductions."""

    @property
    def name(self) -> str:
        """Value of ``backend`` that selects this engine."""

    @property
    def title(self) -> str:
        """Name of the engine at the beginning of a sentence."""

    @property
    def one_pass(self) -> bool:
        """Whether log-sum-exps that are computed with moments or point gradients take no other pass."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return None if the engine can run on a device, otherwise the reason, one clause for a warning."""

    def unsupported(self, form: Form, request: Request) -> str | None:
        """Return None if the engine supports a request, otherwise the reason, one clause for the log."""

    def begin(self, problem: Exponents, request: Request) -> Evaluation:
        """Begin the evaluation of a supported request."""
