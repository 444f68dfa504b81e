"""Checks of settings: numbers, names, functions and sources of randomness, in the words of the argument that the user typed.

Each returns its argument in plain types, or raises an error that says what was got, what was expected and one remedy.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

__all__ = [
    "as_choice",
    "as_fraction",
    "as_functions",
    "as_integer",
    "as_number",
    "as_shape",
    "check_settings",
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


def check_settings(method: Any) -> None:
    """Checks what all methods are constructed with.

    Raises:
        ValueError: A setting is out of its range.
    """
    if method.batch_size is not None:
        as_integer(method.batch_size, "batch_size")
        as_integer(method.batch_size, "batch_size", 1, clause="must be at least 1")
    as_integer(method.max_iter, "max_iter", 0)
    as_integer(method.patience, "patience", 1)
    as_number(method.tol, "tol", 0)
    as_number(method.relative_tol, "relative_tol", 0)
