"""Names of keyword arguments: aliases, and the names that other libraries use."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar, cast

from gmmkeops._checks import renamed

__all__ = ["COMPONENTS", "MIXTURE", "accepts"]

F = TypeVar("F", bound=Callable[..., Any])

# Names of the number of components in other libraries.
COMPONENTS = dict.fromkeys(
    ("K", "k", "n_clusters", "n_gaussians", "n_mixtures", "num_clusters", "num_components", "num_mixtures"),
    "n_components=",
)

# Names of the parameters of a mixture in other libraries, and the remedy.
MIXTURE = dict.fromkeys(("probs", "pi", "weight", "coefficients"), "weights=")
MIXTURE |= dict.fromkeys(("loc", "locs", "mu", "mus", "mean", "centers"), "means=")
MIXTURE |= dict.fromkeys(("covariance", "covariance_matrix", "covs", "cov", "sigma", "Sigma"), "covariances=")
MIXTURE |= {
    "precisions": "factor=, for example gmmkeops.FullFactor.from_precisions(precisions)",
    "scale_tril": "factor=, for example gmmkeops.FullFactor.from_cholesky(scale_tril)",
    "precisions_cholesky": "factor=, for example gmmkeops.FullFactor.from_factors(precisions_cholesky)",
    "covariance_types": "covariance_type=",
}
MIXTURE |= dict.fromkeys(
    ("K", "k", "n_clusters", "n_components", "n_mixtures", "num_components", "components"),
    "weights=, means= and covariances= of the components, or use gmmkeops.GaussianMixture(n_components=...) to fit them",
)


def accepts(
    old: Mapping[str, str] | None = None,
    also: Mapping[str, str] | None = None,
    wrong: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Decorate a function so that it recognizes further names of its keyword arguments.

    Args:
        old: Names of version 0.1 by the new one, which cause a DeprecationWarning: ``{"components": "n_components"}``.
        also: Names that are accepted without a warning: ``{"random_state": "generator"}``.
        wrong: Names in other libraries and the remedy that the error states: ``{"n_clusters": "n_components="}``.

    Returns:
        The decorator. The decorated function raises a TypeError if an argument is given by two names, or by a wrong name.
    """
    old, wrong = dict(old or {}), dict(wrong or {})
    names = old | dict(also or {})

    def decorate(function: F) -> F:
        shown = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in wrong:
                    raise TypeError(f"{shown} has no argument {name}; pass {wrong[name]}.")
            aliases = [name for name in kwargs if name in names]
            if not aliases:
                return function(*args, **kwargs)
            with ExitStack() as errors:
                for name in aliases:
                    new = names[name]
                    if new in kwargs:
                        raise TypeError(f"{shown} got both {new} and {name}, which mean the same; pass {new} alone.")
                    if name in old:
                        warnings.warn(f"{name} is deprecated; use {new}.", DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(name)
                    # Errors name the argument that the user has typed.
                    errors.enter_context(renamed(new, name))
                return function(*args, **kwargs)

        return cast(F, wrapper)

    return decorate
