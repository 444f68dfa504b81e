r"""Weighted draws from the posterior of a mixture's parameters, with summaries and convergence diagnostics.

.. math:: E[f(\theta) \mid x] \approx \sum_s w_s f(\theta_s), \qquad
          p(x^* \mid x) \approx \sum_s w_s\, p(x^* \mid \theta_s), \qquad
          P(k \mid x^*, x) \approx \sum_s w_s\, r_k(x^*; \theta_s)

If the prior is exchangeable in the components, so is the posterior (label switching). The components of each draw are then
sorted by the first coordinate of their means; ties are broken by the second coordinate, and so on. References: Vehtari,
Gelman, Simpson, Carpenter and Bürkner 2021, *Rank-normalization, folding, and localization: an improved R̂*; Stephens 2000,
*Dealing with label switching in mixture models*, JRSS B 62.
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
    """Warning of unreliable draws: degenerate weights, divergent trajectories, or chains that have not converged.

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


ORDERED = "components are sorted by the first coordinate of their means in every draw"

KEPT = "components are in the order defined by the prior"

# Maximum number of elements of the temporary array of densities.
_CHUNK = 1 << 22

# Convergence is checked for chains of at least _LONG draws: R̂ must not exceed _MIXED. The parameters of single components are
# checked for mixtures of at most _FEW components.
_LONG, _MIXED, _FEW = 100, 1.1, 5


