"""Log-sum-exps and moments in many dimensions, by kernels that process a tile of points and one component at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.loading import launch
from gmmkeops.reductions.triton.packing import Blocks, tiled_records
from gmmkeops.reductions.triton.partial import Piece, add_moments
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = ["Tiles"]

# Number of rows for each partial sum. Tensor cores add the products of a tile before they add them to the sum.
_CHUNK = 1024

# Number of entries of a tile of points, and limits of its rows, so that all operands fit into registers and shared memory.
_ENTRIES, _LEAST, _MOST = 4096, 32, 128


@dataclass(frozen=True)
class Tiles:
    """Kernels of tiles for points of one problem.

    Args:
        problem: Exponents, with float32 points.
    """

    problem: Exponents

    @cached_property
    def _packed(self) -> tuple[Tensor, int]:
        return tiled_records(self.problem)

    def logsumexps(self, out: Tensor, schedule: Schedule | None) -> Tensor | None:
        """Compute base-2 log-sum-exps (N,) into ``out``; return the minima (S,), base 2, as for :class:`Residuals`."""
        x, (records, P) = self.problem.x, self._packed
        N, K, D = self.problem.shape
        rows = _rows(P)
        none = records.new_empty(0, dtype=torch.int32)
        least, lists, grid = records.new_empty(0), (none, none, none), -(-N // rows)
        if schedule is not None:
            blocks = Blocks.of(schedule, rows)
            lists, grid = (blocks.table, schedule.pointer, schedule.index), len(blocks.table)
            least = records.new_empty(grid)
        launch(
            "tiles", "logsumexps", x.device, (grid,), x, records, out, least, *lists, N, K, D=D, P=P,
            FULL=self.problem.is_full, R=records.shape[1], LISTS=schedule is not None, BN=rows, warps=4,
        )  # fmt: skip
        return None if schedule is None or schedule.whole is not None else blocks.minima(least, schedule)

    def add_moments(
        self, values: Tensor, weights: Tensor | None, schedules: Sequence[Schedule] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute sums of r (K,), of r v (K, D) and of r v vᵀ (K, D, D) or r v² (K, D), float64.

        Here v are scaled whitened residuals if full, otherwise differences from rounded means.

        Args:
            values: Base-2 log-sum-exps (N,), float32.
            weights: Weights (N,), float32; None for ones.
            schedules: Schedules of all rows; None for all pairs.
        """
        _, K, D = self.problem.shape
        P, full = self._packed[1], self.problem.is_full
        width = 1 + P + (P * P if full else P)
        sums = torch.zeros(K, width, dtype=torch.float64, device=values.device)
        add_moments(self.problem.x, sums.T, schedules, _CHUNK, lambda piece: self._partial(values, weights, piece))
        S2 = sums[:, 1 + P :].view(K, P, P)[:, :D, :D] if full else sums[:, 1 + P : 1 + P + D]
        return sums[:, 0], sums[:, 1 : 1 + D], S2

    def _partial(self, values: Tensor, weights: Tensor | None, piece: Piece) -> Tensor:
        x, values, (records, P) = self.problem.x[piece.rows], values[piece.rows], self._packed
        part = records.new_empty(piece.columns, piece.width)
        launch(
            "tiles", "moments", x.device, (piece.components, piece.chunks), x, records, values,
            values if weights is None else weights[piece.rows], part, *piece.lists(x), len(x), piece.components, _CHUNK,
            D=x.shape[1], P=P, FULL=self.problem.is_full, R=records.shape[1], W=piece.width, WEIGHTED=weights is not None,
            LISTS=piece.table is not None, BN=_rows(P), warps=4,
        )  # fmt: skip
        return part.T


def _rows(P: int) -> int:
    """Return the number of rows of a tile with P padded dimensions."""
    return max(_LEAST, min(_MOST, _ENTRIES // P))
