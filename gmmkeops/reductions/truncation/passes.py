"""Evaluation of a request by an engine over candidate lists, with repetition of row ranges whose lists were too short."""

from __future__ import annotations

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Engine, Request, Result
from gmmkeops.reductions.truncation.truncation import Truncation

__all__ = ["evaluate"]


def evaluate(engine: Engine, problem: Exponents, request: Request, blocks: Truncation | None = None) -> Result:
    """Compute a request by an engine.

    With truncation, the engine evaluates the candidate lists of a schedule. Its results are lower bounds, and row ranges whose
    minimum shows that their list was too short are evaluated again with a longer list.

    Args:
        engine: An engine that supports the request.
        problem: The exponents, with points in kd-tree order if there is a truncation.
        request: The request, with weights in the order of the points.
        blocks: The truncation, whose minima and certificate are updated; None to evaluate all pairs.
    """
    evaluation, single = engine.begin(problem, request), request.rank > 0
    problem = evaluation.problem
    schedule = None if blocks is None else blocks.begin(problem, single)
    if blocks is None or schedule is None:
        evaluation.add(None)
        return evaluation.result()
    while schedule is not None:
        evaluated = evaluation.add(schedule)
        assert evaluated is not None, "an engine returns the minima of a schedule"
        schedule = blocks.again(problem, *evaluated, single)
    return evaluation.result()
