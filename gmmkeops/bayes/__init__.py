"""Answers that carry their uncertainty: distributions of mixtures, through the reductions that fits go through."""

from gmmkeops.bayes._normal_wishart import NormalWishart
from gmmkeops.bayes._student import StudentMixture
from gmmkeops.bayes._variational import VariationalBayes

__all__ = ["NormalWishart", "StudentMixture", "VariationalBayes"]
