"""Files of estimators hold all that is fitted and every parameter, or name what they cannot hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gmmkeops as gk

pytestmark = pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")


SHAPES = {
    "full": lambda K, D: (K, D, D),
    "tied": lambda K, D: (D, D),
    "diag": lambda K, D: (K, D),
    "spherical": lambda K, D: (K,),
    "tied_diag": lambda K, D: (D,),
    "tied_spherical": lambda K, D: (),
}


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(2)
    return np.r_[
        rng.normal(size=(90, 2)) @ [[1.0, 0.7], [0.0, 0.5]], [5.0, 1.0] + rng.normal(size=(60, 2)) * [0.4, 2.0]
    ]


@pytest.fixture(scope="module")
def batch(X):
    return 0.5 * X[::-1][:70] + [1.0, -2.0]


def test_a_saved_stream_goes_on(X, batch, tmp_path):
    model = gk.GaussianMixture(3, random_state=0, covariance_type="tied").partial_fit(X).partial_fit(batch)
    model.save(tmp_path / "m.safetensors")
    twin = gk.GaussianMixture.load(tmp_path / "m.safetensors")
    for part in (X[:50], batch, X):
        model.partial_fit(part)
        twin.partial_fit(part)
    assert np.array_equal(twin.covariances_, model.covariances_)
    assert np.array_equal(twin.means_, model.means_)
    assert twin.n_iter_ == model.n_iter_ == 5


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize("K", [1, 3])
def test_files_hold_everything(X, tmp_path, kind, K):
    params = {
        "covariance_type": kind,
        "tol": 1e-5,
        "max_iter": 7,
        "reg_covar": 1e-4,
        "n_init": 2,
        "init_params": "random_from_data",
        "weights_init": np.full(K, 1 / K),
        "means_init": torch.from_numpy(X[:K]).float(),
        "random_state": 3,
        "verbose_interval": 4,
        "dtype": torch.float64,
        "device": "cpu",
        "truncate": 0.0,
        "max_memory": "1GB",
        "penalty": 0.5 * gk.penalties.Dirichlet(1.5) + gk.penalties.NormalMean([0.0, 1.0], 2.0),
        "solver": gk.EM(accelerate=True, frozen_means=[k == 0 for k in range(K)]),
    }
    model = gk.GaussianMixture(K, **params).fit(X)
    for number, write in enumerate((model.save, lambda path: gk.save(model, path))):
        path = tmp_path / f"{number}.safetensors"
        write(path)
        twin = gk.GaussianMixture.load(path)
        assert repr(twin) == repr(model)
        for name in ("converged_", "n_iter_", "lower_bound_", "lower_bounds_", "n_features_in_"):
            assert getattr(twin, name) == getattr(model, name), name
        for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
            assert np.array_equal(getattr(twin, name), getattr(model, name)), name
        assert twin.result_.report == model.result_.report
        assert twin.result_.history == model.result_.history
        assert np.array_equal(twin.fit(X).means_, model.fit(X).means_)
        # An estimator made from a mixture has no other attributes.
        assert torch.equal(gk.load(path).means, model.mixture_.means)


def test_files_keep_kinds_of_arrays_methods_and_warm_starts(X, tmp_path):
    path = tmp_path / "m.safetensors"
    model = gk.GaussianMixture(2, solver=gk.Adam(lr=0.02, batch_size=40, max_iter=3)).fit(torch.from_numpy(X))
    model.save(path)
    twin = gk.GaussianMixture.load(path)
    assert torch.is_tensor(twin.means_)
    assert torch.equal(twin.fit(torch.from_numpy(X)).means_, model.fit(torch.from_numpy(X)).means_)
    straight = gk.GaussianMixture(2, tol=1e-4, random_state=0).fit(X)
    warm = gk.GaussianMixture(2, tol=1e-4, max_iter=1, warm_start=True, random_state=0).fit(X)
    steps = 1
    while not warm.converged_:
        warm.save(path)
        warm = gk.GaussianMixture.load(path).fit(X)
        steps += 1
    assert steps == straight.n_iter_
    assert np.allclose(warm.means_, straight.means_, atol=1e-10)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"random_state": np.random.RandomState(0)}, "random_state"),
        ({"penalty": lambda mixture: 0 * mixture.means.sum(), "solver": "adam", "max_iter": 2}, "penalty"),
        ({"solver": gk.Gradient(torch.optim.SGD, max_iter=2)}, "solver"),
    ],
)
def test_what_a_file_cannot_hold_is_named(X, tmp_path, params, name):
    model = gk.GaussianMixture(2, **params).fit(X)
    with pytest.raises(ValueError, match=rf"^save cannot write {name}, which contains a \w+; .*\.$"):
        model.save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    gk.save(model.mixture_, tmp_path / "m.safetensors")


def test_damaged_entries_get_one_sentence(X, tmp_path):
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    model = gk.GaussianMixture(2).partial_fit(X)
    model.save(path)
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (name,) = [key for key in metadata if "estimator" in key]
    good = metadata[name]
    entries = [
        good.replace("n_components", "components"),
        good.replace('["_fitted_type", "full"]', '["_fitted_type", "diagonal"]'),
        good.replace("Moments", "Popen"),
        '{"dict": []}',
        "[1, 2]",
        "3",
    ]
    for entry in entries:
        assert entry != good
        save_file(tensors, str(path), metadata | {name: entry})
        with pytest.raises(ValueError, match=r"m\.safetensors is damaged"):
            gk.GaussianMixture.load(path)
    save_file(tensors, str(path), metadata | {name: json.dumps(json.loads(good))})
    assert gk.GaussianMixture.load(path).n_iter_ == 1
