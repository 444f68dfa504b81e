"""``reg_covar``: the ridge of scikit-learn, in every variant of EM and however the points are read."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import FAMILIES, cloud, plain_start
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk
from gmmkeops import penalties as P


def ridge_data(name):
    rng = np.random.RandomState(5)
    blobs = np.r_[
        rng.randn(120, 2) @ [[1.0, 0.3], [0.0, 1.2]], [5, 4] + 1.5 * rng.randn(140, 2), [9, 0] + 0.4 * rng.randn(90, 2)
    ]
    return {
        "blobs": blobs,
        "constant column": np.c_[blobs, np.full(len(blobs), 3.0)],
        "integer counts": rng.poisson([2, 5, 9], (400, 3)).astype(float),
        "variance near the ridge": 1e-3 * blobs,
        "heavy tails": rng.standard_t(2, (400, 2)),
    }[name]


def ridge_start(x, K, family):
    """Equal weights, points of the data, and the mean variance: what both libraries take as arguments."""
    D, precision = x.shape[1], 1 / x.var(0).mean()
    shapes = {
        "full": np.stack([precision * np.eye(D)] * K),
        "tied": precision * np.eye(D),
        "diag": np.full((K, D), precision),
        "spherical": np.full(K, precision),
    }
    means = x[np.random.RandomState(2).choice(len(x), K, replace=False)]
    return {"weights_init": np.full(K, 1 / K), "means_init": means, "precisions_init": shapes[family]}


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("ridge", [0, 1e-6, 1e-2, 1, 10])
@pytest.mark.parametrize(
    "name", ["blobs", "constant column", "integer counts", "variance near the ridge", "heavy tails"]
)
@pytest.mark.filterwarnings("ignore:reg_covar:gmmkeops.PrecisionWarning")
@pytest.mark.filterwarnings("ignore:Initialization did not converge", "ignore:Best performing init")
def test_the_ridge_is_that_of_scikit_learn(name, ridge, family):
    x = ridge_data(name)
    for K in (1, 3):
        settings = {
            "covariance_type": family,
            "reg_covar": ridge,
            "tol": 0,
            "max_iter": 50,
            **ridge_start(x, K, family),
        }
        ours = gk.GaussianMixture(K, **settings).fit(x)
        history = np.array(ours.result_.history["objective"])
        assert np.diff(history).max() <= 1e-12 * max(1, np.abs(history).max())
        eigenvalues = torch.linalg.eigvalsh(ours.mixture_.factor.covariances())
        assert float(eigenvalues.min()) >= ridge * (1 - 1e-9)
        if ridge == 0 and name == "constant column" and family != "spherical":
            with pytest.raises(ValueError, match="ill-defined empirical covariance"):
                Theirs(K, **settings).fit(x)
            continue
        theirs = Theirs(K, **settings).fit(x)
        unit = x.var(0).max()
        assert np.abs(ours.weights_ - theirs.weights_).max() < 1e-8
        assert np.abs(ours.means_ - theirs.means_).max() < 1e-8 * math.sqrt(unit)
        assert np.abs(ours.covariances_ - theirs.covariances_).max() < 1e-8 * max(unit, ridge)
        assert ours.bic(x) == pytest.approx(theirs.bic(x), rel=1e-8)
        assert ours.aic(x) == pytest.approx(theirs.aic(x), rel=1e-8)
        assert ours.lower_bound_ == pytest.approx(theirs.score(x), rel=1e-8, abs=1e-8)


VARIANTS = {
    "plain": {},
    "accelerated": {"accelerate": True},
    "hard": {"assignment": "hard"},
    "stochastic": {"assignment": "stochastic"},
    "annealed": {"temperature": (0.3, 10)},
    "frozen": {"frozen_means": [True, False, False]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_adds_the_ridge_to_its_last_covariances(variant, family):
    """With one component every variant is in closed form: the covariance of the data plus the ridge."""
    x = torch.from_numpy(ridge_data("blobs"))
    keywords = {name: value for name, value in VARIANTS[variant].items() if name != "frozen_means"}
    start = gk.Mixture.from_parameters([1.0], [[1.0, 1.0]], torch.ones(1, 2), "diag")
    kind, _ = gk.components.factor_class(family)
    start = gk.Mixture(
        start.logits,
        start.means,
        kind(
            torch.zeros(1, 2 if kind is not gk.SphericalFactor else 1),
            **({"features": 2} if kind is gk.SphericalFactor else {}),
        ),
    )
    result = gk.fit(start, x, gk.EM(reg_covar=10.0, tol=0, **keywords), max_iter=30)
    exact = np.cov(x.numpy().T, bias=True) + 10 * np.eye(2)
    if kind is not gk.FullFactor:
        exact = np.diag(np.diag(exact))
    if kind is gk.SphericalFactor:
        exact = np.eye(2) * np.diag(exact).mean()
    got = result.mixture.factor.covariances()[0].numpy()
    assert np.abs(got - exact).max() < 1e-9 * np.abs(exact).max()
    # Three components: no eigenvalue is below the ridge, and no variant returns its start.
    start = plain_start(x, 3, family)
    result = gk.fit(start, x, gk.EM(reg_covar=2.0, tol=0, **VARIANTS[variant]), max_iter=30)
    assert float(torch.linalg.eigvalsh(result.mixture.factor.covariances()).min()) > 2.0 * (1 - 1e-9)
    assert float((result.mixture.means - start.means).abs().max()) > 0.1
    if variant in ("plain", "accelerated", "hard", "frozen"):
        assert max(b - a for a, b in itertools.pairwise(result.history["objective"])) < 1e-10


@pytest.mark.parametrize("read", ["memory", "chunks", "truncated"])
@pytest.mark.parametrize("penalty", [None, P.SqrtWeights(0.5), P.InverseWishart(3.0, 6.0)])
def test_the_ridge_holds_however_the_points_are_read(read, penalty):
    x = torch.from_numpy(ridge_data("heavy tails"))
    start, method = plain_start(x, 3, "full"), gk.EM(reg_covar=1.0, tol=0)
    points = gk.Source.of(x, chunk_rows=64) if read == "chunks" else x
    result = gk.fit(start, points, method, max_iter=40, penalty=penalty, truncate=1e-9 if read == "truncated" else 0)
    assert max(b - a for a, b in itertools.pairwise(result.history["objective"])) < 1e-8
    assert float(torch.linalg.eigvalsh(result.mixture.factor.covariances()).min()) > 1 - 1e-9
    exact = result.mixture.log_prob(x).mean() - (0 if penalty is None else penalty(result.mixture, len(x)))
    assert result.objective == pytest.approx(-float(exact), abs=1e-7)


def test_a_ridge_in_other_units_is_called_out():
    x = cloud()
    single = gk.GaussianMixture(2, random_state=0).fit(x)
    typical = np.median(np.diagonal(single.covariances_, axis1=1, axis2=2), axis=0).max()
    for share, warns in ((0.1, False), (100.0, True), (1e6, True)):
        small = x * (1e-6 / share / typical) ** 0.5
        with (
            pytest.warns(gk.PrecisionWarning, match="reg_covar=1e-06 dominates the covariances")
            if warns
            else contextlib.nullcontext()
        ):
            gk.GaussianMixture(2, random_state=0).fit(small)
            gk.GaussianMixture(2, random_state=0).partial_fit(small)
    # One column in other units is not all of them, and frozen covariances do not contain reg_covar.
    gk.GaussianMixture(2, random_state=0).fit(x * torch.tensor([1.0, 1e-6]))
    start = single.mixture_
    gk.fit(start, x, gk.EM(reg_covar=100.0, frozen_covariances=True, tol=0), max_iter=2)
