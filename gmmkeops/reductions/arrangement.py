"""Sorting of points for truncation, and when it saves time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_fraction, as_integer
from gmmkeops.data import Batch, as_points
from gmmkeops.reductions.truncation.tree import Cloud
from gmmkeops.reductions.truncation.truncation import Truncation

__all__ = ["arrange", "may_arrange", "sorted_points"]

# Largest dimension in which points are sorted by a kd-tree; in higher dimensions they are grouped by labels.
_FEW = 4

# Dimension beyond which points are not sorted on a CPU, also if ε is given: bounds over groups of labels take longer than every
# pair of diagonal and spherical components (50 000 points, an iteration: K = 256, D = 64: 63 ms, 24 for every pair; D = 32, full:
# 6, 12), and bounds over leaves of a kd-tree much longer (4000 points, K = 4, D = 512: 16 s, 0.04 for every pair).
_MANY = 48

# Times on a GPU, seconds (H200, D = 3; bench/results/gpu.md): of a reduction of all pairs, for each pair and feature (between the
# kernels of log-sum-exps and those of an EM iteration, 0.9 and 2.4 ms for 1e6 points and 1000 components); of a reduction over
# candidate lists, fixed and for each point (23, 20 and 101 ms for 1e6 x 1000, 1e7 x 1e4 and 1e8 x 1e4); and of sorting, fixed and
# for each point (31 ms, 0.11 s and 1.2 s).
_EVERY, _LISTS, _SORTING = 5e-13, (0.018, 7e-10), (0.02, 1.2e-8)

# Ratio of the times of reductions over groups of labels, which have no kernels of their own, and over leaves of a kd-tree (not
# measured); and number of reductions after which a fit has usually converged.
_LABELED, _SWEEPS = 4, 30

# Default ε of truncation for each dtype, about its rounding error in nats per point.
_EPSILON = {torch.float32: 1e-6, torch.float64: 1e-12}


def arrange(
    x: Any,
    components: int,
    truncate: float | None = None,
    *,
    sweeps: int = 1,
    labels: Callable[[], Tensor] | None = None,
) -> Tensor | Truncation:
    r"""Sort points into kd-tree leaves, so that reductions can skip negligible components (block-sparse evaluation).

    All reductions accept the result in place of the points, and return values in the original order of the points. The error of
    each log-density is then bounded, :math:`0 \le \ell_{true} - \ell_{kept} \le -\log(1 - \varepsilon)`. Labels, the largest
    exponents and the moments of hard assignments are exact.

    Args:
        x: Points (N, D), data units.
        components: Number of components K of the mixtures that will be evaluated.
        truncate: ε in [0, 1), the largest fraction of a point's density that may be neglected. All components are evaluated if
            it is 0, and in more than 48 dimensions on a CPU (on all devices without ``labels``), where computing the bounds takes
            more time than they save. The default is 1e-6 for float32 points and 1e-12 for float64 points (about their rounding
            errors), if that saves time; sorting small problems on a GPU does not.
        sweeps: Expected number of reductions with these points, which decides whether sorting saves time.
        labels: Function that returns the most probable component of each point (N,), int64. In more than four dimensions the
            leaves of a kd-tree are not small, and points are grouped by these labels instead. The function is called only if
            grouping saves time.

    Returns:
        The points themselves if sorting does not save time, otherwise a :class:`Truncation`.

    Raises:
        TypeError, ValueError: Invalid points, or ``truncate`` is not a number in [0, 1).

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.linspace(0, 1, 4096)[:, None]
        >>> cloud = gk.reductions.arrange(x, 64, 1e-4)
        >>> means = torch.linspace(0, 1, 64)[:, None]
        >>> sums = gk.reductions.moments(cloud, torch.zeros(64), means, torch.full((1, 1), 64.0))
        >>> cloud.share < 0.5, 0 <= cloud.certificate <= 1e-4 * 1.0001
        (True, True)
    """
    x = x.points if isinstance(x, Batch) else as_points(x)
    truncate = as_fraction(truncate, "truncate")
    components, sweeps = as_integer(components, "components", 1), as_integer(sweeps, "sweeps", 0)
    return sorted_points(x, components, truncate, sweeps, labels)


def sorted_points(
    x: Tensor,
    components: int,
    truncate: float | None,
    sweeps: int = 1,
    labels: Callable[[], Tensor] | None = None,
) -> Tensor | Truncation:
    """Sort points for truncation; arguments as for :func:`arrange`, but validated before."""
    labels = None if x.shape[1] <= _FEW else labels
    if x.shape[1] > _MANY and (labels is None or x.device.type != "cuda"):
        return x
    if truncate == 0 or (
        truncate is None and not _pays(x.device.type, x.shape, components, sweeps, labels is not None)
    ):
        return x
    # A leaf has about the points of two components, within the limits for efficient tiles. Groups of one label are rarely split.
    rows = min(4096, max(1024 if labels is None else 2048, 2 * len(x) // components))
    cloud = Cloud.tree(x.detach(), rows) if labels is None else Cloud.grouped(x.detach(), labels(), rows)
    return Truncation(cloud, _EPSILON[x.dtype] if truncate is None else truncate)


def _pays(device: str, shape: Sequence[int], components: int, sweeps: int, labeled: bool) -> bool:
    """Return whether sorting points of a shape (N, D) probably saves time over ``sweeps`` reductions.

    Args:
        device: Type of their device.
        shape: Numbers of points and of features.
        components: Number of components K.
        sweeps: Expected number of reductions.
        labeled: Whether the points are sorted by labels rather than by coordinates.
    """
    N, D = shape
    if device != "cpu":
        fixed, each = (time * (_LABELED if labeled else 1) for time in _LISTS)
        saved = _EVERY * N * components * D - fixed - each * N
        if min(sweeps, _SWEEPS) * saved <= _SORTING[0] + _SORTING[1] * N:
            return False
    if labeled:
        # Truncation saves time only if tiles are large compared with their overhead: about a thousand rows in 20 dimensions.
        return components >= 16 and N * components >= 1_000_000 and sweeps >= 8 and 20_000 * components <= N * D
    return D <= _FEW and components >= 64 and N * components >= 10_000_000 and components * sweeps >= 1000


def may_arrange(rows: int, components: int, dimensions: int) -> bool:
    """Return whether a fit may sort its points for truncation by default, on any device.

    Args:
        rows, components, dimensions: Numbers of points N, of components K and of features D.

    Example:
        >>> import gmmkeops as gk
        >>> gk.reductions.may_arrange(10**6, 1000, 3), gk.reductions.may_arrange(1000, 5, 3)
        (True, False)
    """
    return any(_pays("cpu", (rows, dimensions), components, 1 << 20, labeled) for labeled in (False, True))
