r"""What one pass over points learns of them: their number, ranges, and a sample that stands for all.

Priority sampling keeps the rows with the largest :math:`g_n / u_n`, each for a mass of :math:`\max(g_n, \tau)` with the
largest priority left out, τ; sums over it are unbiased. The numbers :math:`u_n` depend on a row's number alone, so the sample is
the same however the rows are cut or shared. Reference: Duffield, Lund and Thorup 2007, *Priority sampling for estimation of
arbitrary subset sums*, JACM 54.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["SAMPLE", "Reservoir", "Survey", "fingerprint", "sample"]

# Rows that a survey's sample has unless more are asked for.
SAMPLE = 20_000
# Rows whose random numbers are made at a time.
_ROWS = 1 << 18


def _uniform(first: int, count: int) -> np.ndarray:
    """One number in (0, 1] for each row from ``first`` on (count,), which depends on the row's number alone.

    Reference: Steele, Lea and Flood 2014, *Fast splittable pseudorandom number generators* (the finaliser of SplitMix64).
    """
    z = np.arange(first, first + count, dtype=np.uint64)
    z += np.uint64(1)
    z *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53


class Reservoir:
    """A sample of rows that come in any cut and order; reservoirs of parts merge into that of the whole.

    Args:
        size: How many rows are kept, if there are so many.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self._rows: list[Tensor] = []
        self._weights: list[np.ndarray] = []
        self._priorities: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []
        self._least = 0.0

    def add(self, points: Tensor, weights: Tensor | None, first: int) -> None:
        """Takes in points (n, D) with weights (n,), the first of which is row number ``first``."""
        for start in range(0, len(points), _ROWS):
            part = points[start : start + _ROWS]
            g = np.ones(len(part)) if weights is None else weights[start : start + _ROWS].cpu().numpy()
            priority = g / _uniform(first + start, len(part))
            kept = np.flatnonzero((priority > self._least) & (g > 0))
            self.seen += int(np.count_nonzero(g > 0))
            numbers = first + start + kept
            self._take(part[torch.from_numpy(kept).to(part.device)], g[kept], priority[kept], numbers)

    def _take(self, rows: Tensor, weights: np.ndarray, priorities: np.ndarray, numbers: np.ndarray) -> None:
        self._rows.append(rows.clone())
        self._weights.append(weights)
        self._priorities.append(priorities)
        self._numbers.append(numbers)
        if sum(map(len, self._weights)) > 2 * self.size + _ROWS // 8:
            self._cut()

    def _cut(self) -> None:
        """Keeps the rows of the largest priorities, one more than asked for, which is the threshold."""
        if not self._rows:
            return
        priorities = np.concatenate(self._priorities)
        if len(priorities) > self.size + 1:
            best = np.argpartition(-priorities, self.size)[: self.size + 1]
        else:
            best = np.arange(len(priorities))
        rows = torch.cat(self._rows)
        self._rows = [rows[torch.from_numpy(best).to(rows.device)]]
        self._weights, self._numbers = [np.concatenate(self._weights)[best]], [np.concatenate(self._numbers)[best]]
        self._priorities = [priorities[best]]
        self._least = float(self._priorities[0].min()) if len(best) > self.size else 0.0

    def parts(self) -> tuple[Tensor, np.ndarray]:
        """What is kept: rows (n, D), and their weights, priorities and numbers (3, n)."""
        self._cut()
        if not self._rows:
            return torch.empty(0, 0), np.empty((3, 0))
        return self._rows[0], np.stack([self._weights[0], self._priorities[0], self._numbers[0].astype(np.float64)])

    def merge(self, rows: Tensor, numbers: np.ndarray, seen: int) -> None:
        """Takes in what another reservoir kept of ``seen`` rows."""
        self.seen += seen
        if len(rows):
            self._take(rows, *numbers)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Rows (n, D) in the order of their numbers, and the mass that each stands for (n,), float64."""
        rows, (weights, priorities, numbers) = self.parts()
        order = np.argsort(numbers, kind="stable")
        mass = weights
        if len(rows) > self.size:
            least = int(priorities.argmin())
            mass, order = np.maximum(weights, priorities[least]), order[order != least]
        return rows[torch.from_numpy(order).to(rows.device)], torch.from_numpy(mass[order]).to(rows.device)


def sample(x: Tensor, weights: Tensor | None, size: int = SAMPLE) -> tuple[Tensor, Tensor | None]:
    """At most ``size`` rows of points (N, D) with masses that make them stand for all; the points themselves if no more."""
    if len(x) <= size:
        return x, weights
    reservoir = Reservoir(size)
    reservoir.add(x, weights, 0)
    rows, mass = reservoir.sample()
    return rows, None if weights is None else mass


@dataclass(frozen=True)
class Survey:
    """What one pass over the points has shown.

    Args:
        rows: How many there are, after filters.
        mass: Σ g.
        squares: Σ g².
        total: Sum of all coordinates, and of their magnitudes.
        fingerprint: A number that is the same for the same rows in any order, and hardly ever for others.
        single: Whether all of them are float32.
        reservoir: The sample.
    """

    rows: int
    mass: float
    squares: float
    total: tuple[float, float]
    fingerprint: int
    single: bool
    reservoir: Reservoir


def fingerprint(points: Tensor, weights: Tensor | None) -> int:
    """A number of rows (n, D) and their weights that does not depend on their order, and adds modulo 2⁶⁴."""
    total = 0
    for start in range(0, len(points), _ROWS):
        # Adding zero makes the two zeros one.
        part = points[start : start + _ROWS].double() + 0.0
        columns = list(part.T) + ([] if weights is None else [weights[start : start + _ROWS]])
        mixed = np.full(len(part), 0x9E3779B97F4A7C15, dtype=np.uint64)
        for column in columns:
            mixed = (mixed ^ column.contiguous().cpu().numpy().view(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
        total += int(mixed.sum(dtype=np.uint64))
    return total % (1 << 64)
