"""Component families (full, diagonal, spherical), sufficient statistics, and the M-step.

A family (:class:`Factor`) defines the parameterization of its precision factors and all operations that depend on it.
:class:`Moments` are the additive sufficient statistics of all families.
"""

from gmmkeops.components.arrays import as_tensor as as_tensor
from gmmkeops.components.arrays import check_dense as check_dense
from gmmkeops.components.arrays import check_finite as check_finite
from gmmkeops.components.arrays import check_unmasked as check_unmasked
from gmmkeops.components.arrays import concrete as concrete
from gmmkeops.components.arrays import constant as constant
from gmmkeops.components.arrays import mind_fork as mind_fork
from gmmkeops.components.arrays import ordinary as ordinary
from gmmkeops.components.base import FAMILIES as FAMILIES
from gmmkeops.components.base import Factor
from gmmkeops.components.diagonal import DiagonalFactor
from gmmkeops.components.families import factor_class as factor_class
from gmmkeops.components.families import families as families
from gmmkeops.components.full import FullFactor
from gmmkeops.components.full import bartlett as bartlett
from gmmkeops.components.m_step import Frozen as Frozen
from gmmkeops.components.m_step import MStep as MStep
from gmmkeops.components.m_step import Surrogate as Surrogate
from gmmkeops.components.m_step import m_step as m_step
from gmmkeops.components.m_step import solve_weights as solve_weights
from gmmkeops.components.moments import Moments
from gmmkeops.components.parameters import gamma as gamma
from gmmkeops.components.spherical import SphericalFactor
from gmmkeops.components.transfer import numbers as numbers
from gmmkeops.components.transfer import transfer_memory as transfer_memory
from gmmkeops.components.transfer import transferred as transferred

__all__ = [
    "DiagonalFactor",
    "Factor",
    "FullFactor",
    "Moments",
    "SphericalFactor",
]
