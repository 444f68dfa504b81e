"""Centers and standard deviations of columns, without outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gmmkeops as gk
from gmmkeops.data import spread, trimmed_spread


@pytest.mark.parametrize("scale", [1.0, 1e-100])
def test_rows_that_do_not_count_change_nothing(scale):
    """A column may be constant but for rows of weight zero, or for outliers."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(400, 3)))
    x[:, 2] = 0.0
    x = x * scale
    expected = trimmed_spread(x)
    other = torch.cat([x, torch.tensor([[0.0, 0.0, 5.0 * scale]] * 4)])
    weights = torch.cat([torch.ones(400), torch.zeros(4)]).double()
    for found, value in zip(trimmed_spread(other, weights), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=0)
    other = torch.cat([x, torch.tensor([[0.0, 0.0, 1e4 * scale]])])
    center, spread = trimmed_spread(other)
    assert bool(center.isfinite().all() and spread.isfinite().all())
    assert float(spread[0]) == pytest.approx(float(expected[1][0]), rel=0.05)


@pytest.mark.parametrize("outlier", [0, 25, 59])
def test_outliers_in_any_part_of_the_rows_are_left_out(outlier, monkeypatch):
    """Rows are read in parts, of which only one may contain points that are left out."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[outlier] = 1e6
    whole = trimmed_spread(x)
    monkeypatch.setattr(spread, "_ROWS", 20)
    torch.testing.assert_close(trimmed_spread(x), whole)
    assert float(whole[1].max()) < 2


def test_a_fit_ignores_rows_of_weight_zero_in_a_constant_column():
    x = np.random.default_rng(0).normal(size=(400, 3))
    x[:, 2] = 0.0
    x[:4, 2] = 1.0
    weights = np.ones(400)
    weights[:4] = 0.0
    for family in ("full", "tied", "diag", "spherical"):
        settings = {"covariance_type": family, "random_state": 0}
        found = gk.GaussianMixture(2, **settings).fit(x, sample_weight=weights).score(x[4:])
        assert found == pytest.approx(gk.GaussianMixture(2, **settings).fit(x[4:]).score(x[4:]), abs=1e-6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("constant", [0.37, -57006.066, 1e9])
def test_a_constant_column_changes_nothing_in_the_others(constant, native):
    """Its deviation is a rounding error, which may become much smaller when rows are left out."""
    if native and gk.reductions.native_unavailable() is not None:
        pytest.skip("the native engine has not been compiled")
    compute = gk.reductions.spread_of if native else trimmed_spread
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.normal(size=(50 + 10 * seed, 2)))
        with_constant = torch.cat([x, torch.full((len(x), 1), constant, dtype=torch.float64)], 1)
        for one, other in zip(compute(with_constant), compute(x), strict=True):
            torch.testing.assert_close(one[:2], other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("native", [True, False])
def test_outliers_in_a_column_that_is_constant_otherwise_are_left_out(native):
    if native and gk.reductions.native_unavailable() is not None:
        pytest.skip("the native engine has not been compiled")
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(400, 2)))
    x[:, 1] = 0.37
    x[7, 1], x[9, 0] = 1e6, 1e9
    center, deviations = (gk.reductions.spread_of if native else trimmed_spread)(x)
    assert float(deviations[0]) == pytest.approx(1, abs=0.1)
    assert float(center[1]) == pytest.approx(0.37, rel=1e-12)
    assert float(deviations[1]) < 1e-12
