"""Moments of mixtures in standardized coordinates, with fewer operations than for parameters that must be validated."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops.components import Factor, Moments
from gmmkeops.data import ROUNDING, Batch
from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.dispatch import compute, parameter_gradients, statistics
from gmmkeops.reductions.library import ParameterCall, reason, run
from gmmkeops.reductions.native.steps import FAMILIES
from gmmkeops.reductions.problem import Exponents, Extent
from gmmkeops.reductions.protocol import Statistics

__all__ = ["mixture_moments", "valid_gradients"]

# Extent of parameters that are known to be finite, with standardized means, for which the center is zero. The range of the
# offsets means only that none of them is limited.
_STANDARDIZED = Extent(1.0, 1.0, True, (-1.0, 1.0))


def valid_gradients(
    batch: Batch, offsets: Tensor, means: Tensor, U: Tensor, *, scale: float, backend: str = "auto"
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Compute Σ g ℓ and its gradients for parameters on the device of the points, without waiting for it to validate them.

    Args:
        batch: Points (N, D) that are not sorted, standardized coordinates, and their weights.
        offsets, means, U: Parameters (K,), (K, D), (K, ...), float64, finite, standardized coordinates.
        scale: Number by which the gradients are multiplied.
        backend: Name of the engine.

    Returns:
        The total, nats, float64; and the gradients with respect to offsets, means and U.
    """
    problem = Exponents.of_shaped(batch.points, offsets.detach(), means.detach(), U.detach(), _STANDARDIZED)
    S0, S1, S2, total = compute(problem, None, Statistics(batch.weights), backend)
    return total, parameter_gradients(problem.U, S0, S1, S2, scale)


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
