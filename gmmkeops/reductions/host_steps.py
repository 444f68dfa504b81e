"""EM steps whose E-steps any engine performs on a GPU, and whose M-steps the compiled library performs on the CPU.

Several steps are performed in one call, so that the GPU does not wait for the work of a fit between two steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmmkeops.components import Factor, transferred
from gmmkeops.data import Batch
from gmmkeops.reductions.dispatch import compute
from gmmkeops.reductions.host_moments import HostParameters
from gmmkeops.reductions.native import steps as native
from gmmkeops.reductions.native.steps import MOST, Maximization, Steps, StepSettings, maximizes, results, tables_of
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Statistics

__all__ = ["em_steps"]

# Estimated times of a step, for each multiplication of a pair and fixed, and time that a call with several steps may take,
# seconds (H200, 1e6 points and 1000 components, full: 2.4 ms in 3 dimensions and 21 ms in 16; and 0.7 to 1.4 ms for the CPU).
_MULTIPLICATION, _FIXED, _CALL = 7e-14, 1e-3, 0.1

# Memory that the parameters of all steps of a call may take, bytes.
_MEMORY = 1 << 26

_CPU = torch.device("cpu")


def em_steps(
    batch: Batch,
    logits: Tensor,
    means: Tensor,
    factor: Factor,
    settings: StepSettings,
    *,
    counts: Tensor | None = None,
    drift: float = 0.0,
    backend: str = "auto",
    limit: int | None = None,
    most: int = MOST,
    tolerance: float = -math.inf,
    relative: float = 0.0,
) -> Steps | None:
    """Perform EM steps over all points, until one is not ordinary (see :mod:`gmmkeops.reductions.native.steps`).

    Args:
        batch: All points (N, D) and their weights.
        logits, means, factor: Initial parameters (K,), (K, D), K or 1, float64.
        settings: Constants of the M-step.
        counts: Fraction of the points for each covariance at the last M-step; None for those of the first E-step.
        drift: As in :class:`Steps`, before the first step.
        backend: Name of the engine.
        limit: Largest number of steps; None for as many as take little time (a millisecond on a CPU, 100 on a GPU), at most
            ``most``.
        tolerance: Decrease of the objective below which no further step is performed, nats per point.
        relative: Fraction of the objective that is added to the tolerance.

    Returns:
        The results, which may contain no step; None if the compiled library cannot perform the M-steps, or the E-steps on a CPU.
    """
    on_cpu = not isinstance(batch.points, Tensor) or batch.points.device.type == "cpu"
    performed = native.em_steps if on_cpu else _on_device
    return performed(
        batch,
        logits,
        means,
        factor,
        settings,
        counts=counts,
        drift=drift,
        backend=backend,
        limit=limit,
        most=most,
        tolerance=tolerance,
        relative=relative,
    )


def _on_device(
    batch: Batch,
    logits: Tensor,
    means: Tensor,
    factor: Factor,
    settings: StepSettings,
    *,
    counts: Tensor | None,
    drift: float,
    backend: str,
    limit: int | None,
    most: int,
    tolerance: float,
    relative: float,
) -> Steps | None:
    """Perform steps for points on another device than the parameters; None if the library does not perform their M-steps."""
    assert isinstance(batch.points, Tensor), "sorted points have no ordinary steps"
    if (
        settings.bare
        or settings.accelerate
        or settings.pool is not None
        or not maximizes(factor)
        or means.device.type != "cpu"
    ):
        return None
    K, D = means.shape
    parameters = HostParameters.of(factor, K, batch)
    if parameters is None:
        return None
    if limit is None:
        seconds = _FIXED + _MULTIPLICATION * len(batch) * K * D * (D + 8 if factor.coupled else 11)
        size = 8 * (K * D + sum(tensor.numel() for tensor in factor.tensors.values()))
        limit = max(1, min(most, int(_CALL / seconds), _MEMORY // size))
    tables = tables_of(limit, logits, means, factor, counts, drift, batch.points.device)
    step = Maximization(factor, K, settings, settings.mass, tables)
    request = Statistics(batch.weights, settings.assignment, on_cpu=True)
    last, done = math.inf, 0
    while done < limit:
        tensors = {name: tables[name][done] for name in factor.tensors}
        host = parameters.exponents(tables["logits"][done], tables["means"][done], tensors)
        if host is None:
            break
        sums = compute(Exponents.of_host(batch.points, host), None, request, backend)
        if not step.perform(done, transferred(sums, _CPU)):
            break
        done += 1
        if tolerance > -math.inf or relative:
            total, cost, prior, _ = tables["numbers"][:, done - 1].tolist()
            value = (prior - total) / settings.mass + cost
            if last - value < tolerance + relative * abs(value):
                break
            last = value
    return results(tables, factor, done)
