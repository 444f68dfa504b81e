"""Mixtures for other programs: what they parse back is what was fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gmmkeops as gk

OFFSET = np.array([515_392.25, 4_918_365.5, 2_328.125])


def mixture(covariance_type, K=40, D=3):
    rng = np.random.default_rng(0)
    shapes = {
        "full": (K, D, D),
        "tied": (D, D),
        "diag": (K, D),
        "spherical": (K,),
        "tied_diag": (D,),
        "tied_spherical": (),
    }
    if covariance_type in ("full", "tied"):
        A = rng.normal(size=(*shapes[covariance_type][:-2], D, D)) * np.exp(rng.normal(size=D))
        C = A @ np.swapaxes(A, -1, -2) + 1e-4 * np.eye(D)
    else:
        C = np.exp(2 * rng.normal(size=shapes[covariance_type]))
    means = (OFFSET[:D] if D == 3 else 0) + 10 * rng.normal(size=(K, D))
    return gk.Mixture.from_parameters(rng.dirichlet(np.ones(K)), means, C, covariance_type)


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical", "tied_diag", "tied_spherical"])
def test_splats_parse_back(kind, tmp_path):
    plyfile = pytest.importorskip("plyfile")
    fitted = mixture(kind)
    offset = gk.export.splats(fitted, tmp_path / "m.ply")
    ply = plyfile.PlyData.read(tmp_path / "m.ply")
    rows = ply["vertex"].data
    assert ply.comments == ["offset " + " ".join(f"{value:.17g}" for value in offset)]
    assert list(rows.dtype.names[:9]) == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert sum(name.startswith("f_rest_") for name in rows.dtype.names) == 45
    means = np.stack([rows[name] for name in "xyz"], 1).astype(float) + offset
    assert np.abs(means - fitted.means.numpy()).max() < 1e-5
    w, x, y, z = (rows[f"rot_{d}"].astype(float) for d in range(4))
    assert np.allclose(w**2 + x**2 + y**2 + z**2, 1, atol=1e-6)
    R = np.stack(
        [
            np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], 1),
            np.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], 1),
            np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], 1),
        ],
        1,
    )
    s = np.exp(np.stack([rows[f"scale_{d}"] for d in range(3)], 1).astype(float))
    found = R @ (s[:, :, None] ** 2 * np.swapaxes(R, 1, 2))
    expected = fitted.factor.covariances().expand(40, 3, 3).numpy()
    size = np.abs(expected).max((1, 2), keepdims=True)
    assert (np.abs(found - expected) / size).max() < 1e-6
    alpha = 1 / (1 + np.exp(-rows["opacity"].astype(float)))
    assert 0 < alpha.min() <= alpha.max() < 1
    colors = 0.5 + 0.28209479177387814 * np.stack([rows[f"f_dc_{d}"] for d in range(3)], 1)
    assert -1e-6 < colors.min() <= colors.max() < 1 + 1e-6


def test_ellipsoids_lie_at_their_distance(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    fitted = mixture("full", K=5)
    gk.export.ellipsoids(fitted, tmp_path / "m.ply", radius=1.5)
    ply = plyfile.PlyData.read(tmp_path / "m.ply")
    vertices = np.stack([ply["vertex"][name] for name in "xyz"], 1).reshape(5, -1, 3)
    z = vertices - fitted.means.numpy()[:, None]
    P = np.linalg.inv(fitted.factor.covariances().numpy())
    assert np.allclose(np.einsum("kni,kij,knj->kn", z, P, z), 1.5**2, rtol=1e-5)
    faces = np.stack(ply["face"]["vertex_indices"])
    assert faces.min() == 0
    assert faces.max() < vertices.shape[0] * vertices.shape[1]
    # Every component's faces stay on its own vertices.
    assert (faces // vertices.shape[1] == (faces // vertices.shape[1])[:, :1]).all()


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical", "tied_diag", "tied_spherical"])
def test_scikit_learn_reads_the_arrays(kind, tmp_path):
    sklearn = pytest.importorskip("sklearn.mixture")
    fitted = mixture(kind, K=3, D=4)
    gk.export.npz(fitted, tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as arrays:
        model = sklearn.GaussianMixture(3, covariance_type=str(arrays["covariance_type"]))
        for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
            setattr(model, name, arrays[name])
    x = np.random.default_rng(1).normal(size=(50, 4)) * 10
    assert np.allclose(model.score_samples(x), fitted.log_prob(torch.from_numpy(x)).numpy(), rtol=1e-9)


def test_only_space_has_splats(tmp_path):
    for function in (gk.export.splats, gk.export.ellipsoids):
        with pytest.raises(ValueError, match="3 columns"):
            function(mixture("full", D=4), tmp_path / "m.ply")
    assert not list(tmp_path.iterdir())