@dataclass(frozen=True, repr=False)
class Draws:
    """Draws of mixtures from a posterior.

    Args:
        prior: Prior of the model.
        values: Tensors (S, ...) by parameter name: "weights", "means", and one of "scales", "covariances" and
            "precisions". The chains are concatenated along the first dimension.
        log_weights: Normalized log-weights of the draws (S,), nats.
        chains: Number of independent chains, of S / chains draws each.
        method: Name of the sampler.
        occupied: Number of components with at least one point, per draw (S,); None if the sampler draws no labels.
        diagnostics: Diagnostics by name, such as "ess", "pareto_k", "divergences", "acceptance".
        rule: Description of the order of the components within each draw.

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
        """Create draws, with sorted components if the prior is exchangeable; by default all draws have equal weight."""
        count = len(values["means"])
        if log_weights is None:
            log_weights = values["means"].new_full((count,), -math.log(count))
        if prior.exchangeable:
            values = prior.permuted(values, _order(values["means"]))
        rule = ORDERED if prior.exchangeable else KEPT
        return cls(prior, values, log_weights, chains, method, occupied, diagnostics or {}, rule)

    @property
    def weights(self) -> Tensor:
        """Weights of the draws (S,), which sum to one."""
        return self.log_weights.exp()

    @property
    def mixtures(self) -> Mixture:
        """Batch of mixtures with batch shape (S,), one per draw."""
        return self.prior.mixtures(self.values)

    def expectation(self, function: Callable[[Mixture], Tensor]) -> Tensor:
        """Compute the posterior mean (...) of a function that maps the batch of mixtures to a tensor (S, ...)."""
        return torch.tensordot(self.weights, function(self.mixtures).to(self.weights), 1)

    def mean(self, name: str) -> Tensor:
        """Compute the posterior mean of the named parameter, in its shape."""
        return torch.tensordot(self.weights, self.values[name], 1)

    def sd(self, name: str) -> Tensor:
        """Compute the posterior standard deviation of the named parameter, in its shape."""
        away = (self.values[name] - self.mean(name)).square()
        return torch.tensordot(self.weights, away, 1).sqrt()

    def quantile(self, name: str, q: Any) -> Tensor:
        r"""Compute posterior quantiles (\*Q, ...) of the named parameter for probabilities q (\*Q) in (0, 1)."""
        probabilities = torch.as_tensor(q, dtype=torch.float64)
        values = self.values[name].flatten(1)
        order = values.argsort(0)
        below = self.weights[order].cumsum(0)
        wanted = probabilities.reshape(-1).expand(values.shape[1], -1).contiguous()
        rows = torch.searchsorted(below.T.contiguous(), wanted)
        found = values.gather(0, order).gather(0, rows.T.clamp(max=len(values) - 1))
        return found.reshape(*probabilities.shape, *self.values[name].shape[1:])

    def interval(self, name: str, share: float = 0.9) -> Tensor:
        """Compute the central credible interval (2, ...) of the named parameter, with posterior probability ``share``."""
        return self.quantile(name, [0.5 - share / 2, 0.5 + share / 2])

    def _over(self, x: Any, function: Callable[[Mixture, Tensor], Tensor], width: int) -> Tensor:
        """Evaluate a function of all draws in chunks of points: (N, ...)."""
        x = torch.as_tensor(x)
        x = as_points(x[:, None] if x.ndim == 1 else x, features=self.prior.features).double()
        mixtures, size = self.mixtures.to(x.device), max(1, _CHUNK // (width * len(self.log_weights)))
        return torch.cat([function(mixtures, part) for part in x.split(size)])

    def log_prob(self, x: Any) -> Tensor:
        """Compute the posterior predictive log-density (N,) of points (N, D) or (N,), nats."""

        def density(mixtures: Mixture, part: Tensor) -> Tensor:
            return torch.logsumexp(mixtures.log_prob(part[:, None, :]) + self.log_weights.to(part.device), 1)

        return self._over(x, density, self.prior.components * self.prior.features)

    def responsibilities(self, x: Any) -> Tensor:
        """Compute component probabilities (N, K) of points (N, D) or (N,), averaged over the draws."""

        def shares(mixtures: Mixture, part: Tensor) -> Tensor:
            own = torch.softmax(mixtures.log_joint(part[:, None, :]), -1)
            return torch.einsum("s,nsk->nk", self.weights.to(own.device), own)

        return self._over(x, shares, self.prior.components * self.prior.features)

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw points (count, D) from the posterior predictive distribution; by default with torch's global generator."""
        generator = generator_on(generator, self.weights.device)
        rows = categorical(self.weights, count, generator)
        chosen = self.prior.mixtures({name: value[rows] for name, value in self.values.items()})
        return chosen.sample(generator=generator)

    def components(self) -> Tensor:
        """Compute the posterior probabilities (K,) that 1, ..., K components are occupied, that is, have at least one point.

        With a Dirichlet process prior the number of occupied components grows without bound with the number of points, even
        if the true number of components is finite. It is therefore not an estimate of the true number (Miller and Harrison
        2014, *Inconsistency of Pitman-Yor process mixtures for the number of components*, JMLR 15).

        Raises:
            ValueError: The draws contain no labels. Only Gibbs sampling draws labels.
        """
        if self.occupied is None:
            raise ValueError(f"{self.method} draws no labels, which components() requires; use gmmkeops.bayes.gibbs.")
        counts = torch.zeros(self.prior.components, dtype=torch.float64)
        return counts.index_add(0, self.occupied.long() - 1, self.weights)

    def warn_unless_mixed(self) -> Draws:
        """Warn if the chains have not converged, and return these draws.

        The criterion is split R̂ (Gelman et al. 2013, *Bayesian Data Analysis*, §11.4) of the mean and the variances of the
        mixture, and of all parameters for small K. :meth:`convergence` computes rank-normalized R̂ of every parameter.
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
                f"the chains of {self.method} have not converged (largest split R̂: {worst:.2f}, expected at most {_MIXED}); "
                "increase draws and warmup, or use a narrower prior.",
                SamplingWarning,
            )
        return self

    def arviz(self) -> Any:
        """Convert the draws to ArviZ's ``InferenceData``, with one variable (chain, draw, ...) per unknown parameter.

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
        """Compute R̂ and the effective sample sizes with ArviZ: "rhat_means" (K, D), "ess_means" (K, D), and so on.

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
        # ArviZ announces future versions by warnings at import.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _order(means: Tensor) -> Tensor:
    """Compute the lexicographic order (S, K) of the means (S, K, D) of each draw."""
    order = torch.arange(means.shape[1]).expand(len(means), -1)
    for column in reversed(range(means.shape[2])):
        keys = means[:, :, column].gather(1, order)
        order = order.gather(1, keys.argsort(dim=1, stable=True))
    return order
