r"""Reductions by KeOps formulas, over all pairs or over a schedule.

.. math:: z = x_i - \mu_j, \qquad y = U_j^\top z, \qquad e = c_j - \tfrac12 |y|^2

float32 coordinates are stored as the sum of two float32 numbers, so that :math:`z` is accurate also far from the origin. The main
formulas are a log-sum-exp over j, and a sum over i of :math:`\exp(e - \ell_i)\, g_i\, (1, z, z z^\top)`. Full factors are upper
triangular; only their triangles are stored, and only the lower triangle of :math:`z z^\top` is summed. Tied factors are expanded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions.cores import user_threads
from gmmkeops.reductions.keops import symbolic
from gmmkeops.reductions.keops.loading import guarded, healing
from gmmkeops.reductions.keops.symbolic import Family, aligned
from gmmkeops.reductions.keops.triangles import pack, symmetric
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.truncation.bounds import Schedule

__all__ = ["NO_SHARE", "logsumexp", "moments", "point_gradient", "topk"]

# Number of rows per partial sum in the dtype of the points; the partial sums are added in float64.
_ROWS_PER_SUM = 4096

# Number of thread blocks that fill a GPU; a sum into K rows uses only K / 192 of them.
_BLOCKS_CUDA = 1300

# Maximum memory for the partial sums of one call, bytes, and bytes per number in them (float32 and its float64 copy).
_SLAB, _BYTES = 1 << 26, 12

# Log-sum-exp of padding rows, for which all responsibilities are then zero.
NO_SHARE = 1e30


def _family(problem: Exponents) -> Family:
    return Family(problem.shape[2], tuple(problem.U.shape[1:]), problem.x.dtype)


def _halves(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Split float64 values into numbers of a dtype with this sum: two for float32, so that differences are accurate."""
    head = values.to(dtype)
    return [head, (values - head).to(dtype)] if dtype == torch.float32 else [head]


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate columns, with zeros up to the length of an aligned row."""
    width = sum(part.shape[1] for part in parts)
    zeros = parts[0].new_zeros(len(parts[0]), aligned(width, dtype) - width)
    return torch.cat([part.to(dtype) for part in (*parts, zeros)], dim=1)


def _points(problem: Exponents, *known: Tensor, schedule: Schedule | None = None) -> Tensor:
    """Return the rows of the points: their coordinates, and known values (N,); for a schedule, those of its row ranges."""
    rows = slice(None) if schedule is None else schedule.rows
    coordinates = _halves(problem.x[rows].double() - problem.center, problem.x.dtype)
    return _joined([*coordinates, *(value[rows, None] for value in known)], problem.x.dtype)


def _batches(x: Tensor, batches: int, place: int) -> Tensor:
    """Split points into batches of equal size (B, n, ...), with padding; the log-sum-exps are in column ``place``."""
    size = -(-len(x) // batches)
    padding = x.new_zeros(batches * size - len(x), x.shape[1])
    padding[:, place] = NO_SHARE
    return torch.cat([x, padding]).view(batches, size, -1)


def _parameters(problem: Exponents, *, gradient: bool = False, schedule: Schedule | None = None) -> Tensor:
    """Return the rows of the components; for a schedule, those of its concatenated candidate lists."""
    U = problem.U * math.sqrt(0.5)
    factors = [pack(U.mT), pack(2 * U, lower=False)] if problem.is_full else [U, 2 * U]
    columns = [problem.offsets[:, None], *_halves(problem.means, problem.x.dtype), *factors[: 1 + gradient]]
    rows = _joined(columns, problem.x.dtype)
    return rows if schedule is None else rows[schedule.index]


def _called(
    problem: Exponents, compiled: Callable[..., Any], *arguments: Tensor, schedule: Schedule | None = None
) -> Any:
    """Call a formula of KeOps, after the queued torch operations that compute its arguments."""
    ranges = None if schedule is None else schedule.ranges()
    if problem.x.is_cuda:
        # The kernels of KeOps follow the operations of the default stream, on which they are launched.
        current = torch.cuda.current_stream(problem.x.device)
        if current != torch.cuda.default_stream(problem.x.device):
            current.synchronize()
    with user_threads():
        return compiled(*arguments, ranges=ranges)


def _width(problem: Exponents) -> int:
    """Return the number of sums in the moments of one component."""
    return 1 + problem.shape[2] + _family(problem).packed


def _slabs(problem: Exponents, schedule: Schedule) -> Iterator[Schedule]:
    """Split a schedule into parts whose moments fit into the memory of one slab."""
    most = max(1, _SLAB // (_BYTES * _width(problem)))
    if len(schedule.index) <= most:
        yield schedule
        return
    cuts, size = [0], 0
    for place, length in enumerate(schedule.lengths.tolist()):
        if size and size + length > most:
            cuts.append(place)
            size = 0
        size += length
    for first, last in pairwise([*cuts, len(schedule.owner)]):
        chosen = torch.zeros_like(schedule.owner, dtype=torch.bool)
        chosen[first:last] = True
        yield schedule.only(chosen)


def _listed(
    problem: Exponents, schedule: Schedule | None, reduce: Callable[[Schedule | None], tuple[Tensor, ...]]
) -> Any:
    """Apply ``reduce`` to all pairs, or to the slabs of a schedule with concatenation of the results."""
    if schedule is None:
        return reduce(None)
    slabs = [reduce(slab) for slab in _slabs(problem, schedule)]
    return tuple(torch.cat(columns) for columns in zip(*slabs, strict=True))


@healing
def logsumexp(problem: Exponents, schedule: Schedule | None) -> tuple[Tensor]:
    """Compute the log-sum-exps ℓ (N,), or those of the rows of a schedule, nats; not finite if float32 overflows."""

    def reduce(schedule: Schedule | None) -> tuple[Tensor]:
        arguments = _points(problem, schedule=schedule), _parameters(problem, schedule=schedule)
        compiled = symbolic.logsumexp(LazyTensor, _family(problem))
        return (_called(problem, compiled, *arguments, schedule=schedule).view(-1),)

    with guarded(problem, "logsumexp", schedule is None) as LazyTensor:
        return _listed(problem, schedule, reduce)


@healing
def topk(problem: Exponents, schedule: Schedule | None, k: int) -> tuple[Tensor, Tensor]:
    """Compute the k largest exponents (N, k), nats, and their components (N, k), for all rows or those of a schedule."""

    def reduce(schedule: Schedule | None) -> tuple[Tensor, Tensor]:
        arguments = _points(problem, schedule=schedule), _parameters(problem, schedule=schedule)
        compiled = symbolic.topk(LazyTensor, _family(problem), k)
        values, places = _called(problem, compiled, *arguments, schedule=schedule)
        # For lists with fewer than k components, the positions beyond their end are arbitrary.
        index = places.long() if schedule is None else schedule.index[places.long().clamp(0, len(schedule.index) - 1)]
        return -values, index

    with guarded(problem, "topk", k, schedule is None) as LazyTensor:
        return _listed(problem, schedule, reduce)


@healing
def moments(
    problem: Exponents, values: Tensor, weights: Tensor, schedules: Sequence[Schedule] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute S0 (K,), S1 (K, D), S2 (K, D, D), (K, D) or (K,) about the means, float64, given ℓ (N,) and weights g (N,).

    The points are split into batches, or into the row ranges of schedules, so that partial sums are accurate and a GPU is fully
    used. Partial sums are computed in blocks to limit their memory.
    """
    N, K, D = problem.shape
    family, width = _family(problem), _width(problem)

    sums = torch.zeros(K, width, dtype=torch.float64, device=problem.x.device)
    with guarded(problem, "moments", schedules is None) as LazyTensor:
        compiled = symbolic.moments(LazyTensor, family, schedules is None)
        if schedules is None:
            batches = -(-N // _ROWS_PER_SUM)
            if problem.x.is_cuda:
                batches = min(N, max(batches, -(-_BLOCKS_CUDA // -(-K // 192))))
            # Number of rows per batch, of components per slab, and of rows per slab.
            size = -(-N // batches)
            some = max(1, min(K, _SLAB // (_BYTES * width)))
            most = size * max(1, _SLAB // (_BYTES * width * some))
            for first in range(0, K, some):
                p = _parameters(problem.components(slice(first, first + some)))[None]
                for start in range(0, N, most):
                    rows = slice(start, min(N, start + most))
                    x = _points(problem.rows(rows), values[rows], weights[rows])
                    x = _batches(x, -(-len(x) // size), family.parts * D)
                    sums[first : first + some] += _called(problem, compiled, x, p).double().sum(0)
        else:
            for schedule in schedules:
                for slab in _slabs(problem, schedule):
                    arguments = _points(problem, values, weights, schedule=slab), _parameters(problem, schedule=slab)
                    sums.index_add_(0, slab.index, _called(problem, compiled, *arguments, schedule=slab).double())
    S1, S2, S0 = sums[:, :D], sums[:, D:-1], sums[:, -1]
    if family.is_full:
        return S0, S1, symmetric(S2, D)
    return S0, S1, S2[:, 0] if family.factor == (1,) else S2


@healing
def point_gradient(
    problem: Exponents, values: Tensor, weights: Tensor, schedules: Sequence[Schedule] | None = None
) -> Tensor:
    """Compute ∂(Σ g ℓ)/∂x (N, D), in the dtype of the points, given ℓ (N,) and weights g (N,)."""
    N, _, D = problem.shape
    averages = problem.x.new_empty(N, D)
    with guarded(problem, "point_gradient", schedules is None) as LazyTensor:
        compiled = symbolic.point_gradient(LazyTensor, _family(problem))
        slabs = [None] if schedules is None else chain.from_iterable(_slabs(problem, part) for part in schedules)
        for slab in slabs:
            arguments = (
                _points(problem, values, schedule=slab),
                _parameters(problem, gradient=True, schedule=slab),
            )
            rows = slice(None) if slab is None else slab.rows
            averages[rows] = _called(problem, compiled, *arguments, schedule=slab).view(-1, D)
    return -weights.to(averages)[:, None] * averages
