r"""Gaussian mixtures as torch distributions, parameterized by weights, means and precision factors.

The methods of the class are implemented in other modules: ``densities`` (log-densities), ``posteriors`` (responsibilities and
labels), ``quantiles``, ``draws`` (sampling), ``marginals`` and ``parameters`` (conversion and validation).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints

from gmmkeops._checks import FormerName, accepts, as_device
from gmmkeops.components import Factor, as_tensor
from gmmkeops.models import densities, draws, marginals, posteriors, quantiles
from gmmkeops.models.arguments import MIXTURE
from gmmkeops.models.kept import KEPT
from gmmkeops.models.parameters import as_logits, as_means_and_factor, check_shapes, check_values, log_weights
from gmmkeops.models.selecting import indexed, select
from gmmkeops.models.tables import mixture_table
from gmmkeops.reductions import recordable

__all__ = ["Mixture", "as_mixture", "log_weights"]


def as_mixture(value: Any, name: str = "mixture") -> Mixture:
    """Check that a value is a single mixture, and return it.

    Raises:
        TypeError: The value is not a mixture.
        ValueError: The value is a batch of mixtures.
    """
    if not isinstance(value, Mixture):
        remedy = f"pass its {'mixture_' if hasattr(value, 'mixture_') else 'mixture'}"
        if not hasattr(value, "mixture_") and not hasattr(value, "mixture"):
            remedy = "create one with Mixture(weights=..., means=..., covariances=...)"
        raise TypeError(f"{name} must be a Mixture, got {type(value).__name__}; {remedy}.")
    if value.batch_shape:
        raise ValueError(
            f"{name} must be one mixture, got a batch of shape {tuple(value.batch_shape)}; select one of them, such as "
            f"{name}[0]."
        )
    return value


class Mixture(Distribution):
    r"""A mixture of K Gaussians in D dimensions, as a :class:`torch.distributions.Distribution`.

    .. math:: p(x) = \sum_k W_k\, \mathcal N(x;\, \mu_k, (U_k U_k^\top)^{-1}), \qquad W = \mathrm{softmax}(\mathrm{logits})

    A mixture is defined by ``logits`` or ``weights``, ``means``, and a precision ``factor`` or ``covariances``. It is
    differentiable with respect to all of them, except weights that are exactly zero, whose gradient is zero.

    Args:
        logits: Unnormalized log-weights (*B, K), nats; -inf for a component of weight zero.
        means: Component means (*B, K, D), data units.
        factor: A precision factor with leading dimension K, or 1 when tied, and the same batch dimensions.
        validate_args: Whether to check the values of parameters and points; shapes are always checked. The default is that
            of all torch distributions: True, unless ``torch.distributions.Distribution.set_default_validate_args`` has been
            called (as by ``torch.compile``). Without checks the log-density is NaN at points with NaN and -inf at infinite
            points. Values cannot be checked while torch compiles or exports, or within ``torch.func.vmap``.
        weights: Weights (*B, K) instead of logits: nonnegative, with a sum of one.
        covariances: Covariances instead of a factor, in the shapes of scikit-learn and tgmm, squared data units: "full"
            (*B, K, D, D), "tied" or "tied_full" (*B, D, D), "diag" (*B, K, D), "spherical" (*B, K), "tied_diag" (*B, D),
            "tied_spherical" (*B).
        covariance_type: Type of the covariances, one of the names above; "full" by default.

    Attributes:
        columns: Names of the D columns, or None. Data with column names (tables, files) are matched by name, data without
            names by position; see :meth:`named`.

    Raises:
        TypeError: An argument is missing or redundant, or the factor is not a :class:`Factor`.
        ValueError: Shapes or devices do not match; means or factors are not finite; logits are NaN, +inf, or all -inf;
            weights are negative or do not sum to one; or a covariance is not positive definite.

    Reference:
        McLachlan and Peel 2000, *Finite Mixture Models*.

    Example:
        >>> import torch, gmmkeops as gk
        >>> mixture = gk.Mixture(
        ...     weights=[0.3, 0.7], means=[[0.0], [4.0]], covariances=[1.0, 1.0], covariance_type="spherical"
        ... )
        >>> mixture.log_prob(torch.tensor([[4.0]], dtype=torch.float64)).exp().round(decimals=4)
        tensor([0.2793], dtype=torch.float64)
        >>> len(mixture), mixture[1].means.tolist()
        (2, [[4.0]])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False
    columns: tuple[str, ...] | None = None

    @accepts(wrong=MIXTURE)
    def __init__(
        self,
        logits: Any = None,
        means: Any = None,
        factor: Factor | None = None,
        validate_args: bool | None = None,
        *,
        weights: Any = None,
        covariances: Any = None,
        covariance_type: str | None = None,
    ) -> None:
        if means is None or (logits is None) == (weights is None) or (factor is None) == (covariances is None):
            raise TypeError(
                "Mixture needs means=, either weights= or logits=, and either covariances= (with covariance_type=) or factor=."
            )
        if covariance_type is not None and covariances is None:
            raise TypeError("covariance_type can only be given with covariances=, got a factor; omit covariance_type.")
        if weights is not None:
            logits, means = as_logits(weights, means)
        if covariances is not None:
            means, factor = as_means_and_factor(means, covariances, covariance_type or "full")
        assert factor is not None, "a factor or covariances are given"
        abstract = validate_args is False
        logits = recordable(as_tensor(logits, name="logits", abstract=abstract))
        means = recordable(as_tensor(means, name="means", abstract=abstract))
        check_shapes(logits, means, factor)
        if self._validate_args if validate_args is None else validate_args:
            check_values(logits, means, factor)
        self.logits, self.means, self.factor = logits, means, factor
        super().__init__(means.shape[:-2], means.shape[-1:], validate_args)

    @classmethod
    def from_valid(cls, logits: Tensor, means: Tensor, factor: Factor, validate_args: bool | None = None) -> Mixture:
        """Create a mixture without checking the values of its parameters.

        Args:
            logits, means, factor: Valid parameters, as for the class.
            validate_args: Whether to check the points at which the mixture is evaluated.
        """
        mixture = cls.__new__(cls)
        check_shapes(logits, means, factor)
        mixture.logits, mixture.means, mixture.factor = recordable(logits), recordable(means), factor
        Distribution.__init__(mixture, means.shape[:-2], means.shape[-1:], validate_args)
        return mixture

    def _like(self, logits: Tensor, means: Tensor, factor: Factor) -> Mixture:
        """Create a mixture from parameters that were computed from those of this one, with its ``validate_args``."""
        return self.from_valid(logits, means, factor, vars(self).get("_validate_args"))

    @classmethod
    def from_parameters(
        cls, weights: Any, means: Any, covariances: Any, covariance_type: str = "full", *, features: int | None = None
    ) -> Mixture:
        """Create a mixture from weights, means and covariances, like ``Mixture(weights=weights, ...)``.

        Args:
            weights, means, covariances, covariance_type: As for the class.
            features: Unused; D is the number of columns of the means.

        Raises:
            ValueError: As for the class.

        Example:
            >>> import gmmkeops as gk
            >>> gk.Mixture.from_parameters([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.5, 1.0]]])
            Mixture(components=1, features=2, factor=full)
        """
        return cls(weights=weights, means=means, covariances=covariances, covariance_type=covariance_type)

    def named(self, columns: Sequence[str] | None) -> Mixture:
        """Return a copy of the mixture with column names, which :func:`gmmkeops.save` stores.

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
        if columns is not None and (len(set(names)) != self.n_features or len(names) != self.n_features or not strings):
            raise ValueError(
                f"columns must be {self.n_features} different strings, one for each column, got {columns!r}."
            )
        mixture = copy.copy(self)
        mixture.columns = None if columns is None else tuple(map(str, names))
        return mixture

    # Methods whose definitions are functions of a mixture.
    log_prob = densities.log_prob
    log_joint = densities.log_joint
    entropy = densities.entropy
    responsibilities = posteriors.responsibilities
    predict = posteriors.predict
    cdf = quantiles.cdf
    icdf = quantiles.icdf
    quantile = quantiles.quantile
    sample = draws.sample
    marginal = marginals.marginal
    condition = marginals.condition
    select = select

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.means.shape[-2]

    @property
    def n_features(self) -> int:
        """Number of columns D."""
        return self.means.shape[-1]

    components = FormerName("n_components")
    features = FormerName("n_features")

    @property
    def tied(self) -> bool:
        """Whether several components share one covariance."""
        return self.factor.leading == 1 and self.n_components > 1

    @property
    def covariance_type(self) -> str:
        """Covariance type as in scikit-learn, such as "full" or "tied"; else the name of the component family."""
        return self.factor.type_name(self.tied)

    @property
    def log_weights(self) -> Tensor:
        """Normalized log-weights (*B, K), nats."""
        return torch.log_softmax(self.logits, -1)

    @property
    def weights(self) -> Tensor:
        """Weights (*B, K), summing to one."""
        return torch.softmax(self.logits, -1)

    @property
    def covariances(self) -> Tensor:
        """Covariances of the components in the shape of :attr:`covariance_type`, squared data units.

        Example:
            >>> import gmmkeops as gk
            >>> m = gk.Mixture(weights=[1.0], means=[[0.0, 0.0]], covariances=[[1.0, 4.0]], covariance_type="diag")
            >>> m.covariances.round(decimals=6).tolist()
            [[1.0, 4.0]]
        """
        return self._compact(self.factor.covariances())

    @property
    def precisions(self) -> Tensor:
        """Inverses of the covariances in the shape of :attr:`covariance_type`, 1 / squared data units."""
        return self._compact(self.factor.precisions())

    def _compact(self, matrices: Tensor) -> Tensor:
        """Convert matrices (*B, K or 1, D, D) to scikit-learn's shape."""
        compact = self.factor.compact(matrices)
        return compact.select(len(self.batch_shape), 0) if self.tied else compact

    @property
    def offsets(self) -> Tensor:
        """Offsets log W + log |det U| - D/2 log 2π (*B, K) of the exponents in the reductions, nats."""
        return self.log_weights + self.factor.log_determinant() - 0.5 * self.n_features * math.log(2 * math.pi)

    @property
    def parameter_count(self) -> int:
        """Number of free parameters in weights, means and covariances."""
        K, D = self.n_components, self.n_features
        return K - 1 + K * D + type(self.factor).count(K, D, self.tied)

    @property
    def mixture_distribution(self) -> Categorical:
        """Categorical distribution of the component index."""
        return Categorical(logits=self.logits)

    @property
    def component_distribution(self) -> Distribution:
        """Gaussian components as a torch distribution with batch shape (*B, K)."""
        return self.factor.distribution(self.means)

    @property
    def mean(self) -> Tensor:
        """Mean of the whole mixture (*B, D), data units."""
        return (self.weights.unsqueeze(-1) * self.means).sum(-2)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance of the whole mixture (*B, D, D), squared data units."""
        weights = self.weights[..., None, None]
        between = (self.means - self.mean.unsqueeze(-2)).unsqueeze(-1)
        return (weights * (self.factor.covariances() + between @ between.mT)).sum(-3)

    @property
    def variance(self) -> Tensor:
        """Variances of the whole mixture (*B, D), squared data units."""
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """Expand the batch shape to ``batch_shape`` without copying the parameters."""
        batch_shape = torch.Size(batch_shape)
        return self._like(
            self.logits.expand(*batch_shape, self.n_components),
            self.means.expand(*batch_shape, self.n_components, self.n_features),
            self.factor.expand(batch_shape),
        ).named(self.columns)

    def __len__(self) -> int:
        """Return the number of components K, also for a batch of mixtures."""
        return self.n_components

    def __getitem__(self, index: Any) -> Mixture:
        """Select components of one mixture, or entries of a batch of mixtures.

        Args:
            index: For one mixture, an int, a slice, a list of ints or a Boolean mask over the K components; the weights of the
                selected components are normalized, and an int gives a mixture of one component. For a batch of mixtures, an
                index for a tensor of shape ``batch_shape``.

        Raises:
            IndexError: An index is out of range, or no component is selected.
            TypeError: The argument is not a valid index.
        """
        return indexed(self, index)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != KEPT}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # numpy must treat a mixture as one object, not as a sequence of components.
        whole = np.empty((), dtype=object)
        whole[()] = self
        return whole

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
        """Return a copy of the mixture that is detached from the autograd graph."""
        logits, means = self.logits.detach().clone(), self.means.detach().clone()
        return self._like(logits, means, self.factor.detach()).named(self.columns)

    def score(self, x: Any, *, sample_weight: Any = None) -> float:
        """Compute the mean log-density of points, nats per point; see :func:`gmmkeops.analysis.score`."""
        from gmmkeops import analysis

        return analysis.score(self, x, sample_weight=sample_weight)

    def bic(self, x: Any, *, sample_weight: Any = None) -> float:
        """Compute the Bayesian information criterion (the lower the better); see :func:`gmmkeops.analysis.bic`."""
        from gmmkeops import analysis

        return analysis.bic(self, x, sample_weight=sample_weight)

    def aic(self, x: Any, *, sample_weight: Any = None) -> float:
        """Compute the Akaike information criterion (the lower the better); see :func:`gmmkeops.analysis.aic`."""
        from gmmkeops import analysis

        return analysis.aic(self, x, sample_weight=sample_weight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mixture to a file; see :func:`gmmkeops.save` and :func:`gmmkeops.load`."""
        from gmmkeops.models.files import save

        save(self, path)

    def __repr__(self) -> str:
        batch = f"batch={tuple(self.batch_shape)}, " if self.batch_shape else ""
        family = ("tied " if self.tied else "") + self.factor.family
        return f"Mixture({batch}components={self.n_components}, features={self.n_features}, factor={family})"

    def _repr_html_(self) -> str:
        return mixture_table(self)
