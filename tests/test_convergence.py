"""The test of convergence: a converged fit has little left to gain, and others warn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import (
    blobs,
    tutorial_spiral,
)

import gmmkeops as gk
from gmmkeops import penalties as P


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "strength"),
    [
        (2000, 20, 0),
        (2000, 20, 20),
        (2000, 8, 2),
        pytest.param(1000, 12, 20, marks=pytest.mark.slow),
        pytest.param(1000, 30, 60, marks=pytest.mark.slow),
    ],
)
def test_a_converged_fit_has_little_left_to_gain(N, K, strength, accelerate):
    x, tol = tutorial_spiral(N, 1), gk.EM().tol
    penalty = P.SqrtWeights(strength) if strength else None
    start = gk.initialize(x, K, "kmeans", n_init=3)
    result = gk.fit(start, x, gk.EM(accelerate=accelerate), penalty=penalty, max_iter=2000)
    assert result.converged
    more = gk.fit(result.mixture, x, gk.EM(tol=0), penalty=penalty, max_iter=1000)
    assert result.objective - more.objective <= 3 * tol


@pytest.mark.slow
# One of the data sets, 27 components in one dimension, has a component of a single point.
@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
def test_most_converged_fits_have_little_left_to_gain():
    """Random mixtures that overlap: after convergence at the default tolerance, 1000 iterations gain 3 tolerances."""
    kept, iterations = [], []
    for seed in range(24):
        rng = np.random.RandomState(seed)
        K, D = rng.randint(2, 30), rng.randint(1, 8)
        scales = np.exp(0.5 * rng.randn(K))
        labels = rng.choice(K, 3000, p=rng.dirichlet(np.full(K, 2.0)))
        x = torch.from_numpy(2.5 * rng.randn(K, D)[labels] + scales[labels, None] * rng.randn(3000, D))
        result = gk.fit(gk.initialize(x, K), x, gk.EM(), max_iter=3000)
        more = gk.fit(result.mixture, x, gk.EM(tol=0), max_iter=1000)
        kept.append(result.objective - more.objective <= 3 * gk.EM().tol)
        iterations.append(result.n_iter)
    assert np.mean(kept) >= 0.75, (np.mean(kept), np.median(iterations))


def test_tolerance():
    x = blobs()
    start = gk.initialize(x, 3)
    result = gk.fit(start, x, gk.Adam(lr=0.02), tol=1e-3, max_iter=1000)
    assert result.converged
    assert result.n_iter < 1000
    with pytest.warns(gk.ConvergenceWarning, match="did not converge to tol=1e-09 within 5 iterations"):
        assert not gk.fit(start, x, gk.Adam(lr=0.02), tol=1e-9, max_iter=5).converged
