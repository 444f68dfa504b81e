"""Models: the mixture distribution, the module with trainable parameters, and files of mixtures.

A :class:`Mixture` is a ``torch.distributions.Distribution``; a :class:`GMM` is an ``nn.Module`` that returns one. Densities are
computed by :mod:`gmmkeops.reductions`.
"""

import gmmkeops.models.pytrees  # noqa: F401  (registers mixtures and factors as pytrees)
from gmmkeops.models.arguments import COMPONENTS
from gmmkeops.models.axes import principal_axes
from gmmkeops.models.files import (
    MIXTURES,
    TABLES,
    as_path,
    check_output,
    load,
    read,
    save,
    unused_name,
    write_table,
    write_whole,
)
from gmmkeops.models.merging import (
    COSTS,
    HALF,
    MergeTree,
    cheapest_merges,
    merge_down,
    merged_by,
    merges_singly,
    noise,
    split,
)
from gmmkeops.models.mixture import Mixture, as_mixture, log_weights
from gmmkeops.models.module import GMM
from gmmkeops.models.random_state import generator_of
from gmmkeops.models.tables import html_table

__all__ = [
    "COMPONENTS",
    "COSTS",
    "GMM",
    "HALF",
    "MIXTURES",
    "TABLES",
    "MergeTree",
    "Mixture",
    "as_mixture",
    "as_path",
    "cheapest_merges",
    "check_output",
    "generator_of",
    "html_table",
    "load",
    "log_weights",
    "merge_down",
    "merged_by",
    "merges_singly",
    "noise",
    "principal_axes",
    "read",
    "save",
    "split",
    "unused_name",
    "write_table",
    "write_whole",
]
