r"""Prior distributions on the parameters of a mixture.

Samplers on unconstrained parameters use :math:`z = T^{-1}(\theta)`, whose density is :math:`p(T(z))\,|\det T'(z)|`.
Reference: Stan Development Team, *Stan Reference Manual*, constraint transforms.
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
    r"""Stick-breaking prior on the weights: a Dirichlet process truncated at K components.

    .. math:: \pi_k = v_k \prod_{j<k} (1 - v_j), \qquad v_k \sim \mathrm{Beta}(1, \alpha), \qquad v_K = 1

    Args:
        concentration: Concentration α > 0. Larger values spread the weight over more components.
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
        r"""Draw weights (\*S, K). Without a generator, torch's global random number generator is used."""
        shape = (*torch.Size(sample_shape), *self.event_shape)
        generator = generator_on(generator, "cpu")
        a = gamma(torch.ones(shape, dtype=torch.float64), generator)
        b = gamma(torch.full(shape, self.concentration, dtype=torch.float64), generator)
        return stick_weights(a / (a + b))

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Compute the log-density (\*S) of weights (\*S, K) with respect to their first K - 1 entries, nats."""
        left = 1 - torch.cat([torch.zeros_like(value[..., :1]), value[..., :-1].cumsum(-1)], -1)
        left = left[..., : value.shape[-1]].clamp(min=1e-300)
        shares = (value / left)[..., :-1]
        logs = math.log(self.concentration) + (self.concentration - 1) * torch.log1p(-shares.clamp(max=1 - 1e-16))
        return (logs - left[..., :-1].log()).sum(-1)


class _PositiveDefinite:
    """Bijection from the entries of a Cholesky factor, with log-diagonal, to positive-definite matrices (..., D, D)."""

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
    """One parameter: a known value, or a prior and the transform from unconstrained numbers to the parameter."""

    name: str
    shape: tuple[int, ...]
    known: Tensor | None = None
    prior: Distribution | None = None
    transform: Any = None

    @property
    def size(self) -> int:
        """Number of unconstrained numbers that parameterize it."""
        return 0 if self.prior is None else math.prod(self.transform.inverse_shape(self.shape))


class Prior:
    r"""Prior on the parameters of a Gaussian mixture, independent across weights, means and covariances.

    .. math:: W \sim p(W), \quad \mu_k \sim p(\mu_k), \quad \Sigma_k \sim p(\Sigma_k), \qquad
              x_n \sim \sum_k W_k\, \mathcal N(\mu_k, \Sigma_k)

    Each of the following arguments is a :class:`torch.distributions.Distribution` or a known value (a tensor or a number). A
    smaller shape is broadcast over components and features. Exactly one of ``scales``, ``covariances`` and ``precisions``
    is required.

    Args:
        components: Number of components K.
        weights: Prior on the weights (K,): a Dirichlet or a :class:`StickBreaking`; or known weights.
        means: Prior on the means (K, D), data units; or known means.
        scales: Prior on the standard deviations, (K, 1) for spherical and (K, D) for diagonal covariances, data units.
        covariances: Prior on the variances in these shapes, or on the covariance matrices (K, D, D), squared data units.
        precisions: Prior on the inverses of the variances or covariance matrices, in the same shapes.
        covariance_type: As in :meth:`Mixture.from_parameters <gmmkeops.Mixture.from_parameters>`. Tied types have a leading
            dimension of 1 in place of K.
        features: Number of features D; by default the last dimension of ``means``, or 1.

    Raises:
        TypeError, ValueError: A required prior is missing, a prior is improper, or shapes do not match.

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
                f"expected exactly one of scales, covariances and precisions, got {named or 'none'}; pass a proper prior or "
                "known values for one of them."
            )
        self.spread = named[0]
        if self.spread == "scales" and self.kind.coupled:
            raise ValueError(
                "scales require covariance_type 'diag' or 'spherical'; pass covariances or precisions for full matrices."
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
            raise ValueError(f"known weights must be nonnegative and sum to one, got {known.tolist()}; normalize them.")
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
        """Number of unconstrained numbers that parameterize a mixture."""
        return sum(site.size for site in self.sites)

    def site(self, name: str) -> _Site:
        """Return the named parameter."""
        return next(site for site in self.sites if site.name == name)

    def values(self, z: Tensor) -> tuple[Values, Tensor]:
        """Transform unconstrained numbers to parameters.

        Args:
            z: Unconstrained numbers (S, size).

        Returns:
            Parameters (S, ...) by name, and the log-density of z under the prior (S,), nats.
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
        """Transform parameters (S, ...) to unconstrained numbers (S, size)."""
        parts = []
        for site in self.sites:
            if site.prior is not None:
                value = values[site.name]
                inverse = site.transform.inv(value)
                parts.append(inverse.reshape(len(value), -1))
        return torch.cat(parts, 1) if parts else next(iter(values.values())).new_zeros(1, 0)

    def mixtures(self, values: Values) -> Mixture:
        """Build a batch of mixtures, with batch shape (S,), from parameters."""
        logits = values["weights"].clamp(min=1e-300).log()
        return Mixture.from_valid(logits, values["means"], self._factor(values[self.spread]))

    def _factor(self, value: Tensor) -> Factor:
        if self.kind.coupled:
            of = self.kind.from_covariances if self.spread == "covariances" else self.kind.from_precisions
            return of(value)
        if not bool((value > 0).all()):
            raise ValueError(f"{self.spread} must be positive, got {float(value.min()):g}; pass values above zero.")
        power = {"scales": -1.0, "covariances": -0.5, "precisions": 0.5}[self.spread]
        logs = power * value.log()
        return self.kind.of({"log_diagonal": logs}, self.features)

    def of_mixture(self, mixture: Mixture) -> Values:
        """Return the parameters (1, ...) of a mixture, with the known values in place of its own."""
        matrices = mixture.factor.covariances() if self.spread != "precisions" else mixture.factor.precisions()
        compact = self.kind.compact(matrices).reshape(self.sites[2].shape)
        spread = compact.sqrt() if self.spread == "scales" else compact
        found = {"weights": mixture.weights, "means": mixture.means, self.spread: spread}
        for site in self.sites:
            if site.known is not None:
                found[site.name] = site.known
        return {name: value.double()[None] for name, value in found.items()}

    def sample(self, count: int, generator: torch.Generator | None = None) -> Values:
        """Draw parameters (count, ...) by name. Without a generator, torch's global random number generator is used."""
        found, generator = {}, generator_on(generator, "cpu")
        for site in self.sites:
            if site.prior is None:
                assert site.known is not None, "known or with a prior"
                found[site.name] = site.known.expand(count, *site.shape)
            else:
                found[site.name] = _drawn(site.prior, count, generator)
        return found

    def permuted(self, values: Values, order: Tensor) -> Values:
        """Reorder the components of each draw by permutations (S, K)."""
        found = {}
        for name, value in values.items():
            if value.shape[1] != order.shape[1]:
                found[name] = value  # shared by all components
                continue
            index = order.reshape(*order.shape, *[1] * (value.ndim - 2)).expand(*order.shape, *value.shape[2:])
            found[name] = value.gather(1, index)
        return found

    def rearranged(self, values: Values, order: Tensor) -> Values:
        """Reorder the unknown parameters of the components by permutations (S, K); known values are not moved."""
        stay = {site.name: values[site.name] for site in self.sites if site.known is not None}
        return self.permuted(values, order) | stay

    def log_prob(self, values: Values) -> Tensor:
        """Compute the log-density (S,) of the unknown parameters, nats."""
        logs = values["means"].new_zeros(len(values["means"]))
        for site in self.sites:
            if site.prior is not None:
                logs = logs + site.prior.log_prob(values[site.name])
        return logs

    def _is_exchangeable(self) -> bool:
        """Return whether the prior is invariant under permutations of the components."""
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
        raise ValueError(f"{name} is required, got None; pass a proper prior or known {name}.")
    if not isinstance(value, Distribution):
        known = as_tensor(value, name=name, dtype=torch.float64)
        check_finite(known.reshape(-1, 1), name=name, rows="entry")
        try:
            return _Site(name, shape, known=known.expand(shape).clone())
        except RuntimeError:
            raise ValueError(
                f"known {name} must be broadcastable to {shape}, got shape {tuple(known.shape)}."
            ) from None
    value = _widened(value)
    own = len(value.event_shape)
    batch = shape[: len(shape) - own]
    try:
        if own > len(shape) or tuple(value.event_shape) != shape[len(shape) - own :]:
            raise RuntimeError
        wide = value if isinstance(value, StickBreaking) else value.expand(batch)
    except RuntimeError:
        raise ValueError(
            f"the prior on {name} must be broadcastable to {shape}, got batch shape {tuple(value.batch_shape)} and event "
            f"shape {tuple(value.event_shape)}; expand it or pass the matching components and features."
        ) from None
    prior = Independent(wide, len(batch), validate_args=False) if batch else wide
    support = value.support
    if getattr(support, "is_discrete", False):
        raise ValueError(f"the prior on {name} must be a continuous distribution, got {type(value).__name__}.")
    matrices = len(shape) == 3
    transform: Any = _PositiveDefinite(shape[-1]) if matrices else biject_to(prior.support)
    site = _Site(name, shape, prior=prior, transform=transform)
    draws = _drawn(prior, 2, torch.Generator().manual_seed(0))
    if not (bool(torch.isfinite(draws).all()) and bool(torch.isfinite(prior.log_prob(draws)).all())):
        raise ValueError(
            f"the prior on {name} is improper: draws from {value}, or their densities, are not finite; use a proper prior."
        )
    return site


def _widened(prior: Distribution) -> Distribution:
    """Copy a distribution, with its float32 parameters converted to float64."""
    wide = copy.copy(prior)
    for name, value in vars(prior).items():
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            setattr(wide, name, value.double())
        elif isinstance(value, Distribution):
            setattr(wide, name, _widened(value))
    return wide


def _drawn(prior: Distribution, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw (count, ...) float64 values with a generator, without changing torch's global random state."""
    if isinstance(prior, StickBreaking):
        return prior.sample((count,), generator=generator)
    seed = int(torch.randint(1 << 62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Wishart warns of singular draws, which it replaces, also if none is singular.
        warnings.filterwarnings("ignore", message="Singular sample detected")
        torch.manual_seed(seed)
        return prior.sample(torch.Size([count])).double()
