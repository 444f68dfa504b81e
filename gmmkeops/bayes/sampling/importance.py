"""Importance sampling of the posterior, with the labels marginalized out.

References: Robert and Casella 2004, *Monte Carlo Statistical Methods*, §3.3; Kucukelbir, Tran, Ranganath, Gelman and Blei
2017, *Automatic differentiation variational inference*, JMLR 18.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_choice, as_integer, warn
from gmmkeops.bayes.sampling.draws import Draws, SamplingWarning
from gmmkeops.bayes.sampling.pareto import smoothed
from gmmkeops.bayes.sampling.prior import Prior, Values
from gmmkeops.bayes.sampling.target import Target
from gmmkeops.data import as_generator
from gmmkeops.reductions import recording

__all__ = ["importance"]

PROPOSALS = ("laplace", "variational", "prior")

# Degrees of freedom of the Student's t proposals.
_DEGREES = 5.0

# Maximum number of components for which a proposal includes all permutations of exchangeable components.
_ORDERS = 5

# Permutations with a smaller posterior probability are left out of a proposal.
_SHARE = 1e-6

# Thresholds of effective sample size and Pareto k for a warning.
_LEAST_ESS, _LARGEST_K = 100.0, 0.7


@recording()
def importance(
    prior: Prior,
    x: Any,
    *,
    draws: int = 4000,
    proposal: str = "laplace",
    weights: Any = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Draws:
    r"""Draw from the posterior by importance sampling.

    .. math:: \theta_s \sim q, \qquad w_s \propto \frac{p(\theta_s) \prod_n p(x_n \mid \theta_s)^{g_n}}{q(\theta_s)}

    Args:
        prior: Prior on the parameters.
        x: Points (N, D) or (N,), data units.
        draws: Number of draws.
        proposal: Proposal distribution: ``"laplace"`` (a Student's t distribution with the location and scale of the Laplace
            approximation), ``"variational"`` (the same, with location and scale optimized for the evidence lower bound), or
            ``"prior"``. The first two are mixtures over all permutations of up to five components.
        weights: Weight of each point (N,), or None.
        generator: Random number generator; by default one with a fixed seed, so that repeated calls give equal draws.
        backend: As for :func:`gmmkeops.reductions.logsumexp`.

    Returns:
        :class:`Draws` with Pareto-smoothed weights, and "ess", "pareto_k" and "log_evidence" (nats) in its diagnostics.

    Raises:
        TypeError, ValueError: Invalid points, or an unknown proposal.

    Warns:
        SamplingWarning: The weights are degenerate: the effective sample size is too small or Pareto k is too large.

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry 2024, *Pareto smoothed importance sampling*, JMLR 25.

    Example:
        >>> import torch, gmmkeops as gk
        >>> from torch.distributions import Normal
        >>> x = torch.tensor([348.0, 350.0, 352.0, 499.0, 502.0])
        >>> prior = gk.bayes.Prior(
        ...     2, weights=torch.tensor([0.5, 0.5]), means=Normal(400.0, 50.0), scales=2.0, covariance_type="spherical"
        ... )
        >>> found = gk.bayes.importance(prior, x, generator=torch.Generator().manual_seed(0))
        >>> found.mean("means").round(decimals=0)[:, 0].tolist()
        [350.0, 500.0]
    """
    as_choice(proposal, "proposal", PROPOSALS)
    draws = as_integer(draws, "draws", 10)
    target = Target(prior, x, weights, backend=backend)
    generator = as_generator(generator)
    if proposal == "prior":
        values = prior.sample(draws, generator)
        ratios = target.log_likelihood(prior.mixtures(values))
    else:
        center, root = target.laplace(generator)
        if proposal == "variational":
            center, root = _variational(target, center, root, generator)
        values, _ = prior.values(center + _student(draws, len(center), generator) @ root.T)
        orders, shares = _orders(target, center)
        chosen = torch.multinomial(shares, draws, replacement=True, generator=generator)
        values = prior.rearranged(values, orders[chosen])
        z = prior.unbounded(values)
        density = prior.values(z)[1] + target.log_likelihood(prior.mixtures(values))
        ratios = density - _log_proposal(prior, values, z, center, root, orders, shares)
    ratios = ratios.detach().nan_to_num(nan=-math.inf, posinf=-math.inf)
    evidence = float(torch.logsumexp(ratios, 0)) - math.log(draws)
    log_weights, k = smoothed(ratios)
    ess = float(torch.exp(-torch.logsumexp(2 * log_weights, 0)))
    if not (ess >= _LEAST_ESS and k < _LARGEST_K):
        warn(
            f"the importance weights are degenerate (effective sample size {ess:.1f} of {draws} draws, Pareto k {k:.2f}), so "
            "estimates are unreliable; use another proposal, gibbs or nuts.",
            SamplingWarning,
        )
    values = {name: value.detach() for name, value in values.items()}
    found = {"ess": ess, "pareto_k": k, "log_evidence": evidence}
    return Draws.of(prior, values, f"importance sampling ({proposal})", log_weights=log_weights, diagnostics=found)


def _orders(target: Target, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return the permutations (P, K) of the components that a proposal around a mode includes, and their probabilities (P,)."""
    prior, K = target.prior, target.prior.components
    if prior.exchangeable and K <= _ORDERS:
        orders = torch.tensor(list(permutations(range(K))))
        return orders, torch.full((len(orders),), 1 / len(orders), dtype=torch.float64)
    orders, heights = target.orders(prior.values(center[None])[0])
    shares = torch.softmax(heights[:, 0], 0)
    orders, shares = orders[shares > _SHARE], shares[shares > _SHARE]
    # Improbable permutations are oversampled, so that their weights stay bounded.
    return orders, 0.9 * shares / shares.sum() + 0.1 / len(shares)


