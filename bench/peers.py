"""Adapters of other libraries; see adapters.py for the interface.

All of them begin with the weights, means and covariances of the case, in float32, and do not stop before the last iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import dense

__all__ = [
    "chunked_torch",
    "flash_gmm",
    "gmmx",
    "pomegranate",
    "precisions",
    "scikit_learn",
    "tgmm",
    "torchgmm",
    "zuko",
]


def precisions(covariances: np.ndarray, family: str) -> np.ndarray:
    """Return the inverses of covariances in scikit-learn's shape of the family."""
    return 1 / covariances if family in ("diag", "spherical") else np.linalg.inv(covariances)


def tensors(start: Any, device: str = "cpu") -> list[Any]:
    """Return the initial parameters as float32 tensors."""
    import torch

    return [torch.tensor(part, dtype=torch.float32, device=device) for part in start]


def scikit_learn(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    from sklearn.mixture import GaussianMixture

    weights, means, covariances = start
    given = {
        "weights_init": weights.astype(x.dtype),
        "means_init": means.astype(x.dtype),
        "precisions_init": precisions(covariances, case.family).astype(x.dtype),
        # It computes an initialization even if all parameters are given; this one takes the least time.
        "init_params": "random_from_data",
    }

    def run(iterations: int) -> Any:
        model = GaussianMixture(case.K, covariance_type=case.family, max_iter=iterations, tol=0.0, **given).fit(x)
        return model.weights_, model.means_, model.covariances_, {"done": model.n_iter_}

    return run


def score_scikit_learn(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(case.K, covariance_type=case.family)
    model.weights_, model.means_, model.covariances_ = (part.astype(x.dtype) for part in start)
    inverse = precisions(start[2], case.family)
    factors = np.sqrt(inverse) if case.family in ("diag", "spherical") else np.linalg.cholesky(inverse)
    model.precisions_cholesky_, model.n_features_in_ = factors.astype(x.dtype), case.D
    return lambda: model.score_samples(x)


def fit_scikit_learn(case: Any, x: np.ndarray) -> Any:
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(case.K, max_iter=1000, tol=1e-4, random_state=0).fit(x)
    return model.weights_, model.means_, model.covariances_, model.n_iter_


def _tgmm(case: Any, start: Any, **options: Any) -> Any:
    from tgmm import GaussianMixture

    weights, means, covariances = tensors(start, case.device)
    given = {"init_weights": weights, "init_means": means, "init_covariances": covariances}
    return GaussianMixture(case.K, case.D, covariance_type=case.family, device=case.device, **given, **options)


def tgmm(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    import torch

    points = torch.from_numpy(x).to(case.device)

    def run(iterations: int) -> Any:
        # It stops if a change of the likelihood, which may be zero in float32, is less than the tolerance; none is less than NaN.
        model = _tgmm(case, start, max_iter=iterations, tol=math.nan)
        model.fit(points)
        return model.weights_.cpu(), model.means_.cpu(), model.covariances_.cpu(), {}

    return run


def score_tgmm(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    import torch

    model, points = _tgmm(case, start), torch.from_numpy(x).to(case.device)
    model.weights_, model.means_, model.covariances_ = tensors(start, case.device)
    model.fitted_ = model.converged_ = True
    return lambda: model.score_samples(points)


def fit_tgmm(case: Any, x: np.ndarray) -> Any:
    import torch
    from tgmm import GaussianMixture

    options = {"covariance_type": "full", "max_iter": 1000, "tol": 1e-4, "init_means": "kmeans", "device": "cpu"}
    model = GaussianMixture(case.K, case.D, **options)
    model.fit(torch.from_numpy(x))
    return model.weights_, model.means_, model.covariances_, int(model.n_iter_)


def _pomegranate(case: Any, start: Any, **options: Any) -> Any:
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    weights, means, covariances = tensors(start)
    parts = [Normal(m, c, covariance_type=case.family) for m, c in zip(means, covariances, strict=True)]
    return GeneralMixtureModel(parts, priors=weights, **options)


def pomegranate(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    import torch

    points = torch.from_numpy(x)

    def run(iterations: int) -> Any:
        model = _pomegranate(case, start, max_iter=iterations, tol=-1e300)
        model.fit(points)
        means = torch.stack([part.means for part in model.distributions])
        covariances = torch.stack([part.covs for part in model.distributions])
        return model.priors.detach(), means.detach(), covariances.detach(), {}

    return run


def score_pomegranate(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    import torch

    model, points = _pomegranate(case, start), torch.from_numpy(x)
    return lambda: model.log_probability(points)


def _torchgmm(case: Any, start: Any) -> Any:
    import logging

    from torchgmm.bayes.core import cholesky_precision
    from torchgmm.bayes.gmm.model import GaussianMixtureModel, GaussianMixtureModelConfig

    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    weights, means, covariances = tensors(start)
    model = GaussianMixtureModel(GaussianMixtureModelConfig(case.K, case.D, case.family))
    model.component_probs.copy_(weights)
    model.means.copy_(means)
    model.precisions_cholesky.copy_(cholesky_precision(covariances, case.family))
    return model


def torchgmm(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    """EM by its training module, called as its ``fit`` does, with two epochs an iteration; ``fit`` accepts initial means only."""
    import torch
    from torchgmm.base.data import DataLoader, collate_tensor, dataset_from_tensors
    from torchgmm.bayes import GaussianMixture
    from torchgmm.bayes.gmm.lightning_module import GaussianMixtureLightningModule

    points = torch.from_numpy(x)
    options = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False}
    estimator = GaussianMixture(case.K, covariance_type=case.family, trainer_params=options)

    def run(iterations: int) -> Any:
        model = _torchgmm(case, start)
        training = GaussianMixtureLightningModule(model, convergence_tolerance=0.0, is_batch_training=True)
        loader = DataLoader(dataset_from_tensors(points), batch_size=len(points), collate_fn=collate_tensor)
        estimator.trainer(max_epochs=2 * iterations).fit(training, loader)
        done = {"done": training.current_epoch // 2}
        return model.component_probs.detach(), model.means.detach(), model.covariances.detach(), done

    return run


def score_torchgmm(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    """Its module; ``score_samples`` of its estimator starts a trainer in each call."""
    import torch

    model, points = _torchgmm(case, start), torch.from_numpy(x)
    return lambda: model(points)[1].detach()


def _gmmx(case: Any, start: Any) -> Any:
    import jax
    from gmmx import GaussianMixtureModelJax

    weights, means, covariances = (jax.numpy.asarray(part, dtype=jax.numpy.float32) for part in start)
    return GaussianMixtureModelJax.from_squeezed(
        weights=weights, means=means, covariances=covariances, covariance_type=case.family
    )


def gmmx(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    import jax
    from gmmx import EMFitter

    points, shape = jax.numpy.asarray(x), start[2].shape

    def run(iterations: int) -> Any:
        found = EMFitter(tol=0.0, max_iter=iterations).fit(x=points, gmm=_gmmx(case, start))
        parts = (found.gmm.weights, found.gmm.means, found.gmm.covariances.values)
        w, m, c = (np.asarray(jax.block_until_ready(part)) for part in parts)
        return w.reshape(case.K), m.reshape(case.K, case.D), c.reshape(shape), {"done": int(found.n_iter)}

    return run


def score_gmmx(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    import jax

    model, points = _gmmx(case, start), jax.numpy.asarray(x)
    score = jax.jit(lambda given: model.score_samples(given))
    return lambda: score(points).block_until_ready()


def score_torch(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    import torch
    from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

    weights, means, covariances = tensors((*start[:2], dense(start[2], case.K, case.D, case.family)), case.device)
    parts = MultivariateNormal(means, covariances, validate_args=False)
    mixture, points = MixtureSameFamily(Categorical(weights), parts), torch.from_numpy(x).to(case.device)
    return lambda: mixture.log_prob(points)


def _zuko(case: Any, log_weights: Any, means: Any, factors: Any) -> Any:
    """Return zuko's model with the lower Cholesky factors (K, D, D) of full covariances."""
    import torch
    from zuko.mixtures import GMM

    model = GMM(case.D, components=case.K, covariance_type="full", epsilon=0.0).to(case.device)
    rows, columns = torch.tril_indices(case.D, case.D, offset=-1)
    diagonals, below = factors.diagonal(dim1=-2, dim2=-1).log(), factors[:, rows, columns]
    with torch.no_grad():
        for part, value in zip(model.phi, (log_weights, means, diagonals, below), strict=True):
            part.copy_(value)
    return model


def zuko(case: Any, x: np.ndarray) -> Callable[[], float]:
    import torch
    from ours import problem

    points, logits, means, A = problem(case, x)
    model = _zuko(case, logits, means, torch.linalg.cholesky(torch.linalg.inv(A @ A.mT)))

    def run() -> float:
        model.zero_grad()
        loss = -model().log_prob(points).mean()
        loss.backward()
        return float(loss.detach())

    return run


def score_zuko(case: Any, x: np.ndarray, start: Any) -> Callable[[], Any]:
    import torch

    weights, means, covariances = tensors((*start[:2], dense(start[2], case.K, case.D, case.family)), case.device)
    model, points = _zuko(case, weights.log(), means, torch.linalg.cholesky(covariances)), torch.from_numpy(x)

    def run() -> Any:
        with torch.no_grad():
            return model().log_prob(points.to(case.device))

    return run


def chunked_torch(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
    """EM in torch without an N x K array: residuals from the means, float32, chunk by chunk."""
    import torch

    points = torch.from_numpy(x).to(case.device)
    rows = max(1, (1 << 22) // (case.K * case.D))

    def run(iterations: int) -> Any:
        weights, means, covariances = tensors(start, case.device)
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
    """IBM's fused E-step for spherical covariances on GPUs, with an M-step about the new means."""

    def adapter(case: Any, x: np.ndarray, start: Any) -> Callable[[int], Any]:
        import importlib

        import torch

        step = importlib.import_module(module).flash_gmm_estep
        points = torch.from_numpy(x).to(case.device)

        def run(iterations: int) -> Any:
            weights, means, variances = tensors(start, case.device)
            for _ in range(iterations):
                _, S0, S1, S2 = step(points, means, variances.log(), weights.log())
                shift = S1 / S0[:, None] - means
                weights, means = S0 / len(points), means + shift
                variances = (S2 / S0 - shift.square().sum(1)) / case.D
            return weights.cpu(), means.cpu(), variances.cpu(), {}

        return run

    return adapter
