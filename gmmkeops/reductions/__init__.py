r"""Reductions of the exponents over points or components: log-sum-exps, labels and moments.

.. math::

    e_{nk} = c_k - \tfrac12 \lVert U_k^\top (x_n - \mu_k) \rVert^2, \qquad
    \ell_n = \log \sum_k \exp e_{nk}, \qquad r_{nk} = g_n \exp(e_{nk} - \ell_n)

There are two engines with equal results, ``dense`` and ``keops``; neither stores an N x K array. The gradients of
:math:`\sum_n g_n \ell_n` follow from the moments of r:

.. math::

    \partial_{c_k} = S^0_k, \qquad \partial_{\mu_k} = U_k U_k^\top S^1_k, \qquad \partial_{U_k} = -S^2_k U_k, \qquad
    \partial_{x_n} = -\sum_k r_{nk}\, U_k U_k^\top (x_n - \mu_k)

so that one pass over the data gives the gradients of all parameters and the sufficient statistics of EM. Second derivatives are
recomputed in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmmkeops._arguments import as_choice, as_integer
from gmmkeops._checks import as_tensor, as_weights, concrete, recordable
from gmmkeops.factors import DiagonalFactor, Factor
from gmmkeops.moments import Moments
from gmmkeops.reductions import _dense, _keops, _plain
from gmmkeops.reductions._choice import BACKENDS, arrange, engine, may_arrange
from gmmkeops.reductions._derivatives import Attached, LogSumExp, Total
from gmmkeops.reductions._exponents import Exponents, factor_tensor
from gmmkeops.reductions._truncation import Truncation

__all__ = [
    "ASSIGNMENTS",
    "BACKENDS",
    "Truncation",
    "argmax",
    "arrange",
    "attached",
    "engine",
    "logsumexp",
    "may_arrange",
    "moments",
    "topk",
    "total",
]

ASSIGNMENTS = ("soft", "hard", "stochastic")

R = TypeVar("R")
_Setup = tuple[Exponents, Truncation | None]


def _setup(x: Any, offsets: Any, means: Any, factor: Any, truncate: float | None, best: int = 0) -> _Setup:
    """The exponents, with points in kd-tree order if they are sorted, and the truncation or None.

    ``best`` is the rank of the exponent (1 for the largest) for which candidate lists must be complete; 0 for the log-sum-exp.
    """
    if not all(map(concrete, _arguments(x, offsets, means, factor))):
        raise ValueError(
            "torch.func.vmap and torch.compile support log-densities and their sums only; compute labels, largest exponents, "
            "moments and reductions of arranged points outside of them, for all points at once."
        )
    if isinstance(x, Truncation):
        problem, blocks = Exponents.of(x.cloud.points, offsets, means, factor), x
    else:
        problem = Exponents.of(x, offsets, means, factor)
        arranged = arrange(problem.x, problem.shape[1], truncate)
        if isinstance(arranged, Tensor):
            return problem, None
        problem, blocks = replace(problem, x=arranged.cloud.points), arranged
    if blocks.minima is None:
        rows = blocks.sample()
        few = problem.rows(rows.reshape(-1))
        best = min(best, problem.shape[1])
        values = _dense.topk(few, best)[0][:, -1] if best else _dense.logsumexp(few)
        blocks.suppose(values.view(rows.shape))
    return problem, blocks


def _values(problem: Exponents, blocks: Truncation | None, backend: str) -> Tensor:
    def keops() -> Tensor:
        return _planned(_keops.accurate(problem), blocks)[0].to(problem.x.dtype)

    return _run(problem, backend, lambda: _dense.logsumexp(problem, blocks), keops)


def _run(problem: Exponents, backend: str, dense: Callable[[], R], keops: Callable[[], R]) -> R:
    """Call the function of the engine chosen by :func:`engine`; if KeOps fails, call that of the dense engine."""
    if engine(problem, backend) == "keops":
        with suppress(_keops.Broken):
            return keops()
        # This call warns, since the reason is known now.
        engine(problem, backend)
    return dense()


def _planned(problem: Exponents, blocks: Truncation | None) -> tuple[Tensor, Any, Tensor]:
    """ℓ (N,) by KeOps, the schedules that were used or None, and the rows (n,) that were computed by the dense engine."""
    values, plans = _keops.logsumexp(problem, blocks)
    far = _keops.far(problem, values)
    if len(far):
        values[far] = _dense.logsumexp(problem.rows(far))
    return values, plans, far


def _largest(problem: Exponents, k: int, blocks: Truncation | None) -> tuple[Tensor, Tensor]:
    """The k largest exponents (N, k) and their components (N, k), by KeOps."""
    accurate = _keops.accurate(problem)
    values, indices = _keops.topk(accurate, k, blocks)
    far = _keops.far(accurate, values[:, 0])
    if len(far):
        values[far], indices[far] = _dense.topk(accurate.rows(far), k)
    return values.to(problem.x.dtype), indices


def _moments(
    problem: Exponents,
    blocks: Truncation | None,
    weights: Tensor | None,
    backend: str,
    assignment: str = "soft",
    seed: int = 0,
) -> Moments:
    """Moments of points and weights, both in kd-tree order if the points are sorted."""
    x = problem.x
    count = x.shape[0] if blocks is None else len(blocks.cloud.rank)
    mass = torch.tensor(float(count), dtype=torch.float64, device=x.device) if weights is None else weights.sum()
    if weights is None and len(x) > count:
        assert blocks is not None, "only a cloud repeats points"
        weights = blocks.cloud.enter(x.new_ones(count, dtype=torch.float64))

    def dense() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _dense.moments(problem, weights, assignment, seed, blocks)

    def keops() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        accurate = _keops.accurate(problem)
        values, plans, far = _planned(accurate, blocks)
        g = torch.ones_like(values, dtype=torch.float64) if weights is None else weights
        total = (values.double() * g).sum()
        values[far] = _keops.NO_SHARE
        S0, S1, S2 = _keops.moments(accurate, values, g, plans)
        S2 = S2.sum(1) if accurate.U.shape[1:] == (1,) and x.shape[1] > 1 else S2
        if len(far):
            rest = _dense.moments(accurate.rows(far), g[far], "soft", 0)
            S0, S1, S2 = S0 + rest[0], S1 + rest[1], S2 + rest[2].reshape(S2.shape)
        return S0, S1, S2, total

    S0, S1, S2, total = _run(problem, backend if assignment == "soft" else "dense", dense, keops)
    if problem.U.shape[1:] == (1,):
        S2 = S2.reshape(-1)
    return Moments(S0, S1, S2, problem.means + problem.centre, total, mass)


def _parameter_gradients(U: Tensor, sums: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ g ℓ in the offsets (K,), means (K, D) and U (K, ...), float64."""
    if U.ndim == 3:
        return sums.S0, (U @ (U.mT @ sums.S1[:, :, None]))[:, :, 0], -sums.S2 @ U
    return sums.S0, U**2 * sums.S1, -sums.S2.reshape(U.shape) * U


