"""The interface of the engines: requests, and the evaluation of one request over one or more schedules.

An engine computes requests. For each request it begins an :class:`Evaluation`, which is given every pair of point and component,
or one schedule of candidate lists after another until all lists have been long enough
(:func:`gmmkeops.reductions.truncation.passes.evaluate`). A new engine is a folder with an object that satisfies
:class:`Engine`, and a line in :mod:`gmmkeops.reductions.choice`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = [
    "Argmax",
    "Broken",
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
    r"""The log-sum-exps :math:`\ell_n`: one tensor (N,), nats, in the dtype of the points."""

    rank = 0


@dataclass(frozen=True)
class Argmax:
    """The components of the largest exponents, the first ones where exponents are equal: one tensor (N,), int64."""

    rank = 1


@dataclass(frozen=True)
class TopK:
    """The k largest exponents of each point (N, k), nats, in descending order, and their components (N, k), int64."""

    k: int

    @property
    def rank(self) -> int:
        """As for :data:`Request`."""
        return self.k


@dataclass(frozen=True)
class Statistics:
    r"""The moments of weighted responsibilities and the total, as for :func:`gmmkeops.reductions.moments`.

    The result is S0 (K,), S1 (K, D), S2 (K, D, D), (K, D) or (K,) about the means of the components, and the scalar
    :math:`\sum_n g_n \ell_n`, all float64.

    Args:
        weights: g (N,), float64, may be negative; None for ones.
        assignment: ``"soft"``, ``"hard"`` or ``"stochastic"``.
        seed: Seed of the stochastic assignment.
    """

    weights: Tensor | None = None
    assignment: str = "soft"
    seed: int = 0

    @property
    def rank(self) -> int:
        """As for :data:`Request`."""
        return 1 if self.assignment == "hard" else 0


@dataclass(frozen=True)
class PointGradient:
    r"""The gradient of :math:`\sum_n g_n \ell_n` in the points: one tensor (N, D), in their dtype.

    Args:
        weights: g (N,), float64, may be negative.
    """

    weights: Tensor

    rank = 0


# ``rank`` is the rank of the exponent for which candidate lists must be complete (1 for the largest), and 0 where the log-sum-exp
# must be complete up to the tolerance of the truncation.
Request = LogSumExp | Argmax | TopK | Statistics | PointGradient

# The tensors that the docstring of the request lists, in that order.
Result = tuple[Tensor, ...]


class Broken(RuntimeError):
    """An engine has failed for a reason that :meth:`Engine.unavailable` returns from then on; another engine is used."""


class Evaluation(Protocol):
    """The evaluation of one request by one engine."""

    @property
    def problem(self) -> Exponents:
        """The exponents as the engine evaluates them; points may have a wider dtype than those of the request."""

    def add(self, schedule: Schedule | None) -> tuple[Schedule, Tensor] | None:
        """Evaluate every pair, or the row ranges of a schedule.

        The results of a row range count only if its candidate list was long enough (:meth:`Schedule.good`); the other row ranges
        are part of the next schedule. An engine may split the row ranges of a schedule.

        Args:
            schedule: Row ranges, their candidate lists and the smallest values for which these are long enough; None for every
                pair of point and component.

        Returns:
            For a schedule, the row ranges as they were evaluated, and the minimum over each of them (S,), float64, nats: of the
            log-sum-exps, or of the exponents of the request's rank. The minimum is -inf where a list has fewer components than
            this rank.

        Raises:
            Broken: The engine cannot compute this and other requests.
        """

    def result(self) -> Result:
        """Return the result of the request, once all points have been evaluated.

        Raises:
            Broken: As for :meth:`add`.
        """


class Engine(Protocol):
    """An implementation of the reductions."""

    @property
    def name(self) -> str:
        """The value of ``backend`` that chooses this engine."""

    @property
    def title(self) -> str:
        """The name of the engine at the beginning of a sentence."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return None, or one clause that says why the engine cannot run on a device; the user is warned of it."""

    def unsupported(self, problem: Exponents, request: Request) -> str | None:
        """Return None, or one clause that says why the engine does not compute a request; the dense engine then does."""

    def begin(self, problem: Exponents, request: Request) -> Evaluation:
        """Begin the evaluation of a request that is supported."""
