"""Evaluation of a request by an engine over candidate lists, with repetition of row ranges whose lists were too short."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Engine, Evaluation, Request, Result
from gmmkeops.reductions.truncation.bounds import Schedule
from gmmkeops.reductions.truncation.tolerance import Tolerance
from gmmkeops.reductions.truncation.tree import Cloud
from gmmkeops.reductions.truncation.truncation import Check, Truncation, lists_of

__all__ = ["OwnLists", "evaluate"]


@runtime_checkable
class OwnLists(Protocol):
    """An evaluation that computes and checks candidate lists by kernels of its engine."""

    def lists(self, cloud: Cloud, problem: Exponents, minima: Tensor, tolerance: Tolerance) -> Schedule:
        """Compute candidate lists, as :func:`~gmmkeops.reductions.truncation.truncation.lists_of` does."""

    @property
    def check(self) -> Check | None:
        """Numbers by which the schedule that was added last is accepted; None if they have not been computed."""


def evaluate(
    engine: Engine,
    problem: Exponents,
    request: Request,
    blocks: Truncation | None = None,
    evaluations: list[Evaluation] | None = None,
) -> Result:
    """Compute a request by an engine.

    With truncation, the engine evaluates the candidate lists of a schedule. Its results are lower bounds, and row ranges whose
    minimum shows that their list was too short are evaluated again with a longer list.

    Args:
        engine: An engine that supports the request.
        problem: The exponents, with points in kd-tree order if there is a truncation.
        request: The request, with weights in the order of the points.
        blocks: The truncation, whose minima and certificate are updated; None to evaluate all pairs.
        evaluations: List to which the evaluation is appended when it has been completed, or None.
    """
    evaluation = engine.begin(problem, request)
    if blocks is None or not _by_lists(evaluation, blocks, request.rank > 0):
        evaluation.add(None)
    found = evaluation.result()
    if evaluations is not None:
        evaluations.append(evaluation)
    return found


def _by_lists(evaluation: Evaluation, blocks: Truncation, single: bool) -> bool:
    """Evaluate candidate lists until all were long enough; False if all pairs must be evaluated."""
    problem, own = evaluation.problem, evaluation if isinstance(evaluation, OwnLists) else None
    make = lists_of if own is None else own.lists
    schedule = blocks.begin(problem, single, make)
    if schedule is None:
        return False
    while schedule is not None:
        evaluated = evaluation.add(schedule)
        assert evaluated is not None, "an engine returns the minima of a schedule"
        schedule = blocks.again(problem, *evaluated, single, make, None if own is None else own.check)
    return True
