"""Base class of the estimators: repeated fits, fitted attributes, and the methods of scikit-learn.

Subclasses define the fitting method and the mixture that is used for predictions. Names and shapes are those of
``sklearn.mixture``; the names of the tied covariance types are those of tgmm.
"""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gmmkeops import analysis, reductions
from gmmkeops._checks import ConvergenceWarning, DegenerateWarning, as_device, warn
from gmmkeops.components import as_tensor
from gmmkeops.data import Source, World, as_dtype, as_weights, chunked, readable
from gmmkeops.estimators.arrays import as_array, scikit_learn_names, training_data, validated_points
from gmmkeops.estimators.contract import Estimator, convergence_warning
from gmmkeops.estimators.initialization import STRATEGIES, improves, searches
from gmmkeops.estimators.settings import canonical_type, check_settings, described_settings
from gmmkeops.estimators.warm_start import Continuation, Trace
from gmmkeops.fitting import (
    EM,
    Ending,
    FitResult,
    Method,
    Start,
    StartReport,
    Step,
    describe,
    fit,
    split_off,
    started,
    too_few_points,
)
from gmmkeops.models import Mixture, generator_of

__all__ = ["MixtureEstimator", "features_of"]

Self = TypeVar("Self", bound="MixtureEstimator")

# Parameters that may differ between ranks. All ranks use the random_state of rank 0.
_PER_RANK = ("checkpoint", "device", "random_state", "verbose", "verbose_interval")


