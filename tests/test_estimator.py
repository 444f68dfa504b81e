"""The estimator: scikit-learn's own checks, its habits, tgmm's extras."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture as Theirs
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import gmmkeops as gk

TYPES = ["full", "tied", "diag", "spherical", "tied_full", "tied_diag", "tied_spherical"]


@pytest.fixture(scope="module")
def X():
    rng = np.random.RandomState(0)
    return np.r_[rng.randn(200, 2), 0.3 * rng.randn(300, 2) + 5, rng.randn(250, 2) * [0.5, 2] + [-6, 3]]


@pytest.mark.parametrize(
    "model", [gk.GaussianMixture(), gk.GaussianMixture(2), gk.GaussianMixture(2, solver="adam", tol=0)]
)
def test_scikit_learn_checks_it_whole(model):
    with warnings.catch_warnings():
        # Duck typing is the point; scikit-learn's own doubts about the tiny data of some checks are not.
        warnings.simplefilter("ignore")
        results = check_estimator(model, on_fail=None, on_skip=None)
    wrong = [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")]
    assert wrong == []
    assert [r["check_name"] for r in results if r["status"] == "skipped"] in ([], ["check_array_api_input"])
    assert any("sample_weight_equivalence" in r["check_name"] for r in results)


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_same_answers_as_scikit_learn_on_clear_clusters(X, kind):
    ours = gk.GaussianMixture(3, covariance_type=kind, random_state=0, tol=1e-8, max_iter=500).fit(X)
    theirs = Theirs(3, covariance_type=kind, random_state=0, tol=1e-8, max_iter=500).fit(X)
    assert abs(ours.score(X) - theirs.score(X)) < 1e-6
    assert abs(ours.bic(X) - theirs.bic(X)) < 1e-2
    order, other = np.argsort(ours.means_[:, 0]), np.argsort(theirs.means_[:, 0])
    assert np.allclose(ours.means_[order], theirs.means_[other], atol=1e-3)
    assert ours.covariances_.shape == theirs.covariances_.shape
    assert ours.precisions_.shape == theirs.precisions_.shape
    assert ours.precisions_cholesky_.shape == theirs.precisions_cholesky_.shape
    ranks, others = np.argsort(order)[ours.predict(X)], np.argsort(other)[theirs.predict(X)]
    assert np.mean(ranks == others) > 0.999
    assert np.allclose(ours.predict_proba(X).sum(1), 1)


@pytest.mark.parametrize("kind", TYPES)
def test_shapes_of_tgmm_and_lower_bound_of_the_returned_parameters(X, kind):
    model = gk.GaussianMixture(3, covariance_type=kind, random_state=0).fit(X)
    shape = {
        "tied": (2, 2),
        "tied_full": (2, 2),
        "tied_diag": (2,),
        "tied_spherical": (),
        "full": (3, 2, 2),
        "diag": (3, 2),
    }
    assert model.covariances_.shape == shape.get(kind, (3,))
    assert abs(model.lower_bound_ - model.score(X)) < 1e-10
    assert len(model.lower_bounds_) == model.n_iter_
    assert min(np.diff(model.lower_bounds_), default=0) > -1e-12
    assert model.fitted_
    assert model.converged_
    assert np.allclose(
        np.linalg.inv(np.atleast_2d(model.covariances_))
        if kind in ("full", "tied", "tied_full")
        else 1 / model.covariances_,
        model.precisions_,
    )


def test_clone_pickle_pipeline_search_repr(X):
    model = gk.GaussianMixture(3, random_state=0, penalty=gk.penalties.SqrtWeights(0.1))
    assert repr(clone(model)) == repr(model)
    assert clone(model).get_params().keys() == model.get_params().keys()
    model.fit(X)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert np.array_equal(twin.predict(X), model.predict(X))
    pipeline = make_pipeline(StandardScaler(), gk.GaussianMixture(3, random_state=0)).fit(X)
    assert np.isfinite(pipeline.score(X))
    grid = GridSearchCV(
        gk.GaussianMixture(random_state=0), {"n_components": [1, 3], "covariance_type": ["full", "diag"]}
    )
    assert grid.fit(X).best_params_["n_components"] == 3
    assert repr(gk.GaussianMixture(3, tol=0.1)) == "GaussianMixture(n_components=3, tol=0.1)"
    with pytest.raises(ValueError, match="Invalid parameter 'k'"):
        model.set_params(k=3)


def test_containers_in_and_out(X):
    frame = pd.DataFrame(X, columns=["a", "b"])
    model = gk.GaussianMixture(2, random_state=0).fit(frame)
    assert list(model.feature_names_in_) == ["a", "b"]
    assert model.n_features_in_ == 2
    assert isinstance(model.predict(frame), np.ndarray)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(X)
    with pytest.raises(ValueError, match="Feature names must be in the same order"):
        model.predict(frame[["b", "a"]])
    tensors = gk.GaussianMixture(2, random_state=0).fit(torch.from_numpy(X))
    assert torch.is_tensor(tensors.means_)
    assert torch.is_tensor(tensors.predict(torch.from_numpy(X)))
    assert isinstance(tensors.predict(X), np.ndarray)
    assert np.allclose(tensors.means_.numpy(), model.means_)
    single = gk.GaussianMixture(2, random_state=0).fit(X.astype(np.float32))
    assert single.result_.report.dtype == "float32"
    assert single.means_.dtype == np.float64
    assert gk.GaussianMixture(2, random_state=0, dtype="float32").fit(X).result_.report.dtype == "float32"


def test_sample_weight_is_repetition(X):
    counts = np.random.RandomState(1).randint(0, 3, len(X))
    a = gk.GaussianMixture(3, random_state=0).fit(X, sample_weight=counts)
    b = gk.GaussianMixture(3, random_state=0).fit(np.repeat(X, counts, 0))
    assert np.allclose(a.means_, b.means_, atol=1e-8)
    assert np.allclose(a.covariances_, b.covariances_, atol=1e-8)
    assert abs(a.score(X, sample_weight=counts) - b.score(np.repeat(X, counts, 0))) < 1e-10


def test_starts_and_restarts(X):
    one = [gk.GaussianMixture(6, random_state=s, max_iter=200).fit(X).lower_bound_ for s in range(5)]
    for seed in range(5):
        many = gk.GaussianMixture(6, random_state=seed, n_init=5, max_iter=200).fit(X)
        # The search stops at objectives that differ by less than 1e-3 from the best one.
        assert many.lower_bound_ >= one[seed] - 1e-3
    for init in ("kmeans", "k-means++", "kpp", "random", "random_from_data", "points"):
        a, b = (gk.GaussianMixture(3, init_params=init, random_state=3, max_iter=500).fit(X) for _ in range(2))
        assert np.array_equal(a.means_, b.means_)


def test_given_starts(X):
    weights, means = np.array([0.2, 0.3, 0.5]), X[[0, 300, 600]]
    precisions = np.stack([np.eye(2) * (k + 1) for k in range(3)])
    given = {"weights_init": weights, "means_init": means, "precisions_init": precisions}
    ours = gk.GaussianMixture(3, **given).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs does not converge with tol=0
        theirs = Theirs(3, **given, tol=0, max_iter=ours.n_iter_).fit(X)
    assert ours.converged_
    assert np.allclose(ours.means_, theirs.means_, atol=1e-9)


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
def test_scikit_learns_user_guide(X):
    """The calls of its mixture chapter's examples, with the import changed."""
    # plot_gmm_init: the start alone, by no iterations
    for init in ("kmeans", "random", "random_from_data", "k-means++"):
        r = np.random.RandomState(1)
        first = gk.GaussianMixture(n_components=4, init_params=init, tol=1e-9, max_iter=0, random_state=r).fit(X).means_
        model = gk.GaussianMixture(n_components=4, means_init=first, tol=1e-9, max_iter=20_000, random_state=r).fit(X)
        assert model.n_iter_ > 0
    # plot_gmm_selection: a search by BIC
    grid = {"n_components": range(1, 7), "covariance_type": ["spherical", "tied", "diag", "full"]}
    search = GridSearchCV(gk.GaussianMixture(), param_grid=grid, scoring=lambda estimator, X: -estimator.bic(X))
    table = pd.DataFrame(search.fit(X).cv_results_)[["param_n_components", "param_covariance_type", "mean_test_score"]]
    assert len(table) == 24
    assert search.best_params_["n_components"] == 3
    # plot_gmm_covariances: means set after construction, covariances by type
    for kind in ("spherical", "diag", "tied", "full"):
        estimator = gk.GaussianMixture(n_components=3, covariance_type=kind, max_iter=20, random_state=0)
        estimator.means_init = X[[0, 300, 600]]
        estimator.fit(X)
        for n in range(3):
            if kind == "full":
                covariance = estimator.covariances_[n][:2, :2]
            elif kind == "tied":
                covariance = estimator.covariances_[:2, :2]
            elif kind == "diag":
                covariance = np.diag(estimator.covariances_[n][:2])
            else:
                covariance = np.eye(estimator.means_.shape[1]) * estimator.covariances_[n]
            assert np.linalg.eigh(covariance)[0].min() > 0
    # plot_gmm_pdf: the density on a grid
    u, v = np.meshgrid(np.linspace(-20.0, 30.0), np.linspace(-20.0, 40.0))
    Z = -estimator.score_samples(np.array([u.ravel(), v.ravel()]).T).reshape(u.shape)
    assert np.isfinite(Z).all()


