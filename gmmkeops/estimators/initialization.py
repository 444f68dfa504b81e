"""Initial mixtures of an estimator by the names of scikit-learn and tgmm."""

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

# Names of ``init_params``, and of the strategies of gmmkeops.
STRATEGIES = {
    "kmeans": "kmeans",
    "k-means++": "kmeans++",
    "kmeans++": "kmeans++",
    "kpp": "kmeans++",
    "random": "responsibilities",
    "random_from_data": "random",
    "points": "random",
}

# Numbers of k-means initializations that are compared after some steps of EM: more if they run on a sample of a larger data set,
# fewer if they run on all points, where a trial takes as long as the fit, and at most _MANY / K, since results vary less with
# many components. Then the size of the sample, and the number of EM steps.
_CANDIDATES, _FEW = 8, 3

_MANY = 400

_SAMPLE = 20_000

_STEPS = 20

# Relative difference of objectives below which they are equal up to rounding, so that the first one is kept.
_TIE = 1e-9


def improves(found: FitResult, best: FitResult | None) -> bool:
    """Whether a fit has a lower objective than the best one so far."""
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
    given: bool = False,
) -> Mixture:
    """Initial mixture by ``init_params``; of several k-means, the one with the best objective after some EM steps (em-EM).

    Args:
        x: Points (N, D), data units, or a source.
        g: Weight of each point (N,), or None.
        components: Number of components K.
        init_params: One of :data:`STRATEGIES`.
        covariance_type: Covariance type of the mixture.
        method: Method of the fit that follows.
        generator: Random number generator.
        backend: ``"auto"``, ``"keops"`` or ``"dense"``.
        given: Whether all initial parameters are given by the user, so that only the shapes of the result are used.

    Reference:
        Biernacki, Celeux and Govaert 2003, *Choosing starting values for the EM algorithm*, CSDA 41.
    """
    options: Any = {"covariance_type": covariance_type, "generator": generator, "backend": backend}
    K, strategy = components, STRATEGIES[init_params]
    if strategy != "kmeans" or K == 1 or K > _MANY // 2 or given or method.max_iter == 0:
        return initialize(x, K, "random" if given else strategy, sample_weight=g, n_init=1, **options)
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
