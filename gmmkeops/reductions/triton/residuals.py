r"""Reductions by kernels that compute the residuals :math:`x_n - \mu_k` of each pair of point and component.

A thread owns points, or components for moments. The number of blocks of partial sums is limited by their memory, and they are
added in float64 without atomic operations, so that results are reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.loading import launch
from gmmkeops.reductions.triton.packing import LN2, Blocks, Packed, Padded
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = ["NO_LABEL", "NO_SHARE", "Residuals"]

# Number of components in an unrolled step of a loop over components, and of points in one over points.
_UNROLL = 4

# Threads of a warp, and largest number of warps of a program of a kernel that owns points.
_WARP, _WARPS = 32, 4

# Number of rows for each partial sum in the dtype of the points.
_CHUNK = 256

# Maximum memory for the partial sums of one launch, bytes.
_SLAB = 1 << 26

# Base-2 log-sum-exp of rows that have no part in the moments, and their label.
NO_SHARE, NO_LABEL = 1e30, -1


@dataclass(frozen=True)
class Residuals:
    """Points and packed parameters, and the schedules whose row ranges are evaluated.

    Args:
        problem: Exponents.
    """

    problem: Exponents

    @cached_property
    def packed(self) -> Packed:
        """The component parameters, in the dtype of the points."""
        return Packed.of(self.problem, _UNROLL)

    def logsumexps(self, out: Tensor, schedule: Schedule | None) -> Tensor | None:
        """Compute base-2 log-sum-exps (N,) into ``out``; return their minima (S,), nats, over the row ranges of a schedule."""
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
        rows, warps = _row_block(D, problem.is_full)
        steps = -(-K // _UNROLL) * _UNROLL
        none = packed.records.new_empty(0, dtype=torch.int32)
        least, table, index, grid = packed.records.new_empty(0), none, none, -(-N // rows)
        if schedule is not None:
            lists = self._padded(schedule)
            blocks = Blocks.of(schedule, lists.first, lists.stop, rows, N)
            table, index, grid = blocks.table, lists.index, len(blocks.table)
            least = packed.records.new_empty(grid)
        launch(
            "rows", kernel, problem.x.device, (grid,), problem.x, packed.records, *tensors, *([least] if noted else []), table,
            index, N, steps, **constants, D=D, FAMILY=packed.family, R=packed.records.shape[1], LISTS=schedule is not None,
            BN=rows, U=_UNROLL, warps=warps,
        )  # fmt: skip
        if schedule is None or not noted:
            return None
        found = least.new_full((len(schedule.spans),), torch.inf).scatter_reduce(0, blocks.range, least, "amin")
        return packed.nats(found)

    def _padded(self, schedule: Schedule) -> Padded:
        return Padded.of(schedule, self.problem.shape[1], _UNROLL)

    def moments(
        self, values: Tensor, weights: Tensor | None, schedules: Sequence[Schedule] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute S0 (K,), S1 (K, D) and S2 (K, D, D), (K, D) or (K,) about the means, float64, possibly with weights (N,).

        Args:
            values: Base-2 log-sum-exps (N,) in the dtype of the points.
            weights: Weights (N,), in the dtype of the points; None for ones.
            schedules: Schedules of all rows; None for all pairs.
        """
        family, D, sums = self.packed.family, self.problem.shape[2], self._zeros()
        if schedules is None:
            self._all_moments(values, weights, sums)
        else:
            for schedule in schedules:
                self._listed_moments(values, weights, sums, schedule)
        S0, S1, S2 = sums[0], sums[1 : D + 1].T, sums[D + 1 :].T
        if family == "full":
            return S0, *self._unwhitened(S1, S2)
        rest = self.packed.rest
        moved = S1 - S0[:, None] * rest
        shift = (S1 + moved) * rest
        return S0, moved, self._shaped(S2 - (shift.sum(1, keepdim=True) if family == "spherical" else shift))

    def _zeros(self) -> Tensor:
        """Return float64 sums (W, K) of zero: S0, D rows of S1, and the distinct rows of S2."""
        _, K, D = self.problem.shape
        width = 1 + D + {"full": D * (D + 1) // 2, "diagonal": D, "spherical": 1}[self.packed.family]
        return torch.zeros(width, K, dtype=torch.float64, device=self.problem.x.device)

    def hard_moments(self, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the moments for labels (N,), int32, of which negative ones are left out, and float64 weights (N,)."""
        problem, family, sums = self.problem, self.packed.family, self._zeros()
        N, K, D = problem.shape
        row, column = torch.tril_indices(D, D, device=labels.device)
        means, components = (
            problem.means + problem.center,
            torch.arange(K + 1, dtype=labels.dtype, device=labels.device),
        )
        some = max(1, _SLAB // (8 * len(sums)))
        for start in range(0, N, some):
            chosen = labels[start : start + some]
            z = (problem.x[start : start + some].double() - means[chosen.clamp(min=0).long()]).T
            g = torch.ones_like(z[0]) if weights is None else weights[start : start + some]
            q = g * z
            square = q[row] * z[column] if family == "full" else q * z
            square = square.sum(0, keepdim=True) if family == "spherical" else square
            found, order = chosen.sort(stable=True)
            self._add_up(torch.cat([g[None], q, square]), sums, 0, order, torch.searchsorted(found, components))
        S0, S1, S2 = sums[0], sums[1 : D + 1].T, sums[D + 1 :].T
        return S0, S1, self._shaped(S2)

    def _shaped(self, S2: Tensor) -> Tensor:
        """Convert the distinct numbers of second moments (K, W - D - 1) to the shape of the result."""
        K, D = self.problem.means.shape
        if self.packed.family == "full":
            row, column = torch.tril_indices(D, D, device=S2.device)
            square = S2.new_empty(K, D, D)
            square[:, row, column] = square[:, column, row] = S2
            return square
        return S2.sum(1) if self.problem.U.shape[1:] == (1,) else S2

    def _unwhitened(self, S1: Tensor, S2: Tensor) -> tuple[Tensor, Tensor]:
        """Convert moments of scaled whitened residuals y to those of residuals z with y = Vᵀ z."""
        V = self.problem.U.mT * (0.5 / LN2) ** 0.5
        z = torch.linalg.solve_triangular(V, torch.cat([S1[:, :, None], self._shaped(S2)], 2), upper=False)
        return z[:, :, 0], torch.linalg.solve_triangular(V, z[:, :, 1:].mT, upper=False)

    def _all_moments(self, values: Tensor, weights: Tensor | None, sums: Tensor) -> None:
        """Add the moments of all pairs to ``sums`` (W, K)."""
        N, K, _ = self.problem.shape
        some = max(1, _SLAB // (self.problem.x.element_size() * sums.numel())) * _CHUNK
        for start in range(0, N, some):
            stop = min(N, start + some)
            chunks = -(-(stop - start) // _CHUNK)
            part = self._partial(values, weights, len(sums), slice(start, stop), chunks, chunks * K, K)
            self._add_up(part, sums, chunks)

    def _listed_moments(self, values: Tensor, weights: Tensor | None, sums: Tensor, schedule: Schedule) -> None:
        """Add the moments over the candidate lists of a schedule to ``sums`` (W, K)."""
        N, K, _ = self.problem.shape
        lists = self._padded(schedule)
        blocks = Blocks.of(schedule, lists.first, lists.last, _CHUNK, N)
        lengths = blocks.table[:, 3] - blocks.table[:, 2]
        ends = lengths.cumsum(0)
        # The two numbers on which the sizes of the launches depend.
        total, longest = torch.stack([ends[-1], lengths.amax()]).tolist()
        most = max(longest, _SLAB // (self.problem.x.element_size() * len(sums)))
        cuts = [0, len(lengths)]
        if total > most:
            limits = torch.arange(most, total, max(1, most - longest), device=ends.device)
            cuts = [0, *torch.searchsorted(ends, limits, right=True).unique().tolist(), len(lengths)]
        for first, last in pairwise(cuts):
            if first == last:
                continue
            sizes = lengths[first:last].long()
            starts = sizes.cumsum(0) - sizes
            columns = total if total <= most else int(sizes.sum())
            given = blocks.table[first:last], lists.index, starts
            part = self._partial(values, weights, len(sums), slice(0, N), last - first, columns, longest, given)
            place = torch.arange(columns, device=ends.device)
            shift = (blocks.table[first:last, 2] - starts).repeat_interleave(sizes, output_size=columns)
            component, order = lists.index[place + shift].sort(stable=True)
            counts = torch.searchsorted(component, torch.arange(K + 1, dtype=component.dtype, device=ends.device))
            self._add_up(part, sums, 0, order, counts)

    def _partial(
        self,
        values: Tensor,
        weights: Tensor | None,
        width: int,
        rows: slice,
        chunks: int,
        columns: int,
        components: int,
        lists: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute partial sums (W, M) of chunks of rows, for all components or those of lists (table, index, first columns)."""
        problem, packed = self.problem, self.packed
        D = problem.shape[2]
        x, values = problem.x[rows], values[rows]
        part = x.new_empty(width, columns)
        wide, warps = _component_block(D, problem.is_full, components)
        none = values.new_empty(0, dtype=torch.int32)
        table, index, starts = (none, none, none) if lists is None else lists
        launch(
            "sums", "moments", x.device, (-(-components // wide), chunks), x, packed.records, values,
            values if weights is None else weights[rows], part, table, index, starts, len(x), components, columns, _CHUNK, D=D,
            FAMILY=packed.family, R=packed.records.shape[1], W=width, WEIGHTED=weights is not None,
            LISTS=lists is not None, BK=wide, U=_UNROLL if D < 6 else 2, warps=warps,
        )  # fmt: skip
        return part

    def _add_up(
        self, part: Tensor, sums: Tensor, chunks: int, order: Tensor | None = None, pointer: Tensor | None = None
    ) -> None:
        """Add partial sums (W, M) to ``sums`` (W, K), in the order of their columns."""
        width, K = sums.shape
        none = part.new_empty(0, dtype=torch.int64)
        launch(
            "sums", "add_partial_sums", part.device, (-(-K // 32), width), part, sums, none if order is None else order,
            none if pointer is None else pointer, K, part.shape[1], chunks, LISTS=order is not None, BK=32, BJ=32, warps=4,
        )  # fmt: skip


def _row_block(D: int, full: bool) -> tuple[int, int]:
    """Return the number of rows of a program and its number of warps, for kernels that own points."""
    # With four points for each thread a component is loaded for four pairs; in more dimensions their registers do not suffice.
    many, some = (6, 8) if full else (8, 16)
    return _WARP * _WARPS * (4 if many >= D else 2 if some >= D else 1), _WARPS


def _component_block(D: int, full: bool, components: int) -> tuple[int, int]:
    """Return the number of components of a program and its number of warps, for kernels that own components."""
    each = (4 if D <= 3 else 2 if D <= 5 else 1) if full else 4 if D <= 8 else 2 if D <= 16 else 1
    while each > 1 and components <= _WARP * each // 2:
        each //= 2
    return _WARP * each, 1
