"""The public reductions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_choice, as_integer
from gmmkeops.components import Factor, Moments, as_tensor
from gmmkeops.data import Batch, as_weights
from gmmkeops.reductions import plain as _plain
from gmmkeops.reductions.cores import alone
from gmmkeops.reductions.derivatives import Attached, LogSumExp, Total
from gmmkeops.reductions.dispatch import (
    ASSIGNMENTS,
    Dispatch,
    as_arguments,
    compute,
    parameter_gradients,
    setup,
    statistics,
)
from gmmkeops.reductions.problem import factor_tensor
from gmmkeops.reductions.protocol import Argmax, Statistics, TopK
from gmmkeops.reductions.truncation.truncation import Truncation

__all__ = ["argmax", "attached", "logsumexp", "moments", "topk", "total"]


def attached(sums: Moments, offsets: Tensor, means: Tensor, factor: Factor | Tensor) -> Tensor:
    r"""Return the total :math:`\sum_n g_n \ell_n` of given moments, as a differentiable function of the parameters.

    The gradients for moments that were added over chunks, ranks or files equal those of one call of :func:`total`.

    Args:
        sums: Result of :func:`moments` for these parameters, or a sum of such results.
        offsets, means, factor: As for :func:`logsumexp`.

    Returns:
        A float64 scalar, nats, with first derivatives in the parameters.

    Raises:
        NotImplementedError: A second derivative is computed.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x, offsets, factors = torch.randn(10, 2), torch.zeros(3), torch.eye(2).expand(3, 2, 2)
        >>> means = torch.randn(3, 2).requires_grad_()
        >>> halves = [gk.reductions.moments(part, offsets, means.detach(), factors) for part in x.split(5)]
        >>> gk.reductions.attached(halves[0] + halves[1], offsets, means, factors).backward()
        >>> in_halves, means.grad = means.grad, None
        >>> gk.reductions.logsumexp(x, offsets, means, factors).sum().backward()
        >>> torch.allclose(in_halves, means.grad, atol=1e-4)
        True
    """
    U = as_tensor(factor_tensor(factor), name="factor")
    offsets, means = as_tensor(offsets, name="offsets"), as_tensor(means, name="means")
    wide = U.detach().double().expand(len(means), *U.shape[1:])
    return Attached.of(sums.total, *parameter_gradients(wide, sums.S0, sums.S1, sums.S2), offsets, means, U)


def _compiled(sweep: Dispatch, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor) -> Tensor:
    """Compute ℓ (N,) by torch operations, for ``torch.compile``, which may avoid the N x K array by fusion."""
    wide = torch.promote_types(x.dtype, means.dtype)
    points = sweep.unordered(x)
    return _plain.logsumexp(points.to(wide), offsets.to(wide), means.to(wide), U.to(wide)).to(x.dtype)


def logsumexp(
    x: Tensor | Truncation | Batch,
    offsets: Tensor,
    means: Tensor,
    factor: Factor | Tensor,
    *,
    backend: str = "auto",
    truncate: float | None = None,
) -> Tensor:
    r"""Compute the log-sum-exp of the exponents at each point, :math:`\ell_n = \log \sum_k \exp e_{nk}`.

    First and second derivatives with respect to points, offsets, means and factor are supported, by ``backward`` and by
    ``torch.func``. Second derivatives are recomputed from the points in chunks of bounded size. The parameters may have any
    floating-point dtype.

    Args:
        x: Points (N, D), float32 or float64, data units; or the result of :func:`arrange`.
        offsets: Offsets c (K,), nats; -inf for a component of weight zero.
        means: Means μ (K, D), data units.
        factor: A :class:`~gmmkeops.Factor`, or a tensor U (K or 1, D, D), (K or 1, D) or (K or 1, 1), 1 / data units.
        backend: ``"auto"``, ``"native"``, ``"keops"``, ``"triton"`` or ``"dense"``.
        truncate: As for :func:`arrange`; ignored for points that :func:`arrange` has sorted.

    Returns:
        Log-sum-exps ℓ (N,), nats, in the dtype of the points.

    Raises:
        TypeError: An argument is not numeric, or is complex.
        ValueError: Shapes, devices or dtypes do not match, entries are not finite, or the backend is unknown.
        NotImplementedError: A third derivative is computed.

    Reference:
        Charlier, Feydy, Glaunès, Collin and Durif 2021, *Kernel operations on the GPU, with autodiff, without memory
        overflows*, JMLR 22(74).

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.zeros(1, 2)
        >>> gk.reductions.logsumexp(x, torch.zeros(2), torch.zeros(2, 2), torch.ones(1, 2)).exp()
        tensor([2.])
    """
    arguments = as_arguments(x, offsets, means, factor)
    sweep = Dispatch.of(x, backend, truncate)
    if torch.compiler.is_compiling():
        return _compiled(sweep, *arguments)
    return LogSumExp.of(*arguments, sweep)


def total(
    x: Tensor | Truncation,
    offsets: Tensor,
    means: Tensor,
    factor: Factor | Tensor,
    *,
    weights: Tensor | None = None,
    backend: str = "auto",
    truncate: float | None = None,
) -> Tensor:
    r"""Compute the weighted total :math:`\sum_n g_n \ell_n`, and its gradient in the same pass.

    The supported derivatives are those of :func:`logsumexp`, and those with respect to the weights.

    Args:
        x, offsets, means, factor, backend, truncate: As for :func:`logsumexp`.
        weights: Weights g (N,), possibly negative; default: ones.

    Returns:
        A float64 scalar, nats.

    Raises:
        TypeError, ValueError: As :func:`logsumexp`; or the number of weights differs from the number of points.

    Example:
        >>> import torch, gmmkeops as gk
        >>> means = torch.zeros(1, 2, requires_grad=True)
        >>> gk.reductions.total(torch.ones(5, 2), torch.zeros(1), means, torch.ones(1, 2)).backward()
        >>> means.grad
        tensor([[5., 5.]])
    """
    arguments = as_arguments(x, offsets, means, factor)
    sweep = Dispatch.of(x, backend, truncate)
    g = _weights(weights, arguments[0] if sweep.blocks is None else sweep.blocks)
    if torch.compiler.is_compiling():
        values = _compiled(sweep, *arguments).double()
        return values.sum() if g is None else (g * values).sum()
    if g is not None and g.requires_grad:
        return (g * LogSumExp.apply(*arguments, sweep).double()).sum()
    return Total.apply(*arguments, g, sweep)[0]


def _weights(weights: Any, x: Any) -> Tensor | None:
    return as_weights(weights, x.cloud.points[: len(x)] if isinstance(x, Truncation) else x, signed=True)


def _tensor(x: Any) -> Any:
    """Return the tensor of points that may be sorted or a batch."""
    points = x.points if isinstance(x, Batch) else x
    return points.cloud.points if isinstance(points, Truncation) else points


def argmax(
    x: Tensor | Truncation | Batch,
    offsets: Tensor,
    means: Tensor,
    factor: Factor | Tensor,
    *,
    backend: str = "auto",
    truncate: float | None = None,
) -> Tensor:
    r"""Compute the most probable component of each point, :math:`\arg\max_k e_{nk}`.

    Args:
        x, offsets, means, factor, backend, truncate: As for :func:`logsumexp`.

    Returns:
        Component indices (N,), int64; the first one if exponents are equal.

    Raises:
        TypeError, ValueError: As :func:`logsumexp`.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.argmax(torch.tensor([[0.1], [0.8]]), torch.zeros(2), torch.tensor([[0.0], [1.0]]), torch.ones(1, 1))
        tensor([0, 1])
    """
    with alone(_tensor(x)):
        problem, blocks = setup(x, offsets, means, factor, truncate, Argmax().rank)
        (labels,) = compute(problem, blocks, Argmax(), backend)
    return labels if blocks is None else blocks.cloud.leave(labels)


def topk(
    x: Tensor | Truncation | Batch,
    offsets: Tensor,
    means: Tensor,
    factor: Factor | Tensor,
    k: int,
    *,
    backend: str = "auto",
    truncate: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Compute the k largest exponents of each point, and their components.

    .. math:: e_{nk} = c_k - \tfrac12 \lVert U_k^\top (x_n - \mu_k) \rVert^2

    Args:
        x, offsets, means, factor, backend, truncate: As for :func:`logsumexp`.
        k: Number of exponents, from 1 to K.

    Returns:
        Exponents (N, k) in descending order, nats, and component indices (N, k), int64. The corresponding responsibilities are
        ``(exponents - logsumexp(...)[:, None]).exp()``.

    Raises:
        TypeError, ValueError: As :func:`logsumexp`; or k is out of range.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.topk(torch.zeros(1, 1), torch.tensor([0.0, 2.0, 1.0]), torch.zeros(3, 1), torch.ones(1, 1), 2)
        (tensor([[2., 1.]]), tensor([[1, 2]]))
    """
    k = as_integer(k, "k", 1)
    with alone(_tensor(x)):
        problem, blocks = setup(x, offsets, means, factor, truncate, k)
        as_integer(k, "k", 1, problem.shape[1], clause=f"must be between 1 and the {problem.shape[1]} components")
        values, components = compute(problem, blocks, TopK(k), backend)
    return (values, components) if blocks is None else (blocks.cloud.leave(values), blocks.cloud.leave(components))


