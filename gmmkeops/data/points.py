"""Validation of points and their weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops._checks import PrecisionWarning, warn
from gmmkeops.components import as_tensor, check_finite

__all__ = ["as_dtype", "as_points", "as_weights", "shape_hint", "warn_if_coarse", "weight_unit"]


def as_dtype(dtype: Any) -> torch.dtype | None:
    """Convert a name, or a dtype of numpy or torch, to a float dtype of torch; None stays None.

    Raises:
        ValueError: The dtype is neither float32 nor float64.
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
        raise ValueError(f"dtype must be float32 or float64, got {shown}; pass one of these, or omit dtype.")
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
    finite: bool = True,
) -> Tensor:
    """Validate points, and convert them to a tensor.

    Args:
        x: Points (N, D) in any container of numbers.
        name: Name of the argument in messages.
        features: Expected D, if known.
        dtype: Dtype of the result (default: float32 stays float32, and everything else becomes float64).
        device: Device of the result (default: that of the points).
        minimum: Smallest admissible number of rows.
        differentiable: Whether to keep the autograd graph of the points.
        finite: Whether to check that all entries are finite, which synchronizes with a GPU; a caller that passes False checks it.

    Returns:
        A finite tensor (N, D), float32 or float64.

    Raises:
        TypeError: The points are not numeric, or are complex.
        ValueError: The shape is wrong, there are too few rows, or entries are NaN or infinite.
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
    if finite:
        check_finite(tensor, name=name)
    return tensor if differentiable else tensor.detach()


def shape_hint(ndim: int, name: str) -> str:
    """Return the remedy of an error message for an array with ``ndim`` dimensions instead of shape (N, D)."""
    if ndim == 1:
        return f"use {name}[:, None] for one column"
    return "pass an array with one row per point" if ndim == 0 else "flatten the leading dimensions"


def as_weights(
    weights: Any, points: Tensor, *, name: str = "weights", signed: bool = False, some: bool = True, first: int = 0
) -> Tensor | None:
    """Validate the weights of points, and return them as contiguous float64; None (for weights of one) stays None.

    Args:
        weights: Weights (N,), or None.
        points: The points (N, D), on the device of the result.
        name: Name of the argument in messages.
        signed: Whether to accept negative weights and keep gradients (for sums of log-densities, not for fits).
        some: Whether to require at least one positive weight (for a whole data set, not for a chunk).
        first: Index of the first point among all points.

    Raises:
        ValueError: The length is wrong, a weight is not finite or is negative, or all weights are zero.
    """
    if weights is None:
        return None
    tensor = as_tensor(weights, name=name, dtype=torch.float64, device=points.device)
    if tensor.shape != points.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({points.shape[0]},), one per point, got {tuple(tensor.shape)}; "
            "pass an array with one number per point."
        )
    check_finite(tensor, name=name, first=first)
    if not signed:
        if bool((tensor < 0).any()):
            row = int((tensor < 0).nonzero()[0, 0])
            raise ValueError(
                f"{name} must not be negative, got {float(tensor[row])} at row {first + row}; replace negative weights by zero."
            )
        if some and not bool((tensor > 0).any()):
            raise ValueError(f"{name} must not all be zero; omit {name} for equal weights.")
        if not bool(torch.isfinite(tensor.sum())):
            raise ValueError(
                f"{name} must have a finite sum in float64, got weights up to {float(tensor.max()):.3g}; rescale them."
            )
    return (tensor if signed else tensor.detach()).contiguous()


def weight_unit(largest: float) -> float:
    """Return a power of two near the largest weight if this weight is extremely large or small, otherwise one.

    A fit depends on ratios of weights only. Dividing the weights by this power of two is exact, and keeps their squares, and
    their products with squares of coordinates, within the range of float64.
    """
    if 1e-60 <= largest <= 1e60 or not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** max(-1000, min(1000, math.frexp(largest)[1]))


def warn_if_coarse(x: Tensor, spread: Tensor, magnitude: Tensor) -> None:
    """Warn if the resolution of float32 points is coarse compared with their spread, because they are far from the origin.

    Args:
        x: The points (N, D) as passed by the user.
        spread: Standard deviation of each column (D,), data units.
        magnitude: Absolute value of the center of each column (D,), data units.
    """
    if x.dtype != torch.float32:
        return
    step = magnitude * torch.finfo(torch.float32).eps
    coarse = (step > 1e-3 * spread) & (spread > 0)
    if bool(coarse.any()):
        column = int(coarse.nonzero()[0, 0])
        warn(
            f"x is float32 with values near {float(magnitude[column]):.3g} in column {column}, where the spacing of "
            f"float32 numbers is {float(step[column]):.2g}, too coarse for the standard deviation "
            f"{float(spread[column]):.2g}; pass float64, or subtract an offset before casting.",
            PrecisionWarning,
        )
