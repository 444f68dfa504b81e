r"""Gibbs sampling of the posterior. Labels are not stored, only their sufficient statistics.

.. math::

    z_n \sim r_n, \qquad \pi \sim \mathrm{Dirichlet}(a + S^0), \qquad
    \mu_k \sim \mathcal N\bigl((P_0 + S^0_k \Lambda_k)^{-1}(P_0 m_0 + \Lambda_k (S^1_k + S^0_k \mu_k)), \cdot\bigr), \qquad
    \Lambda_k \sim \mathcal W\bigl((V^{-1} + S^2_k)^{-1}, \nu + S^0_k\bigr)

Each Gibbs iteration reads the points once (a stochastic E-step). References: Diebolt and Robert 1994, *Estimation of finite
mixture distributions through Bayesian sampling*, JRSS B 56; Ishwaran and James 2001, *Gibbs sampling methods for
stick-breaking priors*, JASA 96.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Dirichlet,
    Distribution,
    Gamma,
    Independent,
    InverseGamma,
    MultivariateNormal,
    Normal,
    Wishart,
)

from gmmkeops import reductions
from gmmkeops.bayes.sampling.draws import Draws
from gmmkeops.bayes.sampling.prior import Prior, StickBreaking, Values
from gmmkeops.bayes.sampling.target import Target, check_counts
from gmmkeops.bayes.variational.normal_wishart import stick_weights
from gmmkeops.components import Moments, bartlett, gamma
from gmmkeops.data import as_generator
from gmmkeops.reductions import recording

__all__ = ["gibbs"]

# Iterations between two proposals to swap components, if a proposal costs as much as an iteration.
_SWAP = 10

_Move = Callable[[Values, Moments, torch.Generator], Tensor]


@recording()
def gibbs(
    prior: Prior,
    x: Any,
    *,
    draws: int = 1000,
    warmup: int = 500,
    chains: int = 4,
    thin: int = 1,
    weights: Any = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    truncate: float | None = None,
    progress: bool | None = None,
) -> Draws:
    r"""Draw from the posterior by Gibbs sampling, which requires conditionally conjugate priors.

    .. math:: z_n \sim p(z_n \mid x_n, \theta) = r_n, \qquad
              \theta_k \sim p\Bigl(\theta_k \,\Big|\, \sum_{n: z_n = k} g_n (1, x_n, x_n x_n^\top)\Bigr)

    Args:
        prior: Prior on the parameters. Each parameter is known or has one of the following priors. Weights: Dirichlet or
            :class:`StickBreaking`. Means: Normal or MultivariateNormal. Precisions: Wishart (full covariances) or Gamma
            (diagonal, spherical). Covariances: InverseGamma (diagonal, spherical).
        x: Points (N, D) or (N,), data units.
        draws: Number of draws to keep per chain.
        warmup: Number of initial iterations to discard per chain.
        chains: Number of independent chains, each with its own initialization.
        thin: Number of iterations per draw kept.
        weights: Number of times that each point counts (N,), or None.
        generator: Random number generator; by default one with a fixed seed, so that repeated calls give equal draws.
        backend, truncate: As for :func:`gmmkeops.reductions.moments`.
        progress: Whether to show a progress bar; by default only in a terminal.

    Returns:
        :class:`Draws`, with the number of occupied components of each draw.

    Raises:
        TypeError, ValueError: Invalid points, or a prior that is not conditionally conjugate.

    Warns:
        SamplingWarning: The chains have not converged.

    Example:
        >>> import torch, gmmkeops as gk
        >>> from torch.distributions import Dirichlet, Gamma, Normal
        >>> x = torch.cat([torch.randn(50), 8 + torch.randn(50)])
        >>> prior = gk.bayes.Prior(
        ...     2, weights=Dirichlet(torch.ones(2)), means=Normal(0.0, 10.0), precisions=Gamma(1.0, 1.0), covariance_type="diag"
        ... )
        >>> found = gk.bayes.gibbs(prior, x, draws=100, warmup=20, chains=1)
        >>> found.mean("means").round(decimals=-1)[:, 0].abs().tolist()
        [0.0, 10.0]
    """
    check_counts(draws=(draws, 1), warmup=(warmup, 0), chains=(chains, 1), thin=(thin, 1))
    target = Target(prior, x, weights, backend=backend, truncate=truncate)
    moves = _moves(prior)
    generator = as_generator(generator)
    kept: list[Values] = []
    occupied: list[Tensor] = []
    with _bar(chains * (warmup + draws * thin), progress) as bar:
        for chain in range(chains):
            z = target.start(generator, "kmeans" if chain == 0 else "kmeans++")
            values = {name: value.detach() for name, value in prior.values(z.detach())[0].items()}
            for sweep in range(warmup + draws * thin):
                sums = _sweep(target, values, generator)
                for name, move in moves.items():
                    values = {**values, name: move(values, sums, generator)[None]}
                values = _swapped(target, values, sweep, generator)
                bar.update()
                if sweep >= warmup and (sweep - warmup) % thin == thin - 1:
                    kept.append(values)
                    occupied.append((sums.S0 > 0).sum())
    joined = {name: torch.cat([values[name] for values in kept]) for name in kept[0]}
    found = Draws.of(prior, joined, "Gibbs sampling", chains=chains, occupied=torch.stack(occupied))
    return found.warn_unless_mixed()


def _bar(total: int, progress: bool | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="gibbs", unit="sweep", disable=None if progress is None else not progress)


def _sweep(target: Target, values: Values, generator: torch.Generator) -> Moments:
    """Draw all labels, and return the sufficient statistics of the components about their means."""
    mixture = target.prior.mixtures({name: value[0] for name, value in values.items()}).to(target.x.device)
    seed = int(torch.randint(1 << 62, (1,), generator=generator))
    sums = reductions.moments(
        target.cloud,
        mixture.offsets,
        mixture.means,
        mixture.factor,
        weights=target.weights,
        assignment="stochastic",
        seed=seed,
        backend=target.backend,
        truncate=0,
    )
    # The parameters are drawn on the CPU.
    return Moments(*(part.cpu() for part in (sums.S0, sums.S1, sums.S2, sums.centers, sums.total, sums.mass)))


def _swapped(target: Target, values: Values, sweep: int, generator: torch.Generator) -> Values:
    """Propose to swap two components (Metropolis-Hastings), unless the prior is exchangeable.

    Reference: Papaspiliopoulos and Roberts 2008, *Retrospective Markov chain Monte Carlo methods for Dirichlet process
    hierarchical models*, Biometrika 95.
    """
    prior, K = target.prior, target.prior.components
    known = [site for site in prior.sites if site.known is not None]
    # The likelihood, which reads all points, changes only if there are known values, which are not swapped.
    if prior.exchangeable or K == 1 or (known and sweep % _SWAP):
        return values
    a, b = torch.randperm(K, generator=generator)[:2]
    order = torch.arange(K)
    order[a], order[b] = b, a
    moved = prior.rearranged(values, order[None])
    gain = prior.log_prob(moved) - prior.log_prob(values)
    if known:
        gain = gain + target.log_likelihood(prior.mixtures(moved)) - target.log_likelihood(prior.mixtures(values))
    chance = torch.rand((), generator=generator, dtype=torch.float64)
    return moved if bool(chance.log() < gain) else values


def _refusal(name: str, prior: Distribution, known: str) -> ValueError:
    return ValueError(
        f"gibbs does not support the prior {type(prior).__name__} on {name}; supported: {known}. Use one of these, or nuts."
    )


def _bare(prior: Distribution) -> Distribution:
    """Remove the Independent wrappers of a distribution."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    return prior


