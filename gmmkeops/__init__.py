"""Gaussian mixture models for data sets that are too large for other libraries."""

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

# The public modules, and where they are.
_MODULES = {
    **{name: name for name in ("analysis", "bayes", "components", "export", "penalties", "plotting", "reductions")},
    "distributed": "data.distributed",
}
# The folders that the other public names come from. They are imported together, with torch, when the first of these names is
# used, so that the command line can report a usage error without the second or two that torch takes.
_HOMES = {
    "_checks": ("ConvergenceWarning", "PrecisionWarning"),
    "analysis": ("StandardErrors", "standard_errors"),
    "components": ("DiagonalFactor", "Factor", "FullFactor", "Moments", "SphericalFactor"),
    "data": ("Source",),
    "estimators": ("BayesianGaussianMixture", "GaussianMixture", "from_sklearn", "to_sklearn"),
    "fitting": ("EM", "Adam", "Checkpoint", "FitResult", "Gradient", "estimate_memory", "fit", "initialize"),
    "models": ("GMM", "Mixture", "load", "save"),
}
# Modules of version 0.1, and where their names are now.
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


# Names of version 0.1 with another spelling.
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
