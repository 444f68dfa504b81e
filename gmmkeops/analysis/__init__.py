"""Analysis of fitted mixtures: model selection, comparison, and standard errors.

:func:`select` chooses the number of components by a criterion, :mod:`gmmkeops.analysis.compare` contains divergences
between mixtures, and :func:`standard_errors` computes standard errors of the parameters.
"""

from gmmkeops.analysis.compare import Estimate, jensen_shannon, kl_divergence, merge, total_variation
from gmmkeops.analysis.criteria import CRITERIA as CRITERIA
from gmmkeops.analysis.criteria import aic, aic3, anomaly_threshold, bic, icl, score
from gmmkeops.analysis.path import penalty_path
from gmmkeops.analysis.reduction import MergeTree, Reduction, reduce
from gmmkeops.analysis.selection import Selection, select
from gmmkeops.analysis.silhouette import silhouette
from gmmkeops.analysis.uncertainty import StandardErrors, standard_errors

__all__ = [
    "Estimate",
    "MergeTree",
    "Reduction",
    "Selection",
    "StandardErrors",
    "aic",
    "aic3",
    "anomaly_threshold",
    "bic",
    "icl",
    "jensen_shannon",
    "kl_divergence",
    "merge",
    "penalty_path",
    "reduce",
    "score",
    "select",
    "silhouette",
    "standard_errors",
    "total_variation",
]
