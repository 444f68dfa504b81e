r"""Posterior density of a mixture's parameters, with the labels marginalized out.

.. math:: \log p(\theta \mid x) = \log p(\theta) + \sum_n g_n \log \sum_k \pi_k\, \mathcal N(x_n; \mu_k, \Sigma_k) + \text{const}

The Laplace approximation is the Gaussian at the posterior mode whose precision is the negative Hessian there. Reference:
Tierney and Kadane 1986, *Accurate approximations for posterior moments and marginal densities*, JASA 81.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops._checks import as_choice, as_integer
from gmmkeops.bayes.sampling.prior import Prior, StickBreaking, Values
from gmmkeops.bayes.variational.method import VariationalBayes
from gmmkeops.components import as_tensor
from gmmkeops.data import as_points, as_weights
from gmmkeops.fitting import fit, initialize
from gmmkeops.models import Mixture
from gmmkeops.reductions import recordable

__all__ = ["Target", "check_counts"]

# Up to this number of points all draws are evaluated in one call; with more, one draw already uses all cores.
_FEW = 4096

# Step of the central differences, in unconstrained coordinates.
_STEP = 1e-4

# Iterations of variational Bayes in the initialization.
_STEPS = 50

# Maximum number of components for which all permutations are evaluated.
_ORDERS = 5


def check_counts(**counts: tuple[int, int]) -> None:
    """Raise an error unless every argument is an integer of at least its minimum; each is given as (value, minimum)."""
    for name, (value, least) in counts.items():
        as_integer(value, name, least)


class Target:
    """Posterior density of the parameters given points, as a function of unconstrained coordinates.

    Args:
        prior: Prior on the parameters.
        x: Points (N, D), data units; or (N,) for D = 1.
        weights: Weight of each point (N,), or None.
        backend, truncate: As for :func:`gmmkeops.reductions.logsumexp`.

    Raises:
        TypeError, ValueError: Invalid points, or a number of columns that differs from the prior's.
    """

    def __init__(
        self, prior: Prior, x: Any, weights: Any = None, *, backend: str = "auto", truncate: float | None = None
    ) -> None:
        x = as_tensor(x, name="x")
        if not isinstance(prior, Prior):
            raise TypeError(f"prior must be a Prior, got {type(prior).__name__}; make one with gmmkeops.bayes.Prior.")
        self.prior, self.backend = prior, as_choice(backend, "backend", reductions.BACKENDS)
        self.x = recordable(as_points(x[:, None] if x.ndim == 1 else x, features=prior.features))
        g = as_weights(weights, self.x)
        self.weights = None if g is None else recordable(g)
        self.cloud = reductions.arrange(self.x, prior.components, truncate, sweeps=1000)

    @property
    def rows(self) -> int:
        """Number of points N."""
        return len(self.x)

    def log_likelihood(self, mixtures: Mixture) -> Tensor:
        """Compute the weighted log-likelihood (S,) of each mixture of a batch, nats; once differentiable in the parameters."""
        if self.rows <= _FEW:
            # The parameters are on the CPU; the points may be on another device.
            logs = mixtures.to(self.x.device).log_prob(self.x.double()[:, None, :])
            return (logs.sum(0) if self.weights is None else self.weights @ logs).to(mixtures.means.device)
        return torch.stack([self.total(self.cloud, self.weights, mixture) for mixture in _each(mixtures)])

    def total(self, points: Any, weights: Tensor | None, mixture: Mixture) -> Tensor:
        """Compute the weighted log-likelihood of a mixture for the given points, nats."""
        moved = mixture.to(self.x.device)
        arguments = (points, moved.offsets, moved.means, moved.factor)
        return reductions.total(*arguments, weights=weights, backend=self.backend, truncate=0).to(mixture.means.device)

    def log_density(self, z: Tensor) -> Tensor:
        """Compute the unnormalized log-density (S,) at unconstrained coordinates z (S, size), nats."""
        values, logs = self.prior.values(z)
        return logs + self.log_likelihood(self.prior.mixtures(values))

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log-densities (S,) and their gradients (S, size) at unconstrained coordinates z (S, size)."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            values = self.log_density(z)
            (gradient,) = torch.autograd.grad(values.sum(), z)
        return values.detach(), gradient

    def start(self, generator: torch.Generator | None = None, strategy: str = "kmeans") -> Tensor:
        """Compute an initial point (1, size) from clusters of the data, or draw it from the prior if its density is zero."""
        prior = self.prior
        covariance_type = prior.kind.type_name(prior.tied)
        options: Any = {"covariance_type": covariance_type, "generator": generator, "backend": self.backend}
        if self.rows >= prior.components:
            found = initialize(self.x, prior.components, strategy, sample_weight=self.weights, n_init=1, **options)
            sticks = prior.sites[0].prior
            if isinstance(sticks, StickBreaking):
                # k-means uses every component; variational Bayes empties superfluous ones, as the prior requires.
                method = VariationalBayes(concentration=sticks.concentration, reg_covar=0.0, tol=0)
                settings: Any = {"sample_weight": self.weights, "backend": self.backend, "verbose": False}
                found = fit(found, self.x, method, max_iter=_STEPS, **settings).mixture
            z = prior.unbounded(prior.of_mixture(found.to("cpu")))
            if bool(torch.isfinite(z).all()) and bool(torch.isfinite(self.log_density(z)).all()):
                return self._placed(z)
        return prior.unbounded(prior.sample(1, generator))

    @torch.no_grad()
    def orders(self, values: Values) -> tuple[Tensor, Tensor]:
        """Evaluate the posterior for all permutations of the components.

        Args:
            values: Parameters (S, ...) by name.

        Returns:
            Permutations (P, K), and log-posteriors (P, S) up to one constant per draw. If the prior is exchangeable or there
            are more than five components, the only permutation is the identity.
        """
        prior, K, count = self.prior, self.prior.components, len(values["means"])
        if prior.exchangeable or K > _ORDERS:
            return torch.arange(K)[None], values["means"].new_zeros(1, count)
        orders = torch.tensor(list(permutations(range(K))))
        heights = []
        for order in orders:
            moved = prior.rearranged(values, order.expand(count, K))
            height = prior.log_prob(moved)
            # The likelihood changes only if known values stay in place.
            if any(site.known is not None for site in prior.sites):
                height = height + self.log_likelihood(prior.mixtures(moved))
            heights.append(height.nan_to_num(nan=-torch.inf))
        return orders, torch.stack(heights)

    def _placed(self, z: Tensor) -> Tensor:
        """Permute the components of z (1, size) to maximize the posterior; many components are sorted by weight."""
        values, _ = self.prior.values(z)
        if self.prior.components > _ORDERS and not self.prior.exchangeable:
            order = values["weights"].argsort(dim=1, descending=True)
            return self.prior.unbounded(self.prior.rearranged(values, order))
        orders, heights = self.orders(values)
        return self.prior.unbounded(self.prior.rearranged(values, orders[heights[:, 0].argmax()][None]))

    def mode(self, starts: Tensor) -> Tensor:
        """Find the posterior mode (size,) by L-BFGS from several initial points (S, size); the best result is returned."""
        best, height = starts[0], -torch.inf
        for start in starts:
            z = start.detach().clone().requires_grad_()
            optimizer = torch.optim.LBFGS([z], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

            def closure() -> float:
                value, gradient = self.slopes(z[None])  # noqa: B023
                z.grad = -gradient[0].nan_to_num()  # noqa: B023
                return -float(value.nan_to_num(nan=-1e300))

            optimizer.step(closure)
            value = float(self.slopes(z[None])[0])
            if value > height:
                best, height = z.detach(), value
        return best

    def curvature(self, z: Tensor) -> Tensor:
        """Compute the negative Hessian (size, size) of the log-density at z (size,), by central differences of gradients."""
        steps = _STEP * torch.eye(len(z), dtype=z.dtype)
        _, gradients = self.slopes(torch.cat([z + steps, z - steps]))
        hessian = (gradients[: len(z)] - gradients[len(z) :]) / (2 * _STEP)
        return -0.5 * (hessian + hessian.mT)

    def laplace(self, generator: torch.Generator | None = None, starts: int = 5) -> tuple[Tensor, Tensor]:
        """Compute the Laplace approximation: mode (size,) and lower Cholesky factor (size, size) of the covariance.

        Directions in which the log-density is not concave at the mode get unit variance.
        """
        places = [self.start(generator)]
        places += [self.start(generator, "kmeans++") for _ in range(starts - 1)]
        mode = self.mode(torch.cat(places))
        values, vectors = torch.linalg.eigh(self.curvature(mode))
        covariance = (vectors / torch.where(values > 1e-9, values, torch.ones_like(values))) @ vectors.mT
        return mode, torch.linalg.cholesky(0.5 * (covariance + covariance.mT))


def _each(mixtures: Mixture) -> list[Mixture]:
    factor = mixtures.factor
    return [
        Mixture(
            mixtures.logits[s],
            mixtures.means[s],
            factor.replace(**{name: tensor[s] for name, tensor in factor.tensors.items()}),
            validate_args=False,
        )
        for s in range(mixtures.batch_shape.numel())
    ]
