r"""Gaussian mixtures with scikit-learn's contract: thin over :func:`gmmkeops.fit`, by duck typing.

.. math:: p(x) = \sum_k W_k\, \mathcal N(x; \mu_k, \Sigma_k)

scikit-learn is not imported unless the user has; with it, ``clone``, pipelines and searches work. Reference: Pedregosa et
al. 2011, *Scikit-learn: machine learning in Python*; names and shapes are those of ``sklearn.mixture``, with tgmm's for the
tied types.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gmmkeops import io, selection
from gmmkeops._checks import ConvergenceWarning, PrecisionWarning, as_points, as_tensor, as_weights
from gmmkeops._contract import Estimator, NotFittedError, column_names, convergence_warning
from gmmkeops.distributed import World
from gmmkeops.factors import Factor, factor_class
from gmmkeops.fitting import EM, Adam, FitResult, Method, Step, fit
from gmmkeops.initialise import initialise, representatives
from gmmkeops.mixture import Mixture
from gmmkeops.sources import Source, chunked, readable

__all__ = ["GaussianMixture", "NotFittedError"]

# k-means starts that are tried by so many steps of EM: many where a sample of so many points stands for a larger cloud, a
# few where the points are all there are and a try costs as much as the fit; and only one where components are so many that
# good and bad luck even out among them.
_CANDIDATES, _FEW = 8, 3
_MANY = 400
_SAMPLE = 20_000
_STEPS = 20
# Objectives that differ by less, as a share, are equal but for rounding; the first of them is taken.
_TIE = 1e-9
_STRATEGIES = {
    "kmeans": "kmeans",
    "k-means++": "kmeans++",
    "kmeans++": "kmeans++",
    "kpp": "kmeans++",
    "random": "responsibilities",
    "random_from_data": "random",
    "points": "random",
}


class GaussianMixture(Estimator):
    r"""Gaussian mixture with scikit-learn's parameters, methods and attributes.

    Args:
        n_components: K.
        covariance_type: "full", "tied" (or "tied_full"), "diag", "spherical", "tied_diag" or "tied_spherical".
        solver: "em", "adam", or a method such as ``gmmkeops.EM(accelerate=True)``, whose own settings then hold but for
            ``max_iter`` and ``tol``.
        penalty: A penalty (:mod:`gmmkeops.penalties`) or a function of a mixture, nats per point.
        tol: Stop when the mean log-likelihood (or penalised objective) moves by less, nats per point.
        reg_covar: Added to the variances by EM, squared data units.
        max_iter: Iterations at most.
        n_init: Starts, of which the best result is kept.
        init_params: "kmeans", "k-means++" (or "kpp"), "random" (responsibilities), "random_from_data" (or "points").
        weights_init, means_init, precisions_init: Given starts (K,), (K, D) and in the covariances' shape; what is left
            out comes from ``init_params``.
        random_state: None, an int, or a numpy ``RandomState`` or ``Generator``.
        warm_start: Begin at the last fit's parameters.
        verbose: Write a line to stderr each ``verbose_interval`` iterations; from 2 on, show a bar in a terminal instead.
        verbose_interval: See ``verbose``.
        device: Where to compute, e.g. "cuda"; by default where the data are.
        dtype: "float32" or "float64" to compute in; by default float32 data stay so and all else is float64.
        backend: "auto", "keops" or "dense".
        truncate: ε that sweeps may leave out of each point's density, certified (:func:`gmmkeops.fit`); 0 for none. By
            default what rounding hides, where that pays.
        checkpoint: A path, or a :class:`~gmmkeops.Checkpoint`, where the fit's state is kept, and from where it goes on; with
            one start only.
        max_memory: Bytes, or text such as "1.5GB", that a fit may take (:func:`gmmkeops.fit`).

    Attributes:
        weights_ (K,), means_ (K, D), covariances_, precisions_, precisions_cholesky_: Parameters, float64, data units:
            arrays as the data were (numpy, or torch for tensors). Shapes (K, D, D), (K, D), (K,), and without K when tied.
        converged_, n_iter_: Whether and when the tolerance was met.
        lower_bound_: Mean log-likelihood (minus penalty) of the parameters above, nats per point.
        lower_bounds_: The same for the parameters before each iteration.
        mixture_: The :class:`~gmmkeops.Mixture`.
        result_: The :class:`~gmmkeops.FitResult` of the best start.
        n_features_in_, feature_names_in_: As scikit-learn's.

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

    _estimator_type = "density_estimator"

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        solver: str | Method[Any] = "em",
        penalty: Any = None,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
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
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.solver = solver
        self.penalty = penalty
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

    @property
    def fitted_(self) -> bool:
        """Whether there are parameters."""
        return hasattr(self, "mixture_")

    # fitting

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> GaussianMixture:
        """Fits the mixture to points.

        Args:
            X: Points (N, D): numpy, torch, DataFrame or lists; or files, memory maps, loaders and functions, which are read
                a chunk at a time (:meth:`gmmkeops.Source.of`). So everywhere below.
            y: Ignored.
            sample_weight: Weight of each point (N,), or None.

        Returns:
            The estimator itself.

        Raises:
            TypeError, ValueError: Bad parameters or data; the model is then as it was.

        Warns:
            ConvergenceWarning: The best start did not converge.
        """
        method = self._method()
        x, g, names, device = self._data(X, sample_weight)
        generator = World().generator(_generator(self.random_state, device), device)
        best: FitResult | None = None
        warm = self.warm_start and self.fitted_ and self.mixture_.means.shape == (self.n_components, _features(x))
        with warnings.catch_warnings():
            # One start's failure to converge is not the answer's: the best one speaks below.
            warnings.filterwarnings("ignore", message="the fit did not converge", category=ConvergenceWarning)
            for run in range(1 if warm else self.n_init):
                start = self.mixture_.to(device) if warm else self._start(x, g, generator, device)
                result = fit(
                    start,
                    x,
                    method,
                    penalty=self.penalty,
                    weights=g,
                    max_iter=self.max_iter,
                    tol=self.tol,
                    truncate=self.truncate,
                    backend=self.backend,
                    dtype=self.dtype,
                    checkpoint=self.checkpoint,
                    max_memory=self.max_memory,
                    callbacks=self._talk(run),
                    progress=None if self.verbose > 1 else False,
                    generator=generator,
                )
                if _improves(result, best):
                    best = result
        assert best is not None, "n_init is at least 1"
        if not best.converged and not best.report.interrupted and self.tol > 0 and self.max_iter > 0:
            warnings.warn(
                f"The best of {self.n_init} starts did not converge to tol={self.tol:g} within {self.max_iter} "
                "iterations; raise max_iter or tol, or check for degenerate data.",
                convergence_warning(),
                stacklevel=2,
            )
        self._adopt(best.mixture, torch.is_tensor(X))
        self.n_features_in_ = _features(x)
        if names is not None:
            self.feature_names_in_ = names
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self.result_, self.converged_, self.n_iter_ = best, best.converged, best.n_iter
        self.lower_bound_ = -best.objective
        self.lower_bounds_ = [-value for value in best.history["objective"]]
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fits, and returns the component of each point (N,)."""
        return self.fit(X, y, sample_weight).predict(X)

    @property
    def partial_fit(self) -> Callable[..., GaussianMixture]:
        """One step of stepwise EM on a batch, ``partial_fit(X, y=None, sample_weight=None)``; returns the estimator.

        The first call starts from its batch, which needs at least K points. Moments of the t-th batch enter with weight
        (t + 2)^-0.6, so a stream is averaged and slowly forgotten.

        Raises:
            AttributeError: The solver is not EM.
            TypeError, ValueError: Bad parameters or data; the model is then as it was.
        """
        if self.solver != "em" and not isinstance(self.solver, EM):
            raise AttributeError('partial_fit is a step of EM; construct the estimator with solver="em".')
        return self._partial_fit

    def _partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> GaussianMixture:
        method = cast(EM, self._method())
        x, names = self._points(X, fitting=not self.fitted_, minimum=1 if self.fitted_ else max(self.n_components, 2))
        g = as_weights(sample_weight, x, name="sample_weight")
        start = (
            self.mixture_.to(x.device)
            if self.fitted_
            else self._start(x, g, _generator(self.random_state, x.device), x.device)
        )
        mixture, self._memory = method.update(
            start, x, getattr(self, "_memory", None), penalty=self.penalty, weights=g, backend=self.backend
        )
        self._adopt(mixture, torch.is_tensor(X))
        self.n_features_in_ = x.shape[1]
        if names is not None:
            self.feature_names_in_ = names
        self.n_iter_, self.converged_ = getattr(self, "n_iter_", 0) + 1, False
        return self

    @classmethod
    def from_mixture(cls, mixture: Mixture, **params: Any) -> GaussianMixture:
        """An estimator with known parameters, ready to score, sample and predict without ``fit``.

        Args:
            mixture: One mixture.
            **params: Further arguments of the constructor.
        """
        tied = "tied_" if mixture.factor.leading == 1 and mixture.components > 1 else ""
        family = {"full": "full", "diagonal": "diag", "spherical": "spherical"}[mixture.factor.family]
        name = {"tied_full": "tied"}.get(tied + family, tied + family)
        model = cls(mixture.components, covariance_type=name, **params)
        model._adopt(mixture.detach().to(torch.float64), False)
        model.n_features_in_, model.converged_, model.n_iter_ = mixture.features, True, 0
        return model

    def save(self, path: Any) -> None:
        """Writes the fitted mixture to a file; see :func:`gmmkeops.save`."""
        self._require_fitted()
        io.save(self.mixture_, path)

    @classmethod
    def load(cls, path: Any, device: Any = "cpu") -> GaussianMixture:
        """An estimator with the mixture of a file; see :func:`gmmkeops.load` for what may be wrong with it."""
        return cls.from_mixture(io.load(path, device=device))

    def _method(self) -> Method[Any]:
        for name, least in (("n_components", 1), ("max_iter", 0), ("n_init", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for name in ("tol", "reg_covar"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number and not negative, got {value!r}.")
        if self.checkpoint is not None and self.n_init > 1:
            raise ValueError(f"checkpoint keeps one fit, got n_init={self.n_init} of them; set n_init=1.")
        factor_class(self.covariance_type)
        if self.init_params not in _STRATEGIES:
            raise ValueError(f"init_params must be one of {list(_STRATEGIES)}, got {self.init_params!r}.")
        if isinstance(self.solver, Method):
            return self.solver
        if self.solver == "em":
            return EM(reg_covar=float(self.reg_covar))
        if self.solver == "adam":
            return Adam()
        raise ValueError(f"solver must be 'em', 'adam' or a method such as gmmkeops.EM(), got {self.solver!r}.")

    def _start(self, x: Tensor | Source, g: Any, generator: torch.Generator, device: torch.device) -> Mixture:
        start = self._found_start(x, g, generator).to(device)
        wide: Any = {"dtype": torch.float64, "device": device}
        K, D = start.components, start.features
        logits, means, factor = start.logits, start.means, start.factor
        if self.weights_init is not None:
            weights = as_tensor(self.weights_init, name="weights_init", **wide)
            if weights.shape != (K,) or not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-6:
                raise ValueError(f"weights_init must have shape ({K},), no negative entry and a sum of one.")
            logits = weights.log()
        if self.means_init is not None:
            means = as_points(self.means_init, name="means_init", **wide)
            if means.shape != (K, D):
                raise ValueError(f"means_init must have shape ({K}, {D}), got {tuple(means.shape)}.")
        if self.precisions_init is not None:
            factor = self._given_factor(as_tensor(self.precisions_init, name="precisions_init", **wide), K, D)
        return Mixture(logits, means, factor)

    def _found_start(self, x: Tensor | Source, g: Any, generator: torch.Generator) -> Mixture:
        """What ``init_params`` finds; of several k-means, the one that a few EM steps on a sample like best (em-EM).

        Reference: Biernacki, Celeux and Govaert 2003, *Choosing starting values for the EM algorithm*, CSDA 41.
        """
        options: Any = {
            "covariance_type": self.covariance_type,
            "generator": generator,
            "backend": self.backend,
        }
        K, strategy = self.n_components, _STRATEGIES[self.init_params]
        given = self.means_init is not None and self.weights_init is not None and self.precisions_init is not None
        if strategy != "kmeans" or K == 1 or K > _MANY // 2 or given or self.max_iter == 0:
            return initialise(x, K, "random" if given else strategy, weights=g, runs=1, **options)
        world = World()
        with world.together():
            part, share, some, _ = representatives(x, g, max(_SAMPLE, 200 * K), world)
        best: FitResult | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            for _ in range(min(_MANY // K, _CANDIDATES if len(part) < some else _FEW)):
                start = initialise(part, K, strategy, weights=share, runs=1, **options)
                method = EM(reg_covar=float(self.reg_covar), tol=0)
                found = fit(start, part, method, weights=share, max_iter=_STEPS, backend=self.backend, progress=False)
                if _improves(found, best):
                    best = found
        assert best is not None, "there are candidates"
        return best.mixture

    def _given_factor(self, precisions: Tensor, K: int, D: int) -> Factor:
        kind, tied = factor_class(self.covariance_type)
        leading = () if tied else (K,)
        shape = {"full": (*leading, D, D), "diagonal": (*leading, D), "spherical": leading}[kind.family]
        if tuple(precisions.shape) != shape:
            raise ValueError(f"precisions_init must have shape {shape}, got {tuple(precisions.shape)}.")
        return kind.from_precisions(precisions[None] if tied else precisions, features=D)

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

    # what comes in and goes out

    def _data(self, X: Any, sample_weight: Any) -> tuple[Tensor | Source, Any, np.ndarray | None, torch.device]:
        """Points and weights to fit, in memory or to be read; the names of their columns, and where to compute."""
        if readable(X):
            device = torch.device("cpu" if self.device is None else self.device)
            return Source.of(X, weights=sample_weight), None, None, device
        x, names = self._points(X, fitting=True, minimum=max(self.n_components, 2) if World().size == 1 else 0)
        return x, as_weights(sample_weight, x, name="sample_weight"), names, x.device

    def _points(self, X: Any, *, fitting: bool = False, minimum: int = 1) -> tuple[Tensor, np.ndarray | None]:
        if hasattr(X, "toarray") and hasattr(X, "nnz"):
            raise TypeError("Sparse data was passed, but dense data is required; use X.toarray().")
        names = column_names(X)
        if not fitting:
            self._check_names(names)
        dtype = None if self.dtype is None else getattr(torch, str(self.dtype).removeprefix("torch."))
        if np.iscomplexobj(X) if isinstance(X, np.ndarray) else torch.is_tensor(X) and X.is_complex():
            raise ValueError("Complex data not supported: X has complex numbers; pass real and imaginary parts.")
        x = as_tensor(X, name="X", dtype=dtype, device=self.device)
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

    def _adopt(self, mixture: Mixture, tensors: bool) -> None:
        self.mixture_, self._tensors = mixture, tensors
        factor = mixture.factor
        tied = factor_class(self.covariance_type)[1]

        def shaped(matrices: Tensor) -> Any:
            if factor.family != "full":
                matrices = matrices.diagonal(dim1=-2, dim2=-1)
            if factor.family == "spherical":
                matrices = matrices[..., 0]
            return self._out(matrices[0] if tied else matrices, tensors)

        self.weights_, self.means_ = self._out(mixture.weights, tensors), self._out(mixture.means, tensors)
        self.covariances_ = shaped(factor.covariances())
        self.precisions_ = shaped(factor.precisions())
        self.precisions_cholesky_ = shaped(factor.matrices())

    @staticmethod
    def _out(values: Tensor, tensors: bool) -> Any:
        return values if tensors else values.cpu().numpy()

    def _apply(self, X: Any, function: Callable[[Mixture, Tensor], Tensor]) -> Any:
        self._require_fitted()
        with torch.no_grad():
            if readable(X):
                device = torch.device("cpu" if self.device is None else self.device)
                mixture = self.mixture_.to(device)
                parts = chunked(X, features=self.n_features_in_)
                return self._out(torch.cat([function(mixture, chunk.points.to(device)) for chunk in parts]), False)
            x, _ = self._points(X)
            return self._out(function(self.mixture_.to(x.device), x), torch.is_tensor(X))

    # inference

    def _engine(self) -> dict[str, Any]:
        return {"backend": self.backend, "truncate": self.truncate}

    def predict(self, X: Any) -> Any:
        """Component of each point (N,), int64."""
        return self._apply(X, lambda mixture, x: mixture.predict(x, **self._engine()))

    def predict_proba(self, X: Any) -> Any:
        """Responsibilities (N, K); for the few largest of a big cloud see :meth:`Mixture.responsibilities`."""
        return self._apply(X, lambda mixture, x: mixture.responsibilities(x))

    def score_samples(self, X: Any) -> Any:
        """Log-density of each point (N,), nats."""
        return self._apply(X, lambda mixture, x: mixture.log_prob(x, **self._engine()))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean log-density, nats per point."""
        if not readable(X):
            values = as_tensor(self.score_samples(X), name="scores").double()
            g = as_weights(sample_weight, values, name="sample_weight")
            return float(values.mean() if g is None else g.to(values) @ values / g.sum().to(values))
        self._require_fitted()
        return selection.score(self.mixture_, X, weights=sample_weight)

    def bic(self, X: Any) -> float:
        """Bayesian information criterion, the lower the better: -2 N score + parameters · log N."""
        return self._criterion(X, selection.bic)

    def aic(self, X: Any) -> float:
        """Akaike information criterion, the lower the better: -2 N score + 2 parameters."""
        return self._criterion(X, selection.aic)

    def icl(self, X: Any) -> float:
        """Integrated completed likelihood, the lower the better: BIC + 2 entropy of the assignments."""
        return self._criterion(X, selection.icl)

    def _criterion(self, X: Any, function: Callable[[Mixture, Any], float]) -> float:
        if readable(X):
            self._require_fitted()
            return function(self.mixture_, X)
        return float(self._apply(X, lambda mixture, x: torch.tensor(function(mixture, x), dtype=torch.float64)))

    def sample(
        self,
        n_samples: int = 1,
        *,
        component: int | None = None,
        confidence: float | None = None,
        std_range: tuple[float, float] | None = None,
    ) -> tuple[Any, Any]:
        """Draws points and their components.

        Args:
            n_samples: How many.
            component, confidence, std_range: As for :meth:`Mixture.sample`.

        Returns:
            Points (n, D) and components (n,).

        Raises:
            ValueError: n_samples is below one; or as :meth:`Mixture.sample`.
        """
        self._require_fitted()
        if n_samples < 1:
            raise ValueError(f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one sample.")
        x, labels = self.mixture_.sample(
            int(n_samples),
            return_labels=True,
            generator=_generator(self.random_state, self.mixture_.means.device),
            component=component,
            confidence=confidence,
            std_range=std_range,
        )
        return self._out(x, self._tensors), self._out(labels, self._tensors)


def _features(x: Tensor | Source) -> int:
    return x.features if isinstance(x, Source) else x.shape[1]


def _improves(found: FitResult, best: FitResult | None) -> bool:
    return best is None or found.objective < best.objective - _TIE * max(1.0, abs(best.objective))


def _generator(random_state: Any, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if random_state is None:
        generator.seed()
        return generator
    if isinstance(random_state, (int, np.integer)):
        return generator.manual_seed(int(random_state) % (1 << 63))
    if isinstance(random_state, np.random.Generator):
        return generator.manual_seed(int(random_state.integers(1 << 62)))
    if isinstance(random_state, np.random.RandomState):
        return generator.manual_seed(int(random_state.randint(1 << 31)))
    raise TypeError(f"random_state must be None, an int or a numpy generator, got {type(random_state).__name__}.")
