"""What may come in: shapes, dtypes, finiteness; every refusal says what was got, what was expected, and one remedy.

Nothing here changes its argument, so a refused call leaves every object as it was.
"""

from __future__ import annotations

import decimal
import math
import numbers
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops._forks import mind_fork

__all__ = [
    "ConvergenceWarning",
    "PrecisionWarning",
    "SamplingWarning",
    "as_device",
    "as_dtype",
    "as_points",
    "as_tensor",
    "as_weights",
    "check_dense",
    "check_finite",
    "check_unmasked",
    "concrete",
    "recordable",
    "recording",
    "renamed",
    "shape_hint",
    "weight_unit",
]

_FLOATS = (torch.float32, torch.float64)


class ConvergenceWarning(UserWarning):
    """A fit stopped at ``max_iter`` before its tolerance was met, or its objective became infinite or NaN.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.ConvergenceWarning):
        ...     result = gk.fit(gk.initialise(x, 3), x, gk.EM(tol=1e-9), max_iter=2)
        >>> result.converged
        False
    """


class PrecisionWarning(UserWarning):
    """The numerical precision is too low for the data, for example float32 coordinates that are coarser than their structure.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = 5e6 + torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.PrecisionWarning):
        ...     result = gk.fit(gk.initialise(x, 1), x.float(), gk.EM())
    """


class SamplingWarning(UserWarning):
    """Draws from a posterior are unreliable: weights have degenerated, trajectories diverged, or chains have not mixed.

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


def as_tensor(
    value: Any, *, name: str, dtype: torch.dtype | None = None, device: Any = None, abstract: bool = False
) -> Tensor:
    """Converts numbers in any container (list, numpy, DataFrame, tensor) to a float tensor, without a copy where it can.

    Args:
        value: Anything numeric. Integers and half floats are widened (to float64 and float32).
        name: The name of the argument in error messages.
        dtype: Result dtype; by default float32 stays float32 and everything else becomes float64.
        device: Result device; by default where the value is.
        abstract: Whether a tensor on the meta device, which has a shape and no numbers, is accepted.

    Raises:
        TypeError: The value is not numeric, is complex, or is no dense array.
        ValueError: It has masked or missing entries.
    """
    mind_fork()
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        for item in value:
            check_dense(item, name=name, abstract=abstract)
        # numpy takes no tensor that requires a gradient, and would lose it.
        value = torch.stack(tuple(value)) if len({item.shape for item in value}) == 1 else value
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(_as_array(value, name))
    check_dense(tensor, name=name, abstract=abstract)
    if dtype is None and tensor.dtype not in _FLOATS:
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else torch.float64
    return tensor.to(device=as_device(device), dtype=dtype)


@contextmanager
def renamed(name: str, argument: str) -> Iterator[None]:
    """Errors about ``name`` that arise inside are about ``argument``, which the user has typed."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error)
        # "weights of scan.npy" are those of a file, whose argument may have another name.
        named = text.startswith(f"{name} ") and not text.startswith(f"{name} of ")
        if type(error) not in (TypeError, ValueError) or not named:
            raise
        raise type(error)(argument + text.removeprefix(name)) from None


def check_dense(tensor: Tensor, *, name: str, abstract: bool = False) -> None:
    """Raises a TypeError unless a tensor holds real numbers in a dense array, or would if it were not ``abstract``."""
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be one dense array, got a nested tensor; join its parts to one array (N, D) first."
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got a sparse tensor; convert it with .to_dense() first.")
    if tensor.is_quantized:
        raise TypeError(
            f"{name} must be floats or integers, got a quantized tensor; convert it with .dequantize() first."
        )
    if tensor.device.type == "meta" and not abstract:
        raise TypeError(f"{name} must hold numbers, got a tensor on the meta device, which has none; pass the data.")
    if tensor.is_complex():
        raise TypeError(_COMPLEX.format(name=name, dtype=str(tensor.dtype).removeprefix("torch.")))


def check_unmasked(value: np.ma.MaskedArray[Any, Any], *, name: str) -> np.ndarray:
    """The data of a masked array that masks nothing.

    Raises:
        ValueError: Some entries are masked.
    """
    mask: Any = np.ma.getmaskarray(value)
    masked = sum(int(mask[field].sum()) for field in mask.dtype.names) if mask.dtype.names else int(mask.sum())
    if masked:
        raise ValueError(
            f"{name} must have no masked entries, got {masked} of them; drop those rows first, or fill them with .filled()."
        )
    return np.asarray(value.data)


_COMPLEX = "{name} must be real, got complex numbers ({dtype}); pass real and imaginary parts."


def _as_array(value: Any, name: str) -> np.ndarray:
    """Numbers in any container but a tensor as an array of floats, integers or truth values in native order."""
    _check_container(value, name)
    if isinstance(value, np.ma.MaskedArray):
        value = check_unmasked(value, name=name)
    elif hasattr(value, "to_numpy"):
        value = _of_table(value, name)
    try:
        array = np.asarray(value)
    except Exception:
        raise TypeError(_unreadable(value, name)) from None
    if array.dtype == object:
        array = _of_objects(array, value, name)
    kind = array.dtype.kind
    if kind == "c":
        raise TypeError(_COMPLEX.format(name=name, dtype=array.dtype))
    if kind == "V" and array.dtype.names:
        raise TypeError(
            f"{name} must be an array of numbers, got a table of the columns {', '.join(map(repr, array.dtype.names))}; "
            "stack them side by side as an array (N, D) first."
        )
    if kind not in "fiub":
        what = {"U": "text", "S": "text", "M": "dates", "m": "durations"}.get(kind, str(array.dtype))
        raise TypeError(f"{name} must be numeric, got {what}; convert its columns to numbers first.")
    if array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):
            array = array.astype(np.float64)
    array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = array.copy()
    return array


