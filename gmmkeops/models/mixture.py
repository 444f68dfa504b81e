r"""Gaussian mixtures as torch distributions, parameterized by weights, means and precision factors.

.. math::

    p(x) = \sum_k W_k\, \mathcal N(x;\, \mu_k, (U_k U_k^\top)^{-1}), \qquad W = \mathrm{softmax}(\mathrm{logits})

The log-density is one log-sum-exp reduction with offsets :math:`c_k = \log W_k + \log |\det U_k| - \tfrac D2 \log 2\pi`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints
from torch.utils.checkpoint import checkpoint

from gmmkeops import reductions
from gmmkeops._checks import as_choice, as_device, as_fraction, as_integer, as_shape
from gmmkeops.components import Factor, as_tensor, check_finite, concrete, factor_class, mind_fork
from gmmkeops.data import categorical, generator_on, table_of
from gmmkeops.models.quantiles import quantiles
from gmmkeops.models.regions import radii, shell
from gmmkeops.reductions import recordable

__all__ = ["Mixture", "as_mixture", "log_weights"]

# Numbers that an intermediate (rows, K, D) or (rows, D, D) array may hold.
_CHUNK = 1 << 22

# Whitened distances below which exponents are far from the limits of their dtype, and the smallest log-densities of each dtype.
_NEAR = 1e4

_LEAST = {torch.float32: -2.9e38, torch.float64: -9e299}

# Nats per column below zero from which on differences of exponents lose digits that matter.
_DEPTH = {torch.float32: 1e2, torch.float64: 1e3}


def _fits(shape: torch.Size, rows: int) -> bool:
    """Whether a shape has at most ``rows`` entries, or torch is compiling (compilers plan the memory themselves)."""
    return torch.compiler.is_compiling() or shape.numel() <= rows


def log_weights(weights: Tensor) -> Tensor:
    """Logarithms of weights. Zeros give -inf with a gradient of zero, since the gradient of the logarithm would be infinite."""
    none = weights == 0
    return weights.masked_fill(none, 1.0).log().masked_fill(none, -math.inf)


def as_mixture(value: Any, name: str = "mixture") -> Mixture:
    """Check that a value is one mixture, and return it.

    Raises:
        TypeError: The value is not a mixture.
        ValueError: The value is a batch of mixtures.
    """
    if not isinstance(value, Mixture):
        remedy = f"pass its {'mixture_' if hasattr(value, 'mixture_') else 'mixture'}"
        if not hasattr(value, "mixture_") and not hasattr(value, "mixture"):
            remedy = "make one with Mixture.from_parameters"
        raise TypeError(f"{name} must be a Mixture, got {type(value).__name__}; {remedy}.")
    if value.batch_shape:
        raise ValueError(
            f"{name} must be one mixture, got a batch of shape {tuple(value.batch_shape)}; pass one of them."
        )
    return value


class Mixture(Distribution):
    r"""A mixture of K Gaussians in D dimensions, as a :class:`torch.distributions.Distribution`.

    .. math:: p(x) = \sum_k W_k\, \mathcal N(x;\, \mu_k, (U_k U_k^\top)^{-1}), \qquad W = \mathrm{softmax}(\mathrm{logits})

    Args:
        logits: Unnormalized log-weights (*B, K), nats; -inf for a component of weight zero.
        means: Component means (*B, K, D), data units.
        factor: A precision factor with leading dimension K, or 1 when tied, and the same batch dimensions.
        validate_args: Whether the values of parameters and points are checked; shapes always are. The default is that of
            all torch distributions: True, unless ``torch.distributions.Distribution.set_default_validate_args`` has been
            called, as ``torch.compile`` does. Without checks the log-density is NaN at points with NaN and -inf at infinite
            points. Values are not checked while torch compiles or exports, or within ``torch.func.vmap``, because they are
            not available there.

    Attributes:
        columns: Names of the D columns, or None if they are not known. Data with column names (tables, files) are matched
            to them by name, data without names by position; see :meth:`named`.

    Raises:
        TypeError: The factor is not a :class:`Factor`.
        ValueError: Shapes or devices do not match, means or factors are not finite, or logits are NaN, +inf, or all -inf.

    Reference:
        McLachlan and Peel 2000, *Finite Mixture Models*.

    Example:
        >>> import torch, gmmkeops as gk
        >>> mixture = gk.Mixture.from_parameters([0.3, 0.7], [[0.0], [4.0]], [1.0, 1.0], covariance_type="spherical")
        >>> mixture.log_prob(torch.tensor([[4.0]], dtype=torch.float64)).exp().round(decimals=4)
        tensor([0.2793], dtype=torch.float64)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False
    columns: tuple[str, ...] | None = None

    def __init__(self, logits: Tensor, means: Tensor, factor: Factor, validate_args: bool | None = None) -> None:
        abstract = validate_args is False
        logits = recordable(as_tensor(logits, name="logits", abstract=abstract))
        means = recordable(as_tensor(means, name="means", abstract=abstract))
        if not isinstance(factor, Factor):
            raise TypeError(f"factor must be a Factor, got {type(factor).__name__}; use Mixture.from_parameters.")
        if means.ndim < 2 or logits.shape != means.shape[:-1] or logits.shape[-1] == 0:
            raise ValueError(
                f"logits must have shape (*B, K) and means (*B, K, D) with K > 0, got {tuple(logits.shape)} and "
                f"{tuple(means.shape)}."
            )
        *batch, K, D = means.shape
        if factor.features != D or factor.leading not in (1, K) or factor.batch_shape != torch.Size(batch):
            raise ValueError(
                f"factor must have batch {tuple(batch)}, leading dimension {K} or 1 and {D} features to match the means, "
                f"got batch {tuple(factor.batch_shape)}, leading dimension {factor.leading} and {factor.features}."
            )
        if len({logits.device, means.device, factor.device}) > 1:
            raise ValueError(
                f"logits are on {logits.device}, means on {means.device} and the factor on {factor.device}; "
                "move all to one device with .to()."
            )
        if self._validate_args if validate_args is None else validate_args:
            check_finite(means, name="means", rows="component")
            some = concrete(logits)
            if some and (bool(torch.isnan(logits).any()) or bool((logits == math.inf).any())):
                raise ValueError(
                    "logits must not be NaN or +inf; pass finite log-weights, or -inf for a weight of zero."
                )
            if some and bool((logits == -math.inf).all(-1).any()):
                raise ValueError(
                    "logits must be finite for at least one component, got -inf for all; pass finite log-weights."
                )
            for name, tensor in factor.tensors.items():
                check_finite(tensor, name=f"the factor's {name}", rows="component")
        self.logits, self.means, self.factor = logits, means, factor
        super().__init__(torch.Size(batch), torch.Size([D]), validate_args)

    @classmethod
    def _unchecked(cls, logits: Tensor, means: Tensor, factor: Factor, validate_args: bool | None = None) -> Mixture:
        """A mixture whose parameters are known to be valid; ``validate_args`` applies only to its points."""
        mixture = cls(logits, means, factor, validate_args=False)
        del mixture._validate_args
        if validate_args is not None:
            mixture._validate_args = validate_args
        return mixture

    def _like(self, logits: Tensor, means: Tensor, factor: Factor) -> Mixture:
        """A mixture with parameters computed from those of this one, and the same ``validate_args``."""
        return self._unchecked(logits, means, factor, vars(self).get("_validate_args"))

    @classmethod
    def from_parameters(
        cls, weights: Any, means: Any, covariances: Any, covariance_type: str = "full", *, features: int | None = None
    ) -> Mixture:
        """Create a mixture from weights, means and covariances, in the shapes of scikit-learn and tgmm.

        The result is differentiable in all parameters, except in weights that are exactly zero, which stay zero.

        Args:
            weights: (K,), not negative, summing to one.
            means: (K, D), data units.
            covariances: Squared data units: "full" (K, D, D), "tied" or "tied_full" (D, D), "diag" (K, D),
                "spherical" (K,), "tied_diag" (D,), "tied_spherical" ().
            covariance_type: One of those names.
            features: Not used: D is the number of columns of the means.

        Raises:
            ValueError: Shapes do not match, weights are negative or do not sum to one, or a covariance is not positive
                definite (the message gives the component's index).

        Example:
            >>> import gmmkeops as gk
            >>> gk.Mixture.from_parameters([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.5, 1.0]]])
            Mixture(components=1, features=2, factor=full)
        """
        kind, tied = factor_class(covariance_type)
        weights = as_tensor(weights, name="weights")
        means = as_tensor(means, name="means").to(weights.device)
        covariances = as_tensor(covariances, name="covariances").to(weights.device)
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights must have shape (K,) and means (K, D), got {tuple(weights.shape)} and {tuple(means.shape)}."
            )
        check_finite(weights, name="weights", rows="component")
        if concrete(weights) and bool((weights < 0).any()):
            component = int((weights < 0).nonzero()[0, 0])
            raise ValueError(
                f"weights must not be negative, got {float(weights[component]):.6g} in component {component}."
            )
        if concrete(weights) and abs(float(weights.detach().sum(dtype=torch.float64)) - 1) > 1e-4:
            raise ValueError(f"weights must sum to one, got {float(weights.sum()):.6g}; divide them by their sum.")
        K, D = means.shape
        leading = () if tied else (K,)
        shape = (*leading, *kind.spread_shape(D))
        if tuple(covariances.shape) != shape:
            raise ValueError(
                f"covariances must have shape {shape} for covariance_type={covariance_type!r} with K={K} and D={D}, "
                f"got {tuple(covariances.shape)}."
            )
        covariances = covariances.unsqueeze(0) if tied else covariances
        return cls(log_weights(weights), means, kind.from_covariances(covariances, features=D))

    def named(self, columns: Sequence[str] | None) -> Mixture:
        """Return the mixture with names for its columns, which :func:`gmmkeops.save` writes to the file.

        Args:
            columns: D different names, or None to remove the names.

        Raises:
            ValueError: The names are not D different strings.

        Example:
            >>> import gmmkeops as gk
            >>> m = gk.Mixture.from_parameters([1.0], [[0.0, 5.0]], [1.0], "spherical").named(["a", "b"])
            >>> m.marginal(1).columns
            ('b',)
        """
        if columns is None and self.columns is None:
            return self
        names = tuple(columns) if isinstance(columns, Iterable) and not isinstance(columns, str) else ()
        strings = all(isinstance(name, str) for name in names)
        if columns is not None and (len(set(names)) != self.features or len(names) != self.features or not strings):
            raise ValueError(
                f"columns must be {self.features} different strings, one for each column, got {columns!r}."
            )
        mixture = copy.copy(self)
        mixture.columns = None if columns is None else tuple(map(str, names))
        return mixture

    @property
    def components(self) -> int:
        """Number of components K."""
        return self.means.shape[-2]

    @property
    def features(self) -> int:
        """Number of columns D."""
        return self.means.shape[-1]

    @property
    def log_weights(self) -> Tensor:
        """Normalised log-weights (*B, K), nats."""
        return torch.log_softmax(self.logits, -1)

    @property
    def weights(self) -> Tensor:
        """Weights (*B, K), summing to one."""
        return torch.softmax(self.logits, -1)

    @property
    def offsets(self) -> Tensor:
        """Offsets log W + log |det U| - D/2 log 2π (*B, K) that the reductions add to each exponent, nats."""
        return self.log_weights + self.factor.log_determinant() - 0.5 * self.features * math.log(2 * math.pi)

    @property
    def parameter_count(self) -> int:
        """Number of free parameters in weights, means and covariances."""
        tied = self.factor.leading == 1 and self.components > 1
        return (
            self.components
            - 1
            + self.means[..., 0].shape[-1] * self.features
            + type(self.factor).count(self.components, self.features, tied)
        )

    @property
    def mixture_distribution(self) -> Categorical:
        """The categorical distribution of the component."""
        return Categorical(logits=self.logits)

    @property
    def component_distribution(self) -> Distribution:
        """The K Gaussians, as a torch distribution with batch shape (*B, K)."""
        return self.factor.distribution(self.means)

    @property
    def mean(self) -> Tensor:
        """Mean of the whole mixture (*B, D), data units."""
        return (self.weights.unsqueeze(-1) * self.means).sum(-2)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance of the whole mixture (*B, D, D), within plus between components, squared data units."""
        weights = self.weights[..., None, None]
        between = (self.means - self.mean.unsqueeze(-2)).unsqueeze(-1)
        return (weights * (self.factor.covariances() + between @ between.mT)).sum(-3)

    @property
    def variance(self) -> Tensor:
        """Variances of the whole mixture (*B, D), squared data units."""
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    def log_prob(self, value: Any, *, backend: str = "auto", truncate: float | None = None) -> Tensor:
        r"""Log-density log p(x), with the normalizing constant.

        Args:
            value: Points (*S, D), or (*S, *B, D) for a batch of mixtures; data units. Their dtype is
                that of the result.
            backend: ``"auto"``, ``"keops"`` or ``"dense"``.
            truncate: Largest fraction ε of a point's density that may be neglected; 0 evaluates every component, None is as in
                :func:`gmmkeops.reductions.arrange`.

        Returns:
            (*S, *B), nats per point, differentiable in points and parameters.

        Raises:
            TypeError, ValueError: The points are not numeric, not finite, or do not have D columns; or their squared distances
                overflow their dtype; or ``backend="keops"`` or truncation is asked for with a batch of mixtures, which is
                evaluated by torch operations at all components.
        """
        x = self._points(value)
        near, is_near = self._near(x)
        if self._validate_args and concrete(x):
            self._check_finite(x)
            values = self._log_prob(near, backend, truncate).to(x.dtype)
            if not is_near:
                self._check_range(values, x)
            return values
        finite = torch.isfinite(x).all(-1)
        values = self._log_prob(torch.where(finite.unsqueeze(-1), near, 0.0), backend, truncate).to(x.dtype)
        # The sum is NaN where an entry is NaN, else infinite.
        return torch.where(finite, values, -x.detach().abs().sum(-1))

    def _log_prob(self, x: Tensor, backend: str, truncate: float | None) -> Tensor:
        """Log-densities (*S, *B) of finite points."""
        if self.batch_shape:
            if as_choice(backend, "backend", reductions.BACKENDS) == "keops" or as_fraction(truncate, "truncate"):
                raise ValueError(
                    "a batch of mixtures is evaluated by torch operations at all components; leave backend and truncate out."
                )
            return self._batch_log_prob(x)
        if x.numel() == 0:
            return torch.logsumexp(self._joint(x), -1)
        arguments = (x.reshape(-1, self.features), self.offsets, self.means, self.factor)
        values = reductions.logsumexp(*arguments, backend=backend, truncate=truncate)
        return values.reshape(x.shape[:-1])

    def _batch_log_prob(self, x: Tensor) -> Tensor:
        """Log-densities (*S, *B) of points (*S, *B, D), in blocks of mixtures; blocks are recomputed in the backward pass."""
        batch = self._broadcast(x[..., 0], x, "points").shape
        lead = batch[: len(batch) - len(self.batch_shape)]
        # The matrix of one factor takes as much memory as the residuals of D points.
        room = max(1, _CHUNK // (self.components * self.features * (self.features + 1)))
        if _fits(batch, room):
            return torch.logsumexp(self._joint(x), -1)
        flat = x.expand(*batch, self.features).reshape(lead.numel(), -1, self.features)
        tensors = {name: tensor.flatten(0, -3) for name, tensor in self.factor.tensors.items()}

        def some(points: Tensor, logits: Tensor, means: Tensor, *parts: Tensor) -> Tensor:
            factor = self.factor.replace(**dict(zip(tensors, parts, strict=True)))
            return torch.logsumexp(Mixture(logits, means, factor, validate_args=False)._joint(points), -1)

        size, rows = max(1, room // lead.numel()), min(room, lead.numel())
        columns = (self.logits.flatten(0, -2), self.means.flatten(0, -3), *tensors.values())
        values = []
        for points, *own in zip(flat.split(size, 1), *(tensor.split(size) for tensor in columns), strict=True):
            # Checkpointing is needed for gradients only, and torch's checkpoint imports its compiler (a second and 50 MB).
            if torch.is_grad_enabled():
                parts = [checkpoint(some, part, *own, use_reentrant=False) for part in points.split(rows)]
            else:
                parts = [some(part, *own) for part in points.split(rows)]
            values.append(torch.cat(parts))
        return torch.cat(values, 1).reshape(batch)

    def cdf(self, value: Any) -> Tensor:
        """Cumulative distribution function of a mixture in one dimension.

        Args:
            value: Points (*S, 1), or (*S, *B, 1) for a batch of mixtures; data units.

        Returns:
            Probabilities (*S, *B) in [0, 1], differentiable in points and parameters.

        Raises:
            ValueError: The mixture has more than one column; take a :meth:`marginal`.
        """
        x = self._points(value)
        self._check_one_column()
        if self._validate_args:
            # The distribution function is 0 or 1 at infinite points.
            check_finite(torch.where(torch.isinf(x), 0.0, x).reshape(-1, 1), name="x")
        z = (x - self.means[..., 0]) * self.factor.log_determinant().exp()
        return (self.weights * torch.special.ndtr(z)).sum(-1).clamp(max=1)

    def quantile(self, q: Any) -> Tensor:
        """Quantiles of a mixture in one dimension, computed in float64; not differentiable (see :meth:`icdf`).

        Args:
            q: Probabilities in (0, 1): (*S), the same for all mixtures of a batch.

        Returns:
            (*S, *B), data units, in the dtype of the means.

        Raises:
            ValueError: The mixture has more than one column, or a probability is not inside (0, 1).

        Example:
            >>> import gmmkeops as gk
            >>> m = gk.Mixture.from_parameters([0.5, 0.5], [[-2.0], [2.0]], [1.0, 1.0], "spherical")
            >>> m.quantile([0.025, 0.975]).round(decimals=3).tolist()
            [-3.645, 3.645]
        """
        q = as_tensor(q, name="q").to(self.means)
        if not bool(((q > 0) & (q < 1)).all()):
            raise ValueError("q must lie inside (0, 1); use icdf for probabilities of 0 and 1.")
        q = q.reshape((*q.shape, *[1] * len(self.batch_shape)))
        return self._quantiles(q.detach()).detach().to(q.dtype)

    def icdf(self, value: Any) -> Tensor:
        """Inverse cumulative distribution function (quantiles) of a mixture in one dimension.

        The quantiles are computed in float64, also far in the tails, and rounded to the dtype of the result.

        Args:
            value: Probabilities in [0, 1]: (*S), or (*S, *B) for a batch of mixtures.

        Returns:
            Points (*S, *B, 1), data units, with first and second derivatives in probabilities and parameters; -inf for 0, +inf
            for 1. If values are not checked, those outside of [0, 1] give NaN.

        Raises:
            ValueError: The mixture has more than one column (take a :meth:`marginal`), a value is not in [0, 1], or the
                shape does not fit the batch.

        Example:
            >>> import gmmkeops as gk
            >>> m = gk.Mixture.from_parameters([0.5, 0.5], [[-2.0], [2.0]], [1.0, 1.0], "spherical")
            >>> m.icdf([0.025, 0.5, 1.0]).round(decimals=3).tolist()
            [[-3.645], [0.0], [inf]]
        """
        q = recordable(as_tensor(value, name="value", device=self.means.device))
        if self._validate_args and concrete(q) and not bool(((q >= 0) & (q <= 1)).all()):
            raise ValueError("value must hold probabilities from 0 to 1 for icdf; pass what cdf returns.")
        return self._quantiles(q).unsqueeze(-1).to(torch.promote_types(q.dtype, self.means.dtype))

    def _quantiles(self, probabilities: Tensor) -> Tensor:
        """Quantiles (*S, *B) of a mixture in one dimension, float64."""
        self._check_one_column()
        precisions = self.factor.log_determinant().double().exp()
        return quantiles(
            self.log_weights,
            self.means[..., 0],
            precisions,
            self._broadcast(probabilities, probabilities, "probabilities"),
        )

    def _check_one_column(self) -> None:
        if self.features > 1:
            raise ValueError(
                f"a distribution function needs a mixture with one column, got {self.features} columns; take a marginal first."
            )

    def entropy(self) -> Tensor:
        r"""Differential entropy of a mixture of one component, in closed form.

        .. math:: H = \tfrac D2 \log(2 \pi e) - \log |\det U|

        Returns:
            (*B), nats.

        Raises:
            NotImplementedError: The mixture has several components; its entropy has no closed form.
        """
        if self.components > 1:
            raise NotImplementedError(
                f"the entropy of a mixture of {self.components} components has no closed form; average -log_prob over a "
                "sample, or compare mixtures by sampling with gmmkeops.analysis (gk.analysis.kl_divergence)."
            )
        return 0.5 * self.features * math.log(2 * math.pi * math.e) - self.factor.log_determinant()[..., 0]

    def log_joint(self, value: Any) -> Tensor:
        r"""Joint log-densities log p(x, k) = log W_k + log N(x; μ_k, Σ_k) of points and components.

        Args:
            value: Points (*S, D), or (*S, *B, D) for a batch of mixtures; data units.

        Returns:
            (*S, *B, K), nats, in the dtype of the points.

        Raises:
            TypeError, ValueError: As for :meth:`log_prob`.
        """
        x = self._points(value)
        self._check_finite(x)
        near, is_near = self._near(x)
        values = self._joint(near).to(x.dtype)
        if not is_near:
            self._check_range(values.amax(-1), x)
        return values

    def _joint(self, x: Tensor) -> Tensor:
        """Log-densities log p(x, k) (*S, *B, K) of checked points, in their dtype."""
        wide = torch.promote_types(x.dtype, self.means.dtype)
        offsets, means, factor = self.offsets.to(wide), self.means.to(wide), self.factor
        factor = factor if factor.dtype == wide else factor.to(wide)

        def exponents(rows: Tensor) -> Tensor:
            distances = factor.whiten(rows.unsqueeze(-2).to(wide) - means).square().sum(-1)
            # Products that overflow may cancel to NaN; the distance is then infinite.
            return (offsets - 0.5 * distances.masked_fill(distances.isnan(), math.inf)).to(rows.dtype)

        rows = max(1, _CHUNK // max(1, self.means.numel()))
        if self.batch_shape or x.ndim < 2 or _fits(x.shape[:-1], rows):
            return exponents(x)
        flat = x.reshape(-1, self.features)
        return torch.cat([exponents(part) for part in flat.split(rows)]).reshape(*x.shape[:-1], self.components)

    def responsibilities(
        self, value: Any, k: int | None = None, *, backend: str = "auto", truncate: float | None = None
    ) -> Any:
        """Responsibilities p(k | x): the posterior probabilities of the components.

        Args:
            value: Points (*S, D), data units; without ``k`` also (*S, *B, D) for a batch of mixtures.
            k: Return only the k largest of each point, without storing the others; None for all K.
            backend: Used with ``k``: ``"auto"``, ``"keops"`` or ``"dense"``.
            truncate: Used with ``k``, as for :meth:`log_prob`.

        Returns:
            (*S, K), or (*S, *B, K) for a batch; with ``k`` the pair of probabilities (*S, k), in descending order, and
            components (*S, k), int64.

        Raises:
            TypeError, ValueError: As for :meth:`log_prob`; or k is not between 1 and K.
        """
        if k is None:
            x = self._points(value)
            self._check_finite(x)
            near, is_near = self._near(x)
            joint = self._joint(near)
            if not is_near:
                self._check_range(joint.amax(-1), x)
            return self._posterior(joint, near).exp().to(x.dtype)
        k = as_integer(k, "k", 1, self.components, clause=f"must be between 1 and the {self.components} components")
        x, flat = self._flat(value)
        if not len(flat):
            return torch.softmax(self._joint(x), -1).topk(k)
        flat, _ = self._near(flat)
        cloud = reductions.arrange(flat, self.components, truncate, sweeps=2)
        arguments = (cloud, self.offsets.detach(), self.means.detach(), self.factor)
        exponents, indices = reductions.topk(*arguments, k, backend=backend)
        values = reductions.logsumexp(*arguments, backend=backend).detach()
        shares = (exponents - values[:, None]).exp()
        for rows, posterior in self._far_rows(flat, values):
            some, indices[rows] = posterior.topk(k, -1)
            shares[rows] = some.exp().to(shares.dtype)
        shape = (*x.shape[:-1], k)
        return shares.to(x.dtype).reshape(shape), indices.reshape(shape)

    def predict(self, value: Any, *, backend: str = "auto", truncate: float | None = None) -> Tensor:
        """Index of the most probable component of each point.

        Args:
            value: Points (*S, D), data units.
            backend, truncate: As for :meth:`log_prob`; labels are exact with any truncation.

        Returns:
            (*S), int64.

        Raises:
            TypeError, ValueError: As for :meth:`log_prob`; or this is a batch of mixtures.
        """
        x, flat = self._flat(value)
        if not len(flat):
            return self._joint(x).argmax(-1)
        flat, is_near = self._near(flat)
        arguments = (flat, self.offsets, self.means, self.factor)
        if is_near:
            labels = reductions.argmax(*arguments, backend=backend, truncate=truncate)
        else:
            exponents, indices = reductions.topk(*arguments, 1, backend=backend, truncate=truncate)
            labels = indices[:, 0]
            for rows, posterior in self._far_rows(flat, exponents[:, 0]):
                labels[rows] = posterior.argmax(-1)
        return labels.reshape(x.shape[:-1])

    def sample(
        self,
        sample_shape: Any = (),
        *,
        return_labels: bool = False,
        generator: torch.Generator | None = None,
        component: int | None = None,
        confidence: float | None = None,
        std_range: tuple[float, float] | None = None,
    ) -> Any:
        r"""Draw points, and optionally the component of each.

        Points within a region (``confidence`` or ``std_range``) are drawn exactly and without rejection: the whitened point is
        a uniformly distributed direction times a radius from the chi distribution with D degrees of freedom, truncated to the
        region. A shell at five standard deviations takes no longer than any other region.

        Args:
            sample_shape: S, an int or a shape.
            return_labels: Whether to return the components as well.
            generator: Random number generator. If it is on another device than the mixture, a seed for the draws is taken from
                it. None uses torch's global generator, as all torch distributions do: two calls draw different points, and
                ``torch.manual_seed`` makes them reproducible.
            component: Draw from this component only.
            confidence: Draw within the ellipsoid that contains this probability of a component, in (0, 1].
            std_range: (a, b): draw at Mahalanobis distances from a to b of the component's mean; b may be infinite.

        Returns:
            Points (*S, *B, D), data units; with ``return_labels`` also components (*S, *B), int64.

        Raises:
            ValueError: The component does not exist, or the region is empty or so far out that its probability underflows
                float64.
        """
        mind_fork()
        shape = as_shape(sample_shape)
        if component is not None:
            component = as_integer(component, "component", -self.components, self.components - 1)
        low, high = shell(confidence, std_range, self.features)
        generator = generator_on(generator, self.means.device)
        with torch.no_grad():
            count, K, D = shape.numel(), self.components, self.features
            batch = self.batch_shape.numel()
            wide: Any = {"dtype": torch.float64, "device": self.means.device}
            if component is not None or count * batch == 0:
                labels = torch.full((count, batch), (component or 0) % K, device=self.means.device)
            else:
                weights = self.weights.double().reshape(batch, K)
                labels = categorical(weights, count, generator).T
            first = torch.arange(batch, device=labels.device)
            index = (labels + K * first).reshape(-1)
            factor = self.factor.replace(**{n: t.flatten(0, -2) for n, t in self.factor.tensors.items()})
            which = index if self.factor.leading == K else first.expand_as(labels).reshape(-1)
            draws = torch.randn(count * batch, D, generator=generator, dtype=self.means.dtype, device=labels.device)
            if (low, high) != (0.0, math.inf) and len(draws):
                radius = radii(torch.rand(count * batch, 1, generator=generator, **wide), low, high, D)
                draws = (draws.double() / draws.double().norm(dim=1, keepdim=True) * radius).to(draws.dtype)
            means, rows = self.means.reshape(-1, D), max(1, _CHUNK // (D * D))
            # The batch is processed in blocks, because factors are turned into matrices.
            order = torch.arange(count * batch, device=labels.device).view(count, batch)
            for some in order.split(max(1, rows // K), 1) if len(draws) else ():
                begin = int(some[0, 0]) * self.factor.leading
                mine = slice(begin, begin + some.shape[1] * self.factor.leading)
                own = factor.replace(**{name: tensor[mine] for name, tensor in factor.tensors.items()})
                for part in some.reshape(-1).split(rows):
                    draws[part] = means[index[part]] + own.unwhiten(draws[part], which[part] - begin)
        points = draws.reshape(self._extended_shape(shape))
        return (points, labels.reshape(*shape, *self.batch_shape)) if return_labels else points

    def marginal(self, columns: Sequence[int] | int) -> Mixture:
        """Marginal distribution of some columns, a mixture in closed form.

        Args:
            columns: Indices of the columns, in the order of the result; negative ones count from the end.

        Raises:
            ValueError: A column does not exist or is given twice.

        Example:
            >>> import gmmkeops as gk
            >>> m = gk.Mixture.from_parameters([1.0], [[1.0, 2.0]], [[[2.0, 1.0], [1.0, 3.0]]]).marginal(1)
            >>> m.mean.tolist(), m.variance.round(decimals=6).tolist()
            ([2.0], [3.0])
        """
        keep = self._columns(columns)
        names = None if self.columns is None else [self.columns[d] for d in keep]
        return self._like(self.logits, self.means[..., keep], self.factor.marginal(keep)).named(names)

    def condition(self, columns: Sequence[int] | int, values: Any) -> Mixture:
        r"""Conditional distribution of the other columns given the values of some, a mixture in closed form.

        .. math::

            \mu_{a|b} = \mu_a - P_{aa}^{-1} P_{ab} (x_b - \mu_b), \quad \Sigma_{a|b} = P_{aa}^{-1}, \quad
            W_k \propto W_k\, \mathcal N(x_b; \mu_{k,b}, \Sigma_{k,bb})

        Its mean is Gaussian mixture regression.

        Args:
            columns: Indices of the columns b that are given.
            values: Their values x_b, (len(columns),), or (*B, len(columns)) for a batch of mixtures; data units.

        Returns:
            A mixture of the other columns a, in their order; a batch (*B) of mixtures for values of shape (*B, len(columns)).

        Raises:
            ValueError: A column does not exist or is given twice, no column is left, values have another shape or are not
                finite, or this is a batch of mixtures.

        Reference:
            Bishop 2006, *Pattern Recognition and Machine Learning*, §2.3.1.

        Example:
            >>> import gmmkeops as gk
            >>> m = gk.Mixture.from_parameters([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.5, 1.0]]])
            >>> m.condition(0, [2.0]).mean.tolist()
            [1.0]
        """
        known = self._columns(columns)
        rest = [d for d in range(self.features) if d not in known]
        if not rest:
            raise ValueError("condition must leave at least one column free; use log_prob for all of them.")
        if self.batch_shape:
            raise ValueError(
                f"condition needs one mixture, got a batch of shape {tuple(self.batch_shape)}; index its parameters first."
            )
        x = as_tensor(values, name="values").to(self.means)
        if x.ndim == 0 or x.shape[-1] != len(known):
            raise ValueError(f"values must have shape (*, {len(known)}), one per known column, got {tuple(x.shape)}.")
        check_finite(x, name="values")
        logits = self.marginal(known).log_joint(x)
        batch = x.shape[:-1]
        means = self.means[:, rest].expand(*batch, -1, -1)
        factor, gain = self.factor.conditional(known, rest)
        if gain is not None:
            means = means - (gain @ (x.unsqueeze(-2) - self.means[:, known]).unsqueeze(-1)).squeeze(-1)
        names = None if self.columns is None else [self.columns[d] for d in rest]
        return self._like(logits, means, factor.expand(batch)).named(names)

    def _columns(self, columns: Sequence[int] | int) -> list[int]:
        one = not isinstance(columns, Iterable) or isinstance(columns, (str, bytes))
        wanted: Any = [columns] if one else columns
        chosen = [as_integer(column, "each column") for column in wanted]
        chosen = [column + self.features if column < 0 else column for column in chosen]
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= c < self.features for c in chosen):
            raise ValueError(f"columns must be distinct and among the {self.features} of the mixture, got {columns}.")
        return chosen

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """Expand the batch shape to ``batch_shape``, as all torch distributions; parameters are not copied."""
        batch_shape = torch.Size(batch_shape)
        return self._like(
            self.logits.expand(*batch_shape, self.components),
            self.means.expand(*batch_shape, self.components, self.features),
            self.factor.expand(batch_shape),
        ).named(self.columns)

    def select(self, index: Tensor) -> Mixture:
        """The mixture of some components (an index or a mask over the K components), with their weights normalized."""
        return self._like(self.logits[..., index], self.means[..., index, :], self.factor.select(index)).named(
            self.columns
        )

    def to(self, *args: Any, **kwargs: Any) -> Mixture:
        """Move or cast the parameters, as :meth:`torch.Tensor.to`.

        Raises:
            ValueError: The device does not exist on this machine.
        """
        for place in (*args[:1], kwargs.get("device")):
            if isinstance(place, (str, int, torch.device)) and str(place) != "meta":
                as_device(place)
        return self._like(
            self.logits.to(*args, **kwargs), self.means.to(*args, **kwargs), self.factor.to(*args, **kwargs)
        ).named(self.columns)

    def detach(self) -> Mixture:
        """A copy of the mixture that is detached from the autograd graph."""
        return self._like(self.logits.detach().clone(), self.means.detach().clone(), self.factor.detach()).named(
            self.columns
        )

    def _check_finite(self, x: Tensor) -> None:
        if self._validate_args:
            check_finite(x.reshape(-1, self.features), name="x")

    def _near(self, x: Tensor) -> tuple[Tensor, bool]:
        """The points, in float64 if squared distances might overflow float32; and whether all whitened distances are small."""
        tensors = (x, self.means, *self.factor.tensors.values())
        if not x.numel() or not all(concrete(tensor) for tensor in tensors):
            return x, True
        with torch.no_grad():
            means = self.means.detach()
            # A difference is at most the sum of two lengths, and a factor's norm at most D times its largest entry.
            low, high = means.flatten(0, -2).aminmax(dim=0)
            center = 0.5 * low.double() + 0.5 * high.double()
            least, most = x.detach().reshape(-1, self.features).aminmax(dim=0)
            reach = torch.maximum(most.double() - center, center - least.double()).amax()
            reach = reach + 0.5 * (high.double() - low.double()).amax()
            largest = float(self.features * reach * self.factor.detach().largest())
        if largest < _NEAR:
            return x, True
        return (x.double() if largest > 1e18 else x), False

    def _far(self, values: Tensor) -> Tensor:
        """Mask of log-densities that are so low that differences of exponents lose digits."""
        return values < -_DEPTH[values.dtype] * self.features

    def _far_rows(self, flat: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows with such low log-densities (N,), and their log p(k | x), float64."""
        self._check_range(values, flat)
        far = self._far(values).nonzero()[:, 0]
        with torch.no_grad():
            for rows in far.split(max(1, _CHUNK // self.means.numel())) if len(far) else ():
                x = flat[rows].double()
                yield rows, self._posterior(self._joint(x), x)

    def _posterior(self, joint: Tensor, x: Tensor) -> Tensor:
        """log p(k | x) (*S, *B, K) from points and their log p(x, k), accurate also far from all components."""
        values = torch.log_softmax(joint, -1)
        if not values.numel() or not concrete(values):
            return values
        far = self._far(joint.detach().amax(-1)).reshape(-1, *self.batch_shape)
        rows = far.flatten(1).any(1).nonzero()[:, 0] if self.batch_shape else far.nonzero()[:, 0]
        if not len(rows):
            return values
        flat, points = (
            values.reshape(*far.shape, -1),
            x.expand(*joint.shape[:-1], self.features).reshape(*far.shape, -1),
        )
        parts = rows.split(max(1, _CHUNK // (self.means.numel() * self.features)))
        odds = torch.cat([self._odds(points[some], flat[some].detach().argmax(-1)) for some in parts])
        return flat.index_copy(0, rows, torch.log_softmax(odds, -1).to(flat.dtype)).reshape(values.shape)

    def _odds(self, x: Tensor, best: Tensor) -> Tensor:
        r"""log p(x, k) - log p(x, j) (n, *B, K) of points (n, *B, D) and the components j = best (n, *B), float64.

        The difference is computed without subtracting the squares: with :math:`y_k = U_k^\top (x - \mu_k)` and
        :math:`\delta = y_j - y_k = (U_j - U_k)^\top (x - \mu_j) + U_k^\top (\mu_k - \mu_j)` it is

        .. math:: \tfrac12 (|y_j|^2 - |y_k|^2) = \delta^\top (y_j - \delta / 2).
        """
        offsets, means = self.offsets.double(), self.means.double()
        factor = self.factor.to(torch.float64)
        U = factor.U.expand(*means.shape[:-1], *factor.U.shape[means.ndim - 1 :])

        def chosen(of: Tensor) -> Tensor:
            depth = of.ndim - offsets.ndim
            index = best.reshape(*best.shape, *[1] * (depth + 1))
            return torch.take_along_dim(of.expand(len(best), *of.shape), index, len(best.shape))

        z = x.double().unsqueeze(-2) - chosen(means)
        shift = factor.whiten(means - chosen(means))
        y, delta = factor.times(chosen(U), z), factor.times(chosen(U) - U, z) + shift
        # A sum of products that overflow may be NaN; the component is then infinitely less probable.
        differences = (delta * (y - 0.5 * delta)).sum(-1)
        return offsets - chosen(offsets) + differences.masked_fill(differences.isnan(), -math.inf)

    def _check_range(self, values: Tensor, x: Tensor) -> None:
        """Raise a ValueError if log-densities (*S, *B) of points (*S, *B, D) exceed the range of their dtype."""
        if not self._validate_args or not concrete(values):
            return
        bad = ~(values.detach() > _LEAST[values.dtype])
        if bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            points = x.detach().expand(*bad.shape, self.features)
            largest, name = float(points[tuple(place)].abs().amax()), str(values.dtype).removeprefix("torch.")
            row = place[0] if len(place) == 1 else tuple(place)
            remedy = "pass float64, or rescale the columns" if name == "float32" else "rescale the columns"
            raise ValueError(
                f"x reaches {largest:.3g} in row {row if place else 0}, so far from all components that squared distances "
                f"overflow {name}; {remedy}."
            )

    def _points(self, value: Any) -> Tensor:
        x = recordable(as_tensor(table_of(value, self.columns), name="x"))
        if x.ndim == 0 or x.shape[-1] != self.features:
            raise ValueError(
                f"x must have {self.features} columns, shape (*, {self.features}), got {tuple(x.shape)}; "
                "pass the same columns as the model has."
            )
        if x.device != self.means.device:
            raise ValueError(f"x is on {x.device} but the mixture on {self.means.device}; move one with .to().")
        self._broadcast(x[..., 0], x, "points")
        return x

    def _broadcast(self, leading: Tensor, given: Tensor, name: str) -> Tensor:
        """A tensor ``leading`` of the leading dimensions of ``given``, broadcast with the batch of mixtures to (*S, *B)."""
        if not self.batch_shape:
            return leading
        # torch.broadcast_shapes imports SymPy, which takes a second and 50 MB.
        try:
            return torch.broadcast_tensors(leading, self.logits[..., 0])[0]
        except RuntimeError:
            raise ValueError(
                f"{name} of shape {tuple(given.shape)} do not fit a batch of mixtures of shape {tuple(self.batch_shape)}; "
                "their leading dimensions must broadcast."
            ) from None

    def _flat(self, value: Any) -> tuple[Tensor, Tensor]:
        if self.batch_shape:
            raise ValueError(
                f"this method needs one mixture, got a batch of shape {tuple(self.batch_shape)}; index its parameters first."
            )
        x = self._points(value)
        return x, x.reshape(-1, self.features)

    def __repr__(self) -> str:
        batch = f"batch={tuple(self.batch_shape)}, " if self.batch_shape else ""
        tied = "tied " if self.factor.leading == 1 and self.components > 1 else ""
        return (
            f"Mixture({batch}components={self.components}, features={self.features}, factor={tied}{self.factor.family})"
        )
