"""Initialization of an estimator by ``init_params``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import PrecisionWarning
from gmmkeops.data import Source, World, representatives
from gmmkeops.fitting import EM, FitResult, Method, fit, initialize
from gmmkeops.models import Mixture

__all__ = ["STRATEGIES", "improves", "initial_mixture"]

# Strategy of :func:`gmmkeops.initialize` for each value of ``init_params`` in scikit-learn and tgmm.
STRATEGIES = {
    "kmeans": "kmeans",
    "k-means++": "kmeans++",
    "kmeans++": "kmeans++",
    "kpp": "kmeans++",
    "random": "responsibilities",
    "random_from_data": "random",
    "points": "random",
}

# Number of k-means initializations that are compared after some EM steps: on a sample of a large data set, and on all points of
# a small one, where a trial takes as long as the fit. It is at most _MANY / K, since results vary less with many components.
_CANDIDATES, _FEW = 8, 3

_MANY = 400

# Size of the sample, and number of EM steps.
_SAMPLE = 20_000

_STEPS = 20

# Relative difference below which two objectives are considered equal, so that the first fit is kept.
_TIE = 1e-9


def improves(found: FitResult, best: FitResult | None) -> bool:
    """Return whether a fit has a lower objective than the best one so far."""
    return best is None or found.objective < best.objective - _TIE * max(1.0, abs(best.objective))


def initial_mixture(
    x: Tensor | Source,
    g: Any,
    components: int,
    init_params: str,
    *,
    covariance_type: str,
    method: Method[Any],
    generator: torch.Generator,
    backend: str,
) -> Mixture:
    """Compute an initial mixture by ``init_params``; for k-means, the best of several after some EM steps (em-EM).

    Args:
        x: Points (N, D), data units, or a source.
        g: Weight of each point (N,), or None.
        components: Number of components K.
        init_params: One of :data:`STRATEGIES`.
        covariance_type: Covariance type of the mixture.
        method: Method of the fit that follows.
        generator: Random number generator.
        backend: ``"auto"``, ``"native"``, ``"keops"`` or ``"dense"``.

    Reference:
        Biernacki, Celeux and Govaert 2003, *Choosing starting values for the EM algorithm*, CSDA 41.
    """
    options: Any = {"covariance_type": covariance_type, "generator": generator, "backend": backend}
    K, strategy = components, STRATEGIES[init_params]
    if strategy != "kmeans" or K == 1 or K > _MANY // 2 or method.max_iter == 0:
        return initialize(x, K, strategy, sample_weight=g, n_init=1, **options)
    world = World()
    with world.together():
        part, weights, rows, _ = representatives(x, g, max(_SAMPLE, 200 * K), world)
    best: FitResult | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        for _ in range(min(_MANY // K, _CANDIDATES if len(part) < rows else _FEW)):
            start = initialize(part, K, strategy, sample_weight=weights, n_init=1, **options)
            trial = EM(reg_covar=getattr(method, "reg_covar", EM.reg_covar), tol=0)
            found = fit(start, part, trial, sample_weight=weights, max_iter=_STEPS, backend=backend, verbose=False)
            if improves(found, best):
                best = found
    assert best is not None, "there are candidates"
    return best.mixture
