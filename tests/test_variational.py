"""Variational Bayes: scikit-learn's posteriors, a bound that is one, predictive densities, and every way to read the data."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from scipy.integrate import quad
from sklearn.mixture import BayesianGaussianMixture as Theirs
from sklearn.utils.estimator_checks import check_estimator

import gmmkeops as gk
from gmmkeops.bayes.variational.start import _with_empty

TYPES = ["full", "tied", "diag", "spherical"]
WEIGHTS = ["dirichlet_process", "dirichlet_distribution"]
POSTERIOR = ["weight_concentration_", "mean_precision_", "means_", "degrees_of_freedom_", "covariances_"]
DERIVED = ["precisions_cholesky_", "precisions_", "weights_", "lower_bound_"]
PRIOR = [
    "weight_concentration_prior_",
    "mean_precision_prior_",
    "mean_prior_",
    "degrees_of_freedom_prior_",
    "covariance_prior_",
]


def clusters(seed=0, N=300, D=3, K=4):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.2, 1.5, size=(K, D))
    labels = rng.integers(K, size=N)
    return 3 * rng.normal(size=(K, D))[labels] + spread[labels] * rng.normal(size=(N, D)), rng


@pytest.fixture(scope="module")
def X():
    return clusters()[0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", TYPES)
def test_fifty_iterations_are_those_of_scikit_learn(kind, weights, seed):
    """From the same posterior, other priors on every other data set: all of it, the bound and the answers, to 1e-6."""
    X, rng = clusters(seed, D=1 + seed % 4)
    D, priors = X.shape[1], {}
    if seed % 2:
        A = rng.normal(size=(D, D))
        scatter = {"full": A @ A.T + np.eye(D), "diag": np.full(D, 2.0), "spherical": 1.5}
        priors = {
            "weight_concentration_prior": 0.3,
            "mean_precision_prior": 0.2,
            "mean_prior": rng.normal(size=D),
            "degrees_of_freedom_prior": D + 2.5,
            "covariance_prior": scatter["full" if kind == "tied" else kind],
        }
    settings = {"covariance_type": kind, "weight_concentration_prior_type": weights, **priors}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings |= {"n_components": 5, "max_iter": 1, "tol": 0, "warm_start": True, "random_state": seed}
        theirs = Theirs(**{**settings, "tol": 1e-300}).fit(X)
        ours = gk.BayesianGaussianMixture(**settings)
        for name in POSTERIOR:
            setattr(ours, name, getattr(theirs, name))
        theirs.set_params(max_iter=50).fit(X)
        ours.set_params(max_iter=50).fit(X)
    for name in POSTERIOR + DERIVED + PRIOR:
        mine, other = np.asarray(getattr(ours, name)), np.asarray(getattr(theirs, name)).squeeze()
        assert np.allclose(mine.squeeze(), other, rtol=1e-6, atol=1e-9 * np.abs(other).max()), name
    assert np.allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-6, atol=1e-6)
    assert np.allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-6)
    assert np.array_equal(ours.predict(X), theirs.predict(X))
    steps = np.diff(ours.lower_bounds_)
    assert steps.min() > -1e-8 * abs(ours.lower_bound_)


@pytest.mark.parametrize(
    "model",
    [
        gk.BayesianGaussianMixture(),
        gk.BayesianGaussianMixture(
            n_components=2, covariance_type="tied", weight_concentration_prior_type="dirichlet_distribution"
        ),
    ],
)
def test_scikit_learn_checks_it_whole(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(model, on_fail=None, on_skip=None)
    wrong = [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")]
    assert wrong == []
    assert [r["check_name"] for r in results if r["status"] == "skipped"] in ([], ["check_array_api_input"])


def test_every_parameter_and_attribute_of_the_class(X):
    theirs = Theirs(n_components=2, random_state=0).fit(X)
    ours = gk.BayesianGaussianMixture(n_components=2, random_state=0).fit(X)
    assert set(theirs.get_params()) <= set(ours.get_params())
    fresh = gk.BayesianGaussianMixture().get_params()
    # The tolerance is per point, and the initial mixture is a level of a merge tree.
    others = {"tol": 1e-6, "max_iter": 1000, "init_params": "auto"}
    assert all(fresh[name] == value for name, value in (Theirs().get_params() | others).items())
    assert all(hasattr(ours, name) for name in vars(theirs))
    assert isinstance(ours.weight_concentration_, tuple)


def evidence_of_one_gaussian(x, kappa, nu, m0, S0):
    """Log-evidence of points under a Gaussian-Wishart prior (Murphy 2007, eq. 266)."""
    N, D = x.shape
    mean = x.mean(0)
    scatter = (x - mean).T @ (x - mean)
    S = S0 + scatter + kappa * N / (kappa + N) * torch.outer(mean - m0, mean - m0)
    a, b = torch.tensor(0.5 * nu), torch.tensor(0.5 * (nu + N))
    return (
        -0.5 * N * D * math.log(math.pi)
        + torch.special.multigammaln(b, D)
        - torch.special.multigammaln(a, D)
        + 0.5 * nu * torch.logdet(S0)
        - 0.5 * (nu + N) * torch.logdet(S)
        + 0.5 * D * math.log(kappa / (kappa + N))
    )


def test_the_bound_of_one_component_is_the_evidence(X):
    """With one component the posterior is exact, so the bound, with all its constants, is the log-evidence."""
    x = torch.as_tensor(X) * 1e3 + 5e6
    D, S0, m0 = x.shape[1], torch.diag(torch.tensor([1e6, 2e6, 5e5]).double()), torch.full((3,), 5e6).double()
    method = gk.bayes.VariationalBayes(
        mean_precision=0.5, degrees=D + 1.0, means=m0, covariances=S0, weights="dirichlet_distribution", reg_covar=0
    )
    result = gk.fit(gk.initialize(x, 1), x, method)
    expected = evidence_of_one_gaussian(x, 0.5, D + 1.0, m0, S0)
    assert -result.objective * len(x) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_bound_belongs_to_the_posterior_and_is_stationary_there(X, kind, weights):
    x = torch.as_tensor(X)
    method = gk.bayes.VariationalBayes(weights=weights, reg_covar=0)
    result = gk.fit(gk.initialize(x, 4, covariance_type=kind), x, method, max_iter=3000, tol=1e-9)
    history = result.history["objective"]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(history))
    assert result.converged
    assert result.objective == pytest.approx(history[-1], abs=1e-8)
    assert float(result.posterior.divergence()) > 0
    assert torch.equal(result.posterior.mixture.means, result.mixture.means)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_predictive_density_is_the_average_over_draws(X, kind, weights):
    """20 000 draws: the average density is within 5 % (six of its standard errors) at forty points."""
    x = torch.as_tensor(X)[:40]
    fitted = gk.BayesianGaussianMixture(
        n_components=3, covariance_type=kind, weight_concentration_prior_type=weights, random_state=0, max_iter=500
    ).fit(X[:60])
    predictive = fitted.posterior_.predictive()
    generator = torch.Generator().manual_seed(0)
    draws = fitted.posterior_.sample(20_000, generator)
    average = torch.logsumexp(draws.log_prob(x[:, None, :]), 1) - math.log(20_000)
    # The plug-in weights of a truncated stick are scikit-learn's, whose last piece is not all that is left.
    slack = 0.05 if weights == "dirichlet_distribution" else 0.1
    assert torch.allclose(predictive.log_prob(x), average, atol=slack)
    grid = predictive.sample(50_000, generator=generator)
    if float(predictive.degrees.min()) > 4:
        assert torch.allclose(grid.mean(0), predictive.mean, atol=0.1 * float(predictive.variance.max()) ** 0.5)
        assert torch.allclose(grid.var(0), predictive.variance, rtol=0.1)
    assert grid.shape == (50_000, 3)


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_predictive_density_integrates_to_one(kind):
    x = torch.randn(30, 1, generator=torch.Generator().manual_seed(0)).double()
    result = gk.fit(gk.initialize(x, 2, covariance_type=kind), x, gk.bayes.VariationalBayes(), max_iter=200)
    predictive = result.posterior.predictive()
    total, _ = quad(
        lambda t: float(predictive.log_prob(torch.tensor([[t]]).double()).exp()), -np.inf, np.inf, limit=500
    )
    assert total == pytest.approx(1, abs=1e-6)


def test_superfluous_components_lose_their_weight(X):
    model = gk.BayesianGaussianMixture(
        n_components=12, weight_concentration_prior=1e-3, random_state=0, max_iter=2000
    ).fit(X)
    assert 3 <= int((model.weights_ > 0.01).sum()) <= 5


def test_files_minibatches_weights_truncation_and_checkpoints(tmp_path):
    X, rng = clusters(1, N=40_000, K=6)
    X = X.astype(np.float32)
    np.save(tmp_path / "x.npy", X)
    start = gk.initialize(X, 8, "kmeans", n_init=3)
    method = gk.bayes.VariationalBayes(concentration=0.1)
    whole = gk.fit(start, X, method, max_iter=30, tol=0)
    source = gk.fit(start, gk.Source.of(tmp_path / "x.npy", chunk_rows=7000), method, max_iter=30, tol=0)
    assert torch.allclose(source.posterior.mixture.means, whole.posterior.mixture.means, rtol=1e-6)
    # Sums of float32 points over other chunks are rounded differently.
    assert source.objective == pytest.approx(whole.objective, abs=1e-7)

    first = gk.fit(start, X, method, max_iter=10, tol=0, checkpoint=tmp_path / "vb")
    second = gk.fit(start, X, method, max_iter=30, tol=0, checkpoint=tmp_path / "vb")
    assert first.n_iter == 10
    assert torch.equal(second.posterior.mixture.means, whole.posterior.mixture.means)
    assert torch.equal(second.posterior.prior.mixture.means, whole.posterior.prior.mixture.means)

    cut = gk.fit(start, X, method, max_iter=30, tol=0, truncate=1e-6)
    assert cut.objective == pytest.approx(whole.objective, abs=1e-5)
    g = torch.as_tensor(rng.integers(1, 4, size=len(X))).double()
    weighted = gk.fit(start, X, method, sample_weight=g, max_iter=5, tol=0)
    repeated = gk.fit(start, torch.as_tensor(X).repeat_interleave(g.long(), 0), method, max_iter=5, tol=0)
    assert weighted.objective == pytest.approx(repeated.objective, abs=1e-6)

    steps = gk.bayes.VariationalBayes(concentration=0.1, batch_size=1000)
    mini = gk.fit(start, X, steps, max_iter=4, tol=0)
    long = gk.fit(start, X, method, max_iter=300, tol=1 / len(X))
    assert long.objective - 1e-6 < mini.objective < long.objective + 5e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "dp"}, "weights must be one of"),
        ({"concentration": 0}, "concentration must be positive"),
        ({"degrees": 1.0}, "degrees must be above 2"),
        ({"means": [0.0]}, r"means of the prior must have shape \(3,\)"),
        ({"covariances": [[1.0]]}, r"covariances of the prior must have shape \(3, 3\)"),
        ({"covariances": -np.eye(3)}, "positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_priors_get_one_sentence(X, settings, message):
    with pytest.raises(ValueError, match=message):
        gk.fit(gk.initialize(X, 2), X, gk.bayes.VariationalBayes(**settings))


def test_a_penalty_is_refused(X):
    with pytest.raises(ValueError, match="does not accept a penalty, got SqrtWeights"):
        gk.fit(gk.initialize(X, 2), X, gk.bayes.VariationalBayes(), penalty=gk.penalties.SqrtWeights(1.0))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", TYPES)
def test_extrapolation_never_lowers_the_bound(kind, weights):
    X, _ = clusters(3, N=400)
    start = gk.initialize(X, 8, "kmeans", covariance_type=kind)
    settings = {"weights": weights, "tol": 0.0}
    plain = gk.fit(start, X, gk.bayes.VariationalBayes(**settings), max_iter=60)
    fast = gk.fit(start, X, gk.bayes.VariationalBayes(**settings, accelerate=True), max_iter=20)
    values = np.array(fast.history["objective"])
    # Up to rounding and the constant that is added to the variances.
    assert (np.diff(values) < 1e-7).all()
    assert fast.objective < np.array(plain.history["objective"])[19] + 1e-6
    # The bound is that of the posterior which is returned.
    again = gk.fit(start, X, gk.bayes.VariationalBayes(**settings, begin=fast.posterior), max_iter=0)
    assert again.objective == pytest.approx(fast.objective, abs=1e-9)


def overlapping(seed, N=1500):
    rng = np.random.default_rng(seed)
    means, labels = 3.0 * rng.standard_normal((6, 2)), rng.integers(6, size=N)
    A = rng.standard_normal((6, 2, 2)) * 0.5 + np.eye(2)
    return means[labels] + np.einsum("nde,ne->nd", A[labels], rng.standard_normal((N, 2)))


@pytest.mark.parametrize("seed", [0, 1])
def test_extrapolation_saves_iterations_and_ends_at_the_same_posterior(seed):
    X = overlapping(seed)
    start = gk.initialize(X, 10, "kmeans")
    plain, fast = (
        gk.fit(start, X, gk.bayes.VariationalBayes(tol=1e-9, max_iter=3000, accelerate=accelerate))
        for accelerate in (False, True)
    )
    assert fast.converged
    # An iteration takes three passes instead of one.
    assert 6 * fast.n_iter < plain.n_iter
    assert fast.objective == pytest.approx(plain.objective, abs=1e-6)
    assert torch.allclose(fast.mixture.weights, plain.mixture.weights, atol=1e-3)


def test_levels_have_higher_bounds_than_k_means():
    """The bounds of all points, compared with the best one of three k-means initializations; and those of two seeds."""
    gains, spreads = [], []
    for seed in range(4):
        X = overlapping(seed)

        def bound(init, random_state, X=X):
            model = gk.BayesianGaussianMixture(n_components=10, random_state=random_state, init_params=init)
            return model.fit(X).evidence_bound_

        levels, again = bound("auto", 0), bound("auto", 1)
        gains.append(levels - max(bound("kmeans", random_state) for random_state in range(3)))
        spreads.append(abs(levels - again))
    assert sum(gain > 1 for gain in gains) >= 3
    assert min(gains) > -1
    # Different k-means initializations lead to bounds that differ by several nats.
    assert sum(spread < 0.5 for spread in spreads) >= 3


def test_empty_components_of_a_level_stay_empty():
    mixture = gk.initialize(overlapping(0), 3, "kmeans")
    padded = _with_empty(mixture, 5)
    assert padded.n_components == 5
    assert torch.allclose(padded.weights[:3], mixture.weights)
    assert float(padded.weights[3:].sum()) < 1e-100


def test_a_number_of_components_begins_with_a_level(X):
    result = gk.fit(7, X, gk.bayes.VariationalBayes())
    assert result.report.start.strategy == "levels"
    assert result.mixture.n_components == 7
    assert result.converged
    assert int((result.mixture.weights > 0.02).sum()) == 4
    with pytest.raises(ValueError, match="expected at least 9"):
        gk.fit(9, X[:8], gk.bayes.VariationalBayes())


def test_extrapolation_needs_all_points():
    with pytest.raises(ValueError, match="accelerate=True requires passes over all points"):
        gk.bayes.VariationalBayes(accelerate=True, batch_size=10)


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_equal_points_have_a_posterior(kind):
    model = gk.BayesianGaussianMixture(n_components=3, covariance_type=kind).fit(np.ones((50, 2)))
    assert np.allclose(model.means_[0], 1.0, atol=1e-3)
