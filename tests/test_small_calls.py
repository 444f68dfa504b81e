"""Parameters that mixtures keep between calls never go stale, and passes over the data are not repeated."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.models.kept import KEPT
from gmmkeops.reductions.choice import ENGINES
from gmmkeops.reductions.dispatch import compute
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import LogSumExp, Statistics

native = pytest.mark.skipif(
    reductions.native_unavailable() is not None, reason="the native engine has not been compiled"
)

TYPES = ("full", "tied", "diag", "spherical")


def mixture(covariance_type="full", dtype=torch.float64):
    """A mixture of 3 components in 2 columns with different weights, scales and correlations."""
    g = torch.Generator().manual_seed(3)
    kind, tied = gk.components.factor_class(covariance_type)
    shapes = kind.shapes(1 if tied else 3, 2)
    tensors = {name: 0.4 * torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}
    return gk.Mixture(
        torch.tensor([0.1, -0.5, 0.7]).to(dtype), torch.randn(3, 2, generator=g, dtype=dtype), kind.of(tensors, 2)
    )


def points(rows=40, dtype=torch.float64):
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(4), dtype=dtype)


def results(m, x):
    return m.log_prob(x), m.responsibilities(x), m.predict(x), m.log_joint(x)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def rebuilt(m):
    """A mixture with copies of the parameters, which has kept nothing."""
    tensors = {name: tensor.detach().clone() for name, tensor in m.factor.tensors.items()}
    return gk.Mixture(m.logits.detach().clone(), m.means.detach().clone(), m.factor.replace(**tensors))


def by_torch(tensor):
    tensor[0] += 0.5


def by_data(tensor):
    # Torch does not count this change.
    tensor.data[0] -= 0.25


def by_numpy(tensor):
    tensor.numpy()[...] *= 1.5


@pytest.mark.parametrize("change", [by_torch, by_data, by_numpy])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_changes_in_place_are_seen(covariance_type, change):
    m, x = mixture(covariance_type), points()
    for tensor in (m.logits, m.means, *m.factor.tensors.values()):
        before = results(m, x)
        assert KEPT in vars(m)
        change(tensor)
        found = results(m, x)
        assert same(found, results(rebuilt(m), x))
        assert not torch.equal(found[0], before[0])


@pytest.mark.parametrize("part", ["logits", "means", "factor"])
def test_replaced_attributes_are_seen(part):
    m, x, other = mixture(), points(), mixture()
    results(m, x)
    other.means += 1
    other.logits[0] += 1
    setattr(m, part, getattr(other, part) if part != "factor" else m.factor.scaled(torch.full((1,), 1.5).double()))
    assert same(results(m, x), results(rebuilt(m), x))


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(copy.copy, id="copy"),
        pytest.param(lambda m: pickle.loads(pickle.dumps(m)), id="pickle"),
        pytest.param(lambda m: m.to(torch.float64), id="to"),
        pytest.param(lambda m: m.detach(), id="detach"),
    ],
)
def test_copies_keep_nothing(copied):
    m, x = mixture(), points()
    size, expected = len(pickle.dumps(m)), results(m, x)
    assert len(pickle.dumps(m)) == size
    twin = copied(m)
    assert KEPT not in vars(twin)
    assert same(results(twin, x), expected)
    twin.means.mul_(2)
    assert same(results(twin, x), results(rebuilt(twin), x))
    assert same(results(m, x), results(rebuilt(m), x))


def test_other_dtypes():
    m, x = mixture(), points()
    expected = results(m, x)
    single = m.to(torch.float32)
    assert same(results(single, x), results(rebuilt(single), x))
    assert torch.allclose(single.log_prob(x), expected[0], atol=1e-5)
    assert same(results(m.to(torch.float32).to(torch.float64), x), results(rebuilt(single.to(torch.float64)), x))


def test_a_module_after_its_state_was_loaded():
    torch.manual_seed(0)
    model, other, x = gk.GMM(2, n_components=3), gk.GMM(2, n_components=3), points(dtype=torch.float32)
    with torch.no_grad():
        m = model()
        before = results(m, x)
        model.load_state_dict(other.state_dict())
        # The means of the mixture are those of the module.
        assert same(results(m, x), results(rebuilt(m), x))
        assert not torch.equal(m.log_prob(x), before[0])
        assert same(results(model(), x), results(other(), x))


def test_gradients_after_values_without_gradients():
    m, x = mixture(), points()
    with torch.no_grad():
        m.log_prob(x)
    fresh, parts = rebuilt(m), []
    for one in (m, fresh):
        leaves = [t.requires_grad_() for t in (one.logits, one.means, *one.factor.tensors.values())]
        parts.append(torch.autograd.grad(one.log_prob(x).sum(), leaves))
    assert same(*parts)
    assert all(float(part.abs().sum()) > 0 for part in parts[0])


def test_points_with_gradients_after_inference_mode():
    with torch.inference_mode():
        m = mixture()
        m.log_prob(points())
    x = points().requires_grad_()
    (slope,) = torch.autograd.grad(m.log_prob(x).sum(), x)
    assert torch.allclose(slope, torch.autograd.grad(torch.logsumexp(m.log_joint(x), -1).sum(), x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_derivatives_after_values():
    m, x = mixture(), points()
    with torch.no_grad():
        m.log_prob(x)
    _, slopes = torch.func.jvp(m.log_prob, (x,), (torch.ones_like(x),))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = m.log_prob(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert torch.allclose(found, slopes)
    assert float(slopes.abs().sum()) > 0


@pytest.mark.parametrize("covariance_type", TYPES)
def test_an_estimator_sees_changed_attributes(covariance_type):
    X = np.random.default_rng(0).normal(size=(200, 2)) + np.repeat([[0.0], [6.0]], 100, 0)
    gm = gk.GaussianMixture(2, covariance_type=covariance_type, random_state=0).fit(X)
    before = gm.score(X)
    gm.means_[0] += 1  # shares its memory with the mixture
    assert gm.score(X) == gk.GaussianMixture.from_mixture(rebuilt(gm.mixture_)).score(X) != before
    twin = pickle.loads(pickle.dumps(copy.deepcopy(gm)))
    assert twin.score(X) == gm.score(X)


def test_large_factors_are_not_kept():
    m = gk.Mixture(torch.zeros(200), torch.randn(200, 80), gk.FullFactor(torch.zeros(200, 80)))
    m.predict(torch.zeros(3, 80))
    assert KEPT not in vars(m)


@pytest.fixture
def calls(monkeypatch):
    """The requests that the compiled library evaluates."""
    engine = reductions.native.engine
    found, call = [], engine._call
    # The first evaluation of a kind would be compared with the dense engine.
    monkeypatch.setattr(reductions.native.native._comparison, "once", lambda *arguments: None)

    def counted(evaluation, *arguments):
        found.append(type(evaluation.request).__name__)
        return call(evaluation, *arguments)

    monkeypatch.setattr(engine, "_call", counted)
    return found


@native
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_passes_of_a_training_step(calls, covariance_type, weighted):
    model, x = gk.GMM(2, n_components=3, covariance_type=covariance_type), points(dtype=torch.float32)
    logs = model().log_prob(x)
    (logs @ torch.linspace(1, 2, len(x)) if weighted else -logs.mean()).backward()
    # Gradients of a weighted sum need a pass with these weights.
    assert calls == ["Statistics"] * (2 if weighted else 1)
    with torch.no_grad():
        model().log_prob(x)
    assert calls[-1] == "LogSumExp"


@native
def test_a_gradient_iteration_is_one_pass(calls):
    x = torch.cat([points(150, torch.float32), points(150, torch.float32) + 5])
    start = gk.initialize(x, 3)
    calls.clear()
    result = gk.fit(start, x, gk.Adam(), max_iter=7)
    # The last pass evaluates the final parameters.
    assert result.n_iter == 7
    assert calls == ["Statistics"] * 8


@native
@pytest.mark.parametrize("scale", [1.0, -2.5, 0.0])
@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_gradients_of_one_pass(covariance_type, scale):
    m, x = mixture(covariance_type), points()
    leaves = [t.requires_grad_() for t in (m.logits, m.means, *m.factor.tensors.values())]
    covariances = MultivariateNormal(m.means, m.factor.covariances())
    oracle = MixtureSameFamily(Categorical(logits=m.logits), covariances)
    for weights in (scale * torch.ones(len(x)).double(), scale * torch.linspace(1, 2, len(x)).double()):
        found = torch.autograd.grad(m.log_prob(x) @ weights, leaves)
        expected = torch.autograd.grad(oracle.log_prob(x) @ weights, leaves, retain_graph=True)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found, expected, strict=True))


@native
def test_second_derivatives_of_one_pass():
    m, x = mixture(), points()

    def mean(logs, means):
        return (3 * gk.Mixture(logs, means, m.factor).log_prob(x)).mean()

    def oracle(logs, means):
        components = MultivariateNormal(means, m.factor.covariances())
        return (3 * MixtureSameFamily(Categorical(logits=logs), components).log_prob(x)).mean()

    found, expected = (torch.autograd.functional.hessian(f, (m.logits, m.means)) for f in (mean, oracle))
    assert all(
        torch.allclose(a, b, atol=1e-9)
        for own, other in zip(found, expected, strict=True)
        for a, b in zip(own, other, strict=True)
    )


def test_one_pass_includes_rows_that_float32_cannot_evaluate():
    x = points(dtype=torch.float32)
    x[3], x[7] = 3e15, -2e12
    m = mixture(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (m.logits, m.means, *m.factor.tensors.values())]
    arguments = (m.offsets, m.means, m.factor)
    one, wide = (reductions.logsumexp(rows, *arguments) for rows in (x, x.double()))
    assert torch.allclose(one.double(), wide, rtol=1e-5)
    parts = [torch.autograd.grad(values.sum(), leaves, retain_graph=True) for values in (one, wide)]
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*parts, strict=True))


# The interpreter of Triton takes milliseconds for each point; tests/test_triton.py has this comparison for fewer of them.
COMPILED = [name for name in ENGINES if name != "triton" and ENGINES[name].unavailable(torch.device("cpu")) is None]


@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_with_moments(engine, covariance_type, dtype):
    m, x = mixture(covariance_type), points(700, dtype)
    x[5] = 1e6
    problem = Exponents.of(x, m.offsets, m.means, m.factor)
    (values,) = compute(problem, None, LogSumExp(), engine)
    *sums, found = compute(problem, None, Statistics(values=True), engine)
    assert found.dtype == dtype
    assert torch.allclose(found, values, rtol=1e-6)
    assert math.isclose(float(sums[3]), float(values.double().sum()), rel_tol=1e-6)


def test_center_of_means_near_and_far_from_the_origin():
    g = torch.Generator().manual_seed(0)
    for trial in range(300):
        K, D = 1 + trial % 7, (1, 3, 70)[trial % 3]
        spread = 10 ** (2 * torch.rand(D, generator=g, dtype=torch.float64))
        means = torch.randn(K, D, generator=g, dtype=torch.float64) * spread
        means += (trial % 5) * 4 * torch.randn(D, generator=g, dtype=torch.float64) * spread
        problem = Exponents.of(torch.zeros(1, D).double(), torch.zeros(K), means, torch.ones(K, D))
        middle = means.sort(0).values[(K - 1) // 2]
        near = middle.abs() <= 8 * (means - middle).abs().amax(0)
        assert torch.equal(problem.center, middle.masked_fill(near, 0.0))
        assert torch.equal(problem.means, means - problem.center)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("D", [2, 70])
def test_parameters_that_are_not_finite_are_reported(D, bad):
    means, factor = torch.zeros(3, D), torch.ones(3, D)
    means[1, 1] = bad
    with pytest.raises(ValueError, match=r"means must be finite, got (NaN|inf) at component 1, column 1"):
        reductions.argmax(torch.zeros(1, D), torch.zeros(3), means, factor)
    factor[2, 0] = bad
    with pytest.raises(ValueError, match=r"factor must be finite, got (NaN|inf) at component 2, column 0"):
        reductions.argmax(torch.zeros(1, D), torch.zeros(3), torch.zeros(3, D), factor)
    with pytest.raises(ValueError, match="offsets must not be NaN"):
        reductions.argmax(torch.zeros(1, D), torch.tensor([0.0, math.nan, 1.0]), torch.zeros(3, D), torch.ones(3, D))


def test_points_are_validated_whatever_torch_is_told():
    X = np.random.default_rng(0).normal(size=(100, 2))
    gm = gk.GaussianMixture(2, random_state=0).fit(X)
    X[7, 1] = np.nan
    before = torch.distributions.Distribution._validate_args
    try:
        for validate in (True, False):
            torch.distributions.Distribution.set_default_validate_args(validate)
            for method in (gm.predict, gm.predict_proba, gm.score_samples, gm.score):
                with pytest.raises(ValueError, match="X must be finite, got NaN at row 7, column 1"):
                    method(X)
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