def test_warm_start_goes_on(X):
    model = gk.GaussianMixture(3, random_state=0, warm_start=True, max_iter=1, tol=0, init_params="random_from_data")
    scores = [model.fit(X).lower_bound_ for _ in range(5)]
    assert scores == sorted(scores)
    straight = gk.GaussianMixture(3, random_state=0, max_iter=5, tol=0, init_params="random_from_data").fit(X)
    assert abs(straight.lower_bound_ - scores[-1]) < 1e-10


def test_solvers_and_penalties(X):
    em = gk.GaussianMixture(3, random_state=0, tol=1e-8, max_iter=500).fit(X)
    adam = gk.GaussianMixture(3, random_state=0, solver="adam", tol=0, max_iter=400).fit(X)
    assert abs(em.lower_bound_ - adam.lower_bound_) < 1e-3
    fast = gk.GaussianMixture(3, random_state=0, solver=gk.EM(accelerate=True), tol=1e-8, max_iter=500).fit(X)
    assert abs(em.lower_bound_ - fast.lower_bound_) < 1e-6
    sparse = gk.GaussianMixture(8, penalty=gk.penalties.SqrtWeights(5.0), random_state=0, tol=1e-7, max_iter=3000).fit(
        X
    )
    assert (sparse.weights_ > 1e-6).sum() == sparse.result_.report.n_active_components < 8
    assert np.isfinite(sparse.score(X))


