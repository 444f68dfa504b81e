"""Packing of few parameters on the CPU, and conversion of the sums of moments there, by the compiled library.

Each of them is one call instead of about forty operations of torch, which take longer than the kernels of small problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gmmkeops.components import transfer_memory
from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.library import OUT_OF_MEMORY, RecordCall, reason, run
from gmmkeops.reductions.problem import Exponents

__all__ = ["CompiledRecords"]

# Numbers of the families in native/source/interface.hpp.
_FAMILIES = {"full": 0, "diagonal": 1, "spherical": 2}


@dataclass(frozen=True)
class CompiledRecords:
    """Component parameters on the CPU, packed as in :class:`gmmkeops.reductions.triton.packing.Packed`.

    Args:
        records: The records (at least K + 1, R), in the dtype of the points.
        rest: Means minus rounded means (K, D), data units, float64.
        base: Value that base-2 exponents are relative to, nats.
        usual: Largest usual log-sum-exp, nats.
        condition: Bound on the condition numbers of full factors; infinite if one is singular.
        family: ``"full"``, ``"diagonal"`` or ``"spherical"``.
        factor: Factors U in the shape of :class:`~gmmkeops.reductions.problem.Exponents`.
        device: Device of the points.
    """

    records: Tensor
    rest: Tensor
    base: float
    usual: float
    condition: float
    family: str
    factor: Tensor
    device: torch.device

    @classmethod
    def of(cls, problem: Exponents, family: str, unroll: int) -> CompiledRecords | None:
        """Pack parameters on the CPU; the number of records is a multiple of ``unroll`` that is larger than K.

        Returns:
            None if the parameters are on another device, if a full factor is not upper triangular, or without the library.
        """
        given = problem.host or problem
        if given.means.device.type != "cpu" or reason() is not None:
            return None
        K, D = given.means.shape
        R = 1 + 2 * D + {"full": D * (D + 1) // 2, "diagonal": D, "spherical": 1}[family]
        device = problem.x.device
        records = transfer_memory(((K // unroll + 1) * unroll, R), device, problem.x.dtype)
        rest = transfer_memory((K, D), device)
        call, _kept = _call(given, family, rest)
        call.double_points, call.records, call.record = records.dtype == torch.float64, len(records), records.data_ptr()
        _run("gmmkeops_pack", call)
        if not call.triangular:
            return None
        return cls(records, rest, call.base, call.usual, call.condition, family, given.U, device)

    def moments(self, given: Exponents, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convert sums (W, K) on the CPU to S0 (K,), S1 (K, D) and S2 (K, D, D), (K, D) or (K,) about the means, float64.

        Args:
            given: Exponents with the parameters on the CPU.
            sums: Sums as in :meth:`gmmkeops.reductions.triton.residuals.Residuals.add_sums`, contiguous.
        """
        K, D = self.rest.shape
        shape = (K, D, D) if self.family == "full" else (K,) if self.factor.shape[1:] == (1,) else (K, D)
        results = [transfer_memory(shape, self.device) for shape in ((K,), (K, D), shape)]
        call, _kept = _call(given, self.family, self.rest)
        call.sums = sums.data_ptr()
        call.S0, call.S1, call.S2 = (part.data_ptr() for part in results)
        _run("gmmkeops_unpack", call)
        S0, S1, S2 = results
        return S0, S1, S2


def _call(given: Exponents, family: str, rest: Tensor) -> tuple[RecordCall, list[Tensor]]:
    """Return the arguments that both functions of the library have, and the tensors that must be kept until it is called."""
    (K, D), U = given.means.shape, given.U
    shared = K > 1 and U.stride(0) == 0
    kept = [part.contiguous() for part in (given.offsets, given.means, U[:1] if shared else U, given.center)]
    offsets, means, factor, center = (part.data_ptr() for part in kept)
    call = RecordCall(
        family=_FAMILIES[family],
        threads=cores(),
        components=K,
        dimensions=D,
        offsets=offsets,
        means=means,
        factor=factor,
        center=center,
        factor_stride=0 if shared else U[0].numel(),
        rest=rest.data_ptr(),
    )
    return call, kept


def _run(function: str, call: RecordCall) -> None:
    if run(function, call) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory for the parameters of {call.components} components.")
