r"""Conjugate prior and posterior of a mixture: Normal-Wishart components with Dirichlet or stick-breaking weights.

.. math::

    q(\mu_k, \Lambda_k) = \mathcal N(\mu_k;\, m_k, (\kappa_k \Lambda_k)^{-1})\; \mathcal W(\Lambda_k;\, W_k, \nu_k),
    \qquad q(\pi) = \mathrm{Dirichlet}(a) \;\text{ or }\; \pi_k = v_k \prod_{j<k} (1 - v_j),\; v_k \sim \mathrm{Beta}(a_k, b_k)

The natural parameters of the posterior are those of the prior plus the sufficient statistics of the data. Diagonal, spherical
and tied precisions follow scikit-learn's conventions. References: Bishop 2006, *Pattern Recognition and Machine Learning*,
§10.2; Blei and Jordan 2006, *Variational inference for Dirichlet process mixtures*, Bayesian Analysis 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gmmkeops._checks import FormerName
from gmmkeops.bayes.variational.student import StudentMixture
from gmmkeops.components import Factor, Moments, gamma
from gmmkeops.data import generator_on, running_sum
from gmmkeops.fitting import extrapolated, known
from gmmkeops.models import Mixture

__all__ = ["NormalWishart", "stick_weights"]

# Smallest eigenvalue of a covariance, as a fraction of its largest variance; smaller ones are rounding errors.
_FLOOR = 1e-28

# Smallest expected number of points in coordinates for extrapolation.
_FEWEST = 1e-12


@dataclass(frozen=True)
class NormalWishart:
    r"""Normal-Wishart distribution of the parameters of a mixture: a posterior or a prior.

    Args:
        mixture: Mixture with the expected weights, the means m (K, D), and precision factors U such that
            :math:`UU^\top = E\Lambda = \nu W`.
        concentration: Dirichlet parameters (K,), or Beta parameters (2, K) of the stick-breaking fractions.
        mean_precision: Precision κ (K,) of the means relative to that of the components.
        degrees: Degrees of freedom ν: (K,), or (1,) for tied precisions.
        prior: Prior from which this posterior was computed; None for a prior.

    Reference:
        Bishop 2006, *Pattern Recognition and Machine Learning*, section 10.2.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> result = gk.fit(gk.initialize(x, 2), x, gk.bayes.VariationalBayes(), max_iter=300)
        >>> result.posterior.predictive().log_prob(x).shape
        torch.Size([400])
    """

    mixture: Mixture
    concentration: Tensor
    mean_precision: Tensor
    degrees: Tensor
    prior: NormalWishart | None = None

    @classmethod
    def of(
        cls,
        kind: type[Factor],
        concentration: Tensor,
        mean_precision: Tensor,
        means: Tensor,
        degrees: Tensor,
        covariances: Tensor,
        prior: NormalWishart | None = None,
    ) -> NormalWishart:
        """Create a distribution from its parameters.

        Args:
            kind: Component family.
            concentration, mean_precision, degrees, prior: As for the class.
            means: Means m (K, D), data units.
            covariances: :math:`(\\nu W)^{-1}` in the shape of :attr:`covariances`, squared data units.
        """
        factor, _ = kind.nearest(covariances, means.shape[1], _FLOOR * kind.variances(covariances).amax(1))
        weights = _mean_weights(concentration)
        mixture = Mixture.from_valid(weights.clamp(min=1e-300).log(), means, factor)
        return cls(mixture, concentration, mean_precision, degrees, prior)

    @property
    def sticks(self) -> bool:
        """Whether the weights have a stick-breaking distribution."""
        return self.concentration.ndim == 2

    @property
    def covariances(self) -> Tensor:
        """(ν W)⁻¹: (K or 1, D, D) full, (K or 1, D) diagonal, (K or 1,) spherical; squared data units."""
        return self.mixture.factor.compact_covariances()

    def updated(self, sums: Moments, ridge: Tensor) -> NormalWishart:
        """Compute the posterior from this prior and the sufficient statistics of all points.

        Args:
            sums: Sufficient statistics about any centers.
            ridge: Constants added to the variances (D,), squared data units.
        """
        kind, K, D = type(self.mixture.factor), self.mixture.n_components, self.mixture.n_features
        own = sums.recenter(sums.means)
        n, spread = own.S0, own.S2
        column = (-1, *[1] * (spread.ndim - 1))
        kappa = self.mean_precision + n
        means = (self.mean_precision[:, None] * self.mixture.means + n[:, None] * own.centers) / kappa[:, None]
        away = kind.outer(own.centers - self.mixture.means)
        spread = kind.mean_scatter(spread + (self.mean_precision * n / kappa).reshape(column) * away, D)
        spread = spread + n.reshape(column) * kind.compact(torch.diag(ridge))
        if len(self.degrees) == 1:
            n, spread = n.sum(0, keepdim=True) / K, spread.sum(0, keepdim=True) / K
        degrees = self.degrees + n
        scatter = self.degrees.reshape(column) * self.covariances + spread
        return NormalWishart.of(
            kind, self._counted(own.S0), kappa, means, degrees, scatter / degrees.reshape(column), prior=self
        )

    def _counted(self, n: Tensor) -> Tensor:
        """Update the parameters of the weights by n (K,) points per component."""
        if not self.sticks:
            return self.concentration + n
        after = running_sum(n.flip(0)).flip(0) - n
        return self.concentration + torch.stack([n, after.clamp(min=0)])

    def expected_log_weights(self) -> Tensor:
        """Compute E log π (K,), nats."""
        if not self.sticks:
            return torch.digamma(self.concentration) - torch.digamma(self.concentration.sum())
        a, b = torch.digamma(self.concentration) - torch.digamma(self.concentration.sum(0))
        return a + torch.cat([b.new_zeros(1), running_sum(b[:-1])])

    def expected_log_determinants(self) -> Tensor:
        """Compute E log |Λ| (K or 1,), nats."""
        D = self.mixture.n_features
        return (
            2 * self.mixture.factor.log_determinant()
            + D * (2 / self.degrees).log()
            + torch.digamma(0.5 * self._ladder(self.degrees, D)).sum(-1)
        )

    @staticmethod
    def _ladder(degrees: Tensor, D: int) -> Tensor:
        return degrees[:, None] - torch.arange(D, dtype=degrees.dtype, device=degrees.device)

    @property
    def offsets(self) -> Tensor:
        """Offsets (K,) with which the exponents of the reductions are the expected log-joint densities, nats."""
        D = self.mixture.n_features
        inner = self.expected_log_determinants() - D / self.mean_precision - D * math.log(2 * math.pi)
        return self.expected_log_weights() + 0.5 * inner

    def expectation(self) -> tuple[Mixture, float]:
        """Return a mixture whose log-joint densities equal the expected ones up to a constant, and that constant in nats."""
        D = self.mixture.n_features
        logits = self.offsets - self.mixture.factor.log_determinant()
        mixture = Mixture(logits, self.mixture.means, self.mixture.factor, validate_args=False).named(
            self.mixture.columns
        )
        return mixture, float(torch.logsumexp(logits, 0)) + 0.5 * D * math.log(2 * math.pi)

    normaliser = FormerName("normalizer")

    def normalizer(self) -> Tensor:
        """Compute the log-normalizer (log-partition function) of the density, nats."""
        D, tied = self.mixture.n_features, len(self.degrees) == 1 and self.mixture.n_components > 1
        nu = self.degrees
        roots = self.mixture.factor.log_determinant() - 0.5 * D * nu.log()
        wishart = nu * roots + 0.5 * nu * D * math.log(2) + torch.lgamma(0.5 * self._ladder(nu, D)).sum(-1)
        a = self.concentration
        weights = (torch.lgamma(a).sum(0) - torch.lgamma(a.sum(0))).sum()
        copies = self.mixture.n_components if tied else 1
        return copies * wishart.sum() + weights - 0.5 * D * self.mean_precision.log().sum()

    def divergence(self) -> Tensor:
        """Compute the Kullback-Leibler divergence of this posterior from its prior, nats."""
        if self.prior is None:
            return self.concentration.new_zeros(())
        prior, D, K = self.prior, self.mixture.n_features, self.mixture.n_components
        n = self.mean_precision - prior.mean_precision
        if self.sticks:
            logs = torch.digamma(self.concentration) - torch.digamma(self.concentration.sum(0))
        else:
            logs = self.expected_log_weights()
        weights = ((self.concentration - prior.concentration) * logs).sum()
        column = (-1, *[1] * (self.covariances.ndim - 1))
        kind = type(self.mixture.factor)
        pull = kind.mean_scatter(kind.outer(self.mixture.means - prior.mixture.means), D)
        pull = prior.mean_precision.reshape(column) * pull
        grown = self.degrees.reshape(column) * self.covariances - prior.degrees.reshape(column) * prior.covariances
        tied = len(self.degrees) == 1
        about = K * grown - pull.sum(0, keepdim=True) if tied else grown - pull
        squares = self.mixture.factor.trace(about)
        logdets = (n * self.expected_log_determinants()).sum() - (n * D / self.mean_precision).sum()
        return weights + 0.5 * logdets - 0.5 * squares - self.normalizer() + prior.normalizer()

    def energy(self, sums: Moments) -> Tensor:
        """Compute the expected log-joint density of points and labels with the given sufficient statistics, nats."""
        about = sums.recenter(self.mixture.means)
        factor = self.mixture.factor
        S2 = factor.mean_scatter(about.S2, self.mixture.n_features)
        S2 = S2.sum(0, keepdim=True) if factor.leading == 1 else S2
        return (self.offsets * about.S0).sum() - 0.5 * factor.trace(S2)

    def bound(self, sums: Moments, ridge: Tensor) -> tuple[NormalWishart, Tensor]:
        """Compute the next posterior and its evidence lower bound.

        Args:
            sums: Sufficient statistics of the responsibilities of this posterior.
            ridge: As for :meth:`updated`.

        Returns:
            The next posterior, and the evidence lower bound for it and these responsibilities, nats.
        """
        assert self.prior is not None, "a prior has no bound"
        entropy = sums.total - self.energy(sums)
        new = self.prior.updated(sums, ridge)
        constant = 0.5 * self.mixture.n_features * math.log(2 * math.pi) * sums.mass
        return new, entropy + new.normalizer() - self.prior.normalizer() - constant

    @classmethod
    def extrapolated(cls, before: NormalWishart, first: NormalWishart, second: NormalWishart) -> NormalWishart | None:
        """Extrapolate from a posterior and the results of two steps by SQUAREM; None if that is impossible.

        Args:
            before, first, second: Posteriors of the same prior. The coordinates are the logarithms of the expected numbers of
                points, the means, and the precision factors.
        """
        prior = second.prior
        assert prior is not None, "posteriors have priors"

        def counted(q: NormalWishart) -> Mixture:
            n = (q.mean_precision - prior.mean_precision).clamp(min=_FEWEST)
            return Mixture(n.log(), q.mixture.means, q.mixture.factor, validate_args=False)

        leap = extrapolated(counted(before), counted(first), counted(second))
        if leap is None:
            return None
        total = (second.mean_precision - prior.mean_precision).sum()
        n = torch.softmax(leap.logits, 0) * total
        pooled = n.sum(0, keepdim=True) / len(n) if len(prior.degrees) == 1 else n
        # The expectation of the precisions is that of the factors, whatever the degrees of freedom are.
        concentration = prior._counted(n)
        logits = _mean_weights(concentration).clamp(min=1e-300).log()
        mixture = Mixture(logits, leap.means, leap.factor, validate_args=False)
        return cls(mixture, concentration, prior.mean_precision + n, prior.degrees + pooled, prior)

    carried = FormerName("mapped")

    def mapped(self, way: Callable[[Mixture], Mixture]) -> NormalWishart:
        """Transform the distribution to other coordinates by a function that transforms a mixture."""
        prior = None if self.prior is None else self.prior.mapped(way)
        return replace(self, mixture=way(self.mixture), prior=prior)

    def to(self, device: torch.device) -> NormalWishart:
        """Copy the distribution to a device."""
        if self.mixture.means.device == device:
            return self
        concentration, kappa, degrees = (
            part.to(device) for part in (self.concentration, self.mean_precision, self.degrees)
        )
        prior = None if self.prior is None else self.prior.to(device)
        return NormalWishart(self.mixture.to(device), concentration, kappa, degrees, prior)

    def predictive(self) -> StudentMixture:
        r"""Return the posterior predictive distribution, a mixture of Student's t distributions.

        .. math:: t_{\nu+1-D}\!\left(m_k,\; \frac{\kappa_k+1}{\kappa_k (\nu_k+1-D)} W_k^{-1}\right)

        For diagonal precisions each component is a product of univariate distributions. Reference: Bishop 2006, eq. 10.81.
        """
        D, K = self.mixture.n_features, self.mixture.n_components
        factor = self.mixture.factor
        nu = self.degrees * (K if len(self.degrees) == 1 else 1)
        # U Uᵀ = ν W also holds for tied components, whose degrees of freedom add up.
        degrees, share = factor.student(nu, D)
        share = share * self.mean_precision / (self.mean_precision + 1)
        factor = factor.replace(**{name: tensor.expand(K, -1) for name, tensor in factor.tensors.items()})
        found = StudentMixture(self.mixture.logits, self.mixture.means, factor.scaled(share.sqrt()), degrees.expand(K))
        found.columns = self.mixture.columns
        return found

    def sample(self, count: int, generator: torch.Generator | None = None) -> Mixture:
        """Draw a batch of mixtures with batch shape (count,). Without a generator, torch's global one is used."""
        K, D, factor = self.mixture.n_components, self.mixture.n_features, self.mixture.factor
        generator = generator_on(generator, self.concentration.device)
        a = self.concentration.expand(count, *self.concentration.shape)
        draws = gamma(a, generator)
        if self.sticks:
            weights = stick_weights(draws[:, 0] / draws.sum(1))
        else:
            weights = draws / draws.sum(-1, keepdim=True)
        copies = K if factor.leading == 1 else 1
        nu = (self.degrees * copies).expand(count, -1)
        drawn = factor.wishart(nu, generator)
        noise = torch.randn(count, K, D, generator=generator, dtype=torch.float64, device=a.device)
        noise = noise / self.mean_precision.sqrt()[:, None]
        means = self.mixture.means + drawn.unwhiten_all(noise)
        mixture = Mixture.from_valid(weights.clamp(min=1e-300).log(), means, drawn)
        return mixture.named(self.mixture.columns)


known("NormalWishart")(NormalWishart)


def _mean_weights(concentration: Tensor) -> Tensor:
    if concentration.ndim == 1:
        return concentration / concentration.sum()
    weights = stick_weights(concentration[0] / concentration.sum(0), last=False)
    return weights / weights.sum()


def stick_weights(sticks: Tensor, *, last: bool = True) -> Tensor:
    """Convert stick-breaking fractions (..., K) to weights (..., K); with ``last`` the last fraction is set to one."""
    left = torch.cat([torch.ones_like(sticks[..., :1]), (1 - sticks[..., :-1]).cumprod(-1)], -1)
    return torch.cat([sticks[..., :-1] * left[..., :-1], left[..., -1:]], -1) if last else sticks * left
