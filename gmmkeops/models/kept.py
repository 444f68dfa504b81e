"""Parameters of a mixture as the reductions need them, which are kept until a parameter changes.

Parameters can change in place, also through numpy arrays that share their memory, of which torch has no record. The parameters
are therefore compared with copies of those from which the kept values were computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from gmmkeops.components import Factor, constant, ordinary
from gmmkeops.reductions import Prepared

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture

__all__ = ["KEPT", "prepared"]

# Attribute of a mixture that is neither copied nor pickled.
KEPT = "_kept"

# Largest number of entries of factors that are kept.
_LARGEST = 1 << 20


class _Kept:
    """Prepared parameters, and copies of the tensors from which they were computed."""

    def __init__(self, factor: Factor, tensors: list[Tensor], values: Prepared) -> None:
        self.values = values
        self.kind, self.features = type(factor), factor.features
        self.shapes = [tensor.shape for tensor in tensors]
        self.copies = [copy.clone() for copy in _together(tensors)]

    def describes(self, factor: Factor, tensors: list[Tensor]) -> bool:
        """Return whether the values were computed from these parameters: logits, means and those of the factor."""
        parts = _together(tensors)
        return (
            self.kind is type(factor)
            and self.features == factor.features
            and self.shapes == [tensor.shape for tensor in tensors]
            and len(parts) == len(self.copies)
            and all(
                copy.dtype is part.dtype and copy.device == part.device and torch.equal(copy, part)
                for copy, part in zip(self.copies, parts, strict=True)
            )
        )


def _together(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors without gradients; those on a GPU in one array, since each comparison waits for the device."""
    tensors = [tensor.detach() for tensor in tensors]
    alike = all(tensor.is_cuda and tensor.dtype is tensors[0].dtype for tensor in tensors)
    return [torch.cat([tensor.reshape(-1) for tensor in tensors])] if alike else tensors


def prepared(mixture: Mixture) -> Prepared | None:
    """Return the parameters of one mixture for reductions; None for a batch of mixtures and for tensors of other kinds."""
    if mixture.batch_shape:
        return None
    factor = mixture.factor
    tensors = [mixture.logits, mixture.means, *factor.tensors.values()]
    if not constant(*tensors):
        return Prepared(mixture.offsets, mixture.means, factor) if ordinary(*tensors) else None
    kept = vars(mixture).get(KEPT)
    if kept is not None and kept.describes(factor, tensors):
        return cast(Prepared, kept.values)
    # Autograd, which may use the kept values later, cannot save tensors of the inference mode.
    with torch.inference_mode(False), torch.no_grad():
        values = Prepared(mixture.offsets, mixture.means, factor)
        if values.U.numel() <= _LARGEST:
            vars(mixture)[KEPT] = _Kept(factor, tensors, values)
    return values
