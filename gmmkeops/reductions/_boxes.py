"""Boxes of near points: a tree of halves along principal axes, or groups of points with one label.

Reference for the tree: Sproull 1991, *Refinements to nearest-neighbor searching in k-dimensional trees*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

__all__ = ["Boxes", "Cloud"]

# Binary splits between two levels of boxes that lists are found on.
_STEP = 3
# Rows that a node's principal axis is estimated from.
_AXIS_ROWS = 512
# Rows turned to float64 at a time.
_ROWS = 1 << 19


@dataclass(frozen=True)
class Boxes:
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
    def of(cls, points: Tensor) -> Boxes:
        """The boxes of points (B, rows, D)."""
        parts = [cls._few(part) for part in points.split(max(1, _ROWS // points.shape[1]))]
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @staticmethod
    def _few(points: Tensor) -> tuple[Tensor, ...]:
        z = points.double()
        mean = z.mean(1, keepdim=True)
        z = z - mean
        _, axes = torch.linalg.eigh(_squares(z))
        t = z @ axes
        low, high = t.amin(1, keepdim=True), t.amax(1, keepdim=True)
        middle = 0.5 * (low + high)
        t = t - middle
        half = 0.5 * (high - low)[:, 0]
        # Squares of lengths of any size stay within range when they are taken in units of the box.
        unit = half.amax(1).clamp(min=1e-300)[:, None]
        t = t / unit[..., None]
        deviation = t.square().mean(1, keepdim=True).sqrt()
        radius = (t / deviation.clamp(min=1e-150)).square().sum(-1).amax(1).sqrt()
        centre = (mean + middle @ axes.mT)[:, 0]
        semi = unit * (radius[:, None] * deviation[:, 0])
        return centre, axes, half, semi, unit[:, 0] * (half / unit).norm(dim=1) + centre.abs().amax(1)


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
    levels: tuple[Boxes, ...]
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
        levels = tuple(Boxes.of(points.view(1 << d, -1, x.shape[1])) for d in depths)
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
        boxes = [Boxes.of(points[a:b][None]) for a, b in pairwise(starts.tolist())]
        level = Boxes(*(torch.cat(column) for column in zip(*(box.tensors for box in boxes), strict=True)))
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
    _, axes = torch.linalg.eigh(_squares(sample))
    return torch.bmm(nodes, axes[:, :, -1:].to(nodes.dtype))[:, :, 0]


def _squares(z: Tensor) -> Tensor:
    """zᵀz of residuals (B, rows, D), in units of the largest of each, so that those of any size are within range."""
    z = z / z.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
    return z.mT @ z


def _halves(along: Tensor) -> Tensor:
    """For each row, an order of its entries whose first half is not above its second."""
    if along.is_cuda:
        return along.argsort(1)
    return torch.from_numpy(np.argpartition(along.numpy(), along.shape[1] // 2, axis=1))
