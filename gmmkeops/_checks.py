"""Validation of arguments, aliases of argument names, and the warnings of the package.

Each check returns its argument as a built-in type, or raises an error with the value, the expectation and a remedy.
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

__all__ = [
    "ConvergenceWarning",
    "DegenerateWarning",
    "FormerKeys",
    "FormerName",
    "PrecisionWarning",
    "accepts",
    "as_choice",
    "as_device",
    "as_fraction",
    "as_functions",
    "as_integer",
    "as_number",
    "as_shape",
    "renamed",
    "shown",
    "warn",
]

F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V")

# Code between a warning and the line of the user: this package, and what its functions are decorated with or called by.
_INSIDE = (
    *(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)),
    contextlib.__file__,
    functools.__file__,
)


class ConvergenceWarning(UserWarning):
    """Warning that a fit did not converge within ``max_iter`` iterations, or that its objective became infinite or NaN.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.ConvergenceWarning):
        ...     result = gk.fit(gk.initialize(x, 3), x, gk.EM(tol=1e-9), max_iter=2)
        >>> result.converged
        False
    """


class DegenerateWarning(UserWarning):
    """Warning that a component of a fitted mixture has fewer points than its covariance needs.

    A covariance matrix needs D + 1 points, and variances need two.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = torch.tensor([[0.0], [0.1], [0.2], [9.0]]).double()
        >>> with pytest.warns(gk.DegenerateWarning):
        ...     gk.fit(gk.initialize(x, 2, "kmeans"), x).mixture.n_components
        2
    """


class PrecisionWarning(UserWarning):
    """Warning that the numerical precision is too low for the data, for example if float32 cannot resolve them.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = 5e6 + torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.PrecisionWarning):
        ...     result = gk.fit(gk.initialize(x, 1), x.float(), gk.EM())
    """


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning that names the line of the user: the innermost one outside of this package and the libraries below it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def accepts(
    old: Mapping[str, str] | None = None,
    also: Mapping[str, str] | None = None,
    wrong: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Return a decorator for functions that accept further names of their keyword arguments.

    Args:
        old: Deprecated names and their replacements, for example ``{"weights": "sample_weight"}``.
        also: Aliases, for example ``{"random_state": "generator"}``.
        wrong: Names in other libraries, and the names that the TypeError recommends: ``{"n_clusters": "n_components"}``.
    """
    old, also, wrong = old or {}, also or {}, wrong or {}

    def decorate(function: F) -> F:
        shown = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as errors:
                for name in [name for name in kwargs if name in old or name in also or name in wrong]:
                    if name in wrong:
                        raise TypeError(f"{shown} has no argument {name}; pass {wrong[name]}.")
                    new = old.get(name) or also[name]
                    if new in kwargs:
                        raise TypeError(f"{shown} got both {new} and {name}, which are aliases; pass only {new}.")
                    if name in old:
                        warnings.warn(f"{name} is deprecated; use {new}.", DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(name)
                    # Error messages use the name that the user has typed.
                    errors.enter_context(renamed(new, name))
                return function(*args, **kwargs)

        vars(wrapper)["accepted"] = (*old, *also)
        return cast(F, wrapper)

    return decorate


class FormerName:
    """Descriptor of an attribute or a method under its name of version 0.1, which causes a DeprecationWarning.

    Args:
        new: The present name.
    """

    def __init__(self, new: str) -> None:
        self.new = new
        self.__doc__ = f"The name of ``{new}`` in version 0.1, which causes a DeprecationWarning."

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        warnings.warn(f"{self.name} is deprecated; use {self.new}.", DeprecationWarning, stacklevel=2)
        return getattr(instance, self.new)


class FormerKeys(dict[str, V]):
    """A dict that can be read by the keys of version 0.1 too, which causes a DeprecationWarning.

    Args:
        values: The items. Those under keys of version 0.1 are stored under the present keys.
        former: Present keys by those of version 0.1.
    """

    def __init__(self, values: Mapping[str, V], former: Mapping[str, str]) -> None:
        super().__init__({former.get(key, key): value for key, value in values.items()})
        self.former = former

    def __missing__(self, key: str) -> V:
        if key not in self.former:
            raise KeyError(key)
        warnings.warn(f"{key!r} is deprecated; use {self.former[key]!r}.", DeprecationWarning, stacklevel=2)
        return self[self.former[key]]


def as_integer(
    value: Any, name: str, least: int | None = None, most: int | None = None, *, clause: str | None = None
) -> int:
    """Return an integer within bounds.

    Args:
        value: An ``int``, or an integer of numpy or torch, but not a bool or a float.
        name: Name of the argument in error messages.
        least, most: Inclusive bounds.
        clause: Text that replaces "must be an integer of at least ..." in the message.

    Raises:
        ValueError: The value is not an integer within the bounds.
    """
    boolean = isinstance(value, (bool, np.bool_)) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    try:
        found = None if boolean else operator.index(value)
    except Exception:
        found = None
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        bounds = {
            (True, True): f" from {least} to {most}",
            (True, False): f" of at least {least}",
            (False, True): f" of at most {most}",
            (False, False): "",
        }[least is not None, most is not None]
        raise ValueError(f"{name} {clause or f'must be an integer{bounds}'}, got {shown(value)}.")
    return found


def as_shape(value: Any, name: str = "sample_shape") -> torch.Size:
    """Convert an integer or a sequence of integers to a shape.

    Raises:
        ValueError: An entry is not an integer, or is negative.
    """
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0
    entries = list(value) if several else [value]
    return torch.Size([as_integer(entry, name if not several else f"each entry of {name}", 0) for entry in entries])


def as_number(
    value: Any, name: str, least: float = -math.inf, *, above: bool = False, clause: str | None = None
) -> float:
    """Return a finite number that is not below a bound.

    Args:
        value: A number of Python, numpy or torch, but not a bool or a string.
        name: Name of the argument in error messages.
        least: Lower bound.
        above: Whether the bound is exclusive.
        clause: Text that replaces "must be finite and ..." in the message.

    Raises:
        ValueError: The value is not a finite number within the bound.
    """
    found = _real(value)
    if found is not None and math.isfinite(found) and (found > least or (found == least and not above)):
        return found
    if clause is None:
        bound = {-math.inf: "finite", 0: "positive and finite" if above else "finite and not negative"}
        clause = "must be " + bound.get(least, f"finite and {'above' if above else 'at least'} {least:g}")
        clause += ", a number" if found is None else ""
    raise ValueError(f"{name} {clause}, got {shown(value)}.")


def as_fraction(value: Any, name: str) -> float | None:
    """Return a number from 0 to below 1; None stays None.

    Raises:
        ValueError: The value is not a number in [0, 1).
    """
    found = 0.0 if value is None else _real(value)
    if found is None or not 0 <= found < 1:
        raise ValueError(f"{name} must be None or a number from 0 to below 1, got {shown(value)}.")
    return None if value is None else found


def _real(value: Any) -> float | None:
    """Return the value as a float if it is a single real number, else None."""
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
    """Check that a value is one of several names, and return it.

    Raises:
        ValueError: The value is not among the options.
    """
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {shown(value)}.")
    return value


def shown(value: Any) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(value, (np.number, np.bool_)):
        value = value.item()
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) and shape else "")


