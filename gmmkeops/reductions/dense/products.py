r"""Matrix products, with float32 accuracy on the tensor cores of GPUs.

A float32 number is split into two numbers with eleven significant bits, :math:`a \approx a' + a''`, and

.. math:: a b \approx a'' b' + a' b'' + a' b'.

The tensor cores compute these three products exactly in TF32 and add them in float32. The relative error is of the order of
:math:`2^{-22}`, as for a float32 product. Reference: Ootomo and Yokota 2022, *Recovering single precision accuracy from Tensor
Cores while surpassing the FP32 theoretical peak performance*.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["asked", "has_slow_double", "parts", "product", "split_product"]

# Compute capabilities of the GPUs whose float64 products take at most twice the time of float32 ones; on all others they take 32
# or 64 times as long (throughput of arithmetic instructions in the CUDA C++ programming guide).
_FAST_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def asked(device: torch.device) -> bool:
    """Return whether torch's settings allow fast float32 products on a device (``torch.set_float32_matmul_precision``).

    The setting ``fp32_precision`` of the device's backend is read, since ``torch.get_float32_matmul_precision`` raises an error
    if the settings of the backends differ.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return str(backend.matmul.fp32_precision) in ("tf32", "bf16")


def has_slow_double(device: torch.device) -> bool:
    """Return whether float64 products take many times as long as float32 ones on a device, as on GPUs for graphics."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) not in _FAST_DOUBLE


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute the matrix product a b (n, m) of one dtype, float32 or float64; on CUDA, float32 by :func:`split_product`."""
    if _on_tensor_cores(a):
        return split_product(a, b, out)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def _on_tensor_cores(a: Tensor) -> bool:
    return a.is_cuda and a.dtype == torch.float32


def split_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute the float32 matrix product a b (n, m) by three products of numbers with eleven significant bits."""
    (a, a_rest), (b, b_rest) = parts(a), parts(b)
    out = torch.mm(a_rest, b) if out is None else torch.mm(a_rest, b, out=out)
    return out.addmm_(a, b_rest).addmm_(a, b)


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into two numbers with eleven significant bits each."""
    head = _rounded(x)
    return head, _rounded(x - head)


def _rounded(x: Tensor) -> Tensor:
    """Round float32 numbers to the nearest numbers with the eleven significant bits of TF32."""
    return x.contiguous().view(torch.int32).add(1 << 12).bitwise_and_(-1 << 13).view(torch.float32)
