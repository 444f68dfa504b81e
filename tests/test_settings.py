"""Settings that an estimator and its solver both have, and warm starts, of which the first iteration is compared too."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.mixture.tests import test_bayesian_mixture, test_gaussian_mixture

import gmmkeops as gk

pytestmark = pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(0)
    return np.r_[rng.normal(size=(150, 2)), rng.normal(size=(250, 2)) * [2.0, 0.5] + [2.0, 1.5]]


def adam(**settings):
    return gk.Adam(lr=0.02, **settings)


@pytest.mark.parametrize(
    ("solver", "params", "iterations"),
    [
        # Given to the solver.
        (gk.EM(tol=0, max_iter=130), {}, 130),
        (gk.EM(max_iter=7, tol=0), {}, 7),
        (gk.EM(max_iter=9, tol=0, accelerate=True), {}, 9),
        (adam(max_iter=33), {}, 33),
        (adam(), {}, 200),
        (gk.Gradient(torch.optim.SGD, max_iter=3), {}, 3),
        (gk.EM(max_iter=8, tol=0, batch_size=100), {}, 8),
        (gk.bayes.VariationalBayes(max_iter=6, tol=0), {}, 6),
        # Given to the estimator.
        (gk.EM(), {"max_iter": 130, "tol": 0}, 130),
        (gk.EM(accelerate=True), {"max_iter": 9, "tol": 0}, 9),
        (adam(), {"max_iter": 13}, 13),
        ("em", {"max_iter": 130, "tol": 0}, 130),
        ("adam", {"max_iter": 13, "tol": 0}, 13),
        (gk.bayes.VariationalBayes(), {"max_iter": 6, "tol": 0}, 6),
        # One of each, or both alike.
        (gk.EM(tol=0), {"max_iter": 17}, 17),
        (gk.EM(max_iter=17), {"tol": 0}, 17),
        (gk.EM(max_iter=17, tol=0), {"max_iter": 17, "tol": 0}, 17),
        (adam(max_iter=17), {"max_iter": 17}, 17),
    ],
)
def test_a_setting_that_is_given_once_holds(X, solver, params, iterations):
    model = gk.GaussianMixture(2, solver=solver, random_state=0, **params)
    assert clone(model).get_params() == model.get_params()
    assert model.fit(X).n_iter_ == iterations
    assert model.set_params(max_iter=params.get("max_iter", 100)).fit(X).n_iter_ == iterations


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-9])
def test_the_tolerance_of_either_place_is_the_same_tolerance(X, tol):
    options = {"random_state": 0, "init_params": "random_from_data"}
    solver = gk.GaussianMixture(2, solver=gk.EM(tol=tol, max_iter=3000), **options).fit(X)
    estimator = gk.GaussianMixture(2, tol=tol, max_iter=3000, **options).fit(X)
    object_too = gk.GaussianMixture(2, solver=gk.EM(), tol=tol, max_iter=3000, **options).fit(X)
    straight = gk.fit(
        gk.GaussianMixture(2, max_iter=0, **options).fit(X).mixture_, torch.from_numpy(X), gk.EM(tol=tol), max_iter=3000
    )
    assert solver.n_iter_ == estimator.n_iter_ == object_too.n_iter_ == straight.n_iter
    assert solver.converged_
    assert np.array_equal(solver.means_, estimator.means_)


@pytest.mark.parametrize(("own", "theirs"), [(0.5, None), (None, 0.5), (0.5, 0.5)])
def test_reg_covar_of_either_place_is_used(X, own, theirs):
    solver = gk.EM() if theirs is None else gk.EM(reg_covar=theirs)
    params = {} if own is None else {"reg_covar": own}
    options = {"init_params": "random_from_data", "tol": 0, "max_iter": 5, "random_state": 0}
    model = gk.GaussianMixture(2, solver=solver, **options, **params)
    start = model.set_params(max_iter=0).fit(X).mixture_
    found = model.set_params(max_iter=5).fit(X).result_.history["objective"]
    expected = gk.fit(start, torch.from_numpy(X), gk.EM(reg_covar=0.5, tol=0), max_iter=5).history["objective"]
    without = gk.fit(start, torch.from_numpy(X), gk.EM(tol=0), max_iter=5).history["objective"]
    assert np.allclose(found, expected, rtol=0, atol=1e-12)
    assert not np.allclose(found, without, atol=1e-3)


@pytest.mark.parametrize(
    ("solver", "params", "name"),
    [
        (gk.EM(tol=1e-9), {"tol": 1e-5}, "tol"),
        (gk.EM(tol=0), {"tol": 1e-5}, "tol"),
        (gk.EM(max_iter=300), {"max_iter": 50}, "max_iter"),
        (gk.EM(reg_covar=0.1), {"reg_covar": 0.2}, "reg_covar"),
        (gk.EM(reg_covar=0), {"reg_covar": 0.2}, "reg_covar"),
        (gk.EM(reg_covar=0.1), {"reg_covar": 0}, "reg_covar"),
        (adam(tol=1e-9), {"tol": 1e-5}, "tol"),
        (adam(max_iter=300), {"max_iter": 50}, "max_iter"),
        (gk.bayes.VariationalBayes(max_iter=30), {"max_iter": 50}, "max_iter"),
        (gk.bayes.VariationalBayes(reg_covar=0.1), {"reg_covar": 0.2}, "reg_covar"),
    ],
)
def test_a_setting_that_is_given_twice_is_an_error(X, solver, params, name):
    model = gk.GaussianMixture(2, solver=solver, **params)
    calls = [model.fit] + ([model.partial_fit] if isinstance(solver, gk.EM) else [])
    for call in calls:
        with pytest.raises(ValueError, match=rf"^{name} has two values: {name}=.* of the solver .*\.$"):
            call(X)
    assert not model.fitted_


@pytest.mark.parametrize("solver", ["adam", gk.Adam(), gk.Gradient(torch.optim.SGD)])
def test_a_setting_that_the_solver_lacks_is_an_error(X, solver):
    with pytest.raises(ValueError, match=r"^reg_covar=0.5 is not supported by solver=.*\.$"):
        gk.GaussianMixture(2, solver=solver, reg_covar=0.5).fit(X)


def test_partial_fit_has_the_solvers_reg_covar(X):
    by_solver = gk.GaussianMixture(2, solver=gk.EM(reg_covar=3.0), random_state=0).partial_fit(X)
    by_estimator = gk.GaussianMixture(2, reg_covar=3.0, random_state=0).partial_fit(X)
    assert np.array_equal(by_solver.covariances_, by_estimator.covariances_)
    assert np.linalg.eigvalsh(by_solver.covariances_).min() >= 3.0 - 1e-12


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
    monkeypatch.setattr(test_gaussian_mixture, "GaussianMixture", gk.GaussianMixture)
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
    warm = gk.GaussianMixture(3, max_iter=500, tol=1e-2, warm_start=True, random_state=0).fit(X)
    first = warm.n_iter_
    assert warm.set_params(tol=1e-5, max_iter=1).fit(X).converged_ is False
    assert warm.set_params(max_iter=3000).fit(X).converged_
    assert warm.n_iter_ > 1
    assert first < warm.n_iter_ + first
