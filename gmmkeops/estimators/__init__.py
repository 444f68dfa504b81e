"""Estimators with scikit-learn's interface, and conversion from and to its mixtures.

:class:`GaussianMixture` and :class:`BayesianGaussianMixture` have scikit-learn's arguments and attributes. They call the
functions of :mod:`gmmkeops.fitting` and :mod:`gmmkeops.bayes`.
"""

from gmmkeops.estimators.bayesian import BayesianGaussianMixture
from gmmkeops.estimators.contract import NotFittedError
from gmmkeops.estimators.conversion import from_sklearn, to_sklearn
from gmmkeops.estimators.gaussian import GaussianMixture

__all__ = ["BayesianGaussianMixture", "GaussianMixture", "NotFittedError", "from_sklearn", "to_sklearn"]
