"""Component families: what one component of a mixture is, and its sufficient statistics.

A family owns the parameterization of its precision factors. :class:`Moments` are the additive sufficient statistics of all
families; the floors keep covariances positive definite.
"""

from gmmkeops.components.base import Factor
from gmmkeops.components.diagonal import DiagonalFactor
from gmmkeops.components.families import factor_class as factor_class
from gmmkeops.components.floors import floor_eigenvalues as floor_eigenvalues
from gmmkeops.components.floors import nearest_factor as nearest_factor
from gmmkeops.components.full import FullFactor
from gmmkeops.components.moments import Moments
from gmmkeops.components.moments import like as like
from gmmkeops.components.moments import outer as outer
from gmmkeops.components.spherical import SphericalFactor

__all__ = [
    "DiagonalFactor",
    "Factor",
    "FullFactor",
    "Moments",
    "SphericalFactor",
]
