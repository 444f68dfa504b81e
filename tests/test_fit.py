"""Fits: the tutorial step by step, invariances, and everything that can happen to a loop."""

from __future__ import annotations

import copy
import functools
import logging
import math
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, HAS_KEOPS, PEAK, random_mixture, spiral

import gmmkeops as gk
from gmmkeops.penalties.parameters import EigenvalueFloor
from gmmkeops.penalties.weights import SqrtWeights


def blobs(N=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    return centers[torch.randint(3, (N,), generator=generator)] + torch.randn(N, 2, generator=generator)


def tutorial_loss(x, mixture, strength):
    """The KeOps tutorial's own cost at our parameters: its log-likelihood lacks (D/2) log π."""
    from pykeops.torch import Vi, Vj

    A = mixture.factor.U.to(x.dtype)
    W = mixture.weights.to(x.dtype)[:, None]
    gamma = (A @ A.mT) / 2
    weights = W * torch.linalg.det(gamma).sqrt()[:, None]
    exponents = -Vi(x).weightedsqdist(Vj(mixture.means.to(x.dtype)), Vj(gamma.reshape(len(A), -1)))
    log_likelihood = exponents.logsumexp(dim=1, weight=Vj(weights)).mean()
    return float(-log_likelihood + strength * W.sqrt().mean())


@pytest.mark.keops
@pytest.mark.parametrize("backend", ["dense", "keops"])
@pytest.mark.skipif(not HAS_KEOPS, reason="pykeops is not installed")
def test_tutorial_step_by_step(backend):
    x, start = spiral()
    seen = []
    gk.fit(
        start,
        x,
        gk.Adam(lr=0.1),
        penalty=SqrtWeights(20),
        max_iter=20,
        backend=backend,
        callback=lambda step: seen.append((step.objective, step.mixture)),
    )
    assert torch.allclose(seen[0][1].factor.U, start.factor.U.double(), rtol=1e-6)
    for objective, mixture in seen:
        theirs = tutorial_loss(x, mixture, 20) + math.log(math.pi)
        assert abs(objective - theirs) <= 1e-4 * abs(theirs)


def test_tutorial_ends_with_a_handful():
    x, start = spiral()
    result = gk.fit(start, x, gk.Adam(lr=0.1), penalty=SqrtWeights(20), max_iter=501)
    assert result.n_iter == 501
    assert result.objective <= -0.38
    assert result.objective <= min(result.history["objective"]) + 1e-6
    assert int((result.mixture.weights > 0.01).sum()) <= 8
    assert 3 <= result.report.n_active_components <= 15
    assert len(result.report.pruned_components) == 30 - result.report.n_active_components
    assert result.mixture.n_components == 30
    assert bool(torch.isfinite(result.mixture.means).all())
    # The dead are out of the work, and what they still hold does not change what is reported.
    dense = -result.mixture.log_prob(x).double().mean() + SqrtWeights(20)(result.mixture)
    assert abs(float(dense) - result.objective) < 1e-5
    assert abs(float(result.mixture.log_prob(x).double().mean()) - result.log_likelihood) < 1e-5


def test_pruning_changes_nothing_but_the_work(monkeypatch):
    x, start = spiral(2000)
    runs = []
    for points in (1e-3, 1e-300):
        monkeypatch.setattr("gmmkeops.fitting.parameters.DEAD_POINTS", points)
        runs.append(gk.fit(start, x.double(), gk.Adam(lr=0.1), penalty=SqrtWeights(20), max_iter=300))
    assert runs[0].report.n_active_components < runs[1].report.n_active_components == 30
    # Without pruning the dying still pay for the root of what little weight they have left.
    assert -5e-3 < runs[0].objective - runs[1].objective < 1e-4


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


def test_minibatches_reach_the_full_batch():
    x = blobs(4000).double()
    start = gk.initialize(x, 3)
    whole = gk.fit(start, x, gk.Adam(lr=0.02), max_iter=300)

    def falling(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    parts = gk.fit(start, x, gk.Adam(lr=0.02, batch_size=500, scheduler=falling), max_iter=40)
    assert abs(parts.log_likelihood - whole.log_likelihood) < 2e-3
    # What is reported is the returned mixture over all points, not the running mean.
    assert abs(parts.log_likelihood - float(parts.mixture.log_prob(x).mean())) < 1e-10


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5),
    ],
    ids=["SGD", "AdamW", "LBFGS"],
)
def test_any_optimizer_also_when_components_die(optimizer):
    x, start = spiral(1000, 12)
    result = gk.fit(start, x, gk.Gradient(optimizer), penalty=SqrtWeights(20), max_iter=60)
    assert result.objective < result.history["objective"][0] - 1
    assert math.isfinite(result.objective)