def as_device(device: Any) -> torch.device | None:
    """Convert a name, a number or a ``torch.device`` to an available device; None stays None.

    Raises:
        ValueError: The device is not available on this machine.
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
        f"device must be an available device such as 'cpu'{_accelerators()}, got {str(device)!r}; omit device to use that "
        "of the data."
    )


def _accelerators() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f" or 'cuda' ({count} available)" if count else " (no CUDA device is available)"


@contextmanager
def renamed(name: str, argument: str) -> Iterator[None]:
    """Replace ``name`` in errors that are raised within this context by ``argument``, the argument of the user."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error)
        # In "weights of scan.npy", the word does not refer to the argument.
        named = text.startswith(f"{name} ") and not text.startswith(f"{name} of ")
        if type(error) not in (TypeError, ValueError) or not named:
            raise
        raise type(error)(argument + text.removeprefix(name)) from None


def as_functions(value: Any, name: str) -> tuple[Callable[..., Any], ...]:
    """Convert a function or a sequence of functions to a tuple; None becomes an empty tuple.

    Raises:
        TypeError: The value is neither a function nor a sequence of functions.
    """
    if value is None or callable(value):
        return () if value is None else (value,)
    several = isinstance(value, (list, tuple)) or (isinstance(value, Iterable) and not hasattr(value, "__array__"))
    found = tuple(value) if several and not isinstance(value, (str, bytes)) else (value,)
    for item in found:
        if not callable(item):
            raise TypeError(f"{name} must be a function or a list of functions, got {shown(item)}.")
    return found
