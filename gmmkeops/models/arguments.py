"""Names of keyword arguments: aliases, and the names that other libraries use."""

from __future__ import annotations

import functools
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


def accepts(also: Mapping[str, str] | None = None, wrong: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """Decorate a function so that it recognizes further names of its keyword arguments.

    Args:
        also: Aliases by the name of the argument, for example ``{"weights": "sample_weight"}``.
        wrong: Names in other libraries and the remedy that the error states, for example ``{"k": "n_components="}``.

    Returns:
        The decorator. The decorated function raises a TypeError if an argument is given by two names, or by a wrong name.
    """
    also, wrong = dict(also or {}), dict(wrong or {})

    def decorate(function: F) -> F:
        shown = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            aliases = [name for name in kwargs if name in also]
            for name in kwargs:
                if name in wrong:
                    raise TypeError(f"{shown} has no argument {name}; pass {wrong[name]}.")
            if not aliases:
                return function(*args, **kwargs)
            with ExitStack() as errors:
                for name in aliases:
                    new = also[name]
                    if new in kwargs:
                        raise TypeError(f"{shown} got both {new} and {name}, which mean the same; pass {new} alone.")
                    kwargs[new] = kwargs.pop(name)
                    # Errors name the argument that the user has typed.
                    errors.enter_context(renamed(new, name))
                return function(*args, **kwargs)

        return cast(F, wrapper)

    return decorate
