"""Radii of Gaussian draws between two Mahalanobis distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmmkeops._checks import as_number

__all__ = ["radii", "shell"]


def shell(confidence: float | None, std_range: tuple[float, float] | None, features: int) -> tuple[float, float]:
    """Return the smallest and the largest radius of a region, in standard deviations.

    Args:
        confidence: Probability of a component within the ellipsoid that bounds the region, or None.
        std_range: Smallest and largest radius, or None.
        features: Number of columns D.

    Raises:
        ValueError: An argument is invalid, or the region is empty.
    """
    low, high = 0.0, math.inf
    if std_range is not None:
        if not isinstance(std_range, (tuple, list)) or len(std_range) != 2:
            raise ValueError(f"std_range must be a pair (a, b) with 0 <= a < b, got {std_range!r}.")
        low = as_number(std_range[0], "the first of std_range", 0)
        high = math.inf if std_range[1] == math.inf else as_number(std_range[1], "the second of std_range", 0)
    if not 0 <= low < high:
        raise ValueError(f"std_range must be (a, b) with 0 <= a < b, got {std_range}.")
    if confidence is not None:
        confidence = as_number(confidence, "confidence")
        if not 0 < confidence <= 1:
            raise ValueError(f"confidence must be above 0 and at most 1, got {confidence}.")
        outside = torch.tensor([[1 - float(confidence)]], dtype=torch.float64)
        high = min(high, float(radii(outside, 0.0, math.inf, features)) if confidence < 1 else math.inf)
        if not low < high:
            raise ValueError(f"confidence={confidence} is {high:.4g} standard deviations, expected above {low:.4g}.")
    return low, high


def radii(tail: Tensor, low: float, high: float, features: int) -> Tensor:
    """Compute quantiles of the chi distribution with D degrees of freedom, truncated to [low, high].

    Args:
        tail: Probabilities (n, 1), float64, of a radius greater than the quantile.
        low, high: Bounds in standard deviations; ``high`` may be infinite.
        features: Number of columns D.

    Returns:
        (n, 1), standard deviations, computed by bisection on the upper tail probability, which is accurate also in the tail.

    Raises:
        ValueError: The region contains less probability than float64 can represent.
    """
    half = torch.full_like(tail, features / 2)

    def beyond(radius: Tensor) -> Tensor:
        return torch.special.gammaincc(half, 0.5 * radius.square())

    near = torch.full_like(tail, low)
    # Beyond this radius the tail probability underflows.
    far = torch.full_like(tail, min(high, math.sqrt(features) + 40.0 + low))
    top, bottom = beyond(near), beyond(far) if high < math.inf else torch.zeros_like(tail)
    if not float((top - bottom).min()) > 1e-290:
        raise ValueError(
            f"the region between {low:g} and {high:g} standard deviations contains less probability than float64 can represent; "
            "pass a region closer to the mean."
        )
    target = bottom + tail * (top - bottom)
    for _ in range(80):
        middle = 0.5 * (near + far)
        outside = beyond(middle) > target
        near, far = torch.where(outside, middle, near), torch.where(outside, far, middle)
    return 0.5 * (near + far)