def test_known_parameters_without_fit(X):
    mixture = gk.Mixture.from_parameters([0.7, 0.3], [[350.0], [500.0]], [4.0, 4.0], "spherical")
    model = gk.GaussianMixture.from_mixture(mixture)
    assert model.predict([[349.0], [502.0]]).tolist() == [0, 1]
    assert model.covariances_.tolist() == pytest.approx([4.0, 4.0])
    assert model.sample(5)[0].shape == (5, 1)
    for call in (lambda m: m.predict(X), lambda m: m.sample(), lambda m: m.bic(X)):
        with pytest.raises(NotFittedError, match="is not fitted yet"):
            call(gk.GaussianMixture())


def test_not_converging_is_scikit_learns_warning_too(X):
    with pytest.warns(ConvergenceWarning, match="did not converge to tol=1e-12 within 2 iterations") as caught:
        gk.GaussianMixture(5, random_state=0, tol=1e-12, max_iter=2).fit(X)
    assert len(caught) == 1
    assert issubclass(caught[0].category, gk.ConvergenceWarning)


def test_verbose_speaks_in_sentences(X, capsys):
    gk.GaussianMixture(2, random_state=0, verbose=1, verbose_interval=1).fit(X)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fit 1 of 1, iteration 0: mean log-likelihood" in shown.err


