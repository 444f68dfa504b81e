"""Generators of random numbers for calls that were given none: of a fixed seed, so that results repeat in every process."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["DEFAULT_SEED", "as_generator"]

# A number that hardly any script seeds its own data with: a fit's random numbers are then not those that made its points.
DEFAULT_SEED = 0x676D6D6B656F7073


def as_generator(generator: Any, device: Any = "cpu") -> torch.Generator:
    """Return the given generator, or without one a new generator of a fixed seed.

    Args:
        generator: A ``torch.Generator``, or None.
        device: Device of the new generator.

    Raises:
        TypeError: ``generator`` is neither.
    """
    if generator is None:
        return torch.Generator(device).manual_seed(DEFAULT_SEED)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; "
            "pass torch.Generator().manual_seed(0)."
        )
    return generator
