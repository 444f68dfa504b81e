r"""Pareto smoothing of importance weights.

The shape k of the tail of the weights measures reliability: estimates are reliable for k < 0.5, usable for 0.5 ≤ k < 0.7, and
unreliable for k ≥ 0.7. References: Vehtari, Simpson, Gelman, Yao and Gabry 2024, *Pareto smoothed importance sampling*, JMLR
25; Zhang and Stephens 2009, *A new and efficient estimation method for the generalized Pareto distribution*, Technometrics 51.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["smoothed"]


def smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    """Smooth importance weights: replace the largest ones by quantiles of a generalized Pareto distribution.

    Args:
        log_weights: Unnormalized log-weights (S,), nats; -inf for a draw of weight zero.

    Returns:
        Normalized log-weights (S,), and the shape k of the tail, which is infinite if there are too few draws of positive
        weight to estimate it.
    """
    count = len(log_weights)
    logs = log_weights - log_weights.max()
    size = min(count // 5, math.ceil(3 * math.sqrt(count)))
    if size < 5 or int((logs > -500).sum()) <= size:
        return logs - torch.logsumexp(logs, 0), math.inf
    order = logs.argsort()
    tail = order[-size:]
    cut = logs[order[-size - 1]].exp()
    excess = logs[tail].exp() - cut
    if not float(excess[-1]) > 0:
        return logs - torch.logsumexp(logs, 0), -math.inf
    k, scale = _pareto(excess.clamp(min=1e-300))
    places = (torch.arange(size, dtype=logs.dtype) + 0.5) / size
    quantiles = scale * torch.expm1(-k * torch.log1p(-places)) / k if abs(k) > 1e-9 else -scale * torch.log1p(-places)
    out = logs.clone()
    out[tail] = (quantiles + cut).log().clamp(max=0.0)
    return out - torch.logsumexp(out, 0), k


def _pareto(x: Tensor) -> tuple[float, float]:
    """Estimate the shape (shrunk toward 1/2) and scale of a generalized Pareto distribution from ascending values (n,)."""
    n = len(x)
    m = 30 + int(math.sqrt(n))
    quarter = x[int(n / 4 + 0.5) - 1]
    theta = 1 / x[-1] + (1 - (m / (torch.arange(1, m + 1, dtype=x.dtype) - 0.5)).sqrt()) / (3 * quarter)
    shapes = torch.log1p(-theta[:, None] * x).mean(1)
    profile = n * ((-theta / shapes).log() - shapes - 1)
    best = float(torch.softmax(profile, 0) @ theta)
    k = float(torch.log1p(-best * x).mean())
    scale = -k / best
    return (n * k + 10 * 0.5) / (n + 10), scale
