r"""Stochastic-gradient Langevin dynamics: sampling with minibatches, for large data sets.

.. math::

    u \leftarrow u + \tfrac{\epsilon}{2}\, \hat g(u) + \sqrt{\epsilon}\, \xi, \qquad
    \hat g(u) = L^\top \Bigl[ \nabla \log p(z) - \nabla \log p(z^*)
        + \tfrac{\sum g}{\sum_B g} \sum_{n \in B} g_n (\nabla \ell_n(z) - \nabla \ell_n(z^*)) \Bigr] + L^\top g^*,
    \qquad z = z^* + L u

The control variate is the gradient of the minibatch B at a posterior mode z*, where the gradient g* over all points is computed
once. The preconditioner is the covariance L Lᵀ of the Laplace approximation. References: Welling and Teh 2011, *Bayesian
learning via stochastic gradient Langevin dynamics*, ICML; Baker, Fearnhead, Fox and Nemeth 2019, *Control variates for
stochastic gradient MCMC*, Statistics and Computing 29.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_integer, as_number
from gmmkeops.bayes.sampling.draws import Draws
from gmmkeops.bayes.sampling.prior import Prior
from gmmkeops.bayes.sampling.target import Target, check_counts
from gmmkeops.data import as_generator
from gmmkeops.reductions import recording

__all__ = ["langevin"]


@recording()
def langevin(
    prior: Prior,
    x: Any,
    *,
    draws: int = 1000,
    warmup: int = 200,
    thin: int = 10,
    step: float = 0.1,
    batch_size: int | None = None,
    weights: Any = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    progress: bool | None = None,
) -> Draws:
    r"""Draw from the posterior around one mode by stochastic-gradient Langevin dynamics, for large data sets.

    .. math:: \theta \leftarrow \theta + \frac{\epsilon}{2} H^{-1} \nabla \Bigl[\log p(\theta) + \frac{N}{n}
              \sum_{i \in \text{batch}} \log p(x_i \mid \theta)\Bigr] + \mathcal N(0, \epsilon H^{-1}),

    where H is the negative Hessian of the log-posterior at the mode and n is the batch size.

    Finding the mode and its Hessian takes some hundred passes over the points; each later step reads one batch. There is no
    accept-reject step, so the posterior variance is overestimated, by a fraction of about step / 4.

    Args:
        prior: Prior on the parameters; any continuous distributions.
        x: Points (N, D), data units.
        draws: Number of draws to keep.
        warmup: Number of initial steps to discard.
        thin: Number of steps per draw kept; draws ``2 / step`` steps apart are nearly independent.
        step: Step size ε in (0, 1], in units of the posterior variance.
        batch_size: Number of points per step; by default N / 100, but at least 10 000.
        weights: Weight of each point (N,), or None.
        generator: Random number generator; by default one with a fixed seed, so that repeated calls give equal draws.
        backend: As for :func:`gmmkeops.reductions.logsumexp`.
        progress: Whether to show a progress bar; by default only in a terminal.

    Returns:
        :class:`Draws`.

    Raises:
        TypeError, ValueError: Invalid points, or an argument out of its range.

    Example:
        >>> import torch, gmmkeops as gk
        >>> from torch.distributions import Normal
        >>> x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> prior = gk.bayes.Prior(1, weights=torch.ones(1), means=Normal(0.0, 10.0), scales=1.0, covariance_type="diag")
        >>> g = torch.Generator().manual_seed(0)
        >>> found = gk.bayes.langevin(prior, x, draws=300, warmup=20, thin=4, step=0.5, generator=g)
        >>> 0.8 < float(found.sd("means")) * 20_000**0.5 < 1.2
        True
    """
    if not 0 < as_number(step, "step") <= 1:
        raise ValueError(f"step must be above 0 and at most 1, got {step!r}.")
    check_counts(draws=(draws, 1), warmup=(warmup, 0), thin=(thin, 1))
    target = Target(prior, x, weights, backend=backend)
    rows = target.rows
    size = min(rows, max(10_000, rows // 100)) if batch_size is None else as_integer(batch_size, "batch_size", 1, rows)
    generator = as_generator(generator)
    mode, root = target.laplace(generator, starts=1)
    _, whole = target.slopes(mode[None])
    steady = whole[0] - _prior_slope(prior, mode)
    mass = float(rows if target.weights is None else target.weights.sum())
    u = torch.zeros_like(mode)
    kept = []
    from tqdm.auto import tqdm

    disable = None if progress is None else not progress
    for number in tqdm(range(warmup + draws * thin), desc="langevin", unit="step", disable=disable):
        index = torch.randint(rows, (size,), generator=generator)
        own = None if target.weights is None else target.weights[index]
        scale = mass / float(size if own is None else own.sum())
        z = mode + root @ u
        moved = _batch_slope(target, z, index, own) - _batch_slope(target, mode, index, own)
        slope = _prior_slope(prior, z) + steady + scale * moved
        noise = torch.randn(len(u), generator=generator, dtype=torch.float64)
        u = u + 0.5 * step * (root.T @ slope) + math.sqrt(step) * noise
        if number >= warmup and (number - warmup) % thin == thin - 1:
            kept.append(mode + root @ u)
    values = {name: value.detach() for name, value in prior.values(torch.stack(kept))[0].items()}
    return Draws.of(prior, values, "stochastic-gradient Langevin dynamics")


def _prior_slope(prior: Prior, z: Tensor) -> Tensor:
    z = z.detach()[None].requires_grad_()
    (gradient,) = torch.autograd.grad(prior.values(z)[1].sum(), z)
    return gradient[0]


def _batch_slope(target: Target, z: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """Compute the gradient (size,) of the log-likelihood of the points with the given indices."""
    z = z.detach()[None].requires_grad_()
    values, _ = target.prior.values(z)
    mixture = target.prior.mixtures({name: value[0] for name, value in values.items()})
    (gradient,) = torch.autograd.grad(target.total(target.x[index], weights, mixture), z)
    return gradient[0]
