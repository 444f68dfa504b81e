"""Data: points and weights from arrays, files, functions and several processes.

A :class:`Source` reads points chunk by chunk, with a reader for each format. The data that users pass are validated here.
:mod:`gmmkeops.data.distributed` implements sums over the ranks of ``torch.distributed``.
"""

from __future__ import annotations

import warnings
from typing import Any

from gmmkeops.data.batch import ROUNDING, Batch
from gmmkeops.data.columns import listed, table_names, table_of
from gmmkeops.data.copies import Copies
from gmmkeops.data.distributed import RankError, World, difference, join
from gmmkeops.data.generators import DEFAULT_SEED, as_generator, categorical, generator_on, running_sum
from gmmkeops.data.points import as_dtype, as_points, as_weights, warn_if_coarse, weight_unit
from gmmkeops.data.sampling import representatives, stratified_rows
from gmmkeops.data.source import NUMBERS, Source, chunked, readable
from gmmkeops.data.spread import LIMITS, NOISE, check_range, trimmed_spread
from gmmkeops.data.survey import SAMPLE, fingerprint, sample

__all__ = [
    "DEFAULT_SEED",
    "LIMITS",
    "NOISE",
    "NUMBERS",
    "ROUNDING",
    "SAMPLE",
    "Batch",
    "Copies",
    "RankError",
    "Source",
    "World",
    "as_dtype",
    "as_generator",
    "as_points",
    "as_weights",
    "categorical",
    "check_range",
    "chunked",
    "difference",
    "fingerprint",
    "generator_on",
    "join",
    "listed",
    "readable",
    "representatives",
    "running_sum",
    "sample",
    "stratified_rows",
    "table_names",
    "table_of",
    "trimmed_spread",
    "warn_if_coarse",
    "weight_unit",
]


def __getattr__(name: str) -> Any:
    if name == "Chunk":
        warnings.warn("Chunk is deprecated; use Batch.", DeprecationWarning, stacklevel=2)
        return Batch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
