r"""Boxes of near points, and certified lists of the components that each of them can feel.

For a box with centre b and support function s (the smaller of its oriented box's and its enclosing ellipsoid's), and the
residual :math:`y = U_k^\top (b - \mu_k)`, every point x of it has, by Cauchy and Schwarz,

.. math::

    \lVert U_k^\top (x - \mu_k) \rVert \ge \lVert y \rVert - s(U_k y) / \lVert y \rVert, \qquad\text{so}\qquad
    e_k(x) \le u_k = c_k - \tfrac12 \max(0, \lVert y \rVert - s(U_k y) / \lVert y \rVert)^2 .

A set of components with :math:`\sum \exp u_k \le \varepsilon \min_x \exp \ell(x)` may be left out:
:math:`0 \le \ell_{true} - \ell_{kept} \le -\log(1 - \varepsilon)` at each point. The minimum over the box is a guess from the
sweep before; the sweep itself yields a valid one, since what is kept is a lower bound of the truth, and a box that fails is
done again. Lists are found from the top of a tree of boxes down. Reference for the tree: Sproull 1991, *Refinements to
nearest-neighbor searching in k-dimensional trees*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmmkeops.reductions._cores import on_cores
from gmmkeops.reductions._exponents import Exponents

__all__ = ["Cloud", "Plan", "Truncation"]

# Binary splits between two levels of boxes that lists are found on.
_STEP = 3
# Rows that a node's principal axis is estimated from.
_AXIS_ROWS = 512
# Pairs of box and component that are bounded at a time, so that the work stays in cache; a GPU wants long kernels.
_PAIRS, _PAIRS_CUDA = 1 << 15, 1 << 22
# Rows turned to float64 at a time.
_ROWS = 1 << 19
# Points of a box that a first guess looks at, and how far below their least ℓ the others' may be, in their ranges.
_GUESSES, _MARGIN = 4, 2.0
# Depths below the limit at which dropping is tried, nats, deepest first.
_DEPTHS = (6.0, 4.0, 3.0, 2.0, 1.0)
# What lists are given beside the last minima, nats, so that few boxes fail when those sink a little.
_GIVE = 0.25
# Lists are made for so many moves as the last one, if those are no more than so many deviations on average; and made anew
# when more than this share of the boxes fails with them.
_AHEAD, _GENTLE, _FAILURES = 4.0, 0.5, 0.02
# Lists longer than this share of all components do not pay for being lists.
_PAYS = 0.5
# What float64's rounding may do to a bound, as a share of the lengths that went into it.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class _Boxes:
    """One level of the tree: boxes in the order of the points.

    Args:
        centre: b (B, D).
        axes: Q (B, D, D), orthonormal columns.
        half: Half widths along the axes (B, D).
        semi: Semi-axes of an enclosing ellipsoid along the same axes (B, D).
        reach: Largest distance from the centre (B,), with room for rounding.
    """

    centre: Tensor
    axes: Tensor
    half: Tensor
    semi: Tensor
    reach: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return self.centre, self.axes, self.half, self.semi, self.reach

    @classmethod
    def of(cls, points: Tensor) -> _Boxes:
        """The boxes of points (B, rows, D)."""
        parts = [cls._few(part) for part in points.split(max(1, _ROWS // points.shape[1]))]
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @staticmethod
    def _few(points: Tensor) -> tuple[Tensor, ...]:
        z = points.double()
        mean = z.mean(1, keepdim=True)
        z = z - mean
        _, axes = torch.linalg.eigh(z.mT @ z / z.shape[1])
        t = z @ axes
        low, high = t.amin(1, keepdim=True), t.amax(1, keepdim=True)
        middle = 0.5 * (low + high)
        t = t - middle
        deviation = t.square().mean(1, keepdim=True).sqrt()
        radius = (t / deviation.clamp(min=1e-300)).square().sum(-1).amax(1).sqrt()
        half = 0.5 * (high - low)[:, 0]
        centre = (mean + middle @ axes.mT)[:, 0]
        return centre, axes, half, radius[:, None] * deviation[:, 0], half.norm(dim=1) + centre.abs().amax(1)


@dataclass(frozen=True)
class Plan:
    """What a sweep over boxes is to do: which rows see which components, and what that leaves out.

    Args:
        boxes: Boxes that have lists (T,).
        index: Components of all lists, one after the other.
        pointer: Where each list begins and the last one ends (T + 1,).
        dropped: log Σ exp u of what each list leaves out (T,), nats.
        spans: First and last-plus-one row of each stretch to sweep (S, 2).
        owner: The list that each stretch sees (S,).
    """

    boxes: Tensor
    index: Tensor
    pointer: Tensor
    dropped: Tensor
    spans: Tensor
    owner: Tensor

    @property
    def lengths(self) -> Tensor:
        """Components that each stretch sees (S,)."""
        return self.pointer.diff()[self.owner]

    @property
    def pairs(self) -> int:
        """Pairs of point and component that are looked at."""
        return int((self.spans.diff(dim=1)[:, 0] * self.lengths).sum())

    @property
    def rows(self) -> Tensor:
        """All rows of its stretches, one after the other."""
        first, last = self.spans.T
        sizes = last - first
        place = torch.arange(int(sizes.sum()), device=sizes.device)
        return place + (first - sizes.cumsum(0) + sizes).repeat_interleave(sizes)

    def minima(self, values: Tensor) -> Tensor:
        """Least of values on :attr:`rows` over each stretch (S,), float64."""
        sizes = self.spans.diff(dim=1)[:, 0]
        stretch = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        least = torch.full((len(sizes),), math.inf, dtype=torch.float64, device=values.device)
        return least.scatter_reduce(0, stretch, values.double(), "amin")

    def only(self, stretches: Tensor) -> Plan:
        """Some of its stretches (a mask), with the lists that they see."""
        lengths = self.pointer.diff()
        kept = torch.zeros_like(self.boxes, dtype=torch.bool)
        kept[self.owner[stretches]] = True
        pointer = torch.cat([lengths.new_zeros(1), lengths[kept].cumsum(0)])
        owner = (kept.cumsum(0) - 1)[self.owner[stretches]]
        index = self.index[kept.repeat_interleave(lengths)]
        return Plan(self.boxes[kept], index, pointer, self.dropped[kept], self.spans[stretches], owner)

    def ranges(self) -> tuple[Tensor, ...]:
        """The same for KeOps, on :attr:`rows` and :attr:`index`, for reductions over components and over points."""
        ends = self.spans.diff(dim=1)[:, 0].cumsum(0)
        points = torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], 1).int()
        lists = torch.stack([self.pointer[:-1], self.pointer[1:]], 1).int()
        slices = torch.arange(1, len(points) + 1, device=points.device).int()
        return points, slices, lists[self.owner], lists, slices, points

    def split(self, most: int) -> Plan:
        """The same with long stretches cut, so that none has more than about ``most`` pairs."""
        first, last = self.spans.T
        rows = (most // self.lengths.clamp(min=1)).clamp(min=32)
        parts = -((first - last) // rows)
        if not bool((parts > 1).any()):
            return self
        owner = self.owner.repeat_interleave(parts)
        number = torch.arange(len(owner), device=owner.device) - (parts.cumsum(0) - parts).repeat_interleave(parts)
        start = first.repeat_interleave(parts) + number * rows.repeat_interleave(parts)
        stop = torch.minimum(start + rows.repeat_interleave(parts), last.repeat_interleave(parts))
        return replace(self, spans=torch.stack([start, stop], 1), owner=owner)


@dataclass(frozen=True)
class Cloud:
    """Points in the order of boxes of near ones.

    Args:
        points: (M, D), in order; M is N and a few points that are repeated to fill boxes.
        rank: Where in that order each of the N points is (N,).
        levels: Boxes, from coarse to fine.
        starts: First row of each of the finest boxes, and M (B + 1,).
        labelled: Whether boxes were made of points with one label.
    """

    points: Tensor
    rank: Tensor
    levels: tuple[_Boxes, ...]
    starts: Tensor
    labelled: bool = False

    @classmethod
    def tree(cls, x: Tensor, rows: int) -> Cloud:
        """The cloud of points (N, D), halved along principal axes until boxes have at most ``rows``."""
        depth = max(0, math.ceil(math.log2(len(x) / rows)))
        position, points = _ordered(x, depth)
        rank = torch.empty_like(position)
        rank[position] = torch.arange(len(position), device=x.device)
        # A level of boxes at every few splits.
        depths = sorted(range(depth, 0, -_STEP)) or [0]
        levels = tuple(_Boxes.of(points.view(1 << d, -1, x.shape[1])) for d in depths)
        starts = torch.arange((1 << depth) + 1, device=x.device) * (len(points) >> depth)
        return cls(points, rank[: len(x)], levels, starts)

    @classmethod
    def grouped(cls, x: Tensor, labels: Tensor, rows: int) -> Cloud:
        """The cloud of points (N, D) with one label (N,) in each box, in equal parts of at most ``rows``.

        In more than a few dimensions halving cannot make boxes small, but the components of a mixture can.
        """
        order = labels.argsort(stable=True)
        sizes = labels.bincount()
        parts = -(-sizes // rows)
        owner = torch.arange(len(sizes), device=x.device).repeat_interleave(parts)
        number = torch.arange(len(owner), device=x.device) - (parts.cumsum(0) - parts)[owner]
        first = (sizes.cumsum(0) - sizes)[owner]
        starts = torch.cat([first + number * sizes[owner] // parts[owner], sizes.sum()[None]])
        points = x[order]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=x.device)
        boxes = [_Boxes.of(points[a:b][None]) for a, b in pairwise(starts.tolist())]
        level = _Boxes(*(torch.cat(column) for column in zip(*(box.tensors for box in boxes), strict=True)))
        return cls(points, rank, (level,), starts, labelled=True)

    @property
    def boxes(self) -> int:
        """How many boxes the finest level has."""
        return len(self.starts) - 1

    def enter(self, values: Tensor) -> Tensor:
        """Numbers of the points (N, ...) in the cloud's order (M, ...), zero where points are repeated."""
        return values.new_zeros(len(self.points), *values.shape[1:]).index_copy_(0, self.rank, values)

    def leave(self, values: Tensor) -> Tensor:
        """Numbers in the cloud's order (M, ...) in that of the points (N, ...)."""
        return values[self.rank]

    def spans(self, boxes: Tensor) -> Tensor:
        """First and last-plus-one row of each box (T, 2)."""
        return torch.stack([self.starts[boxes], self.starts[boxes + 1]], 1)

    def lists(self, problem: Exponents, limit: Tensor, *, single: bool = False, margin: _Drift | None = None) -> Plan:
        """The components that each box must see, so that what it drops stays below a limit.

        Args:
            problem: The components.
            limit: On log Σ exp u of those that a box drops (B,), nats; +inf leaves a box out of the plan.
            single: Whether the limit is on each u instead.
            margin: How far the components may move before the plan is no longer valid; not at all if left out.
        """
        limit = limit.clamp(min=-1e300)
        root, everybody = limit.new_zeros(1, dtype=torch.int64), torch.arange(problem.shape[1], device=limit.device)
        lists = _Lists(root, everybody, root.new_tensor([0, len(everybody)]), limit.new_full((1,), -math.inf))
        bounds, above = _Bounds(problem, margin), 1
        for boxes in self.levels:
            count = len(boxes.centre)
            least = limit.view(count, -1).amin(1)
            lists = _refine(lists, boxes, count // above, bounds, least, last=count == self.boxes, single=single)
            above = count
        owner = torch.arange(len(lists.boxes), device=limit.device)
        return Plan(lists.boxes, lists.index, lists.pointer, lists.dropped, self.spans(lists.boxes), owner)


@dataclass(frozen=True)
class _Drift:
    r"""How far each component has moved, or may.

    .. math:: \lVert U'^\top (x - \mu') \rVert \ge (1 - \text{stretch}) \lVert U^\top (x - \mu) \rVert - \text{shift},
              \qquad c' \le c + \text{rise}

    since :math:`U'^\top z = A^\top U^\top z` with :math:`A = U^{-1} U'`, whose least singular value is at least
    :math:`1 - \lVert A - I \rVert`.
    """

    stretch: Tensor
    shift: Tensor
    rise: Tensor

    @classmethod
    def between(cls, old: Exponents, new: Exponents) -> _Drift:
        """From one set of K components to another; infinite where their number differs."""
        if old.U.shape != new.U.shape:
            infinite = torch.full_like(new.offsets, math.inf)
            return cls(infinite, infinite, infinite)
        moved = (new.means - old.means) + (new.centre - old.centre)
        if new.is_full:
            change, _ = torch.linalg.solve_ex(old.U, new.U - old.U)
            shift = (new.U.mT @ moved[:, :, None]).flatten(1).norm(dim=1)
        else:
            change = (new.U - old.U) / old.U
            shift = (new.U * moved).norm(dim=1)
        stretch = change.flatten(1).norm(dim=1) if new.is_full else change.abs().amax(1)
        return cls(stretch, shift, (new.offsets - old.offsets).clamp(min=0))

    def __mul__(self, factor: float) -> _Drift:
        return _Drift(*((part + part.mean()) * factor + 1e-6 for part in (self.stretch, self.shift, self.rise)))

    def within(self, margin: _Drift) -> bool:
        """Whether no component has moved further than allowed."""
        pairs = zip((self.stretch, self.shift, self.rise), (margin.stretch, margin.shift, margin.rise), strict=True)
        return len(self.rise) == len(margin.rise) and all(bool((a <= b).all()) for a, b in pairs)

    @property
    def gentle(self) -> bool:
        """Whether lists that allow for so much would not be much longer; a few restless components do not matter."""
        return float((self.shift + 5 * self.stretch).mean()) < _GENTLE


@dataclass
class Truncation:
    """One sweep after another over a cloud, each with lists that leave out less than ε of every point's density.

    Args:
        cloud: The points.
        epsilon: ε, in (0, 1).
        minima: min ℓ over each box (B,) in the last sweep, or a guess of it, nats.
        certificate: Most that the last sweep may have lost of any point's ℓ, nats.
        share: Part of all pairs that the last sweep looked at.

    Example:
        >>> import torch, gmmkeops as gk
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = 100 * torch.arange(20).repeat_interleave(500)[:, None] + torch.randn(10_000, 1, generator=generator)
        >>> sweep = gk.reductions.arrange(x, components=20, truncate=1e-4)
        >>> means, factors = 100.0 * torch.arange(20)[:, None], torch.ones(20, 1, 1)
        >>> sums = gk.reductions.moments(sweep, torch.zeros(20), means, factors)
        >>> isinstance(sweep, gk.reductions.Truncation), 0 <= sweep.certificate <= 1.01e-4, sweep.share < 0.3
        (True, True, True)
    """

    cloud: Cloud
    epsilon: float
    minima: Tensor | None = None
    certificate: float = 0.0
    share: float = 1.0
    _last: Exponents | None = field(default=None, repr=False)
    _lists: tuple[Plan, Exponents, _Drift, bool] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.cloud.rank)

    def sample(self) -> Tensor:
        """Rows of a few points of each box (B, n), for a first guess."""
        first, sizes = self.cloud.starts[:-1, None], self.cloud.starts.diff()[:, None]
        return first + torch.arange(_GUESSES, device=sizes.device) * sizes // _GUESSES

    def suppose(self, values: Tensor) -> None:
        """Takes ℓ of the sample (B, n) as the first guess."""
        low, high = values.double().aminmax(dim=1)
        guess = low - _MARGIN * (high - low)
        self.minima = torch.where(guess.isnan(), -math.inf, guess)

    def begin(self, problem: Exponents, single: bool = False) -> Plan | None:
        """The plan of a sweep; None where lists would not be shorter than all components by enough to pay.

        Args:
            problem: The components.
            single: Whether the sweep reads single exponents rather than their sum. No dropped one is then above what it
                reads, which therefore is what it would read of all.
        """
        plan = self._reused(problem, single)
        if plan is None:
            margin = None if self._last is None else _Drift.between(self._last, problem) * _AHEAD
            if margin is not None and not margin.gentle:
                margin = None
            limit = self._guess() + self._log_epsilon(single) - (0 if single else _GIVE)
            plan = self.cloud.lists(problem, limit, single=single, margin=margin)
            self._lists = None if margin is None else (plan, problem, margin, single)
        self._last = problem
        self.certificate, self.share = 0.0, self._share(problem, plan)
        if self.share > _PAYS:
            self.share = 1.0
            return None
        return plan

    def _reused(self, problem: Exponents, single: bool) -> Plan | None:
        """The last lists, if no component has moved further since than they allow for."""
        if self._lists is None:
            return None
        plan, reference, margin, kind = self._lists
        return plan if kind == single and _Drift.between(reference, problem).within(margin) else None

    def again(self, problem: Exponents, plan: Plan, minima: Tensor, single: bool = False) -> Plan | None:
        """What is left to do after a sweep that found these minima (S,) over its stretches, or None."""
        failed = minima < self.floor(problem, plan, single)
        # What is not a number has overflowed, and is looked at again with all components.
        minima = torch.where(minima.isnan(), -math.inf, minima)
        minima = minima - 2 * _rounding(problem) * minima.abs()
        lost = plan.dropped[plan.owner] - minima
        if not single and not bool(failed.all()):
            self.certificate = max(self.certificate, float(lost[~failed].max().exp().log1p()))
        boxes = plan.boxes[plan.owner]
        untouched = torch.full_like(self._guess(), math.inf)
        new = untouched.scatter_reduce(0, boxes, minima, "amin")
        self.minima = torch.where(new < math.inf, new, self._guess())
        if not bool(failed.any()):
            return None
        if int(failed.sum()) > _FAILURES * len(failed):
            self._lists = None
        guess = untouched.scatter_reduce(0, boxes[failed], minima[failed], "amin")
        rest = self.cloud.lists(problem, guess + self._log_epsilon(single), single=single)
        rest = replace(rest, spans=plan.spans[failed], owner=torch.searchsorted(rest.boxes, boxes[failed]))
        self.share += self._share(problem, rest)
        return rest

    def floor(self, problem: Exponents, plan: Plan, single: bool = False) -> Tensor:
        """The least value that each stretch (S,) may find with its list, nats."""
        least = plan.dropped[plan.owner] - self._log_epsilon(single)
        return least + _rounding(problem) * least.abs().nan_to_num(posinf=0)

    def remember(self) -> dict[str, Any]:
        """What the next sweep's lists depend on, beside the cloud."""
        last = None if self._last is None else _parameters(self._last)
        lists = None
        if self._lists is not None:
            plan, reference, margin, single = self._lists
            parts = [plan.boxes, plan.index, plan.pointer, plan.dropped, plan.spans, plan.owner]
            lists = (parts, _parameters(reference), [margin.stretch, margin.shift, margin.rise], single)
        return {
            "minima": self.minima,
            "certificate": self.certificate,
            "share": self.share,
            "last": last,
            "lists": lists,
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Goes on where :meth:`remember` was called, with the same cloud."""
        self.minima, self.certificate, self.share = memory["minima"], memory["certificate"], memory["share"]
        points = self.cloud.points[:0]
        self._last = None if memory["last"] is None else Exponents(points, *memory["last"])
        self._lists = None
        if memory["lists"] is not None:
            parts, reference, margin, single = memory["lists"]
            self._lists = Plan(*parts), Exponents(points, *reference), _Drift(*margin), single

    def _guess(self) -> Tensor:
        if self.minima is None:
            raise RuntimeError("a truncated sweep has no first guess; call suppose before begin.")
        return self.minima

    def _log_epsilon(self, single: bool) -> float:
        return 0.0 if single else math.log(self.epsilon)

    def _share(self, problem: Exponents, plan: Plan) -> float:
        return plan.pairs / (len(self.cloud.points) * problem.shape[1])


@dataclass(frozen=True)
class _Lists:
    """Lists of components of some boxes of a level: as in a plan."""

    boxes: Tensor
    index: Tensor
    pointer: Tensor
    dropped: Tensor


def _parameters(problem: Exponents) -> list[Tensor]:
    return [problem.offsets, problem.means, problem.U, problem.centre]


def _rounding(problem: Exponents) -> float:
    return 8 * torch.finfo(problem.x.dtype).eps


class _Bounds:
    """Upper bounds u of exponents over boxes."""

    def __init__(self, problem: Exponents, margin: _Drift | None) -> None:
        self.margin = margin
        self.offsets, self.means, self.centre = problem.offsets, problem.means, problem.centre
        self.U, self.full = problem.U.contiguous(), problem.is_full
        self.size = self.U.flatten(1).norm(dim=1)

    def of(self, boxes: _Boxes, which: Tensor, index: Tensor) -> Tensor:
        """u (P, C, L), nats, of C boxes ``which`` (P, C) and L components ``index`` (P, L)."""
        P, C = which.shape
        L, D = index.shape[1], self.means.shape[1]
        b = boxes.centre[which] - self.centre
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
        # What has overflowed bounds nothing.
        least = (norm - support * (1 + _ROUNDING) - slack).nan_to_num_(nan=0.0).clamp_(min=0)
        offsets = self.offsets
        if self.margin is not None:
            stretch, shift, offsets = self.margin.stretch, self.margin.shift, offsets + self.margin.rise
            least = (least * (1 - stretch[index])[:, None] - shift[index][:, None]).clamp_(min=0)
        return offsets[index][:, None] - (0.5 - _ROUNDING) * least.square_()


def _drop(u: Tensor, before: Tensor, safe: float, *, spend: bool) -> tuple[Tensor, Tensor]:
    """Which bounds u (P, C, L) to keep so that Σ exp u of the others, and of those dropped ``before`` (P, C), is below one.

    Dropping what is below -``safe`` is always allowed; ``spend`` tries to drop more. Returns what is kept, and the sum.
    """
    size = u.exp().clamp_(max=2.0)
    # A limit that is only a guess may be too high: one is always kept, and the sweep finds out.
    best = u >= u.amax(-1, keepdim=True)
    keep = (u > -safe) | best
    left = (size * ~keep).sum(-1) + before
    for depth in _DEPTHS if spend else ():
        fewer = (u > -depth) | best
        more = (size * ~fewer).sum(-1) + before
        better = (more < 1) & (more > left)
        keep, left = torch.where(better[..., None], fewer, keep), torch.where(better, more, left)
    return keep, left


def _refine(
    plan: _Lists, boxes: _Boxes, children: int, bounds: _Bounds, limit: Tensor, *, last: bool, single: bool
) -> _Lists:
    """From the lists of parents to those of their children whose ``limit`` on log Σ exp u of the dropped is finite.

    The last level drops as much as it may; those above it drop only what is next to nothing. With ``single`` the limit is
    on each u instead of on their sum.
    """
    lengths = plan.pointer.diff()
    K = len(bounds.offsets)
    # Chunks of parents, of about equal work.
    work = (lengths * children).cumsum(0)
    chunks = max(1, min(len(lengths), -(-int(work[-1]) // (_PAIRS_CUDA if limit.is_cuda else _PAIRS))))
    cuts = torch.searchsorted(work, torch.arange(1, chunks, device=work.device) * (work[-1] / chunks)).unique()
    parents = [part for part in torch.arange(len(lengths), device=work.device).tensor_split(cuts.cpu()) if len(part)]

    def chunk(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        which = plan.boxes[rows][:, None] * children + torch.arange(children, device=rows.device)
        longest = int(lengths[rows].max())
        place = torch.arange(longest, device=rows.device)
        index = plan.index[(plan.pointer[rows][:, None] + place).clamp(max=len(plan.index) - 1)]
        u = bounds.of(boxes, which, index)
        u.masked_fill_((place >= lengths[rows][:, None])[:, None], -math.inf)
        most = limit[which][..., None]
        before = plan.dropped[rows][:, None].expand(which.shape)
        if single:
            keep = u >= most
            keep |= u >= u.amax(-1, keepdim=True)
            dropped = torch.maximum(u.masked_fill(keep, -math.inf).amax(-1), before)
        else:
            keep, left = _drop(u - most, (before - limit[which]).exp(), math.log(K) + 3.0, spend=last)
            dropped = left.log() + limit[which]
            dropped = torch.where(left > 0, dropped, before)
        wanted = limit[which] < math.inf
        keep &= (u > -math.inf) & wanted[..., None]
        index = index[:, None].expand_as(u)
        return which[wanted], index[keep], keep.sum(-1)[wanted], dropped[wanted]

    workers = 1 if limit.is_cuda else max(1, min(torch.get_num_threads(), len(parents)))
    share = -(-len(parents) // workers)
    found = on_cores(lambda w: [chunk(rows) for rows in parents[w * share : (w + 1) * share]], workers, limit.device)
    which, index, counts, dropped = (torch.cat(parts) for parts in zip(*chain.from_iterable(found), strict=True))
    pointer = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _Lists(which, index, pointer, dropped)


def _ordered(x: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The points split ``depth`` times at the median along each node's principal axis: positions, and points."""
    N, D = x.shape
    M = (-(-N // (1 << depth))) << depth
    position = torch.arange(M, device=x.device)
    points = x if M == N else torch.cat([x, x[-1:].expand(M - N, D)])
    for level in range(depth):
        nodes = points.view(1 << level, -1, D)
        first = nodes.shape[1] * torch.arange(len(nodes), device=x.device)[:, None]
        order = (_halves(_projections(nodes)) + first).view(-1)
        points, position = points[order], position[order]
    return position, points.contiguous()


def _projections(nodes: Tensor) -> Tensor:
    """Coordinates along each node's principal axis (nodes, size)."""
    sample = nodes[:, :: max(1, nodes.shape[1] // _AXIS_ROWS)].double()
    sample = sample - sample.mean(1, keepdim=True)
    _, axes = torch.linalg.eigh(sample.mT @ sample)
    return torch.bmm(nodes, axes[:, :, -1:].to(nodes.dtype))[:, :, 0]


def _halves(along: Tensor) -> Tensor:
    """For each row, an order of its entries whose first half is not above its second."""
    if along.is_cuda:
        return along.argsort(1)
    return torch.from_numpy(np.argpartition(along.numpy(), along.shape[1] // 2, axis=1))
