"""Copies of several small tensors to another device, and of several numbers to Python, in one transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["numbers", "transfer_memory", "transferred"]

# Size of the largest numbers, bytes, to a multiple of which the memory of each tensor is padded.
_LARGEST = 8

# Number of bytes from which tensors on the CPU are copied one by one, since joining them there would take longer.
_APART = 1 << 18

# Largest number of bytes of an array in page-locked memory, which other programs cannot use.
_LOCKED = 1 << 25


def transfer_memory(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return an array of undefined numbers on the CPU, for numbers that are copied from a device or computed for it.

    For a GPU it is page-locked memory, which torch keeps and uses again, unless it is large. Copies of 2 MB take 0.05 ms instead
    of 0.2 (H200); and as much new memory of the operating system takes 1 ms at its first use, as long as an M-step for 1000
    components in 16 dimensions.
    """
    if device.type == "cuda" and math.prod(shape) * dtype.itemsize <= _LOCKED:
        # Too little memory may be left that can be locked.
        with suppress(RuntimeError):
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    return torch.empty(shape, dtype=dtype, device="cpu")


def numbers(*scalars: Tensor) -> list[float]:
    """Return the values of scalars of one dtype as Python numbers, in one transfer from a GPU."""
    if scalars[0].is_cuda:
        found: list[float] = torch.stack(scalars).tolist()
        return found
    return [scalar.item() for scalar in scalars]


def transferred(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to a device, in one transfer for those on other devices unless they are large.

    A transfer from a GPU waits for its kernels, and each transfer takes about ten microseconds.

    Args:
        tensors: Tensors, of which those on another device are on the same one.
        device: Device of the results.

    Returns:
        The tensors in the same order. Those on ``device`` are returned unchanged; the others may share memory.
    """
    away = [tensor for tensor in tensors if tensor.device != device]
    if not away:
        return list(tensors)
    if len(away) == 1 or (
        away[0].device.type == "cpu" and sum(tensor.numel() * tensor.element_size() for tensor in away) > _APART
    ):
        return [tensor if tensor.device == device else _copied(tensor.contiguous(), device) for tensor in tensors]
    one = all(tensor.dtype == away[0].dtype for tensor in away)
    flats = [tensor.reshape(-1) if one else _as_bytes(tensor) for tensor in away]
    moved = _copied(torch.cat(flats), device).split([len(flat) for flat in flats])
    parts = iter(
        (part if one else part[: tensor.numel() * tensor.element_size()].view(tensor.dtype)).view(tensor.shape)
        for part, tensor in zip(moved, away, strict=True)
    )
    return [tensor if tensor.device == device else next(parts) for tensor in tensors]


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device."""
    if device.type != "cpu":
        return tensor.to(device)
    return transfer_memory(tensor.shape, tensor.device, tensor.dtype).copy_(tensor)


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as bytes, padded to a multiple of the largest number."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % _LARGEST)) if len(flat) % _LARGEST else flat
