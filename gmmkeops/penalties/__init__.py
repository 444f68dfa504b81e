r"""Penalties, which are added to the mean negative log-likelihood, in nats per point.

A penalty is a function of a :class:`~gmmkeops.Mixture` in data units. Penalties can be added and multiplied by numbers, such as
``2 * SqrtWeights(20) + Dirichlet(2.0)``, and any callable that takes a mixture and returns a scalar can be used as a penalty. A
fit minimizes

.. math:: -\frac1N \sum_n \log p(x_n) + \text{penalty}(\text{mixture}, N).

Penalties that are prior densities of the parameters are proportional to 1 / N. The constraint :class:`EigenvalueFloor` has the
value zero and is enforced after every step.
"""

from gmmkeops.components import Surrogate
from gmmkeops.penalties.parameters import (
    CovariancePrior,
    EigenvalueFloor,
    InverseWishart,
    NormalInverseWishart,
    NormalMean,
    PrecisionRidge,
)
from gmmkeops.penalties.penalty import Penalty, as_penalty
from gmmkeops.penalties.weights import Dirichlet, SqrtWeights, WeightEntropy

__all__ = [
    "CovariancePrior",
    "Dirichlet",
    "EigenvalueFloor",
    "InverseWishart",
    "NormalInverseWishart",
    "NormalMean",
    "Penalty",
    "PrecisionRidge",
    "SqrtWeights",
    "Surrogate",
    "WeightEntropy",
    "as_penalty",
]
