"""Moments of mixtures whose parameters are on the CPU, for points on another device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops.components import Factor, Moments
from gmmkeops.data import ROUNDING, Batch
from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.dispatch import statistics
from gmmkeops.reductions.library import ParameterCall, reason, run
from gmmkeops.reductions.native.steps import FAMILIES
from gmmkeops.reductions.problem import Exponents

__all__ = ["mixture_moments"]


def mixture_moments(
    batch: Batch,
    logits: Tensor,
    means: Tensor,
    factor: Factor,
    *,
    mass: float,
    assignment: str = "soft",
    backend: str = "auto",
) -> Moments | None:
    """Compute the moments of a mixture as :func:`gmmkeops.reductions.moments` does, with fewer operations on the parameters.

    One call of the compiled library computes the offsets and factors, and validates them.

    Args:
        batch: Points (N, D) that are not sorted, and their weights.
        logits, means, factor: Parameters (K,), (K, D), K or 1, float64, on the CPU.
        mass: Total weight of the points.
        assignment: ``"soft"`` or ``"hard"``.
        backend: Name of the engine.

    Returns:
        The moments on the CPU; None if the parameters must be validated or converted in another way, or without the library.
    """
    family, given = FAMILIES.get(type(factor)), [logits, means, *factor.tensors.values()]
    if family is None or reason() is not None or not isinstance(batch.points, Tensor):
        return None
    if any(part.dtype != torch.float64 or part.device.type != "cpu" or part.requires_grad for part in given):
        return None
    (K, D), L = means.shape, factor.leading
    given = [part.contiguous() for part in given]
    rounding = None if batch.rounding is None else batch.rounding.cpu().contiguous()
    offsets, shape = torch.empty(K, dtype=torch.float64), {0: (D, D), 1: (D,), 2: (1,)}[family]
    U = torch.empty(L, *shape, dtype=torch.float64)
    call = ParameterCall(
        family=family,
        tied=L == 1,
        threads=cores(),
        components=K,
        dimensions=D,
        logits=given[0].data_ptr(),
        means=given[1].data_ptr(),
        log_diagonal=given[2].data_ptr(),
        upper=given[3].data_ptr() if family == 0 else None,
        rounding=None if rounding is None else rounding.data_ptr(),
        coarse=ROUNDING,
        offsets=offsets.data_ptr(),
        factor=U.data_ptr(),
    )
    run("gmmkeops_parameters", call)
    if not call.valid:
        return None
    center = torch.zeros(D, dtype=torch.float64)
    host = Exponents(means[:0], offsets, means, U if L == K else U.expand(K, *shape), center)
    sums = statistics(
        Exponents.of_host(batch.points, host), None, batch.weights, backend, assignment, device=means.device, mass=mass
    )
    shape = (K, *factor.spread_shape(D))
    return sums if sums.S2.shape == shape else replace(sums, S2=sums.S2.reshape(shape))
