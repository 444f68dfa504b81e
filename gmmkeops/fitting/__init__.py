"""Fitting: one loop, and the methods that take its steps."""

from gmmkeops.fitting._checkpoint import Checkpoint
from gmmkeops.fitting._em import EM
from gmmkeops.fitting._gradient import Adam, Gradient
from gmmkeops.fitting._loop import fit
from gmmkeops.fitting._method import Method
from gmmkeops.fitting._result import FitResult, Report, Step

__all__ = ["EM", "Adam", "Checkpoint", "FitResult", "Gradient", "Method", "Report", "Step", "fit"]
