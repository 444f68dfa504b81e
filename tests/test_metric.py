"""Metrics of k-means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gmmkeops as gk
from gmmkeops.fitting import search
from gmmkeops.fitting.initialization import start_of
from gmmkeops.fitting.metric import invariant_metric, white_metric


def metric(points, masses=None):
    """The matrix of squared distances."""
    masses = torch.ones(len(points), dtype=torch.float64) if masses is None else masses
    root = invariant_metric(points, masses, white_metric(points, masses)[1])
    assert torch.equal(root, root.triu())
    return root @ root.T


def two_clusters(N=4000, D=8):
    """Points of two clusters along the third column, three standard deviations from each other."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((N, D))
    points[: N // 2, 2] += 3
    return torch.from_numpy(points - points.mean(0))


def test_distances_are_those_in_the_eigenvectors_of_a_second_scatter_matrix():
    points = two_clusters(500, 4)
    covariance = white_metric(points, None)[0].numpy()
    lengths = np.einsum("ni,ij,nj->n", points, np.linalg.inv(covariance), points)
    scatter = (points.numpy() / lengths[:, None]).T @ points.numpy() * 4 / 500
    # Columns of ``vectors`` are directions b with b' covariance b = 1 and b' scatter b = value.
    half = np.linalg.cholesky(np.linalg.inv(covariance))
    values, rotated = np.linalg.eigh(half.T @ scatter @ half)
    vectors = half @ rotated
    away = np.abs(values - 1)
    scaled = vectors * np.maximum(away / away.max(), 0.2)
    np.testing.assert_allclose(metric(points), scaled @ scaled.T, rtol=1e-9, atol=1e-9)


def test_the_metric_is_longest_in_the_direction_of_the_clusters():
    M = metric(two_clusters())
    assert float(M[2, 2]) > 0.2
    assert float(M.diagonal()[[0, 1, 3, 4, 5, 6, 7]].amax()) < 0.1


def test_units_and_rotations_do_not_matter():
    points = two_clusters(1000, 5)
    A = 0.3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # The constant that keeps covariances of constant columns regular depends on units.
    torch.testing.assert_close(A @ metric(points @ A) @ A.T, metric(points), rtol=0, atol=2e-3)


def test_weights_are_numbers_of_equal_points():
    points = two_clusters(300, 3)
    copies = torch.arange(300) % 3 + 1
    torch.testing.assert_close(metric(points, copies.double()), metric(points.repeat_interleave(copies, 0)))


@pytest.mark.parametrize("column", ["constant", "copy", "almost a copy"])
def test_columns_without_variance_of_their_own_are_neglected(column):
    """They do not hide the direction of the clusters."""
    points = two_clusters()
    noise = 1e-4 * torch.randn(len(points), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    added = {"constant": 0 * noise, "copy": points[:, 5], "almost a copy": points[:, 5] + noise}[column]
    lengths, others = (metric(x).inverse().diagonal().rsqrt() for x in (points, torch.cat([points, added[:, None]], 1)))
    assert float(lengths[2]) > 1.5 * float(lengths[[0, 1, 3, 4, 6, 7]].amax())
    torch.testing.assert_close(others[:5], lengths[:5], rtol=1e-3, atol=0)
    torch.testing.assert_close(others[6:8], lengths[6:8], rtol=1e-3, atol=0)


def in_few_columns(seed, N=3000, D=16, K=5):
    """Points of clusters that differ in two of the columns; their labels."""
    rng = np.random.default_rng(seed)
    centers = np.zeros((K, D))
    centers[:, :2] = 6 * rng.normal(size=(K, 2))
    labels = rng.integers(K, size=N)
    return torch.from_numpy(centers[labels] + rng.standard_normal((N, D))), labels


def optimum(x, labels):
    """The log-likelihood that EM reaches from the true clusters, nats per point."""
    parts = [x[labels == k] for k in range(labels.max() + 1)]
    weights = [len(part) / len(x) for part in parts]
    truth = gk.Mixture.from_parameters(
        weights, torch.stack([p.mean(0) for p in parts]), torch.stack([p.T.cov() for p in parts])
    )
    return gk.fit(truth, x, gk.EM(tol=0, max_iter=100)).log_likelihood


def test_clusters_in_few_of_many_columns_are_found(monkeypatch):
    lost = {16: [], 6: []}
    for seed in range(12):
        x, labels = in_few_columns(seed)
        best = optimum(x, labels)
        for columns, values in lost.items():
            monkeypatch.setattr(search, "_COLUMNS", 17 if columns == 16 else 6)
            values.append(best - float(start_of(x, 5)[0].log_prob(x).mean()))
    without, with_metric = np.array(lost[16]), np.array(lost[6])
    assert (with_metric <= without + 0.02).all()
    assert (with_metric > 0.05).sum() < (without > 0.05).sum()


@pytest.mark.parametrize(("D", "distance", "candidates"), [(8, 2.0, 3), (5, 2.0, 2), (8, 40.0, 2)])
def test_the_third_metric_is_for_overlapping_components_in_many_columns(D, distance, candidates):
    rng = np.random.default_rng(3)
    labels = np.arange(2000) % 3
    centers = distance * np.array([rng.permutation(3) for _ in range(D)]).T
    x = torch.from_numpy(centers[labels] + rng.standard_normal((2000, D)) * (0.5 if distance > 3 else 2))
    report = start_of(x, 3)[1]
    assert report.candidates == candidates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_that_do_not_vary_in_any_direction(dtype):
    x = torch.full((300, 7), 3.0, dtype=dtype)
    mixture = gk.initialize(x, 2)
    assert bool(mixture.log_prob(x).isfinite().all())
    torch.testing.assert_close(mixture.means, torch.full((2, 7), 3.0, dtype=torch.float64))