def test_learning_rate_schedule_is_stepped_once_per_iteration():
    rates = []

    class Recorder:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.param_groups[0]["lr"] *= 0.5

    x = blobs(100)
    gk.fit(gk.initialize(x, 2), x, gk.Adam(lr=1.0, scheduler=Recorder, batch_size=30), max_iter=3)
    assert rates == [1.0, 0.5, 0.25]


def independent_objective(tensors, x, weights, penalty):
    """The objective of a fit, written with torch.distributions alone, from raw parameters."""
    logits, means = tensors["logits"], tensors["means"]
    (K, D), diagonal = means.shape, tensors["log_diagonal"].exp()
    if "upper" in tensors:
        U = torch.diag_embed(diagonal)
        row, column = torch.triu_indices(D, D, 1)
        U[:, row, column] = tensors["upper"]
    else:
        U = torch.diag_embed(diagonal.expand(-1, D))
    precision = (U @ U.mT).expand(K, D, D)
    components = torch.distributions.MultivariateNormal(means, precision_matrix=precision)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), components)
    value = -(weights @ mixture.log_prob(x)) / weights.sum()
    return value + penalty(logits.log_softmax(0).exp(), means, precision)


@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_step_follows_the_objective(family, penalized):
    """One step of plain gradient descent of size h moves the parameters by -h times the finite differences.

    The columns have standard deviations near one, so that standardized coordinates have the scale of the data.
    """
    D, K, h = 3, 4, 1e-4
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, D, generator=generator, dtype=torch.float64)
    x = 1.05 * (x - x.mean(0)) / x.std(0)
    weights = 0.5 + torch.rand(60, generator=generator, dtype=torch.float64)
    start = random_mixture(family, K=K, D=D, seed=1, condition=5.0)
    tensors = {"logits": start.logits, "means": 0.5 * start.means, **start.factor.tensors}
    start = gk.Mixture(tensors["logits"], tensors["means"], start.factor)

    def ours(mixture):
        precisions = mixture.factor.precisions().expand(K, D, D)
        return 0.3 * mixture.weights.square().sum() + 0.1 * mixture.means.sum() + 0.02 * precisions.square().sum()

    def theirs(W, means, precisions):
        if not penalized:
            return torch.zeros((), dtype=torch.float64)
        return 0.3 * W.square().sum() + 0.1 * means.sum() + 0.02 * precisions.square().sum()

    method = gk.Gradient(lambda parameters: torch.optim.SGD(parameters, lr=h))
    result = gk.fit(start, x, method, sample_weight=weights, penalty=ours if penalized else None, max_iter=1)
    found = {"logits": result.mixture.logits, "means": result.mixture.means, **result.mixture.factor.tensors}
    for name, before in tensors.items():
        step = torch.zeros_like(before)
        for i in range(before.numel()):
            values = []
            for sign in (1, -1):
                moved = {key: value.clone() for key, value in tensors.items()}
                moved[name].view(-1)[i] += sign * 1e-5
                values.append(float(independent_objective(moved, x, weights, theirs)))
            step.view(-1)[i] = -h * (values[0] - values[1]) / 2e-5
        change = found[name] - before
        if name == "logits":  # defined up to a constant
            change, step = change - change.mean(), step - step.mean()
        assert float((change - step).abs().max()) < 1e-5 * float(step.abs().max()) + 1e-12, name


def test_module_is_trained_in_place():
    x = blobs()
    model = gk.GMM(2, n_components=3).initialize(x, "random")
    before = float(model().log_prob(x).detach().mean())
    result = gk.fit(model, x, gk.Adam(lr=0.02), max_iter=50)
    after = float(model().log_prob(x).detach().mean())
    assert after > before
    assert abs(after - result.log_likelihood) < 1e-5
    assert all(p.requires_grad for p in model.parameters())


def test_callbacks_see_and_stop():
    x = blobs()
    seen = []

    def watch(step):
        seen.append(step.iteration)
        expected = -step.mixture.log_prob(x.double()).mean()
        assert abs(float(expected) - step.objective) < 1e-5
        return step.iteration == 4

    result = gk.fit(gk.initialize(x, 3), x, gk.Adam(), callback=[watch], max_iter=50)
    assert seen == [0, 1, 2, 3, 4]
    assert result.n_iter == 5


