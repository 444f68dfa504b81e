"""Pictures: what was drawn is what the mixture says, and nothing global changed."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import random_mixture

import gmmkeops as gk
from gmmkeops import plotting


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_density_is_the_density(ax):
    mixture = gk.Mixture.from_parameters([1.0], [[1.0, 2.0]], [[0.25, 1.0]], "diag")
    drawn = plotting.density(mixture, ax=ax, extent=(0, 2, 0, 4), resolution=51)
    values = drawn["image"].get_array()
    assert abs(values.max() - 1 / (2 * np.pi * 0.5)) < 1e-6
    assert np.unravel_index(values.argmax(), values.shape) == (25, 25)
    assert list(drawn["image"].get_extent()) == [0, 2, 0, 4]
    assert len(drawn["contours"].levels) == 41
    assert plotting.density(mixture, ax=ax, levels=0)["contours"] is None


def test_ellipses_are_level_sets(ax):
    mixture = random_mixture("full", K=3)
    patches = plotting.ellipses(mixture, ax=ax, deviations=1.5, minimum_weight=0)
    assert len(patches) == 3
    for k, patch in enumerate(patches):
        border = torch.from_numpy(patch.get_verts())
        border = ax.transData.inverted().transform(border)
        z = torch.from_numpy(border) - mixture.means[k]
        distance = (z @ mixture.factor.matrices()[k]).norm(dim=1)
        assert torch.allclose(distance, torch.full_like(distance, 1.5), rtol=1e-2)


def test_points_are_thinned_evenly(ax):
    x = torch.arange(100.0)[:, None].expand(100, 2)
    drawn = plotting.points(x, ax=ax, limit=10, color=np.arange(100))
    shown = drawn.get_offsets()[:, 0]
    assert (shown // 10).tolist() == list(range(10))
    assert len(set(shown % 10)) > 1  # in step with nothing
    assert drawn.get_array().tolist() == shown.tolist()


def test_objective_is_the_history(ax):
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    result = gk.fit(gk.initialize(x, 2), x, gk.Adam(), max_iter=5)
    (line,) = plotting.objective(result, ax=ax)
    assert line.get_ydata().tolist() == result.history["objective"]
    (line,) = plotting.objective(result, ax=ax, against="seconds")
    assert line.get_xdata().tolist() == result.history["seconds"]
    assert "nats" in ax.get_ylabel()


def test_current_axes_and_defaults(ax):
    before = dict(matplotlib.rcParams)
    plt.sca(ax)
    plotting.ellipses(random_mixture("spherical"))
    assert ax.patches
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.density(random_mixture("full", D=3)), "needs one mixture in 2 dimensions"),
        (lambda: plotting.ellipses(random_mixture("full", D=1)), "needs one mixture in 2 dimensions"),
        (lambda: plotting.density(random_mixture("full"), extent=(1, 0, 0, 1)), "extent must be"),
        (lambda: plotting.objective(None, against="hours"), "against must be 'iteration' or 'seconds'"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ellipsoids_end_at_so_many_deviations(ax):
    """Seen from above, from the east and askew: a pixel is colored if the marginal in the view holds it."""
    mixture = random_mixture("full", K=3, D=3)
    for azimuth, elevation in ((-90, 90), (0, 0), (30, 40)):
        turn = plotting.view(torch.eye(3), azimuth=azimuth, elevation=elevation).T[:2]
        drawn = plotting.ellipsoids(mixture, ax=ax, deviations=1.5, azimuth=azimuth, elevation=elevation, resolution=80)
        picture, (left, right, bottom, top) = drawn.get_array(), drawn.get_extent()
        u = left + (right - left) * (torch.arange(picture.shape[1]) + 0.5) / picture.shape[1]
        v = bottom + (top - bottom) * (torch.arange(80) + 0.5) / 80
        places = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1).double()
        flat = turn @ mixture.factor.covariances() @ turn.T
        away = places[..., None, :] - mixture.means @ turn.T
        inside = (torch.einsum("rckd,kde,rcke->rck", away, flat.inverse(), away) < 1.5**2).any(-1)
        assert ((picture[..., 3] > 0.5) == inside.numpy()).mean() > 0.99


def test_the_nearest_ellipsoid_is_in_front_and_lit(ax):
    mixture = gk.Mixture.from_parameters([0.7, 0.2, 0.1], 3.0 * torch.eye(3), [1.0, 4.0, 1.0], "spherical")
    look = {"ax": ax, "color": ["r", "lime", "b"], "elevation": 0.0, "resolution": 40, "extent": (-1, 1, -1, 1)}
    red = plotting.ellipsoids(mixture, azimuth=0, **look).get_array()
    green = plotting.ellipsoids(mixture, azimuth=180, **look).get_array()
    none = plotting.ellipsoids(mixture, azimuth=0, minimum_weight=0.8, **look).get_array()
    assert red[20, 20, 0] > 0.5 > red[20, 20, 1]
    assert green[20, 20, 1] > 0.3 > green[20, 20, 0]
    assert none.max() == 0
    assert red[30, 12, 0] > red[12, 30, 0]  # light from the left and above


def test_ellipsoids_without_thickness_are_drawn(ax):
    plate, point = torch.diag(torch.tensor([1.0, 1.0, 1e-30])), 1e-40 * torch.eye(3)
    mixture = gk.Mixture.from_parameters([0.5, 0.5], [[0.0, 0, 0], [5.0, 0, 0]], torch.stack([plate, point]).double())
    above = plotting.ellipsoids(mixture, ax=ax, azimuth=-90, elevation=90, extent=(-3, 6, -3, 3), resolution=60)
    aside = plotting.ellipsoids(mixture, ax=ax, azimuth=-90, elevation=0, extent=(-3, 6, -3, 3), resolution=60)
    assert above.get_array()[30, 30, 3] == 1
    assert aside.get_array()[..., 3].sum() < 0.1 * above.get_array()[..., 3].sum()


def test_ellipsoids_need_three_dimensions(ax):
    with pytest.raises(ValueError, match="3 columns"):
        plotting.ellipsoids(random_mixture("full", K=2, D=2), ax=ax)
    with pytest.raises(ValueError, match="left < right"):
        plotting.ellipsoids(random_mixture("full", K=2, D=3), ax=ax, extent=(0, 0, 1, 2))
