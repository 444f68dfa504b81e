"""Gaussian mixtures for point clouds that are too big for everybody else."""

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
