r"""Penalties: what a fit adds to the mean negative log-likelihood, in nats per point.

A penalty is a function of a :class:`~gmmkeops.Mixture` in the user's units. Penalties add and scale,
``2 * SqrtWeights(20) + Dirichlet(2.0)``, and any callable that takes a mixture and returns a scalar is one. Priors are
densities of the parameters, so their share per point falls with the number of points N: a fit minimizes

.. math:: -\frac1N \sum_n \log p(x_n) + \text{penalty}(\text{mixture}, N).

Bounds (:class:`EigenvalueFloor`) cost nothing and are enforced after every step.
"""

from gmmkeops.components import Surrogate
from gmmkeops.penalties.parameters import (
    EigenvalueFloor,
    InverseWishart,
    NormalInverseWishart,
    NormalMean,
    PrecisionRidge,
)
from gmmkeops.penalties.penalty import Penalty, as_penalty
from gmmkeops.penalties.weights import Dirichlet, SqrtWeights, WeightEntropy

__all__ = [
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
