"""EM: scikit-learn's steps, monotone objectives, invariances, priors, and degenerate clouds."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import ENGINES, FAMILIES, cloud, plain_start, rises
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk
from gmmkeops import penalties as P


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("seed", range(10))
def test_fifty_iterations_of_scikit_learn(family, seed):
    rng = np.random.RandomState(seed)
    D, K = rng.randint(1, 6), rng.randint(1, 6)
    x = cloud(seed, K=K, D=D)
    start = plain_start(x, K, family)
    given = {"full": np.stack([np.eye(D)] * K), "tied": np.eye(D), "diag": np.ones((K, D)), "spherical": np.ones(K)}
    theirs = Theirs(
        K,
        covariance_type=family,
        tol=0,
        max_iter=50,
        weights_init=np.full(K, 1 / K),
        means_init=start.means.numpy(),
        precisions_init=given[family],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.fit(x.numpy())
    result = gk.fit(start, x, gk.EM(tol=0), max_iter=50)
    ours = gk.GaussianMixture.from_mixture(result.mixture)
    ours.set_params(covariance_type=family)
    ours._adopt(result.mixture, False)
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert np.abs(a - b).max() <= 1e-8 * np.abs(b).max(), name
    assert abs(ours.bic(x.numpy()) - theirs.bic(x.numpy())) < 1e-6
    assert abs(ours.aic(x.numpy()) - theirs.aic(x.numpy())) < 1e-6


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalized", [False, True])
def test_monotone(engine, family, penalized):
    """10 seeds on the dense engine, 5 on KeOps, in float64; rounding aside the objective never rises."""
    backend, device = engine
    penalty = (
        P.SqrtWeights(1.0) + P.Dirichlet(1.5) + P.NormalInverseWishart([0.0, 0.0], 0.5, 1.0, 4.0) if penalized else None
    )
    for seed in range(10 if backend == "dense" else 5):
        x = cloud(seed, N=150).to(device)
        start = plain_start(x.cpu(), 5, family).to(device)
        result = gk.fit(start, x, gk.EM(tol=0, reg_covar=0), penalty=penalty, max_iter=20, backend=backend)
        assert rises(result) < 1e-9, seed


@pytest.mark.parametrize("penalty", [P.SqrtWeights(20.0), P.WeightEntropy(0.5)], ids=repr)
@pytest.mark.parametrize("family", ["full", "tied_diag"])
def test_monotone_while_components_are_pruned(penalty, family):
    x = cloud(1)
    result = gk.fit(plain_start(x, 6, family), x, gk.EM(tol=0, reg_covar=0), penalty=penalty, max_iter=100)
    assert result.report.pruned_components
    assert rises(result) < 1e-8  # pruning may cost a millionth of a point


def test_closed_form_map():
    """One component: the posterior mode is known."""
    x = cloud(2, K=1)
    n, mean = len(x), x.mean(0)
    m, kappa, psi, nu = torch.tensor([3.0, -2.0]).double(), 7.0, torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), 6.0
    result = gk.fit(plain_start(x, 1, "full"), x, gk.EM(reg_covar=0), penalty=P.NormalInverseWishart(m, kappa, psi, nu))
    expected = (n * mean + kappa * m) / (n + kappa)
    assert torch.allclose(result.mixture.means[0], expected)
    z, w = x - expected, expected - m
    covariance = (z.mT @ z + kappa * torch.outer(w, w) + psi) / (n + nu + 2 + 2)
    assert torch.allclose(result.mixture.factor.covariances()[0], covariance)


def test_dirichlet_counts_are_pseudo_points():
    x = cloud(3)
    start = plain_start(x, 3, "full")
    sums = gk.reductions.moments(x, start.offsets, start.means, start.factor)
    alpha = torch.tensor([5.0, 1.0, 30.0]).double()
    result = gk.fit(start, x, gk.EM(tol=0), penalty=P.Dirichlet(alpha), max_iter=1)
    expected = (sums.S0 + alpha - 1) / (len(x) + alpha.sum() - 3)
    assert torch.allclose(result.mixture.weights, expected)


def test_sqrt_prior_empties_components_like_adam():
    x = cloud(4, N=2000)
    start = gk.initialize(x, 12)
    em = gk.fit(start, x, gk.EM(tol=1e-9), penalty=P.SqrtWeights(5.0), max_iter=2000)
    adam = gk.fit(start, x, gk.Adam(lr=0.05), penalty=P.SqrtWeights(5.0), max_iter=1500)
    assert em.report.n_active_components < 12
    assert em.report.pruned_components
    assert em.objective < adam.objective + 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_integer_weights_are_repetition(family):
    x = cloud(5)
    counts = torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(0))
    start = plain_start(x, 3, family)
    for penalty in (None, P.SqrtWeights(0.5) + P.NormalInverseWishart([0.0, 0.0], 1.0, 1.0, 4.0)):
        a = gk.fit(start, x, gk.EM(tol=0), penalty=penalty, sample_weight=counts, max_iter=15)
        b = gk.fit(start, x.repeat_interleave(counts, 0), gk.EM(tol=0), penalty=penalty, max_iter=15)
        assert abs(a.objective - b.objective) < 1e-10
        assert torch.allclose(a.mixture.factor.covariances(), b.mixture.factor.covariances(), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(FAMILIES), st.floats(-1e6, 1e6), st.integers(-20, 20))
def test_translation_scaling_and_permutation_change_nothing(seed, family, shift, power):
    x = cloud(seed)
    scale = 2.0**power
    start = plain_start(x, 3, family)
    method = gk.EM(tol=0, reg_covar=0)
    plain = gk.fit(start, x, method, max_iter=10)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    swap = torch.tensor([2, 0, 1])
    moved = gk.Mixture(
        start.logits[swap],
        start.means[swap] * scale + shift,
        start.factor.select(swap).rescale(torch.full((2,), 1 / scale).double()),
    )
    result = gk.fit(moved, x[order] * scale + shift, method, max_iter=10)
    # What the shift itself rounds away.
    lost = 1e-13 * max(1.0, abs(shift) / scale) + 1e-9
    assert torch.allclose((result.mixture.means - shift) / scale, plain.mixture.means[swap], atol=10 * lost)
    swapped = plain.mixture.factor.select(swap).covariances()
    assert torch.allclose(result.mixture.factor.covariances() / scale**2, swapped, atol=100 * lost)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["full", "tied_full", "spherical", "tied_spherical"]))
def test_rotation_changes_nothing(seed, family):
    x = cloud(seed, D=3)
    Q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double())
    start = plain_start(x, 3, family)
    method = gk.EM(tol=0, reg_covar=0)
    plain = gk.fit(start, x, method, max_iter=10)
    turned = gk.fit(gk.Mixture(start.logits, start.means @ Q, start.factor), x @ Q, method, max_iter=10)
    assert torch.allclose(turned.mixture.means, plain.mixture.means @ Q, atol=1e-8)
    assert torch.allclose(turned.mixture.factor.covariances(), Q.mT @ plain.mixture.factor.covariances() @ Q, atol=1e-8)


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical", "tied_diag", "tied_spherical"])
@pytest.mark.parametrize(("shift", "sigma"), [(5e6, 0.5), (0.0, 1e-6), (-3e7, 100.0)])
def test_variances_far_away_and_tiny(family, shift, sigma):
    rng = np.random.RandomState(0)
    noise = rng.randn(4000, 2) * sigma
    x = noise + shift
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.PrecisionWarning)
        got = gk.GaussianMixture(1, covariance_type=family, reg_covar=0).fit(x).covariances_
    exact = x - shift
    exact = np.cov(exact.T, bias=True)
    if "diag" in family or "spherical" in family:
        exact = np.diag(exact)
    if "spherical" in family:
        exact = exact.mean()
    assert np.abs(np.squeeze(got) - exact).max() <= 1e-5 * np.abs(exact).max()


def test_a_component_that_dies_is_named_and_finite():
    x = cloud(11)
    start = gk.Mixture.from_parameters([0.5, 0.3, 0.2], [[0.0, 0.0], [1.0, 1.0], [1e4, 1e4]], [[1.0, 1.0]] * 3, "diag")
    result = gk.fit(start, x, gk.EM(tol=1e-6))
    assert result.report.pruned_components == (2,)
    assert result.mixture.n_components == 3
    assert bool(torch.isfinite(result.mixture.log_prob(x)).all())


SHAPES = {
    "identical": np.ones((20, 2)),
    "constant column": np.c_[np.random.RandomState(0).randn(50), np.ones(50)],
    "a line": np.linspace(0, 1, 40)[:, None] * [1, 2],
    "duplicates": np.repeat(np.random.RandomState(1).randn(6, 2), 10, 0),
    "an outlier at 1e8 sigma": np.r_[np.random.RandomState(2).randn(100, 2), [[1e8, 0]]],
    "as many points as components": np.random.RandomState(3).randn(6, 2),
}


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_degenerate_clouds_end_finite(shape, family):
    strategies = itertools.cycle(("kmeans", "random", "random_from_data"))
    # Four combinations a number of components, and three strategies in turn: each number meets each strategy.
    for K, dtype, ridge in itertools.product((1, 3, 6), (np.float32, np.float64), (1e-6, 0.0)):
        strategy = next(strategies)
        x = SHAPES[shape].astype(dtype)
        model = gk.GaussianMixture(K, covariance_type=family, reg_covar=ridge, init_params=strategy, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gk.ConvergenceWarning)
            model.fit(x)
        assert math.isfinite(model.lower_bound_)
        assert np.isfinite(model.means_).all()
        assert np.isfinite(model.covariances_).all()
        assert np.isfinite(model.score_samples(x)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gk.EM(assignment="fuzzy"), "assignment must be one of 'soft', 'hard', 'stochastic', got 'fuzzy'"),
        (lambda: gk.EM(batch_size=0), "batch_size must be at least 1"),
        (lambda: gk.EM(step_exponent=0.5), "step_exponent must be above 0.5"),
        (lambda: gk.EM(step_offset=0), "step_offset must be positive"),
        (lambda: gk.EM(reg_covar=-1), "reg_covar must be finite"),
        (lambda: gk.EM(temperature=(2, 5)), "temperature must be"),
        (
            lambda: gk.fit(plain_start(cloud(), 3, "full"), cloud(), gk.EM(frozen_means=[True])),
            "frozen_means must be True",
        ),
    ],
)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