def _point_gradient(problem: Exponents, blocks: Truncation | None, weights: Tensor, backend: str) -> Tensor:

    def keops() -> Tensor:
        accurate = _keops.accurate(problem)
        values, plans, far = _planned(accurate, blocks)
        values[far] = _keops.NO_SHARE
        gradient = _keops.point_gradient(accurate, values, weights, plans)
        if len(far):
            gradient[far] = _dense.point_gradient(accurate.rows(far), weights[far])
        return gradient.to(problem.x.dtype)

    return _run(problem, backend, lambda: _dense.point_gradient(problem, weights, blocks), keops)


def attached(sums: Moments, offsets: Tensor, means: Tensor, factor: Factor | Tensor) -> Tensor:
    r"""The total :math:`\sum_n g_n \ell_n` of given moments, as a differentiable function of the parameters.

    With this function, moments that were added over chunks, ranks or files have the same gradients as one call of :func:`total`.

    Args:
        sums: Result of :func:`moments` for these parameters, or a sum of such results.
        offsets, means, factor: As for :func:`logsumexp`.

    Returns:
        A float64 scalar, nats, with first derivatives in the parameters; a second derivative raises a NotImplementedError.

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
    return Attached.apply(sums.total, *_parameter_gradients(wide, sums), offsets, means, U)


@dataclass
class _Sweep:
    """Engine of one call, with the interface that :mod:`gmmkeops.reductions._derivatives` needs.

    Args:
        blocks: The sorted points that the user passed, or None.
        backend, truncate: As for :func:`logsumexp`.
        setup: The exponents and their truncation, after they have been computed.
    """

    blocks: Truncation | None
    backend: str
    truncate: float | None
    setup: _Setup | None = None

    def anew(self) -> _Sweep:
        return replace(self, setup=None)

    def unordered(self, x: Tensor) -> Tensor:
        return x if self.blocks is None else self.blocks.cloud.leave(x)

    def _problem(self, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor) -> _Setup:
        if self.setup is None:
            points = x if self.blocks is None else self.blocks
            self.setup = _setup(points, offsets, means, U, self.truncate)
        return self.setup

    def values(self, *arguments: Tensor) -> Tensor:
        problem, blocks = self._problem(*arguments)
        values = _values(problem, blocks, self.backend)
        return values if blocks is None else blocks.cloud.leave(values)

    def total(
        self, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        problem, blocks = self._problem(x, offsets, means, U)
        weights = weights if weights is None or blocks is None else blocks.cloud.enter(weights)
        sums = _moments(problem, blocks, weights, self.backend)
        return sums.total.clone(), _parameter_gradients(problem.U, sums)

    def parameter_gradients(self, g: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem, blocks = self._problem(*arguments)
        g = g if blocks is None else blocks.cloud.enter(g)
        return _parameter_gradients(problem.U, _moments(problem, blocks, g, self.backend))

    def point_gradient(self, g: Tensor, *arguments: Tensor) -> Tensor:
        problem, blocks = self._problem(*arguments)
        g = g if blocks is None else blocks.cloud.enter(g)
        gradient = _point_gradient(problem, blocks, g, self.backend)
        return gradient if blocks is None else blocks.cloud.leave(gradient)


def _arguments(x: Any, offsets: Any, means: Any, factor: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points (sorted ones in kd-tree order), offsets, means and factors as tensors."""
    points = x.cloud.points if isinstance(x, Truncation) else as_tensor(x, name="x")
    named = {"offsets": offsets, "means": means, "factor": factor_tensor(factor)}
    found = [points, *(as_tensor(value, name=name, abstract=True) for name, value in named.items())]
    points, offsets, means, U = map(recordable, found)
    return points, offsets, means, U


