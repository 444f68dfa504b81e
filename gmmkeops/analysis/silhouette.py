"""Silhouette of a clustering: exact on a sample, and approximate with distances to centroids."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import accepts, as_integer
from gmmkeops.components import as_tensor, check_finite
from gmmkeops.data import as_generator, as_points

__all__ = ["silhouette"]

# Numbers of rows for which distances to the centroids, and to all points of the sample, are computed at a time.
_ROWS, _EXACT_ROWS = 1 << 16, 1024


@accepts(also={"random_state": "generator"}, wrong={"sample_size": "samples="})
def silhouette(
    x: Any, labels: Any, *, samples: int | None = 10_000, generator: torch.Generator | int | None = None
) -> tuple[float, float]:
    r"""Compute the mean silhouette :math:`(b - a) / \max(a, b)` of a clustering, from -1 to 1.

    Args:
        x: Points (N, D), data units.
        labels: Cluster of each point (N,), with at least two clusters.
        samples: Number of random points on which the exact silhouette is computed, because it needs all distances; None for all
            points.
        generator: Random number generator of the sample, or a seed. None uses a fixed seed, so that the same call gives the same
            result in every process.

    Returns:
        The exact silhouette of the sample (as scikit-learn's ``silhouette_score``), and the simplified silhouette of all points,
        in which a and b are the distances to the centroids of the own and of the nearest other cluster.

    Raises:
        TypeError, ValueError: Points or labels are invalid, or there are fewer than two clusters.

    Reference:
        Rousseeuw 1987, *Silhouettes*, Journal of Computational and Applied Mathematics 20.

    Example:
        >>> import gmmkeops as gk
        >>> exact, centroid = gk.analysis.silhouette([[0.0], [0.0], [4.0], [4.0]], [0, 0, 1, 1])
        >>> exact, centroid
        (1.0, 1.0)
    """
    points = as_points(x, minimum=2).double()
    label = as_tensor(labels, name="labels", dtype=torch.float64, device=points.device)
    if label.shape != points.shape[:1]:
        raise ValueError(f"labels must have shape ({len(points)},), one per point, got {tuple(label.shape)}.")
    check_finite(label, name="labels")
    samples = None if samples is None else as_integer(samples, "samples", 2)
    clusters, label = label.unique(return_inverse=True)
    K = len(clusters)
    if K < 2:
        raise ValueError(f"labels must have at least two clusters, got {K}; use more components.")
    counts = torch.bincount(label, minlength=K).double()
    means = torch.zeros(K, points.shape[1], dtype=torch.float64, device=points.device)
    means = means.index_add(0, label, points) / counts[:, None]
    total = 0.0
    for part, own in zip(points.split(_ROWS), label.split(_ROWS), strict=True):
        distance = torch.cdist(part, means)
        a = distance.gather(1, own[:, None])[:, 0]
        b = distance.scatter(1, own[:, None], math.inf).amin(1)
        total += float(((b - a) / torch.maximum(a, b).clamp(min=1e-300)).sum())
    if samples is not None and samples < len(points):
        order = torch.randperm(len(points), generator=as_generator(generator, points.device), device=points.device)
        return _exact(points[order[:samples]], label[order[:samples]], K), total / len(points)
    return _exact(points, label, K), total / len(points)


def _exact(points: Tensor, label: Tensor, K: int) -> float:
    """Compute the mean silhouette from all distances; it is zero for a point that is alone in its cluster."""
    onehot = torch.nn.functional.one_hot(label, K).double()
    counts = onehot.sum(0)
    values = []
    for first in range(0, len(points), _EXACT_ROWS):
        own = label[first : first + _EXACT_ROWS]
        sums = torch.cdist(points[first : first + _EXACT_ROWS], points) @ onehot
        size = counts[own]
        a = sums.gather(1, own[:, None])[:, 0] / (size - 1).clamp(min=1)
        others = (sums / counts.clamp(min=1)).masked_fill(counts == 0, math.inf)
        b = others.scatter(1, own[:, None], math.inf).amin(1)
        value = (b - a) / torch.maximum(a, b).clamp(min=1e-300)
        values.append(torch.where(size > 1, value, torch.zeros_like(value)))
    return float(torch.cat(values).mean())
