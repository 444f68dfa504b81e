"""What may come in: shapes, dtypes, finiteness; every refusal says what was got, what was expected, and one remedy.

Nothing here changes its argument, so a refused call leaves every object as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "ConvergenceWarning",
    "PrecisionWarning",
    "SamplingWarning",
    "as_dtype",
    "as_points",
    "as_tensor",
    "as_weights",
    "check_finite",
    "concrete",
    "recordable",
    "recording",
]

_FLOATS = (torch.float32, torch.float64)


class ConvergenceWarning(UserWarning):
    """A fit stopped at ``max_iter`` before its tolerance was met, or its objective stopped being finite.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.ConvergenceWarning):
        ...     result = gk.fit(gk.initialise(x, 3), x, gk.EM(tol=1e-9), max_iter=2)
        >>> result.converged
        False
    """


class PrecisionWarning(UserWarning):
    """The input or what it is computed with is too coarse: steps of float32 larger than the cloud's own structure.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = 5e6 + torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.PrecisionWarning):
        ...     result = gk.fit(gk.initialise(x, 1), x.float(), gk.EM())
    """


class SamplingWarning(UserWarning):
    """Draws from a posterior are not to be trusted: weights have collapsed, trajectories diverged, or chains not met.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> means = torch.distributions.Normal(0.0, 1000.0)
        >>> prior = gk.bayes.Prior(
        ...     2, weights=torch.tensor([0.5, 0.5]), means=means, scales=1.0, covariance_type="spherical"
        ... )
        >>> x = torch.tensor([-500.0, -501.0, 500.0, 499.0])
        >>> with pytest.warns(gk.bayes.SamplingWarning):
        ...     draws = gk.bayes.importance(prior, x, draws=100, proposal="prior")
    """


def as_tensor(value: Any, *, name: str, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """Turns numbers in any container (list, numpy, DataFrame, tensor) into a float tensor, without a copy where it can.

    Args:
        value: Anything numeric. Integers and half floats are widened (to float64 and float32).
        name: How messages call it.
        dtype: Result dtype; by default float32 stays float32 and everything else becomes float64.
        device: Result device; by default where the value is.

    Raises:
        TypeError: The value is not numeric, is complex, or cannot be read as an array.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        # numpy takes no tensor that requires a gradient, and would lose it.
        value = torch.stack(tuple(value)) if len({item.shape for item in value}) == 1 else value
    if isinstance(value, Tensor):
        tensor = value
    else:
        if hasattr(value, "to_numpy"):
            value = value.to_numpy()
        try:
            array = np.asarray(value)
        except (ValueError, TypeError) as error:
            raise TypeError(f"{name} must be an array of numbers; it could not be read as one ({error}).") from None
        if array.dtype == object:
            try:
                array = array.astype(np.float64)
            except (ValueError, TypeError) as error:
                raise TypeError(
                    f"{name} must be numeric, got an array of Python objects ({error}); convert its columns to numbers first."
                ) from None
        if array.dtype.kind == "c":
            raise TypeError(f"{name} must be real, got complex numbers ({array.dtype}); pass real and imaginary parts.")
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name} must be numeric, got dtype {array.dtype}; convert its columns to numbers first.")
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
        if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
            array = array.copy()
        tensor = torch.from_numpy(array)
    if tensor.is_complex():
        raise TypeError(f"{name} must be real, got complex numbers ({tensor.dtype}); pass real and imaginary parts.")
    if dtype is None and tensor.dtype not in _FLOATS:
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else torch.float64
    return tensor.to(device=device, dtype=dtype)


def as_dtype(dtype: Any) -> torch.dtype | None:
    """A float dtype of torch from its name, or from numpy's or torch's; None stays None.

    Raises:
        ValueError: It is neither float32 nor float64.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else str(dtype) if isinstance(dtype, torch.dtype) else np.dtype(dtype).name
    found = getattr(torch, name.removeprefix("torch."), None)
    if found not in _FLOATS:
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}.")
    return found


@contextmanager
def recording() -> Iterator[None]:
    """Lets gradients be recorded, also within ``torch.no_grad`` and ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def recordable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made in ``torch.inference_mode`` where torch could not record what is done with it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def concrete(tensor: Tensor) -> bool:
    """Whether the values of a tensor can decide what is done next.

    They cannot while torch compiles or exports, and in a function that ``torch.func.vmap`` maps over a batch.
    """
    if torch.compiler.is_compiling():
        return False
    inside = torch._C._functorch
    while inside.is_functorch_wrapped_tensor(tensor):
        if inside.is_batchedtensor(tensor):
            return False
        tensor = inside.get_unwrapped(tensor)
    return True


def check_finite(tensor: Tensor, *, name: str, rows: str = "row", first: int = 0) -> None:
    """Raises a ValueError that names the first entry of ``tensor`` (whose rows count from ``first``) that is not finite."""
    if not concrete(tensor):
        return
    detached = tensor.detach()
    # A sum that is finite has finite terms; one that is not may only have overflowed.
    if bool(torch.isfinite(detached.sum())):
        return
    bad = ~torch.isfinite(detached)
    if not bool(bad.any()):
        return
    where = [int(i) for i in bad.nonzero()[0]]
    number = float(detached[tuple(where)])
    value = "NaN" if number != number else str(number)
    place = f"{rows} {first + where[0]}" + (f", column {where[1]}" if len(where) > 1 else "") if where else "it"
    raise ValueError(
        f"{name} must be finite, got {value} at {place} ({int(bad.sum())} such entries in all); "
        "drop or fill those rows first."
    )


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
        hint = "use x[:, None] for one column" if tensor.ndim == 1 else "flatten the leading dimensions"
        raise ValueError(f"{name} must have shape (N, D), got {tuple(tensor.shape)}; {hint}.")
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


def as_weights(
    weights: Any, points: Tensor, *, name: str = "weights", signed: bool = False, some: bool = True
) -> Tensor | None:
    """Checks one weight per point; None stays None (all ones).

    Args:
        weights: Weights (N,), or None.
        points: The points (N, D) they belong to; the result has their device.
        name: How messages call it.
        signed: Whether negative weights and gradients in them make sense here (sums of log-densities: yes; fits: no).
        some: Whether some must be positive (of a whole cloud: yes; of a part: no).

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
    check_finite(tensor, name=name)
    if not signed:
        if bool((tensor < 0).any()):
            row = int((tensor < 0).nonzero()[0, 0])
            raise ValueError(f"{name} must not be negative, got {float(tensor[row])} at row {row}; clip them at zero.")
        if some and not bool((tensor > 0).any()):
            raise ValueError(f"{name} must not all be zero; leave {name} out to weigh every point alike.")
    return tensor if signed else tensor.detach()


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
