r"""Log-sum-exp and its directional derivative by torch operations, for second derivatives and for ``torch.compile``.

.. math::

    e_{nk} = c_k - \tfrac12 \lVert y_{nk} \rVert^2, \qquad y_{nk} = U_k^\top (x_n - \mu_k), \qquad
    \ell_n = \log \sum_k \exp e_{nk}, \qquad \dot\ell_n = \sum_k e^{e_{nk} - \ell_n}\, \dot e_{nk}

The temporary arrays have K x N x D entries; :func:`slopes` and :func:`curvature` therefore process the points in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmmkeops.reductions.problem import OFFSET_FLOOR

__all__ = ["curvature", "logsumexp", "slopes"]

# Maximum number of entries of a temporary array.
_CHUNK = 1 << 19


def logsumexp(x: Tensor, offsets: Tensor, means: Tensor, U: Tensor) -> Tensor:
    """Compute ℓ (N,), nats, with derivatives of all orders and without data-dependent control flow.

    Args:
        x: Points (N, D), data units.
        offsets: Offsets c (K,), nats.
        means: Means μ (K, D), data units.
        U: Factors (K or 1, D, D), (K or 1, D) or (K or 1, 1), 1 / data units.
    """
    return torch.logsumexp(_exponents(offsets, _times(_residuals(x, means), U)), 0)


def slopes(parameters: Sequence[Tensor], directions: Sequence[Tensor | None]) -> Tensor:
    """Compute the directional derivative of each ℓ_n (N,), float64; the result is not differentiable.

    Args:
        parameters: Points (N, D), offsets (K,), means (K, D) and factors, as for :func:`logsumexp`.
        directions: Directions in the shapes of the parameters; None for zero.
    """
    x, *others = parameters
    vx, *along = directions
    wide, along = [p.double() for p in others], [None if v is None else v.double() for v in along]
    found = x.new_empty(len(x), dtype=torch.float64)
    for rows in _parts(x, others[1]):
        part = None if vx is None else vx[rows].double()
        found[rows] = _slope((x[rows].double(), *wide), (part, *along))
    return found


def curvature(
    g: Tensor, parameters: Sequence[Tensor], directions: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    r"""Compute the gradients of :math:`\sum_n g_n \dot\ell_n` with respect to g, points, offsets, means and factors, float64.

    The gradients are products of the Hessian of :math:`\sum_n g_n \ell_n` with the directions.

    Args:
        g: Weights (N,) of the points.
        parameters, directions: As for :func:`slopes`.
        needed: Five booleans that select the gradients to compute; the others are None.
    """
    x, *others = parameters
    vx, *along = directions
    wide = [p.detach().double().requires_grad_(n) for p, n in zip(others, needed[2:], strict=True)]
    along = [None if v is None else v.double() for v in along]
    ahead = [
        x.new_zeros(t.shape, dtype=torch.float64) if n else None for t, n in zip((g, *parameters), needed, strict=True)
    ]
    for rows in _parts(x, others[1]):
        with torch.enable_grad():
            own = [t[rows].detach().double().requires_grad_(n) for t, n in zip((g, x), needed[:2], strict=True)]
            leaves = [*own, *wide]
            part = None if vx is None else vx[rows].double()
            value = (own[0] * _slope((own[1], *wide), (part, *along))).sum()
            chosen = [leaf for leaf, n in zip(leaves, needed, strict=True) if n]
            gradients = iter(torch.autograd.grad(value, chosen, allow_unused=True) if value.requires_grad else ())
        for i, into in enumerate(ahead):
            gradient = None if into is None else next(gradients, None)
            if into is not None and gradient is not None:
                (into[rows] if i < 2 else into).add_(gradient)
    return ahead


def _slope(parameters: Sequence[Tensor], directions: Sequence[Tensor | None]) -> Tensor:
    """Compute the directional derivatives (N,) of ℓ; differentiable."""
    x, offsets, means, U = parameters
    vx, vc, vm, vU = directions
    z = _residuals(x, means)
    y = _times(z, U)
    change = torch.zeros_like(y)
    if vx is not None:
        change = change + _times(vx.unsqueeze(-3), U)
    if vm is not None:
        change = change - _times(vm.unsqueeze(-2), U)
    if vU is not None:
        change = change + _times(z, vU)
    rise = -(y * change).sum(-1)
    if vc is not None:
        rise = rise + vc.unsqueeze(-1)
    return (torch.softmax(_exponents(offsets, y), 0) * rise).sum(0)


def _residuals(x: Tensor, means: Tensor) -> Tensor:
    """Compute x - μ (K, N, D), data units."""
    return x.unsqueeze(-3) - means.unsqueeze(-2)


def _times(z: Tensor, U: Tensor) -> Tensor:
    """Compute Uᵀ z for residuals (K or 1, N or 1, D)."""
    return z @ U if U.ndim == 3 else z * U.unsqueeze(-2)


def _exponents(offsets: Tensor, y: Tensor) -> Tensor:
    """Compute e (K, N) from whitened residuals; clamped to finite values."""
    e = offsets.clamp(min=OFFSET_FLOOR).unsqueeze(-1) - 0.5 * y.square().sum(-1)
    return e.clamp(min=torch.finfo(e.dtype).min)


def _parts(x: Tensor, means: Tensor) -> list[slice]:
    """Split the rows of the points into chunks."""
    rows = max(1, _CHUNK // means.numel())
    return [slice(start, start + rows) for start in range(0, len(x), rows)]
