r"""Exponents as KeOps LazyTensors, and their reductions over all pairs or over a schedule.

.. math:: z = x_i - \mu_j, \qquad y = U_j^\top z, \qquad e = c_j - \tfrac12 |y|^2

float32 coordinates are stored as the sum of two float32 numbers, so that :math:`z` is accurate also far from the origin. The main
formulas are a log-sum-exp over j, and a sum over i of :math:`\exp(e - \ell_i)\, g_i\, (1, z, z z^\top)`. Spherical factors use
the diagonal formula, and tied ones are expanded. Each formula is compiled once per dimension, family and dtype. Reference:
Charlier et al. 2021, *Kernel operations on the GPU, with autodiff, without memory overflows* (JMLR 22).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions.cores import user_threads
from gmmkeops.reductions.keops.loading import guarded, healing
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
    """Residuals and exponents as LazyTensors: over N points, over batches of them, or over the kd-tree leaves of a schedule."""

    def __init__(
        self, LazyTensor: Any, problem: Exponents, batches: int | None = None, schedule: Schedule | None = None
    ) -> None:
        _, K, D = problem.shape
        self.kind: dict[str, Any] = {"dtype": problem.x.dtype, "device": problem.x.device}
        x = problem.x if schedule is None else problem.x[schedule.rows]
        x = x.double() - problem.center
        U = problem.U.expand(K, D) if problem.U.shape[1:] == (1,) else problem.U
        # The matrix argument of matvecmult is in row-major order, so Uᵀ is stored.
        U = U.mT if problem.is_full else U
        self.lead: tuple[int, ...] = ()
        self.rows = len(x)
        if batches is not None:
            self.lead, self.rows = (1,), -(-len(x) // batches)
            x = _padded(x, batches * self.rows).view(batches, self.rows, D)
        self.LazyTensor, self.batches, self.schedule, self.full = LazyTensor, batches, schedule, problem.is_full
        heads = x.to(problem.x.dtype), problem.means.to(problem.x.dtype)
        self.z = LazyTensor(heads[0].unsqueeze(-2).contiguous()) - self.j(heads[1])
        if problem.x.dtype == torch.float32:
            # A second float32 number for each coordinate, so that residuals are accurate far from the center.
            rests = x - heads[0], problem.means - heads[1]
            rest = rests[0].to(heads[0]).unsqueeze(-2).contiguous()
            self.z = self.z + (LazyTensor(rest) - self.j(rests[1]))
        U_j = self.j(U.reshape(K, -1))
        y = U_j.matvecmult(self.z) if self.full else U_j * self.z
        self.e = self.j(problem.offsets[:, None]) - 0.5 * (y**2).sum(-1)
        if schedule is not None:
            self.e.ranges = schedule.ranges()

    def j(self, values: Tensor) -> Any:
        """Create a LazyTensor from values of the components; with a schedule, from those of its concatenated lists."""
        values = values if self.schedule is None else values[self.schedule.index]
        return self.LazyTensor(values.to(**self.kind).reshape(*self.lead, 1, len(values), -1).contiguous())

    def i(self, values: Tensor, padding: float = 0.0) -> Any:
        """Create a LazyTensor from values of the points; ``padding`` is the value at padding points."""
        values = (values if self.schedule is None else values[self.schedule.rows]).to(self.kind["dtype"])
        if self.batches is not None:
            values = _padded(values, self.batches * self.rows, padding).view(self.batches, self.rows)
        return self.LazyTensor(values[..., None, None].contiguous())

    def shares(self, values: Tensor) -> Any:
        """Create the responsibilities exp(e - ℓ) as a LazyTensor, given ℓ; they are zero at padding points."""
        return (self.e - self.i(values, NO_SHARE)).exp()


def _padded(values: Tensor, rows: int, padding: float = 0.0) -> Tensor:
    return torch.cat([values, values.new_full((rows - values.shape[0], *values.shape[1:]), padding)])


def _called(problem: Exponents, reduction: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Call a reduction of KeOps, after waiting for the queued torch operations that compute its inputs."""
    if problem.x.is_cuda:
        torch.cuda.current_stream(problem.x.device).synchronize()
    with user_threads():
        return reduction(*arguments, **options)


def _width(problem: Exponents) -> int:
    """Return the number of entries in the moments of one component."""
    D = problem.shape[2]
    return 1 + D + (D * D if problem.is_full else D)


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
        return (_called(problem, _Formula(LazyTensor, problem, schedule=schedule).e.logsumexp, dim=1).view(-1),)

    with guarded(problem, "logsumexp") as LazyTensor:
        return _listed(problem, schedule, reduce)


@healing
def topk(problem: Exponents, schedule: Schedule | None, k: int) -> tuple[Tensor, Tensor]:
    """Compute the k largest exponents (N, k), nats, and their components (N, k), for all rows or those of a schedule."""

    def reduce(schedule: Schedule | None) -> tuple[Tensor, Tensor]:
        values, places = _called(problem, (-_Formula(LazyTensor, problem, schedule=schedule).e).Kmin_argKmin, k, dim=1)
        # For lists with fewer than k components, the positions beyond their end are arbitrary.
        index = places.long() if schedule is None else schedule.index[places.long().clamp(0, len(schedule.index) - 1)]
        return -values, index

    with guarded(problem, "topk", k) as LazyTensor:
        return _listed(problem, schedule, reduce)


@healing
def moments(
    problem: Exponents, values: Tensor, weights: Tensor, schedules: Sequence[Schedule] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute S0 (K,), S1 (K, D), S2 (K, D, D) or (K, D) about the means, float64, given ℓ (N,) and weights g (N,).

    The points are split into batches, or into the row ranges of schedules, so that partial sums are accurate and a GPU is fully
    used. Partial sums are computed in blocks to limit their memory.
    """
    N, K, D = problem.shape
    width = _width(problem)

    def look(problem: Exponents, rows: slice, batches: int | None, schedule: Schedule | None) -> Tensor:
        f = _Formula(LazyTensor, problem, batches, schedule)
        r = f.shares(values[rows]) * f.i(weights[rows])
        square = f.z.tensorprod(f.z) if f.full else f.z * f.z
        summand = (r * LazyTensor.concatenate((f.z, square), axis=-1)).concat(r)
        return _called(problem, summand.sum, dim=1 if schedule is None else 0).double()

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
    return S0, S1, S2.reshape(K, D, D) if problem.is_full else S2


@healing
def point_gradient(
    problem: Exponents, values: Tensor, weights: Tensor, schedules: Sequence[Schedule] | None = None
) -> Tensor:
    """Compute ∂(Σ g ℓ)/∂x (N, D), in the dtype of the points, given ℓ (N,) and weights g (N,)."""
    N, K, D = problem.shape
    P = problem.U @ problem.U.mT if problem.is_full else problem.U.expand(K, D) ** 2
    averages = problem.x.new_empty(N, D)
    with guarded(problem, "point_gradient") as LazyTensor:
        slabs = [None] if schedules is None else chain.from_iterable(_slabs(problem, part) for part in schedules)
        for slab in slabs:
            f = _Formula(LazyTensor, problem, schedule=slab)
            P_j = f.j(P.reshape(K, -1))
            pull = P_j.matvecmult(f.z) if f.full else P_j * f.z
            rows = slice(None) if slab is None else slab.rows
            averages[rows] = _called(problem, (f.shares(values) * pull).sum, dim=1).view(-1, D)
    return -weights.to(averages)[:, None] * averages
