"""Hamiltonian Monte Carlo by Pyro's no-U-turn sampler, with the labels marginalized out.

References: Hoffman and Gelman 2014, *The no-U-turn sampler*, JMLR 15; Bingham et al. 2019, *Pyro: deep universal
probabilistic programming*, JMLR 20.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import warn
from gmmkeops.bayes.sampling.draws import Draws, SamplingWarning
from gmmkeops.bayes.sampling.prior import Prior, Values
from gmmkeops.bayes.sampling.target import Target, check_counts
from gmmkeops.data import as_generator
from gmmkeops.reductions import recording

__all__ = ["nuts"]


@recording()
def nuts(
    prior: Prior,
    x: Any,
    *,
    draws: int = 1000,
    warmup: int = 500,
    chains: int = 4,
    weights: Any = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    progress: bool | None = None,
    **options: Any,
) -> Draws:
    r"""Draw from the posterior by the no-U-turn sampler. This requires Pyro (``pip install "gmmkeops[bayes]"``).

    .. math:: \theta_s \sim p(\theta \mid x) \propto p(\theta) \prod_n \Bigl(\sum_k W_k\,
              \mathcal N(x_n;\, \mu_k, \Sigma_k)\Bigr)^{g_n}

    Trajectories practically never permute the components. If the prior is exchangeable, the components of each draw are
    therefore sorted; if not, and K is at most five, each draw is permuted at random according to the posterior probabilities
    of all permutations.

    Args:
        prior: Prior on the parameters; any continuous distributions.
        x: Points (N, D) or (N,), data units.
        draws: Number of draws to keep per chain.
        warmup: Number of initial steps per chain, in which step size and mass matrix are adapted. They are discarded.
        chains: Number of independent chains, which are run one after another.
        weights: Weight of each point (N,), or None.
        generator: Random number generator; by default one with a fixed seed, so that repeated calls give equal draws.
        backend: As for :func:`gmmkeops.reductions.logsumexp`.
        progress: Whether to show a progress bar; by default only in a terminal.
        **options: Further arguments of ``pyro.infer.NUTS``, such as ``target_accept_prob=0.95``.

    Returns:
        :class:`Draws`, with "divergences" and "acceptance" in its diagnostics.

    Raises:
        ModuleNotFoundError: Pyro is not installed.
        TypeError, ValueError: Invalid points.

    Warns:
        SamplingWarning: Trajectories diverged, so that the draws may be biased; or the chains have not converged.

    Example:
        >>> import torch, gmmkeops as gk
        >>> from torch.distributions import Normal
        >>> prior = gk.bayes.Prior(1, weights=torch.ones(1), means=Normal(0.0, 10.0), scales=1.0, covariance_type="diag")
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> g = torch.Generator().manual_seed(0)
        >>> found = gk.bayes.nuts(prior, x, draws=200, warmup=50, chains=1, generator=g)
        >>> found.mean("means").round(decimals=0).tolist()
        [[2.0]]
    """
    check_counts(draws=(draws, 1), warmup=(warmup, 1), chains=(chains, 1))
    try:
        from pyro.infer.mcmc import MCMC, NUTS
    except ModuleNotFoundError:
        raise ModuleNotFoundError('nuts requires Pyro; install it with pip install "gmmkeops[bayes]".') from None
    target = Target(prior, x, weights, backend=backend)

    def potential(places: dict[str, Tensor]) -> Tensor:
        try:
            value = -target.log_density(places["z"][None])[0]
        except ValueError:  # far from the mode a matrix may be numerically singular
            value = places["z"].sum() * torch.nan
        return torch.where(torch.isfinite(value), value, places["z"].sum() * 0 + 1e300)

    show = sys.stderr.isatty() if progress is None else progress
    places, divergences, accepted = [], 0, 0.0
    generator = as_generator(generator)
    for chain in range(chains):
        start = target.mode(target.start(generator, "kmeans" if chain == 0 else "kmeans++"))
        start = start + 0.1 * torch.randn(start.shape, generator=generator, dtype=torch.float64)
        seed = int(torch.randint(1 << 62, (1,), generator=generator))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            kernel = NUTS(potential_fn=potential, **options)
            level = logging.getLogger("pyro").level
            chain_run = MCMC(
                kernel, num_samples=draws, warmup_steps=warmup, initial_params={"z": start}, disable_progbar=not show
            )
            chain_run.run()
            logging.getLogger("pyro").setLevel(level)
        places.append(chain_run.get_samples()["z"])
        facts = chain_run.diagnostics()
        divergences += sum(len(steps) for steps in facts.get("divergences", {}).values())
        accepted += sum(facts.get("acceptance rate", {}).values()) / chains
    values = {name: value.detach() for name, value in prior.values(torch.cat(places))[0].items()}
    values, log_weights = _reordered(target, values, generator)
    if divergences:
        warn(
            f"{divergences} of {chains * draws} trajectories diverged, so the draws may be biased; pass "
            "target_accept_prob=0.95, or use a narrower prior.",
            SamplingWarning,
        )
    facts = {"divergences": float(divergences), "acceptance": accepted}
    found = Draws.of(prior, values, "NUTS", log_weights=log_weights, chains=chains, diagnostics=facts)
    return found.warn_unless_mixed()


def _reordered(target: Target, values: Values, generator: torch.Generator) -> tuple[Values, Tensor]:
    """Permute the components of each draw at random, and return the draws with their log-weights (S,).

    Trajectories practically never permute the components. A permutation is therefore drawn with its posterior probability, and
    the draw is weighted by the total posterior density of all permutations relative to its own.
    """
    orders, heights = target.orders(values)
    chosen = torch.multinomial(torch.softmax(heights, 0).T, 1, generator=generator)[:, 0]
    weights = torch.logsumexp(heights, 0) - heights[0]
    return target.prior.rearranged(values, orders[chosen]), torch.log_softmax(weights, 0)
