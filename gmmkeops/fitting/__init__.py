"""Fitting: one loop, the methods that take its steps, initialization, and checkpoints.

A fit transforms the data to standardized coordinates, and a :class:`Method` such as :class:`EM` or :class:`Adam` improves the
mixture step by step.
"""

from gmmkeops.fitting.checkpoint import Checkpoint, known
from gmmkeops.fitting.em import EM
from gmmkeops.fitting.frame import Frame
from gmmkeops.fitting.gradient import Adam, Gradient
from gmmkeops.fitting.identity import describe
from gmmkeops.fitting.initialization import initialise
from gmmkeops.fitting.loop import fit
from gmmkeops.fitting.memory import as_bytes, estimate_memory
from gmmkeops.fitting.method import Evaluation, Method, Population, Problem, check_settings
from gmmkeops.fitting.result import FitResult, Report, Step
from gmmkeops.fitting.stepwise import blended, expected

__all__ = [
    "EM",
    "Adam",
    "Checkpoint",
    "Evaluation",
    "FitResult",
    "Frame",
    "Gradient",
    "Method",
    "Population",
    "Problem",
    "Report",
    "Step",
    "as_bytes",
    "blended",
    "check_settings",
    "describe",
    "estimate_memory",
    "expected",
    "fit",
    "initialise",
    "known",
]
