"""Base class of the estimators: validation of data, initialization, repeated fits, and scikit-learn's methods.

Subclasses define the fitting method and the mixture that is used for predictions. Names and shapes are those of
``sklearn.mixture``, with tgmm's names of the tied covariance types.
"""

from __future__ import annotations

import copy
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from gmmkeops import analysis
from gmmkeops._checks import (
    ConvergenceWarning,
    PrecisionWarning,
    as_choice,
    as_device,
    as_fraction,
    as_integer,
    as_number,
    renamed,
)
from gmmkeops.components import as_tensor, factor_class
from gmmkeops.data import (
    DEFAULT_SEED,
    Source,
    World,
    as_dtype,
    as_points,
    as_weights,
    chunked,
    readable,
    representatives,
)
from gmmkeops.estimators.contract import Estimator, column_names, convergence_warning
from gmmkeops.fitting import EM, Ending, FitResult, Method, Step, as_bytes, describe, fit, initialize
from gmmkeops.models import Mixture
from gmmkeops.reductions import BACKENDS

__all__ = ["MixtureEstimator", "Trace", "generator_of", "in_own_words"]

Self = TypeVar("Self", bound="MixtureEstimator")

# Numbers of k-means initializations that are compared after some steps of EM: more if they run on a sample of a larger data set,
# fewer if they run on all points, where a trial takes as long as the fit, and at most _MANY / K, since results vary less with
# many components. Then the size of the sample, and the number of EM steps.
_CANDIDATES, _FEW = 8, 3

_MANY = 400

_SAMPLE = 20_000

_STEPS = 20

# Largest relative difference of mean log-likelihoods of the same mixture and points, also in float32.
_SAME = 1e-5

# Relative difference of objectives below which they are equal up to rounding, so that the first one is kept.
_TIE = 1e-9

# Parameters that may differ between ranks; the random_state of rank 0 is used.
_OF_A_RANK = ("checkpoint", "device", "random_state", "verbose", "verbose_interval")

_STRATEGIES = {
    "kmeans": "kmeans",
    "k-means++": "kmeans++",
    "kmeans++": "kmeans++",
    "kpp": "kmeans++",
    "random": "responsibilities",
    "random_from_data": "random",
    "points": "random",
}


@contextmanager
def in_own_words() -> Iterator[None]:
    """Context in which errors name the arguments X and sample_weight of an estimator, instead of x and weights."""
    with renamed("x", "X"), renamed("weights", "sample_weight"):
        yield


