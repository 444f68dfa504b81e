"""Random number generators on the device where they are used, and reproducible random draws.

The default is a generator with a fixed seed, so that results are reproducible.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DEFAULT_SEED", "as_generator", "categorical", "generator_on", "running_sum"]

# An unusual seed, so that a fit does not use the random numbers with which a script has generated its points.
DEFAULT_SEED = 0x676D6D6B656F7073


def as_generator(generator: Any, device: Any = "cpu") -> torch.Generator:
    """Return a generator on a device.

    Args:
        generator: A ``torch.Generator``, a seed, a ``RandomState`` or ``Generator`` of numpy, or None for a new generator of a
            fixed seed. For a generator on another device, a new generator is seeded by a draw from it.
        device: Device of the random numbers.

    Raises:
        TypeError: ``generator`` has another type.
    """
    if generator is None:
        return torch.Generator(device).manual_seed(DEFAULT_SEED)
    if isinstance(generator, numbers.Integral) and not isinstance(generator, bool):
        return torch.Generator(device).manual_seed(int(generator) % (1 << 63))
    if isinstance(generator, np.random.Generator):
        return torch.Generator(device).manual_seed(int(generator.integers(1 << 62)))
    if isinstance(generator, np.random.RandomState):
        return torch.Generator(device).manual_seed(int(generator.randint(1 << 31)))
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, a seed or None, got {type(generator).__name__}; "
            "pass torch.Generator().manual_seed(0)."
        )
    if generator.device.type == torch.device(device).type:
        return generator
    seed = int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)


def generator_on(generator: Any, device: Any) -> torch.Generator | None:
    """Return a generator on a device, as :func:`as_generator`; None stays None (torch's global generator)."""
    return None if generator is None else as_generator(generator, device)


def running_sum(values: Tensor, dim: int = 0) -> Tensor:
    """Compute the cumulative sum along a dimension.

    Since torch has no deterministic ``cumsum`` of floats on CUDA, shifted copies are added if
    ``torch.use_deterministic_algorithms(True)`` is set.
    Reference: Hillis and Steele 1986, *Data parallel algorithms*, CACM 29.
    """
    if not (values.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return values.cumsum(dim)
    size, step = values.shape[dim], 1
    while step < size:
        head, tail = values.split([step, size - step], dim)
        values = torch.cat([head, tail + values.narrow(dim, 0, size - step)], dim)
        step *= 2
    return values


def categorical(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw with replacement: indices (*B, count), int64, with probabilities proportional to the weights (*B, K)."""
    if not (weights.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return torch.multinomial(weights, count, replacement=True, generator=generator)
    total = running_sum(weights, -1)
    u = torch.rand(*weights.shape[:-1], count, generator=generator, dtype=total.dtype, device=total.device)
    # The upper limit is excluded, because the last weight may be zero.
    last = (weights > 0).long().mul(torch.arange(weights.shape[-1], device=weights.device)).amax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(total, u * total[..., -1:], right=True), last)
