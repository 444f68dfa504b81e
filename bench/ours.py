"""Adapters of this package; see adapters.py for the interface."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "engine",
    "estimator",
    "fitted",
    "fused",
    "gibbs",
    "keops_tutorial",
    "module",
    "problem",
    "scores",
    "until",
    "variational",
]


def engine(precision: str = "highest", **options: Any) -> Callable[..., Any]:
    """EM by :func:`gmmkeops.fit`, with torch's precision of products, an engine and a truncation."""

    def adapter(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
        import torch

        import gmmkeops as gk

        torch.set_float32_matmul_precision(precision)
        mixture = gk.Mixture.from_parameters(*start, covariance_type=case.family).to(case.device)
        points = torch.from_numpy(x).to(case.device)

        def run(iterations: int) -> Any:
            result = gk.fit(mixture, points, gk.EM(tol=0), max_iter=iterations, verbose=False, **options)
            found, report = result.mixture.to("cpu"), result.report
            note = {"engine": report.engine, "pairs": report.evaluated_fraction, "certificate": report.certificate}
            return found.weights, found.means, found.factor.covariances(), {**note, "done": result.n_iter}

        return run

    return adapter


def estimator(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    """EM by the estimator, with the options of scikit-learn's."""
    from peers import precisions

    import gmmkeops as gk

    options = {"weights_init": start[0], "means_init": start[1], "precisions_init": precisions(start[2], case.family)}

    def run(iterations: int) -> Any:
        model = gk.GaussianMixture(case.K, covariance_type=case.family, max_iter=iterations, tol=0.0, **options).fit(x)
        return model.weights_, model.means_, model.covariances_, {"done": model.n_iter_}

    return run


def scores(backend: str) -> Callable[..., Any]:
    """Log-densities of all points by an engine."""

    def adapter(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
        import torch

        import gmmkeops as gk

        mixture = gk.Mixture.from_parameters(*start, covariance_type=case.family).to(case.device)
        points = torch.from_numpy(x).to(case.device)
        return lambda: mixture.log_prob(points, backend=backend)

    return adapter


def fitted(case: Any, x: np.ndarray) -> Any:
    """A whole fit from k-means."""
    import gmmkeops as gk

    model = gk.GaussianMixture(case.K, max_iter=1000, tol=1e-4, random_state=0).fit(x)
    return model.weights_, model.means_, model.covariances_, model.n_iter_


def until(case: Any, x: np.ndarray) -> dict[str, Any]:
    """Fit from k-means until the case's log-likelihood is reached."""
    import torch

    import gmmkeops as gk

    points = torch.from_numpy(x).to(case.device)
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    mixture = gk.initialize(points, case.K, "kmeans", n_init=1, generator=generator)
    started = time.perf_counter() - began

    def there(step: Any) -> bool:
        return step.log_likelihood >= case.target

    result = gk.fit(mixture, points, gk.EM(tol=0), max_iter=1000, truncate=1e-4, callback=there, verbose=False)
    found = result.mixture
    return {
        "start_seconds": started,
        "iterations": result.n_iter,
        "parameters": (found.weights, found.means, found.factor.covariances()),
    }


def variational(package: str) -> Callable[..., Any]:
    """The Bayesian estimator of this package or of scikit-learn, from random points."""

    def adapter(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
        import importlib

        Estimator = importlib.import_module(package).BayesianGaussianMixture

        def run(iterations: int) -> Any:
            settings = {"max_iter": iterations, "tol": 0.0, "init_params": "random_from_data", "random_state": 0}
            model = Estimator(n_components=case.K, **settings).fit(x)
            return model.weights_, model.means_, model.covariances_, {}

        return run

    return adapter


def gibbs(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    import torch
    from torch.distributions import Dirichlet, Normal, Wishart

    import gmmkeops as gk

    K, D = case.K, case.D
    spread = Wishart(torch.tensor(D + 1.0), torch.eye(D))
    prior = gk.bayes.Prior(K, weights=Dirichlet(torch.ones(K)), means=Normal(0.0, 10.0), precisions=spread, features=D)
    points = torch.from_numpy(x)

    def run(iterations: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        draws = gk.bayes.gibbs(prior, points, draws=iterations, warmup=0, chains=1, generator=generator, progress=False)
        found = draws.mixtures
        return found.weights[-1], found.means[-1], found.factor.covariances()[-1], {}

    return run


def problem(case: Any, x: np.ndarray) -> tuple[Any, ...]:
    """Return the points, logits, means and precision factors of a loss case as torch tensors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    means = torch.rand(case.K, case.D, generator=generator)
    A = 3 * torch.eye(case.D) + 0.3 * torch.randn(case.K, case.D, case.D, generator=generator).triu()
    return tuple(part.to(case.device) for part in (torch.from_numpy(x), torch.ones(case.K), means, A))


def keops_tutorial(case: Any, x: np.ndarray) -> Callable[[], float]:
    """The formula of the KeOps tutorial; its loss lacks the constant (D/2) log π, which is added here."""
    import torch
    from pykeops.torch import Vi, Vj

    points, *first = problem(case, x)
    w, mu, A = (part.clone().requires_grad_() for part in first)

    def run() -> float:
        for part in (w, mu, A):
            part.grad = None
        gamma = (A @ A.mT) / 2
        weights = (w.softmax(0) * torch.linalg.det(gamma).sqrt())[:, None]
        exponents = -Vi(points).weightedsqdist(Vj(mu), Vj(gamma.reshape(len(A), -1)))
        loss = -exponents.logsumexp(dim=1, weight=Vj(weights)).mean()
        loss.backward()
        return float(loss.detach()) + 0.5 * case.D * math.log(math.pi)

    return run


def module(case: Any, x: np.ndarray) -> Callable[[], float]:
    import gmmkeops as gk

    points, w, mu, A = problem(case, x)
    first = gk.Mixture(w, mu, gk.FullFactor.from_factors(A))
    model = gk.GMM(case.D, n_components=case.K, epsilon=0.0).to(case.device).assign(first)

    def run() -> float:
        model.zero_grad()
        loss = -model().log_prob(points).mean()
        loss.backward()
        return float(loss.detach())

    return run


def fused(case: Any, x: np.ndarray) -> Callable[[], float]:
    """The value and gradient that a gradient method computes."""
    import gmmkeops as gk

    points, w, mu, A = problem(case, x)
    factor = gk.FullFactor.from_factors(A)
    leaves = [part.clone().requires_grad_() for part in (w, mu, *factor.tensors.values())]

    def run() -> float:
        for part in leaves:
            part.grad = None
        mixture = gk.Mixture(leaves[0], leaves[1], gk.FullFactor(*leaves[2:]), validate_args=False)
        loss = -gk.reductions.total(points, mixture.offsets, mixture.means, mixture.factor) / len(points)
        loss.backward()
        return float(loss.detach())

    return run
