r"""Component parameters and schedules in the form that the Triton kernels read.

With :math:`s = \sqrt{\tfrac12 \log_2 e}`, exponents in base 2 relative to the largest offset are

.. math::

    \tilde e_{nk} = \tilde c_k - \lVert V_k^\top (x_n - m_k) + d_k \rVert^2, \qquad
    V_k = s\,U_k, \qquad d_k = -V_k^\top (\mu_k - m_k)

where :math:`m_k` is the mean rounded to the dtype of the points. The difference :math:`x_n - m_k` of two floating-point numbers
has a relative rounding error only, so that coordinates may be large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = ["LN2", "Blocks", "Packed", "Padded"]

LN2 = math.log(2.0)

# Offset of components of no weight, by which lists are padded: below the smallest exponent that a kernel stores.
_NOTHING = -3e38


@dataclass(frozen=True)
class Packed:
    """Component parameters in one array, with one record [c, m, d, u] for each component, and component K of no weight.

    Args:
        records: The records (at least K + 1, R), in the dtype of the points: offset c; rounded mean m (D); d (D); and the rows of
            the lower triangle of Vᵀ if full, V (D) if diagonal, or its number if spherical.
        rest: Means minus m (K, D), data units, float64.
        base: Largest offset (scalar), nats, float64.
        family: ``"full"``, ``"diagonal"`` or ``"spherical"``.
    """

    records: Tensor
    rest: Tensor
    base: Tensor
    family: str

    @classmethod
    def of(cls, problem: Exponents, unroll: int) -> Packed:
        """Pack the parameters; the number of records is a multiple of ``unroll`` that is larger than K."""
        _, K, D = problem.shape
        dtype = problem.x.dtype
        base = problem.offsets.amax()
        means = problem.means + problem.center
        heads = means.to(dtype)
        rest = means - heads
        V = problem.U * math.sqrt(0.5 / LN2)
        if problem.is_full:
            row, column = torch.tril_indices(D, D, device=V.device)
            d, u = -(V.mT @ rest[:, :, None])[:, :, 0], V[:, column, row]
        else:
            d, u = -V * rest, V
        c = ((problem.offsets - base) / LN2)[:, None]
        family = "full" if problem.is_full else "spherical" if V.shape[1:] == (1,) and D > 1 else "diagonal"
        size = 1 + 2 * D + u.shape[1]
        records = torch.zeros((K // unroll + 1) * unroll, size, dtype=dtype, device=V.device)
        records[:K] = torch.cat([c, heads, d, u], 1)
        records[K:, 0] = _NOTHING
        return cls(records, rest, base, family)

    def nats(self, values: Tensor) -> Tensor:
        """Convert base-2 exponents relative to the largest offset to nats, float64."""
        return values.double() * LN2 + self.base


@dataclass(frozen=True)
class Padded:
    """Candidate lists of a schedule, padded by component K of no weight to a multiple of the number of unrolled steps.

    Args:
        index: Components of all lists, concatenated, int32.
        first, last, stop: First and last-plus-one position of each list (T,), without and with padding.
    """

    index: Tensor
    first: Tensor
    last: Tensor
    stop: Tensor

    @classmethod
    def of(cls, schedule: Schedule, components: int, unroll: int) -> Padded:
        """Pad the lists of a schedule; the length of the result is an upper bound, since its exact length is on the device."""
        lengths, entries = schedule.pointer.diff(), len(schedule.index)
        padded = (lengths + unroll - 1) // unroll * unroll
        stop = padded.cumsum(0)
        first = stop - padded
        index = torch.full((entries + len(lengths) * (unroll - 1),), components, dtype=torch.int32, device=stop.device)
        place = torch.arange(entries, device=stop.device)
        shift = (first - schedule.pointer[:-1]).repeat_interleave(lengths, output_size=entries)
        index[place + shift] = schedule.index.to(torch.int32)
        return cls(index, first, first + lengths, stop)


@dataclass(frozen=True)
class Blocks:
    """Row ranges of a schedule, split into blocks for the programs of a kernel.

    Args:
        table: First row, last-plus-one row, and first and last-plus-one position in the lists of each block (B, 4), int32. Some
            blocks at the end may be empty.
        range: Index of the row range of each block (B,).
    """

    table: Tensor
    range: Tensor

    @classmethod
    def of(cls, schedule: Schedule, first: Tensor, last: Tensor, rows: int, most: int) -> Blocks:
        """Split the row ranges into blocks of at most ``rows`` rows; there are at most ``most`` rows in all of them."""
        start, end = schedule.spans.T
        ends = ((end - start + rows - 1) // rows).cumsum(0)
        block = torch.arange(most // rows + len(start), device=ends.device)
        owner = torch.searchsorted(ends, block, right=True)
        inside = owner < len(start)
        owner = owner.clamp(max=len(start) - 1)
        n0 = start[owner] + (block - ends[owner]) * rows + (end - start + rows - 1)[owner] // rows * rows
        n1 = torch.minimum(n0 + rows, end[owner])
        bounds = torch.stack([n0, n1, first[schedule.owner][owner], last[schedule.owner][owner]], 1)
        return cls(torch.where(inside[:, None], bounds, 0).to(torch.int32).contiguous(), owner)
