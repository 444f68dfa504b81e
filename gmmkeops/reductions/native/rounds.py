"""EM steps from several mixtures, and rounds of splitting and merging, without the interpreter between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmmkeops.components import Factor
from gmmkeops.data import Batch
from gmmkeops.reductions.library import OUT_OF_MEMORY, ClimbCall, RoundCall, StepCall, run
from gmmkeops.reductions.native.engine import LONG
from gmmkeops.reductions.native.pairs import table_of
from gmmkeops.reductions.native.steps import StepSettings, described

__all__ = ["Climbed", "Parameters", "RoundSettings", "Rounds", "em_climb", "em_rounds"]

# Logits (K,), means (K, D) and factor of a mixture.
Parameters = tuple[Tensor, Tensor, Factor]


class Climbed(NamedTuple):
    """The result of EM steps from a mixture.

    Args:
        reached: The last mixture whose objective is known, or the one after it if that was asked for.
        total, cost, prior: As in :class:`~gmmkeops.reductions.Steps`, for the last mixture whose objective is known.
        steps: Number of E-steps.
    """

    reached: Parameters
    total: float
    cost: float
    prior: float
    steps: int


class RoundSettings(NamedTuple):
    """Constants of rounds of splitting and merging.

    Args:
        split, merged: Largest number of steps, and tolerance (nats per point), after the split and after the merge.
        half: Distance of the halves of a component from its mean, in standard deviations along its longest axis.
        points: Points of the standard normal distribution for the costs of merges, as for
            :func:`~gmmkeops.reductions.pair_costs`.
        gain: Improvement of the objective below which no further round is performed, nats per point.
        tie: Relative difference of objectives that are equal up to rounding.
        size: Effective number of points.
        early: Number of steps after the split after which a round ends if the halves of each component have kept its points, and
            pairs of halves are the cheapest to merge; and the largest change of weights (relative) and means (standard
            deviations) in that case. No steps: a round does not end early.
    """

    split: tuple[int, float]
    merged: tuple[int, float]
    half: float
    points: Tensor
    gain: float
    tie: float
    size: float
    early: tuple[int, float] = (0, 0.0)


class Rounds(NamedTuple):
    """The result of rounds.

    Args:
        merged: The mixture before the last steps of the last accepted round; None if no round was accepted.
        reached: The mixture after them, or None.
        value: Objective of the mixture that was reached, or of the given one.
        rounds: Number of rounds.
        ended: Whether no further round is to be performed. Otherwise the next one is not an ordinary one.
        work: Number of E-steps times the number of components in them.
        unchanged: Whether the last round ended early, as ``RoundSettings.early`` describes it.
    """

    merged: Parameters | None
    reached: Parameters | None
    value: float
    rounds: int
    ended: bool
    work: int
    unchanged: bool


def em_climb(
    batch: Batch,
    starts: Sequence[Parameters],
    settings: StepSettings,
    *,
    steps: int,
    tolerance: float,
    after: bool = False,
    backend: str = "auto",
) -> list[Climbed | None] | None:
    """Perform EM steps from several mixtures, until a step decreases the objective by less than a tolerance.

    Args:
        batch: All points (N, D) and their weights.
        starts: Mixtures of the same shape.
        settings: Constants of the M-step.
        steps: Largest number of E-steps for each mixture.
        tolerance: Tolerance, nats per point.
        after: Whether the result is the mixture after the last step, whose objective is not known.
        backend: Name of the engine.

    Returns:
        A result for each mixture, or None if one of its steps is not an ordinary one; None if the native engine does not compute
        the steps.
    """
    _, means, factor = starts[0]
    own = described(batch, means, factor, settings, backend)
    if own is None:
        return None
    inner, _kept = own
    tables, numbers = _rows(starts), torch.empty(3, len(starts), dtype=torch.float64)
    done = torch.zeros(len(starts), dtype=torch.int64)
    inner.steps, inner.tolerance = steps, tolerance
    _point(inner, tables, numbers)
    call, (K, D) = ClimbCall(inner, len(starts), done.data_ptr(), after), means.shape
    _perform("gmmkeops_climb", call, steps * len(starts) * len(batch) * K * D, K, D)
    found: list[Climbed | None] = []
    for s, (count, (total, cost, prior)) in enumerate(zip(done.tolist(), numbers.T.tolist(), strict=True)):
        found.append(Climbed(_parameters(tables, factor, s), total, cost, prior, count) if count else None)
    return found


def em_rounds(
    batch: Batch,
    start: Parameters,
    settings: StepSettings,
    rounds: RoundSettings,
    *,
    value: float,
    constant: float,
    most: int,
    backend: str = "auto",
) -> Rounds | None:
    """Perform rounds as long as they improve the objective.

    A round splits every component, performs EM steps, merges pairs until K components are left, and performs EM steps again. It
    is accepted if the objective is better, unless a component has fewer than D + 1 points.

    Args:
        batch: All points (N, D) and their weights.
        start: A mixture whose covariances are not common.
        settings: Constants of the M-step.
        rounds: Constants of the rounds.
        value: Objective of the mixture, nats per point.
        constant: Part of the objective that is the same for all mixtures, nats per point.
        most: Largest number of rounds.
        backend: Name of the engine.

    Returns:
        The result; None if the native engine does not compute the rounds.
    """
    _, means, factor = start
    own = described(batch, means, factor, settings, backend)
    if own is None:
        return None
    inner, _kept = own
    (K, D), tables, numbers = means.shape, _rows([start, start]), torch.empty(3, 1, dtype=torch.float64)
    table = table_of(rounds.points, D)
    _point(inner, tables, numbers)
    call = RoundCall(
        inner,
        split_steps=rounds.split[0],
        merged_steps=rounds.merged[0],
        split_tolerance=rounds.split[1],
        merged_tolerance=rounds.merged[1],
        half=rounds.half,
        points=table.data_ptr(),
        blocks=len(table),
        most=most,
        value=value,
        constant=constant,
        gain=rounds.gain,
        tie=rounds.tie,
        count=rounds.size,
        early=rounds.early[0],
        change=rounds.early[1],
    )
    _perform("gmmkeops_rounds", call, most * (2 * rounds.split[0] + rounds.merged[0]) * len(batch) * K * D, 2 * K, D)
    merged, reached = (_parameters(tables, factor, row) if call.accepted else None for row in (0, 1))
    return Rounds(merged, reached, call.value, call.done, bool(call.ended), call.work, bool(call.unchanged))


def _rows(mixtures: Sequence[Parameters]) -> dict[str, Tensor]:
    """Return the parameters of mixtures as tables with one row for each."""
    parts = [{"logits": logits, "means": means, **factor.tensors} for logits, means, factor in mixtures]
    tables = {name: torch.stack([tensors[name] for tensors in parts]) for name in parts[0]}
    return {name: table if table.dtype == torch.float64 else table.double() for name, table in tables.items()}


def _parameters(tables: dict[str, Tensor], factor: Factor, row: int) -> Parameters:
    """Return the parameters in a row of the tables."""
    tensors = {name: tables[name][row] for name in factor.tensors}
    return tables["logits"][row], tables["means"][row], factor.replace(**tensors)


def _point(call: StepCall, tables: dict[str, Tensor], numbers: Tensor) -> None:
    """Set the addresses of tables, and of totals, costs and priors, which are the rows of ``numbers``."""
    for name, table in tables.items():
        setattr(call, name, table.data_ptr())
    first, width = numbers.data_ptr(), numbers.shape[1] * numbers.element_size()
    call.total, call.cost, call.prior = first, first + width, first + 2 * width


def _perform(function: str, call: ClimbCall | RoundCall, work: int, K: int, D: int) -> None:
    """Call a function of the library.

    Raises:
        MemoryError: There is not enough memory.
    """
    if run(function, call, is_long=work >= LONG) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory for EM steps of {K} components in {D} dimensions.")
