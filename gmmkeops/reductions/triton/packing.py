r"""Component parameters and schedules in the form that the Triton kernels read.

With :math:`s = \sqrt{\tfrac12 \log_2 e}`, exponents in base 2 relative to a number b are

.. math::

    \tilde e_{nk} = \tilde c_k + D q - \lVert V_k^\top (x_n - m_k) + d_k \rVert^2, \qquad
    \tilde c_k = (c_k - b) \log_2 e - D q, \qquad
    V_k = s\,U_k, \qquad d_k = -V_k^\top (\mu_k - m_k)

where :math:`m_k` is the mean rounded to the dtype of the points. The difference :math:`x_n - m_k` of two floating-point numbers
has a relative rounding error only, so that coordinates may be large. The kernels subtract squares from :math:`q = 0.71875`, which
is about their expected value :math:`s^2` and a float32 number, so that their partial sums are small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gmmkeops.components import transferred
from gmmkeops.reductions.dense.products import parts
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.compiled import CompiledRecords
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = ["LN2", "NOTHING", "Blocks", "Packed", "Scale", "family_of", "padded", "symmetric_places", "tiled_records"]

LN2 = math.log(2.0)

# Offset of components of no weight, with which records are padded: below the smallest exponent that a kernel stores.
NOTHING = -3e38

# The number q.
_SQUARE = 0.71875

# Largest usual log-sum-exp, nats, for which exponents are relative to zero, so that errors are relative to log-sum-exps.
_SMALL = 128.0


@dataclass(frozen=True)
class Scale:
    """Number that base-2 exponents are relative to, and their usual size.

    Args:
        base: Value that base-2 exponents are relative to (scalar), nats, float64, on the CPU if the parameters are there.
        usual: Largest usual log-sum-exp (scalar), nats, float64, on the same device.
    """

    base: Tensor
    usual: Tensor

    @classmethod
    def of(cls, problem: Exponents) -> Scale:
        """Compute the scale from the offsets: at points of a component, exponents are about c - D q ln 2."""
        offsets, expected = (problem.host or problem).offsets, problem.shape[2] * _SQUARE * LN2
        if offsets.device.type != "cpu":
            usual = (offsets - expected).amax()
            return cls(torch.where(usual.abs() <= _SMALL, 0.0, usual), usual)
        most = offsets.amax().item() - expected
        return cls(*torch.tensor([0.0 if abs(most) <= _SMALL else most, most], dtype=torch.float64))

    @property
    def middle(self) -> Tensor:
        """Largest usual log-sum-exp (scalar), base 2, relative to the base."""
        return (self.usual - self.base) / LN2

    def nats(self, values: Tensor) -> Tensor:
        """Convert base-2 exponents to nats, float64."""
        return torch.add(self.base, values.double(), alpha=LN2)


@dataclass(frozen=True)
class Packed:
    """Component parameters in one array, with one record [c, m, d, u] for each component, and component K of no weight.

    Args:
        records: The records (at least K + 1, R), in the dtype of the points: offset c; rounded mean m (D); d (D); and the rows of
            the lower triangle of Vᵀ if full, V (D) if diagonal, or its number if spherical.
        rest: Means minus m (K, D), data units, float64. They are on the CPU if the parameters are there.
        family: ``"full"``, ``"diagonal"`` or ``"spherical"``.
    """

    records: Tensor
    rest: Tensor
    family: str

    @classmethod
    def of(cls, problem: Exponents, unroll: int) -> Packed:
        """Pack the parameters; the number of records is a multiple of ``unroll`` that is larger than K.

        Parameters on the CPU are packed there, and copied to the device of the points in one transfer.
        """
        _, K, D = problem.shape
        c, heads, rest, V, d = _scaled(problem)
        row, column = torch.tril_indices(D, D, device=V.device)
        u = V[:, column, row] if problem.is_full else V
        size = 1 + 2 * D + u.shape[1]
        records = torch.zeros((K // unroll + 1) * unroll, size, dtype=problem.x.dtype, device=V.device)
        records[:K] = torch.cat([c[:, None], heads, d, u], 1)
        records[K:, 0] = NOTHING
        (records,) = transferred([records], problem.x.device)
        return cls(records, rest, family_of(problem))

    @classmethod
    def of_compiled(cls, problem: Exponents, packed: CompiledRecords) -> Packed:
        """Copy parameters that were packed on the CPU to the device of the points."""
        (records,) = transferred([packed.records], problem.x.device)
        return cls(records, packed.rest, packed.family)


def family_of(problem: Exponents) -> str:
    """Return the family of the kernels: ``"full"``, ``"diagonal"`` or ``"spherical"``."""
    # In one dimension, the factors of diagonal and of spherical components have equal shapes.
    single = problem.width == 1 and problem.shape[2] > 1
    return "full" if problem.is_full else "spherical" if single else "diagonal"


@cache
def symmetric_places(features: int, device: torch.device) -> Tensor:
    """Return the position in a lower triangle of each entry of a symmetric matrix (D * D,), int64."""
    with torch.inference_mode(False):
        place = torch.arange(features)
        greater = torch.maximum(place[:, None], place)
        # This copy ends before it returns, so that other streams may use the result.
        return (greater * (greater + 1) // 2 + torch.minimum(place[:, None], place)).view(-1).to(device)


def padded(D: int) -> int:
    """Return the padded number of features of tiles."""
    return max(16, 1 << (D - 1).bit_length())


def _scaled(problem: Exponents) -> tuple[Tensor, ...]:
    """Return c (K,), m (K, D), μ - m (K, D), V (as U) and d (K, D)."""
    given = problem.host or problem
    means = given.means + given.center
    heads = means.to(problem.x.dtype)
    rest = means - heads
    V = given.U * math.sqrt(0.5 / LN2)
    d = -(V.mT @ rest[:, :, None])[:, :, 0] if problem.is_full else -V * rest
    c = (given.offsets - problem.shape[2] * _SQUARE * LN2 - Scale.of(problem).base) / LN2
    if not problem.is_full:
        # Rounding V changes all squares of a point by the same factor; its expected effect is added to the offset.
        change = (V.to(heads.dtype) / V).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).square() - 1
        c = c + change.expand_as(means).sum(1) * (0.5 / LN2)
    return c, heads, rest, V, d


def tiled_records(problem: Exponents) -> tuple[Tensor, int]:
    """Pack the parameters for :mod:`gmmkeops.reductions.triton.kernels.tiles`; return records and padded dimensions P."""
    _, K, D = problem.shape
    c, heads, _, V, d = _scaled(problem)
    P = padded(D)
    records = torch.zeros(K, 16 + 2 * P + (2 * P * P if problem.is_full else P), dtype=problem.x.dtype, device=V.device)
    records[:, 0], records[:, 16 : 16 + D], records[:, 16 + P : 16 + P + D] = c, heads, d
    if problem.is_full:
        head, _ = parts(V.to(records.dtype))
        square = records[:, 16 + 2 * P :].view(K, 2, P, P)
        # The rest of V includes what float32 rounds off.
        square[:, 0, :D, :D], square[:, 1, :D, :D] = head, parts((V - head).to(records.dtype))[0]
    else:
        records[:, 16 + 2 * P : 16 + 2 * P + D] = V
    (records,) = transferred([records], problem.x.device)
    return records, P


@dataclass(frozen=True)
class Blocks:
    """Row ranges of a schedule, split into blocks for the programs of a kernel.

    Args:
        table: First row, last-plus-one row, and index of the list of each block (B, 3), int32.
        range: Index of the row range of each block (B,).
    """

    table: Tensor
    range: Tensor

    def minima(self, least: Tensor, schedule: Schedule) -> Tensor:
        """Compute the minimum over each row range of a schedule (S,), given the minima over the blocks (B,)."""
        return least.new_full((len(schedule.spans),), torch.inf).scatter_reduce(0, self.range, least, "amin")

    @classmethod
    def of(cls, schedule: Schedule, rows: int) -> Blocks:
        """Split the row ranges into blocks of at most ``rows`` rows; those of all leaves are computed once."""
        if schedule.whole is None:
            return cls._split(schedule, rows)
        cache, key = schedule.whole.cloud.cache, ("blocks", rows)
        if key not in cache:
            cache[key] = cls._split(schedule, rows)
        found: Blocks = cache[key]
        return found

    @classmethod
    def _split(cls, schedule: Schedule, rows: int) -> Blocks:
        start, end = schedule.spans.T
        count = (end - start + rows - 1) // rows
        ends = count.cumsum(0)
        block = torch.arange(int(ends[-1]), device=ends.device)
        owner = torch.searchsorted(ends, block, right=True)
        start, end, before, lists = torch.stack([start, end, ends - count, schedule.owner])[:, owner]
        n0 = start + (block - before) * rows
        table = torch.stack([n0, torch.minimum(n0 + rows, end), lists], 1)
        return cls(table.to(torch.int32).contiguous(), owner)
