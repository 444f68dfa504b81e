"""Estimators with scikit-learn's interface, and conversion from and to its mixtures.

:class:`GaussianMixture` and :class:`BayesianGaussianMixture` take scikit-learn's arguments and have its attributes; the
other folders do their work.
"""

from gmmkeops.estimators.bayesian import BayesianGaussianMixture
from gmmkeops.estimators.contract import NotFittedError
from gmmkeops.estimators.conversion import from_sklearn, to_sklearn
from gmmkeops.estimators.gaussian import GaussianMixture

__all__ = ["BayesianGaussianMixture", "GaussianMixture", "NotFittedError", "from_sklearn", "to_sklearn"]
