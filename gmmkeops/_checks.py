"""Validation of what users pass: settings, and containers of numbers; and the warnings of the package.

Each function returns its argument in plain types, or raises an error that says what was got, what was expected and one remedy.
"""

from __future__ import annotations

import decimal
import functools
import math
import numbers
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "ConvergenceWarning",
    "PrecisionWarning",
    "accepts",
    "as_choice",
    "as_device",
    "as_fraction",
    "as_integer",
    "as_number",
    "as_shape",
    "as_tensor",
    "check_dense",
    "check_finite",
    "check_unmasked",
    "concrete",
    "mind_fork",
    "renamed",
]


def as_integer(
    value: Any, name: str, least: int | None = None, most: int | None = None, *, clause: str | None = None
) -> int:
    """An integer within bounds.

    Args:
        value: An ``int``, or an integer of numpy or torch. Truth values and floats are refused.
        name: The name of the argument in error messages.
        least, most: The bounds, both included.
        clause: What the message says of it, in place of "must be an integer of at least ...".

    Raises:
        ValueError: It is no such integer.
    """
    truth = isinstance(value, (bool, np.bool_)) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    try:
        found = None if truth else operator.index(value)
    except Exception:
        found = None
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        bounds = {
            (True, True): f" from {least} to {most}",
            (True, False): f" of at least {least}",
            (False, True): f" of at most {most}",
            (False, False): "",
        }[least is not None, most is not None]
        raise ValueError(f"{name} {clause or f'must be an integer{bounds}'}, got {_shown(value)}.")
    return found


def as_shape(value: Any, name: str = "sample_shape") -> torch.Size:
    """A shape, from a number or a sequence of numbers.

    Raises:
        ValueError: An entry is no integer, or negative.
    """
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0
    entries = list(value) if several else [value]
    return torch.Size([as_integer(entry, name if not several else f"each entry of {name}", 0) for entry in entries])


def as_number(
    value: Any, name: str, least: float = -math.inf, *, above: bool = False, clause: str | None = None
) -> float:
    """A finite number that is not below a bound.

    Args:
        value: A number of Python, numpy or torch. Truth values and text are refused.
        name: The name of the argument in error messages.
        least: The bound.
        above: Whether the bound itself is refused.
        clause: What the message says of it, in place of "must be finite and ...".

    Raises:
        ValueError: It is no such number.
    """
    found = _real(value)
    if found is not None and math.isfinite(found) and (found > least or (found == least and not above)):
        return found
    if clause is None:
        bound = {-math.inf: "finite", 0: "positive and finite" if above else "finite and not negative"}
        clause = "must be " + bound.get(least, f"finite and {'above' if above else 'at least'} {least:g}")
        clause += ", a number" if found is None else ""
    raise ValueError(f"{name} {clause}, got {_shown(value)}.")


def as_fraction(value: Any, name: str) -> float | None:
    """A number from 0 to below 1; None stays None.

    Raises:
        ValueError: It is no such number.
    """
    found = 0.0 if value is None else _real(value)
    if found is None or not 0 <= found < 1:
        raise ValueError(f"{name} must be None or a number from 0 to below 1, got {_shown(value)}.")
    return None if value is None else found


def _real(value: Any) -> float | None:
    """A float of what is one real number, else None."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        plain = value.ndim == 0 and (value.dtype.kind in "fiu" if isinstance(value, np.ndarray) else True)
        if not plain or (isinstance(value, torch.Tensor) and (value.is_complex() or value.dtype == torch.bool)):
            return None
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_choice(value: Any, name: str, options: Sequence[str]) -> str:
    """One of some names.

    Raises:
        ValueError: It is none of them.
    """
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {_shown(value)}.")
    return value


def as_functions(value: Any, name: str) -> tuple[Callable[..., Any], ...]:
    """Functions, from one of them or several; None stands for none.

    Raises:
        TypeError: It is neither.
    """
    if value is None or callable(value):
        return () if value is None else (value,)
    several = isinstance(value, (list, tuple)) or (isinstance(value, Iterable) and not hasattr(value, "__array__"))
    found = tuple(value) if several and not isinstance(value, (str, bytes)) else (value,)
    for item in found:
        if not callable(item):
            raise TypeError(f"{name} must be a function or a list of functions, got {_shown(item)}.")
    return found


def _shown(value: Any) -> str:
    """A short form of what was got."""
    if isinstance(value, (np.number, np.bool_)):
        value = value.item()
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) and shape else "")


F = TypeVar("F", bound=Callable[..., Any])

_FLOATS = (torch.float32, torch.float64)


class ConvergenceWarning(UserWarning):
    """A fit stopped at ``max_iter`` before its tolerance was met, or its objective became infinite or NaN.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.ConvergenceWarning):
        ...     result = gk.fit(gk.initialize(x, 3), x, gk.EM(tol=1e-9), max_iter=2)
        >>> result.converged
        False
    """


class PrecisionWarning(UserWarning):
    """The numerical precision is too low for the data, for example float32 coordinates that are coarser than their structure.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = 5e6 + torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.PrecisionWarning):
        ...     result = gk.fit(gk.initialize(x, 1), x.float(), gk.EM())
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


def accepts(
    old: Mapping[str, str] | None = None,
    also: Mapping[str, str] | None = None,
    wrong: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Decorator of a function that accepts further names for its keyword arguments.

    Args:
        old: Names of version 0.1 by new ones, which cause a DeprecationWarning: ``{"weights": "sample_weight"}``.
        also: Names that are accepted without a warning: ``{"random_state": "generator"}``.
        wrong: Names in other libraries, for which the TypeError names the right one: ``{"n_clusters": "n_components"}``.
    """
    old, also, wrong = old or {}, also or {}, wrong or {}

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for name in [name for name in kwargs if name in old or name in also or name in wrong]:
                if name in wrong:
                    raise TypeError(f"{function.__name__} has no argument {name}; pass {wrong[name]}.")
                new = old.get(name) or also[name]
                if new in kwargs:
                    raise TypeError(
                        f"{function.__name__} got both {new} and {name}, which mean the same; pass {new} alone."
                    )
                if name in old:
                    warnings.warn(f"{name} is deprecated; use {new}.", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(name)
            return function(*args, **kwargs)

        return cast(F, wrapper)

    return decorate


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


_forked = False


def _mark() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark)


def mind_fork() -> None:
    """Restrict torch to one thread in a process that has been forked from one with this package, once."""
    global _forked
    if _forked:
        _forked = False
        torch.set_num_threads(1)
