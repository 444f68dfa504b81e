"""One distant value, or two distant sites, change neither starts nor fits of the rest."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk

TYPES = ["full", "tied", "diag", "spherical"]


def groups(D, N=900, seed=0, spread=8.0):
    """Three clusters with variances of about one and unequal weights."""
    generator = np.random.default_rng(seed)
    label = generator.choice(3, size=N, p=[0.5, 0.3, 0.2])
    centers = spread * np.array([[0.0, 0.0, 0.0], [1.0, 0.4, -0.7], [-0.8, 1.0, 0.9]])[:, :D]
    shape = generator.normal(size=(3, D, D)) * 0.3 + np.eye(D)
    return centers[label] + np.einsum("nde,ne->nd", shape[label], generator.normal(size=(N, D)))


def sites(gap, D, N=900):
    """Two sites of three clusters each."""
    return np.concatenate([groups(D, N // 2), 0.9 * groups(D, N // 2, seed=1) + gap])


@pytest.mark.parametrize("gap", [1e7, 1e8, -3e8])
@pytest.mark.parametrize("D", [1, 3])
@pytest.mark.parametrize("family", TYPES)
def test_two_distant_sites_fit_as_two_near_ones_do(family, D, gap):
    """Points of one site have no density from the other: the likelihood is that of sites 10⁴ apart, by scikit-learn."""
    x = sites(gap, D)
    near = np.where(x[:, :1] > 0.5 * gap, x - gap + 1e4, x) if gap > 0 else np.where(x < 0.5 * gap, x - gap - 1e4, x)
    best = max(
        Theirs(6, covariance_type=family, tol=1e-6, max_iter=500, random_state=i).fit(near).score(near)
        for i in range(2)
    )
    ours = gk.GaussianMixture(6, covariance_type=family, tol=1e-6, max_iter=500, random_state=0).fit(x)
    assert ours.score(x) > best - 1e-3
    side = ours.means_[:, 0] < 0.5 * gap
    assert side.sum() == 3
    assert ours.weights_[side].sum() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("value", [1e8, -1e9, 1e10])
@pytest.mark.parametrize("D", [1, 3])
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_one_distant_value(family, D, value):
    """It is a component of its own, of variance reg_covar, and the others are what they are without it."""
    x = groups(D)
    N, ridge = len(x), 1e-6
    rest = Theirs(3, covariance_type=family, tol=1e-6, max_iter=500, random_state=0).fit(x).score(x)
    alone = -math.log(N + 1) - 0.5 * D * math.log(2 * math.pi * ridge)
    expected = (N * (rest + math.log(N / (N + 1))) + alone) / (N + 1)
    far = np.insert(x, N // 3, value, axis=0)
    ours = gk.GaussianMixture(4, covariance_type=family, tol=1e-6, max_iter=500, random_state=0).fit(far)
    assert ours.score(far) > expected - 1e-3
    if family == "full":
        # The others are computed with errors of scikit-learn's own at this distance.
        theirs = Theirs(4, tol=1e-6, max_iter=500, random_state=0).fit(far)
        assert ours.lower_bound_ > theirs.lower_bound_ - 1e-3


@pytest.mark.parametrize("value", [1e8, 1e10])
def test_selection_with_one_distant_value(value):
    x = np.insert(groups(2), 100, value, axis=0)
    numbers = range(1, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [Theirs(K, max_iter=300, random_state=0).fit(x).bic(x) for K in numbers]
        ours = gk.analysis.select(x, numbers, max_iter=300)
    assert ours.best.n_components == numbers[int(np.argmin(theirs))] == 4


@pytest.mark.parametrize("family", [family for family in TYPES if family != "tied"])
@pytest.mark.parametrize("strategy", ["kmeans", "kmeans++"])
def test_starts_do_not_depend_on_a_distant_value(strategy, family):
    """The value is a cluster of its own, as it is with these strategies, and the others keep their variances."""
    x = np.insert(groups(3), 7, 1e8, axis=0)
    start = gk.initialize(x, 4, strategy, covariance_type=family, generator=torch.Generator().manual_seed(3))
    variances = start.component_distribution.variance
    far = start.means[:, 0].abs() > 1e4
    assert int(far.sum()) == 1
    assert float(variances[~far].max()) < 200
    assert float(variances[far].max()) < 10


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("unit", [1e-6, 1e6, 1e-40, 1e40])
@pytest.mark.parametrize("family", TYPES)
def test_units_change_nothing(family, unit):
    x = np.insert(groups(3), 7, 1e5, axis=0)
    # A power of two: the fits are then the same to the last bit, whatever k-means does with rounding.
    unit = 2.0 ** round(math.log2(unit))
    settings = {"covariance_type": family, "random_state": 0, "tol": 1e-9, "max_iter": 300}
    fits = [gk.GaussianMixture(4, reg_covar=1e-6 * s**2, **settings).fit(s * x) for s in (1.0, unit)]
    means, covariances = [], []
    for model, s in zip(fits, (1.0, unit), strict=True):
        order = model.means_[:, 0].argsort()
        means.append(model.means_[order] / s)
        covariances.append((model.covariances_ if family == "tied" else model.covariances_[order]) / s**2)
    assert np.abs(means[1] - means[0]).max() < 1e-3
    assert np.abs(covariances[1] - covariances[0]).max() < 1e-3 * np.abs(covariances[0]).max()
    assert fits[1].score(unit * x) == pytest.approx(fits[0].score(x) - 3 * math.log(unit), abs=1e-6)


@pytest.mark.parametrize("family", ["full", "diag", "tied"])
def test_columns_in_different_units(family):
    x, units = groups(3), np.array([1e-7, 1.0, 1e9])
    starts = [gk.initialize(x * u, 3, "kmeans", covariance_type=family) for u in (1.0, units)]
    # Clusters are found by the largest column; what is added to them does not drown the others.
    variances = starts[1].component_distribution.variance.mean(0) / torch.tensor(units) ** 2
    assert bool((variances < 2 * torch.tensor(x.var(0))).all())
    assert bool((variances > 0.01).all())
    fits = []
    for u in (np.ones(3), units):
        shape = {"full": np.stack([np.diag(1 / u**2)] * 3), "diag": np.stack([1 / u**2] * 3), "tied": np.diag(1 / u**2)}
        means = u * np.array([[0.0, 0.0, 0.0], [8.0, 3.2, -5.6], [-6.4, 8.0, 7.2]])
        model = gk.GaussianMixture(
            3, covariance_type=family, reg_covar=0, means_init=means, precisions_init=shape[family], tol=0, max_iter=20
        )
        fits.append(model.fit(x * u))
    assert np.abs(fits[1].means_ / units - fits[0].means_).max() < 1e-9
    assert fits[1].score(x * units) == pytest.approx(fits[0].score(x) - np.log(units).sum(), abs=1e-9)


@pytest.mark.parametrize("family", TYPES)
def test_the_floor_changes_no_covariance_of_scikit_learn(family):
    """Components of deviations 10⁻⁵ and 10⁻⁶ beside one of 10³, without a ridge, from the same start."""
    generator = np.random.default_rng(4)
    D, scales = 2, [1e3, 1e-5, 1e-6]
    if family == "tied":
        scales = [1e-5, 1e-5, 1e-5]
    centers = np.array([[0.0, 0.0], [1.5, -0.5], [-1.0, 1.0]])
    x = np.concatenate([c + s * generator.normal(size=(200, D)) for c, s in zip(centers, scales, strict=True)])
    precisions = {
        "full": np.stack([np.eye(D) / s**2 for s in scales]),
        "tied": np.eye(D) / 1e-10,
        "diag": np.stack([np.full(D, 1 / s**2) for s in scales]),
        "spherical": np.array([1 / s**2 for s in scales]),
    }
    settings = {
        "covariance_type": family,
        "reg_covar": 0.0,
        "tol": 0.0,
        "max_iter": 20,
        "weights_init": np.full(3, 1 / 3),
        "means_init": centers,
        "precisions_init": precisions[family],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = Theirs(3, **settings).fit(x)
    ours = gk.GaussianMixture(3, **settings).fit(x)
    assert np.abs(ours.covariances_ / theirs.covariances_ - 1).max() < 1e-3
    assert np.abs(ours.weights_ - theirs.weights_).max() < 1e-6
