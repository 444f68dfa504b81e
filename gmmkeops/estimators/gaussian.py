r"""Gaussian mixtures with scikit-learn's interface, based on :func:`gmmkeops.fit`.

scikit-learn is not required; if it is installed, ``clone``, pipelines and parameter searches work. Names and shapes are those
of ``sklearn.mixture`` (Pedregosa et al. 2011, *Scikit-learn: machine learning in Python*).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from gmmkeops import analysis, models
from gmmkeops._checks import renamed
from gmmkeops.components import Factor, as_tensor, check_finite, factor_class
from gmmkeops.data import Source, World, as_weights, readable
from gmmkeops.estimators import routing
from gmmkeops.estimators.arrays import scikit_learn_names, validated_points
from gmmkeops.estimators.base import MixtureEstimator, features_of
from gmmkeops.estimators.saved import packed, unpacked
from gmmkeops.estimators.settings import combined_method
from gmmkeops.estimators.warm_start import Trace
from gmmkeops.fitting import EM, Adam, FitResult, Method, Start, StartReport, has_few_points, within_prior
from gmmkeops.models import Mixture, as_mixture, generator_of
from gmmkeops.penalties import CovariancePrior

__all__ = ["GaussianMixture"]

# Attributes that are not saved: those computed from the mixture, and the requests of scikit-learn's metadata routing.
_NOT_STORED = (
    "_metadata_request",
    "mixture_",
    "weights_",
    "means_",
    "covariances_",
    "precisions_",
    "precisions_cholesky_",
    "n_components_",
    "n_features_in_",
    "feature_names_in_",
    "selection_",
)


# Tolerance and maximum number of iterations of the fits of a selection, whose criteria are compared.
_SELECTION_TOL, _SELECTION_ITERATIONS = 1e-4, 1000


@lru_cache(maxsize=8)
def _em(reg_covar: float, max_iter: int, tol: float) -> EM:
    """Return EM for validated settings, of which a fit of few points would otherwise spend a twentieth of its time on checks."""
    return EM(reg_covar=reg_covar, max_iter=max_iter, tol=tol)


class GaussianMixture(MixtureEstimator):
    r"""Gaussian mixture with scikit-learn's parameters, methods and attributes.

    .. math:: \max_\theta\; \frac{1}{\sum g} \sum_n g_n \log \sum_k W_k\, \mathcal N(x_n;\, \mu_k, \Sigma_k)
              - \text{penalty}(\theta)

    with sample weights g, and parameters θ: weights W, means μ and covariances Σ of the components.

    Args:
        n_components: Number of components K. ``"auto"`` chooses it by :func:`gmmkeops.analysis.select` with its default criterion
            and at most 100 components. It cannot be combined with ``n_init``, ``init_params``, initial parameters, a checkpoint
            or ``validation``. If neither ``tol`` nor ``max_iter`` is set and ``solver`` is "em", the fits have a tolerance of
            1e-4 nats per point and at most 1000 iterations.
        covariance_type: "full", "tied" (or "tied_full"), "diag", "spherical", "tied_diag" or "tied_spherical".
        solver: "em", "adam", or a method such as ``gmmkeops.EM(accelerate=True)``. ``tol``, ``max_iter`` and ``reg_covar``
            may be set in the method or in the estimator. Different values in both, neither of which is the default, raise an
            error. An option that is set in neither has the default of the method.
        penalty: A penalty (:mod:`gmmkeops.penalties`) or a function of a mixture, nats per point.
        prior: None for the maximum of the likelihood, as in scikit-learn. "auto" adds a prior of the covariances if N < 10 K P,
            where P is the number of parameters of a component. Its effect on each covariance is that of D + 2 pseudo-points with
            the mean covariance of the components of the initial mixture (:class:`gmmkeops.penalties.CovariancePrior`). Not
            supported by ``partial_fit``.
        tol: Convergence tolerance of the mean log-likelihood (or penalized objective), nats per point; see :class:`gmmkeops.EM`.
        reg_covar: Constant that EM adds to the diagonals of the covariances, squared data units. Adam does not support it.
        max_iter: Maximum number of iterations.
        n_init: Number of initializations, of which the best one is kept. A search compares them itself, before a single fit, and
            ends when the best optimum has been found twice, or no better one in four runs.
        init_params: "auto" (k-means in two metrics, then rounds of splitting and merging components, on a sample; see
            :func:`gmmkeops.initialize`), "split-merge", "annealed", or without a search "kmeans" (the default of scikit-learn),
            "k-means++" (or "kpp"), "random" (responsibilities), "random_from_data" (or "points").
        weights_init, means_init, precisions_init: Initial weights (K,), means (K, D), data units, and precisions in the shape of
            the covariances, 1 / squared data units. If None, they are computed by ``init_params``.
        random_state: None, an int, or a numpy ``RandomState`` or ``Generator``. None uses a fixed seed, so that results are
            reproducible. Global random states are neither used nor changed.
        warm_start: Initialize with the parameters of the last fit, and include its iterations in the test of convergence. A new
            fit starts if ``n_components``, ``covariance_type`` or the columns have changed.
        verbose: Write a line to stderr every ``verbose_interval`` iterations; with 2 or more, show a progress bar in a terminal
            instead.
        verbose_interval: Number of iterations between two lines of output.
        device: Device of the computation, e.g. "cuda"; by default that of the data.
        dtype: Precision of the computation and of densities and probabilities, "float32" or "float64". By default it is float32
            for float32 data, else float64. A fit switches to float64 if float32 is not accurate enough.
        backend: "auto", "native", "keops", "triton" or "dense".
        truncate: Largest fraction of the density of a point that may be neglected (:func:`gmmkeops.fit`); 0 evaluates all
            point-component pairs; None uses 1e-6 in float32 and 1e-12 in float64, if this saves time.
        checkpoint: A path, or a :class:`~gmmkeops.Checkpoint`, to which the state of the fit is written and from which it
            resumes; requires ``n_init=1``.
        max_memory: Memory limit of a fit, in bytes or as a string such as "1.5GB" (:func:`gmmkeops.fit`).
        validation: Held-out points, a source, or the fraction of the points that is held out: the mixture with the highest mean
            log-likelihood of held-out points is kept (:func:`gmmkeops.fit`). Not supported by ``partial_fit``, nor by
            ``n_components="auto"``, whose criteria need all points.

    Attributes:
        weights_: Weights (K,). All parameters are float64 numpy arrays, or tensors if the data were a tensor.
        means_: Means (K, D), data units.
        covariances_: Covariances (K, D, D), (K, D) or (K,), without the dimension K when tied; squared data units.
        precisions_: Inverses of the covariances, in the same shapes, 1 / squared data units.
        precisions_cholesky_: Upper-triangular factors U of the precisions :math:`U U^\top`, 1 / data units.
        converged_: Whether the fit converged to the tolerance.
        n_iter_: Number of iterations of the last ``fit``, or of batches of ``partial_fit``.
        lower_bound_: Mean log-likelihood minus penalty of the fitted parameters, nats per point.
        lower_bounds_: List of the lower bounds before each iteration, nats per point.
        n_components_: Number of components K.
        selection_: The :class:`~gmmkeops.analysis.Selection`; exists only after ``fit`` with ``n_components="auto"``.
        mixture_: The fitted :class:`~gmmkeops.Mixture`.
        result_: The :class:`~gmmkeops.FitResult` of the best fit; exists only after ``fit``.
        n_features_in_: Number of columns D.
        feature_names_in_: Names of the columns; exists only if the data had names.

    Raises:
        TypeError, ValueError: (by ``fit`` and methods with points) Parameters are invalid; points are not numeric, not finite,
            have other columns than the model, or are fewer than the components.
        sklearn.exceptions.NotFittedError: (by methods that need a fitted model) The model is not fitted.

    Example:
        >>> import numpy as np
        >>> from gmmkeops import GaussianMixture
        >>> X = np.array([[1, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
        >>> gm = GaussianMixture(n_components=2, random_state=0).fit(X)
        >>> sorted(gm.means_.round(6).tolist())
        [[1.0, 2.0], [10.0, 2.0]]
        >>> bool(gm.predict([[0, 0]])[0] == gm.predict([[1, 1]])[0])
        True
    """

    def __init__(
        self,
        n_components: int | str = 1,
        *,
        covariance_type: str = "full",
        solver: str | Method[Any] = "em",
        penalty: Any = None,
        prior: str | None = None,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "auto",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        device: Any = None,
        dtype: Any = None,
        backend: str = "auto",
        truncate: float | None = None,
        checkpoint: Any = None,
        max_memory: Any = None,
        validation: Any = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.solver = solver
        self.penalty = penalty
        self.prior = prior
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.device = device
        self.dtype = dtype
        self.backend = backend
        self.truncate = truncate
        self.checkpoint = checkpoint
        self.max_memory = max_memory
        self.validation = validation

    @property
    def partial_fit(self) -> Callable[..., GaussianMixture]:
        """Method ``partial_fit(X, y=None, sample_weight=None)``: one step of stepwise EM on a batch; returns the estimator.

        The first call computes the initial mixture from its batch, which needs at least K points. The moments of the t-th batch
        enter a running average with weight (t + 2)^-0.6, so that the influence of old batches decays. After ``fit``,
        ``from_mixture`` or ``load``, a new running average is initialized with the fitted mixture; after a change of
        ``n_components`` or ``covariance_type``, a new mixture is initialized with the batch. ``partial_fit`` sets ``n_iter_`` to
        the number of batches and ``converged_`` to False, and removes ``lower_bound_``, ``lower_bounds_`` and ``result_``,
        which need a complete training set.

        Raises:
            AttributeError: The solver is not EM.
            TypeError, ValueError: Parameters or data are invalid; the estimator is then unchanged.
        """
        if self.solver != "em" and not isinstance(self.solver, EM):
            raise AttributeError(
                f'partial_fit requires solver="em", got solver={self.solver!r}; use fit, or change the solver.'
            )
        return self._partial_fit

    @scikit_learn_names()
    def _partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> GaussianMixture:
        self._check()
        if self.prior is not None:
            raise ValueError(
                f"partial_fit does not support prior={self.prior!r}, since the number of all points is unknown; use fit, or pass "
                "penalty=gmmkeops.penalties.CovariancePrior(...)."
            )
        if self.validation is not None:
            raise ValueError("partial_fit does not support validation; use fit.")
        method, resumes = cast(EM, self._method(False)), self._same_model()
        if self.wanted_components is None and not resumes:
            raise ValueError(
                'partial_fit requires a number of components, got n_components="auto"; call fit first, or set n_components.'
            )
        minimum = 1 if resumes else max(self.wanted_components or 1, 2)
        x, names = validated_points(self, X, fitting=not resumes, minimum=minimum)
        self._check_columns(x.shape[1])
        g = as_weights(sample_weight, x, name="sample_weight")
        if resumes:
            start, memory = self.mixture_.to(x.device), self._memory
            columns = self.mixture_.columns
        else:
            generator = generator_of(self.random_state, x.device)
            start, memory = self._initial(x, g, generator, x.device, fits=False).mixture, None
            columns = None if names is None else tuple(names)
        if memory is not None:
            memory = (memory[0].to(x.device), *memory[1:])
        mixture, memory = method.update(start, x, memory, penalty=self.penalty, sample_weight=g, backend=self.backend)
        self._adopt(mixture.named(columns), torch.is_tensor(X))
        self._memory, self.n_iter_, self.converged_ = memory, memory[1], False
        return self

    def set_partial_fit_request(self, *, sample_weight: bool | str | None = routing.UNCHANGED) -> GaussianMixture:
        """Set whether ``partial_fit`` requests ``sample_weight``; arguments and errors as for :meth:`set_fit_request`."""
        return routing.request(self, "partial_fit", sample_weight)

    @classmethod
    def from_mixture(cls, mixture: Mixture, **params: Any) -> GaussianMixture:
        """Create an estimator with the parameters of a mixture, which can score, sample and predict without ``fit``.

        The attributes ``converged_``, ``n_iter_``, ``lower_bound_``, ``lower_bounds_`` and ``result_`` are not set.

        Args:
            mixture: A single mixture, data units.
            **params: Further arguments of the constructor; ``covariance_type`` must be that of the mixture.

        Raises:
            TypeError, ValueError: The argument is not a single mixture, or ``covariance_type`` is not that of the mixture.
        """
        as_mixture(mixture)
        tied, name = mixture.tied, mixture.covariance_type
        params.setdefault("covariance_type", name)
        kind, shared = factor_class(params["covariance_type"])
        if kind is not type(mixture.factor) or (mixture.n_components > 1 and shared != tied):
            raise ValueError(
                f"covariance_type must be {name!r} as in the mixture, got {params['covariance_type']!r}; omit it."
            )
        model = cls(mixture.n_components, **params)
        model._adopt(mixture.detach().to(torch.float64), False)
        return model

    def save(self, path: Any) -> None:
        """Write parameters and fitted attributes to a file; see :func:`gmmkeops.save`.

        Raises:
            ValueError: A parameter cannot be stored, such as a function or a numpy ``RandomState``.
        """
        self._require_fitted()
        models.save(self, path)

    @classmethod
    def load(cls, path: Any, device: Any = "cpu") -> GaussianMixture:
        """Read an estimator from a file; a file of a mixture is read as by :meth:`from_mixture`.

        Args:
            path: A file written by :meth:`save` or :func:`gmmkeops.save`.
            device: Device of the parameters.

        Raises:
            FileNotFoundError, ValueError: As :func:`gmmkeops.load`.

        Example:
            >>> import os, tempfile, numpy as np, gmmkeops as gk
            >>> X = np.array([[1.0], [2.0], [3.0], [9.0], [11.0]])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = os.path.join(folder, "model.safetensors")
            ...     gk.GaussianMixture(2, tol=1e-6).fit(X).save(path)
            ...     gk.GaussianMixture.load(path)
            GaussianMixture(n_components=2, tol=1e-06)
        """
        mixture, entry, tensors = models.read(path, device=device)
        if entry is None:
            return cls.from_mixture(mixture)
        try:
            found = unpacked(entry, tensors, mixture, (Trace,))
            model = cls(**found["params"])
            attributes = found["attributes"]
            kind, tied = factor_class(attributes["_fitted_type"])
            if (kind, 1 if tied else mixture.n_components) != (type(mixture.factor), mixture.factor.leading):
                raise ValueError("the mixture has another covariance type")
            model._adopt(mixture, attributes["_tensors"], attributes["_fitted_type"])
            vars(model).update(attributes)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is damaged: its estimator entry cannot be read; save the model again.") from error
        return model

    def _saved(self) -> tuple[Any, list[Tensor]]:
        """Return parameters and fitted attributes for :func:`gmmkeops.save`, except attributes computed from the mixture."""
        tensors: list[Tensor] = []
        params = {name: packed(value, tensors, name) for name, value in self.get_params().items()}
        attributes = {}
        for name, value in vars(self).items():
            if name in params or name in _NOT_STORED or (name == "result_" and value.answer is not None):
                continue
            attributes[name] = packed(value, tensors, name, (Trace,))
        # Converted to dictionaries in the format of ``packed``.
        parts = {"params": params, "attributes": attributes}
        return {
            "dict": [[name, {"dict": [list(item) for item in part.items()]}] for name, part in parts.items()]
        }, tensors

    def _method(self, warm: bool) -> Method[Any]:
        if isinstance(self.solver, Method):
            return combined_method(self, self.solver)
        if isinstance(self.solver, str) and self.solver == "em":
            return _em(float(self.reg_covar), self.max_iter, float(self.tol))
        if isinstance(self.solver, str) and self.solver == "adam":
            if self.reg_covar != self._default("reg_covar"):
                raise ValueError(
                    f'reg_covar={self.reg_covar!r} is not supported by solver="adam"; omit reg_covar, or pass solver="em".'
                )
            return Adam(max_iter=self.max_iter, tol=float(self.tol))
        raise ValueError(f"solver must be 'em', 'adam' or a method such as gmmkeops.EM(), got {self.solver!r}.")

    def _selecting(self, method: Method[Any]) -> Method[Any]:
        if self.solver == "em" and self.tol == self._default("tol") and self.max_iter == self._default("max_iter"):
            return replace(cast(EM, method), tol=_SELECTION_TOL, max_iter=_SELECTION_ITERATIONS)
        return method

    def _selection(
        self, x: Tensor | Source, g: Any, generator: torch.Generator, method: Method[Any]
    ) -> analysis.Selection:
        return analysis.select(
            x,
            "auto",
            [self.covariance_type],
            method=method,
            penalty=self.penalty,
            prior=self.prior,
            sample_weight=g,
            generator=generator,
            truncate=self.truncate,
            backend=self.backend,
            dtype=self.dtype,
            max_memory=self.max_memory,
            callback=self._verbose_callbacks(0),
            verbose=None if self.verbose > 1 else False,
        )

    def _last(self, shape: tuple[int, int]) -> Mixture | None:
        return self.mixture_ if self._same_model() and self.mixture_.means.shape == shape else None

    def _set_results(self, best: FitResult) -> None:
        self.lower_bound_ = -best.objective
        self.lower_bounds_ = [-value for value in best.history["objective"]]

    def _predictive(self) -> tuple[Mixture, float]:
        return self.mixture_, 0.0

    def _initial(
        self, x: Tensor | Source, g: Any, generator: torch.Generator, device: torch.device, fits: bool = True
    ) -> Start:
        wide: Any = {"dtype": torch.float64, "device": device}
        K, D = self.wanted_components or 1, features_of(x)
        logits = means = factor = report = None
        if self.means_init is None or self.weights_init is None or self.precisions_init is None:
            start = self._by_init_params(x, g, generator, fits)
            found = start.mixture if start.mixture.means.device == device else start.mixture.to(device)
            report = start.report
            if self.means_init is self.weights_init is self.precisions_init is None:
                return start._replace(mixture=found)
            logits, means, factor = found.logits, found.means, found.factor
        if self.weights_init is not None:
            weights = as_tensor(self.weights_init, name="weights_init", **wide)
            if weights.shape != (K,) or not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-6:
                raise ValueError(f"weights_init must have shape ({K},), nonnegative entries and a sum of one.")
            logits = weights.log()
        if self.means_init is not None:
            means = as_tensor(self.means_init, name="means_init", **wide)
            if means.shape != (K, D):
                raise ValueError(f"means_init must have shape ({K}, {D}), got {tuple(means.shape)}.")
            check_finite(means, name="means_init", rows="component")
        if self.precisions_init is not None:
            factor = self._given_factor(as_tensor(self.precisions_init, name="precisions_init", **wide), K, D)
        return Start(Mixture(logits, means, factor), report)

    def _penalty(self, x: Tensor | Source, start: Mixture, report: StartReport | None) -> Any:
        if self.prior is None:
            return self.penalty
        if report is not None:
            rows = report.rows
        else:
            own = len(x) if isinstance(x, Tensor) else x.survey(alone=World().size == 1).rows
            rows = sum(World().tell(own))
        if not has_few_points(rows, start):
            return self.penalty
        added = CovariancePrior(*within_prior(start))
        return added if self.penalty is None else self.penalty + added

    def _given_factor(self, precisions: Tensor, K: int, D: int) -> Factor:
        """Convert ``precisions_init`` to precision factors."""
        kind, tied = factor_class(self.covariance_type)
        leading = () if tied else (K,)
        shape = (*leading, *kind.spread_shape(D))
        if tuple(precisions.shape) != shape:
            raise ValueError(f"precisions_init must have shape {shape}, got {tuple(precisions.shape)}.")
        with renamed("precisions", "precisions_init"):
            return kind.from_precisions(precisions[None] if tied else precisions, features=D)

    def bic(self, X: Any) -> float:
        """Compute the Bayesian information criterion (the lower the better); see :func:`gmmkeops.analysis.bic`."""
        return self._criterion(X, analysis.bic)

    def aic(self, X: Any) -> float:
        """Compute the Akaike information criterion (the lower the better); see :func:`gmmkeops.analysis.aic`."""
        return self._criterion(X, analysis.aic)

    def icl(self, X: Any) -> float:
        """Compute the integrated completed likelihood criterion (the lower the better); see :func:`gmmkeops.analysis.icl`."""
        return self._criterion(X, analysis.icl)

    def _criterion(self, X: Any, function: Callable[[Mixture, Any], float]) -> float:
        """Compute an information criterion of the fitted mixture for points."""
        self._require_fitted()
        if readable(X):
            return function(self.mixture_, X)
        x, _ = validated_points(self, X)
        return float(function(self.mixture_.to(x.device), x))
