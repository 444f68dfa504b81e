"""``fit``: units, weights, penalties, modules, and what it refuses."""

from __future__ import annotations

import copy
import functools
import math
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, blobs, random_mixture

import gmmkeops as gk
from gmmkeops.penalties.weights import SqrtWeights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_change_nothing(family, dtype):
    """Map coordinates, and micrometres: same steps in the frame, same mixture but for the units."""
    x = blobs().double()
    start = random_mixture(family, K=3, condition=2.0)
    method, penalty = gk.Adam(lr=0.05), SqrtWeights(0.5)
    plain = gk.fit(start, x.to(dtype), method, penalty=penalty, max_iter=30)
    for scale, shift in ((1.0, 5e6), (2.0**-20, 0.0), (1024.0, -3e7)):
        moved = gk.Mixture(
            start.logits, start.means * scale + shift, start.factor.rescale(torch.full((2,), 1 / scale).double())
        )
        result = gk.fit(moved, x * scale + shift, method, penalty=penalty, max_iter=30)
        tolerance = 1e-6 if dtype == torch.float64 else 2e-3
        assert torch.allclose((result.mixture.means - shift) / scale, plain.mixture.means, atol=tolerance)
        assert torch.allclose(
            result.mixture.factor.covariances() / scale**2, plain.mixture.factor.covariances(), atol=tolerance
        )
        assert abs(result.objective - 2 * math.log(scale) - plain.objective) < tolerance


def test_objective_is_in_the_users_units():
    x = blobs().double() * 40 + 7
    start = gk.initialize(x, 3)
    penalty = gk.penalties.PrecisionRidge(3.0) + gk.penalties.NormalInverseWishart(x.mean(0), 1.0, 400.0, 5.0)
    result = gk.fit(start, x, gk.Adam(lr=0.02), penalty=penalty, max_iter=5)
    expected = -start.log_prob(x).mean() + penalty(start, len(x))
    assert abs(result.history["objective"][0] - float(expected)) < 1e-10
    again = -result.mixture.log_prob(x).mean() + penalty(result.mixture, len(x))
    assert abs(result.objective - float(again)) < 1e-9


def test_em_fixed_point_has_zero_gradient():
    x = blobs().double()
    mixture = gk.initialize(x, 3)
    for _ in range(300):
        sums = gk.reductions.moments(x, mixture.offsets, mixture.means, mixture.factor)
        mixture = gk.Mixture(sums.S0.log(), sums.means, gk.FullFactor.from_covariances(sums.scatters))
    leaves = [t.clone().requires_grad_() for t in (mixture.logits, mixture.means, *mixture.factor.tensors.values())]
    loss = -gk.Mixture(leaves[0], leaves[1], gk.FullFactor(*leaves[2:])).log_prob(x).mean()
    assert all(float(g.abs().max()) < 1e-9 for g in torch.autograd.grad(loss, leaves))
    result = gk.fit(mixture, x, gk.Adam(lr=1e-3), max_iter=3)
    assert abs(result.history["objective"][0] - loss.item()) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_repetition(family):
    x = blobs(200).double()
    counts = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    start = random_mixture(family, K=3, condition=2.0)
    method, penalty = gk.Adam(lr=0.05), gk.penalties.Dirichlet(3.0)
    a = gk.fit(start, x, method, penalty=penalty, sample_weight=counts, max_iter=20)
    b = gk.fit(start, x.repeat_interleave(counts, 0), method, penalty=penalty, max_iter=20)
    assert abs(a.objective - b.objective) < 1e-10
    assert torch.allclose(a.mixture.means, b.mixture.means, atol=1e-9)