class MixtureEstimator(Estimator, ABC):
    """Base class of the estimators, which predict by means of a mixture."""

    _estimator_type = "density_estimator"

    # Constructor parameters that all estimators have.
    n_components: int | str
    covariance_type: str
    tol: float
    reg_covar: float
    max_iter: int
    n_init: int
    init_params: str
    random_state: Any
    warm_start: bool
    verbose: int
    verbose_interval: int
    device: Any
    dtype: Any
    backend: str
    truncate: float | None
    checkpoint: Any
    max_memory: Any

    mixture_: Mixture
    # History for warm starts, and the running average of moments for partial_fit.
    _trace: Trace | None = None
    _memory: Any = None

    @abstractmethod
    def _method(self, warm: bool) -> Method[Any]:
        """Return the method with the final ``tol`` and ``max_iter`` of the fit, for a warm start or a new fit."""

    @abstractmethod
    def _initial(
        self, x: Tensor | Source, g: Any, generator: torch.Generator, device: torch.device, fits: bool = True
    ) -> Start:
        """Compute the initial mixture of a new fit; without ``fits``, of a single step, as in ``partial_fit``."""

    @abstractmethod
    def _last(self, shape: tuple[int, int]) -> Mixture | None:
        """Return the mixture of the last fit if its means have this shape (K, D), else None."""

    @abstractmethod
    def _set_results(self, best: FitResult) -> None:
        """Set the fitted attributes that only this estimator has."""

    @abstractmethod
    def _predictive(self) -> tuple[Mixture, float]:
        """Return the mixture for predictions and scores, and a constant that is added to its log-densities, nats."""

    @property
    def wanted_components(self) -> int | None:
        """The parameter ``n_components``; None for ``"auto"``."""
        return None if isinstance(self.n_components, str) else self.n_components

    def _selecting(self, method: Method[Any]) -> Method[Any]:
        """Return the method of the fits of a selection."""
        return method

    def _selection(
        self, x: Tensor | Source, g: Any, generator: torch.Generator, method: Method[Any]
    ) -> analysis.Selection:
        """Choose the number of components."""
        raise NotImplementedError(f"{type(self).__name__} has no n_components={self.n_components!r}")

    @property
    def fitted_(self) -> bool:
        """Whether the estimator has fitted parameters."""
        return hasattr(self, "mixture_")

    def fit(self: Self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the mixture to points.

        Args:
            X: Points (N, D), data units: a numpy array, tensor, DataFrame or list; or files, memory maps, loaders or functions,
                which are read chunk by chunk (:meth:`gmmkeops.Source.of`). All methods below accept the same types.
            y: Ignored.
            sample_weight: Weight of each point (N,), or None.

        Returns:
            The estimator itself.

        Raises:
            TypeError, ValueError: Parameters or data are invalid; the estimator is then unchanged.

        Warns:
            DegenerateWarning: A component has fewer points than its covariance needs, as for :func:`gmmkeops.fit`.
            ConvergenceWarning: The best of the ``n_init`` fits did not converge.
        """
        world = World()
        with world.together(), reductions.threads_for(X):
            self._check()
            x, g, names, device = training_data(self, X, sample_weight)
            x, g, validation = split_off(
                x, g, getattr(self, "validation", None), generator_of(self.random_state, device)
            )
            self._check_columns(features_of(x))
            last = self._continued(features_of(x), names)
            method = self._method(last is not None)
            new = method if last is None else self._method(False)
            settings = described_settings(new, getattr(self, "penalty", None))
            earlier = self._trace if last is not None else None
            same = settings and earlier and earlier.settings == settings
            continuation = Continuation(method, earlier if same else None)
            if world.size > 1:
                self._agree(world, sample_weight is None, last is not None)
            generator = world.generator(generator_of(self.random_state, device), device)
        selection, which = None, "The fit" if self.n_init == 1 else f"The best of {self.n_init} fits"
        with reductions.threads_for(x):
            if self.wanted_components is None and last is None:
                method = self._selecting(method)
                selection, which = self._selection(x, g, generator, method), "The fit of the chosen model"
                best = selection.result
            else:
                best = self._best_fit(x, g, names, last, method, continuation, generator, device, validation)
        if not best.converged and not best.report.interrupted and method.tol > 0 and method.max_iter > 0:
            warn(
                f"{which} did not converge to tol={method.tol:g} within {method.max_iter} "
                "iterations; raise max_iter or tol, or check for degenerate data.",
                convergence_warning(),
            )
        if warning := too_few_points(best):
            warn(warning, DegenerateWarning)
        # All ranks use the column names of rank 0, which the result contains.
        names = best.mixture.columns if isinstance(x, Source) and names is not None else names
        self._adopt(best.mixture.named(names), torch.is_tensor(X))
        self.result_, self.converged_, self.n_iter_ = best, best.converged, best.n_iter
        self._trace = Trace([*continuation.objectives, *best.history["objective"]], best.log_likelihood, settings)
        self._set_results(best)
        if selection is not None:
            self.selection_ = selection
        return self

    def _continued(self, features: int, names: Sequence[str] | None) -> Mixture | None:
        """Return the mixture of the last fit for a warm start, or None for a new fit."""
        K = self.wanted_components or (self.mixture_.n_components if self.fitted_ else 1)
        last = self._last((K, features)) if self.warm_start else None
        if last is not None and names is not None and self.mixture_.columns not in (None, tuple(names)):
            # The last fit used other columns.
            return None
        return last

    def _agree(self, world: World, unweighted: bool, warm: bool) -> None:
        """Raise an error if the ranks call ``fit`` with different parameters."""
        own = {name: value for name, value in self.get_params(deep=False).items() if name not in _PER_RANK}
        own |= {"sample_weight": unweighted, "warm_start": warm}
        call = {"call": f"{type(self).__name__}.fit"}
        world.agree(call | {name: describe(value, name) for name, value in own.items()})

    def _best_fit(
        self,
        x: Tensor | Source,
        g: Any,
        names: Sequence[str] | None,
        last: Mixture | None,
        method: Method[Any],
        continuation: Continuation,
        generator: torch.Generator,
        device: torch.device,
        validation: Any,
    ) -> FitResult:
        """Return the best of ``n_init`` fits, or a warm-started fit if ``last`` is given."""
        best: FitResult | None = None
        with warnings.catch_warnings(), scikit_learn_names():
            # ``fit`` issues one warning, for the best fit.
            warnings.filterwarnings("ignore", message="the fit did not converge", category=ConvergenceWarning)
            warnings.simplefilter("ignore", DegenerateWarning)
            for run in range(1 if last is not None or searches(self.init_params) else self.n_init):
                start = Start(last.to(device)) if last is not None else self._initial(x, g, generator, device)
                result = fit(
                    start if isinstance(x, Source) else start._replace(mixture=start.mixture.named(names)),
                    x,
                    method,
                    tol=0.0 if continuation.earlier is not None else None,
                    penalty=self._penalty(x, start.mixture, start.report),
                    sample_weight=g,
                    truncate=self.truncate,
                    backend=self.backend,
                    dtype=self.dtype,
                    checkpoint=self.checkpoint,
                    max_memory=self.max_memory,
                    callback=(*self._verbose_callbacks(run), *continuation.callbacks),
                    verbose=None if self.verbose > 1 else False,
                    generator=generator,
                    validation=validation,
                )
                if improves(result, best):
                    best = result
                if result.report.interrupted:
                    break
        assert best is not None, "n_init is at least 1"
        if continuation.converged and not best.report.interrupted:
            best = replace(best, ending=Ending.CONVERGED)
        return best

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit the mixture, and return the most probable component of each point (N,), int64; arguments as for :meth:`fit`."""
        return self.fit(X, y, sample_weight).predict(X)

    def _check_columns(self, features: int) -> None:
        """Raise a ValueError if a parameter does not match the number of columns of the data."""

    def _check(self) -> None:
        """Raise an error if a parameter of the constructor is invalid."""
        check_settings(self)

    def _by_init_params(self, x: Tensor | Source, g: Any, generator: torch.Generator, fits: bool) -> Start:
        """Compute an initial mixture by ``init_params``, and a report of how it was found; ``fits`` as for :meth:`_initial`."""
        method = self._method(False)
        return started(
            x,
            self.wanted_components or 1,
            STRATEGIES[self.init_params],
            covariance_type=self.covariance_type,
            sample_weight=g,
            n_init=self.n_init if searches(self.init_params) else 1,
            generator=generator,
            backend=self.backend,
            penalty=getattr(self, "penalty", None),
            prior=getattr(self, "prior", None),
            method=method if isinstance(method, EM) else None,
            iterations=method.max_iter if fits else 0,
        )

    def _penalty(self, x: Tensor | Source, start: Mixture, report: StartReport | None) -> Any:
        """Return the penalty of a fit to points from an initial mixture."""
        return getattr(self, "penalty", None)

    def _verbose_callbacks(self, run: int) -> tuple[Callable[[Step], None], ...]:
        """Return the callbacks that write the lines of ``verbose`` to stderr."""
        if not self.verbose or (self.verbose > 1 and sys.stderr.isatty()):
            return ()

        def say(step: Step) -> None:
            if step.iteration % self.verbose_interval == 0:
                sys.stderr.write(
                    f"fit {run + 1} of {self.n_init}, iteration {step.iteration}: mean log-likelihood "
                    f"{step.log_likelihood:.5f} nats per point, objective {step.objective:.5f}, {len(step.active)} active, "
                    f"{step.history['seconds'][-1]:.1f} s\n"
                )

        return (say,)

    def _adopt(self, mixture: Mixture, tensors: bool, fitted_type: str | None = None) -> None:
        """Set the fitted attributes from a mixture, and delete those of an earlier fit.

        Args:
            mixture: The mixture.
            tensors: Whether attributes are tensors rather than numpy arrays.
            fitted_type: Covariance type of the mixture; None for the parameter ``covariance_type``.
        """
        for name in [name for name in vars(self) if name.endswith("_") and not name.startswith("_")]:
            delattr(self, name)
        self.mixture_, self._tensors, self._sampled = mixture, tensors, 0
        self._trace, self._memory = None, None
        self._fitted_type = canonical_type(self.covariance_type if fitted_type is None else fitted_type)
        self.weights_, self.means_ = as_array(mixture.weights, tensors), as_array(mixture.means, tensors)
        self.n_components_, self.n_features_in_ = mixture.n_components, mixture.n_features
        if mixture.columns is not None:
            self.feature_names_in_ = np.array(mixture.columns, dtype=object)

    # The matrices are computed when they are first asked for: this takes a twentieth of the time of a small fit.
    @cached_property
    def covariances_(self) -> Any:
        """Covariances of the components, see the attributes of the class."""
        return self._shaped("covariances")

    @cached_property
    def precisions_(self) -> Any:
        """Inverses of the covariances."""
        return self._shaped("precisions")

    @cached_property
    def precisions_cholesky_(self) -> Any:
        """Upper triangular factors of the precisions."""
        return self._shaped("matrices")

    def _shaped(self, name: str) -> Any:
        """Return matrices of the components in the shape of the covariance type."""
        if not self.fitted_:
            raise AttributeError(f"this {type(self).__name__} is not fitted; call fit first.")
        factor = self.mixture_.factor
        compact = factor.compact(getattr(factor, name)())
        return as_array(compact[0] if self._fitted_type.startswith("tied_") else compact, self._tensors)

    def _same_model(self) -> bool:
        """Return whether the fitted mixture matches the parameters ``n_components`` and ``covariance_type``."""
        return (
            self.fitted_
            and self.wanted_components in (None, self.mixture_.n_components)
            and self._fitted_type == canonical_type(self.covariance_type)
        )

    def _apply(self, X: Any, function: Callable[[Mixture, Tensor], Tensor], mixture: Mixture) -> Any:
        """Apply a function of a mixture and points to data; the result has the type of the data (numpy array or tensor)."""
        with torch.no_grad(), scikit_learn_names():
            if readable(X):
                device = as_device(self.device) or torch.device("cpu")
                mixture = mixture.to(device)
                parts = chunked(X, features=self.n_features_in_, columns=self.mixture_.columns)
                found = torch.cat([function(mixture, chunk.points.to(device)) for chunk in parts])
                return as_array(self._cast(found), False)
            # Torch can be told not to check the values of any distribution.
            x, _ = validated_points(self, X, finite=not mixture._validate_args)
            # A mixture keeps its converted parameters for the next call, which its copy on another device does not.
            mixture = mixture if mixture.means.device == x.device else mixture.to(x.device)
            return as_array(self._cast(function(mixture, x)), torch.is_tensor(X))

    def _cast(self, found: Tensor) -> Tensor:
        """Cast results to ``dtype``, if it is set; the points themselves are not rounded."""
        return found.to(as_dtype(self.dtype) or found.dtype) if found.is_floating_point() else found

    def _engine(self) -> dict[str, Any]:
        """Return the keyword arguments of the reductions."""
        return {"backend": self.backend, "truncate": self.truncate}

    def predict(self, X: Any) -> Any:
        """Return the most probable component of each point.

        Args:
            X: Points (N, D), data units, as for :meth:`fit`.

        Returns:
            (N,), int64.

        Raises:
            TypeError, ValueError: Points are invalid.
            sklearn.exceptions.NotFittedError: The estimator is not fitted.
        """
        self._require_fitted()
        return self._apply(X, lambda mixture, x: mixture.predict(x, **self._engine()), self._predictive()[0])

    def predict_proba(self, X: Any) -> Any:
        """Compute the responsibilities (posterior probabilities) of all components; errors as for :meth:`predict`.

        For large data, :meth:`Mixture.responsibilities` can return only the largest ones.

        Args:
            X: Points (N, D), data units, as for :meth:`fit`.

        Returns:
            (N, K), each row with a sum of one.
        """
        self._require_fitted()
        return self._apply(X, lambda mixture, x: mixture.responsibilities(x), self._predictive()[0])

    def score_samples(self, X: Any) -> Any:
        """Compute the log-density of each point; errors as for :meth:`predict`.

        Args:
            X: Points (N, D), data units, as for :meth:`fit`.

        Returns:
            (N,), nats.
        """
        self._require_fitted()
        predictive, constant = self._predictive()
        return self._apply(X, lambda mixture, x: mixture.log_prob(x, **self._engine()) + constant, predictive)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Compute the mean log-density of points; errors as for :meth:`predict`.

        Args:
            X: Points (N, D), data units, as for :meth:`fit`.
            y: Ignored.
            sample_weight: Weight of each point (N,), or None.

        Returns:
            Nats per point.
        """
        if not readable(X):
            values = as_tensor(self.score_samples(X), name="scores").double()
            g = as_weights(sample_weight, values, name="sample_weight")
            return float(values.mean() if g is None else g.to(values) @ values / g.sum().to(values))
        self._require_fitted()
        predictive, constant = self._predictive()
        with scikit_learn_names():
            return analysis.score(predictive.named(self.mixture_.columns), X, sample_weight=sample_weight) + constant

    def sample(
        self,
        n_samples: int = 1,
        *,
        component: int | None = None,
        confidence: float | None = None,
        std_range: tuple[float, float] | None = None,
    ) -> tuple[Any, Any]:
        """Draw points and their components.

        With an int as ``random_state`` every call draws the same points, as in scikit-learn. With None, successive calls draw
        different points, but the n-th call after a fit draws the same points in every process.

        Args:
            n_samples: Number of points n.
            component, confidence, std_range: As for :meth:`Mixture.sample`.

        Returns:
            Points (n, D), data units, and components (n,), int64.

        Raises:
            ValueError: n_samples is below one; or as :meth:`Mixture.sample`.
        """
        self._require_fitted()
        if not isinstance(n_samples, (int, np.integer)) or isinstance(n_samples, bool) or n_samples < 1:
            # The message of scikit-learn.
            raise ValueError(f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one sample.")
        x, labels = self.mixture_.sample(
            int(n_samples),
            return_labels=True,
            generator=generator_of(self.random_state, self.mixture_.means.device, self._sampled),
            component=component,
            confidence=confidence,
            std_range=std_range,
        )
        self._sampled += 1
        return as_array(x, self._tensors), as_array(labels, self._tensors)


def features_of(x: Tensor | Source) -> int:
    """Return the number of columns D of points or of a source."""
    return x.features if isinstance(x, Source) else x.shape[1]
