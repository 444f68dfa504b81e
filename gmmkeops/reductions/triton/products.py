r"""Log-sum-exps and moments in many dimensions by matrix products, for spherical and diagonal factors.

Each number is the sum of three float16 digits of eleven significant bits, :math:`a = a_0 + a_1 + a_2`, the first of which is an
integer, and

.. math:: a b \approx a_0 b_0 + (a_0 b_1 + a_1 b_0 + a_1 b_1 + a_0 b_2 + a_2 b_0).

Tensor cores compute these products exactly and add them in float32. Sums of products of integers are exact if they are smaller
than :math:`2^{24}`, so that they may cancel with other integers.

With entries :math:`z = (x - a) / h` for a reference point a and grid widths h, and :math:`m = (\mu - a) / h`, base-2 exponents
are :math:`e = c - w q` up to constants. For spherical factors,

.. math:: q = \lVert z \rVert^2 + \lVert m \rVert^2 - 2\, z \cdot m, \qquad w = \tfrac12 \log_2 e \; u^2 h^2.

For diagonal factors, q is the product of (z, z²) and numbers of the component plus such a number, and w is a unit of the component.
Reference: Ozaki, Ogita, Oishi and Rump 2012, *Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication and its applications*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gmmkeops.components import numbers, transferred
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.loading import launch
from gmmkeops.reductions.triton.packing import LN2, _scaled
from gmmkeops.reductions.triton.partial import Piece, add_moments

__all__ = ["MOST", "MOST_DIAGONAL", "Products", "Tiling", "is_accurate"]

# Largest numbers of features, for spherical and for diagonal factors.
MOST, MOST_DIAGONAL = 128, 64

# Largest unit of exponents in 128 dimensions, and largest spread. Up to these, errors of log-sum-exps are at most about those of
# kernels of residuals, and errors of second moments are about 2e-6 of their largest entry. They grow in proportion.
_UNIT, _SPREAD = 2.0**-7, 128.0

# Expected value of a squared scaled whitened residual, log2(e) / 2.
_SQUARE = 0.5 / LN2

# Distance of log-sum-exps from their usual size, nats, up to which points are in the range of the kernels; with a margin.
_DEEPEST = 310.0

# Largest integers that are digits, and largest sum of products of integers that is exact.
_WHOLE, _EXACT = 2047.0, 2.0**24

# Factor of squares of the entries of points.
_HALVED = 2.0**-11

# Number of rows to which points are padded: a multiple of the rows of all tiles.
_PAD = 256

# Number of components to which parameters are padded.
_PAD_COMPONENTS = 256

# Rows of a program that splits points.
_SPLIT = 32

# Maximum memory for points that have been split, bytes. They are kept if they all fit.
_SLAB = 1 << 29

# Factor of responsibilities in the kernels.
_SCALE = 2.0**-14

# Offset of components of no weight.
_NOTHING = -3e38

@dataclass(frozen=True)
class Tiling:
    """Sizes of a kernel.

    Args:
        rows: Number of points of a tile.
        components: Number of components of a tile.
        warps: Number of warps of a program.
        stages: Number of tiles that are loaded ahead, plus one.
        columns: Number of columns of a block of a tile.
        chunk: Number of rows for each partial sum of moments, a multiple of ``rows``.
    """

    rows: int
    components: int
    warps: int
    stages: int
    columns: int = 128
    chunk: int = 2048


@dataclass(frozen=True)
class _Grid:
    """Reference point and units of the entries of points and exponents.

    Args:
        reference: Reference point a (D,), a float32 number, data units.
        factor: Factors 1 / h (D,), float32 numbers, 1 / data units.
        units: Units w of the exponents of each component (K,), base 2.
        spread: Largest squared ratio of a coordinate of a mean and the largest standard deviation of the components in that
            feature (scalar), by which digits of second moments cancel; zero for spherical factors, for which they do not.
    """

    reference: Tensor
    factor: Tensor
    units: Tensor
    spread: Tensor

    @classmethod
    def of(cls, problem: Exponents) -> _Grid:
        """Choose the grid from the parameters, in float64."""
        given = problem.host or problem
        K, D = given.means.shape
        means, u = given.means + given.center, given.U.abs()
        least, most = means.aminmax(dim=0)
        reference = _reference(least, most)
        mu = (means - reference).abs()
        # Largest norm of the whitened residuals of points in range.
        norm = math.sqrt(D + 2 * (_DEEPEST + math.log(K)))
        outer = (mu + norm / u).amax(0)
        if _is_spherical(problem):
            inner = mu.square().sum(1).sqrt()
            squares = inner.square() + (inner + norm / u[:, 0]).square()
            h = torch.maximum((squares.amax() / _EXACT).sqrt(), outer.amax() / _WHOLE)
            factor = _power(1 / h).expand(D)
            return cls(reference, factor, (u[:, 0] / factor[0]).square() * _SQUARE, mu.new_zeros(()))
        factor = _power(_WHOLE / outer)
        # Sums of absolute values of products over the features, for points in range.
        inner = (u * mu).square().sum(1).sqrt()
        most = _SQUARE * (2 * inner + norm).square()
        digits = _SQUARE * (u / factor).square() * torch.maximum(2 * mu * factor, mu.new_tensor(1 / _HALVED))
        units = torch.maximum(most / _EXACT, digits.amax(1) / _WHOLE)
        spread = (mu.amax(0) * u.amin(0)).square().amax()
        return cls(reference, factor, torch.exp2(units.log2().ceil()), spread)


def _power(values: Tensor) -> Tensor:
    """Return the largest powers of two that are not larger than some values, by which float32 numbers are multiplied exactly."""
    return torch.exp2(values.log2().floor())


def _reference(least: Tensor, most: Tensor) -> Tensor:
    """Return float32 numbers between bounds, with so few digits that differences of float32 numbers from them are often exact."""
    unit = _power(most - least).clamp(min=torch.finfo(torch.float32).tiny)
    return ((0.5 * (least + most)) / unit).round().mul(unit).float().double()


def _is_spherical(problem: Exponents) -> bool:
    return problem.U.shape[1:] == (1,)


def is_accurate(problem: Exponents) -> bool:
    """Return whether the kernels are as accurate for a problem as those of residuals.

    This is decided by the parameters only, of which two numbers are read from their device. It is false if components are narrow
    compared with the distances of their means, or with other components.
    """
    if problem.is_full or problem.shape[2] > (MOST if _is_spherical(problem) else MOST_DIAGONAL):
        return False
    grid = _Grid.of(problem)
    unit, spread = numbers(grid.units.amax(), grid.spread)
    # The comparisons are false for NaN.
    return 0 < unit <= _UNIT * math.sqrt(problem.shape[2] / MOST) and spread <= _SPREAD


@dataclass(frozen=True)
class _Parameters:
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
    def of(cls, problem: Exponents) -> _Parameters:
        """Pack the parameters, on the CPU if they are there, and copy them to the device of the points."""
        given, grid = problem.host or problem, _Grid.of(problem)
        D, w = problem.shape[2], grid.units
        P = _padded(D)
        base, *_ = _scaled(problem)
        mu = given.means + given.center - grid.reference
        m = mu * grid.factor
        if _is_spherical(problem):
            entries, own = -2 * m, m.square().sum(1)
        else:
            v = _SQUARE * (given.U / grid.factor).square() / w[:, None]
            entries, own = torch.cat([-2 * v * m, v / _HALVED], 1), (v * m.square()).sum(1)
        # The expected value is taken out of q, so that it has small rounding errors.
        J = (own - (D * _SQUARE / w).clamp(max=_EXACT)).round()
        c = (given.offsets - base) / LN2 - w * (own - J)
        digits = torch.stack([_rows(digit, D, P) for digit in _digits(entries)])
        table = c.new_zeros(3, digits.shape[1])
        table[0] = _NOTHING
        table[:, : len(c)] = torch.stack([c, w, J])
        numbers = torch.zeros(2, P, dtype=torch.float32, device=c.device)
        numbers[:, :D] = torch.stack([grid.reference, grid.factor])
        centers = digits[0, :0]
        if not _is_spherical(problem):
            centers = _rows(torch.cat([m, m.square() * _HALVED], 1).round().half(), D, P)
        arrays = [digits, table.float(), numbers, mu, grid.factor, own - J, centers]
        return cls(*transferred(arrays, problem.x.device))


def _digits(values: Tensor) -> list[Tensor]:
    """Split float64 numbers into an integer and two more float16 digits."""
    whole = values.round().half()
    middle = (values - whole.double()).half()
    return [whole, middle, (values - whole.double() - middle.double()).half()]


def _rows(values: Tensor, D: int, P: int) -> Tensor:
    """Pad values (K, D) or (K, 2 D) by zeros to P features and to a multiple of the components of all tiles."""
    K, parts = len(values), values.shape[1] // D
    found = values.new_zeros(-(-K // _PAD_COMPONENTS) * _PAD_COMPONENTS, parts, P)
    found[:K, :, :D] = values.view(K, parts, D)
    return found.view(-1, parts * P)


def _padded(D: int) -> int:
    return max(16, 1 << (D - 1).bit_length())


@dataclass(frozen=True)
class _Points:
    """Points that have been split, padded by rows of zeros.

    Args:
        digits: Digits (3, M, W), float16.
        numbers: Two numbers (2, M) for each point, float32, see :func:`gmmkeops.reductions.triton.kernels.products.split`.
    """

    digits: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Products:
    """Kernels of matrix products for the points of one problem.

    Args:
        problem: Exponents with float32 points and spherical or diagonal factors.
        values: Sizes of the kernel of log-sum-exps; by default, those for the device.
        sums: Sizes of the kernel of moments; by default, those for the device.
    """

    problem: Exponents
    values: Tiling | None = None
    sums: Tiling | None = None

    @cached_property
    def _parameters(self) -> _Parameters:
        return _Parameters.of(self.problem)

    @property
    def _width(self) -> int:
        """Number of heads of a row."""
        return _padded(self.problem.shape[2]) * (1 if _is_spherical(self.problem) else 2)

    @property
    def _slab(self) -> int:
        """Number of rows that are split at a time."""
        return max(1, _SLAB // (6 * self._width * _PAD)) * _PAD

    @cached_property
    def _all(self) -> _Points:
        """All points, where they fit into the memory for points that have been split."""
        return self._computed(slice(0, len(self.problem.x)))

    def _points(self, rows: slice) -> tuple[_Points, int]:
        """Return points that have been split, and the position of the first row of a range in them."""
        if len(self.problem.x) <= self._slab:
            return self._all, rows.start
        return self._computed(rows), 0

    def _computed(self, rows: slice) -> _Points:
        x = self.problem.x[rows]
        N, D = x.shape
        M, W = -(-N // _PAD) * _PAD, self._width
        found = _Points(torch.empty(3, M, W, dtype=torch.float16, device=x.device), x.new_empty(2, M))
        launch(
            "products", "split", x.device, (M // _SPLIT,), x, self._parameters.grid, found.digits, found.numbers, N, M, D=D,
            P=_padded(D), W=W, DIAGONAL=not _is_spherical(self.problem), BN=_SPLIT, warps=4,
        )  # fmt: skip
        return found

    def logsumexps(self, out: Tensor) -> None:
        """Compute base-2 log-sum-exps (N,) into ``out``; they are less than -1e20 or NaN for points out of range."""
        N, K, _ = self.problem.shape
        tiling, p = self.values or _value_tiling(out.device, self._width), self._parameters
        for start in range(0, N, self._slab):
            part = out[start : start + self._slab]
            points, _ = self._points(slice(start, start + len(part)))
            launch(
                "products", "logsumexps", out.device, (-(-len(part) // tiling.rows),), points.digits, points.numbers, p.digits,
                p.numbers, part, len(part), K, points.numbers.shape[1], p.numbers.shape[1], W=self._width,
                BW=min(tiling.columns, self._width), DIAGONAL=not _is_spherical(self.problem), BN=tiling.rows, BK=tiling.components, STAGES=tiling.stages,
                warps=tiling.warps,
            )  # fmt: skip

    def moments(self, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute S0 (K,), S1 (K, D) and S2 (K, D) or (K,) about the means, float64, possibly with weights (N,).

        Args:
            values: Base-2 log-sum-exps (N,), float32.
            weights: Weights (N,), float32; None for ones.
        """
        _, K, D = self.problem.shape
        W, P, p = self._width, _padded(D), self._parameters
        unit = None
        if weights is not None:
            # Products of weights and responsibilities are then in the range of float16.
            unit = weights.abs().amax()
            unit = torch.where(unit > 0, unit, torch.ones_like(unit))
            weights = weights / unit
        sums = torch.zeros(K, W + 4, dtype=torch.float64, device=values.device)
        tiling = self.sums or _sum_tiling(values.device, W)
        add_moments(
            self.problem.x, sums.T, None, tiling.chunk, lambda piece: self._partial(values, weights, piece, tiling)
        )
        sums *= _SCALE if unit is None else _SCALE * unit.double()
        S0 = sums[:, W]
        if _is_spherical(self.problem):
            S1 = torch.addcmul(sums[:, :D] / p.factor, S0[:, None], p.means, value=-1)
            return S0, S1, (sums[:, W + 1] + S0 * p.square) / p.factor[0].square()
        # Sums of r (z - a) and r (z² / 2048 - b) with the centers a and b.
        m, S0 = p.means * p.factor, S0[:, None]
        a, b = p.centers[:K, :D].double(), p.centers[:K, P : P + D].double()
        S1 = torch.addcmul(sums[:, :D], S0, a - m)
        # z² - m² = (z - m)² + 2 m (z - m).
        S2 = torch.addcmul(sums[:, P : P + D] / _HALVED, S0, b / _HALVED - m.square())
        S2 = torch.addcmul(S2, m, S1, value=-2)
        return S0[:, 0], S1 / p.factor, S2 / p.factor.square()

    def _partial(self, values: Tensor, weights: Tensor | None, piece: Piece, tiling: Tiling) -> Tensor:
        """Compute partial sums (W + 4, M) of chunks of rows."""
        p, K = self._parameters, piece.components
        part = values.new_empty(piece.columns, piece.width)
        some = max(1, self._slab // tiling.chunk)
        for first in range(0, piece.chunks, some):
            chunks = min(some, piece.chunks - first)
            start = piece.rows.start + first * tiling.chunk
            stop = min(start + chunks * tiling.chunk, len(values))
            points, place = self._points(slice(start, stop))
            level, M = values[start:stop], points.numbers.shape[1]
            launch(
                "products", "moments", values.device, (-(-K // tiling.components), chunks), points.digits[:, place:],
                points.numbers[:, place:], p.digits, p.numbers, p.centers,
                level,
                level if weights is None else weights[start:stop], part[first * K :], len(level), K, M, p.numbers.shape[1],
                tiling.chunk, W=self._width, BW=min(tiling.columns, self._width), DIAGONAL=not _is_spherical(self.problem), WEIGHTED=weights is not None,
                BN=tiling.rows, BK=tiling.components, STAGES=tiling.stages, warps=tiling.warps,
            )  # fmt: skip
        return part.T


def _value_tiling(device: torch.device, width: int) -> Tiling:
    """Return the sizes of the kernel of log-sum-exps, so that its tiles fit into registers and shared memory."""
    if _shared_memory(device) < _BIG:
        return Tiling(64, 32, 4, 2, columns=64)
    return Tiling(128, 64 if width > 64 else 128, 8, 2)


def _sum_tiling(device: torch.device, width: int) -> Tiling:
    """Return the sizes of the kernel of moments, so that its tiles fit into registers and shared memory."""
    if _shared_memory(device) < _BIG:
        return Tiling(32, 32, 4, 2, columns=64)
    return Tiling(64, 128, 8, 2)


# Shared memory of a program, bytes, from which the larger sizes fit: that of compute capabilities 9.0 and 10.0.
_BIG = 200 * 1024


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
