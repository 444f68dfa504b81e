r"""What is believed of a mixture before the data: torch distributions on its weights, means and spreads, or known values.

.. math:: p(\theta) = p(\pi)\, p(\mu)\, p(\text{spread})

Samplers that need it unbounded work with :math:`z = T^{-1}(\theta)` and the density :math:`p(T(z))\,|T'(z)|`. Reference:
Stan Development Team, *Stan Reference Manual*, constraint transforms.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, biject_to, constraints

from gmmkeops._checks import as_integer, as_number
from gmmkeops.bayes.variational.normal_wishart import stick_weights
from gmmkeops.components import Factor, as_tensor, check_finite, factor_class, gamma
from gmmkeops.data import generator_on
from gmmkeops.models import Mixture

__all__ = ["Prior", "StickBreaking", "Values"]

Values = dict[str, Tensor]

_SPREADS = ("scales", "covariances", "precisions")


class StickBreaking(Distribution):
    r"""Weights broken off a stick: a Dirichlet process, truncated at K components.

    .. math:: \pi_k = v_k \prod_{j<k} (1 - v_j), \qquad v_k \sim \mathrm{Beta}(1, \alpha), \qquad v_K = 1

    Args:
        concentration: α > 0: the larger, the more components share the weight.
        components: Number of components K.

    Reference:
        Ishwaran and James 2001, *Gibbs sampling methods for stick-breaking priors*, JASA 96.

    Example:
        >>> import torch, gmmkeops as gk
        >>> weights = gk.bayes.StickBreaking(1.0, 5).sample((1000,), generator=torch.Generator().manual_seed(0))
        >>> bool((weights.mean(0) - torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16])).abs().max() < 0.03)
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.simplex

    def __init__(self, concentration: float, components: int) -> None:
        self.concentration = as_number(concentration, "concentration", 0, above=True)
        super().__init__(torch.Size(), torch.Size([as_integer(components, "components", 1)]), validate_args=False)

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draws weights (*S, K); without a generator by torch's global one, as all distributions of torch do."""
        shape = (*torch.Size(sample_shape), *self.event_shape)
        generator = generator_on(generator, "cpu")
        a = gamma(torch.ones(shape, dtype=torch.float64), generator)
        b = gamma(torch.full(shape, self.concentration, dtype=torch.float64), generator)
        return stick_weights(a / (a + b))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of weights (*S, K) with respect to their first K - 1 entries, nats."""
        left = 1 - torch.cat([torch.zeros_like(value[..., :1]), value[..., :-1].cumsum(-1)], -1)
        left = left[..., : value.shape[-1]].clamp(min=1e-300)
        shares = (value / left)[..., :-1]
        logs = math.log(self.concentration) + (self.concentration - 1) * torch.log1p(-shares.clamp(max=1 - 1e-16))
        return (logs - left[..., :-1].log()).sum(-1)


class _PositiveDefinite:
    """Symmetric positive-definite matrices (..., D, D) from D(D+1)/2 numbers each: Cholesky factors with a log-diagonal."""

    def __init__(self, features: int) -> None:
        self.D = features
        self.row, self.column = torch.tril_indices(features, features)

    def inverse_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-2], len(self.row))

    def _root(self, z: Tensor) -> Tensor:
        L = z.new_zeros(*z.shape[:-1], self.D * self.D).index_copy(-1, self.row * self.D + self.column, z)
        L = L.unflatten(-1, (self.D, self.D))
        return L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).exp())

    def __call__(self, z: Tensor) -> Tensor:
        L = self._root(z)
        return L @ L.mT

    def inv(self, y: Tensor) -> Tensor:
        L = torch.linalg.cholesky(y)
        L = L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).log())
        return L[..., self.row, self.column]

    def log_abs_det_jacobian(self, z: Tensor, y: Tensor) -> Tensor:
        logs = z[..., self.row == self.column]
        powers = torch.arange(self.D + 1, 1, -1, dtype=z.dtype)
        return self.D * math.log(2) + (powers * logs).sum(-1)


@dataclass(frozen=True)
class _Site:
    """One of the parameters: known, or with a prior and the way from unbounded numbers to it."""

    name: str
    shape: tuple[int, ...]
    known: Tensor | None = None
    prior: Distribution | None = None
    transform: Any = None

    @property
    def size(self) -> int:
        """How many unbounded numbers it takes."""
        return 0 if self.prior is None else math.prod(self.transform.inverse_shape(self.shape))


class Prior:
    r"""A prior of mixtures.

    .. math:: W \sim p(W), \quad \mu_k \sim p(\mu_k), \quad \Sigma_k \sim p(\Sigma_k), \qquad
              x_n \sim \sum_k W_k\, \mathcal N(\mu_k, \Sigma_k)

    Each argument is a known value or a :class:`torch.distributions.Distribution`; one whose shape is smaller than the
    parameter's is the same for every component (or column). Give exactly one of ``scales``, ``covariances``,
    ``precisions``.

    Args:
        components: Number of components K.
        weights: On the simplex: a Dirichlet, :class:`StickBreaking`, or known weights (K,).
        means: On the means (K, D), data units.
        scales: On standard deviations: (K, 1) spherical, (K, D) diagonal; data units.
        covariances: On variances in those shapes, or on covariance matrices (K, D, D); squared data units.
        precisions: On their inverses.
        covariance_type: As for :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`; tied types have one spread.
        features: D; by default what the means' shape says, or 1.

    Raises:
        TypeError, ValueError: No prior where one is needed, an improper one, or shapes that do not fit.

    Example:
        >>> import torch, gmmkeops as gk
        >>> from torch.distributions import Dirichlet, Normal
        >>> prior = gk.bayes.Prior(
        ...     2, weights=Dirichlet(torch.ones(2)), means=Normal(400.0, 50.0), scales=2.0, covariance_type="spherical"
        ... )
        >>> prior.size, prior.exchangeable
        (3, True)
    """

    def __init__(
        self,
        components: int,
        *,
        weights: Any,
        means: Any,
        scales: Any = None,
        covariances: Any = None,
        precisions: Any = None,
        covariance_type: str = "full",
        features: int | None = None,
    ) -> None:
        K = as_integer(components, "components", 1)
        self.kind, self.tied = factor_class(covariance_type)
        given = {"scales": scales, "covariances": covariances, "precisions": precisions}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                f"give exactly one of scales, covariances and precisions, a prior or known values, got {named or 'none'}; "
                "without a proper prior there is no posterior."
            )
        self.spread = named[0]
        if self.spread == "scales" and self.kind.coupled:
            raise ValueError(
                "scales are of spherical or diagonal components; give covariances or precisions of full ones."
            )
        shape = _shape_of(means)
        D = as_integer(features, "features", 1) if features is not None else (shape[-1] if shape else 1)
        self.components, self.features = K, D
        leading = 1 if self.tied else K
        size = (leading, *(self.kind.spread_shape(D) or (1,)))
        spread = given[self.spread]
        if self.kind.isotropic and not isinstance(spread, Distribution):
            spread = as_tensor(spread, name=self.spread)
            spread = spread[:, None] if spread.ndim == 1 else spread
        self.sites = (
            _site("weights", weights, (K,)),
            _site("means", means, (K, D)),
            _site(self.spread, spread, size),
        )
        known = self.sites[0].known
        if known is not None and not (bool((known >= 0).all()) and abs(float(known.sum()) - 1) < 1e-6):
            raise ValueError(f"known weights must be not negative and sum to one, got {known.tolist()}.")
        if self.sites[2].known is not None:
            self._factor(self.sites[2].known)
        self.exchangeable = K > 1 and self._is_exchangeable()

    def __repr__(self) -> str:
        free = ", ".join(site.name for site in self.sites if site.prior is not None)
        return (
            f"Prior({self.components} {self.kind.type_name(self.tied)} components in {self.features} dimensions; "
            f"unknown: {free or 'nothing'})"
        )

    @property
    def size(self) -> int:
        """How many unbounded numbers a mixture is."""
        return sum(site.size for site in self.sites)

    def site(self, name: str) -> _Site:
        """One of the parameters by name."""
        return next(site for site in self.sites if site.name == name)

    def values(self, z: Tensor) -> tuple[Values, Tensor]:
        """Parameters from unbounded numbers.

        Args:
            z: (S, size).

        Returns:
            Values by name (S, ...), and the log-density of z under the prior (S,), nats.
        """
        found, logs, start = {}, z.new_zeros(len(z)), 0
        for site in self.sites:
            if site.prior is None:
                assert site.known is not None, "known or with a prior"
                found[site.name] = site.known.expand(len(z), *site.shape)
                continue
            part = z[:, start : start + site.size].reshape(len(z), *site.transform.inverse_shape(site.shape))
            start += site.size
            value = site.transform(part)
            jacobian = site.transform.log_abs_det_jacobian(part, value).reshape(len(z), -1).sum(1)
            found[site.name] = value
            logs = logs + site.prior.log_prob(value) + jacobian
        return found, logs

    def unbounded(self, values: Values) -> Tensor:
        """The numbers z (S, size) that lead to parameters."""
        parts = []
        for site in self.sites:
            if site.prior is not None:
                value = values[site.name]
                inverse = site.transform.inv(value)
                parts.append(inverse.reshape(len(value), -1))
        return torch.cat(parts, 1) if parts else next(iter(values.values())).new_zeros(1, 0)

    def mixtures(self, values: Values) -> Mixture:
        """The batch of mixtures (S,) of parameters."""
        logits = values["weights"].clamp(min=1e-300).log()
        return Mixture.from_valid(logits, values["means"], self._factor(values[self.spread]))

    def _factor(self, value: Tensor) -> Factor:
        if self.kind.coupled:
            of = self.kind.from_covariances if self.spread == "covariances" else self.kind.from_precisions
            return of(value)
        if not bool((value > 0).all()):
            raise ValueError(f"{self.spread} must be positive, got {float(value.min()):g}; pass numbers above zero.")
        power = {"scales": -1.0, "covariances": -0.5, "precisions": 0.5}[self.spread]
        logs = power * value.log()
        return self.kind.of({"log_diagonal": logs}, self.features)

    def of_mixture(self, mixture: Mixture) -> Values:
        """The parameters of one mixture (1, ...), known ones as they are known."""
        matrices = mixture.factor.covariances() if self.spread != "precisions" else mixture.factor.precisions()
        compact = self.kind.compact(matrices).reshape(self.sites[2].shape)
        spread = compact.sqrt() if self.spread == "scales" else compact
        found = {"weights": mixture.weights, "means": mixture.means, self.spread: spread}
        for site in self.sites:
            if site.known is not None:
                found[site.name] = site.known
        return {name: value.double()[None] for name, value in found.items()}

    def sample(self, count: int, generator: torch.Generator | None = None) -> Values:
        """Draws parameters: values by name (count, ...).

        Without a generator torch's global one is used, as by all distributions of torch: two calls draw different values.
        """
        found, generator = {}, generator_on(generator, "cpu")
        for site in self.sites:
            if site.prior is None:
                assert site.known is not None, "known or with a prior"
                found[site.name] = site.known.expand(count, *site.shape)
            else:
                found[site.name] = _drawn(site.prior, count, generator)
        return found

    def permuted(self, values: Values, order: Tensor) -> Values:
        """The parameters with their components in other orders (S, K)."""
        found = {}
        for name, value in values.items():
            if value.shape[1] != order.shape[1]:
                found[name] = value  # tied
                continue
            index = order.reshape(*order.shape, *[1] * (value.ndim - 2)).expand(*order.shape, *value.shape[2:])
            found[name] = value.gather(1, index)
        return found

    def rearranged(self, values: Values, order: Tensor) -> Values:
        """The same, but what is known of each component stays in its place."""
        stay = {site.name: values[site.name] for site in self.sites if site.known is not None}
        return self.permuted(values, order) | stay

    def log_prob(self, values: Values) -> Tensor:
        """Log-density of parameters (S,), nats; known ones do not count."""
        logs = values["means"].new_zeros(len(values["means"]))
        for site in self.sites:
            if site.prior is not None:
                logs = logs + site.prior.log_prob(values[site.name])
        return logs

    def _is_exchangeable(self) -> bool:
        """Whether no component is told from another before the data."""
        generator = torch.Generator().manual_seed(0)
        values = self.sample(3, generator)
        order = torch.arange(self.components).roll(1).expand(3, -1)
        moved = self.permuted(values, order)
        same = torch.allclose(self.log_prob(values), self.log_prob(moved), rtol=1e-9, atol=1e-9)
        return same and all(
            torch.allclose(values[site.name], moved[site.name]) for site in self.sites if site.known is not None
        )


def _shape_of(value: Any) -> tuple[int, ...]:
    if isinstance(value, Distribution):
        return (*value.batch_shape, *value.event_shape)
    return () if value is None else tuple(as_tensor(value, name="means").shape)


def _site(name: str, value: Any, shape: tuple[int, ...]) -> _Site:
    if value is None:
        raise ValueError(f"{name} need a prior or known values; without a proper prior there is no posterior.")
    if not isinstance(value, Distribution):
        known = as_tensor(value, name=name, dtype=torch.float64)
        check_finite(known.reshape(-1, 1), name=name, rows="entry")
        try:
            return _Site(name, shape, known=known.expand(shape).clone())
        except RuntimeError:
            raise ValueError(f"known {name} must fit the shape {shape}, got {tuple(known.shape)}.") from None
    value = _widened(value)
    own = len(value.event_shape)
    batch = shape[: len(shape) - own]
    try:
        if own > len(shape) or tuple(value.event_shape) != shape[len(shape) - own :]:
            raise RuntimeError
        wide = value if isinstance(value, StickBreaking) else value.expand(batch)
    except RuntimeError:
        raise ValueError(
            f"the prior of {name} must fit the shape {shape}, got batch shape {tuple(value.batch_shape)} and event shape "
            f"{tuple(value.event_shape)}."
        ) from None
    prior = Independent(wide, len(batch), validate_args=False) if batch else wide
    support = value.support
    if getattr(support, "is_discrete", False):
        raise ValueError(f"the prior of {name} must be continuous, got {type(value).__name__}.")
    matrices = len(shape) == 3
    transform: Any = _PositiveDefinite(shape[-1]) if matrices else biject_to(prior.support)
    site = _Site(name, shape, prior=prior, transform=transform)
    draws = _drawn(prior, 2, torch.Generator().manual_seed(0))
    if not (bool(torch.isfinite(draws).all()) and bool(torch.isfinite(prior.log_prob(draws)).all())):
        raise ValueError(f"the prior of {name} is improper: {value} has no density to draw from; narrow it.")
    return site


def _widened(prior: Distribution) -> Distribution:
    """The distribution with parameters in float64, where torch lets them be replaced."""
    wide = copy.copy(prior)
    for name, value in vars(prior).items():
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            setattr(wide, name, value.double())
        elif isinstance(value, Distribution):
            setattr(wide, name, _widened(value))
    return wide


def _drawn(prior: Distribution, count: int, generator: torch.Generator | None) -> Tensor:
    """Draws (count, ...), float64, by a generator, while torch's own state stays as it is."""
    if isinstance(prior, StickBreaking):
        return prior.sample((count,), generator=generator)
    seed = int(torch.randint(1 << 62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Wishart speaks of singular draws, and draws them again, where there are none.
        warnings.filterwarnings("ignore", message="Singular sample detected")
        torch.manual_seed(seed)
        return prior.sample(torch.Size([count])).double()
