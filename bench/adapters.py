"""Who is measured: each peer's own way to run a given number of iterations from a given start, and nothing else.

An adapter takes a case, points (N, D) and the start, and returns a function of the number of iterations that runs the peer
and gives back its weights, means and covariances. Making what a peer needs beforehand is the adapter's work, not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["BAYES", "EM", "FIT", "LOSS", "PACKAGES", "SCORE", "ours_until"]

# What each adapter needs installed, for versions and for saying that it is not.
PACKAGES = {
    "gmmkeops": "gmmkeops",
    "GMM module": "gmmkeops",
    "KeOps tutorial": "pykeops",
    "torch in chunks": "torch",
    "torch.distributions": "torch",
    # A file to be put on PYTHONPATH, from github.com/IBM/Flash-GMM; there is no package.
    "Flash-GMM": "flash_gmm",
}


def ours(precision: str = "highest", **options: Any) -> Callable[..., Any]:
    """This package by :func:`gmmkeops.fit`, with torch's precision of products, its engine and truncation as given."""

    def adapter(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
        import torch

        import gmmkeops as gk

        torch.set_float32_matmul_precision(precision)
        weights, means, covariances = start
        if case.family == "spherical":
            covariances = covariances[:, 0, 0]
        mixture = gk.Mixture.from_parameters(weights, means, covariances, covariance_type=case.family).to(case.device)
        points = torch.from_numpy(x).to(case.device)

        def run(iterations: int) -> Any:
            result = gk.fit(mixture, points, gk.EM(tol=0), max_iter=iterations, verbose=False, **options)
            fitted, report = result.mixture.to("cpu"), result.report
            note = {"engine": report.engine, "pairs": report.evaluated_fraction, "certificate": report.certificate}
            return fitted.weights, fitted.means, fitted.factor.covariances(), note

        return run

    return adapter


def ours_until(case: Any, x: np.ndarray) -> dict[str, Any]:
    """Seconds of this package from nothing to the case's log-likelihood."""
    import time

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
    fitted = result.mixture
    return {
        "seconds": time.perf_counter() - began,
        "start_seconds": started,
        "iterations": result.n_iter,
        "parameters": (fitted.weights, fitted.means, fitted.factor.covariances()),
    }


def scikit_learn(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    from sklearn.mixture import GaussianMixture

    weights, means, covariances = start
    given = {
        "weights_init": weights.astype(x.dtype),
        "means_init": means.astype(x.dtype),
        "precisions_init": np.linalg.inv(covariances).astype(x.dtype),
    }

    def run(iterations: int) -> Any:
        # With a given start the cheapest initialization is asked for, since it is only there to be thrown away.
        model = GaussianMixture(case.K, max_iter=iterations, tol=0.0, init_params="random_from_data", **given).fit(x)
        return model.weights_, model.means_, model.covariances_, {}

    return run


def tgmm(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    import torch
    from tgmm import GaussianMixture

    points = torch.from_numpy(x).to(case.device)

    def run(iterations: int) -> Any:
        model = GaussianMixture(
            n_components=case.K,
            n_features=case.D,
            covariance_type="full",
            max_iter=iterations,
            tol=1e-300,
            init_means=torch.from_numpy(start[1].astype(np.float32)).to(case.device),
            device=case.device,
        )
        model.fit(points)
        return model.weights_.cpu(), model.means_.cpu(), model.covariances_.cpu(), {}

    return run


def pomegranate(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    import torch
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    points = torch.from_numpy(x)

    def run(iterations: int) -> Any:
        parts = [
            Normal(torch.tensor(m, dtype=torch.float32), torch.tensor(c, dtype=torch.float32), covariance_type="full")
            for m, c in zip(start[1], start[2], strict=True)
        ]
        model = GeneralMixtureModel(
            parts, priors=torch.tensor(start[0], dtype=torch.float32), max_iter=iterations, tol=-1e300
        )
        model.fit(points)
        means = torch.stack([part.means for part in model.distributions])
        covariances = torch.stack([part.covs for part in model.distributions])
        return model.priors.detach(), means.detach(), covariances.detach(), {}

    return run


def torchgmm(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    import logging

    import torch
    from torchgmm.bayes import GaussianMixture

    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    points = torch.from_numpy(x)

    def run(iterations: int) -> Any:
        options = {"max_epochs": iterations, "enable_progress_bar": False, "accelerator": "cpu", "logger": False}
        model = GaussianMixture(
            case.K,
            covariance_type="full",
            init_means=torch.tensor(start[1], dtype=torch.float32),
            convergence_tolerance=0.0,
            trainer_params=options,
        )
        model.fit(points)
        inner = model.model_
        return inner.component_probs.detach(), inner.means.detach(), inner.covariances.detach(), {}

    return run


def gmmx(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    import jax
    from gmmx import EMFitter, GaussianMixtureModelJax

    points = jax.numpy.asarray(x)

    def run(iterations: int) -> Any:
        weights, means, covariances = (jax.numpy.asarray(part, dtype=jax.numpy.float32) for part in start)
        model = GaussianMixtureModelJax.from_squeezed(
            weights=weights, means=means, covariances=covariances, covariance_type="full"
        )
        found = EMFitter(tol=0.0, max_iter=iterations).fit(x=points, gmm=model).gmm
        parts = (found.weights, found.means, found.covariances.values)
        w, m, c = (np.asarray(jax.block_until_ready(part)) for part in parts)
        return w.reshape(case.K), m.reshape(case.K, case.D), c.reshape(case.K, case.D, case.D), {}

    return run


def chunked_torch(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    """EM as one writes it in torch when the N x K array does not fit: whitened residuals, float32, chunk by chunk."""
    import torch

    points = torch.from_numpy(x).to(case.device)
    rows = max(1, (1 << 22) // (case.K * case.D))

    def run(iterations: int) -> Any:
        weights, means, covariances = (torch.tensor(part, dtype=torch.float32, device=case.device) for part in start)
        for _ in range(iterations):
            factor = torch.linalg.inv(torch.linalg.cholesky(covariances))
            constant = weights.log() + factor.diagonal(dim1=1, dim2=2).log().sum(1) - case.D / 2 * math.log(2 * math.pi)
            sums = [torch.zeros_like(part) for part in (weights, means, covariances)]
            for part in points.split(rows):
                z = part[:, None] - means
                y = torch.einsum("kij,nkj->nki", factor, z)
                r = torch.softmax(constant - 0.5 * y.square().sum(-1), 1)
                sums[0] += r.sum(0)
                sums[1] += r.T @ part
                sums[2] += torch.einsum("nk,nki,nkj->kij", r, z, z)
            shift = sums[1] / sums[0][:, None] - means
            covariances = sums[2] / sums[0][:, None, None] - shift[:, :, None] * shift[:, None]
            covariances = covariances + 1e-6 * torch.eye(case.D, device=case.device)
            weights, means = sums[0] / len(points), means + shift
        return weights.cpu(), means.cpu(), covariances.cpu(), {}

    return run


def flash_gmm(module: str) -> Callable[..., Any]:
    """IBM's fused E-step, float32 or, tuned for one GPU, bfloat16; its M-step is about the new means, as an EM step is."""

    def adapter(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
        import importlib

        import torch

        step = importlib.import_module(module).flash_gmm_estep
        points = torch.from_numpy(x).to(case.device)
        first = (start[0], start[1], start[2][:, 0, 0])

        def run(iterations: int) -> Any:
            weights, means, variances = (torch.tensor(part, dtype=torch.float32, device=case.device) for part in first)
            for _ in range(iterations):
                _, S0, S1, S2 = step(points, means, variances.log(), weights.log())
                shift = S1 / S0[:, None] - means
                weights, means = S0 / len(points), means + shift
                variances = (S2 / S0 - shift.square().sum(1)) / case.D
            return weights.cpu(), means.cpu(), variances.cpu(), {}

        return run

    return adapter


EM = {
    "gmmkeops": ours(),
    "gmmkeops, 1e-4": ours(truncate=1e-4),
    "gmmkeops, 1e-6": ours(truncate=1e-6),
    "gmmkeops, every pair": ours(truncate=0),
    "gmmkeops, dense": ours(truncate=0, backend="dense"),
    "gmmkeops, float32 products": ours(precision="high", truncate=0, backend="dense"),
    "gmmkeops, KeOps": ours(truncate=0, backend="keops"),
    "gmmkeops, KeOps 1e-4": ours(truncate=1e-4, backend="keops"),
    "scikit-learn": scikit_learn,
    "tgmm": tgmm,
    "pomegranate": pomegranate,
    "torchgmm": torchgmm,
    "gmmx": gmmx,
    "torch in chunks": chunked_torch,
    "Flash-GMM": flash_gmm("flash_gmm"),
    "Flash-GMM, H100": flash_gmm("flash_gmm_h100"),
}


def score_ours(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    import torch

    import gmmkeops as gk

    mixture, points = gk.Mixture.from_parameters(*start).to(case.device), torch.from_numpy(x).to(case.device)
    return lambda: mixture.log_prob(points)


def score_torch(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    import torch
    from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

    weights, means, covariances = (torch.tensor(part, dtype=torch.float32, device=case.device) for part in start)
    parts = MultivariateNormal(means, covariances, validate_args=False)
    mixture, points = MixtureSameFamily(Categorical(weights), parts), torch.from_numpy(x).to(case.device)
    return lambda: mixture.log_prob(points)


def score_scikit_learn(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    import warnings

    import torch
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GaussianMixture(case.K, max_iter=1, init_params="random_from_data").fit(x[: 10 * case.K])
    model.weights_, model.means_, model.covariances_ = (part.astype(x.dtype) for part in start)
    model.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(start[2])).astype(x.dtype)
    return lambda: torch.from_numpy(model.score_samples(x))


SCORE = {"gmmkeops": score_ours, "torch.distributions": score_torch, "scikit-learn": score_scikit_learn}


def fit_ours(case: Any, x: np.ndarray) -> Any:
    import gmmkeops as gk

    model = gk.GaussianMixture(case.K, max_iter=1000, tol=1e-4, random_state=0).fit(x)
    return model.weights_, model.means_, model.covariances_, model.n_iter_


def fit_scikit_learn(case: Any, x: np.ndarray) -> Any:
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(case.K, max_iter=1000, tol=1e-4, random_state=0).fit(x)
    return model.weights_, model.means_, model.covariances_, model.n_iter_


def fit_tgmm(case: Any, x: np.ndarray) -> Any:
    import torch
    from tgmm import GaussianMixture

    model = GaussianMixture(
        case.K, case.D, covariance_type="full", max_iter=1000, tol=1e-4, init_means="kmeans", device="cpu"
    )
    model.fit(torch.from_numpy(x))
    return model.weights_, model.means_, model.covariances_, int(model.n_iter_)


FIT = {"gmmkeops": fit_ours, "scikit-learn": fit_scikit_learn, "tgmm": fit_tgmm}


def variational(package: str) -> Callable[..., Any]:
    """The Bayesian estimator of this package or of scikit-learn, which have the same names; starts are random points."""

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


BAYES = {
    "gmmkeops": variational("gmmkeops"),
    "gmmkeops, Gibbs": gibbs,
    "scikit-learn": variational("sklearn.mixture"),
}


def problem(case: Any, x: np.ndarray) -> tuple[Any, ...]:
    """Points, logits, means and precision factors of a loss case, as torch tensors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    means = torch.rand(case.K, case.D, generator=generator)
    A = 3 * torch.eye(case.D) + 0.3 * torch.randn(case.K, case.D, case.D, generator=generator).triu()
    return tuple(part.to(case.device) for part in (torch.from_numpy(x), torch.ones(case.K), means, A))


def keops_tutorial(case: Any, x: np.ndarray) -> Callable[[], float]:
    """The tutorial's formula, as its readers write it; its loss lacks the constant (D/2) log π, added here."""
    import torch
    from pykeops.torch import Vi, Vj

    points, *start = problem(case, x)
    w, mu, A = (part.clone().requires_grad_() for part in start)

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
    start = gk.Mixture(w, mu, gk.FullFactor.from_factors(A))
    model = gk.GMM(case.D, n_components=case.K, epsilon=0.0).to(case.device).assign(start)

    def run() -> float:
        model.zero_grad()
        loss = -model().log_prob(points).mean()
        loss.backward()
        return float(loss.detach())

    return run


def fused(case: Any, x: np.ndarray) -> Callable[[], float]:
    """The value and gradient that a fit by gradient asks for."""
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


def zuko(case: Any, x: np.ndarray) -> Callable[[], float]:
    from zuko.mixtures import GMM

    points, *_ = problem(case, x)
    model = GMM(case.D, n_components=case.K, covariance_type="full").to(case.device)

    def run() -> float:
        model.zero_grad()
        loss = -model().log_prob(points).mean()
        loss.backward()
        return float(loss.detach())

    # Its parameters are its own: the loss is another one, the work is the same.
    run.other_loss = True
    return run


LOSS = {"gmmkeops": fused, "GMM module": module, "KeOps tutorial": keops_tutorial, "zuko": zuko}
