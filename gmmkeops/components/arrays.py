"""Validation of tensors, and conversion of containers of numbers (lists, arrays, tables) to tensors."""

from __future__ import annotations

import decimal
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gmmkeops._checks import as_device

__all__ = [
    "as_tensor",
    "check_dense",
    "check_finite",
    "check_unmasked",
    "concrete",
    "constant",
    "mind_fork",
    "ordinary",
    "transformed",
]

_FLOATS = (torch.float32, torch.float64)

_NUMBERS = (np.dtype(np.float32), np.dtype(np.float64))

_ORDINARY = frozenset((Tensor, torch.nn.Parameter))

_COMPLEX = "{name} must be real, got complex numbers ({dtype}); pass real and imaginary parts."


def as_tensor(
    value: Any, *, name: str, dtype: torch.dtype | None = None, device: Any = None, abstract: bool = False
) -> Tensor:
    """Convert numbers in any container (list, numpy, DataFrame, tensor) to a float tensor, without a copy if possible.

    Args:
        value: Numbers. Integers are converted to float64, and half-precision floats to float32.
        name: The name of the argument in error messages.
        dtype: Dtype of the result; by default float32 stays float32 and everything else becomes float64.
        device: Device of the result; by default that of the value.
        abstract: Whether to accept tensors on the meta device, which have a shape but no values.

    Raises:
        TypeError: The value is not numeric, is complex, or is not a dense array.
        ValueError: The value has masked or missing entries.
    """
    mind_fork()
    if (
        type(value) in _ORDINARY
        and value.dtype in _FLOATS
        and (dtype is None or dtype == value.dtype)
        and device is None
        and value.layout is torch.strided
        and not value.is_nested
        and value.device.type != "meta"
    ):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        for item in value:
            check_dense(item, name=name, abstract=abstract)
        # numpy does not accept tensors that require a gradient.
        value = torch.stack(tuple(value)) if len({item.shape for item in value}) == 1 else value
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(_as_array(value, name))
    check_dense(tensor, name=name, abstract=abstract)
    if dtype is None and tensor.dtype not in _FLOATS:
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else torch.float64
    return tensor.to(device=as_device(device), dtype=dtype)


def check_dense(tensor: Tensor, *, name: str, abstract: bool = False) -> None:
    """Raise a TypeError unless a tensor is dense and real; if ``abstract``, tensors on the meta device are accepted."""
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be one dense array, got a nested tensor; stack its parts to one array (N, D) first."
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got a sparse tensor; convert it with .to_dense() first.")
    if tensor.is_quantized:
        raise TypeError(
            f"{name} must be floats or integers, got a quantized tensor; convert it with .dequantize() first."
        )
    if tensor.device.type == "meta" and not abstract:
        raise TypeError(f"{name} must contain numbers, got a tensor on the meta device; pass the data itself.")
    if tensor.is_complex():
        raise TypeError(_COMPLEX.format(name=name, dtype=str(tensor.dtype).removeprefix("torch.")))