def _student(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw from the standard multivariate Student's t distribution (count, size)."""
    noise = torch.randn(count, size, generator=generator, dtype=torch.float64)
    half = torch.full((count, 1), _DEGREES / 2, dtype=torch.float64)
    return noise / (torch._standard_gamma(half, generator=generator) / half).sqrt()


def _log_student(z: Tensor, center: Tensor, root: Tensor) -> Tensor:
    size = len(center)
    y = torch.linalg.solve_triangular(root, (z - center).T, upper=False)
    constant = (
        math.lgamma((_DEGREES + size) / 2) - math.lgamma(_DEGREES / 2) - 0.5 * size * math.log(_DEGREES * math.pi)
    )
    return (
        constant
        - float(root.diagonal().log().sum())
        - 0.5 * (_DEGREES + size) * torch.log1p(y.square().sum(0) / _DEGREES)
    )


def _log_proposal(
    prior: Prior, values: Values, z: Tensor, center: Tensor, root: Tensor, orders: Tensor, shares: Tensor
) -> Tensor:
    """Compute the log-density (S,) of a proposal that is a mixture over permutations (P, K) with probabilities (P,)."""
    # The Jacobian term of the transform to the parameters, on which a permutation acts with determinant one.
    volume = prior.values(z)[1] - prior.log_prob(values)
    found = []
    for order, share in zip(orders, shares, strict=True):
        back = prior.unbounded(prior.rearranged(values, order.argsort().expand(len(z), -1)))
        own, logs = prior.values(back)
        found.append(share.log() + _log_student(back, center, root) + volume - (logs - prior.log_prob(own)))
    return torch.logsumexp(torch.stack(found), 0)


def _variational(
    target: Target, center: Tensor, root: Tensor, generator: torch.Generator, steps: int = 300, draws: int = 16
) -> tuple[Tensor, Tensor]:
    """Maximize the evidence lower bound over Gaussians, starting from the Laplace approximation: mean and Cholesky factor."""
    size = len(center)
    shift = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    shear = torch.zeros(size, size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([shift, shear], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def sheared() -> Tensor:
        return shear.tril(-1) + torch.diag(shear.diagonal().exp())

    for _ in range(steps):
        noise = torch.randn(draws, size, generator=generator, dtype=torch.float64)
        places = center + (shift + noise @ sheared().T) @ root.T
        _, gradient = target.slopes(places)
        optimizer.zero_grad()
        # A surrogate whose gradient with respect to the draws is the known gradient.
        loss = -(places * gradient.nan_to_num()).sum() / draws - shear.diagonal().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return center + root @ shift, root @ sheared()
