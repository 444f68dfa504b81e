"""Initialization: clusters, weights, degenerate clouds, and reproducibility."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, ZUKO, elongated_blobs

import gmmkeops as gk


@pytest.mark.parametrize(("family", "tied"), ZUKO)
@pytest.mark.parametrize("strategy", ["random", "kmeans", "kmeans++"])
def test_initialized_density_is_not_below_a_baseline(family, tied, strategy):
    """Three clusters explain the elongated_blobs better than one Gaussian; a square root lost would cost whole nats."""
    x = elongated_blobs()
    torch.manual_seed(0)
    model = gk.GMM(2, n_components=3, covariance_type=family, tied=tied).initialize(x, strategy)
    single = gk.initialize(x, 1, covariance_type="full").log_prob(x).mean()
    assert model().log_prob(x).mean().item() > single.item() - (0.2 if strategy == "random" else -0.3)
    weights = model().weights
    assert bool((weights > 0.02).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_initialize_matches_the_clusters(family):
    x = elongated_blobs().double()
    mixture = gk.initialize(x, 3, "kmeans", covariance_type=family)
    labels = ((x[:, None] - mixture.means) ** 2).sum(-1).argmin(1)
    for k in range(3):
        cloud = x[labels == k]
        assert torch.allclose(mixture.means[k], cloud.mean(0), atol=0.02)
        assert abs(float(mixture.weights[k]) - len(cloud) / len(x)) < 0.02
        if family == "full":
            assert torch.allclose(mixture.factor.covariances()[k], torch.cov(cloud.T, correction=0), atol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_clusters_of_weighted_points_are_those_of_repeated_ones(family):
    x = elongated_blobs(60).double()
    counts = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(1))

    def start(points, weights):
        found = gk.initialize(points, 3, "kmeans", covariance_type=family, sample_weight=weights)
        return found.select(found.means[:, 0].argsort())

    a = start(x, counts.double())
    for b in (start(x.repeat_interleave(counts, 0), None), start(x, counts.double() * 1e-9)):
        assert torch.allclose(a.weights, b.weights)
        assert torch.allclose(a.means, b.means)
        assert torch.allclose(a.factor.covariances(), b.factor.covariances())


def test_rows_that_alternate_are_sampled_alike():
    """Every second row belongs to another cloud: a strided sample would see one of them only."""
    x = torch.randn(60_000, 2, generator=torch.Generator().manual_seed(0))
    x[::2] += 20
    assert gk.initialize(x, 2, "kmeans").weights.tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    model = gk.GaussianMixture(2, random_state=0).fit(x)
    assert model.weights_.tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


@pytest.mark.parametrize("strategy", ["random", "kmeans", "kmeans++"])
def test_degenerate_clouds_have_a_start(strategy):
    generator = torch.Generator().manual_seed(0)
    line = torch.linspace(0, 1, 40).double()[:, None] * torch.tensor([1.0, 2.0]).double()
    for x in (
        torch.ones(10, 2),
        line,
        torch.randn(4, 2, generator=generator),
        torch.cat([torch.randn(30, 2), torch.full((1, 2), 1e8)]),
    ):
        mixture = gk.initialize(x, 4, strategy, generator=generator)
        assert bool(torch.isfinite(mixture.log_prob(x)).all())


def test_initialize_is_reproducible_and_leaves_torch_alone():
    x = elongated_blobs()
    state = torch.get_rng_state()
    first, second = gk.initialize(x, 5), gk.initialize(x, 5)
    assert torch.equal(first.means, second.means)
    assert torch.equal(state, torch.get_rng_state())
    other = gk.initialize(x, 5, generator=torch.Generator().manual_seed(99))
    assert not torch.equal(first.means, other.means)


def test_em_steps_after_a_search_are_refused():
    with pytest.raises(ValueError, match="refine=2 requires a strategy without a search, got 'auto'"):
        gk.initialize(torch.randn(50, 2), 3, refine=2)
