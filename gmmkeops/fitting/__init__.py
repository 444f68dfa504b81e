"""Fitting algorithms, initialization and checkpoints.

:func:`fit` standardizes the data and iterates a :class:`Method` such as :class:`EM` or :func:`Adam`.
"""

from gmmkeops.fitting.checkpoint import Checkpoint
from gmmkeops.fitting.em import EM
from gmmkeops.fitting.fit import fit
from gmmkeops.fitting.gradient import Adam, Gradient
from gmmkeops.fitting.identity import describe
from gmmkeops.fitting.initialization import initialize
from gmmkeops.fitting.memory import as_bytes, chunk_rows, estimate_memory
from gmmkeops.fitting.method import Evaluation, Method, check_settings
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.result import Ending, FitResult, Report, Step
from gmmkeops.fitting.state_file import known

__all__ = [
    "EM",
    "Adam",
    "Checkpoint",
    "Ending",
    "Evaluation",
    "FitResult",
    "Gradient",
    "Method",
    "Objective",
    "Report",
    "Step",
    "as_bytes",
    "check_settings",
    "chunk_rows",
    "describe",
    "estimate_memory",
    "fit",
    "initialize",
    "known",
]
