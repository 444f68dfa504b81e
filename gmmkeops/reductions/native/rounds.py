"""k-means, EM steps from several mixtures, and rounds of splitting and merging, without the interpreter between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmmkeops.components import Factor
from gmmkeops.data import Batch
from gmmkeops.reductions.library import OUT_OF_MEMORY, ClimbCall, StepCall, run
from gmmkeops.reductions.native.engine import LONG
from gmmkeops.reductions.native.kmeans import performs_kmeans
from gmmkeops.reductions.native.pairs import table_of
from gmmkeops.reductions.native.steps import Pool, StepSettings, described

__all__ = ["Climbed", "Climbing", "Clusters", "Parameters", "RoundSettings", "Rounds", "em_climb"]

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


class Clusters(NamedTuple):
    """Constants of mixtures of the clusters of k-means, from which EM steps begin: one run in each of several metrics.

    Args:
        roots: Upper triangular matrices (C, D, D), float64, by which the points are multiplied in each metric.
        candidates: As for :func:`~gmmkeops.reductions.chosen_seeds`.
        generator: Random number generator, which draws 1 + (K - 1) candidates numbers for each run.
        iterations: Largest number of Lloyd iterations.
        relative: Decrease of the inertia, as a fraction, below which they end.
        pool: How covariances of clusters of few points are averaged with a pooled one.
        copies: Largest difference of the means of mixtures that are copies, which are omitted but for the first one.
        climbs_one: Whether EM steps are performed if there is only one mixture.
    """

    roots: Tensor
    candidates: int
    generator: torch.Generator
    iterations: int
    relative: float
    pool: Pool
    copies: float
    climbs_one: bool


class RoundSettings(NamedTuple):
    """Constants of rounds of splitting and merging.

    A round splits every component, performs EM steps, merges pairs until K components are left, and performs EM steps again. It
    is accepted if the objective is better, unless a component has fewer than D + 1 points.

    Args:
        most: Largest number of rounds.
        split, merged: Largest number of steps, and tolerance (nats per point), after the split and after the merge.
        half: Distance of the halves of a component from its mean, in standard deviations along its longest axis.
        points: Points of the standard normal distribution for the costs of merges, as for
            :func:`~gmmkeops.reductions.pair_costs`.
        gain: Improvement of the objective below which no further round is performed, nats per point.
        tie: Relative difference of objectives that are equal up to rounding.
        size: Effective number of points.
        constant: Part of the objective that is the same for all mixtures, nats per point.
        early: Number of steps after the split after which a round ends if the halves of each component have kept its points, and
            pairs of halves are the cheapest to merge; and the largest change of weights (relative) and means (standard
            deviations) in that case. No steps: a round does not end early.
        known: Objective of the only mixture, from which the rounds begin without steps; NaN to perform steps.
    """

    most: int
    split: tuple[int, float]
    merged: tuple[int, float]
    half: float
    points: Tensor
    gain: float
    tie: float
    size: float
    constant: float
    early: tuple[int, float] = (0, 0.0)
    known: float = math.nan


class Rounds(NamedTuple):
    """The result of rounds.

    Args:
        best: Index of the mixture from which they began.
        merged: The mixture before the last steps of the last accepted round; None if no round was accepted.
        reached: The mixture after them, or None.
        value: Objective of the mixture that was reached, or of that from which the rounds began.
        rounds: Number of rounds, at least one.
        ended: Whether no further round is to be performed. Otherwise the next one is not an ordinary one.
        work: Number of E-steps times the number of components in them.
        unchanged: Whether the last round ended early, as ``RoundSettings.early`` describes it.
    """

    best: int
    merged: Parameters | None
    reached: Parameters | None
    value: float
    rounds: int
    ended: bool
    work: int
    unchanged: bool


class Climbing(NamedTuple):
    """The results of EM steps and of rounds.

    Args:
        reached: A result for each mixture, or None if one of its steps is not an ordinary one or none was performed.
        rounds: The result of the rounds; None if there are none, or the first one is not an ordinary one.
        origins: The mixtures from which the steps began.
    """

    reached: list[Climbed | None]
    rounds: Rounds | None
    origins: Sequence[Parameters]


def em_climb(
    batch: Batch,
    starts: Sequence[Parameters],
    settings: StepSettings,
    *,
    steps: int,
    tolerance: float,
    after: bool = False,
    rounds: RoundSettings | None = None,
    clusters: Clusters | None = None,
    backend: str = "auto",
) -> Climbing | None:
    """Perform EM steps from several mixtures, until a step decreases the objective by less than a tolerance; then rounds.

    Args:
        batch: All points (N, D) and their weights.
        starts: Mixtures of the same shape; with ``clusters``, one mixture of which only the shape is used.
        settings: Constants of the M-step.
        steps: Largest number of E-steps for each mixture.
        tolerance: Tolerance, nats per point.
        after: Whether the result is the mixture after the last step, whose objective is not known. Not for rounds.
        rounds: Constants of rounds from the best one of the mixtures that were reached, as long as they improve the objective;
            covariances must not be common. None for no rounds.
        clusters: How the mixtures are found, of full covariances or in the metric of the points, none of them common; None if
            they are given.
        backend: Name of the engine.

    Returns:
        The results, or None if the native engine does not compute them. The generator of ``clusters`` is then unchanged.
    """
    assert rounds is None or not after, "rounds begin with a mixture whose objective is known"
    _, means, factor = starts[0]
    K, D = means.shape
    if clusters is not None and not performs_kmeans(batch, K):
        return None
    own = described(batch, means, factor, settings, backend)
    if own is None or (clusters is not None and own[0].sweep.unit != 1):
        return None
    inner, _kept = own
    if clusters is None:
        S, more, given = len(starts), 0 if rounds is None else 2, starts
    else:
        S, more, given = len(clusters.roots), 2 + len(clusters.roots), []
    tables, numbers = _rows(starts[0], given, S + more), torch.empty(3, S + more, dtype=torch.float64, device="cpu")
    done = torch.zeros(S, dtype=torch.int64, device="cpu")
    inner.steps, inner.tolerance = steps, tolerance
    _point(inner, tables, numbers)
    call, work = ClimbCall(inner, S, done.data_ptr(), after, known=math.nan), steps * S
    kept: list[Tensor] = []
    if rounds is not None:
        kept.append(_set_rounds(call, rounds, D))
        work += rounds.most * (2 * rounds.split[0] + rounds.merged[0])
    if clusters is not None:
        state = clusters.generator.get_state()
        kept += _set_clusters(call, clusters, K)
        work += clusters.iterations * S
    if run("gmmkeops_climb", call, is_long=work * len(batch) * K * D >= LONG) == OUT_OF_MEMORY:
        at_most = K if rounds is None else 2 * K
        raise MemoryError(f"There is not enough memory for EM steps of {at_most} components in {D} dimensions.")
    if clusters is not None and not call.starts:
        clusters.generator.set_state(state)
        return None
    found: list[Climbed | None] = []
    for s, (count, (total, cost, prior)) in enumerate(
        zip(done.tolist()[: call.starts], numbers.T.tolist(), strict=False)
    ):
        found.append(Climbed(_parameters(tables, factor, s), total, cost, prior, count) if count else None)
    origins = starts if clusters is None else [_parameters(tables, factor, S + 2 + s) for s in range(call.starts)]
    if not call.rounds:
        return Climbing(found, None, origins)
    merged, reached = (_parameters(tables, factor, call.starts + i) if call.accepted else None for i in (0, 1))
    ended, unchanged = bool(call.ended), bool(call.unchanged)
    after_rounds = Rounds(call.best, merged, reached, call.value, call.rounds, ended, call.work, unchanged)
    return Climbing(found, after_rounds, origins)


def _set_rounds(call: ClimbCall, rounds: RoundSettings, features: int) -> Tensor:
    """Set the constants of rounds; return the tensor that must be kept until they are performed."""
    call.split_steps, call.split_tolerance = rounds.split
    call.merged_steps, call.merged_tolerance = rounds.merged
    table = table_of(rounds.points, features)
    call.half, call.points, call.blocks = rounds.half, table.data_ptr(), len(table)
    call.most, call.constant, call.count = rounds.most, rounds.constant, rounds.size
    call.gain, call.tie, (call.early, call.change) = rounds.gain, rounds.tie, rounds.early
    call.known = rounds.known
    return table


def _set_clusters(call: ClimbCall, clusters: Clusters, centers: int) -> tuple[Tensor, Tensor]:
    """Set the constants of clusters, and draw random numbers; return the tensors that must be kept until they are found."""
    shape = len(clusters.roots), 1 + (centers - 1) * clusters.candidates
    uniform = torch.rand(shape, generator=clusters.generator, dtype=torch.float64, device="cpu")
    roots = clusters.roots.contiguous()
    call.metrics, call.roots, call.uniform = len(roots), roots.data_ptr(), uniform.data_ptr()
    call.candidates, call.iterations, call.relative = clusters.candidates, clusters.iterations, clusters.relative
    call.pool_below, call.pool_weight, call.pool_floor, call.pool_limit = clusters.pool
    call.copies, call.climbs_one = clusters.copies, clusters.climbs_one
    return roots, uniform


def _rows(like: Parameters, mixtures: Sequence[Parameters], rows: int) -> dict[str, Tensor]:
    """Return tables of parameters of mixtures of the shape of one, whose first rows are those of some mixtures."""
    named = [{"logits": logits, "means": means, **factor.tensors} for logits, means, factor in (like, *mixtures)]
    tables = {}
    for name, tensor in named[0].items():
        tables[name] = table = torch.empty(rows, *tensor.shape, dtype=torch.float64, device="cpu")
        for row, tensors in enumerate(named[1:]):
            table[row] = tensors[name]
    return tables


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
