"""Gaussian mixture models for very large data sets."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmmkeops import analysis, bayes, components, export, penalties, plotting, reductions
    from gmmkeops._checks import ConvergenceWarning, PrecisionWarning
    from gmmkeops.analysis import StandardErrors, standard_errors
    from gmmkeops.components import DiagonalFactor, Factor, FullFactor, Moments, SphericalFactor
    from gmmkeops.data import Source, distributed
    from gmmkeops.estimators import BayesianGaussianMixture, GaussianMixture, from_sklearn, to_sklearn
    from gmmkeops.fitting import EM, Adam, Checkpoint, FitResult, Gradient, estimate_memory, initialize
    from gmmkeops.fitting.fit import fit
    from gmmkeops.models import GMM, Mixture, load, save

__version__ = "0.1.0"

__all__ = [
    "EM",
    "GMM",
    "Adam",
    "BayesianGaussianMixture",
    "Checkpoint",
    "ConvergenceWarning",
    "DegenerateWarning",
    "DiagonalFactor",
    "Factor",
    "FitResult",
    "FullFactor",
    "GaussianMixture",
    "Gradient",
    "Mixture",
    "Moments",
    "PrecisionWarning",
    "Source",
    "SphericalFactor",
    "StandardErrors",
    "analysis",
    "bayes",
    "components",
    "distributed",
    "estimate_memory",
    "export",
    "fit",
    "from_sklearn",
    "initialize",
    "load",
    "penalties",
    "plotting",
    "reductions",
    "save",
    "standard_errors",
    "to_sklearn",
]

# Public modules, and their full names.
_MODULES = {
    **{name: name for name in ("analysis", "bayes", "components", "export", "penalties", "plotting", "reductions")},
    "distributed": "data.distributed",
}
# Packages of the other public names. They are imported together when the first of these names is used, because importing torch
# takes one or two seconds, and the command line should report usage errors without this delay.
_HOMES = {
    "_checks": ("ConvergenceWarning", "DegenerateWarning", "PrecisionWarning"),
    "analysis": ("StandardErrors", "standard_errors"),
    "components": ("DiagonalFactor", "Factor", "FullFactor", "Moments", "SphericalFactor"),
    "data": ("Source",),
    "estimators": ("BayesianGaussianMixture", "GaussianMixture", "from_sklearn", "to_sklearn"),
    "fitting": ("EM", "Adam", "Checkpoint", "FitResult", "Gradient", "estimate_memory", "fit", "initialize"),
    "models": ("GMM", "Mixture", "load", "save"),
}
# Modules of version 0.1, and the modules that replace them.
_OLD_MODULES = {
    "compare": "analysis.compare",
    "doctor": "cli.doctor",
    "estimator": "estimators",
    "factors": "components",
    "interop": "estimators",
    "io": "models.files",
    "memory": "fitting.memory",
    "mixture": "models",
    "module": "models",
    "moments": "components.moments",
    "selection": "analysis.selection",
    "sources": "data",
    "uncertainty": "analysis",
}


# Names of version 0.1, and their current spelling.
_OLD_NAMES = {"initialise": "initialize"}


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        new = _OLD_NAMES[name]
        warnings.warn(f"gmmkeops.{name} is deprecated; use gmmkeops.{new}.", DeprecationWarning, stacklevel=2)
        name = new
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if name in _OLD_MODULES:
        new = _OLD_MODULES[name]
        warnings.warn(
            f"gmmkeops.{name} is deprecated; use gmmkeops.{new.split('.')[0]}.", DeprecationWarning, stacklevel=2
        )
        return import_module(f"{__name__}.{new}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home, names in _HOMES.items():
        found = import_module(f"{__name__}.{home}")
        globals().update({public: getattr(found, public) for public in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