def test_same_seed_same_bits_and_no_global_state():
    x = blobs(5000)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    start = gk.initialize(x, 4)
    runs = [gk.fit(start, x, gk.Adam(lr=0.05, batch_size=700), max_iter=4) for _ in range(2)]
    assert torch.equal(runs[0].mixture.means, runs[1].mixture.means)
    assert runs[0].history["objective"] == runs[1].history["objective"]
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    other = gk.fit(start, x, gk.Adam(lr=0.05, batch_size=700), max_iter=4, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(other.mixture.means, runs[0].mixture.means)


def test_module_is_trained_in_place():
    x = blobs()
    model = gk.GMM(2, n_components=3).initialize(x, "random")
    before = float(model().log_prob(x).detach().mean())
    result = gk.fit(model, x, gk.Adam(lr=0.02), max_iter=50)
    after = float(model().log_prob(x).detach().mean())
    assert after > before
    assert abs(after - result.log_likelihood) < 1e-5
    assert all(p.requires_grad for p in model.parameters())


def test_any_callable_is_a_penalty():
    x = blobs().double()
    start = gk.initialize(x, 2)
    pulled = gk.fit(start, x, gk.Adam(lr=0.05), penalty=lambda m: 1e3 * m.means.square().sum(), max_iter=200)
    assert float(pulled.mixture.means.abs().max()) < 0.1


def test_coarse_input_is_called_coarse():
    x = blobs() + 5.4e6
    with pytest.warns(gk.PrecisionWarning, match=r"x is float32 with values near 5\.4e\+06 in column 0"):
        gk.fit(gk.initialize(x, 2), x, gk.Adam(), max_iter=1)


@functools.cache
def few():
    return blobs(20)


@functools.cache
def begun():
    return random_mixture("full", K=3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: gk.fit(begun(), few(), "adam"),
            TypeError,
            r"method must be a Method such as gmmkeops.Adam\(lr=0.05\), got str",
        ),
        (
            lambda: gk.fit("start", few(), gk.Adam()),
            TypeError,
            "start must be a Mixture, a GMM or a number of components, got str",
        ),
        (
            lambda: gk.fit(begun().expand((2,)), few(), gk.Adam()),
            ValueError,
            "start must be one mixture, got a batch",
        ),
        (lambda: gk.fit(gk.GMM(2, context=1), few(), gk.Adam()), ValueError, "x has 2 columns, expected 3"),
        (lambda: gk.fit(begun(), few()[:2], gk.Adam()), ValueError, "x has 2 rows, expected at least 3"),
        (lambda: gk.fit(begun(), few()[:0], gk.Adam()), ValueError, "x has no rows, expected at least 3"),
        (lambda: gk.fit(begun(), torch.zeros(9, 5), gk.Adam()), ValueError, "x has 5 columns, expected 2"),
        (
            lambda: gk.fit(begun(), few() * math.nan, gk.Adam()),
            ValueError,
            "x must be finite, got NaN at row 0, column 0",
        ),
        (lambda: gk.fit(begun(), few() + 0j, gk.Adam()), TypeError, "x must be real, got complex"),
        (lambda: gk.fit(begun(), [["a", "b"]] * 9, gk.Adam()), TypeError, "x must be numeric"),
        (
            lambda: gk.fit(begun(), few(), gk.Adam(), sample_weight=-torch.ones(20)),
            ValueError,
            "sample_weight must not be negative, got -1.0 at row 0",
        ),
        (
            lambda: gk.fit(begun(), few(), gk.Adam(), sample_weight=torch.zeros(20)),
            ValueError,
            "sample_weight must not all be zero",
        ),
        (
            lambda: gk.fit(begun(), few(), gk.Adam(), sample_weight=[1.0]),
            ValueError,
            r"sample_weight must have shape \(20,\)",
        ),
        (
            lambda: gk.fit(begun(), few(), gk.Adam(), penalty=3),
            TypeError,
            "penalty must be a Penalty or a function",
        ),
        (
            lambda: gk.fit(begun(), few(), gk.Adam(), penalty=lambda m: m.means.sum() * math.nan),
            ValueError,
            "not finite at the initial mixture",
        ),
        (
            lambda: gk.fit(begun(), few(), gk.Adam(), max_iter=-1),
            ValueError,
            "max_iter must not be negative",
        ),
        (lambda: gk.fit(begun(), few(), gk.Adam(), tol=-1), ValueError, "tol must not be negative"),
        (lambda: gk.fit(begun(), few(), gk.Adam(), backend="cuda"), ValueError, "backend must be one of"),
        (
            lambda: gk.fit(begun().to(device="meta"), few(), gk.Adam()),
            ValueError,
            "x is on cpu but start on meta",
        ),
        (lambda: gk.Adam(lr=0), ValueError, "lr must be positive, got 0"),
        (lambda: gk.Adam(batch_size=0), ValueError, "batch_size must be at least 1"),
        (lambda: gk.Gradient(0.1), TypeError, "optimizer must be a function of a list of tensors, got float"),
    ],
)
def test_bad_input_gets_one_sentence(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_refused_fit_leaves_the_module_as_it_was():
    model = gk.GMM(2, n_components=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="finite"):
        gk.fit(model, few() * math.inf, gk.Adam())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_first_fit_compiles_nothing():
    code = """
import sys, torch, gmmkeops as gk
x = torch.randn(10_000, 3)
gk.fit(gk.initialize(x, 8), x, gk.Adam())
print("pykeops" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
