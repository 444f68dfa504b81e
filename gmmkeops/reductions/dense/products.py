r"""Matrix products: float64 as a rule, float32 ones where torch is told that they are precise enough.

A float32 number is the sum of two with eleven bits each, but for its last bit or two, :math:`a = a' + a''`, and

.. math:: a b \approx a'' b' + a' b'' + a' b',

three products that a GPU's tensor cores take exactly in TF32 and add in float32. What is lost is of the order of
:math:`2^{-22}`, as in a float32 product. Reference: Ootomo and Yokota 2022, Recovering single precision accuracy from Tensor
Cores while surpassing the FP32 theoretical peak performance.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["asked", "product", "split_product"]


def asked(device: torch.device) -> bool:
    """Whether the user allows faster products than exact ones on a device: ``torch.set_float32_matmul_precision("high")``.

    ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` asks for the same on CUDA alone. Settings that differ between devices
    make ``torch.get_float32_matmul_precision`` raise, so each device's own setting is read.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return str(backend.matmul.fp32_precision) in ("tf32", "bf16")


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b (n, m), both (float32 or float64) of one dtype; float32 on CUDA, where one product would keep eleven bits, in parts."""
    if _on_tensor_cores(a):
        return split_product(a, b, out)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def _on_tensor_cores(a: Tensor) -> bool:
    return a.is_cuda and a.dtype == torch.float32


def split_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b (n, m) by three products of numbers with eleven significant bits, float32."""
    (a, a_rest), (b, b_rest) = _parts(a), _parts(b)
    out = torch.mm(a_rest, b) if out is None else torch.mm(a_rest, b, out=out)
    return out.addmm_(a, b_rest).addmm_(a, b)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    head = _rounded(x)
    return head, _rounded(x - head)


def _rounded(x: Tensor) -> Tensor:
    """float32 numbers to the eleven significant bits of TF32, to the nearest."""
    return x.contiguous().view(torch.int32).add(1 << 12).bitwise_and_(-1 << 13).view(torch.float32)
