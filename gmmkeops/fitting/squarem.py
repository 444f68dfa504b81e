r"""SQUAREM acceleration: extrapolation from two steps of a fixed-point iteration such as EM.

.. math:: \theta' = \theta_0 + 2 s r + s^2 v, \qquad r = \theta_1 - \theta_0, \quad v = (\theta_2 - \theta_1) - r, \quad
          s = \max(1, \lVert r \rVert / \lVert v \rVert)

Reference: Varadhan and Roland 2008, *Simple and globally convergent methods for accelerating the convergence of any EM
algorithm*, Scandinavian Journal of Statistics 35.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmmkeops.models import Mixture

__all__ = ["extrapolated"]

_LONGEST_STRIDE = 64.0


def extrapolated(before: Mixture, first: Mixture, second: Mixture) -> Mixture | None:
    """Extrapolate from a mixture and the results of two steps, in unconstrained coordinates.

    Args:
        before, first, second: Mixtures of the same shape, standardized coordinates.

    Returns:
        The extrapolated mixture, whose logits are not normalized; None if the stride is one or the result is not finite: the
        covariance of a component that loses its weight may be extrapolated to nothing.
    """
    a, b, c = (_coordinates(mixture) for mixture in (before, first, second))
    r = b - a
    v = (c - b) - r
    stride = float((r.norm() / v.norm().clamp(min=1e-300)).clamp(1.0, _LONGEST_STRIDE))
    leap = a + 2 * stride * r + stride**2 * v
    if stride == 1.0 or not bool(torch.isfinite(leap).all()):
        return None
    found = _mixture(second, leap)
    return found if bool(found.factor.row_norms().isfinite().all()) else None


def _coordinates(mixture: Mixture) -> Tensor:
    parts = [mixture.log_weights, mixture.means, *mixture.factor.tensors.values()]
    return torch.cat([part.reshape(-1) for part in parts])


def _mixture(like: Mixture, coordinates: Tensor) -> Mixture:
    shapes = {"logits": like.logits, "means": like.means, **like.factor.tensors}
    flat = coordinates.split([tensor.numel() for tensor in shapes.values()])
    tensors = {name: part.reshape(t.shape) for part, (name, t) in zip(flat, shapes.items(), strict=True)}
    logits, means = tensors.pop("logits"), tensors.pop("means")
    return Mixture(logits, means, like.factor.replace(**tensors), validate_args=False)
