"""Warm starts: many short fits end where one fit ends."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture.tests import test_bayesian_mixture, test_gaussian_mixture

import gmmkeops as gk

pytestmark = pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(0)
    return np.r_[rng.normal(size=(150, 2)), rng.normal(size=(250, 2)) * [2.0, 0.5] + [2.0, 1.5]]


@pytest.mark.parametrize("seed", [0, 1])
def test_scikit_learns_warm_start(monkeypatch, seed):
    monkeypatch.setattr(test_gaussian_mixture, "GaussianMixture", gk.GaussianMixture)
    test_gaussian_mixture.test_warm_start(seed)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (test_gaussian_mixture, "test_convergence_detected_with_warm_start"),
        (test_gaussian_mixture, "test_monotonic_likelihood"),
        (test_bayesian_mixture, "test_monotonic_likelihood"),
    ],
)
def test_scikit_learns_tests_one_iteration_at_a_time(monkeypatch, module, name):
    def estimator(*arguments, tol=1e-3, max_iter=100, **options):
        # With the smallest tolerance EM needs more than the 600 iterations of the test, because it passes a plateau.
        return gk.GaussianMixture(*arguments, tol=tol, max_iter=3 * max_iter if tol < 1e-6 else max_iter, **options)

    monkeypatch.setattr(test_gaussian_mixture, "GaussianMixture", estimator)
    monkeypatch.setattr(test_bayesian_mixture, "BayesianGaussianMixture", gk.BayesianGaussianMixture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(module, name)()


def estimators():
    for kind in ("full", "tied_diag"):
        yield lambda kind=kind, **p: gk.GaussianMixture(3, covariance_type=kind, init_params="random_from_data", **p)
        yield lambda kind=kind, **p: gk.GaussianMixture(
            3, covariance_type=kind, init_params="random_from_data", penalty=gk.penalties.Dirichlet(2.0), **p
        )
        for weights in ("dirichlet_process", "dirichlet_distribution"):
            yield lambda kind=kind, weights=weights, **p: gk.BayesianGaussianMixture(
                n_components=3,
                covariance_type=kind,
                weight_concentration_prior_type=weights,
                init_params="random_from_data",
                **p,
            )


@pytest.mark.parametrize("make", list(estimators()))
@pytest.mark.parametrize("step", [1, 3])
def test_warm_starts_end_where_one_fit_ends(X, make, step):
    straight = make(max_iter=500, tol=1e-4).fit(X)
    warm = make(max_iter=step, tol=1e-4, warm_start=True)
    fits = 0
    while fits < 600 and not (warm.fit(X)).converged_:
        fits += 1
    assert straight.converged_
    assert warm.converged_
    assert fits * step + warm.n_iter_ == straight.n_iter_
    assert abs(warm.lower_bound_ - straight.lower_bound_) < 1e-8 * abs(straight.lower_bound_)
    assert np.allclose(warm.means_, straight.means_, atol=1e-6)
    # It goes on from a converged fit, and has then converged at once.
    assert warm.fit(X).converged_
    assert warm.n_iter_ == 1


def test_a_warm_start_on_other_points_is_compared_with_none_of_the_old(X):
    warm = gk.GaussianMixture(2, max_iter=60, warm_start=True, random_state=0).fit(X)
    assert warm.converged_
    warm.set_params(max_iter=1).fit(3.0 * X)
    assert not warm.converged_
    # Another objective has no iterations yet either.
    other = gk.GaussianMixture(2, max_iter=60, warm_start=True, random_state=0).fit(X)
    other.set_params(max_iter=1, penalty=gk.penalties.Dirichlet(2.0)).fit(X)
    assert not other.converged_


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
def test_a_warm_start_with_another_long_prior_is_another_fit(X):
    """Printed tensors of more than a thousand entries are shortened, and hide what differs."""
    few, many = torch.full((1200,), 2.0), torch.full((1200,), 2.0)
    many[600] = 50.0
    assert repr(few) == repr(many)
    x = np.repeat(X, 4, 0) + 0.01 * np.random.default_rng(0).normal(size=(4 * len(X), 2))
    options = {"init_params": "random_from_data", "warm_start": True, "max_iter": 4, "tol": 100.0}
    model = gk.GaussianMixture(1200, penalty=gk.penalties.Dirichlet(few), **options).fit(x)
    assert model.set_params(max_iter=1).fit(x).converged_
    assert not model.set_params(penalty=gk.penalties.Dirichlet(many)).fit(x).converged_


def test_a_warm_start_may_have_another_tolerance(X):
    # A search would end at the optimum.
    options = {"init_params": "kmeans", "warm_start": True, "random_state": 0}
    warm = gk.GaussianMixture(3, max_iter=500, tol=1e-2, **options).fit(X)
    first = warm.n_iter_
    assert warm.set_params(tol=1e-5, max_iter=1).fit(X).converged_ is False
    assert warm.set_params(max_iter=3000).fit(X).converged_
    assert warm.n_iter_ > 1
    assert first < warm.n_iter_ + first
