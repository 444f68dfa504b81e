r"""Exponents as KeOps LazyTensors, and their reductions over all pairs or over a schedule.

.. math:: z = x_i - \mu_j, \qquad y = U_j^\top z, \qquad e = c_j - \tfrac12 |y|^2

float32 coordinates are stored as the sum of two float32 numbers, so that :math:`z` is accurate also far from the origin. The main
formulas are a log-sum-exp over j, and a sum over i of :math:`\exp(e - \ell_i)\, g_i\, (1, z, z z^\top)`. Full factors are upper
triangular; only their triangles are stored, and only the lower triangle of :math:`z z^\top` is summed. Tied factors are expanded.
Each formula is compiled once per dimension, family and dtype. Reference: Charlier et al. 2021, *Kernel operations on the GPU,
with autodiff, without memory overflows* (JMLR 22).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions.cores import user_threads
from gmmkeops.reductions.keops.loading import guarded, healing
from gmmkeops.reductions.keops.triangles import (
    lower_product,
    outer_product,
    pack,
    packed_size,
    symmetric,
    upper_product,
)
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


class _Formula:
    """Residuals and exponents as LazyTensors: over N points, over batches of them, or over the kd-tree leaves of a schedule.

    Args:
        LazyTensor: The class of KeOps.
        problem: The exponents; full factors are upper triangular.
        known: Values (N,) for each point, which are the LazyTensors ``self.known``. The first one is the log-sum-exp.
        batches: Number of batches into which the points are split.
        schedule: Row ranges and their candidate lists, instead of batches.
        gradient: Whether to create ``self.pull``, the negative gradient of the exponents with respect to the points.
    """

    def __init__(
        self,
        LazyTensor: Any,
        problem: Exponents,
        *known: Tensor,
        batches: int | None = None,
        schedule: Schedule | None = None,
        gradient: bool = False,
    ) -> None:
        D, dtype = problem.shape[2], problem.x.dtype
        self.LazyTensor, self.problem, self.schedule = LazyTensor, problem, schedule
        rows, chosen = (slice(None), slice(None)) if schedule is None else (schedule.rows, schedule.index)
        means = _parts(problem.means, dtype)
        points = [*_parts(problem.x[rows].double() - problem.center, dtype), *(value[rows, None] for value in known)]
        factors = _factors(problem, gradient)
        x = _columns(points, dtype)
        p = _columns([problem.offsets[:, None], *means, *factors], dtype)[chosen]
        if batches is not None:
            size = -(-len(x) // batches)
            x = torch.cat([x, x.new_zeros(batches * size - len(x), x.shape[1])])
            if known:
                x[len(points[0]) :, len(means) * D] = NO_SHARE
            x, p = x.view(batches, size, -1), p[None]
        x_i, p_j = LazyTensor(x.unsqueeze(-2)), LazyTensor(p.unsqueeze(-3))
        self.z = x_i[:D] - p_j[1 : 1 + D]
        if len(means) > 1:
            self.z = self.z + (x_i[D : 2 * D] - p_j[1 + D : 1 + 2 * D])
        self.known = [x_i.elem(len(means) * D + place) for place in range(len(known))]
        begin = 1 + len(means) * D
        self.y = self._product(p_j, begin, self.z, lower_product)
        self.pull = self._product(p_j, begin + factors[0].shape[1], self.y, upper_product) if gradient else None
        self.e = p_j.elem(0) - (self.y**2).sum(-1)

    def _product(self, p_j: Any, begin: int, vector: Any, product: Callable[..., Any]) -> Any:
        """Multiply a vector by the factor that begins at an entry of the parameters."""
        if self.problem.is_full:
            return product(self.LazyTensor, p_j, begin, vector, self.problem.shape[2])
        return p_j[begin : begin + self.problem.U.shape[1]] * vector

    def share(self) -> Any:
        """Create the responsibility exp(e - ℓ) as a LazyTensor; it is zero at padding points."""
        return (self.e - self.known[0]).exp()

    def once(self, formula: Any, *parts: Any) -> Any:
        """Return a formula that evaluates the residual and other parts once; a part may contain those that follow it."""
        for part in (*parts, self.z):
            formula = formula.factorize(part)
        # Each part has brought its variables, for each of which KeOps searches the formula.
        formula.variables = tuple({id(variable): variable for variable in formula.variables}.values())
        if self.schedule is not None:
            formula.ranges = self.schedule.ranges()
        return formula


def _parts(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Split float64 values into numbers of a dtype with this sum: two for float32, so that differences are accurate."""
    head = values.to(dtype)
    return [head, (values - head).to(dtype)] if dtype == torch.float32 else [head]


