"""Gaussian mixtures for point clouds that are too big for everybody else."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmmkeops import bayes, compare, distributed, export, penalties, plotting, reductions, selection
    from gmmkeops._checks import ConvergenceWarning, PrecisionWarning
    from gmmkeops.estimator import BayesianGaussianMixture, GaussianMixture
    from gmmkeops.factors import DiagonalFactor, Factor, FullFactor, SphericalFactor
    from gmmkeops.fitting import EM, Adam, Checkpoint, FitResult, Gradient, fit
    from gmmkeops.initialise import initialise
    from gmmkeops.interop import from_sklearn, to_sklearn
    from gmmkeops.io import load, save
    from gmmkeops.memory import estimate_memory
    from gmmkeops.mixture import Mixture
    from gmmkeops.module import GMM
    from gmmkeops.moments import Moments
    from gmmkeops.sources import Source
    from gmmkeops.uncertainty import StandardErrors, standard_errors

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
    "bayes",
    "compare",
    "distributed",
    "estimate_memory",
    "export",
    "fit",
    "from_sklearn",
    "initialise",
    "load",
    "penalties",
    "plotting",
    "reductions",
    "save",
    "selection",
    "standard_errors",
    "to_sklearn",
]

_MODULES = {"bayes", "compare", "distributed", "export", "penalties", "plotting", "reductions", "selection"}
# The modules that the other public names come from. They are imported together, with torch, when the first of these names is
# used, so that the command line can refuse what it does not understand without the second or two that torch takes.
_HOMES = {
    "_checks": ("ConvergenceWarning", "PrecisionWarning"),
    "estimator": ("BayesianGaussianMixture", "GaussianMixture"),
    "factors": ("DiagonalFactor", "Factor", "FullFactor", "SphericalFactor"),
    "fitting": ("EM", "Adam", "Checkpoint", "FitResult", "Gradient", "fit"),
    "initialise": ("initialise",),
    "interop": ("from_sklearn", "to_sklearn"),
    "io": ("load", "save"),
    "memory": ("estimate_memory",),
    "mixture": ("Mixture",),
    "module": ("GMM",),
    "moments": ("Moments",),
    "sources": ("Source",),
    "uncertainty": ("StandardErrors", "standard_errors"),
}


class _Package(ModuleType):
    """A package in which a public function stays itself when the module of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES.get(name, ()):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULES or (name in _HOMES and name not in __all__):
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        import_module(f"{__name__}.{module}")
    import_module(f"{__name__}._pytrees")
    for home, names in _HOMES.items():
        found = import_module(f"{__name__}.{home}")
        globals().update({public: getattr(found, public) for public in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
