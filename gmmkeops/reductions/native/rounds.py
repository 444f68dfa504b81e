"""Rounds of splitting and merging in the compiled library: two series of EM steps without the interpreter between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gmmkeops.components import Factor
from gmmkeops.data import Batch
from gmmkeops.reductions.library import OUT_OF_MEMORY, RoundCall, run
from gmmkeops.reductions.native.engine import LONG
from gmmkeops.reductions.native.pairs import table_of
from gmmkeops.reductions.native.steps import StepSettings, described

__all__ = ["Round", "em_round"]

_Parameters = tuple[Tensor, Tensor, Factor]


class Round(NamedTuple):
    """The result of a round.

    Args:
        merged: Logits (K,), means (K, D) and factor before the last series of steps.
        reached: Those after it.
        total, cost, prior: As in :class:`~gmmkeops.reductions.Steps`, for the parameters that were reached.
        work: Number of E-steps times the number of components in them.
    """

    merged: _Parameters
    reached: _Parameters
    total: float
    cost: float
    prior: float
    work: int


def em_round(
    batch: Batch,
    parameters: _Parameters,
    settings: StepSettings,
    *,
    split: tuple[int, float],
    merged: tuple[int, float],
    half: float,
    points: Tensor,
    backend: str = "auto",
) -> Round | None:
    """Split every component, perform EM steps, merge pairs until K components are left, and perform EM steps again.

    Args:
        batch: All points (N, D) and their weights.
        parameters: Logits (K,), means (K, D) and factor of a mixture whose covariances are not common.
        settings: Constants of the M-step.
        split, merged: Largest number of steps, and tolerance (nats per point), after the split and after the merge.
        half: Distance of the halves of a component from its mean, in standard deviations along its longest axis.
        points: Points of the standard normal distribution for the costs of merges, as for
            :func:`~gmmkeops.reductions.pair_costs`.
        backend: Name of the engine.

    Returns:
        None if the native engine does not compute the steps, or if one of them is not an ordinary one.
    """
    logits, means, factor = parameters
    own = described(batch, means, factor, settings, backend)
    if own is None:
        return None
    (K, D), tensors = means.shape, {"logits": logits, "means": means, **factor.tensors}
    tables = {name: torch.stack((tensor, tensor)).double() for name, tensor in tensors.items()}
    numbers, table = torch.empty(3, dtype=torch.float64), table_of(points, D)
    call, _kept = own
    for name, value in tables.items():
        setattr(call, name, value.data_ptr())
    first, size = numbers.data_ptr(), numbers.element_size()
    call.total, call.cost, call.prior = first, first + size, first + 2 * size
    outer = RoundCall(call, split[0], merged[0], split[1], merged[1], half, table.data_ptr(), len(table))
    work = (2 * split[0] + merged[0]) * len(batch) * K * D
    if run("gmmkeops_round", outer, is_long=work >= LONG) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory for EM steps of {2 * K} components in {D} dimensions.")
    if not outer.work:
        return None
    rows = [
        (tables["logits"][t], tables["means"][t], factor.replace(**{name: tables[name][t] for name in factor.tensors}))
        for t in (0, 1)
    ]
    total, cost, prior = numbers.tolist()
    return Round(rows[0], rows[1], total, cost, prior, outer.work)