def check_unmasked(value: np.ma.MaskedArray[Any, Any], *, name: str) -> np.ndarray:
    """Return the data of a masked array without masked entries.

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


def _as_array(value: Any, name: str) -> np.ndarray:
    """Return numbers from any container except a tensor as an array of floats, integers or booleans in native byte order."""
    if (
        type(value) is np.ndarray
        and value.dtype in _NUMBERS
        and value.flags.writeable
        and min(value.strides, default=0) >= 0
    ):
        return value
    _check_container(value, name)
    if isinstance(value, np.ma.MaskedArray):
        value = check_unmasked(value, name=name)
    elif hasattr(value, "to_numpy"):
        value = _from_table(value, name)
    try:
        array = np.asarray(value)
    except Exception:
        raise TypeError(_unreadable(value, name)) from None
    if array.dtype == object:
        array = _from_objects(array, value, name)
    kind = array.dtype.kind
    if kind == "c":
        raise TypeError(_COMPLEX.format(name=name, dtype=array.dtype))
    if kind == "V" and array.dtype.names:
        raise TypeError(
            f"{name} must be an array of numbers, got a structured array with the columns "
            f"{', '.join(map(repr, array.dtype.names))}; "
            "stack them to an array (N, D) first."
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
    """Raise a TypeError for containers that numpy would convert wrongly, or not at all."""
    kind, message = type(value).__name__, ""
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        message = "dense, got a sparse matrix; convert it with .toarray() first."
    elif isinstance(value, (Mapping, Set)) and not hasattr(value, "__array__"):
        message = f"an array of numbers, got a {kind}; stack its values as an array (N, D) first."
    elif isinstance(value, Iterator):
        message = f"an array of numbers, got a {kind}; pass a list of its rows."
    elif isinstance(value, (str, bytes, bytearray)):
        message = f"an array of numbers, got text ({value[:40]!r}); pass the numbers themselves."
    elif isinstance(value, torch.utils.data.Dataset):
        message = f"an array of numbers, got a {kind}; pass its tensor, or a DataLoader of it."
    if message:
        raise TypeError(f"{name} must be {message}")
    if isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, np.ma.MaskedArray):
                check_unmasked(part, name=name)
            elif isinstance(part, Tensor):
                check_dense(part, name=name)


def _from_table(value: Any, name: str) -> Any:
    """Return the numbers of a DataFrame, a Series or a similar table, whose columns may have different dtypes."""
    dtypes: Any = getattr(value, "dtypes", None)
    columns: Any = dtypes.items() if hasattr(dtypes, "items") else [(None, getattr(value, "dtype", None))]
    for column, dtype in columns:
        # Columns of Python objects may contain numbers; this is checked later.
        if getattr(dtype, "kind", "f") in "fiubc" or dtype == np.dtype(object):
            continue
        place = name if column is None else f"column {column!r} of {name}"
        raise TypeError(f"{place} must be numeric, got dtype {dtype}; convert them to numbers first.")
    try:
        return value.to_numpy()
    except Exception:
        raise TypeError(_unreadable(value, name)) from None


def _unreadable(value: Any, name: str) -> str:
    """Return the error message for a value that is not an array."""
    if isinstance(value, (list, tuple)) and any(np.ndim(part) > 1 for part in value if hasattr(part, "shape")):
        shapes = " and ".join(str(tuple(getattr(part, "shape", ()))) for part in value[:3])
        return (
            f"{name} must be one array, got a {type(value).__name__} of {len(value)} arrays of shapes {shapes}; pass the "
            "points alone, and weights as sample_weight."
        )
    if isinstance(value, (list, tuple)):
        return f"{name} must be one array, got a {type(value).__name__} of rows of different lengths; pass rows of equal length."
    return f"{name} must be an array of numbers, got a {type(value).__name__}; pass a two-dimensional array of numbers."


def _from_objects(array: np.ndarray, value: Any, name: str) -> np.ndarray:
    """Convert an array of Python objects to an array of numbers; all objects must be numbers."""
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
        # The estimator checks of scikit-learn search for these words.
        raise TypeError(
            f"{name} must be numeric (the argument must be free of strings and of objects that are not numbers), got a "
            f"{type(found).__name__} at {place}; convert its columns to numbers first."
        )
    try:
        return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"{name} must contain numbers within the range of float64, got larger ones; rescale them first."
        ) from None


def concrete(tensor: Tensor) -> bool:
    """Return whether Python code can read the values of a tensor, for example in an ``if`` statement.

    The values are not available while torch compiles or exports, and within ``torch.func.vmap``.
    """
    if torch.compiler.is_compiling():
        return False
    inside = torch._C._functorch
    while inside.is_functorch_wrapped_tensor(tensor):
        if inside.is_batchedtensor(tensor):
            return False
        tensor = inside.get_unwrapped(tensor)
    return True


def ordinary(*tensors: Tensor) -> bool:
    """Return whether tensors are neither of a subclass nor seen by a transformation (``torch.compile``, ``torch.func``)."""
    return not transformed() and _ORDINARY.issuperset(map(type, tensors))


def transformed() -> bool:
    """Return whether operations are seen by a transformation (``torch.compile``, ``torch.func``)."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def constant(*tensors: Tensor) -> bool:
    """Return whether tensors are ordinary ones, and no derivative with respect to them can be requested."""
    if not ordinary(*tensors) or forward_ad._current_level >= 0:
        return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors)


def _entries(count: int) -> str:
    return "1 such entry" if count == 1 else f"{count} such entries"


def check_finite(tensor: Tensor, *, name: str, rows: str = "row", first: int = 0) -> None:
    """Raise a ValueError if an entry is not finite. The message gives its row, counted from ``first``, and its column."""
    if not concrete(tensor):
        return
    mind_fork()
    detached = tensor.detach()
    # A finite sum proves that all entries are finite. A sum that is not finite may be due to overflow.
    if math.isfinite(detached.sum().item()):
        return
    bad = ~torch.isfinite(detached)
    if not bool(bad.any()):
        return
    where = [int(i) for i in bad.nonzero()[0]]
    number = float(detached[tuple(where)])
    value = "NaN" if number != number else str(number)
    place = f"{rows} {first + where[0]}" + (f", column {where[1]}" if len(where) > 1 else "") if where else "it"
    raise ValueError(
        f"{name} must be finite, got {value} at {place} ({_entries(int(bad.sum()))} in all); "
        "drop or fill those rows first."
    )


_forked = False


def _mark() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark)


def mind_fork() -> None:
    """Limit torch to one thread if this process was forked after the package was imported; later calls do nothing."""
    global _forked
    if _forked:
        _forked = False
        torch.set_num_threads(1)
