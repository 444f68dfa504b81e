"""Points sorted into kd-tree leaves: median splits along principal axes, or groups of points with the same label.

On a CPU the compiled library sorts the points and computes the boxes; the code in torch defines the order of the points, which is
the same in both, and is used on CUDA and without the library.

Reference for the tree: Sproull 1991, *Refinements to nearest-neighbor searching in k-dimensional trees*.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gmmkeops.reductions.cores import cores
from gmmkeops.reductions.library import OUT_OF_MEMORY, Level, TreeCall, run
from gmmkeops.reductions.library import reason as unavailable

__all__ = ["Boxes", "Cloud"]

# Number of binary splits between two levels of the tree for which candidate lists are computed.
_STEP = 3

# Number of rows from which the principal axis of a node is estimated.
_AXIS_ROWS = 512

# Principal axes are multiples of 1 / _GRID, so that they, and projections of float32 points on them, do not depend on rounding.
# Variances along the first coordinates are increased by multiples of _PREFERRED, so that equal ones do not leave the axis
# undetermined.
_GRID, _PREFERRED = 1024, 2.0**-20

# Number of times that matrices are raised to the power of eight: the largest eigenvalue stands out if the next one is smaller by
# a fraction of 1e-8.
_POWERS = 11

# Number of rows that are converted to float64 at a time, on a CPU and on a GPU, where each part takes about fifty kernels.
_ROWS, _ROWS_CUDA = 1 << 19, 1 << 22

# Number of coordinates from which the compiled library may take longer than a tenth of a second, and number of rows from which it
# does not sort them.
_LONG, _MOST = 1_000_000, 1 << 31


@dataclass(frozen=True)
class Boxes:
    """Oriented bounding boxes of the nodes of one level of the kd-tree, in the order of the points; data units.

    Args:
        center: Centers b (B, D).
        axes: Axes Q (B, D, D), orthonormal columns.
        half: Half-widths along the axes (B, D).
        semi: Semi-axes of an enclosing ellipsoid along the same axes (B, D).
        reach: Largest distance of a point from the center (B,), with a margin for rounding.
    """

    center: Tensor
    axes: Tensor
    half: Tensor
    semi: Tensor
    reach: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tuple of all fields."""
        return self.center, self.axes, self.half, self.semi, self.reach

    @classmethod
    def of(cls, points: Tensor) -> Boxes:
        """Compute the boxes of points (B, rows, D)."""
        rows = _ROWS_CUDA if points.is_cuda else _ROWS
        parts = [cls._few(part) for part in points.split(max(1, rows // points.shape[1]))]
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
        # Lengths are divided by the largest half-width, so that their squares do not overflow or underflow.
        unit = half.amax(1).clamp(min=1e-300)[:, None]
        t = t / unit[..., None]
        deviation = t.square().mean(1, keepdim=True).sqrt()
        radius = (t / deviation.clamp(min=1e-150)).square().sum(-1).amax(1).sqrt()
        center = (mean + middle @ axes.mT)[:, 0]
        semi = unit * (radius[:, None] * deviation[:, 0])
        return center, axes, half, semi, unit[:, 0] * (half / unit).norm(dim=1) + center.abs().amax(1)


@dataclass(frozen=True)
class Cloud:
    """Points sorted into kd-tree leaves.

    Args:
        points: Sorted points (M, D); M is at least N, since some points are repeated to fill the leaves.
        rank: Row of each of the N points in ``points`` (N,).
        levels: Bounding boxes of some levels of the tree, from coarse to fine; the last ones are the leaves.
        starts: First row of each leaf, and M (B + 1,).
        labeled: Whether the leaves are groups of points with the same label.
        cache: Values that an engine has computed from the fields above, or estimates that do not change its results.
    """

    points: Tensor
    rank: Tensor
    levels: tuple[Boxes, ...]
    starts: Tensor
    labeled: bool = False
    cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def tree(cls, x: Tensor, rows: int) -> Cloud:
        """Sort points (N, D) by median splits along principal axes, until leaves have at most ``rows`` points."""
        depth = max(0, math.ceil(math.log2(len(x) / rows)))
        N, D, leaves = *x.shape, 1 << depth
        size = -(-N // leaves)
        starts = torch.arange(leaves + 1, device=x.device) * size
        # Bounding boxes are stored for every few levels.
        counts = [1 << d for d in sorted(range(depth, 0, -_STEP)) or [0]]
        if _is_compiled(x) and len(x) < _MOST:
            points, rank = x.new_empty(size * leaves, D), torch.empty(N, dtype=torch.int64)
            return cls(points, rank, _compiled(points, starts, counts, depth, x.contiguous(), rank), starts)
        position, points = _ordered(x, depth)
        rank = torch.empty_like(position)
        rank[position] = torch.arange(len(position), device=x.device)
        return cls(points, rank[:N], tuple(Boxes.of(points.view(count, -1, D)) for count in counts), starts)

    @classmethod
    def grouped(cls, x: Tensor, labels: Tensor, rows: int) -> Cloud:
        """Sort points (N, D) by their labels (N,), into leaves of at most ``rows`` points with the same label.

        In more than a few dimensions, the leaves of median splits are not small; those of clusters are.
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
        if _is_compiled(points):
            return cls(points, rank, _compiled(points, starts, [len(owner)]), starts, labeled=True)
        boxes = [Boxes.of(points[a:b][None]) for a, b in pairwise(starts.tolist())]
        level = Boxes(*(torch.cat(column) for column in zip(*(box.tensors for box in boxes), strict=True)))
        return cls(points, rank, (level,), starts, labeled=True)

    @property
    def boxes(self) -> int:
        """Number of leaves."""
        return len(self.starts) - 1

    def enter(self, values: Tensor) -> Tensor:
        """Sort values of the points (N, ...) into tree order (M, ...), with zeros for repeated points."""
        return values.new_zeros(len(self.points), *values.shape[1:]).index_copy_(0, self.rank, values)

    @cached_property
    def ones(self) -> Tensor:
        """Weights of one in tree order (M,), float64, with zeros for repeated points."""
        return self.enter(self.points.new_ones(len(self.rank), dtype=torch.float64))

    def leave(self, values: Tensor) -> Tensor:
        """Reorder values in tree order (M, ...) to the order of the points (N, ...)."""
        return values[self.rank]

    def spans(self, boxes: Tensor) -> Tensor:
        """Return the first and the last-plus-one row of each given leaf (T, 2)."""
        return torch.stack([self.starts[boxes], self.starts[boxes + 1]], 1)


def _is_compiled(points: Tensor) -> bool:
    return points.device.type == "cpu" and unavailable() is None


def _compiled(
    points: Tensor,
    starts: Tensor,
    counts: list[int],
    depth: int = 0,
    x: Tensor | None = None,
    rank: Tensor | None = None,
) -> tuple[Boxes, ...]:
    """Compute boxes of levels with ``counts`` nodes by the compiled library; first sort ``x``, if given, into ``points``."""
    D, leaves = points.shape[1], len(starts) - 1
    shapes = (D,), (D, D), (D,), (D,), ()
    levels = tuple(Boxes(*(torch.empty(count, *s, dtype=torch.float64) for s in shapes)) for count in counts)
    array, above = (Level * len(counts))(), 1
    for level, boxes, count in zip(array, levels, counts, strict=True):
        level.__init__(count, count // above, leaves // count, *(part.data_ptr() for part in boxes.tensors))
        above = count
    rows = len(points) if x is None else len(x)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in (x, points, rank, starts))
    is_double, threads = points.dtype == torch.float64, cores()
    call = TreeCall(is_double, threads, rows, D, depth, len(counts), *addresses, array)
    if run("gmmkeops_tree", call, is_long=points.numel() >= _LONG) == OUT_OF_MEMORY:
        raise MemoryError(f"There is not enough memory to sort {rows} points in {D} dimensions into kd-tree leaves.")
    return levels


def _ordered(x: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Split points ``depth`` times at the median along each node's principal axis; return indices and sorted points.

    The points of each half keep their order. Of points with equal projections, the first ones go to the first half.
    """
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
    """Project the points of each node on its principal axis (nodes, size), float64."""
    sample = nodes[:, :: max(1, nodes.shape[1] // _AXIS_ROWS)].double()
    # Differences from the first point are exact enough to make the axes of points far from zero the same everywhere.
    sample = sample - sample[:, :1]
    sample = sample - sample.mean(1, keepdim=True)
    preferred = torch.arange(nodes.shape[2], 0, -1, dtype=torch.float64, device=nodes.device)
    axis = (_GRID * _principal(_squares(sample) + _PREFERRED * preferred.diag())).round() / _GRID
    axis = axis * axis.gather(1, axis.abs().argmax(1, keepdim=True)).sign()
    along = nodes[:, :, 0].double() * axis[:, :1]
    for d in range(1, nodes.shape[2]):
        along += nodes[:, :, d].double() * axis[:, d : d + 1]
    return along


def _principal(matrices: Tensor) -> Tensor:
    """Return the eigenvectors (B, D) of the largest eigenvalues of positive definite matrices (B, D, D)."""
    # torch solves small eigenvalue problems on a GPU one after the other.
    return _by_powers(matrices) if matrices.is_cuda else torch.linalg.eigh(matrices)[1][:, :, -1]


def _by_powers(matrices: Tensor) -> Tensor:
    """As :func:`_principal`: powers of a matrix tend to a multiple of v vᵀ for the eigenvector v of its largest eigenvalue."""
    powers = matrices
    for _ in range(_POWERS):
        powers = powers / powers.amax((1, 2), keepdim=True)
        for _ in range(3):
            powers = powers @ powers
    largest = powers.diagonal(dim1=1, dim2=2).argmax(1)
    vectors = powers[torch.arange(len(powers), device=powers.device), largest]
    return vectors / vectors.norm(dim=1, keepdim=True)


def _squares(z: Tensor) -> Tensor:
    """Compute zᵀz (B, D, D) for residuals z (B, rows, D), divided by the largest one to avoid overflow and underflow."""
    z = z / z.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
    return z.mT @ z


def _halves(along: Tensor) -> Tensor:
    """Compute the indices of the smaller and of the larger half of each row; both ascend, and of ties the first are smaller."""
    half = along.shape[1] // 2
    # On CUDA a selection from few long rows uses few cores.
    largest = (
        along.sort(1).values[:, half - 1 : half] if along.is_cuda else along.kthvalue(half, 1, keepdim=True).values
    )
    smaller, tied = along < largest, along == largest
    smaller |= tied & (tied.cumsum(1) <= half - smaller.sum(1, keepdim=True))
    parts = (part.nonzero()[:, 1].view(len(along), half) for part in (smaller, ~smaller))
    return torch.cat(tuple(parts), 1)
