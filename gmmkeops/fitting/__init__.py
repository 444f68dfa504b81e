"""Fitting algorithms, initialization and checkpoints.

:func:`fit` standardizes the data and iterates a :class:`Method` such as :class:`EM` or :func:`Adam`.
"""

from gmmkeops.fitting.checkpoint import Checkpoint
from gmmkeops.fitting.em import EM
from gmmkeops.fitting.fit import fit, too_few_points
from gmmkeops.fitting.gradient import Adam, Gradient
from gmmkeops.fitting.identity import describe
from gmmkeops.fitting.initialization import SEARCHED, initialize, shared_mixture, start_of, started
from gmmkeops.fitting.levels import FIRST, Judge, Level, Levels, find_levels, sound_levels
from gmmkeops.fitting.memory import as_bytes, chunk_rows, estimate_memory
from gmmkeops.fitting.method import Evaluation, Method, check_settings
from gmmkeops.fitting.objective import Objective
from gmmkeops.fitting.result import Ending, FitResult, Report, Start, StartReport, Step
from gmmkeops.fitting.search import Search, has_few_points, sample_size, within_prior
from gmmkeops.fitting.squarem import extrapolated
from gmmkeops.fitting.state_file import known
from gmmkeops.fitting.validation import split_off

__all__ = [
    "EM",
    "FIRST",
    "SEARCHED",
    "Adam",
    "Checkpoint",
    "Ending",
    "Evaluation",
    "FitResult",
    "Gradient",
    "Judge",
    "Level",
    "Levels",
    "Method",
    "Objective",
    "Report",
    "Search",
    "Start",
    "StartReport",
    "Step",
    "as_bytes",
    "check_settings",
    "chunk_rows",
    "describe",
    "estimate_memory",
    "extrapolated",
    "find_levels",
    "fit",
    "has_few_points",
    "initialize",
    "known",
    "sample_size",
    "shared_mixture",
    "sound_levels",
    "split_off",
    "start_of",
    "started",
    "too_few_points",
    "within_prior",
]
