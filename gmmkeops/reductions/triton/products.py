"""Log-sum-exps and moments in many dimensions by matrix products, for spherical and diagonal factors.

Points are split into digits beforehand, see :mod:`gmmkeops.reductions.triton.digits`. The kernel of moments computes the
exponents again, given the log-sum-exps; it splits responsibilities into two digits and multiplies them by those of the points.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.digit_parameters import Arrays, Parameters
from gmmkeops.reductions.triton.digits import is_spherical
from gmmkeops.reductions.triton.loading import launch
from gmmkeops.reductions.triton.packing import padded
from gmmkeops.reductions.triton.partial import Piece, add_moments

__all__ = ["SCALE", "Products", "Tiling", "relative"]

# Number of rows to which points are padded: a multiple of the rows of all tiles.
_PAD = 256

# Rows of a program that splits points.
_SPLIT = 32

# Maximum memory for points that have been split, bytes and as a part of the memory of a device. They are kept if they all fit.
_SLAB, _PART = 1 << 30, 64

# Inverse of the factor of responsibilities in the kernels.
SCALE = 2.0**-14


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
        parameters: Parameters of the components, as :meth:`Parameters.of` returns them.
        values: Sizes of the kernel of log-sum-exps; by default, those for the device.
        sums: Sizes of the kernel of moments; by default, those for the device.
    """

    problem: Exponents
    parameters: Parameters
    values: Tiling | None = None
    sums: Tiling | None = None

    @cached_property
    def _arrays(self) -> Arrays:
        """The arrays of the parameters, on the device of the points."""
        return self.parameters.arrays.at(self.problem.x.device)

    @property
    def _width(self) -> int:
        """Number of columns of the digits."""
        return padded(self.problem.shape[2]) * (1 if is_spherical(self.problem) else 2)

    def _constants(self, tiling: Tiling) -> dict[str, int]:
        """Return the constants of a kernel."""
        return {
            "W": self._width, "BW": min(tiling.columns, self._width), "DIAGONAL": not is_spherical(self.problem),
            "BN": tiling.rows, "BK": tiling.components, "STAGES": tiling.stages, "warps": tiling.warps,
        }  # fmt: skip

    @property
    def _slab(self) -> int:
        """Number of rows that are split at a time."""
        memory = int(min(_SLAB, _part(self.problem.x.device)))
        return max(1, memory // (6 * self._width * _PAD)) * _PAD

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
            "products", "split", x.device, (M // _SPLIT,), x, self._arrays.grid, found.digits, found.numbers, N, M, D=D,
            P=padded(D), W=W, DIAGONAL=not is_spherical(self.problem), BN=_SPLIT, warps=4,
        )  # fmt: skip
        return found

    def logsumexps(self, out: Tensor) -> None:
        """Compute base-2 log-sum-exps (N,) into ``out``; they are less than -1e20 or NaN for points out of range."""
        N, K, _ = self.problem.shape
        tiling, p = self.values or _value_tiling(out.device), self._arrays
        for start in range(0, N, self._slab):
            part = out[start : start + self._slab]
            points, _ = self._points(slice(start, start + len(part)))
            launch(
                "products", "logsumexps", out.device, (-(-len(part) // tiling.rows),), points.digits, points.numbers, p.digits,
                p.numbers, part, len(part), K, points.numbers.shape[1], p.numbers.shape[1], **self._constants(tiling),
            )  # fmt: skip

    def moments(self, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute S0 (K,), S1 (K, D) and S2 (K, D) or (K,) about the means, float64, possibly with weights (N,).

        Args:
            values: Base-2 log-sum-exps (N,), float32.
            weights: Weights (N,), float32; None for ones.
        """
        # The copy does not wait for the kernels.
        parameters = self.parameters.beside(self._arrays)
        unit: Tensor | float = 1.0
        if weights is not None:
            weights, single = relative(weights)
            unit = single.double()
        sums = torch.zeros(self.sums_shape, dtype=torch.float64, device=values.device)
        self.add_sums(sums, values, weights)
        return parameters.moments(sums, SCALE * unit)

    @property
    def sums_shape(self) -> tuple[int, int]:
        """Shape (K, W + 4) of the sums of :meth:`add_sums`."""
        return self.problem.shape[1], self._width + 4

    def add_sums(self, sums: Tensor, values: Tensor, weights: Tensor | None) -> None:
        """Add sums of r X, of r and of r q, divided by ``SCALE``, to ``sums`` (K, W + 4), see :class:`Parameters`.

        Arguments as for :meth:`moments`, except that the largest weight is one.
        """
        tiling = self.sums or _sum_tiling(values.device, self._width)
        add_moments(
            self.problem.x, sums.T, None, tiling.chunk, lambda piece: self._partial(values, weights, piece, tiling)
        )

    def _partial(self, values: Tensor, weights: Tensor | None, piece: Piece, tiling: Tiling) -> Tensor:
        """Compute partial sums (W + 4, M) of chunks of rows."""
        p, K = self._arrays, piece.components
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
                tiling.chunk, WEIGHTED=weights is not None, **self._constants(tiling),
            )  # fmt: skip
        return part.T


def relative(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Divide weights by their largest size, so that their products with responsibilities are in the range of float16.

    Returns:
        The quotients, and the size (scalar), which is one if all weights are zero.
    """
    unit = weights.abs().amax()
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    return weights / unit, unit


@functools.cache
def _part(device: torch.device) -> float:
    """Return the part of the memory of a device that points may take that have been split, bytes."""
    return torch.cuda.get_device_properties(device).total_memory / _PART if device.type == "cuda" else math.inf


def _value_tiling(device: torch.device) -> Tiling:
    """Return the sizes of the kernel of log-sum-exps, so that its tiles fit into registers and shared memory."""
    if _capability(device) == 9:
        return Tiling(128, 64, 8, 2)
    return Tiling(32 if _capability(device) == 10 else 64, 32, 4, 2, columns=64)


def _sum_tiling(device: torch.device, width: int) -> Tiling:
    """Return the sizes of the kernel of moments, so that its tiles fit into registers and shared memory."""
    if _capability(device) == 9:
        return Tiling(64, 128, 8, 2) if width > 64 else Tiling(64, 64, 4, 3)
    return Tiling(32, 32, 4, 2, columns=64)


def _capability(device: torch.device) -> int:
    """Return the major compute capability; zero for other devices.

    Compute capability 9: products of tiles are computed by groups of four warps, from 197 KB of shared memory. Compute
    capability 10: the code of such products takes too much shared memory; it is avoided by tiles of less than 64 rows.
    """
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and torch.version.hip is None else 0