def moments(
    x: Tensor | Truncation | Batch,
    offsets: Tensor,
    means: Tensor,
    factor: Factor | Tensor,
    *,
    weights: Tensor | None = None,
    assignment: str = "soft",
    seed: int = 0,
    backend: str = "auto",
    truncate: float | None = None,
) -> Moments:
    r"""Compute the sufficient statistics of the E-step: responsibility-weighted moments about the means.

    Args:
        x, offsets, means, factor, backend, truncate: As for :func:`logsumexp`. The points may also be a batch with validated
            points and weights; the parameters, and then also the moments, may be on the CPU for points on another device.
        weights: Weights g (N,), possibly negative; default: ones.
        assignment: ``"soft"`` weights points by their responsibilities. ``"hard"`` assigns each point to its most probable
            component (classification EM, k-means), and ``total`` is then :math:`\sum_n g_n \max_k e_{nk}`. ``"stochastic"``
            draws the component of each point from its responsibilities. KeOps has no formulas for these two; the dense engine
            computes them instead.
        seed: Seed of the stochastic assignment.

    Returns:
        :class:`~gmmkeops.Moments` in float64, with S2 in the shape of the factor: (K, D, D), (K, D) or (K,).

    Raises:
        TypeError, ValueError: As :func:`total`; or the assignment is unknown.

    References:
        Celeux and Govaert 1992, *A classification EM algorithm*; Celeux and Diebolt 1985, *The SEM algorithm*.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.moments(torch.ones(4, 1), torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1)).S1
        tensor([[4.]], dtype=torch.float64)
    """
    as_choice(assignment, "assignment", ASSIGNMENTS)
    seed = as_integer(seed, "seed")
    with alone(_tensor(x)):
        problem, blocks = setup(x, offsets, means, factor, truncate, Statistics(assignment=assignment).rank)
        g = x.weights if isinstance(x, Batch) else _weights(weights, problem.x if blocks is None else blocks)
        g = g if g is None or blocks is None else blocks.cloud.enter(g)
        sums = statistics(
            problem,
            blocks,
            g,
            backend,
            assignment,
            seed,
            getattr(means, "device", None) if isinstance(x, Batch) else None,
        )
    # In one dimension the factors of all families have equal shapes, so S2 is reshaped to that of the given factor.
    shape = factor.spread_shape(factor.features) if isinstance(factor, Factor) else sums.S2.shape[1:]
    shape = (len(sums.S0), *shape)
    return sums if sums.S2.shape == shape else replace(sums, S2=sums.S2.reshape(shape))
