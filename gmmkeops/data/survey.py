r"""Statistics of one pass over points: their number, total weight, checksums, and a weighted random sample.

Priority sampling keeps the rows with the largest priorities :math:`g_n / u_n`, where :math:`g_n` are the weights and
:math:`u_n` uniform random numbers. A kept row gets the weight :math:`\max(g_n, \tau)`, where τ is the largest priority of the
other rows, so that weighted sums over the sample are unbiased. The numbers :math:`u_n` depend only on the index of the row, so
the sample does not depend on chunks or ranks. Reference: Duffield, Lund and Thorup 2007, *Priority sampling for estimation of
arbitrary subset sums*, JACM 54.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gmmkeops.data.batch import Batch

__all__ = ["SAMPLE", "Reservoir", "Survey", "Tally", "fingerprint", "sample"]

# Default size of the sample.
SAMPLE = 20_000

# Largest relative difference between sums of the same numbers in a different order.
_ROUNDING = 1e-11

# Count of numbers that are summed at a time.
_SUMMED = 1 << 16

# Number of rows whose random numbers are computed at a time. On a CPU they fit into the cache and are computed by one thread,
# since synchronizing several threads takes longer; a GPU needs large kernels.
_ROWS, _ROWS_CUDA = 32_000, 1 << 22


def _signed(number: int) -> int:
    """Return the int64 with the same bits as an unsigned 64-bit integer; int64 arithmetic of torch is modulo 2⁶⁴."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_STEP, _FACTORS = _signed(0x9E3779B97F4A7C15), (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))

_HASH = _FACTORS[0]


class _Uniforms:
    """Uniform random numbers in (0, 1] as integers in units of 2⁻⁵³; each depends only on the index of its row.

    Reference: Steele, Lea and Flood 2014, *Fast splittable pseudorandom number generators* (the finalizer of SplitMix64).
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.base = torch.arange(1, count + 1, device=device) * _STEP
        self.z, self.shifted = torch.empty_like(self.base), torch.empty_like(self.base)

    def __call__(self, first: int, count: int) -> Tensor:
        """Return the integers (count,), int64, of the rows from ``first``; the next call overwrites them."""
        z, shifted = self.z[:count], self.shifted[:count]
        torch.add(self.base[:count], _signed(first * _STEP), out=z)
        for shift, factor in zip((30, 27), _FACTORS, strict=True):
            z.bitwise_xor_(_right(z, shift, out=shifted)).mul_(factor)
        z.bitwise_xor_(_right(z, 31, out=shifted))
        return _right(z, 11, out=z)


def _right(z: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Shift 64-bit integers to the right, inserting zeros (logical shift)."""
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