def _check_container(value: Any, name: str) -> None:
    """Raises a TypeError for what numpy would read wrongly, or not at all."""
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise TypeError(f"{name} must be dense, got a sparse matrix; convert it with .toarray() first.")
    if isinstance(value, (Mapping, Set)) and not hasattr(value, "__array__"):
        raise TypeError(
            f"{name} must be an array of numbers, got a {type(value).__name__}; stack its values as an array (N, D) first."
        )
    if isinstance(value, Iterator):
        raise TypeError(f"{name} must be an array of numbers, got a {type(value).__name__}; pass a list of its rows.")
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"{name} must be an array of numbers, got text ({value[:40]!r}); pass the numbers themselves.")
    if isinstance(value, torch.utils.data.Dataset):
        raise TypeError(
            f"{name} must be an array of numbers, got a {type(value).__name__}; pass its tensor, or where data may be read "
            "in parts a DataLoader of it."
        )
    if isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, np.ma.MaskedArray):
                check_unmasked(part, name=name)
            elif isinstance(part, Tensor):
                check_dense(part, name=name)


def _of_table(value: Any, name: str) -> Any:
    """The numbers of a DataFrame, a Series or the like, whose columns have dtypes of their own."""
    dtypes: Any = getattr(value, "dtypes", None)
    columns: Any = dtypes.items() if hasattr(dtypes, "items") else [(None, getattr(value, "dtype", None))]
    for column, dtype in columns:
        # Columns of Python objects may hold numbers, which is seen later.
        if getattr(dtype, "kind", "f") in "fiubc" or dtype == np.dtype(object):
            continue
        place = name if column is None else f"column {column!r} of {name}"
        raise TypeError(f"{place} must be numeric, got values of kind {dtype}; convert them to numbers first.")
    try:
        return value.to_numpy()
    except Exception:
        raise TypeError(_unreadable(value, name)) from None


def _unreadable(value: Any, name: str) -> str:
    """The sentence about a value that is no array."""
    if isinstance(value, (list, tuple)) and any(np.ndim(part) > 1 for part in value if hasattr(part, "shape")):
        shapes = " and ".join(str(tuple(getattr(part, "shape", ()))) for part in value[:3])
        return (
            f"{name} must be one array, got a {type(value).__name__} of {len(value)} arrays of shapes {shapes}; pass the "
            "points alone, and weights by their own argument."
        )
    if isinstance(value, (list, tuple)):
        return f"{name} must be one array, got a {type(value).__name__} of rows that differ in length; make them equal."
    return f"{name} must be an array of numbers, got a {type(value).__name__}; pass a two-dimensional array of numbers."


def _of_objects(array: np.ndarray, value: Any, name: str) -> np.ndarray:
    """The numbers in an array of Python objects, none of which may be anything else."""
    if array.ndim == 0:
        raise TypeError(_unreadable(value, name))
    numeric = (numbers.Real, decimal.Decimal, np.bool_)
    others = {kind for kind in set(map(type, array.flat)) if not issubclass(kind, numeric)}
    if others:
        index, found = next((i, item) for i, item in enumerate(array.flat) if type(item) in others)
        where = np.unravel_index(index, array.shape)
        place = f"row {where[0]}" + (f", column {where[1]}" if len(where) > 1 else "")
        if isinstance(found, (list, tuple, np.ndarray, Tensor)):
            raise TypeError(_unreadable(value if isinstance(value, (list, tuple)) else array.tolist(), name))
        if found is None or type(found).__name__ in ("NAType", "NaTType"):
            raise ValueError(
                f"{name} must have no missing entries, got {found} at {place}; drop or fill those rows first."
            )
        if isinstance(found, numbers.Complex):
            raise TypeError(_COMPLEX.format(name=name, dtype=type(found).__name__) + f" The first is at {place}.")
        if isinstance(found, (str, bytes)):
            raise TypeError(
                f"{name} must be numeric, got text ({found[:40]!r} at {place}); convert its columns to numbers first, "
                "for example with .astype(float)."
            )
        # scikit-learn's checks of estimators look for these words.
        raise TypeError(
            f"{name} must be numeric (the argument must be free of strings and of objects that are not numbers), got a "
            f"{type(found).__name__} at {place}; convert its columns to numbers first."
        )
    try:
        return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"{name} must hold numbers that fit into float64, got some that do not; rescale them first."
        ) from None


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


def as_device(device: Any) -> torch.device | None:
    """A device that this machine has, from its name, its number or torch's own; None stays None.

    Raises:
        ValueError: There is no such device here.
    """
    if device is None:
        return None
    if isinstance(device, torch.device) and device.type == "cpu":
        return device
    try:
        if isinstance(device, bool):
            raise TypeError
        found = torch.device(device)
        if found.type != "meta":
            torch.empty(0, device=found)
            return found
    except Exception:
        pass
    raise ValueError(
        f"device must name a device of this machine such as 'cpu'{_accelerators()}, got {str(device)!r}; leave it out to "
        "compute where the data are."
    )


def _accelerators() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f" or 'cuda' (of which there are {count})" if count else " (there is no CUDA device here)"


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
    mind_fork()
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
