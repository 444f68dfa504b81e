r"""Log-densities of points under a mixture or a batch of mixtures, and the entropy.

One mixture is evaluated by :mod:`gmmkeops.reductions` with the offsets
:math:`c_k = \log W_k + \log |\det U_k| - \tfrac D2 \log 2\pi`, a batch of mixtures by torch operations in blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gmmkeops import reductions
from gmmkeops._checks import as_choice, as_fraction
from gmmkeops.components import concrete, constant, ordinary
from gmmkeops.data import Batch
from gmmkeops.models.kept import prepared
from gmmkeops.models.points import as_points_of, broadcast, check_range, examined

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture
    from gmmkeops.reductions import Prepared

__all__ = ["CHUNK", "entropy", "joint", "log_joint", "log_prob"]

# Maximum number of elements of an intermediate array (rows, K, D) or (rows, D, D).
CHUNK = 1 << 22

# Maximum number of elements of an intermediate array that stays in cache.
_CACHED = 1 << 17


def log_prob(mixture: Mixture, value: Any, *, backend: str = "auto", truncate: float | None = None) -> Tensor:
    r"""Compute the log-density log p(x), including the normalizing constant.

    Args:
        value: Points (*S, D), or (*S, *B, D) for a batch of mixtures; data units. The result has their dtype.
        backend: ``"auto"``, ``"native"``, ``"keops"``, ``"triton"`` or ``"dense"``.
        truncate: Largest fraction of the density of a point that may be neglected; 0 evaluates every component; None is the
            default of :func:`gmmkeops.reductions.arrange`.

    Returns:
        (*S, *B), nats per point, differentiable in points and parameters.

    Raises:
        TypeError, ValueError: The points are not numeric, not finite, or do not have D columns; their squared distances
            overflow their dtype; or ``backend="keops"`` or ``"triton"``, or truncation, is requested for a batch of mixtures.
    """
    x, parameters = as_points_of(mixture, value), prepared(mixture)
    check = mixture._validate_args and concrete(x)
    near, is_near = examined(mixture, x, parameters, check=check)
    if check:
        values = _finite_log_prob(mixture, near, parameters, backend, truncate).to(x.dtype)
        if not is_near:
            check_range(mixture, values, x)
        return values
    finite = torch.isfinite(x).all(-1)
    near = torch.where(finite.unsqueeze(-1), near, 0.0)
    values = _finite_log_prob(mixture, near, parameters, backend, truncate).to(x.dtype)
    # The sum is NaN where an entry is NaN, else infinite.
    return torch.where(finite, values, -x.detach().abs().sum(-1))


def _finite_log_prob(
    mixture: Mixture, x: Tensor, parameters: Prepared | None, backend: str, truncate: float | None
) -> Tensor:
    """Compute log-densities (*S, *B) of finite points; ``parameters`` as :func:`prepared` returns them."""
    if mixture.batch_shape:
        compiled = as_choice(backend, "backend", reductions.BACKENDS) in ("keops", "triton")
        if compiled or as_fraction(truncate, "truncate"):
            raise ValueError(
                f"a batch of mixtures does not support backend={backend!r}; omit backend."
                if compiled
                else "a batch of mixtures does not support truncation; omit truncate."
            )
        return _batch_log_prob(mixture, x)
    if x.numel() == 0:
        return torch.logsumexp(joint(mixture, x), -1)
    flat = x if x.ndim == 2 else x.reshape(-1, mixture.n_features)
    if parameters is not None and ordinary(x):
        values = parameters.logsumexp(flat, backend=backend, truncate=truncate)
    else:
        arguments = (Batch(flat), mixture.offsets, mixture.means, mixture.factor)
        values = reductions.logsumexp(*arguments, backend=backend, truncate=truncate)
    return values if x.ndim == 2 else values.reshape(x.shape[:-1])


def _batch_log_prob(mixture: Mixture, x: Tensor) -> Tensor:
    """Compute log-densities (*S, *B) of points (*S, *B, D) in blocks of mixtures, recomputed in the backward pass."""
    batch = broadcast(mixture, x[..., 0], x, "points").shape
    lead = batch[: len(batch) - len(mixture.batch_shape)]
    # A factor, as a matrix, takes as much memory as the residuals of D points.
    room = max(1, CHUNK // (mixture.n_components * mixture.n_features * (mixture.n_features + 1)))
    if _fits(batch, room):
        return torch.logsumexp(joint(mixture, x), -1)
    flat = x.expand(*batch, mixture.n_features).reshape(lead.numel(), -1, mixture.n_features)
    tensors = {name: tensor.flatten(0, -3) for name, tensor in mixture.factor.tensors.items()}

    def block(points: Tensor, logits: Tensor, means: Tensor, *parts: Tensor) -> Tensor:
        factor = mixture.factor.replace(**dict(zip(tensors, parts, strict=True)))
        return torch.logsumexp(joint(type(mixture)(logits, means, factor, validate_args=False), points), -1)

    size, rows = max(1, room // lead.numel()), min(room, lead.numel())
    columns = (mixture.logits.flatten(0, -2), mixture.means.flatten(0, -3), *tensors.values())
    values = []
    for points, *own in zip(flat.split(size, 1), *(tensor.split(size) for tensor in columns), strict=True):
        # Checkpointing is used for gradients only, because it imports torch's compiler, which takes a second and 50 MB.
        if torch.is_grad_enabled():
            parts = [checkpoint(block, part, *own, use_reentrant=False) for part in points.split(rows)]
        else:
            parts = [block(part, *own) for part in points.split(rows)]
        values.append(torch.cat(parts))
    return torch.cat(values, 1).reshape(batch)


def log_joint(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute the joint log-densities log p(x, k) = log W_k + log N(x; μ_k, Σ_k) of points and components.

    Args:
        value: Points (*S, D), or (*S, *B, D) for a batch of mixtures; data units.

    Returns:
        (*S, *B, K), nats, in the dtype of the points.

    Raises:
        TypeError, ValueError: As for :meth:`log_prob`.
    """
    x, parameters = as_points_of(mixture, value), prepared(mixture)
    near, is_near = examined(mixture, x, parameters, check=mixture._validate_args)
    values = joint(mixture, near, parameters, is_near=is_near).to(x.dtype)
    if not is_near:
        check_range(mixture, values.amax(-1), x)
    return values