class Reservoir:
    """Weighted random sample of rows, for any chunks and any order; the reservoirs of parts of the data can be merged.

    Args:
        size: Maximum number of rows in the sample.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        # Priorities, weights, row indices and rows, on the device of the rows. They are selected by index_select, which uses one
        # core of a CPU: with several threads, synchronization makes the selection 8 times slower (measured).
        self._kept: list[tuple[Tensor, ...]] = []
        self._least = 0.0

    def add(self, points: Tensor, weights: Tensor | None, first: int) -> None:
        """Add points (n, D) with weights (n,) or None; ``first`` is the index of the first row."""
        count = max(1, min(len(points), _ROWS_CUDA if points.is_cuda else _ROWS))
        uniforms, least = _Uniforms(count, points.device), self._least
        kept: list[tuple[Tensor, ...]] = []
        for start in range(0, len(points), count):
            size = min(count, len(points) - start)
            g = None if weights is None else weights[start : start + size]
            u = uniforms(first + start, size)
            self.seen += size if g is None else int((g > 0).sum())
            if least > 0:
                # Rows with larger random numbers cannot exceed the smallest kept priority, even with the largest weight.
                limit = (1.0 if g is None else float(g.max())) / least * 2.0**53
                rows = (u <= int(min(limit * (1 + 1e-9) + 1, 2.0**53))).nonzero()[:, 0]
            else:
                rows = torch.arange(size, device=u.device)
            own = torch.ones(len(rows), dtype=torch.float64, device=u.device) if g is None else g.index_select(0, rows)
            priority = own / ((u.index_select(0, rows).double() + 1) * 2.0**-53)
            above = (priority > least).nonzero()[:, 0]
            kept.append(tuple(column.index_select(0, above) for column in (priority, own, rows + start)))
            if sum(len(part[0]) for part in kept) > 2 * self.size:
                kept, least = self._largest(kept, least)
        if kept:
            priority, own, rows = self._largest(kept, least)[0][0]
            self._take(priority, own, rows + first, points.index_select(0, rows))

    def _take(self, *columns: Tensor) -> None:
        if len(columns[0]):
            self._kept.append(columns)
        if sum(len(part[0]) for part in self._kept) > 2 * self.size:
            self._cut()

    def _cut(self) -> None:
        """Keep the ``size`` rows with the largest priorities, and one more row, whose priority is the threshold τ."""
        if self._kept:
            self._kept, self._least = self._largest(self._kept, self._least)

    def _largest(self, parts: list[tuple[Tensor, ...]], least: float) -> tuple[list[tuple[Tensor, ...]], float]:
        """Select the rows with the largest priorities (first column), and the priority that further rows must exceed."""
        columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        if len(columns[0]) <= self.size:
            return [columns], least
        if len(columns[0]) > self.size + 1:
            best = columns[0].topk(self.size + 1, sorted=False).indices
            columns = tuple(column.index_select(0, best) for column in columns)
        return [columns], float(columns[0].min())

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the kept rows (n, D), and their weights, priorities and row indices (3, n), float64."""
        self._cut()
        if not self._kept:
            return torch.empty(0, 0), torch.empty(3, 0, dtype=torch.float64)
        priorities, weights, numbers, rows = self._kept[0]
        return rows, torch.stack([weights, priorities, numbers.double()])

    def merge(self, rows: Tensor, numbers: Tensor, seen: int) -> None:
        """Add the result of :meth:`parts` of another reservoir that has processed ``seen`` rows of positive weight."""
        self.seen += seen
        weights, priorities, places = numbers
        self._take(priorities, weights, places.long(), rows)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return the sampled rows (n, D) in the order of their indices, and their weights (n,), float64."""
        rows, (weights, priorities, numbers) = self.parts()
        order = numbers.argsort(stable=True)
        mass = weights
        if len(rows) > self.size:
            least = priorities.argmin()
            mass = torch.maximum(weights, priorities[least])
            order = order[order != least]
        return rows.index_select(0, order), mass.index_select(0, order)


def sample(x: Tensor, weights: Tensor | None, size: int = SAMPLE) -> tuple[Tensor, Tensor | None]:
    """Draw a weighted sample of at most ``size`` of the points (N, D); all points if there are no more."""
    if len(x) <= size:
        return x, weights
    reservoir = Reservoir(size)
    reservoir.add(x, weights, 0)
    rows, mass = reservoir.sample()
    return rows, None if weights is None else mass


@dataclass(frozen=True)
class Survey:
    """Statistics of one pass over the points.

    Args:
        rows: Number of rows after filtering.
        mass: Sum of the weights.
        squares: Sum of the squared weights.
        total: Sum of all coordinates, and sum of their absolute values.
        fingerprint: Hash of the rows, independent of their order.
        single: Whether all rows are float32 (single precision).
        reservoir: The random sample.
    """

    rows: int
    mass: float
    squares: float
    total: tuple[float, float]
    fingerprint: int
    single: bool
    reservoir: Reservoir


class Tally:
    """Running totals of a pass: number of rows, total weight, sum of all coordinates and sum of their absolute values."""

    def __init__(self) -> None:
        self.rows, self.mass, self.total, self.magnitude = 0, 0.0, 0.0, 0.0

    def add(self, chunk: Batch) -> None:
        """Add the rows of a chunk."""
        self.rows += len(chunk.points)
        self.mass += chunk.mass
        for part in chunk.points.split(max(1, _SUMMED // chunk.points.shape[1])):
            self.total += float(part.sum(dtype=torch.float64))
            self.magnitude += float(part.abs().sum(dtype=torch.float64))

    def compare(self, survey: Survey, name: str) -> None:
        """Raise a ValueError if the rows differ from those of the first pass over the data ``name``."""
        if self.rows != survey.rows:
            raise ValueError(
                f"{name} gave {self.rows} rows on this pass and {survey.rows} on the first; "
                "every pass must give the same points."
            )
        if abs(self.total - survey.total[0]) > _ROUNDING * max(survey.total[1], self.magnitude):
            raise ValueError(
                f"{name} gave other numbers on this pass (their sum is {self.total!r}) than on the first "
                f"({survey.total[0]!r}); every pass must give the same points."
            )


def fingerprint(points: Tensor, weights: Tensor | None) -> int:
    """Hash rows (n, D) and their weights, independently of their order; hashes of parts are added modulo 2⁶⁴."""
    total, size = 0, _ROWS_CUDA if points.is_cuda else _ROWS
    for start in range(0, len(points), size):
        # Adding zero converts -0.0 to 0.0.
        part = points[start : start + size].double() + 0.0
        columns = list(part.T) + ([] if weights is None else [weights[start : start + size]])
        mixed = torch.full((len(part),), _STEP, device=part.device)
        for column in columns:
            mixed = (mixed ^ column.contiguous().view(torch.int64)).mul_(_HASH)
            mixed ^= _right(mixed, 29)
        total += int(mixed.sum())
    return total % (1 << 64)
