r"""Draws from a posterior of mixtures, however they were made: what they say, and how far to trust them.

.. math:: E[f(\theta) \mid x] \approx \sum_s w_s f(\theta_s), \qquad
          p(x^* \mid x) \approx \sum_s w_s\, p(x^* \mid \theta_s), \qquad
          P(k \mid x^*, x) \approx \sum_s w_s\, r_k(x^*; \theta_s)

Where the prior does not tell components from each other, neither does the posterior: each draw's components are then put
in the order of their means' first column (of their second where equal, and so on). References: Vehtari, Gelman, Simpson,
Carpenter and Bürkner 2021, *Rank-normalization, folding, and localization: an improved R̂*; Stephens 2000, *Dealing with
label switching in mixture models*, JRSS B 62.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import warn
from gmmkeops.bayes.sampling.prior import Prior, Values
from gmmkeops.data import as_points, categorical, generator_on
from gmmkeops.models import Mixture

__all__ = ["Draws", "SamplingWarning"]


class SamplingWarning(UserWarning):
    """Draws from a posterior are unreliable: weights have degenerated, trajectories diverged, or chains have not mixed.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> means = torch.distributions.Normal(0.0, 1000.0)
        >>> prior = gk.bayes.Prior(
        ...     2, weights=torch.tensor([0.5, 0.5]), means=means, scales=1.0, covariance_type="spherical"
        ... )
        >>> x = torch.tensor([-500.0, -501.0, 500.0, 499.0])
        >>> with pytest.warns(gk.bayes.SamplingWarning):
        ...     draws = gk.bayes.importance(prior, x, draws=100, proposal="prior")
    """


ORDERED = "components are in the order of their means' first column in every draw"

KEPT = "components keep the order that the prior gives them"

# Numbers that densities of some points under some draws may hold.
_CHUNK = 1 << 22

# Draws of a chain from which on its mixing is judged, the largest R̂ of chains that have met, and components up to which their
# own numbers are compared.
_LONG, _MIXED, _FEW = 100, 1.1, 5


@dataclass(frozen=True, repr=False)
class Draws:
    """Draws of mixtures from a posterior.

    Args:
        prior: What they began with.
        values: Parameters by name ("weights", "means" and the spread's name), each (S, ...), chains one after another.
        log_weights: Normalized log-weights (S,), nats.
        chains: Independent chains, of S / chains draws each.
        method: How they were drawn.
        occupied: How many components own a point in each draw (S,), where labels were drawn; or None.
        diagnostics: Numbers by name, such as "ess", "pareto_k", "divergences", "acceptance".
        rule: How labels that may switch were told from each other.

    Example:
        >>> import torch, gmmkeops as gk
        >>> means = torch.distributions.Normal(0.0, 10.0)
        >>> prior = gk.bayes.Prior(1, weights=torch.ones(1), means=means, scales=1.0, covariance_type="spherical")
        >>> x = torch.full((100,), 5.0)
        >>> draws = gk.bayes.gibbs(prior, x, draws=500, warmup=10, generator=torch.Generator().manual_seed(0), progress=False)
        >>> bool((draws.mean("means") - 5).abs() < 0.05), bool((draws.sd("means") - 0.1).abs() < 0.02)
        (True, True)
        >>> draws.interval("means", 0.9).shape, draws.log_prob(x[:3]).shape
        (torch.Size([2, 1, 1]), torch.Size([3]))
    """

    prior: Prior
    values: Values
    log_weights: Tensor
    chains: int
    method: str
    occupied: Tensor | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)
    rule: str = KEPT

    def __repr__(self) -> str:
        return (
            f"Draws({len(self.log_weights)} draws of {self.prior.components} components by {self.method}, "
            f"{self.chains} chains)"
        )

    @classmethod
    def of(
        cls,
        prior: Prior,
        values: Values,
        method: str,
        *,
        log_weights: Tensor | None = None,
        chains: int = 1,
        occupied: Tensor | None = None,
        diagnostics: dict[str, float] | None = None,
    ) -> Draws:
        """Draws whose labels are put in order where the prior leaves them open; equal weights unless given."""
        count = len(values["means"])
        if log_weights is None:
            log_weights = values["means"].new_full((count,), -math.log(count))
        if prior.exchangeable:
            values = prior.permuted(values, _order(values["means"]))
        rule = ORDERED if prior.exchangeable else KEPT
        return cls(prior, values, log_weights, chains, method, occupied, diagnostics or {}, rule)

    @property
    def weights(self) -> Tensor:
        """Weight of each draw (S,), summing to one."""
        return self.log_weights.exp()

    @property
    def mixtures(self) -> Mixture:
        """All draws, as a batch (S,) of mixtures."""
        return self.prior.mixtures(self.values)

    def expectation(self, function: Callable[[Mixture], Tensor]) -> Tensor:
        """Posterior mean of a function of the batch of mixtures, (S, ...) to (...)."""
        return torch.tensordot(self.weights, function(self.mixtures).to(self.weights), 1)

    def mean(self, name: str) -> Tensor:
        """Posterior mean of a parameter by name."""
        return torch.tensordot(self.weights, self.values[name], 1)

    def sd(self, name: str) -> Tensor:
        """Posterior standard deviation of a parameter by name."""
        away = (self.values[name] - self.mean(name)).square()
        return torch.tensordot(self.weights, away, 1).sqrt()

    def quantile(self, name: str, q: Any) -> Tensor:
        """Posterior quantiles of a parameter by name: (*Q, ...) for shares (*Q) in (0, 1)."""
        share = torch.as_tensor(q, dtype=torch.float64)
        values = self.values[name].flatten(1)
        order = values.argsort(0)
        below = self.weights[order].cumsum(0)
        rows = torch.searchsorted(below.T.contiguous(), share.reshape(-1).expand(values.shape[1], -1).contiguous())
        found = values.gather(0, order).gather(0, rows.T.clamp(max=len(values) - 1))
        return found.reshape(*share.shape, *self.values[name].shape[1:])

    def interval(self, name: str, share: float = 0.9) -> Tensor:
        """The central interval that holds so much of the posterior of a parameter: (2, ...)."""
        return self.quantile(name, [0.5 - share / 2, 0.5 + share / 2])

    def _over(self, x: Any, function: Callable[[Mixture, Tensor], Tensor], width: int) -> Tensor:
        """A function of some draws and some points, chunk by chunk over the points: (N, ...)."""
        x = torch.as_tensor(x)
        x = as_points(x[:, None] if x.ndim == 1 else x, features=self.prior.features).double()
        mixtures, size = self.mixtures.to(x.device), max(1, _CHUNK // (width * len(self.log_weights)))
        return torch.cat([function(mixtures, part) for part in x.split(size)])

    def log_prob(self, x: Any) -> Tensor:
        """Posterior predictive log-density of points (N, D) or (N,), nats."""

        def density(mixtures: Mixture, part: Tensor) -> Tensor:
            return torch.logsumexp(mixtures.log_prob(part[:, None, :]) + self.log_weights.to(part.device), 1)

        return self._over(x, density, self.prior.components * self.prior.features)

    def responsibilities(self, x: Any) -> Tensor:
        """Posterior probability of each point's component, parameters averaged out: (N, K)."""

        def shares(mixtures: Mixture, part: Tensor) -> Tensor:
            own = torch.softmax(mixtures.log_joint(part[:, None, :]), -1)
            return torch.einsum("s,nsk->nk", self.weights.to(own.device), own)

        return self._over(x, shares, self.prior.components * self.prior.features)

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws points from the posterior predictive distribution (count, D), data units.

        Without a generator torch's global one is used, as by all distributions of torch: two calls draw different points.
        """
        generator = generator_on(generator, self.weights.device)
        rows = categorical(self.weights, count, generator)
        chosen = self.prior.mixtures({name: value[rows] for name, value in self.values.items()})
        return chosen.sample(generator=generator)

    def components(self) -> Tensor:
        """Posterior of the number of occupied components: probabilities of 1 to K, (K,).

        With a Dirichlet process this number grows without end as points come in, also where the data have finitely many
        components: do not read it as their number (Miller and Harrison 2014, *Inconsistency of Pitman-Yor process mixtures
        for the number of components*, JMLR 15).

        Raises:
            ValueError: Labels were not drawn; only Gibbs sampling draws them.
        """
        if self.occupied is None:
            raise ValueError(f"{self.method} draws no labels, so no component is occupied; use gibbs.")
        counts = torch.zeros(self.prior.components, dtype=torch.float64)
        return counts.index_add(0, self.occupied.long() - 1, self.weights)

    def warn_unless_mixed(self) -> Draws:
        """Warns where chains tell different things of the mixture as a whole, or of a few components in order; returns itself.

        By split R̂ (Gelman et al. 2013, *Bayesian Data Analysis*, §11.4); :meth:`convergence` has the finer ones.
        """
        length = len(self.log_weights) // self.chains
        if self.chains < 2 or length < _LONG:
            return self
        mixtures = self.mixtures
        told = [mixtures.mean, mixtures.variance.log()]
        if self.prior.components <= _FEW:
            told += [self.values[site.name].flatten(1) for site in self.prior.sites if site.prior is not None]
        numbers = torch.cat(told, 1)
        half = length // 2
        parts = numbers.unflatten(0, (self.chains, length))[:, : 2 * half].reshape(2 * self.chains, half, -1)
        within, between = parts.var(1).mean(0), parts.mean(1).var(0)
        worst = float((1 + between / within.clamp(min=1e-300)).sqrt().max())
        if worst > _MIXED:
            warn(
                f"the chains of {self.method} have not met (split R̂ up to {worst:.2f}): they have not seen the whole "
                "posterior; draw longer, or narrow the prior.",
                SamplingWarning,
            )
        return self

    def arviz(self) -> Any:
        """The draws as ArviZ's ``InferenceData``: chains, draws, and a variable for each parameter that is not known.

        Raises:
            ModuleNotFoundError: ArviZ is not installed.
        """
        posterior = {
            site.name: self.values[site.name].unflatten(0, (self.chains, -1)).numpy()
            for site in self.prior.sites
            if site.prior is not None
        }
        return _arviz().from_dict(posterior)

    def convergence(self) -> dict[str, Tensor]:
        """R̂ and effective sample sizes by ArviZ: "rhat_means" and "ess_means" (K, D), and so on.

        Raises:
            ModuleNotFoundError: ArviZ is not installed.
        """
        arviz, data = _arviz(), self.arviz()
        found = {}
        for label, function in (("rhat", arviz.rhat), ("ess", arviz.ess)):
            for name, value in function(data).items():
                found[f"{label}_{name}"] = torch.as_tensor(value.values)
        return found

    def __str__(self) -> str:
        count = len(self.log_weights)
        lines = [f"{count} draws by {self.method}" + (f" in {self.chains} chains" if self.chains > 1 else "")]
        lines[0] += "".join(f", {name} {value:.4g}" for name, value in self.diagnostics.items()) + f"; {self.rule}"
        for site in self.prior.sites:
            if site.prior is None:
                continue
            mean, sd, (low, high) = self.mean(site.name), self.sd(site.name), self.interval(site.name)
            lines.append(f"{site.name:12s} {'mean':>10s} {'sd':>10s} {'5 %':>10s} {'95 %':>10s}")
            cells = zip(*(part.reshape(-1).tolist() for part in (mean, sd, low, high)), strict=True)
            places = [",".join(map(str, i)) for i in torch.ones(site.shape).nonzero().tolist()]
            lines += [
                f"  [{at}]".ljust(13) + " ".join(f"{cell:10.5g}" for cell in row)
                for at, row in zip(places, cells, strict=True)
            ]
        return "\n".join(lines)


def _arviz() -> Any:
    with warnings.catch_warnings():
        # Its announcements of versions to come.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _order(means: Tensor) -> Tensor:
    """The order (S, K) of means (S, K, D) by their first column, then their second, and so on."""
    order = torch.arange(means.shape[1]).expand(len(means), -1)
    for column in reversed(range(means.shape[2])):
        keys = means[:, :, column].gather(1, order)
        order = order.gather(1, keys.argsort(dim=1, stable=True))
    return order
