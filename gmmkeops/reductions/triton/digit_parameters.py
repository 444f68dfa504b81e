"""Component parameters as digits, in the arrays that the kernels of products read, and the moments from their sums.

Parameters on the CPU are packed by one call of the compiled library, and copied to the device of the points in one transfer.
Another call converts the sums of moments on the CPU. Without the library and on other devices, torch does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gmmkeops.components import transfer_memory, transferred
from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.library import OUT_OF_MEMORY, DigitCall, reason, run
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.digits import (
    DEEPEST,
    EXACT,
    HALVED,
    MOST_BINARY,
    SQUARE,
    Grid,
    is_spherical,
    most_spread,
    most_unit,
    supports,
)
from gmmkeops.reductions.triton.packing import LN2, NOTHING, Scale, padded

__all__ = ["Arrays", "Parameters"]

# Number of components to which parameters are padded: a multiple of the components of all tiles.
_PAD = 256


@dataclass(frozen=True)
class Arrays:
    """Arrays that the kernels read, padded by components of no weight, in one block of memory.

    Args:
        memory: The block (bytes,), uint8.
        rows: Number of components with padding KP.
        features: Number of features with padding P.
        diagonal: Whether the factors are diagonal, so that there are W = 2 P coefficients; otherwise W = P.
    """

    memory: Tensor
    rows: int
    features: int
    diagonal: bool

    @classmethod
    def empty(cls, problem: Exponents, device: torch.device) -> Arrays:
        """Return arrays of undefined numbers for the parameters of a problem."""
        _, K, D = problem.shape
        rows, P, diagonal = -(-K // _PAD) * _PAD, padded(D), not is_spherical(problem)
        count = sum(cls._sizes(rows, P, diagonal))
        if device.type == "cpu":
            return cls(transfer_memory((count,), problem.x.device, torch.uint8), rows, P, diagonal)
        return cls(torch.empty(count, dtype=torch.uint8, device=device), rows, P, diagonal)

    @staticmethod
    def _sizes(rows: int, features: int, diagonal: bool) -> list[int]:
        """Return the numbers of bytes of digits, centers, numbers and grid."""
        W = features * (2 if diagonal else 1)
        return [6 * rows * W, 2 * rows * W * diagonal, 12 * rows, 8 * features]

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        digits, centers, numbers, grid = self.memory.split(self._sizes(self.rows, self.features, self.diagonal))
        W, KP = self.features * (2 if self.diagonal else 1), self.rows
        return (
            digits.view(torch.float16).view(3, KP, W),
            centers.view(torch.float16).view(-1, W),
            numbers.view(torch.float32).view(3, KP),
            grid.view(torch.float32).view(2, self.features),
        )

    @property
    def digits(self) -> Tensor:
        """Digits (3, KP, W), float16."""
        return self._parts[0]

    @property
    def centers(self) -> Tensor:
        """Integers near the expected entries of points of a component (KP, W), float16; (0, W) for spherical factors."""
        return self._parts[1]

    @property
    def numbers(self) -> Tensor:
        """Numbers c, w and J (3, KP) for each component, float32; J is an integer."""
        return self._parts[2]

    @property
    def grid(self) -> Tensor:
        """Reference point and factors (2, P), float32."""
        return self._parts[3]

    def at(self, device: torch.device) -> Arrays:
        """Copy the arrays to a device, in one transfer."""
        memory = self.memory.to(device)
        return self if memory is self.memory else Arrays(memory, self.rows, self.features, self.diagonal)


@dataclass(frozen=True)
class Parameters:
    """Component parameters on the device on which they were packed: the CPU if they are there.

    Args:
        arrays: Arrays that the kernels read.
        device: Device of the points.
        means: Means relative to the reference point (K, D), data units, float64.
        factor: Factors (D,), 1 / data units, float64.
        square: Value of q for which the kernels compute zero (K,), float64.
    """

    arrays: Arrays
    device: torch.device
    means: Tensor
    factor: Tensor
    square: Tensor

    @classmethod
    def of(cls, problem: Exponents) -> Parameters | None:
        """Pack the parameters; None if the kernels would be less accurate than those of residuals.

        Three numbers are read from the device of the parameters, if that is not the CPU.
        """
        if not supports(problem):
            return None
        if (problem.host or problem).means.device.type == "cpu" and reason() is None:
            return cls._compiled(problem)
        grid = Grid.of(problem)
        return cls._of_torch(problem, grid) if grid.is_accurate() else None

    @classmethod
    def _compiled(cls, problem: Exponents) -> Parameters | None:
        """Pack parameters on the CPU by the compiled library."""
        given, (_, K, D) = problem.host or problem, problem.shape
        device = problem.x.device
        arrays = Arrays.empty(problem, given.means.device)
        found = cls(arrays, device, *(transfer_memory(shape, device) for shape in ((K, D), (D,), (K,))))
        U = given.U
        shared = K > 1 and U.stride(0) == 0
        kept = [part.contiguous() for part in (given.offsets, given.means, U[:1] if shared else U, given.center)]
        call = found._call()
        call.offsets, call.means, call.factor, call.center = (part.data_ptr() for part in kept)
        call.factor_stride = 0 if shared else U[0].numel()
        call.depth, call.most_binary = DEEPEST, MOST_BINARY
        call.most_unit, call.most_spread = most_unit(D), most_spread(K)
        _run("gmmkeops_pack_digits", call)
        return found if call.accurate else None

    @classmethod
    def _of_torch(cls, problem: Exponents, grid: Grid) -> Parameters:
        """Pack the parameters by torch, on their device."""
        given, (_, K, D), w = problem.host or problem, problem.shape, grid.units
        mu = given.means + given.center - grid.reference
        m = mu * grid.factor
        if is_spherical(problem):
            entries, own = -2 * m, m.square().sum(1)
        else:
            v = SQUARE * (given.U / grid.factor).square() / w[:, None]
            entries, own = torch.cat([-2 * v * m, v / HALVED], 1), (v * m.square()).sum(1)
        # The expected value is taken out of q, so that it has small rounding errors.
        J = (own - (D * SQUARE / w).clamp(max=EXACT)).round()
        c = (given.offsets - Scale.of(problem).base) / LN2 - w * (own - J)
        arrays = Arrays.empty(problem, mu.device)
        arrays.memory.zero_()
        parts = entries.shape[1] // D
        for found, digit in zip(arrays.digits, _digits(entries), strict=True):
            found.view(-1, parts, arrays.features)[:K, :, :D] = digit.view(K, parts, D)
        if arrays.diagonal:
            centers = torch.stack([m, m.square() * HALVED], 1).round()
            arrays.centers.view(-1, parts, arrays.features)[:K, :, :D] = centers
        arrays.numbers[0, K:] = NOTHING
        arrays.numbers[:, :K] = torch.stack([c, w, J])
        arrays.grid[:, :D] = torch.stack([grid.reference, grid.factor])
        return cls(arrays, problem.x.device, mu, grid.factor, own - J)

    def beside(self, arrays: Arrays) -> Parameters:
        """Copy the parameters to the device of a copy of the arrays, in one transfer."""
        return Parameters(
            arrays, self.device, *transferred([self.means, self.factor, self.square], arrays.memory.device)
        )

    def moments(self, sums: Tensor, unit: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Convert sums (K, W + 4) to S0 (K,), S1 (K, D) and S2 (K, D) or (K,) about the means, float64, on the same device.

        Args:
            sums: Sums of r X, of r and of r q, float64, contiguous; X are the entries of points or, for diagonal factors, their
                differences from the centers.
            unit: Factor of the sums; a number for sums on the CPU.
        """
        if sums.device.type == "cpu" and reason() is None:
            return self._moments_compiled(sums, float(unit))
        (K, D), P, W = self.means.shape, self.arrays.features, sums.shape[1] - 4
        sums = sums * unit
        S0 = sums[:, W]
        if not self.arrays.diagonal:
            S1 = torch.addcmul(sums[:, :D] / self.factor, S0[:, None], self.means, value=-1)
            return S0, S1, (sums[:, W + 1] + S0 * self.square) / self.factor[0].square()
        # Sums of r (z - a) and r (z² / 2048 - b) with the centers a and b.
        m, S0 = self.means * self.factor, S0[:, None]
        centers = self.arrays.centers[:K].double()
        a, b = centers[:, :D], centers[:, P : P + D]
        S1 = torch.addcmul(sums[:, :D], S0, a - m)
        # z² - m² = (z - m)² + 2 m (z - m).
        S2 = torch.addcmul(sums[:, P : P + D] / HALVED, S0, b / HALVED - m.square())
        S2 = torch.addcmul(S2, m, S1, value=-2)
        return S0[:, 0], S1 / self.factor, S2 / self.factor.square()

    def _moments_compiled(self, sums: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor]:
        """Convert sums on the CPU by the compiled library."""
        K, D = self.means.shape
        S0, S1 = transfer_memory((K,), self.device), transfer_memory((K, D), self.device)
        S2 = transfer_memory(S1.shape if self.arrays.diagonal else S0.shape, self.device)
        call = self._call()
        call.sums, call.unit = sums.data_ptr(), unit
        call.S0, call.S1, call.S2 = (part.data_ptr() for part in (S0, S1, S2))
        _run("gmmkeops_unpack_digits", call)
        return S0, S1, S2

    def _call(self) -> DigitCall:
        """Return the arguments that both functions of the library have."""
        arrays, (K, D) = self.arrays, self.means.shape
        pointers = {name: getattr(arrays, name).data_ptr() for name in ("digits", "centers", "numbers", "grid")}
        return DigitCall(
            spherical=not arrays.diagonal,
            threads=cores(),
            components=K,
            dimensions=D,
            rows=arrays.rows,
            padded=arrays.features,
            mean=self.means.data_ptr(),
            scale=self.factor.data_ptr(),
            square=self.square.data_ptr(),
            **pointers,
        )


def _run(function: str, call: DigitCall) -> None:
    if run(function, call) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory for the parameters of {call.components} components.")


def _digits(values: Tensor) -> list[Tensor]:
    """Split float64 numbers into an integer and two more float16 digits."""
    whole = values.round().half()
    middle = (values - whole.double()).half()
    return [whole, middle, (values - whole.double() - middle.double()).half()]
