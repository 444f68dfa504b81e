"""Answers that carry their uncertainty: distributions of mixtures, through the reductions that fits go through."""

from gmmkeops._checks import SamplingWarning
from gmmkeops.bayes._draws import Draws
from gmmkeops.bayes._gibbs import gibbs
from gmmkeops.bayes._importance import importance
from gmmkeops.bayes._langevin import langevin
from gmmkeops.bayes._normal_wishart import NormalWishart
from gmmkeops.bayes._nuts import nuts
from gmmkeops.bayes._prior import Prior, StickBreaking
from gmmkeops.bayes._student import StudentMixture
from gmmkeops.bayes._variational import VariationalBayes

__all__ = [
    "Draws",
    "NormalWishart",
    "Prior",
    "SamplingWarning",
    "StickBreaking",
    "StudentMixture",
    "VariationalBayes",
    "gibbs",
    "importance",
    "langevin",
    "nuts",
]
