"""Bayesian inference for Gaussian mixtures: variational Bayes, Markov chain Monte Carlo and importance sampling."""

from gmmkeops.bayes.sampling.draws import Draws, SamplingWarning
from gmmkeops.bayes.sampling.gibbs import gibbs
from gmmkeops.bayes.sampling.importance import importance
from gmmkeops.bayes.sampling.langevin import langevin
from gmmkeops.bayes.sampling.nuts import nuts
from gmmkeops.bayes.sampling.prior import Prior, StickBreaking
from gmmkeops.bayes.variational.method import VariationalBayes
from gmmkeops.bayes.variational.normal_wishart import NormalWishart
from gmmkeops.bayes.variational.student import StudentMixture

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
