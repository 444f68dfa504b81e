r"""Upper bounds on the component densities over a kd-tree leaf, and candidate lists of components.

Let b be the center of a leaf, s the smaller one of the support functions of its oriented bounding box and of its enclosing
ellipsoid, and :math:`y = U_k^\top (b - \mu_k)`. By the Cauchy-Schwarz inequality, all points x of the leaf satisfy

.. math::

    \lVert U_k^\top (x - \mu_k) \rVert \ge \lVert y \rVert - s(U_k y) / \lVert y \rVert, \qquad\text{so}\qquad
    e_k(x) \le u_k = c_k - \tfrac12 \max(0, \lVert y \rVert - s(U_k y) / \lVert y \rVert)^2 .

A set of components with :math:`\sum \exp u_k` below a limit may be skipped. Candidate lists are refined from the root of the tree
down to the leaves.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from gmmkeops.reductions.cores import cores, on_cores
from gmmkeops.reductions.library import Level, ListCall, load
from gmmkeops.reductions.library import reason as unavailable
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.truncation.tree import Boxes, Cloud

__all__ = ["Bounds", "Schedule", "Whole", "candidate_lists"]

# Number of pairs of leaf and component that are processed at a time, so that they stay in cache; a GPU needs large kernels.
_PAIRS, _PAIRS_CUDA = 1 << 15, 1 << 22

# Bounds that are at least this far below the limit are pruned, nats; the largest depth is tried first.
_DEPTHS = (6.0, 4.0, 3.0, 2.0, 1.0)

# Rounding error of a bound in float64, as a fraction of the lengths that it is computed from.
_ROUNDING = 1e-13

# Smallest bound, nats; and sum of exponentials, relative to a limit, below which terms may have underflowed.
_LOWEST, _FAINT = -1e308, 1e-250


@dataclass(frozen=True)
class Whole:
    """Numbers of a schedule whose row ranges are all leaves of a kd-tree, in their order, each with a list of its own.

    Args:
        cloud: The kd-tree.
        pairs: Number of point-component pairs that are evaluated.
        longest: Number of components of the longest list.
    """

    cloud: Cloud
    pairs: int
    longest: int


@dataclass(frozen=True)
class Schedule:
    """Row ranges, their candidate lists of components, and bounds on the pruned densities.

    Args:
        boxes: Indices of the kd-tree leaves that have lists (T,).
        index: Components of all lists, concatenated.
        pointer: Position of the first entry of each list in ``index``, and of the end of the last list (T + 1,).
        pruned: Upper bound log Σ exp u on the density of the components that are not in each list (T,), nats.
        spans: First and last-plus-one row of each row range (S, 2).
        owner: Index of the list of each row range (S,).
        floor: Smallest minimum over each row range (S,) for which its list is long enough, nats; -inf for lists of all
            components. None if the floors have not been set.
        whole: Numbers of a schedule of all leaves that have been read from the device, or None.
    """

    boxes: Tensor
    index: Tensor
    pointer: Tensor
    pruned: Tensor
    spans: Tensor
    owner: Tensor
    floor: Tensor | None = None
    whole: Whole | None = None

    @property
    def lengths(self) -> Tensor:
        """Number of components in the list of each row range (S,)."""
        return self.pointer.diff()[self.owner]

    @property
    def pairs(self) -> int:
        """Number of point-component pairs that are evaluated."""
        return self.whole.pairs if self.whole is not None else int((self.spans.diff(dim=1)[:, 0] * self.lengths).sum())

    @property
    def rows(self) -> Tensor:
        """Indices of the rows of all row ranges, concatenated."""
        first, last = self.spans.T
        sizes = last - first
        place = torch.arange(int(sizes.sum()), device=sizes.device)
        return place + (first - sizes.cumsum(0) + sizes).repeat_interleave(sizes)

    def minima(self, values: Tensor) -> Tensor:
        """Compute the minimum over each row range (S,), float64, of values at :attr:`rows`."""
        sizes = self.spans.diff(dim=1)[:, 0]
        place = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        least = torch.full((len(sizes),), math.inf, dtype=torch.float64, device=values.device)
        return least.scatter_reduce(0, place, values.double(), "amin")

    def good(self, minima: Tensor) -> Tensor:
        """Return a mask (S,) of the row ranges whose list was long enough, given their minima (S,); False for NaN."""
        assert self.floor is not None, "a truncation sets the floors of the schedules that it returns"
        return (minima >= self.floor) | (self.floor == -math.inf)

    def only(self, chosen: Tensor) -> Schedule:
        """Select some row ranges by a boolean mask (S,), with their lists."""
        lengths = self.pointer.diff()
        kept = torch.zeros_like(self.boxes, dtype=torch.bool)
        kept[self.owner[chosen]] = True
        pointer = torch.cat([lengths.new_zeros(1), lengths[kept].cumsum(0)])
        owner = (kept.cumsum(0) - 1)[self.owner[chosen]]
        index = self.index[kept.repeat_interleave(lengths)]
        floor = None if self.floor is None else self.floor[chosen]
        return Schedule(self.boxes[kept], index, pointer, self.pruned[kept], self.spans[chosen], owner, floor)

    def ranges(self) -> tuple[Tensor, ...]:
        """Return the ``ranges`` argument of KeOps for :attr:`rows` and :attr:`index`, for reductions over either of them."""
        ends = self.spans.diff(dim=1)[:, 0].cumsum(0)
        # KeOps uses int64 ranges directly; it would convert others on torch's stream, which it does not wait for.
        points = torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], 1)
        lists = torch.stack([self.pointer[:-1], self.pointer[1:]], 1)
        slices = torch.arange(1, len(points) + 1, device=points.device)
        return points, slices, lists[self.owner], lists, slices, points

    def split(self, most: int, longest: int = 1 << 62) -> Schedule:
        """The schedule with long row ranges split, so that none has more than ``longest`` rows or about ``most`` pairs."""
        first, last = self.spans.T
        rows = (most // self.lengths.clamp(min=1)).clamp(min=32, max=longest)
        parts = -((first - last) // rows)
        if not bool((parts > 1).any()):
            return self
        owner = self.owner.repeat_interleave(parts)
        number = torch.arange(len(owner), device=owner.device) - (parts.cumsum(0) - parts).repeat_interleave(parts)
        start = first.repeat_interleave(parts) + number * rows.repeat_interleave(parts)
        stop = torch.minimum(start + rows.repeat_interleave(parts), last.repeat_interleave(parts))
        floor = None if self.floor is None else self.floor.repeat_interleave(parts)
        return replace(self, spans=torch.stack([start, stop], 1), owner=owner, floor=floor, whole=None)


def candidate_lists(cloud: Cloud, problem: Exponents, limit: Tensor, *, single: bool = False) -> Schedule:
    """Compute candidate lists of the kd-tree leaves, such that the pruned density stays below a limit.

    Args:
        cloud: The kd-tree.
        problem: Exponents with the component parameters.
        limit: Limit on log Σ exp u of the pruned components of each leaf (B,), nats. Leaves with +inf get no list, and leaves
            with -inf a list of all components.
        single: Whether the limit applies to each u, rather than to log Σ exp u.
    """
    if not limit.is_cuda and unavailable() is None:
        return compiled_lists(cloud, problem, limit, single)
    root, everybody = limit.new_zeros(1, dtype=torch.int64), torch.arange(problem.shape[1], device=limit.device)
    lists = _Level(root, everybody, root.new_tensor([0, len(everybody)]), limit.new_full((1,), -math.inf))
    bounds, above = Bounds(problem), 1
    for boxes in cloud.levels:
        count = len(boxes.center)
        least = limit.view(count, -1).amin(1)
        lists = _refine(lists, boxes, count // above, bounds, least, last=count == cloud.boxes, single=single)
        above = count
    owner = torch.arange(len(lists.boxes), device=limit.device)
    return Schedule(lists.boxes, lists.index, lists.pointer, lists.pruned, cloud.spans(lists.boxes), owner)


def compiled_lists(cloud: Cloud, problem: Exponents, limit: Tensor, single: bool) -> Schedule:
    """Compute the lists of :func:`candidate_lists` by the compiled library."""
    U = problem.U.contiguous()
    parts = [
        part.contiguous()
        for part in (limit, problem.offsets, problem.means, U, problem.center, U.flatten(1).norm(dim=1))
    ]
    tensors = [[part.contiguous() for part in boxes.tensors] for boxes in cloud.levels]
    levels, above = (Level * len(tensors))(), 1
    for level, level_tensors in zip(levels, tensors, strict=True):
        count = len(level_tensors[0])
        level.__init__(count, count // above, cloud.boxes // count, *(part.data_ptr() for part in level_tensors))
        above = count
    (K, D), library, instructions = problem.shape[1:], *load()
    shape = problem.is_full, U.shape[1:] == (1,), single, cores(), K, D, len(levels)
    call = ListCall(*shape, levels, *(part.data_ptr() for part in parts), U[0].numel())
    if library.gmmkeops_lists(ctypes.byref(call), instructions) != 0:
        raise MemoryError(f"There is not enough memory for the candidate lists of {cloud.boxes} kd-tree leaves.")
    try:
        found, (T, E) = call.result, (call.result.count, call.result.total)
        sizes = (T, E, T, T)
        fields = found.boxes, found.index, found.lengths, found.pruned
        copies = [
            np.ctypeslib.as_array(field, (size,)).copy() if size else np.empty(0, np.int64)
            for field, size in zip(fields, sizes, strict=True)
        ]
    finally:
        library.gmmkeops_release(ctypes.byref(call))
    boxes, index, lengths, pruned = map(torch.from_numpy, copies)
    pointer = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Schedule(
        boxes, index, pruned=pruned.double(), pointer=pointer, spans=cloud.spans(boxes), owner=torch.arange(T)
    )


@dataclass(frozen=True)
class _Level:
    """Candidate lists of some nodes of a level of the tree, as in :class:`Schedule`."""

    boxes: Tensor
    index: Tensor
    pointer: Tensor
    pruned: Tensor


class Bounds:
    """Upper bounds u of exponents over nodes of the kd-tree."""

    def __init__(self, problem: Exponents) -> None:
        self.means, self.center = problem.means, problem.center
        # Margin for rounding errors in differences of large numbers.
        self.offsets = problem.offsets + _ROUNDING * problem.offsets.abs()
        self.U, self.full = problem.U.contiguous(), problem.is_full
        self.size = self.U.flatten(1).norm(dim=1)

    def of(self, boxes: Boxes, which: Tensor, index: Tensor) -> Tensor:
        """Compute bounds u (P, C, L), nats, finite, for C nodes ``which`` (P, C) and L components ``index`` (P, L)."""
        P, C = which.shape
        L, D = index.shape[1], self.means.shape[1]
        b = boxes.center[which] - self.center
        origin = b[:, :1]
        b, mu, U = b - origin, self.means[index] - origin, self.U[index]
        if self.full:
            wide = U.permute(0, 2, 1, 3).reshape(P, D, L * D)
            y = (b @ wide).view(P, C, L, D) - (mu[:, :, None] @ U).view(P, 1, L, D)
            slope = y[..., :1] * U[:, None, :, :, 0]
            for e in range(1, D):
                slope.addcmul_(y[..., e : e + 1], U[:, None, :, :, e])
        else:
            U = U[:, None]
            y = (b[:, :, None] - mu[:, None]) * U
            slope = y * U
        norm = y.norm(dim=-1)
        t = slope @ boxes.axes[which]
        box = (t.abs() @ boxes.half[which][..., None])[..., 0]
        ellipsoid = (t * boxes.semi[which][:, :, None]).norm(dim=-1)
        support = torch.minimum(box, ellipsoid) / norm.clamp(min=1e-300)
        distances = mu.norm(dim=-1)[:, None] + (b.norm(dim=-1) + boxes.reach[which])[..., None]
        slack = _ROUNDING * self.size[index][:, None] * distances
        least = norm - support * (1 + _ROUNDING) - slack
        # After an overflow there is no bound (distance zero). Bounds are finite, since -inf denotes that nothing was pruned.
        least.nan_to_num_(nan=0.0).clamp_(min=0)
        return (self.offsets[index][:, None] - (0.5 - _ROUNDING) * least.square_()).clamp_(min=_LOWEST)


def _drop(u: Tensor, limit: Tensor, before: Tensor, safe: float, *, spend: bool) -> tuple[Tensor, Tensor]:
    """Choose the bounds u (P, C, L) to keep, such that log Σ exp u of the others stays below ``limit`` (P, C).

    The sum includes components that were pruned ``before`` (P, C; log Σ exp u). Bounds that are ``safe`` nats below the limit are
    always pruned; with ``spend``, more are pruned if possible.

    Returns:
        The mask of kept bounds (P, C, L), and log Σ exp u of all pruned components (P, C).
    """
    # A limit of -inf prunes nothing; limits below the smallest bound are equivalent to the smallest bound.
    finite = limit.clamp(min=_LOWEST)
    depth_of = u - finite[..., None]
    size = depth_of.exp().clamp_(max=2.0)
    spent = (before - finite).exp()
    # An estimated limit may be too high. One component is always kept, and the pass detects that the list was too short.
    best = u >= u.amax(-1, keepdim=True)
    keep = (depth_of > -safe) | best
    left = (size * ~keep).sum(-1) + spent
    for depth in _DEPTHS if spend else ():
        fewer = (depth_of > -depth) | best
        more = (size * ~fewer).sum(-1) + spent
        better = (more < 1) & (more > left)
        keep, left = torch.where(better[..., None], fewer, keep), torch.where(better, more, left)
    everything = limit == -math.inf
    keep |= everything[..., None]
    pruned = torch.where(everything, before, left.log() + finite)
    # If exponentials of pruned components underflow, their sum is computed by a log-sum-exp.
    faint = (left < _FAINT) & (limit.abs() < math.inf)
    if bool(faint.any()):
        where = faint.nonzero(as_tuple=True)
        others = u[where].masked_fill(keep[where], -math.inf)
        pruned[where] = torch.logaddexp(others.logsumexp(-1), before[where])
    return keep, pruned


def _refine(
    parents: _Level, boxes: Boxes, children: int, bounds: Bounds, limit: Tensor, *, last: bool, single: bool
) -> _Level:
    """Compute the lists of child nodes from those of their parents, for children whose ``limit`` is not +inf.

    ``limit`` bounds log Σ exp u of the pruned components, or each u if ``single``. On the last level as many components as
    possible are pruned; on the levels above, only components that are far below the limit.
    """
    lengths = parents.pointer.diff()
    K = len(bounds.offsets)
    # Chunks of parents, of about equal work.
    work = (lengths * children).cumsum(0)
    total, most_components = torch.stack([work[-1], lengths.amax()]).tolist()
    chunks = max(1, min(len(lengths), -(-total // (_PAIRS_CUDA if limit.is_cuda else _PAIRS))))
    parts = [torch.arange(len(lengths), device=work.device)]
    if chunks > 1:
        cuts = torch.searchsorted(work, torch.arange(1, chunks, device=work.device) * (work[-1] / chunks)).unique()
        parts = [part for part in parts[0].tensor_split(cuts.cpu()) if len(part)]

    def chunk(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        which = parents.boxes[rows][:, None] * children + torch.arange(children, device=rows.device)
        longest = int(lengths[rows].max()) if chunks > 1 else most_components
        place = torch.arange(longest, device=rows.device)
        index = parents.index[(parents.pointer[rows][:, None] + place).clamp(max=len(parents.index) - 1)]
        u = bounds.of(boxes, which, index)
        filled = (place < lengths[rows][:, None])[:, None]
        u.masked_fill_(~filled, -math.inf)
        most = limit[which]
        before = parents.pruned[rows][:, None].expand(which.shape)
        if single:
            keep = u >= most[..., None]
            keep |= u >= u.amax(-1, keepdim=True)
            pruned = torch.maximum(u.masked_fill(keep, -math.inf).amax(-1), before)
        else:
            keep, pruned = _drop(u, most, before, math.log(K) + 3.0, spend=last)
        wanted = most < math.inf
        keep &= filled & wanted[..., None]
        index = index[:, None].expand_as(u)
        # Each selection by a mask waits for a GPU.
        chosen = wanted.view(-1).nonzero()[:, 0]
        which, counts, pruned = (part.reshape(-1)[chosen] for part in (which, keep.sum(-1), pruned))
        return which, index[keep], counts, pruned

    workers = 1 if limit.is_cuda else max(1, min(cores(), len(parts)))
    share = -(-len(parts) // workers)
    found = on_cores(lambda w: [chunk(rows) for rows in parts[w * share : (w + 1) * share]], workers, limit.device)
    which, index, counts, pruned = (torch.cat(columns) for columns in zip(*chain.from_iterable(found), strict=True))
    pointer = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _Level(which, index, pointer, pruned)
