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

from gmmkeops.components import numbers, transferred
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.packing import _NOTHING, LN2, _scaled, family_of, padded

__all__ = ["HALVED", "MOST", "MOST_DIAGONAL", "Grid", "Parameters", "is_accurate", "is_spherical"]

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
_BINARY = 100.0

# Expected value of a squared scaled whitened residual, log2(e) / 2.
_SQUARE = 0.5 / LN2

# Distance of log-sum-exps from their usual size, nats, up to which points are in the range of the kernels; with a margin.
_DEEPEST = 310.0

# Largest integer with eleven bits, and largest sum of products of integers that is exact.
_WHOLE, _EXACT = 2047.0, 2.0**24

# Number of components to which parameters are padded: a multiple of the components of all tiles.
_PAD = 256


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
        norm = math.sqrt(D + 2 * (_DEEPEST + math.log(K)))
        if is_spherical(problem):
            inner = mu.square().sum(1).sqrt()
            squares = inner.square() + (inner + norm / u[:, 0]).square()
            factor = _power((_EXACT / squares.amax()).sqrt()).expand(D)
            return cls(reference, factor, (u[:, 0] / factor[0]).square() * _SQUARE, mu.new_zeros(()))
        factor = _power(_WHOLE / (mu + norm / u).amax(0))
        # Sums of absolute values of products over the features, for points in range.
        inner = (u * mu).square().sum(1).sqrt()
        most = _SQUARE * (2 * inner + norm).square()
        digits = _SQUARE * (u / factor).square() * torch.maximum(2 * mu * factor, mu.new_tensor(1 / HALVED))
        # Integers of components may have more than eleven bits, of which the second digit then has the last ones.
        units = torch.maximum(most / _EXACT, digits.amax(1) / (8 * _WHOLE))
        spread = (mu.amax(0) * u.amin(0)).square().amax()
        return cls(reference, factor, torch.exp2(units.log2().ceil()), spread)


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


def is_accurate(problem: Exponents) -> bool:
    """Return whether the kernels are as accurate for a problem as those of residuals.

    This is decided by the parameters only; three numbers are read from their device. It is false if components are narrow
    compared with the distances of their means, or with other components.
    """
    if problem.is_full or problem.shape[2] > (MOST if is_spherical(problem) else MOST_DIAGONAL):
        return False
    grid = Grid.of(problem)
    most = _SPREAD if problem.shape[1] < _MANY else _SPREAD_MANY
    unit, spread, binary = numbers(grid.units.amax(), grid.spread, grid.factor.log2().abs().amax())
    # The comparisons are false for NaN.
    return binary <= _BINARY and 0 < unit <= _UNIT * math.sqrt(problem.shape[2] / MOST) and spread <= most


@dataclass(frozen=True)
class Parameters:
    """Component parameters for the kernels, padded by components of no weight.

    Args:
        digits: Digits (3, KP, W), float16.
        numbers: Numbers c, w and J (3, KP) for each component, float32; J is an integer.
        grid: Reference point and factors (2, P), float32.
        means: Means relative to the reference point (K, D), data units, float64.
        factor: Factors (D,), 1 / data units, float64.
        square: Value of q for which the kernels compute zero (K,), float64.
        centers: Integers near the expected entries of points of a component (KP, W), float16; diagonal only.
    """

    digits: Tensor
    numbers: Tensor
    grid: Tensor
    means: Tensor
    factor: Tensor
    square: Tensor
    centers: Tensor

    @classmethod
    def of(cls, problem: Exponents) -> Parameters:
        """Pack the parameters, on the CPU if they are there, and copy them to the device of the points."""
        given, grid = problem.host or problem, Grid.of(problem)
        D, w = problem.shape[2], grid.units
        P = padded(D)
        base, *_ = _scaled(problem)
        mu = given.means + given.center - grid.reference
        m = mu * grid.factor
        if is_spherical(problem):
            entries, own = -2 * m, m.square().sum(1)
        else:
            v = _SQUARE * (given.U / grid.factor).square() / w[:, None]
            entries, own = torch.cat([-2 * v * m, v / HALVED], 1), (v * m.square()).sum(1)
        # The expected value is taken out of q, so that it has small rounding errors.
        J = (own - (D * _SQUARE / w).clamp(max=_EXACT)).round()
        c = (given.offsets - base) / LN2 - w * (own - J)
        digits = torch.stack([_rows(digit, D, P) for digit in _digits(entries)])
        table = c.new_zeros(3, digits.shape[1])
        table[0] = _NOTHING
        table[:, : len(c)] = torch.stack([c, w, J])
        units = torch.zeros(2, P, dtype=torch.float32, device=c.device)
        units[:, :D] = torch.stack([grid.reference, grid.factor])
        centers = digits[0, :0]
        if not is_spherical(problem):
            centers = _rows(torch.cat([m, m.square() * HALVED], 1).round().half(), D, P)
        arrays = [digits, table.float(), units, mu, grid.factor, own - J, centers]
        return cls(*transferred(arrays, problem.x.device))


def _digits(values: Tensor) -> list[Tensor]:
    """Split float64 numbers into an integer and two more float16 digits."""
    whole = values.round().half()
    middle = (values - whole.double()).half()
    return [whole, middle, (values - whole.double() - middle.double()).half()]


def _rows(values: Tensor, D: int, P: int) -> Tensor:
    """Pad values (K, D) or (K, 2 D) by zeros to P features and to a multiple of the components of all tiles."""
    K, parts = len(values), values.shape[1] // D
    found = values.new_zeros(-(-K // _PAD) * _PAD, parts, P)
    found[:K, :, :D] = values.view(K, parts, D)
    return found.view(-1, parts * P)
