r"""The posterior of a mixture's parameters, the labels summed out by the reductions.

.. math:: \log p(\theta \mid x) = \log p(\theta) + \sum_n g_n \log \sum_k \pi_k\, \mathcal N(x_n; \mu_k, \Sigma_k) + \text{const}

Its mode and curvature there give the Laplace approximation. Reference: Tierney and Kadane 1986, *Accurate approximations
for posterior moments and marginal densities*, JASA 81.
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

# Points up to which all draws are looked at in one call; more fill the cores by themselves.
_FEW = 4096

# Steps of a difference quotient, in standard deviations of the prior's unbounded numbers.
_STEP = 1e-4

# Iterations of variational Bayes that make a start.
_STEPS = 50

# Components up to which every order of them is tried.
_ORDERS = 5


def check_counts(**counts: tuple[int, int]) -> None:
    """Raises where a count by name, with the least it may be, is no such integer."""
    for name, (value, least) in counts.items():
        as_integer(value, name, least)


class Target:
    """The posterior density that a prior and points lead to.

    Args:
        prior: Of the mixture.
        x: Points (N, D), data units; or (N,) for D = 1.
        weights: Weight of each point (N,), or None.
        backend, truncate: As for :func:`gmmkeops.reductions.logsumexp`.

    Raises:
        TypeError, ValueError: Bad points, or another number of columns than the prior's.
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
        """N."""
        return len(self.x)

    def log_likelihood(self, mixtures: Mixture) -> Tensor:
        """Σ g ℓ of each mixture of a batch (S,), nats; differentiable (once) in the parameters."""
        if self.rows <= _FEW:
            # The parameters are on the CPU, wherever the points are.
            logs = mixtures.to(self.x.device).log_prob(self.x.double()[:, None, :])
            return (logs.sum(0) if self.weights is None else self.weights @ logs).to(mixtures.means.device)
        return torch.stack([self.total(self.cloud, self.weights, mixture) for mixture in _each(mixtures)])

    def total(self, points: Any, weights: Tensor | None, mixture: Mixture) -> Tensor:
        """Σ g ℓ of some points, nats."""
        moved = mixture.to(self.x.device)
        arguments = (points, moved.offsets, moved.means, moved.factor)
        return reductions.total(*arguments, weights=weights, backend=self.backend, truncate=0).to(mixture.means.device)

    def log_density(self, z: Tensor) -> Tensor:
        """Log-density of unbounded numbers (S, size) but for a constant: (S,), nats; -inf where there is none."""
        values, logs = self.prior.values(z)
        return logs + self.log_likelihood(self.prior.mixtures(values))

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities (S,) and their gradients (S, size)."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            values = self.log_density(z)
            (gradient,) = torch.autograd.grad(values.sum(), z)
        return values.detach(), gradient

    def start(self, generator: torch.Generator | None = None, strategy: str = "kmeans") -> Tensor:
        """Unbounded numbers (1, size) of the data's clusters, or of a draw from the prior where those are impossible."""
        prior = self.prior
        covariance_type = prior.kind.type_name(prior.tied)
        options: Any = {"covariance_type": covariance_type, "generator": generator, "backend": self.backend}
        if self.rows >= prior.components:
            found = initialize(self.x, prior.components, strategy, sample_weight=self.weights, n_init=1, **options)
            sticks = prior.sites[0].prior
            if isinstance(sticks, StickBreaking):
                # k-means uses every component; variational Bayes leaves those unused that the data do not need.
                method = VariationalBayes(concentration=sticks.concentration, reg_covar=0.0, tol=0)
                settings: Any = {"sample_weight": self.weights, "backend": self.backend, "verbose": False}
                found = fit(found, self.x, method, max_iter=_STEPS, **settings).mixture
            z = prior.unbounded(prior.of_mixture(found.to("cpu")))
            if bool(torch.isfinite(z).all()) and bool(torch.isfinite(self.log_density(z)).all()):
                return self._placed(z)
        return prior.unbounded(prior.sample(1, generator))

    @torch.no_grad()
    def orders(self, values: Values) -> tuple[Tensor, Tensor]:
        """All orders of up to five components, and how the posterior likes parameters in each of them.

        Args:
            values: (S, ...).

        Returns:
            Orders (P, K) and log-posteriors (P, S) but for a constant of each draw; the order as it is alone where the prior
            tells no component from another, or where components are more.
        """
        prior, K, count = self.prior, self.prior.components, len(values["means"])
        if prior.exchangeable or K > _ORDERS:
            return torch.arange(K)[None], values["means"].new_zeros(1, count)
        orders = torch.tensor(list(permutations(range(K))))
        heights = []
        for order in orders:
            moved = prior.rearranged(values, order.expand(count, K))
            height = prior.log_prob(moved)
            # Where all that components are moves with them, the likelihood stays.
            if any(site.known is not None for site in prior.sites):
                height = height + self.log_likelihood(prior.mixtures(moved))
            heights.append(height.nan_to_num(nan=-torch.inf))
        return orders, torch.stack(heights)

    def _placed(self, z: Tensor) -> Tensor:
        """The same components (1, size) in the places where prior and known values like them best."""
        values, _ = self.prior.values(z)
        if self.prior.components > _ORDERS and not self.prior.exchangeable:
            order = values["weights"].argsort(dim=1, descending=True)
            return self.prior.unbounded(self.prior.rearranged(values, order))
        orders, heights = self.orders(values)
        return self.prior.unbounded(self.prior.rearranged(values, orders[heights[:, 0].argmax()][None]))

    def mode(self, starts: Tensor) -> Tensor:
        """The most probable of the modes (size,) that L-BFGS finds from some starts (S, size)."""
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
        """Minus the second derivatives (size, size) at a place, by central differences of gradients."""
        steps = _STEP * torch.eye(len(z), dtype=z.dtype)
        _, gradients = self.slopes(torch.cat([z + steps, z - steps]))
        hessian = (gradients[: len(z)] - gradients[len(z) :]) / (2 * _STEP)
        return -0.5 * (hessian + hessian.mT)

    def laplace(self, generator: torch.Generator | None = None, starts: int = 5) -> tuple[Tensor, Tensor]:
        """The mode (size,) and a lower-triangular root (size, size) of the covariance of a Gaussian like it there.

        Directions in which the density does not fall get the width of one unbounded unit.
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