def test_metadata_routing_brings_weights_through_a_pipeline_and_a_search(X):
    counts = np.random.RandomState(1).randint(0, 3, len(X)).astype(float)
    with sklearn.config_context(enable_metadata_routing=True):
        model = gk.GaussianMixture(3, random_state=0).set_fit_request(sample_weight=True)
        assert model.get_metadata_routing().fit.requests == {"sample_weight": True}
        assert clone(model).get_metadata_routing().fit.requests == {"sample_weight": True}
        assert model.get_metadata_routing().partial_fit.requests == {"sample_weight": None}
        model.set_partial_fit_request(sample_weight=False).set_score_request(sample_weight="counts")
        assert model.get_metadata_routing().score.requests == {"sample_weight": "counts"}
        model.set_score_request(sample_weight=True)
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        pipeline = make_pipeline(scaler, model).fit(X, sample_weight=counts)
        Z = StandardScaler().fit_transform(X)
        weighted = gk.GaussianMixture(3, random_state=0).fit(Z, sample_weight=counts)
        assert np.array_equal(pipeline[-1].means_, weighted.means_)
        folds = KFold(3, shuffle=True, random_state=0)
        search = GridSearchCV(pipeline, {"gaussianmixture__n_components": [1, 3]}, cv=folds)
        search.fit(X, sample_weight=counts)
        assert np.array_equal(search.best_estimator_[-1].means_, weighted.means_)
        with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError):
            make_pipeline(scaler, gk.GaussianMixture(3)).fit(X, sample_weight=counts)
        bayes = gk.BayesianGaussianMixture(n_components=2).set_fit_request(sample_weight=True)
        assert bayes.get_metadata_routing().fit.requests == {"sample_weight": True}
    with pytest.raises(RuntimeError, match="enable_metadata_routing=True"):
        gk.GaussianMixture().set_fit_request(sample_weight=True)


def test_requests_are_not_written_to_files(X, tmp_path):
    with sklearn.config_context(enable_metadata_routing=True):
        model = gk.GaussianMixture(2, random_state=0).set_fit_request(sample_weight=True).fit(X)
    model.save(tmp_path / "model.safetensors")
    assert np.array_equal(gk.GaussianMixture.load(tmp_path / "model.safetensors").means_, model.means_)


def test_diagram_of_a_notebook(X, monkeypatch):
    for model in (gk.GaussianMixture(2, tol=0.5), gk.BayesianGaussianMixture(n_components=2)):
        for found in (model, model.fit(X)):
            assert "sk-estimator" in found._repr_html_()
            assert type(model).__name__ in found._repr_html_()
    monkeypatch.setitem(sys.modules, "sklearn.utils", None)
    assert gk.GaussianMixture(2)._repr_html_() == "<code>GaussianMixture(n_components=2)</code>"


def test_scikit_learn_is_not_imported():
    code = (
        "import sys, torch, gmmkeops as gk; x = torch.randn(50, 2); gk.GaussianMixture(2).fit(x).predict(x);"
        "print('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_refused_fit_leaves_the_model_as_it_was(X):
    model = gk.GaussianMixture(2, random_state=0).fit(X)
    before = model.means_.copy()
    with pytest.raises(ValueError, match="finite"):
        model.fit(np.full_like(X, np.nan))
    assert np.array_equal(model.means_, before)


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        ({"n_components": 0}, ValueError, "n_components must be an integer of at least 1, got 0"),
        ({"n_components": 2.5}, ValueError, "n_components must be an integer"),
        ({"n_components": 10_000}, ValueError, "expected at least 10000; pass more points or use fewer components"),
        ({"tol": -1}, ValueError, "tol must be a finite number"),
        ({"reg_covar": "a"}, ValueError, "reg_covar must be a finite number"),
        ({"covariance_type": "round"}, ValueError, "covariance_type must be one of"),
        ({"init_params": "best"}, ValueError, "init_params must be one of"),
        ({"solver": "sgd"}, ValueError, "solver must be 'em', 'adam' or a method"),
        ({"weights_init": [0.5, 0.6], "n_components": 2}, ValueError, r"weights_init must have shape \(2,\)"),
        ({"means_init": [[0.0]]}, ValueError, r"means_init must have shape \(1, 2\)"),
        ({"precisions_init": np.eye(2)}, ValueError, r"precisions_init must have shape \(1, 2, 2\)"),
        ({"precisions_init": -np.eye(2)[None]}, ValueError, "precisions_init must be positive definite"),
        ({"random_state": "x"}, TypeError, "random_state must be None, an int or a numpy generator"),
        ({"penalty": lambda m: m.means.sum()}, TypeError, "EM does not support the penalty"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_parameters_get_one_sentence(X, params, kind, message):
    with pytest.raises(kind, match=message):
        gk.GaussianMixture(**params).fit(X)


def test_a_batch_is_no_estimator(tmp_path):
    batch = gk.Mixture(torch.zeros(3, 2), torch.zeros(3, 2, 1), gk.SphericalFactor(torch.zeros(3, 2, 1), 1))
    for ask in (gk.GaussianMixture.from_mixture, gk.to_sklearn, lambda m: gk.export.npz(m, tmp_path / "m.npz")):
        with pytest.raises(ValueError, match="a batch of shape"):
            ask(batch)
