"""Candidate lists of a kd-tree, computed and checked by kernels, with two synchronizations of the device.

The kernel of a level writes each list into the space that the list of its parent would need. The memory of these spaces is
estimated from the last lists of the same kd-tree. If it does not suffice, and for the first lists, the sizes of the lists of each
level are read before the next one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gmmkeops.components import transferred
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.triton.loading import launch
from gmmkeops.reductions.triton.packing import Scale
from gmmkeops.reductions.truncation.bounds import Schedule, Whole
from gmmkeops.reductions.truncation.tolerance import Tolerance
from gmmkeops.reductions.truncation.tree import Cloud
from gmmkeops.reductions.truncation.truncation import Check, lists_of

__all__ = ["candidate_lists", "checked"]

# Largest number of features for which the registers of a thread suffice, for full and for other factors.
_FULL, _DIAGONAL = 8, 16

# Largest number of entries of the spaces of a level; factor and constant by which the memory for lists exceeds the estimate.
_MOST, _ROOM, _ROOM_LEAST = 1 << 27, 1.5, 4096

# Number of components and of points that a program processes at a time, and its number of warps.
_COMPONENTS, _POINTS, _WARPS = 128, 1024, 4


@dataclass(frozen=True)
class _Lists:
    """Candidate lists of the nodes of a level.

    Args:
        index: Memory of the lists, int32.
        starts: First position of each list in ``index`` (B,), int64.
        counts: Number of components of each list (1, B) and, for leaves, the number of pairs that are evaluated (2, B), int64.
        ends: Cumulative sums of ``counts``.
        pruned: Bounds on the density that was pruned (B,), nats, float64.
    """

    index: Tensor
    starts: Tensor
    counts: Tensor
    ends: Tensor
    pruned: Tensor


def candidate_lists(cloud: Cloud, problem: Exponents, minima: Tensor, tolerance: Tolerance) -> Schedule:
    """Compute candidate lists as :func:`~gmmkeops.reductions.truncation.truncation.lists_of` does, for all leaves.

    The lists of leaves for which ``minima`` is +inf are empty. The bounds are computed in float64.
    """
    _, K, D = problem.shape
    if (_FULL if problem.is_full else _DIAGONAL) < D:
        return lists_of(cloud, problem, minima, tolerance)
    sizes = [len(boxes.center) for boxes in cloud.levels]
    key = "sizes of lists", K, tolerance.single
    known = cloud.cache.get(key)
    lists = numbers = None
    if known is not None:
        rooms = [sizes[0] * K, *(min(_MOST, int(_ROOM * size) + _ROOM_LEAST) for size in known)]
        lists = _refined(cloud, problem, minima, tolerance, rooms)
        numbers = _numbers(lists) if lists is not None else None
        if numbers is not None and any(a > b for a, b in zip(_spaces(sizes, numbers), rooms[1:], strict=True)):
            lists = None
    if lists is None:
        lists = _refined(cloud, problem, minima, tolerance, None)
        if lists is None:
            return lists_of(cloud, problem, minima, tolerance)
        numbers = _numbers(lists)
    assert numbers is not None, "the numbers of lists have been read"
    # Lists for few leaves, whose own were too short, do not change the estimate much: 3/4 of it times _ROOM suffice for all.
    needed = _spaces(sizes, numbers)
    cloud.cache[key] = [max(a, 3 * b // 4) for a, b in zip(needed, known or needed, strict=True)]
    *_, entries, pairs, longest = numbers
    return _compacted(cloud, lists[-1], tolerance, entries, Whole(cloud, pairs, longest))


def _spaces(sizes: list[int], numbers: list[int]) -> list[int]:
    """Return the number of entries of the spaces on each level after the first one, given the sizes of the lists above it."""
    return [size // above * total for above, size, total in zip(sizes, sizes[1:], numbers, strict=False)]


def _numbers(lists: list[_Lists]) -> list[int]:
    """Read the total length of the lists of each level, the number of pairs, and the length of the longest list of a leaf."""
    last = lists[-1]
    parts = [level.ends[0, -1:] for level in lists]
    found: list[int] = torch.cat([*parts, last.ends[1, -1:], last.counts[0].amax(0, keepdim=True)]).tolist()
    return found


def _refined(
    cloud: Cloud, problem: Exponents, minima: Tensor, tolerance: Tolerance, rooms: list[int] | None
) -> list[_Lists] | None:
    """Compute the lists of all levels; None if they need too much memory.

    Args:
        cloud, problem, minima, tolerance: As for :func:`candidate_lists`.
        rooms: Number of entries of the space of each level; None to read it from the device before each level.
    """
    (K, D), U, B = problem.shape[1:], problem.U, cloud.boxes
    U = U if U.stride(0) == 0 and U[0].is_contiguous() else U.contiguous()
    offsets, means, center = (part.contiguous() for part in (problem.offsets, problem.means, problem.center))
    found: list[_Lists] = []
    above = 1
    for level, boxes in enumerate(cloud.levels):
        nodes = len(boxes.center)
        children = nodes // above
        if level == 0:
            room = nodes * K
        else:
            room = rooms[level] if rooms is not None else children * int(found[-1].ends[0, -1])
        if room > _MOST:
            return None
        is_leaf = nodes == B
        index = torch.empty(room, dtype=torch.int32, device=minima.device)
        starts, pruned = torch.empty(nodes, dtype=torch.int64, device=minima.device), torch.empty_like(boxes.reach)
        counts = torch.empty(2 if is_leaf else 1, nodes, dtype=torch.int64, device=minima.device)
        parent = found[-1] if found else _Lists(index, starts, counts, counts, pruned)
        launch(
            "lists", "refine", minima.device, (nodes,), minima, cloud.starts, *boxes.tensors, offsets, means, U, center,
            parent.index, parent.starts, parent.counts, parent.ends, parent.pruned, index, starts, counts, pruned,
            tolerance.rounding, tolerance.share, tolerance.give, math.log(K) + 3.0, K, children, B // nodes, U.stride(0), room,
            D=D, FULL=problem.is_full, WIDE=problem.width > 1, ROOT=level == 0, LAST=is_leaf, SINGLE=tolerance.single,
            BK=_COMPONENTS, warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        found.append(_Lists(index, starts, counts, counts.cumsum(1), pruned))
        above = nodes
    return found


def _compacted(cloud: Cloud, lists: _Lists, tolerance: Tolerance, entries: int, whole: Whole) -> Schedule:
    """Return the lists of the leaves as a schedule."""
    B, device = cloud.boxes, lists.starts.device
    index, pointer = (torch.empty(size, dtype=torch.int64, device=device) for size in (entries, B + 1))
    floor = torch.empty_like(lists.pruned)
    launch(
        "lists", "compact", device, (B,), lists.index, lists.starts, lists.counts, lists.ends, lists.pruned, index, pointer,
        floor, tolerance.rounding, tolerance.allowed, BK=_COMPONENTS, warps=1,
    )  # fmt: skip
    if "leaves" not in cloud.cache:
        boxes = torch.arange(B, device=device)
        cloud.cache["leaves"] = boxes, cloud.spans(boxes)
    boxes, spans = cloud.cache["leaves"]
    return Schedule(boxes, index, pointer, lists.pruned, spans, boxes, floor, whole)


def checked(
    schedule: Schedule, values: Tensor, weights: Tensor | None, scale: Scale, tolerance: Tolerance, more: Tensor
) -> tuple[Tensor, Check, list[float], Tensor]:
    """Check the lists of all leaves, and read the range of the values, with one synchronization of the device.

    Args:
        schedule: The lists, with numbers of all leaves.
        values: Base-2 log-sum-exps (N,) or largest exponents (N, k).
        weights: Weights (N,), float64, or None.
        scale: Scale of the values.
        tolerance: Numbers by which the lists have been computed.
        more: Other numbers that are copied to the CPU (n,), float64.

    Returns:
        The minimum over each leaf (B,), nats; the check; and the smallest and the largest first value, the smallest positive
        and the largest size of weights, and the largest usual value; and the copy of ``more``.
    """
    assert schedule.whole is not None, "only lists of all leaves are checked"
    cloud, B, device = schedule.whole.cloud, len(schedule.boxes), values.device
    minima, low = torch.empty_like(schedule.pruned), torch.empty_like(schedule.pruned)
    notes = torch.empty(6, B, dtype=torch.float64, device=device)
    base, middle = scale.base, scale.middle
    is_there = base.device == device
    launch(
        "lists", "check", device, (B,), values, notes if weights is None else weights.contiguous(), base if is_there else notes,
        cloud.starts, schedule.pruned, schedule.floor, minima, low, notes, 0.0 if is_there else float(base),
        tolerance.rounding, tolerance.least, 1 if values.ndim == 1 else values.shape[1], HAS_BASE=is_there,
        WEIGHTED=weights is not None, BN=_POINTS, warps=_WARPS,
    )  # fmt: skip
    found = torch.cat([notes.amax(1), more, *([middle.view(1)] if is_there else [])])
    (found,) = transferred([found], torch.device("cpu"))
    failed, lost, least, most, light, heavy = found[:6].tolist()
    usual = float(found[-1] if is_there else middle)
    return minima, Check(failed > 0, lost, low), [-least, most, -light, heavy, usual], found[6 : 6 + len(more)]
