"""Quantiles of mixtures in one dimension: against mpmath, gradients, batches, and what is refused."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from conftest import batch_of, random_mixture

import gmmkeops as gk


def mixture_1d(condition=1.0):
    """Three components whose scales differ by up to ``condition``."""
    variances = [0.3, condition, 4.0 * condition**2]
    return gk.Mixture.from_parameters([0.2, 0.5, 0.3], [[-3.0], [0.5], [40.0]], variances, "spherical")


SHARES = [1e-300, 1e-30, 1e-9, 0.03, 0.2, 0.5, 0.69, 0.71, 0.97, 1 - 1e-9, 1 - 2.0**-53]


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_icdf_against_mpmath(condition):
    m = mixture_1d(condition)
    found = m.icdf(SHARES)
    assert found.shape == (len(SHARES), 1)
    parts = [
        (float(w), float(mu), 1 / float(u)) for w, mu, u in zip(m.weights, m.means[:, 0], m.factor.U[:, 0], strict=True)
    ]
    with mpmath.workdps(400):
        total = mpmath.fsum(w for w, _, _ in parts)
        for share, x in zip(SHARES, found[:, 0].tolist(), strict=True):
            # One Newton step, in many digits, from what was found.
            below = mpmath.fsum(w * mpmath.ncdf(x, mu, s) for w, mu, s in parts) / total
            density = mpmath.fsum(w * mpmath.npdf(x, mu, s) for w, mu, s in parts) / total
            assert abs((below - mpmath.mpf(share)) / density) < 1e-10 * max(1.0, abs(x))


def test_icdf_of_one_component_is_that_of_a_normal():
    m = gk.Mixture.from_parameters([1.0], torch.tensor([[5e6]]).double(), torch.tensor([4.0]).double(), "spherical")
    shares = torch.tensor([0.0, 1e-12, 0.3, 0.5, 0.9, 1.0]).double()
    expected = 5e6 + 2 * torch.special.ndtri(shares)
    assert torch.allclose(m.icdf(shares)[:, 0], expected, rtol=1e-12)
    assert m.icdf([0.0, 1.0]).tolist() == [[-math.inf], [math.inf]]
    assert m.quantile(0.3).shape == ()
    assert torch.equal(m.quantile(shares[1:5]), m.icdf(shares[1:5])[:, 0])


def test_icdf_of_batches():
    m = batch_of("diag", (2, 3), D=1)
    q = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = m.icdf(q)
    assert places.shape == (5, 2, 3, 1)
    assert torch.allclose(m.cdf(places), q, rtol=1e-12)
    one = gk.Mixture(m.logits[1, 2], m.means[1, 2], gk.DiagonalFactor(m.factor.U[1, 2].log()))
    assert torch.allclose(one.icdf(q[:, 1, 2]), places[:, 1, 2])
    assert torch.equal(m.icdf(0.25)[0, 1], m.icdf(torch.full((2, 3), 0.25).double())[0, 1])
    assert m.to(torch.float32).icdf(q.float()).dtype == torch.float32


def test_gradients_of_icdf():
    logits = torch.tensor([0.1, -0.4, 0.7]).double().requires_grad_()
    means = torch.tensor([[-1.0], [0.5], [2.0]]).double().requires_grad_()
    log_diagonal = torch.tensor([[0.3], [-0.2], [0.8]]).double().requires_grad_()
    q = torch.tensor([1e-3, 0.4, 0.9]).double().requires_grad_()

    def places(q, logits, means, log_diagonal):
        return gk.Mixture(logits, means, gk.DiagonalFactor(log_diagonal)).icdf(q)

    assert torch.autograd.gradcheck(places, (q, logits, means, log_diagonal), eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(
        places, (q[1:].detach().requires_grad_(), logits, means, log_diagonal), atol=1e-5
    )


def test_icdf_where_neighboring_numbers_are_far_apart():
    """The components are narrower than the spacing of float64 numbers, so that no number has the probability asked for."""
    # The last bit of each mean is set, so that rounding to even leaves it.
    means = torch.tensor([[1 + 2.0**-52], [2 + 2.0**-51]], dtype=torch.float64, requires_grad=True)
    variances = torch.tensor([1e-40, 1e-36], dtype=torch.float64)
    m = gk.Mixture.from_parameters([0.4, 0.6], means, variances, "spherical")
    places = m.icdf([0.1, 0.3, 0.4, 0.7, 0.9])
    assert torch.allclose(places[[0, 1, 3, 4]], means[[0, 0, 1, 1]], rtol=1e-15)
    assert bool(torch.isfinite(places).all())
    assert bool(torch.isfinite(torch.autograd.grad(places.sum(), means)[0]).all())


def test_icdf_refuses_in_one_sentence():
    with pytest.raises(ValueError, match="with one column, got 2 columns; use marginal"):
        random_mixture("full").icdf(0.5)
    for value in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            mixture_1d().icdf(value)