def _compiled(sweep: _Sweep, x: Tensor, offsets: Tensor, means: Tensor, U: Tensor) -> Tensor:
    """ℓ (N,) in plain torch operations, for torch's compilers, which plan the memory of the N x K array themselves."""
    wide = torch.promote_types(x.dtype, means.dtype)
    points = sweep.unordered(x)
    return _plain.logsumexp(points.to(wide), offsets.to(wide), means.to(wide), U.to(wide)).to(x.dtype)


def logsumexp(
    x: Tensor | Truncation,
    offsets: Tensor,
    means: Tensor,
    factor: Factor | Tensor,
    *,
    backend: str = "auto",
    truncate: float | None = None,
) -> Tensor:
    r"""Log-sum-exp of the exponents at each point, :math:`\ell_n = \log \sum_k \exp e_{nk}`.

    It has first and second derivatives in the points, the offsets, the means and the factor, by ``backward`` and by
    ``torch.func``; second derivatives are recomputed from the points in chunks of bounded size. The result has the dtype of the
    points; the parameters may have any float dtype.

    Args:
        x: Points (N, D), float32 or float64, data units; or the result of :func:`arrange`.
        offsets: c (K,), nats; -inf for a component of weight zero.
        means: μ (K, D), data units.
        factor: A :class:`~gmmkeops.Factor`, or a tensor U (K or 1, D, D), (K or 1, D) or (K or 1, 1), 1 / data units.
        backend: ``"auto"``, ``"keops"`` or ``"dense"``.
        truncate: As for :func:`arrange`; ignored for points that :func:`arrange` has sorted.

    Returns:
        ℓ (N,), nats, in the dtype of the points.

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
    arguments = _arguments(x, offsets, means, factor)
    sweep = _Sweep(x if isinstance(x, Truncation) else None, backend, truncate)
    if torch.compiler.is_compiling():
        return _compiled(sweep, *arguments)
    return LogSumExp.apply(*arguments, sweep)


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
    r"""Weighted total :math:`\sum_n g_n \ell_n`, whose gradient is computed in the same pass as its value.

    It has the derivatives of :func:`logsumexp`, and those in the weights.

    Args:
        x, offsets, means, factor, backend, truncate: As for :func:`logsumexp`.
        weights: g (N,), may be negative; all ones if left out.

    Returns:
        A float64 scalar, nats.

    Raises:
        TypeError, ValueError: As :func:`logsumexp`; or the weights have another length than the points.

    Example:
        >>> import torch, gmmkeops as gk
        >>> means = torch.zeros(1, 2, requires_grad=True)
        >>> gk.reductions.total(torch.ones(5, 2), torch.zeros(1), means, torch.ones(1, 2)).backward()
        >>> means.grad
        tensor([[5., 5.]])
    """
    arguments = _arguments(x, offsets, means, factor)
    sweep = _Sweep(x if isinstance(x, Truncation) else None, backend, truncate)
    g = _weights(weights, arguments[0] if sweep.blocks is None else sweep.blocks)
    if torch.compiler.is_compiling():
        values = _compiled(sweep, *arguments).double()
        return values.sum() if g is None else (g * values).sum()
    if g is not None and g.requires_grad:
        return (g * LogSumExp.apply(*arguments, sweep).double()).sum()
    return Total.apply(*arguments, g, sweep)[0]


def _weights(weights: Any, x: Any) -> Tensor | None:
    return as_weights(weights, x.cloud.points[: len(x)] if isinstance(x, Truncation) else x, signed=True)


def argmax(
    x: Tensor | Truncation,
    offsets: Tensor,
    means: Tensor,
    factor: Factor | Tensor,
    *,
    backend: str = "auto",
    truncate: float | None = None,
) -> Tensor:
    r"""Index of the most probable component of each point, :math:`\arg\max_k e_{nk}`.

    Args:
        x, offsets, means, factor, backend, truncate: As for :func:`logsumexp`.

    Returns:
        Components (N,), int64; the first one if exponents are equal.

    Raises:
        TypeError, ValueError: As :func:`logsumexp`.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.argmax(torch.tensor([[0.1], [0.8]]), torch.zeros(2), torch.tensor([[0.0], [1.0]]), torch.ones(1, 1))
        tensor([0, 1])
    """
    problem, blocks = _setup(x, offsets, means, factor, truncate, best=1)

    def keops() -> Tensor:
        return _largest(problem, 1, blocks)[1][:, 0]

    labels = _run(problem, backend, lambda: _dense.argmax(problem, blocks), keops)
    return labels if blocks is None else blocks.cloud.leave(labels)


def topk(
    x: Tensor | Truncation,
    offsets: Tensor,
    means: Tensor,
    factor: Factor | Tensor,
    k: int,
    *,
    backend: str = "auto",
    truncate: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The k largest exponents of each point and the components they belong to.

    .. math:: e_{nk} = c_k - \tfrac12 \lVert U_k^\top (x_n - \mu_k) \rVert^2

    Args:
        x, offsets, means, factor, backend, truncate: As for :func:`logsumexp`.
        k: Number of exponents, from 1 to K.

    Returns:
        Exponents (N, k) in descending order, nats, and components (N, k), int64. Responsibilities are
        ``(exponents - logsumexp(...)[:, None]).exp()``.

    Raises:
        TypeError, ValueError: As :func:`logsumexp`; or k is out of range.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.topk(torch.zeros(1, 1), torch.tensor([0.0, 2.0, 1.0]), torch.zeros(3, 1), torch.ones(1, 1), 2)
        (tensor([[2., 1.]]), tensor([[1, 2]]))
    """
    k = as_integer(k, "k", 1)
    problem, blocks = _setup(x, offsets, means, factor, truncate, best=k)
    as_integer(k, "k", 1, problem.shape[1], clause=f"must be between 1 and the {problem.shape[1]} components")
    found = _run(problem, backend, lambda: _dense.topk(problem, k, blocks), lambda: _largest(problem, k, blocks))
    return found if blocks is None else (blocks.cloud.leave(found[0]), blocks.cloud.leave(found[1]))