def test_interrupt_returns_the_best_so_far(caplog):
    x = blobs()

    def interrupt(step):
        if step.iteration == 3:
            raise KeyboardInterrupt

    with caplog.at_level(logging.INFO, logger="gmmkeops"):
        result = gk.fit(gk.initialize(x, 3), x, gk.Adam(), callback=interrupt, max_iter=50)
    assert result.report.interrupted
    assert result.objective == min(result.history["objective"])
    assert "interrupted after 4 iterations" in caplog.text


def test_tolerance():
    x = blobs()
    start = gk.initialize(x, 3)
    result = gk.fit(start, x, gk.Adam(lr=0.02), tol=1e-3, max_iter=1000)
    assert result.converged
    assert result.n_iter < 1000
    with pytest.warns(gk.ConvergenceWarning, match="did not converge to tol=1e-09 within 5 iterations"):
        assert not gk.fit(start, x, gk.Adam(lr=0.02), tol=1e-9, max_iter=5).converged


def test_divergence_returns_the_best_with_a_warning():
    x = blobs()
    with pytest.warns(gk.ConvergenceWarning, match="became infinite or NaN"):
        result = gk.fit(gk.initialize(x, 3), x, gk.Gradient(lambda p: torch.optim.SGD(p, lr=1e300)), max_iter=20)
    assert math.isfinite(result.objective)
    assert bool(torch.isfinite(result.mixture.means).all())


def test_components_do_not_collapse_onto_a_point():
    """One sits on 50 equal points, where its likelihood has no bound."""
    x = torch.cat([blobs(200), torch.full((50, 2), 20.0)])
    start = gk.Mixture.from_parameters([0.8, 0.2], [[2.0, 2.0], [20.0, 20.0]], [[9.0, 9.0], [1e-33, 1.0]], "diag")
    result = gk.fit(start, x, gk.Adam(lr=1e-3), max_iter=3)
    assert math.isfinite(result.objective)
    assert result.report.regularized_components == (1,)
    variance = float(result.mixture.factor.covariances()[1, 0, 0])
    # In units of a power of two near the column's deviation.
    assert 0.4e-28 < variance / float(x[:, 0].var()) < 2.5e-28


def test_bounds_hold_after_every_step():
    x = blobs()
    least = []
    result = gk.fit(
        gk.initialize(x, 5),
        x,
        gk.Adam(lr=0.2),
        penalty=EigenvalueFloor(0.8),
        max_iter=30,
        callback=lambda step: least.append(float(torch.linalg.eigvalsh(step.mixture.factor.covariances()).min())),
    )
    assert min(least) >= 0.8 * (1 - 1e-9)
    assert result.report.regularized_components


def test_no_iterations_look_at_the_start():
    x = blobs().double()
    start = gk.initialize(x, 3)
    for method in (gk.Adam(), gk.EM()):
        result = gk.fit(start, x, method, max_iter=0)
        assert result.n_iter == 0
        assert torch.allclose(result.mixture.means, start.means)
        assert abs(result.log_likelihood - float(start.log_prob(x).mean())) < 1e-12


def test_any_callable_is_a_penalty():
    x = blobs().double()
    start = gk.initialize(x, 2)
    pulled = gk.fit(start, x, gk.Adam(lr=0.05), penalty=lambda m: 1e3 * m.means.square().sum(), max_iter=200)
    assert float(pulled.mixture.means.abs().max()) < 0.1


def test_coarse_input_is_called_coarse():
    x = blobs() + 5.4e6
    with pytest.warns(gk.PrecisionWarning, match=r"x is float32 with values near 5\.4e\+06 in column 0"):
        gk.fit(gk.initialize(x, 2), x, gk.Adam(), max_iter=1)


def test_progress_bar(capsys):
    x = blobs()
    gk.fit(gk.initialize(x, 2), x, gk.Adam(), max_iter=3, verbose=True)
    shown = capsys.readouterr().err
    assert "objective=" in shown
    assert "active=2" in shown
    assert "3/3" in shown
    gk.fit(gk.initialize(x, 2), x, gk.Adam(), max_iter=3)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


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


def test_memory_of_a_gradient_does_not_see_points_times_components():
    """10⁶ x 1000 exponents would be 4 GB in float32; the peak above imports and data stays under 700 MB."""
    code = f"""{PEAK}
import torch, gmmkeops as gk
import torch._dynamo
before = peak()
x = torch.rand(1_000_000, 3)
means = torch.rand(1000, 3, requires_grad=True)
U = (10 * torch.eye(3)).expand(1000, 3, 3).clone().requires_grad_()
(gk.reductions.logsumexp(x, torch.zeros(1000), means, U).mean()).backward()
assert means.grad.abs().max() > 0
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 700
