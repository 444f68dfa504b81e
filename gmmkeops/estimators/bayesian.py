"""Variational Bayesian mixtures with scikit-learn's interface."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_choice, as_integer, as_number, renamed
from gmmkeops.bayes import NormalWishart, VariationalBayes
from gmmkeops.components import as_tensor, check_finite, factor_class
from gmmkeops.data import Source
from gmmkeops.estimators.arrays import as_array
from gmmkeops.estimators.base import MixtureEstimator
from gmmkeops.fitting import FitResult, Method, Start
from gmmkeops.models import Mixture

__all__ = ["BayesianGaussianMixture"]

WEIGHTS = ("dirichlet_process", "dirichlet_distribution")

# Attributes that define the posterior.
_POSTERIOR = ("weight_concentration_", "mean_precision_", "means_", "degrees_of_freedom_", "covariances_")


class BayesianGaussianMixture(MixtureEstimator):
    r"""Variational Bayesian Gaussian mixture with scikit-learn's parameters, methods and attributes.

    .. math:: q(\pi)\, q(\mu, \Lambda) \approx p(\pi, \mu, \Lambda \mid x), \qquad \mu_k \mid \Lambda_k \sim
              \mathcal N(m_k, (\kappa_k \Lambda_k)^{-1}), \quad \Lambda_k \sim \mathcal W(V_k, \nu_k)

    As in scikit-learn, ``predict``, ``predict_proba`` and ``score_samples`` use the expected log-densities under the posterior.
    ``posterior_.predictive()`` returns the predictive density, a mixture of Student's t distributions. ``mixture_`` is the
    plug-in mixture with the expected weights, means and precisions. ``posterior_.sample(1000)`` draws 1000 mixtures. The
    conventions for diagonal, spherical and tied priors are those of scikit-learn.

    Args:
        n_components: Maximum number of components K.
        covariance_type: As for :class:`GaussianMixture`.
        tol: Convergence tolerance: the fit has converged when the lower bound changes by less in an iteration, nats per point.
            scikit-learn compares the change of the bound summed over all points with its ``tol``. Its default of 1e-3
            corresponds to 1e-6 nats per point for 1000 points.
        reg_covar, max_iter, n_init, random_state, verbose, verbose_interval: As for :class:`GaussianMixture`.
        init_params: As for :class:`GaussianMixture`, but "auto" compares posteriors. A mixture with at most ``n_components``
            components is merged step by step. Posteriors are fitted from the mixture of these steps with the lowest BIC, from its
            neighbors, and from k-means, with at most 100 iterations each. The fit begins with the mixture of the posterior with
            the highest bound.
        weight_concentration_prior_type: "dirichlet_process" (stick-breaking) or "dirichlet_distribution".
        weight_concentration_prior: Concentration of the Dirichlet process or distribution; 1 / K if None.
        mean_precision_prior: Prior precision κ of the means, as a number of pseudo-observations; 1 if None.
        mean_prior: Prior mean (D,), data units; the mean of the data if None.
        degrees_of_freedom_prior: Degrees of freedom of the Wishart prior, greater than D - 1; D if None.
        covariance_prior: Prior covariance: (D, D) for full and tied, (D,) for diagonal, a number for spherical types, squared
            data units; the covariance of the data if None.
        warm_start: Initialize with the fitted posterior, and include the last fit in the test of convergence. A new fit starts if
            ``n_components``, ``covariance_type``, ``weight_concentration_prior_type`` or the columns have changed.
        batch_size: Number of points per natural-gradient step, or None to use all points in each step.
        accelerate: Whether to extrapolate by SQUAREM, as for :class:`gmmkeops.bayes.VariationalBayes`.
        device, dtype, backend, truncate, checkpoint, max_memory: As for :class:`GaussianMixture`.

    Attributes:
        weight_concentration_: Posterior concentrations (K,); for stick-breaking, the pair of Beta parameters, (K,) each.
        mean_precision_: Posterior precisions κ (K,) of the means.
        means_: Posterior means m (K, D), data units.
        degrees_of_freedom_: Posterior degrees of freedom ν (K,), or a number when tied.
        covariances_: Inverses of the expected precisions, in the shapes of :class:`GaussianMixture`, squared data units.
        weights_: Weights (K,) of ``mixture_``.
        precisions_: Precisions of ``mixture_``, as for :class:`GaussianMixture`.
        precisions_cholesky_: Precision factors of ``mixture_``.
        weight_concentration_prior_, mean_precision_prior_, mean_prior_, degrees_of_freedom_prior_, covariance_prior_: Parameters
            of the prior, including defaults.
        lower_bound_: Lower bound of the log-evidence of all points without constants, nats, as in scikit-learn.
        lower_bounds_: List of the lower bounds of the iterations, nats.
        evidence_bound_: Lower bound of the log-evidence with all constants and optimal responsibilities, nats, for the
            comparison of models.
        posterior_: The posterior, a :class:`~gmmkeops.bayes.NormalWishart`.
        mixture_: The plug-in :class:`~gmmkeops.Mixture`. The attributes ``converged_``, ``n_iter_``, ``result_``,
            ``n_features_in_`` and ``feature_names_in_`` are as for :class:`GaussianMixture`.

    Reference:
        Blei and Jordan 2006, *Variational inference for Dirichlet process mixtures*, Bayesian Analysis 1.

    Raises:
        TypeError, ValueError, sklearn.exceptions.NotFittedError: As for :class:`GaussianMixture`.

    Example:
        >>> import numpy as np
        >>> from gmmkeops import BayesianGaussianMixture
        >>> X = np.array([[1, 2], [1, 4], [1, 0], [4, 2], [12, 4], [10, 7]])
        >>> bgm = BayesianGaussianMixture(n_components=2, random_state=42).fit(X)
        >>> [float(m) for m in sorted(bgm.means_[:, 0].round(1))]
        [2.5, 8.4]
    """

    def __init__(
        self,
        *,
        n_components: int = 1,
        covariance_type: str = "full",
        tol: float = 1e-6,
        reg_covar: float = 1e-6,
        max_iter: int = 1000,
        n_init: int = 1,
        init_params: str = "auto",
        weight_concentration_prior_type: str = "dirichlet_process",
        weight_concentration_prior: float | None = None,
        mean_precision_prior: float | None = None,
        mean_prior: Any = None,
        degrees_of_freedom_prior: float | None = None,
        covariance_prior: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        batch_size: int | None = None,
        accelerate: bool = False,
        device: Any = None,
        dtype: Any = None,
        backend: str = "auto",
        truncate: float | None = None,
        checkpoint: Any = None,
        max_memory: Any = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weight_concentration_prior_type = weight_concentration_prior_type
        self.weight_concentration_prior = weight_concentration_prior
        self.mean_precision_prior = mean_precision_prior
        self.mean_prior = mean_prior
        self.degrees_of_freedom_prior = degrees_of_freedom_prior
        self.covariance_prior = covariance_prior
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.batch_size = batch_size
        self.accelerate = accelerate
        self.device = device
        self.dtype = dtype
        self.backend = backend
        self.truncate = truncate
        self.checkpoint = checkpoint
        self.max_memory = max_memory

    def _check(self) -> None:
        super()._check()
        as_choice(self.weight_concentration_prior_type, "weight_concentration_prior_type", WEIGHTS)
        for name in ("weight_concentration_prior", "mean_precision_prior", "degrees_of_freedom_prior"):
            if getattr(self, name) is not None:
                as_number(getattr(self, name), name, 0, above=True)
        if self.batch_size is not None:
            as_integer(self.batch_size, "batch_size", 1)
        for name in ("mean_prior", "covariance_prior"):
            if getattr(self, name) is not None:
                value = as_tensor(getattr(self, name), name=name, dtype=torch.float64)
                check_finite(value.reshape(-1), name=name, rows="entry")

    def _check_columns(self, features: int) -> None:
        D, nu = features, self.degrees_of_freedom_prior
        if nu is not None and not nu > D - 1:
            raise ValueError(f"degrees_of_freedom_prior must be greater than {D - 1} for {D} columns, got {nu:g}.")
        shapes: dict[str, tuple[int, ...]] = {
            "mean_prior": (D,),
            "covariance_prior": factor_class(self.covariance_type)[0].spread_shape(D),
        }
        for name, shape in shapes.items():
            if getattr(self, name) is None:
                continue
            value = as_tensor(getattr(self, name), name=name, dtype=torch.float64)
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape} for covariance_type={self.covariance_type!r} and {D} columns, got "
                    f"{tuple(value.shape)}."
                )
            if name == "covariance_prior":
                with renamed("covariances", name):
                    factor_class(self.covariance_type)[0].from_covariances(value[None], features=D)

    def _method(self, warm: bool) -> Method[Any]:
        kappa = self.mean_precision_prior
        return VariationalBayes(
            weights=self.weight_concentration_prior_type,
            concentration=self.weight_concentration_prior,
            mean_precision=1.0 if kappa is None else float(kappa),
            means=self.mean_prior,
            degrees=self.degrees_of_freedom_prior,
            covariances=self.covariance_prior,
            begin=self._remembered() if warm else None,
            batch_size=self.batch_size,
            accelerate=self.accelerate,
            reg_covar=float(self.reg_covar),
            max_iter=self.max_iter,
            tol=float(self.tol),
        )

    def _initial(
        self, x: Tensor | Source, g: Any, generator: torch.Generator, device: torch.device, fits: bool = True
    ) -> Start:
        found = None
        if self.init_params == "auto":
            options: Any = {"sample_weight": g, "generator": generator, "backend": self.backend}
            options |= {"truncate": self.truncate, "dtype": self.dtype, "max_memory": self.max_memory}
            found = self._method(False).start(
                x, self.wanted_components or 1, covariance_type=self.covariance_type, **options
            )
        start = self._by_init_params(x, g, generator, fits) if found is None else Start(*found)
        return start._replace(mixture=start.mixture.to(device))

    def _last(self, shape: tuple[int, int]) -> Mixture | None:
        if not all(hasattr(self, name) for name in _POSTERIOR) or tuple(self.means_.shape) != shape:
            return None
        sticks = self.weight_concentration_prior_type == "dirichlet_process"
        if isinstance(self.weight_concentration_, tuple) is not sticks or (self.fitted_ and not self._same_model()):
            return None
        return self._remembered().mixture

    def _remembered(self) -> NormalWishart:
        """Reconstruct the posterior from the fitted attributes."""
        kind, tied = factor_class(self.covariance_type)

        def tensor(name: str) -> Tensor:
            value = getattr(self, name)
            value = torch.stack([torch.as_tensor(part) for part in value]) if isinstance(value, tuple) else value
            return torch.as_tensor(value, dtype=torch.float64)

        covariances = tensor("covariances_")
        return NormalWishart.of(
            kind,
            tensor("weight_concentration_"),
            tensor("mean_precision_"),
            tensor("means_"),
            tensor("degrees_of_freedom_").reshape(-1),
            covariances[None] if tied else covariances,
        )

    def _set_results(self, best: FitResult) -> None:
        q, tensors = best.posterior, self._tensors
        tied = factor_class(self.covariance_type)[1]

        def shown(posterior: NormalWishart, name: str) -> Any:
            values = getattr(posterior, name)
            return as_array(values[0] if tied else values, tensors)

        a = q.concentration
        self.weight_concentration_ = tuple(as_array(part, tensors) for part in a) if q.sticks else as_array(a, tensors)
        self.mean_precision_ = as_array(q.mean_precision, tensors)
        self.degrees_of_freedom_ = float(q.degrees[0]) if tied else as_array(q.degrees, tensors)
        prior = q.prior
        self.weight_concentration_prior_ = float(prior.concentration.reshape(-1)[-1])
        self.mean_precision_prior_, self.degrees_of_freedom_prior_ = (
            float(prior.mean_precision[0]),
            float(prior.degrees[0]),
        )
        self.mean_prior_ = as_array(prior.mixture.means[0], tensors)
        self.covariance_prior_ = as_array(prior.covariances[0] * prior.degrees[0], tensors)
        mass = best.report.total_weight
        constant = float(prior.normalizer()) + 0.5 * math.log(2 * math.pi) * mass * q.mixture.n_features
        self.lower_bounds_ = [constant - mass * value for value in best.history["objective"]]
        self.evidence_bound_ = -mass * best.objective
        self.lower_bound_ = self.lower_bounds_[-1] if self.lower_bounds_ else constant + self.evidence_bound_
        self.posterior_ = q

    def _predictive(self) -> tuple[Mixture, float]:
        return self.posterior_.expectation()
