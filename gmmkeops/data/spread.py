"""Robust center and scale of each column: mean and standard deviation of trimmed data.

Rows that are more than three standard deviations from the mean in any column are removed, repeatedly, as long as this reduces the
variance of a column to less than a quarter. Reference: Huber and Ronchetti 2009, *Robust statistics*, chapter 3 (trimming, with
the three-sigma rule as the outlier test).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["LIMITS", "NOISE", "check_range", "trimmed_spread"]

# Number of rows that are converted to float64 at a time, and maximum number of trimming steps.
_ROWS, _ROUNDS = 1 << 19, 40

# A column whose standard deviation is a smaller fraction of its mean is considered constant up to rounding errors.
NOISE = 1e-14

# Range of sums of squares without overflow and underflow.
_EXACT = (1e-250, 1e300)

# Range of lengths whose squares, and sums of many squares, are within the range of float64.
_SMALLEST, _LARGEST = 1e-150, 1e150

# These constants by the names of the arguments of the compiled library.
LIMITS = {
    "rounds": _ROUNDS,
    "largest": _LARGEST,
    "least": _EXACT[0],
    "most": _EXACT[1],
    "smallest": _SMALLEST,
    "noise": NOISE,
}


def check_range(x: Tensor) -> None:
    """Raise a ValueError if points (N, D) are so large that squared distances overflow float64."""
    if (
        x.dtype == torch.float64
        and x.numel()
        and not all(abs(value) < _LARGEST for value in torch.stack(x.aminmax()).tolist())
    ):
        row, column = divmod(int(x.abs().argmax()), x.shape[1])
        raise ValueError(
            f"x reaches {float(x[row, column]):.3g} at row {row}, column {column}, where squared distances overflow float64; "
            "rescale the columns."
        )


def trimmed_spread(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the weighted mean and standard deviation of each column without outliers.

    Args:
        x: Points (N, D), data units.
        weights: Weight of each point (N,), nonnegative, or None.

    Returns:
        Means (D,) and standard deviations (D,), float64, data units.

    Raises:
        ValueError: Squares of the points or of their standard deviations overflow or underflow float64.
    """
    check_range(x)
    whole = _moments(x, weights)
    assert whole is not None, "no point is left out"
    center, spread = whole
    for _ in range(_ROUNDS):
        # The deviation of a constant column is a rounding error, which must not decide which rows are left out.
        noise = NOISE * center.abs()
        trimmed = _moments(x, weights, within=(center, torch.maximum(3 * spread, noise)))
        if trimmed is None or not bool(((trimmed[1] < spread / 2) & (spread > noise)).any()):
            break
        center, spread = trimmed
    tiny = (spread > NOISE * center.abs()) & (spread < _SMALLEST)
    if bool(tiny.any()):
        column = int(tiny.nonzero()[0, 0])
        raise ValueError(
            f"x has a standard deviation of {float(spread[column]):.3g} in column {column}, whose square underflows float64; "
            "rescale the columns."
        )
    return center, spread


def _moments(
    x: Tensor, weights: Tensor | None, within: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """Compute mean and standard deviation of each column (D,), for all points or those within a distance of a center.

    The result is None if all points are within the distance, as in many small data sets, on a CPU. The mean is computed first and
    subtracted before squaring, so that no digits are lost far from the origin.
    """
    # On a GPU, the answer would have to be waited for.
    parts, all_within = [], within is not None and not x.is_cuda
    for i, part in enumerate(x.split(_ROWS)):
        part = part.double()
        g = part.new_ones(len(part)) if weights is None else weights[i * _ROWS : (i + 1) * _ROWS]
        if within is not None:
            outside = ((part - within[0]).abs_() > within[1]).any(1)
            all_within = all_within and not bool(outside.any())
            g = g * ~outside
        parts.append((part, g))
    if all_within:
        return None
    mass = _added(g.sum() for _, g in parts).clamp(min=1e-300)
    mean = _added(g @ part for part, g in parts) / mass
    if not x.is_cuda:
        squares = _added(g @ (part - mean).square_() for part, g in parts)
        least, most = (float(value) for value in squares.aminmax())
        if _EXACT[0] < least and most < _EXACT[1]:
            return mean, (squares / mass).sqrt_()
    # Residuals are divided by the largest one, so that their squares do not overflow or underflow.
    every = weights is None and within is None
    sizes = [_largest(part - mean, None if every else g) for part, g in parts]
    unit = sizes[0] if len(sizes) == 1 else torch.stack(sizes).amax(0)
    unit = torch.where(unit > 0, unit, 1.0)
    squares = _added(g @ (part - mean).div_(unit).square_() for part, g in parts)
    return mean, unit * (squares / mass).sqrt()


def _largest(residuals: Tensor, g: Tensor | None) -> Tensor:
    """Compute the largest absolute value of each column (D,) in the rows of positive weight; the residuals are overwritten."""
    sizes = residuals.abs_() if g is None else residuals.abs_().mul_((g > 0)[:, None])
    # This takes a half to a fifth of the time of ``amax``.
    return sizes.max(0).values


def _added(parts: Iterable[Tensor]) -> Tensor:
    """Add tensors; a single one is returned unchanged."""
    first, *others = parts
    return torch.stack([first, *others]).sum(0) if others else first