def entropy(mixture: Mixture) -> Tensor:
    r"""Compute the differential entropy of a mixture of one component, in closed form.

    .. math:: H = \tfrac D2 \log(2 \pi e) - \log |\det U|

    Returns:
        (*B), nats.

    Raises:
        NotImplementedError: The mixture has several components; its entropy has no closed form.
    """
    if mixture.n_components > 1:
        raise NotImplementedError(
            f"the entropy of a mixture of {mixture.n_components} components has no closed form; average -log_prob over a "
            "sample, or compare mixtures by sampling with gmmkeops.analysis (gk.analysis.kl_divergence)."
        )
    return 0.5 * mixture.n_features * math.log(2 * math.pi * math.e) - mixture.factor.log_determinant()[..., 0]


def joint(mixture: Mixture, x: Tensor, parameters: Prepared | None = None, *, is_near: bool = False) -> Tensor:
    """Compute log p(x, k) (*S, *B, K) of points, in their dtype.

    Args:
        mixture, x: The mixture, and points that have been validated.
        parameters: Result of :func:`prepared`.
        is_near: Whether all distances are small, so that their squares cannot overflow.
    """
    wide = torch.promote_types(x.dtype, mixture.means.dtype)
    if parameters is None or mixture.means.dtype != torch.float64:
        # The factors of prepared parameters are float64.
        offsets, U = mixture.offsets.to(wide), mixture.factor.to(wide).U
    else:
        offsets, U = parameters.offsets, parameters.U
    means, factor = mixture.means.to(wide), mixture.factor

    def exponents(rows: Tensor) -> Tensor:
        if mixture.batch_shape or rows.ndim != 2:
            distances = factor.times(U, rows.unsqueeze(-2).to(wide) - means).square().sum(-1)
            return logs(offsets, distances).to(rows.dtype)
        # Matrices (D, rows) for each component: products and sums over columns are then faster.
        y = factor.times_all(U, rows.to(wide).T.contiguous() - means.unsqueeze(-1))
        distances = (y.square_() if inplace else y.square()).sum(-2)
        return logs(offsets.unsqueeze(-1), distances).to(rows.dtype).T.contiguous()

    def logs(offsets: Tensor, distances: Tensor) -> Tensor:
        # Overflowing products can cancel to NaN; the distance is then infinite.
        distances = distances if is_near else distances.masked_fill(distances.isnan(), math.inf)
        return torch.sub(offsets, distances, alpha=0.5)

    inplace = constant(x, offsets, means, U)
    rows = max(1, (_CACHED if inplace else CHUNK) // max(1, mixture.means.numel()))
    if mixture.batch_shape or x.ndim < 2 or _fits(x.shape[:-1], rows):
        return exponents(x)
    flat = x.reshape(-1, mixture.n_features)
    return torch.cat([exponents(part) for part in flat.split(rows)]).reshape(*x.shape[:-1], mixture.n_components)


def _fits(shape: torch.Size, rows: int) -> bool:
    """Return whether a shape has at most ``rows`` entries; True while torch compiles, since compilers plan memory themselves."""
    return torch.compiler.is_compiling() or shape.numel() <= rows
