"""The warning for components that have fewer points than their covariance needs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import FAMILIES

import gmmkeops as gk

# Points of the small cluster; the other one has fifty.
SIZES = (1, 2, 3, 4, 5)


def two_clusters(size, D=3):
    """A large cluster, a small one far away, and the mixture of both."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((50, D)), 100 + rng.standard_normal((size, D))])
    return torch.from_numpy(x)


def start_of(x, covariance_type):
    return gk.initialize(x, 2, "kmeans", covariance_type=covariance_type)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("covariance_type", FAMILIES)
@pytest.mark.parametrize("method", [gk.EM(), gk.Adam()])
def test_the_limit_depends_on_the_covariance(covariance_type, size, method):
    x = two_clusters(size)
    least = {"full": 4, "diag": 2, "spherical": 2}.get(covariance_type, 0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = gk.fit(start_of(x, covariance_type), x, method, max_iter=3)
    said = [str(each.message) for each in found if each.category is gk.DegenerateWarning]
    small = int(result.mixture.means[:, 0].argmax())
    assert result.report.degenerate_components == ((small,) if size < least else ())
    assert len(said) == (size < least)
    if said:
        assert said[0].startswith(f"component {small} is expected to have fewer than {least} points")
        assert found[-1].filename == __file__


def test_weights_count_as_points_of_equal_weight():
    x = two_clusters(3)
    start = start_of(x, "full")
    with pytest.warns(gk.DegenerateWarning, match="fewer than 4 points"):
        gk.fit(start, x, sample_weight=torch.full((53,), 1000.0))


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": gk.penalties.CovariancePrior(torch.eye(3).double(), 5.0)},
        {"penalty": gk.penalties.InverseWishart(1.0, 4.0)},
        {"penalty": gk.penalties.EigenvalueFloor(0.1)},
        {"penalty": gk.penalties.SqrtWeights(0.1)},
        {"method": gk.EM(frozen_covariances=True)},
        {"method": gk.bayes.VariationalBayes()},
        {"max_iter": 0},
    ],
)
def test_no_warning_where_something_else_determines_the_covariance(options):
    x = two_clusters(2)
    result = gk.fit(start_of(x, "full"), x, **({"max_iter": 1000} | options))
    assert result.report.degenerate_components == ()


def test_penalties_that_do_not_help():
    x = two_clusters(2)
    with pytest.warns(gk.DegenerateWarning):
        gk.fit(start_of(x, "full"), x, penalty=gk.penalties.Dirichlet(2.0))


def test_the_estimator_warns_once_and_for_the_best_fit():
    x = two_clusters(2).numpy()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        gk.GaussianMixture(2, n_init=3, init_params="kmeans").fit(x)
    assert [each.category for each in found] == [gk.DegenerateWarning]
    assert found[0].filename == __file__
    model = gk.GaussianMixture(2, init_params="kmeans", prior="auto").fit(x)
    assert model.result_.report.degenerate_components == ()
