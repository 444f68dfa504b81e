"""Moments: additivity, centers, weights, hard and stochastic assignments, and their digits in float32."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from gmmkeops import Moments, reductions


def test_float32_sums_keep_their_digits():
    """10⁶ equal terms: a running float32 sum would be 1 % off."""
    x = torch.full((1_000_000, 1), 0.1)
    exact = float(x[0, 0].double())
    for backend, tolerance in (("dense", 1e-12), ("native", 1e-6)):
        sums = reductions.moments(x, torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1), backend=backend)
        assert abs(float(sums.S1[0, 0]) / (1e6 * exact) - 1) < tolerance
        assert abs(float(sums.S2[0]) / (1e6 * exact**2) - 1) < tolerance


def test_thin_component_far_away_in_float32():
    """500 m from the center, σ = 5 cm: expanded float32 squares are wrong 18-fold, ours are right."""
    generator = torch.Generator().manual_seed(0)
    x = (0.05 * torch.randn(20_000, 2, generator=generator, dtype=torch.float64) + 500).float()
    far = torch.cat([x, torch.full((10, 2), -500.0)])
    means, U = torch.tensor([[500.0, 500.0], [-500.0, -500.0], [-500.0, -500.0]]), torch.full((3, 2), 20.0)
    sums = reductions.moments(far, torch.zeros(3), means, U)
    truth = (x.double() - 500).square().sum(0)
    assert float((sums.S2[0] / truth - 1).abs().max()) < 1e-6


def test_hard_moments_are_sums_over_clusters():
    case = make_case("full", torch.float32)
    labels = case.oracle()["e"].argmax(1)
    g = torch.rand(len(case.x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = reductions.moments(*case.arguments, weights=g, assignment="hard")
    for k in range(5):
        z = (case.x[labels == k] - case.means[k]).double()
        h = g[labels == k]
        assert torch.allclose(sums.S0[k], h.sum())
        assert torch.allclose(sums.S1[k], h @ z, atol=1e-4)
        assert torch.allclose(sums.S2[k], (h[:, None] * z).mT @ z, atol=1e-4)
    assert torch.allclose(sums.total, g @ case.oracle()["e"].amax(1), rtol=1e-5)


def test_draws_of_many_tiles_are_independent():
    """The mass of one of two equal components is binomial; tiles that draw alike would spread it several times as far."""
    N, factor = 200_000, torch.ones(2, 1, dtype=torch.float64)
    x, means = torch.zeros(N, 2, dtype=torch.float64), torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    offsets = torch.zeros(2, dtype=torch.float64)
    masses = torch.stack(
        [
            reductions.moments(x, offsets, means, factor, assignment="stochastic", seed=10**6 * seed).S0
            for seed in range(20)
        ]
    )
    assert bool((masses.sum(1) == N).all())
    deviations = (masses[:, 0] - N / 2) / (N / 4) ** 0.5
    # A χ² of 20 degrees of freedom is beyond 60 once in 100 000 times.
    assert float(deviations.square().sum()) < 60


def test_stochastic_moments_are_draws():
    """20 000 copies of three points; each count is within 5 standard deviations but for chance 6e-7 per entry."""
    case = make_case("full", torch.float64, N=3, condition=10.0)
    r = (case.oracle()["e"] - case.oracle()["values"][:, None]).exp()
    x = case.x.repeat(20_000, 1)
    sums = reductions.moments(x, *case.arguments[1:], assignment="stochastic", seed=1)
    expected, deviation = 20_000 * r.sum(0), (20_000 * r * (1 - r)).sum(0).sqrt()
    assert bool(((sums.S0 - expected).abs() <= 5 * deviation + 1e-9).all())
    assert torch.equal(sums.S0, sums.S0.round())
    assert abs(float(sums.total - 20_000 * case.oracle()["values"].sum())) < 1e-6
    again = reductions.moments(x, *case.arguments[1:], assignment="stochastic", seed=1)
    assert torch.equal(again.S2, sums.S2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 299), st.sampled_from(FAMILIES))
def test_parts_add_up_about_any_centers(seed, cut, family):
    case = make_case(family, torch.float64, seed=seed, condition=10.0)
    whole = reductions.moments(*case.arguments)
    x, *rest = case.arguments
    first, second = reductions.moments(x[:cut], *rest), reductions.moments(x[cut:], *rest)
    away = second.recenter(second.centers + torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).double())
    for both in (first + away, (away + first).recenter(whole.centers)):
        for name in ("S0", "S1", "S2", "total", "mass"):
            assert torch.allclose(getattr(both, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ndim", [3, 2, 1])
def test_recentered_moments_are_those_about_the_other_centers(ndim):
    generator = torch.Generator().manual_seed(3)
    x, old, new = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (50, 4, 4))
    r = torch.rand(50, 4, generator=generator, dtype=torch.float64)

    def about(centers):
        z = x[:, None] - centers
        S2 = torch.einsum("nk,nkd,nke->kde", r, z, z)
        S2 = S2 if ndim == 3 else S2.diagonal(dim1=1, dim2=2)
        S2 = S2.sum(1) if ndim == 1 else S2
        return Moments(r.sum(0), torch.einsum("nk,nkd->kd", r, z), S2, centers, r.sum(), r.sum())

    found, right = about(old).recenter(new), about(new)
    for name in ("S0", "S1", "S2", "centers"):
        assert torch.allclose(getattr(found, name), getattr(right, name), rtol=1e-12, atol=1e-12)


def test_a_decayed_sum_is_that_of_lighter_points():
    x, *rest = make_case("full", torch.float64, seed=1).arguments
    decayed = 0.3 * reductions.moments(x, *rest)
    lighter = reductions.moments(x, *rest, weights=torch.full((len(x),), 0.3, dtype=torch.float64))
    for name in ("S0", "S1", "S2", "total", "mass"):
        assert torch.allclose(getattr(decayed, name), getattr(lighter, name), rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(FAMILIES))
def test_integer_weights_are_repetition(seed, family):
    case = make_case(family, torch.float64, seed=seed, N=50, condition=10.0)
    x, *rest = case.arguments
    counts = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(seed))
    weighted = reductions.moments(x, *rest, weights=counts)
    repeated = reductions.moments(x.repeat_interleave(counts, 0), *rest) if int(counts.sum()) else weighted * 0
    for name in ("S0", "S1", "S2", "total", "mass"):
        assert torch.allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-9, atol=1e-9)
