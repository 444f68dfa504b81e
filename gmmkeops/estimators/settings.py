"""Validation of the parameters of an estimator, and their combination with the solver."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from gmmkeops._checks import as_choice, as_device, as_fraction, as_integer, as_number
from gmmkeops.components import factor_class
from gmmkeops.data import as_dtype
from gmmkeops.estimators.initialization import STRATEGIES
from gmmkeops.fitting import Method, as_bytes, describe
from gmmkeops.reductions import BACKENDS

if TYPE_CHECKING:
    from gmmkeops.estimators.base import MixtureEstimator

__all__ = ["canonical_type", "check_settings", "combined_method", "described_settings"]


# Types of values that their representation describes completely.
_SIMPLE = (bool, int, float, str, type(None))


def check_settings(estimator: MixtureEstimator) -> None:
    """Raise an error if a parameter that all estimators have is invalid.

    Raises:
        TypeError, ValueError: A parameter has the wrong type or value.
    """
    e = estimator
    for name, least in (("n_components", 1), ("max_iter", 0), ("n_init", 1), ("verbose_interval", 1)):
        if name != "n_components" or not (isinstance(e.n_components, str) and e.n_components == "auto"):
            as_integer(getattr(e, name), name, least)
    as_integer(int(e.verbose) if isinstance(e.verbose, bool) else e.verbose, "verbose", 0)
    for name in ("tol", "reg_covar"):
        as_number(getattr(e, name), name, 0, clause="must be a finite number and not negative")
    as_fraction(e.truncate, "truncate")
    as_choice(e.backend, "backend", BACKENDS)
    as_device(e.device)
    as_dtype(e.dtype)
    if e.max_memory is not None:
        as_bytes(e.max_memory)
    if e.checkpoint is not None and e.n_init > 1:
        raise ValueError(f"checkpoint stores a single fit, got n_init={e.n_init}; set n_init=1.")
    factor_class(e.covariance_type)
    as_choice(e.init_params, "init_params", list(STRATEGIES))
    if e.wanted_components is None:
        _check_automatic(e)
    prior = getattr(e, "prior", None)
    if prior is not None:
        as_choice(prior, "prior", ("auto",))


def _check_automatic(e: MixtureEstimator) -> None:
    """Raise an error if a parameter cannot be combined with ``n_components="auto"``."""
    if not hasattr(e, "prior"):
        raise ValueError(
            f"n_components must be an integer for {type(e).__name__}, got 'auto'; pass the largest number of components. Those "
            "that are not needed have almost no weight in the result."
        )
    plain: dict[str, Any] = {"n_init": 1, "init_params": "auto", "checkpoint": None, "validation": None}
    plain |= dict.fromkeys(("weights_init", "means_init", "precisions_init"))
    for name, value in plain.items():
        given = getattr(e, name)
        if given is not None if value is None else given != value:
            raise ValueError(
                f'{name} is not supported by n_components="auto"; omit it, or pass a number of components.'
            )


def combined_method(estimator: MixtureEstimator, solver: Method[Any]) -> Method[Any]:
    """Return the solver with the settings of the estimator that differ from their defaults.

    Raises:
        ValueError: The estimator and the solver have different values, or the solver does not have the setting.
    """
    theirs: dict[str, Any] = {field.name: field.default for field in fields(solver)} if is_dataclass(solver) else {}
    changed: dict[str, Any] = {}
    for name in ("max_iter", "tol", "reg_covar"):
        mine, own = getattr(estimator, name), getattr(solver, name, None)
        if mine == estimator._default(name):
            continue
        if own is None:
            raise ValueError(
                f'{name}={mine!r} is not supported by solver={type(solver).__name__}; omit {name}, or pass solver="em".'
            )
        if own not in (mine, theirs.get(name)):
            raise ValueError(
                f"{name} has two values: {name}={mine!r} of the estimator and {name}={own!r} of the solver "
                f"{type(solver).__name__}; set only one of them."
            )
        changed[name] = mine
    return _changed(solver, **changed) if changed else solver


def described_settings(method: Method[Any], penalty: Any) -> str:
    """Describe the method and the penalty without iterations and tolerance; "" if they cannot be described."""
    own = type(method)
    if penalty is None and own.__module__.startswith("gmmkeops.") and is_dataclass(method):
        parts = {field.name: getattr(method, field.name) for field in fields(method)} | {"max_iter": 0, "tol": 0.0}
        if all(type(value) in _SIMPLE for value in parts.values()):
            # This takes a tenth of the time of a description of any value.
            return f"{own.__module__}.{own.__qualname__}({parts})"
    try:
        return describe([_changed(method, max_iter=0, tol=0.0), penalty])
    except ValueError:
        return ""


def canonical_type(covariance_type: str) -> str:
    """Return the canonical name of a covariance type, such as "tied_full" for "tied"."""
    kind, tied = factor_class(covariance_type)
    return ("tied_" if tied else "") + kind.family


def _changed(method: Method[Any], **settings: Any) -> Method[Any]:
    """Return the method with changed settings."""
    if is_dataclass(method):
        return cast(Method[Any], replace(cast(Any, method), **settings))
    other = copy.copy(method)
    vars(other).update(settings)
    return other
