"""Validation of points and their weights."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops._checks import PrecisionWarning, as_tensor, check_finite

__all__ = ["as_dtype", "as_points", "as_weights", "shape_hint", "warn_if_coarse", "weight_unit"]


def as_dtype(dtype: Any) -> torch.dtype | None:
    """A float dtype of torch from its name, or from numpy's or torch's; None stays None.

    Raises:
        ValueError: It is neither float32 nor float64.
    """
    if dtype is None:
        return None
    try:
        text = isinstance(dtype, (str, torch.dtype))
        name = str(dtype).removeprefix("torch.") if text else np.dtype(dtype).name
    except (TypeError, ValueError):
        name = ""
    if name not in ("float32", "float64"):
        shown = getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")
        shown = f"a {type(dtype).__name__}" if isinstance(dtype, (list, tuple, np.ndarray, Tensor)) else shown
        raise ValueError(f"dtype must be float32 or float64, got {shown}; pass one of these two, or leave it out.")
    return torch.float32 if name == "float32" else torch.float64


def as_points(
    x: Any,
    *,
    name: str = "x",
    features: int | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
    minimum: int = 1,
    differentiable: bool = False,
) -> Tensor:
    """Checks a cloud of points.

    Args:
        x: Points (N, D), any container of numbers; (N,) is not guessed at.
        name: How messages call it.
        features: Expected D, if known.
        dtype: Result dtype (default: float32 stays, all else is float64).
        device: Result device (default: where the points are).
        minimum: The least number of rows.
        differentiable: Whether gradients may flow into the points; the points of a fit are constants.

    Returns:
        A finite tensor (N, D), float32 or float64.

    Raises:
        TypeError: Not numeric, or complex.
        ValueError: Wrong shape, too few rows, NaN or infinite entries.
    """
    tensor = as_tensor(x, name=name, dtype=dtype, device=device)
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(tensor.shape)}; {shape_hint(tensor.ndim, name)}.")
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(tensor.shape)}.")
    if features is not None and tensor.shape[1] != features:
        raise ValueError(
            f"{name} has {tensor.shape[1]} columns, expected {features} as in the model; pass the same columns."
        )
    if tensor.shape[0] < minimum:
        few = "no rows" if tensor.shape[0] == 0 else f"{tensor.shape[0]} rows"
        raise ValueError(f"{name} has {few}, expected at least {minimum}; pass more points or use fewer components.")
    check_finite(tensor, name=name)
    return tensor if differentiable else tensor.detach()


def shape_hint(ndim: int, name: str) -> str:
    """Return the advice that turns an array of another number of dimensions into points (N, D)."""
    if ndim == 1:
        return f"use {name}[:, None] for one column"
    return "pass an array with one row per point" if ndim == 0 else "flatten the leading dimensions"


def as_weights(
    weights: Any, points: Tensor, *, name: str = "weights", signed: bool = False, some: bool = True, first: int = 0
) -> Tensor | None:
    """Checks one weight per point; None stays None (all ones).

    Args:
        weights: Weights (N,), or None.
        points: The points (N, D) they belong to; the result has their device.
        name: How messages call it.
        signed: Whether negative weights and gradients in them make sense here (sums of log-densities: yes; fits: no).
        some: Whether some must be positive (of a whole cloud: yes; of a part: no).
        first: Row number of the first point among all.

    Raises:
        ValueError: Wrong length, not finite, negative where that is refused, or nothing but zeros.
    """
    if weights is None:
        return None
    tensor = as_tensor(weights, name=name, dtype=torch.float64, device=points.device)
    if tensor.shape != points.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({points.shape[0]},), one per point, got {tuple(tensor.shape)}; "
            "pass a flat array as long as the points."
        )
    check_finite(tensor, name=name, first=first)
    if not signed:
        if bool((tensor < 0).any()):
            row = int((tensor < 0).nonzero()[0, 0])
            raise ValueError(
                f"{name} must not be negative, got {float(tensor[row])} at row {first + row}; clip them at zero."
            )
        if some and not bool((tensor > 0).any()):
            raise ValueError(f"{name} must not all be zero; leave {name} out to weigh every point alike.")
        if not bool(torch.isfinite(tensor.sum())):
            raise ValueError(
                f"{name} must have a sum within float64, got weights up to {float(tensor.max()):.3g}; divide them by the largest."
            )
    return tensor if signed else tensor.detach()


def weight_unit(largest: float) -> float:
    """A power of two near the largest weight where that is extreme; otherwise one.

    Only ratios of weights matter to a fit. In this unit their squares and their products with squares of coordinates are within
    range, and dividing by it rounds nothing.
    """
    if 1e-60 <= largest <= 1e60 or not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** max(-1000, min(1000, math.frexp(largest)[1]))


def warn_if_coarse(x: Tensor, spread: Tensor, magnitude: Tensor) -> None:
    """Warns when float32 input is so far from the origin that its own steps are a visible part of its spread.

    Args:
        x: The points as the user gave them (N, D).
        spread: Standard deviation of each column (D,), data units.
        magnitude: Distance of the cloud's centre from the origin in each column (D,), data units.
    """
    if x.dtype != torch.float32:
        return
    step = magnitude * torch.finfo(torch.float32).eps
    coarse = (step > 1e-3 * spread) & (spread > 0)
    if bool(coarse.any()):
        column = int(coarse.nonzero()[0, 0])
        warnings.warn(
            f"x is float32 and around {float(magnitude[column]):.3g} in column {column}, where float32 steps by "
            f"{float(step[column]):.2g}: that is coarse against its spread of {float(spread[column]):.2g}. "
            "Pass float64, or subtract an offset before casting.",
            PrecisionWarning,
            stacklevel=4,
        )
