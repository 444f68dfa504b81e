"""Validation of the stored parameters of components, and positive gamma random variables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmmkeops.components.arrays import as_tensor, concrete

__all__ = ["gamma", "positive", "stored"]


def stored(value: Any, name: str) -> Tensor:
    """Convert a stored parameter to a tensor, and check that it has a leading dimension for the components."""
    tensor = value if isinstance(value, Tensor) else as_tensor(value, name=name)
    if tensor.ndim < 2:
        raise ValueError(f"{name} must have shape (K, ...), or (1, ...) when tied, got {tuple(tensor.shape)}.")
    return tensor


def positive(values: Tensor, name: str) -> Tensor:
    """Check that values (..., K or 1, ...) of components are positive and finite, and return them."""
    good = torch.isfinite(values) & (values > 0)
    if concrete(values) and not bool(good.all()):
        where = [int(i) for i in (~good).nonzero()[0]]
        raise ValueError(
            f"{name} must be positive and finite, got {float(values[tuple(where)]):.6g} in component "
            f"{where[0] if where else 0}; add a small ridge to the covariances."
        )
    return values


def gamma(shape: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from the gamma distributions Gamma(shape, 1); no draw is zero."""
    return torch._standard_gamma(shape.contiguous(), generator=generator).clamp(min=1e-300)
