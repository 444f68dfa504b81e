r"""Points and component parameters as sums of digits that tensor cores multiply exactly, for spherical and diagonal factors.

Each number is the sum of three float16 digits of eleven significant bits, :math:`a = a_0 + a_1 + a_2`, the first of which is an
integer, and

.. math:: a b \approx a_0 b_0 + (a_0 b_1 + a_1 b_0 + a_1 b_1 + a_0 b_2 + a_2 b_0).

Tensor cores compute these products exactly and add them in float32. Sums of products of integers are exact if they are smaller
than :math:`2^{24}`, so that they may cancel with other integers.

With entries :math:`z = (x - a) / h` for a reference point a and grid widths h, and :math:`m = (\mu - a) / h`, base-2 exponents
are :math:`e = c - w q` up to constants. For spherical factors,

.. math:: q = \lVert z \rVert^2 + \lVert m \rVert^2 - 2\, z \cdot m, \qquad w = \tfrac12 \log_2 e \; u^2 h^2.

For diagonal factors, w is a unit chosen for the component, and q is a number of the component plus the product of its
coefficients and the entries :math:`(z, z^2 / 2048)` of the point.

Reference: Ozaki, Ogita, Oishi and Rump 2012, *Error-free transformations of matrix multiplication by using fast routines of
matrix multiplication and its applications*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gmmkeops.components import numbers
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.packing import LN2, family_of

__all__ = [
    "DEEPEST",
    "EXACT",
    "HALVED",
    "MOST",
    "MOST_BINARY",
    "MOST_DIAGONAL",
    "SQUARE",
    "Grid",
    "is_spherical",
    "most_spread",
    "most_unit",
    "supports",
]

# Largest numbers of features, for spherical and for diagonal factors.
MOST, MOST_DIAGONAL = 128, 64

# Factor by which squares of the entries of points are multiplied, so that they are in the range of float16.
HALVED = 2.0**-11

# Largest unit of exponents in 128 dimensions, and largest spread for few components and for many. Up to these, errors of
# log-sum-exps are about those of kernels of residuals. Errors of second moments are about 2e-6 of their largest entry; those of a
# component that is much narrower than the others are up to 1e-4 of its own. They grow in proportion. With many components, a
# tile has few points of each, which tensor cores add with smaller errors.
_UNIT, _SPREAD, _SPREAD_MANY, _MANY = 2.0**-7, 32.0, 128.0, 64

# Largest number of binary digits of a factor of points, in either direction.
MOST_BINARY = 100.0

# Expected value of a squared scaled whitened residual, log2(e) / 2.
SQUARE = 0.5 / LN2

# Distance of log-sum-exps from their usual size, nats, up to which points are in the range of the kernels; with a margin.
DEEPEST = 310.0

# Largest integer with eleven bits, and largest sum of products of integers that is exact.
_WHOLE, EXACT = 2047.0, 2.0**24


@dataclass(frozen=True)
class Grid:
    """Reference point and units of the entries of points and exponents.

    Args:
        reference: Reference point a (D,), a float32 number, data units.
        factor: Factors 1 / h (D,), float32 numbers, 1 / data units.
        units: Units w of the exponents of each component (K,), base 2.
        spread: Largest squared ratio of a coordinate of a mean and the largest standard deviation of the components in that
            feature (scalar). Cancellation multiplies the relative errors of diagonal second moments by it. It is zero for
            spherical factors.
    """

    reference: Tensor
    factor: Tensor
    units: Tensor
    spread: Tensor

    @classmethod
    def of(cls, problem: Exponents) -> Grid:
        """Choose the grid from the parameters, in float64."""
        given = problem.host or problem
        K, D = given.means.shape
        means, u = given.means + given.center, given.U.abs()
        least, most = means.aminmax(dim=0)
        reference = _reference(least, most)
        mu = (means - reference).abs()
        # Largest norm of the whitened residuals of points in range.
        norm = math.sqrt(D + 2 * (DEEPEST + math.log(K)))
        if is_spherical(problem):
            inner = mu.square().sum(1).sqrt()
            squares = inner.square() + (inner + norm / u[:, 0]).square()
            factor = _power((EXACT / squares.amax()).sqrt()).expand(D)
            return cls(reference, factor, (u[:, 0] / factor[0]).square() * SQUARE, mu.new_zeros(()))
        factor = _power(_WHOLE / (mu + norm / u).amax(0))
        # Sums of absolute values of products over the features, for points in range.
        inner = (u * mu).square().sum(1).sqrt()
        most = SQUARE * (2 * inner + norm).square()
        digits = SQUARE * (u / factor).square() * torch.maximum(2 * mu * factor, mu.new_tensor(1 / HALVED))
        # Integers of components may have more than eleven bits, of which the second digit then has the last ones.
        units = torch.maximum(most / EXACT, digits.amax(1) / (8 * _WHOLE))
        spread = (mu.amax(0) * u.amin(0)).square().amax()
        return cls(reference, factor, torch.exp2(units.log2().ceil()), spread)

    def is_accurate(self) -> bool:
        """Return whether the kernels are as accurate as those of residuals; three numbers are read from the device.

        They are not if components are narrow compared with the distances of their means, or with other components.
        """
        unit, spread, binary = numbers(self.units.amax(), self.spread, self.factor.log2().abs().amax())
        # The comparisons are false for NaN.
        K, D = len(self.units), len(self.factor)
        return binary <= MOST_BINARY and 0 < unit <= most_unit(D) and spread <= most_spread(K)


def _power(values: Tensor) -> Tensor:
    """Return the largest powers of two that are not larger than some values, by which float32 numbers are multiplied exactly."""
    return torch.exp2(values.log2().floor())


def _reference(least: Tensor, most: Tensor) -> Tensor:
    """Return float32 numbers between bounds, with so few digits that differences of float32 numbers from them are often exact."""
    unit = _power(most - least).clamp(min=torch.finfo(torch.float32).tiny)
    return ((0.5 * (least + most)) / unit).round().mul(unit).float().double()


def is_spherical(problem: Exponents) -> bool:
    """Return whether each factor is a single number, for spherical covariances."""
    return family_of(problem) == "spherical"


def supports(problem: Exponents) -> bool:
    """Return whether there are kernels for the shapes of the factors, whatever the values of the parameters are."""
    return not problem.is_full and problem.shape[2] <= (MOST if is_spherical(problem) else MOST_DIAGONAL)


def most_unit(features: int) -> float:
    """Return the largest unit of exponents for which the kernels are as accurate as those of residuals."""
    return _UNIT * math.sqrt(features / MOST)


def most_spread(components: int) -> float:
    """Return the largest spread for which the kernels are as accurate as those of residuals."""
    return _SPREAD if components < _MANY else _SPREAD_MANY