def _moves(prior: Prior) -> dict[str, _Move]:
    """Build the conditional sampler of each unknown parameter, given the other parameters and the sufficient statistics."""
    moves: dict[str, _Move] = {}
    for site, make in zip(prior.sites, (_weights_move, _means_move, _spread_move), strict=True):
        if site.prior is not None:
            moves[site.name] = make(prior, _bare(site.prior))
    return moves


def _weights_move(prior: Prior, own: Distribution) -> _Move:
    if not isinstance(own, (Dirichlet, StickBreaking)):
        raise _refusal("weights", own, "Dirichlet and StickBreaking")

    def move(values: Values, sums: Moments, generator: torch.Generator) -> Tensor:
        n = sums.S0
        if isinstance(own, StickBreaking):
            after = n.flip(0).cumsum(0).flip(0) - n
            a, b = gamma(1 + n, generator), gamma(own.concentration + after.clamp(min=0), generator)
            return stick_weights(a / (a + b))
        drawn = gamma(own.concentration.double() + n, generator)
        return drawn / drawn.sum()

    return move


def _means_move(prior: Prior, own: Distribution) -> _Move:
    K, D = prior.components, prior.features
    if isinstance(own, Normal):
        center = own.loc.double().expand(K, D)
        weight = torch.diag_embed(own.scale.double().expand(K, D) ** -2)
    elif isinstance(own, MultivariateNormal):
        center = own.loc.double().expand(K, D)
        weight = own.precision_matrix.double().expand(K, D, D)
    else:
        raise _refusal("means", own, "Normal and MultivariateNormal")

    def move(values: Values, sums: Moments, generator: torch.Generator) -> Tensor:
        mixture = prior.mixtures({name: value[0] for name, value in values.items()})
        precision = mixture.factor.precisions().expand(K, D, D)
        total = sums.S1 + sums.S0[:, None] * sums.centers
        pull = weight @ center[:, :, None] + precision @ total[:, :, None]
        root = torch.linalg.cholesky(weight + sums.S0[:, None, None] * precision)
        noise = torch.randn(K, D, 1, generator=generator, dtype=torch.float64)
        away = torch.linalg.solve_triangular(root.mT, noise, upper=True)
        return (torch.cholesky_solve(pull, root) + away)[:, :, 0]

    return move


def _spread_move(prior: Prior, own: Distribution) -> _Move:
    D, name = prior.features, prior.spread
    pairs: tuple[tuple[str, Any], ...] = (("precisions", Gamma), ("covariances", InverseGamma))
    if prior.kind.coupled:
        pairs = (("precisions", Wishart),)
    if not any(name == wanted and isinstance(own, kind) for wanted, kind in pairs):
        known = " and ".join(f"{kind.__name__} on {wanted}" for wanted, kind in pairs)
        raise _refusal(name, own, f"{known} of {prior.kind.family} components")

    def move(values: Values, sums: Moments, generator: torch.Generator) -> Tensor:
        about = sums.recenter(values["means"][0])
        n, S2 = about.S0, about.S2
        if prior.tied:
            n, S2 = n.sum(0, keepdim=True), S2.sum(0, keepdim=True)
        if isinstance(own, Wishart):
            root = torch.linalg.cholesky(torch.linalg.inv(own.precision_matrix.double() + S2))
            A = root @ bartlett(own.df.double() + n, D, generator)
            return A @ A.mT
        assert isinstance(own, (Gamma, InverseGamma)), "checked above"
        S2 = S2.reshape(len(n), -1)
        n = n[:, None] * (D / S2.shape[1])
        rate = own.rate.double() + 0.5 * S2
        drawn = gamma((own.concentration.double() + 0.5 * n).expand_as(rate), generator) / rate
        return drawn if name == "precisions" else 1 / drawn

    return move