class MixtureEstimator(Estimator, ABC):
    """Abstract estimator whose predictions are those of a mixture."""

    _estimator_type = "density_estimator"

    # Parameters of the constructor of every estimator.
    n_components: int
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
    # The iterations that a warm start continues, and the running average of moments of partial_fit.
    _trace: Trace | None = None
    _memory: Any = None

    @abstractmethod
    def _method(self, warm: bool) -> Method[Any]:
        """The method of the fit with its final ``tol`` and ``max_iter``, for a warm start or a new fit."""

    @abstractmethod
    def _start(self, x: Tensor | Source, g: Any, generator: torch.Generator, device: torch.device) -> Mixture:
        """Initial mixture of a new fit."""

    @abstractmethod
    def _last(self, shape: tuple[int, int]) -> Mixture | None:
        """Mixture of the last fit if its means have this shape (K, D), else None."""

    @abstractmethod
    def _conclude(self, best: FitResult) -> None:
        """Set the fitted attributes that only this estimator has."""

    @abstractmethod
    def _judge(self) -> tuple[Mixture, float]:
        """The mixture that labels and scores points, and a constant to add to its log-densities, nats."""

    @property
    def fitted_(self) -> bool:
        """Whether the estimator has fitted parameters."""
        return hasattr(self, "mixture_")

    def fit(self: Self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the mixture to points.

        Args:
            X: Points (N, D), data units: numpy, torch, DataFrame or lists; or files, memory maps, loaders and functions, which
                are read chunk by chunk (:meth:`gmmkeops.Source.of`). All methods below accept the same types.
            y: Ignored.
            sample_weight: Weight of each point (N,), or None.

        Returns:
            The estimator itself.

        Raises:
            TypeError, ValueError: Parameters or data are invalid; the estimator is then unchanged.

        Warns:
            ConvergenceWarning: The best one of the ``n_init`` fits did not converge.
        """
        world = World()
        with world.together():
            self._check()
            x, g, names, device = self._data(X, sample_weight)
            self._check_columns(_features(x))
            best: FitResult | None = None
            last = self._last((self.n_components, _features(x))) if self.warm_start else None
            if last is not None and names is not None and self.mixture_.columns not in (None, tuple(names)):
                # The parameters of the last fit belong to other columns.
                last = None
            method, settings = self._method(last is not None), self._settings()
            earlier = self._trace if last is not None else None
            continuation = _Continuation(
                method, earlier if settings and earlier and earlier.settings == settings else None
            )
            if world.size > 1:
                own = {name: value for name, value in self.get_params(deep=False).items() if name not in _OF_A_RANK}
                own |= {"sample_weight": sample_weight is None, "warm_start": last is not None}
                call = {"call": f"{type(self).__name__}.fit"}
                world.agree(call | {name: describe(value, name) for name, value in own.items()})
            generator = world.generator(generator_of(self.random_state, device), device)
        with warnings.catch_warnings(), in_own_words():
            # Only the convergence of the best fit matters, for which a warning follows below.
            warnings.filterwarnings("ignore", message="the fit did not converge", category=ConvergenceWarning)
            for run in range(1 if last is not None else self.n_init):
                start = self._start(x, g, generator, device) if last is None else last.to(device)
                result = fit(
                    start if isinstance(x, Source) else start.named(names),
                    x,
                    method,
                    tol=0.0 if continuation.earlier is not None else None,
                    penalty=getattr(self, "penalty", None),
                    sample_weight=g,
                    truncate=self.truncate,
                    backend=self.backend,
                    dtype=self.dtype,
                    checkpoint=self.checkpoint,
                    max_memory=self.max_memory,
                    callback=(*self._talk(run), continuation),
                    verbose=None if self.verbose > 1 else False,
                    generator=generator,
                )
                if _improves(result, best):
                    best = result
        assert best is not None, "n_init is at least 1"
        if continuation.converged and not best.report.interrupted:
            best = replace(best, ending=Ending.CONVERGED)
        if not best.converged and not best.report.interrupted and method.tol > 0 and method.max_iter > 0:
            warnings.warn(
                f"The best of {self.n_init} starts did not converge to tol={method.tol:g} within {method.max_iter} "
                "iterations; raise max_iter or tol, or check for degenerate data.",
                convergence_warning(),
                stacklevel=2,
            )
        # All ranks read their sources with the columns of rank 0, which the result has.
        names = best.mixture.columns if isinstance(x, Source) and names is not None else names
        self._adopt(best.mixture.named(names), torch.is_tensor(X))
        self.result_, self.converged_, self.n_iter_ = best, best.converged, best.n_iter
        self._trace = Trace([*continuation.objectives, *best.history["objective"]], best.log_likelihood, settings)
        self._conclude(best)
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit the mixture, and return the component of each point (N,), int64."""
        return self.fit(X, y, sample_weight).predict(X)

    def _check_columns(self, features: int) -> None:
        """Raise a ValueError if a parameter does not match the number of columns of the data."""

    def _check(self) -> None:
        """Raise an error if a parameter of the constructor is invalid."""
        for name, least in (("n_components", 1), ("max_iter", 0), ("n_init", 1), ("verbose_interval", 1)):
            as_integer(getattr(self, name), name, least)
        as_integer(int(self.verbose) if isinstance(self.verbose, bool) else self.verbose, "verbose", 0)
        for name in ("tol", "reg_covar"):
            as_number(getattr(self, name), name, 0, clause="must be a finite number and not negative")
        as_fraction(self.truncate, "truncate")
        as_choice(self.backend, "backend", BACKENDS)
        as_device(self.device)
        as_dtype(self.dtype)
        if self.max_memory is not None:
            as_bytes(self.max_memory)
        if self.checkpoint is not None and self.n_init > 1:
            raise ValueError(f"checkpoint stores a single fit, got n_init={self.n_init}; set n_init=1.")
        factor_class(self.covariance_type)
        as_choice(self.init_params, "init_params", list(_STRATEGIES))

    def _combined(self, solver: Method[Any]) -> Method[Any]:
        """The solver with the settings of the estimator that are not defaults.

        Raises:
            ValueError: A setting is given to both with different values, or the solver has no such setting.
        """
        theirs: dict[str, Any] = {field.name: field.default for field in fields(solver)} if is_dataclass(solver) else {}
        changed: dict[str, Any] = {}
        for name in ("max_iter", "tol", "reg_covar"):
            mine, own = getattr(self, name), getattr(solver, name, None)
            if mine == self._default(name):
                continue
            if own is None:
                raise ValueError(
                    f"{name}={mine!r} has no effect on solver={type(solver).__name__}, which has no such setting; leave it out, "
                    'or pass solver="em".'
                )
            if own not in (mine, theirs.get(name)):
                raise ValueError(
                    f"{name} is given twice: {name}={mine!r} and {name}={own!r} of the solver {type(solver).__name__}; give "
                    "it in one of the two places."
                )
            changed[name] = mine
        return _changed(solver, **changed) if changed else solver

    def _settings(self) -> str:
        """Return a description of the method and the penalty, or "" if they cannot be described."""
        try:
            return describe([_changed(self._method(False), max_iter=0, tol=0.0), getattr(self, "penalty", None)])
        except ValueError:
            return ""

    def _found_start(self, x: Tensor | Source, g: Any, generator: torch.Generator, given: bool = False) -> Mixture:
        """Initial mixture by ``init_params``; of several k-means, the one with the best objective after some EM steps (em-EM).

        If all initial parameters are ``given``, only the shapes of the result are used.

        Reference: Biernacki, Celeux and Govaert 2003, *Choosing starting values for the EM algorithm*, CSDA 41.
        """
        options: Any = {
            "covariance_type": self.covariance_type,
            "generator": generator,
            "backend": self.backend,
        }
        K, strategy = self.n_components, _STRATEGIES[self.init_params]
        method = self._method(False)
        if strategy != "kmeans" or K == 1 or K > _MANY // 2 or given or method.max_iter == 0:
            return initialize(x, K, "random" if given else strategy, sample_weight=g, n_init=1, **options)
        world = World()
        with world.together():
            part, share, some, _ = representatives(x, g, max(_SAMPLE, 200 * K), world)
        best: FitResult | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            for _ in range(min(_MANY // K, _CANDIDATES if len(part) < some else _FEW)):
                start = initialize(part, K, strategy, sample_weight=share, n_init=1, **options)
                trial = EM(reg_covar=getattr(method, "reg_covar", EM.reg_covar), tol=0)
                found = fit(
                    start, part, trial, sample_weight=share, max_iter=_STEPS, backend=self.backend, verbose=False
                )
                if _improves(found, best):
                    best = found
        assert best is not None, "there are candidates"
        return best.mixture

    def _talk(self, run: int) -> tuple[Callable[[Step], None], ...]:
        if not self.verbose or (self.verbose > 1 and sys.stderr.isatty()):
            return ()

        def say(step: Step) -> None:
            if step.iteration % self.verbose_interval == 0:
                sys.stderr.write(
                    f"start {run + 1} of {self.n_init}, iteration {step.iteration}: mean log-likelihood "
                    f"{step.log_likelihood:.5f} nats per point, objective {step.objective:.5f}, {len(step.live)} live, "
                    f"{step.history['seconds'][-1]:.1f} s\n"
                )

        return (say,)

    def _data(self, X: Any, sample_weight: Any) -> tuple[Tensor | Source, Any, Sequence[str] | None, torch.device]:
        """Validated points (or a source) and weights, the names of the columns, and the device of the computation."""
        if readable(X):
            with in_own_words():
                source = Source.of(X, weights=sample_weight)
            return source, None, source.columns, as_device(self.device) or torch.device("cpu")
        x, names = self._points(X, fitting=True, minimum=max(self.n_components, 2) if World().size == 1 else 0)
        g = as_weights(sample_weight, x, name="sample_weight")
        return x, g, None if names is None else tuple(names), x.device

    def _points(self, X: Any, *, fitting: bool = False, minimum: int = 1) -> tuple[Tensor, np.ndarray | None]:
        if hasattr(X, "toarray") and hasattr(X, "nnz"):
            raise TypeError("Sparse data was passed, but dense data is required; use X.toarray().")
        if np.iscomplexobj(X) if isinstance(X, np.ndarray) else torch.is_tensor(X) and X.is_complex():
            raise ValueError("Complex data not supported: X has complex numbers; pass real and imaginary parts.")
        x = as_tensor(X, name="X", device=self.device)
        names = column_names(X)
        if not fitting:
            self._check_names(names)
        if x.ndim != 2:
            raise ValueError(
                f"Expected 2D array, got {x.ndim}D array instead: X has shape {tuple(x.shape)}. Reshape your data with "
                "X.reshape(-1, 1) if it has a single feature, or X.reshape(1, -1) if it is a single sample."
            )
        if x.shape[1] == 0:
            raise ValueError(f"0 feature(s) (shape={tuple(x.shape)}) while a minimum of 1 is required.")
        if not fitting and x.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {x.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features as input"
            )
        if x.shape[0] < minimum:
            raise ValueError(
                f"Found array with {x.shape[0]} sample(s) (shape={tuple(x.shape)}) while a minimum of {minimum} is required; "
                f"n_samples={x.shape[0]}."
            )
        return as_points(x, name="X", minimum=minimum), names

    def _adopt(self, mixture: Mixture, tensors: bool, fitted_type: str | None = None) -> None:
        """Set the fitted attributes from a mixture, and delete those of an earlier fit.

        Args:
            mixture: The mixture.
            tensors: Whether attributes are tensors rather than numpy arrays.
            fitted_type: Covariance type of the mixture; None for that of the parameter.
        """
        for name in [name for name in vars(self) if name.endswith("_") and not name.startswith("_")]:
            delattr(self, name)
        self.mixture_, self._tensors, self._sampled = mixture, tensors, 0
        self._trace, self._memory = None, None
        self._fitted_type = _canonical(self.covariance_type if fitted_type is None else fitted_type)
        factor = mixture.factor
        tied = self._fitted_type.startswith("tied_")

        def shaped(matrices: Tensor) -> Any:
            compact = factor.compact(matrices)
            return self._out(compact[0] if tied else compact, tensors)

        self.weights_, self.means_ = self._out(mixture.weights, tensors), self._out(mixture.means, tensors)
        self.covariances_ = shaped(factor.covariances())
        self.precisions_ = shaped(factor.precisions())
        self.precisions_cholesky_ = shaped(factor.matrices())
        self.n_features_in_ = mixture.features
        if mixture.columns is not None:
            self.feature_names_in_ = np.array(mixture.columns, dtype=object)

    def _same_model(self) -> bool:
        """Whether there is a fitted mixture with the ``n_components`` and ``covariance_type`` of the parameters."""
        return (
            self.fitted_
            and self.mixture_.components == self.n_components
            and self._fitted_type == _canonical(self.covariance_type)
        )

    @staticmethod
    def _out(values: Tensor, tensors: bool) -> Any:
        return values if tensors else values.cpu().numpy()

    def _apply(self, X: Any, function: Callable[[Mixture, Tensor], Tensor], mixture: Mixture) -> Any:
        with torch.no_grad(), in_own_words():
            if readable(X):
                device = as_device(self.device) or torch.device("cpu")
                mixture = mixture.to(device)
                parts = chunked(X, features=self.n_features_in_, columns=self.mixture_.columns)
                found = torch.cat([function(mixture, chunk.points.to(device)) for chunk in parts])
                return self._out(self._cast(found), False)
            x, _ = self._points(X)
            return self._out(self._cast(function(mixture.to(x.device), x)), torch.is_tensor(X))

    def _cast(self, found: Tensor) -> Tensor:
        """Results in the ``dtype`` of the parameters; the points themselves are not rounded."""
        return found.to(as_dtype(self.dtype) or found.dtype) if found.is_floating_point() else found

    def _engine(self) -> dict[str, Any]:
        return {"backend": self.backend, "truncate": self.truncate}

    def predict(self, X: Any) -> Any:
        """Most probable component of each point (N,), int64."""
        self._require_fitted()
        return self._apply(X, lambda mixture, x: mixture.predict(x, **self._engine()), self._judge()[0])

    def predict_proba(self, X: Any) -> Any:
        """Responsibilities (N, K); :meth:`Mixture.responsibilities` returns only the largest ones of large data."""
        self._require_fitted()
        return self._apply(X, lambda mixture, x: mixture.responsibilities(x), self._judge()[0])

    def score_samples(self, X: Any) -> Any:
        """Log-density of each point (N,), nats."""
        self._require_fitted()
        judge, lack = self._judge()
        return self._apply(X, lambda mixture, x: mixture.log_prob(x, **self._engine()) + lack, judge)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean log-density of points, weighted by ``sample_weight`` (N,), nats per point."""
        if not readable(X):
            values = as_tensor(self.score_samples(X), name="scores").double()
            g = as_weights(sample_weight, values, name="sample_weight")
            return float(values.mean() if g is None else g.to(values) @ values / g.sum().to(values))
        self._require_fitted()
        judge, lack = self._judge()
        with in_own_words():
            return analysis.score(judge.named(self.mixture_.columns), X, sample_weight=sample_weight) + lack

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
        different points, and the n-th call after a fit draws the same points in every process.

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
        return self._out(x, self._tensors), self._out(labels, self._tensors)


@dataclass(frozen=True)
class Trace:
    """The iterations that led to an estimator's mixture, for warm starts that continue them.

    Args:
        objectives: The objective of each iteration, nats per point.
        log_likelihood: Mean log-likelihood of the mixture that they led to, nats per point.
        settings: Method and penalty of the fits.
    """

    objectives: list[float]
    log_likelihood: float
    settings: str


class _Continuation:
    """Callback that tests a warm start for convergence, together with the iterations that it continues.

    Without them, a fit of one iteration could not compare its objective with an earlier one. The tolerance of the fit itself is
    set to zero.

    Attributes:
        earlier: The fit that is continued; None if there is none, and the fit tests for convergence itself.
        converged: Whether the iterations have converged.
        objectives: Objectives of the earlier iterations, nats per point; empty if they belong to other points.
    """

    def __init__(self, method: Method[Any], earlier: Trace | None) -> None:
        # A warm start of an annealed fit begins with a high temperature again, for which objectives are not comparable.
        self.earlier = None if getattr(method, "temperature", None) is not None else earlier
        self.method, self.converged = method, False
        self.objectives = [] if self.earlier is None else self.earlier.objectives

    def __call__(self, step: Step) -> bool:
        if self.earlier is not None:
            before, now = self.earlier.log_likelihood, step.history["log_likelihood"][0]
            if abs(now - before) > max(self.method.tol, _SAME * max(1.0, abs(before))):
                self.objectives = []
            objectives = [*self.objectives, *step.history["objective"]]
            self.converged = self.method.finished(objectives, self.method.tol, step._objective)
        return self.converged


def _changed(method: Method[Any], **settings: Any) -> Method[Any]:
    """The method with other settings."""
    if is_dataclass(method):
        return cast(Method[Any], replace(cast(Any, method), **settings))
    other = copy.copy(method)
    vars(other).update(settings)
    return other


def _canonical(covariance_type: str) -> str:
    """Canonical name of a covariance type."""
    kind, tied = factor_class(covariance_type)
    return ("tied_" if tied else "") + kind.family


def _features(x: Tensor | Source) -> int:
    return x.features if isinstance(x, Source) else x.shape[1]


def _improves(found: FitResult, best: FitResult | None) -> bool:
    return best is None or found.objective < best.objective - _TIE * max(1.0, abs(best.objective))


def generator_of(random_state: Any, device: torch.device, call: int = 0) -> torch.Generator:
    """A generator from a ``random_state`` as in scikit-learn; None gives a fixed seed plus the number of the ``call``."""
    generator = torch.Generator(device)
    if random_state is None:
        return generator.manual_seed(DEFAULT_SEED + call)
    if isinstance(random_state, (int, np.integer)):
        return generator.manual_seed(int(random_state) % (1 << 63))
    if isinstance(random_state, np.random.Generator):
        return generator.manual_seed(int(random_state.integers(1 << 62)))
    if isinstance(random_state, np.random.RandomState):
        return generator.manual_seed(int(random_state.randint(1 << 31)))
    raise TypeError(f"random_state must be None, an int or a numpy generator, got {type(random_state).__name__}.")
