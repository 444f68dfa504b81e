r"""Reductions by kernels that compute the residuals :math:`x_n - \mu_k` of each pair of point and component.

A thread owns points, or components for moments. The number of blocks of partial sums is limited by their memory, and they are
added in float64 without atomic operations, so that results are reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gmmkeops.components import numbers, transferred
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.compiled import CompiledRecords
from gmmkeops.reductions.triton.digit_parameters import Parameters
from gmmkeops.reductions.triton.digits import supports
from gmmkeops.reductions.triton.loading import launch
from gmmkeops.reductions.triton.packing import LN2, Blocks, Packed, Scale, family_of, symmetric_places
from gmmkeops.reductions.triton.partial import SLAB, Piece, add_moments, add_up
from gmmkeops.reductions.triton.products import Products
from gmmkeops.reductions.triton.tiles import Tiles
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = ["FEW", "FEW_FULL", "NO_LABEL", "NO_SHARE", "Residuals", "admits_digits"]

# Largest number of features whose moments a thread holds in registers, for diagonal or spherical and for full factors; and the
# largest for which log-sum-exps with full factors take fewer instructions without tensor cores (of sm_90, for each pair, without
# and with them: D = 20: 326 and 516; D = 32: 906 and 452).
FEW, FEW_FULL, _SOME_FULL = 32, 8, 20

# Smallest numbers of features and of components for which products of digits are used. H200, 1e6 points and 1000 components, log-
# sum-exps and moments: spherical D = 128: 3.0 + 5.0 ms, tiles 57 + 72 ms; diagonal D = 32: 1.6 + 2.9 ms, residuals 11 + 16 ms.
_DIGITS, _COMPONENTS = 17, 16

# Sum of responsibilities, as a fraction of the total weight if all weights are equal, from which two digits of them suffice:
# responsibilities below 2^-39 are lost.
_WEAK = 2.0**-22

# Number of components in an unrolled step of a loop over components, and of points in one over points.
_UNROLL = 4

# Threads of a warp, and largest number of warps of a program of a kernel that owns points.
_WARP, _WARPS = 32, 4

# Number of rows for each partial sum in the dtype of the points.
_CHUNK = 256

# Base-2 log-sum-exp of rows that have no part in the moments, and their label.
NO_SHARE, NO_LABEL = 1e30, -1


@dataclass(frozen=True)
class Residuals:
    """Points and packed parameters, and the schedules whose row ranges are evaluated.

    Args:
        problem: Exponents.
        digits: Whether products of digits may be used for all pairs.
    """

    problem: Exponents
    digits: bool = True

    @cached_property
    def packed(self) -> Packed:
        """The component parameters, in the dtype of the points, padded for every number of unrolled steps."""
        if self.compiled is not None:
            return Packed.of_compiled(self.problem, self.compiled)
        return Packed.of(self.problem, _UNROLL)

    @cached_property
    def compiled(self) -> CompiledRecords | None:
        """The component parameters as the compiled library has packed them on the CPU; None if it has not."""
        return CompiledRecords.of(self.problem, family_of(self.problem), _UNROLL)

    @cached_property
    def scale(self) -> Scale:
        """Number that base-2 exponents are relative to, and their usual size."""
        return Scale.of(self.problem)

    def condition(self) -> tuple[float, bool]:
        """Return a bound on the condition numbers of full factors, and whether they are upper triangular."""
        if not self.problem.is_full:
            return 1.0, True
        if self.compiled is not None:
            return self.compiled.condition, True
        U = (self.problem.host or self.problem).U
        inverse, _ = torch.linalg.inv_ex(U)
        # The row sums of |Uᵀ| |U⁻ᵀ|.
        bound = (U.abs() * inverse.abs().sum(1)[:, :, None]).sum(1).amax()
        bound, below = numbers(bound, U.tril(-1).abs().amax())
        return bound, not below

    def logsumexps(self, out: Tensor, schedule: Schedule | None) -> Tensor | None:
        """Compute base-2 log-sum-exps (N,) into ``out``; return their minima (S,), nats, over the row ranges of a schedule.

        The minima over all leaves of a kd-tree are left to :func:`gmmkeops.reductions.triton.lists.checked`.
        """
        if schedule is None and self.products is not None:
            self.products.logsumexps(out)
            return None
        if self._tiles is not None and self.problem.is_full and self.problem.shape[2] > _SOME_FULL:
            least = self._tiles.logsumexps(out, schedule)
            return None if least is None else self.scale.nats(least)
        return self._rows("logsumexps", schedule, out, noted=True)

    def largest(self, out: Tensor, labels: Tensor, schedule: Schedule | None) -> Tensor | None:
        """Compute the largest base-2 exponents (N, k) and their components (N, k), int32; minima as for log-sum-exps."""
        return self._rows("largest", schedule, out, labels, noted=True, TOP=out.shape[1])

    def draws(self, values: Tensor, uniform: Tensor, labels: Tensor, schedules: Sequence[Schedule] | None) -> None:
        """Draw components (N,), int32, given base-2 log-sum-exps (N,) and numbers in (0, 1] (N,)."""
        for schedule in [None] if schedules is None else schedules:
            self._rows("draws", schedule, values, uniform, labels)

    def gradients(self, values: Tensor, schedules: Sequence[Schedule] | None) -> Tensor:
        """Compute the gradients (N, D) of the log-sum-exps with respect to the points, given base-2 log-sum-exps (N,)."""
        found = torch.empty_like(self.problem.x)
        for schedule in [None] if schedules is None else schedules:
            self._rows("gradients", schedule, values, found)
        return found.mul_(-2 * LN2)

    def _rows(
        self, kernel: str, schedule: Schedule | None, *tensors: Tensor, noted: bool = False, **constants: int
    ) -> Tensor | None:
        """Launch a kernel of which each thread owns some points; return minima of row ranges if they are noted."""
        problem, packed = self.problem, self.packed
        N, K, D = problem.shape
        rows, unroll = _row_block(problem, kernel == "gradients" or constants.get("TOP", 1) > 1)
        steps = -(-K // unroll) * unroll
        none = packed.records.new_empty(0, dtype=torch.int32)
        least, lists, grid = packed.records.new_empty(0), (none, none, none), -(-N // rows)
        if schedule is not None:
            blocks, steps = Blocks.of(schedule, rows), K
            lists, grid = (blocks.table, schedule.pointer, schedule.index), len(blocks.table)
            least = packed.records.new_empty(grid)
        launch(
            "rows", kernel, problem.x.device, (grid,), problem.x, packed.records, *tensors, *([least] if noted else []),
            *lists, N, steps, **constants, D=D, FAMILY=packed.family, R=packed.records.shape[1], LISTS=schedule is not None,
            BN=rows, U=unroll, warps=_WARPS,
        )  # fmt: skip
        if schedule is None or schedule.whole is not None or not noted:
            return None
        return self.scale.nats(blocks.minima(least, schedule))

    def moments(
        self, values: Tensor, weights: Tensor | None, schedules: Sequence[Schedule] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute S0 (K,), S1 (K, D) and S2 (K, D, D), (K, D) or (K,) about the means, float64, possibly with weights (N,).

        Args:
            values: Base-2 log-sum-exps (N,) in the dtype of the points.
            weights: Weights (N,), in the dtype of the points; None for ones.
            schedules: Schedules of all rows; None for all pairs.
        """
        D = self.problem.shape[2]
        if schedules is None and self.products is not None:
            unit = 1.0 if weights is None else weights.abs().amax()
            return self.with_weak(self.products.moments(values, weights), unit, values, weights)
        if self._tiles is not None:
            S0, S1, S2 = self._tiles.add_moments(values, weights, schedules)
            S2 = S2.sum(1, keepdim=True) if self.packed.family == "spherical" else S2
        else:
            sums = self._zeros()
            self.add_sums(sums, values, weights, schedules)
            S0, S1, S2 = sums[0], sums[1 : D + 1].T, sums[D + 1 :].T
            S2 = self._shaped(S2) if self.packed.family == "full" else S2
        if self.packed.family == "full":
            return S0, *self._unwhitened(S1, S2)
        rest = self.packed.rest.to(S0.device)
        moved = torch.addcmul(S1, S0[:, None], rest, value=-1)
        if self.packed.family == "spherical":
            S2 = S2 - ((S1 + moved) * rest).sum(1, keepdim=True)
        else:
            S2 = torch.addcmul(S2, S1 + moved, rest, value=-1)
        return S0, moved, self._shaped(S2)

    def with_weak(
        self, sums: tuple[Tensor, Tensor, Tensor], unit: Tensor | float, values: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace the moments of components that have so small responsibilities that their digits do not suffice.

        Args:
            sums: Moments, on the device of the points or on the CPU.
            unit: Largest size of the weights; one without weights.
            values, weights: As for :meth:`moments`.
        """
        S0 = sums[0].abs()
        weak = ((S0 > 0) & (S0 / unit < _WEAK * len(values))).nonzero()[:, 0]
        if not len(weak):
            return sums
        given = self.problem.host or self.problem
        some = given.components(weak.to(given.means.device))
        few = Residuals(some if given is self.problem else Exponents.of_host(self.problem.x, some), digits=False)
        # Base-2 values are relative to a number that depends on the components.
        shift = (self.scale.base.to(values.device) - few.scale.base.to(values.device)) / LN2
        moved = torch.where(values == NO_SHARE, values, values + shift.to(values.dtype))
        found = transferred(few.moments(moved, weights, None), S0.device)
        S0, S1, S2 = (part.index_copy(0, weak, own) for part, own in zip(sums, found, strict=True))
        return S0, S1, S2

    def add_sums(
        self, sums: Tensor, values: Tensor, weights: Tensor | None, schedules: Sequence[Schedule] | None
    ) -> None:
        """Add the sums of S0, of the D rows of S1 and of the distinct rows of S2 to ``sums`` (W, K), float64.

        The residuals are scaled and whitened if full, otherwise those from rounded means. Arguments as for :meth:`moments`.
        """
        add_moments(self.problem.x, sums, schedules, _CHUNK, lambda piece: self._partial(values, weights, piece))

    @cached_property
    def products(self) -> Products | None:
        """Kernels of matrix products for all pairs, where they are faster and as accurate."""
        if not self.digits or not admits_digits(self.problem):
            return None
        parameters = Parameters.of(self.problem)
        return None if parameters is None else Products(self.problem, parameters)

    @property
    def is_tiled(self) -> bool:
        """Whether the sums of moments do not fit into the registers of a thread, so that kernels of tiles compute them."""
        return self.problem.shape[2] > (FEW_FULL if self.problem.is_full else FEW)

    @property
    def sums_shape(self) -> tuple[int, int]:
        """Shape (W, K) of the sums of :meth:`add_sums`."""
        _, K, D = self.problem.shape
        return 1 + D + {"full": D * (D + 1) // 2, "diagonal": D, "spherical": 1}[self.packed.family], K

    @cached_property
    def _tiles(self) -> Tiles | None:
        """Kernels of tiles, where they are used."""
        return Tiles(self.problem) if self.is_tiled else None

    def _zeros(self) -> Tensor:
        """Return float64 sums (W, K) of zero: S0, D rows of S1, and the distinct rows of S2."""
        return torch.zeros(self.sums_shape, dtype=torch.float64, device=self.problem.x.device)

    def hard_moments(self, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the moments for labels (N,), int32, of which negative ones are left out, and float64 weights (N,)."""
        problem, family, sums = self.problem, self.packed.family, self._zeros()
        N, K, D = problem.shape
        row, column = torch.tril_indices(D, D, device=labels.device)
        means, components = (
            problem.means + problem.center,
            torch.arange(K + 1, dtype=labels.dtype, device=labels.device),
        )
        some = max(1, SLAB // (8 * len(sums)))
        for start in range(0, N, some):
            chosen = labels[start : start + some]
            z = (problem.x[start : start + some].double() - means[chosen.clamp(min=0).long()]).T
            g = torch.ones_like(z[0]) if weights is None else weights[start : start + some]
            q = g * z
            square = q[row] * z[column] if family == "full" else q * z
            square = square.sum(0, keepdim=True) if family == "spherical" else square
            found, order = chosen.sort(stable=True)
            add_up(torch.cat([g[None], q, square]), sums, 0, (order, torch.searchsorted(found, components)))
        S0, S1, S2 = sums[0], sums[1 : D + 1].T, sums[D + 1 :].T
        return S0, S1, self._shaped(S2)

    def _shaped(self, S2: Tensor) -> Tensor:
        """Convert the distinct numbers of second moments (K, W - D - 1) to the shape of the result."""
        _, K, D = self.problem.shape
        if self.packed.family == "full":
            return S2[:, symmetric_places(D, S2.device)].view(K, D, D)
        return S2.sum(1) if self.problem.width == 1 else S2

    def _unwhitened(self, S1: Tensor, S2: Tensor) -> tuple[Tensor, Tensor]:
        """Convert moments of scaled whitened residuals y to those of residuals z with y = Vᵀ z."""
        V = self.problem.U.mT * (0.5 / LN2) ** 0.5
        z = torch.linalg.solve_triangular(V, torch.cat([S1[:, :, None], S2], 2), upper=False)
        return z[:, :, 0], torch.linalg.solve_triangular(V, z[:, :, 1:].mT, upper=False)

    def _partial(self, values: Tensor, weights: Tensor | None, piece: Piece) -> Tensor:
        """Compute partial sums (W, M) of chunks of rows."""
        problem, packed, rows = self.problem, self.packed, piece.rows
        D, x, values = problem.shape[2], problem.x[rows], values[rows]
        part = x.new_empty(piece.width, piece.columns)
        wide, warps = _component_block(problem, piece.components)
        launch(
            "sums", "moments", x.device, (-(-piece.components // wide), piece.chunks), x, packed.records, values,
            values if weights is None else weights[rows], part, *piece.lists(x), len(x), piece.components, piece.columns, _CHUNK,
            D=D, FAMILY=packed.family, R=packed.records.shape[1], W=piece.width, WEIGHTED=weights is not None,
            LISTS=piece.table is not None, BK=wide, U=_point_step(problem, wide // _WARP), warps=warps,
        )  # fmt: skip
        return part


def admits_digits(problem: Exponents) -> bool:
    """Return whether products of digits are faster than residuals, if they are accurate for the parameters."""
    _, K, D = problem.shape
    if problem.is_full or D < _DIGITS or K < _COMPONENTS or problem.x.dtype != torch.float32:
        return False
    return _has_tensor_cores(problem.x.device) and supports(problem)


def _has_tensor_cores(device: torch.device) -> bool:
    """Return whether a device has tensor cores for products of digits (NVIDIA GPUs only)."""
    return device.type == "cuda" and torch.version.hip is None


def _row_block(problem: Exponents, sums: bool) -> tuple[int, int]:
    """Return the number of rows of a program, and of components in an unrolled step, for kernels that own points.

    Args:
        problem: Exponents.
        sums: Whether a thread holds more than a few numbers for each of its points.
    """
    D, full = problem.shape[2], problem.is_full
    # With four points for each thread a component is loaded for four pairs; in more dimensions their registers do not suffice.
    if sums:
        many, some = (6, 8) if full else (8, 16)
    else:
        many, some = (_SOME_FULL, _SOME_FULL) if full else (24, 64)
    each = 4 if many >= D else 2 if some >= D else 1
    few = FEW_FULL if full else FEW
    # With four components, uniform registers of sm_100 are spilled for D = 7.
    unroll = 1 if few < D else 2 if sums and full and D == 7 else _UNROLL
    return _WARP * _WARPS * _halved(problem, each), unroll


def _component_block(problem: Exponents, components: int) -> tuple[int, int]:
    """Return the number of components of a program and its number of warps, for kernels that own components."""
    D = problem.shape[2]
    # With two components for each thread, sm_100 computes pairs of numbers (D = 8: 82 instructions for each pair, 200 with one).
    each = (4 if D <= 3 else 2) if problem.is_full else 4 if D <= 8 else 2 if D <= 16 else 1
    each = _halved(problem, each)
    while each > 1 and components <= _WARP * each // 2:
        each //= 2
    return _WARP * each, 1


def _point_step(problem: Exponents, each: int) -> int:
    """Return the number of points in an unrolled step of a kernel of which a thread owns ``each`` components."""
    D = problem.shape[2]
    # With two points, registers of sm_100 are spilled in these dimensions.
    single = D > 6 and each == 1 if problem.is_full else 16 < D <= 24
    return 1 if single else _UNROLL if D < 6 else 2


def _halved(problem: Exponents, each: int) -> int:
    """Return half of a number for float64 points, which need two registers for each number."""
    return each if problem.x.dtype == torch.float32 else max(1, each // 2)