def _factors(problem: Exponents, gradient: bool) -> list[Tensor]:
    r"""Return the factors of y = Uᵀz / √2, packed (K, P), and those of its product that is the negative gradient of e."""
    U = problem.U * math.sqrt(0.5)
    if not problem.is_full:
        return [U, 2 * U] if gradient else [U]
    return [pack(U.mT), pack(2 * U, lower=False)] if gradient else [pack(U.mT)]


def _columns(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate columns, with zeros up to a multiple of 16 bytes, so that a GPU reads four float32 numbers at a time."""
    missing = -sum(part.shape[1] for part in parts) % (16 // dtype.itemsize)
    return torch.cat([part.to(dtype) for part in (*parts, parts[0].new_zeros(len(parts[0]), missing))], dim=1)


def _called(problem: Exponents, reduction: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Call a reduction of KeOps, after waiting for the queued torch operations that compute its inputs."""
    if problem.x.is_cuda:
        torch.cuda.current_stream(problem.x.device).synchronize()
    with user_threads():
        return reduction(*arguments, **options)


def _width(problem: Exponents) -> int:
    """Return the number of sums in the moments of one component."""
    D = problem.shape[2]
    return 1 + D + (packed_size(D) if problem.is_full else problem.U.shape[1])


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
        f = _Formula(LazyTensor, problem, schedule=schedule)
        return (_called(problem, f.once(f.e).logsumexp, dim=1).view(-1),)

    with guarded(problem, "logsumexp", schedule is None) as LazyTensor:
        return _listed(problem, schedule, reduce)


@healing
def topk(problem: Exponents, schedule: Schedule | None, k: int) -> tuple[Tensor, Tensor]:
    """Compute the k largest exponents (N, k), nats, and their components (N, k), for all rows or those of a schedule."""

    def reduce(schedule: Schedule | None) -> tuple[Tensor, Tensor]:
        f = _Formula(LazyTensor, problem, schedule=schedule)
        values, places = _called(problem, f.once(-f.e).Kmin_argKmin, k, dim=1)
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
    width, full, single = _width(problem), problem.is_full, problem.U.shape[1:] == (1,)

    def look(problem: Exponents, rows: slice, batches: int | None, schedule: Schedule | None) -> Tensor:
        f = _Formula(LazyTensor, problem, values[rows], weights[rows], batches=batches, schedule=schedule)
        r = f.share() * f.known[1]
        w = r * f.z
        products = outer_product(LazyTensor, w, f.z, D) if full else (w * f.z).sum(-1) if single else w * f.z
        summand = f.once(LazyTensor.concatenate((w, products, r), axis=-1), w, r)
        return _called(problem, summand.sum, dim=1 if schedule is None else 0, sum_scheme="direct_sum").double()

    sums = torch.zeros(K, width, dtype=torch.float64, device=problem.x.device)
    with guarded(problem, "moments", schedules is None) as LazyTensor:
        if schedules is None:
            batches = -(-N // _ROWS_PER_SUM)
            if problem.x.is_cuda:
                batches = min(N, max(batches, -(-_BLOCKS_CUDA // -(-K // 192))))
            # Number of rows per batch, of components per slab, and of rows per slab.
            size = -(-N // batches)
            some = max(1, min(K, _SLAB // (_BYTES * width)))
            most = size * max(1, _SLAB // (_BYTES * width * some))
            for first in range(0, K, some):
                part = problem.components(slice(first, first + some))
                for start in range(0, N, most):
                    rows = slice(start, min(N, start + most))
                    partial = look(part.rows(rows), rows, -(-(rows.stop - start) // size), None)
                    sums[first : first + some] += partial.sum(0)
        else:
            for schedule in schedules:
                for slab in _slabs(problem, schedule):
                    sums.index_add_(0, slab.index, look(problem, slice(None), None, slab))
    S1, S2, S0 = sums[:, :D], sums[:, D:-1], sums[:, -1]
    return S0, S1, symmetric(S2, D) if full else S2[:, 0] if single else S2


@healing
def point_gradient(
    problem: Exponents, values: Tensor, weights: Tensor, schedules: Sequence[Schedule] | None = None
) -> Tensor:
    """Compute ∂(Σ g ℓ)/∂x (N, D), in the dtype of the points, given ℓ (N,) and weights g (N,)."""
    N, _, D = problem.shape
    averages = problem.x.new_empty(N, D)
    with guarded(problem, "point_gradient", schedules is None) as LazyTensor:
        slabs = [None] if schedules is None else chain.from_iterable(_slabs(problem, part) for part in schedules)
        for slab in slabs:
            f = _Formula(LazyTensor, problem, values, schedule=slab, gradient=True)
            r = f.share()
            rows = slice(None) if slab is None else slab.rows
            averages[rows] = _called(problem, f.once(r * f.pull, r, f.y).sum, dim=1).view(-1, D)
    return -weights.to(averages)[:, None] * averages
