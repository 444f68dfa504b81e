"""Moments of mixtures in standardized coordinates, with fewer operations than for parameters that must be validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gmmkeops.components import Factor, Moments, transfer_memory, transferred
from gmmkeops.data import ROUNDING, Batch
from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.dispatch import compute, parameter_gradients, statistics
from gmmkeops.reductions.library import OUT_OF_MEMORY, ParameterCall, reason, run
from gmmkeops.reductions.native.steps import FAMILIES
from gmmkeops.reductions.problem import Exponents, Extent
from gmmkeops.reductions.protocol import Statistics

__all__ = ["HostParameters", "mixture_moments", "valid_gradients"]

# Extent of parameters that are known to be finite, with standardized means, for which the center is zero. The range of the
# offsets means only that none of them is limited.
_STANDARDIZED = Extent(1.0, 1.0, True, (-1.0, 1.0))


def valid_gradients(
    batch: Batch, offsets: Tensor, means: Tensor, U: Tensor, *, scale: float, backend: str = "auto"
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Compute Σ g ℓ and its gradients without validating the parameters, which would synchronize with the GPU.

    Args:
        batch: Points (N, D) that are not sorted, standardized coordinates, and their weights.
        offsets, means, U: Parameters (K,), (K, D), (K, ...), float64, finite, standardized coordinates, on the device of the
            points or on the CPU.
        scale: Number by which the gradients are multiplied.
        backend: Name of the engine.

    Returns:
        The total, nats, float64; and the gradients with respect to offsets, means and U, on the device of the parameters.
    """
    problem = Exponents.of_shaped(batch.points, offsets.detach(), means.detach(), U.detach(), _STANDARDIZED)
    given = problem.host or problem
    request = Statistics(batch.weights, on_cpu=given is not problem)
    S0, S1, S2, total = transferred(compute(problem, None, request, backend), means.device)
    return total, parameter_gradients(given.U, S0, S1, S2, scale)


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
        The moments on the CPU; None as for :meth:`HostParameters.exponents`, or without the library.
    """
    parameters = HostParameters.of(factor, len(means), batch)
    host = None if parameters is None else parameters.exponents(logits, means, factor.tensors)
    if host is None:
        return None
    sums = statistics(
        Exponents.of_host(batch.points, host), None, batch.weights, backend, assignment, device=means.device, mass=mass
    )
    shape = (len(means), *factor.spread_shape(factor.features))
    return sums if sums.S2.shape == shape else replace(sums, S2=sums.S2.reshape(shape))


class HostParameters:
    """Exponents from the parameters of mixtures on the CPU, by one call of the compiled library for each mixture.

    Args:
        factor: Precision factor of the mixtures.
        components: Number of components K.
        rounding: Largest rounding errors of the points (D,), float64, on the CPU; None if they are exact.
        device: Device of the points.
    """

    def __init__(self, factor: Factor, components: int, rounding: Tensor | None, device: torch.device) -> None:
        self._rounding, self._device, family, D = rounding, device, FAMILIES[type(factor)], factor.features
        self._shape = {0: (D, D), 1: (D,), 2: (1,)}[family]
        self._tied, self._center = factor.leading == 1, torch.zeros(D, dtype=torch.float64)
        self._call = ParameterCall(
            family=family,
            tied=self._tied,
            threads=cores(),
            components=components,
            dimensions=D,
            rounding=None if rounding is None else rounding.data_ptr(),
            coarse=ROUNDING,
        )

    @classmethod
    def of(cls, factor: Factor, components: int, batch: Batch) -> HostParameters | None:
        """Prepare for points that are not sorted; None if the library does not compute the exponents."""
        if type(factor) not in FAMILIES or reason() is not None or not isinstance(batch.points, Tensor):
            return None
        rounding = None if batch.rounding is None else batch.rounding.cpu().contiguous()
        return cls(factor, components, rounding, batch.points.device)

    def exponents(self, logits: Tensor, means: Tensor, tensors: Mapping[str, Tensor]) -> Exponents | None:
        """Compute and validate the exponents, without points.

        Args:
            logits, means: Parameters (K,) and (K, D).
            tensors: Parameters of the factor, by their names.

        Returns:
            None if the parameters must be validated or converted in another way, or if float32 points are not accurate enough.
        """
        given = [logits, means, *tensors.values()]
        if any(part.dtype != torch.float64 or part.device.type != "cpu" or part.requires_grad for part in given):
            return None
        given = [part.contiguous() for part in given]
        offsets = transfer_memory(logits.shape, self._device)
        U = transfer_memory((1 if self._tied else len(means), *self._shape), self._device)
        call = self._call
        call.logits, call.means, call.log_diagonal = (part.data_ptr() for part in given[:3])
        call.upper = given[3].data_ptr() if len(given) > 3 else None
        call.offsets, call.factor = offsets.data_ptr(), U.data_ptr()
        if run("gmmkeops_parameters", call) == OUT_OF_MEMORY or not call.valid:
            return None
        U = U if len(U) == len(means) else U.expand(len(means), *self._shape)
        return Exponents(means[:0], offsets, given[1], U, self._center)