def moments(
    x: Tensor | Truncation,
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
    r"""Sufficient statistics of the E-step: responsibility-weighted moments about the means.

    Args:
        x, offsets, means, factor, backend, truncate: As for :func:`logsumexp`.
        weights: g (N,), may be negative; all ones if left out.
        assignment: ``"soft"`` weights points by their responsibilities. ``"hard"`` assigns each point to its most probable
            component (classification EM, k-means), and ``total`` is then :math:`\sum_n g_n \max_k e_{nk}`. ``"stochastic"``
            draws the component of each point from its responsibilities. The last two always use the dense engine.
        seed: Seed of the stochastic assignment.

    Returns:
        :class:`~gmmkeops.Moments` in float64, with S2 in the shape of the factor: (K, D, D), (K, D) or (K,).

    Raises:
        TypeError, ValueError: As :func:`logsumexp`; or the weights have another length than the points, or the assignment is
            unknown.

    References:
        Celeux and Govaert 1992, *A classification EM algorithm*; Celeux and Diebolt 1985, *The SEM algorithm*.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.moments(torch.ones(4, 1), torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1)).S1
        tensor([[4.]], dtype=torch.float64)
    """
    as_choice(assignment, "assignment", ASSIGNMENTS)
    seed = as_integer(seed, "seed")
    problem, blocks = _setup(x, offsets, means, factor, truncate, best=1 if assignment == "hard" else 0)
    g = _weights(weights, problem.x if blocks is None else blocks)
    g = g if g is None or blocks is None else blocks.cloud.enter(g)
    sums = _moments(problem, blocks, g, backend, assignment, seed)
    # In one dimension a diagonal factor's tensor looks like a spherical one's; its S2 keeps its column.
    if isinstance(factor, DiagonalFactor) and sums.S2.ndim == 1:
        return replace(sums, S2=sums.S2[:, None])
    return sums
