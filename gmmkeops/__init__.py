"""Gaussian mixtures for point clouds that are too big for everybody else."""

from gmmkeops import reductions
from gmmkeops._checks import ConvergenceWarning, PrecisionWarning
from gmmkeops.factors import DiagonalFactor, Factor, FullFactor, SphericalFactor
from gmmkeops.moments import Moments
