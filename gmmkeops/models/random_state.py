"""Conversion of scikit-learn's ``random_state`` to random number generators of torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gmmkeops.data import DEFAULT_SEED, as_generator

__all__ = ["generator_of"]


def generator_of(random_state: Any, device: torch.device, call: int = 0) -> torch.Generator:
    """Create a generator from a ``random_state`` as in scikit-learn.

    Args:
        random_state: None (a fixed seed plus ``call``), an int, or a numpy ``RandomState`` or ``Generator``.
        device: Device of the random numbers.
        call: Number of the call, so that successive calls with ``random_state=None`` differ.

    Raises:
        TypeError: ``random_state`` has another type.
    """
    if random_state is None:
        return as_generator(DEFAULT_SEED + call, device)
    if isinstance(random_state, (int, np.integer)):
        return as_generator(int(random_state), device)
    if isinstance(random_state, (np.random.Generator, np.random.RandomState)):
        return as_generator(random_state, device)
    raise TypeError(f"random_state must be None, an int or a numpy generator, got {type(random_state).__name__}.")
