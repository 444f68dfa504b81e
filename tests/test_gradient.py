"""Gradient methods: the KeOps tutorial step by step, finite differences, optimizers, minibatches, pruning, and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import FAMILIES, HAS_KEOPS, blobs, random_mixture, spiral

import gmmkeops as gk
from gmmkeops.components import factor_class
from gmmkeops.fitting.parameters import MixtureParameters
from gmmkeops.fitting.preparation import prepared
from gmmkeops.penalties.parameters import EigenvalueFloor
from gmmkeops.penalties.weights import SqrtWeights


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


def test_minibatches_reach_the_full_batch():
    x = blobs(4000).double()
    start = gk.initialize(x, 3)
    whole = gk.fit(start, x, gk.Adam(lr=0.02), max_iter=300)

    def falling(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    parts = gk.fit(start, x, gk.Adam(lr=0.02, batch_size=500, scheduler=falling), max_iter=40)
    assert abs(parts.log_likelihood - whole.log_likelihood) < 2e-3
    # The reported value is that of the returned mixture over all points, not the running mean.
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


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
def test_steps_bound_covariances_and_find_divergence(family):
    x = blobs().double()
    kind, tied = factor_class(family)
    eye = kind.compact(torch.eye(2).double()).expand(1 if tied else 3, *kind.spread_shape(2))
    mixture = gk.Mixture(torch.zeros(3).double(), x[:3], kind.from_covariances(eye, features=2))
    objective = prepared(x, None, None, "dense", None, isotropic=False)

    def stepped(**changes):
        parameters = MixtureParameters.of(objective, mixture)
        loss = parameters.loss(objective, None, natural=False, moved=False)
        with torch.no_grad():
            for name, (index, value) in changes.items():
                parameters.leaves[name].view(-1)[index] = value
        return parameters, *parameters.settled(objective, loss)

    parameters, is_sound, (value, likelihood) = stepped()
    assert is_sound
    assert value == -likelihood == float(objective.negative_log_likelihood(mixture))
    assert not parameters.floored.any()
    # Scales are bounded by the square root of 1e28.
    for log in (32.2, 32.3):
        parameters, is_sound, _ = stepped(log_diagonal=(0, log))
        assert is_sound
        assert bool(parameters.floored.any()) == (log == 32.3)
        largest = parameters.leaves["log_diagonal"].max().item()
        assert largest == pytest.approx(min(log, 14 * math.log(10)), rel=1e-9)
        value = float(parameters.loss(objective, None, natural=False, moved=False)[0])
        assert value == float(objective.negative_log_likelihood(parameters.mixture()))
    for name, value in (("log_diagonal", 301.0), ("log_diagonal", -301.0), ("means", -2e15), ("logits", math.nan)):
        assert not stepped(**{name: (1 if name != "log_diagonal" else 0, value)})[1]


class Ascending(torch.optim.Optimizer):
    """Gradient descent that replaces the data of its tensors, and moves them before it evaluates the gradient."""

    def __init__(self, params, lr=0.5, ahead=0.1):
        super().__init__(params, {"lr": lr, "ahead": ahead})

    def step(self, closure):
        group = self.param_groups[0]
        before = [p.data.clone() for p in group["params"]]
        for p in group["params"]:
            if p.grad is not None:
                p.data = p.data + group["ahead"] * p.grad
        loss = closure()
        for p, data in zip(group["params"], before, strict=True):
            p.data = data - group["lr"] * p.grad
        return loss


def test_optimizers_may_replace_and_move_the_parameters():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 2)))
    x[:100] += 4
    start = gk.initialize(x, 2, "random", generator=0)
    seen = []
    settings = {"max_iter": 25, "tol": 0, "callback": lambda step: seen.append(step.mixture.means.clone())}
    result = gk.fit(start, x, gk.Gradient(Ascending), **settings)
    plain = gk.fit(start, x, gk.Gradient(lambda tensors: torch.optim.SGD(tensors, lr=0.5)), max_iter=25, tol=0)
    assert float((seen[-1] - seen[0]).abs().max()) > 0.5 * float((plain.mixture.means - start.means).abs().max())
    assert -float(result.mixture.log_prob(x).mean()) == pytest.approx(result.objective, abs=1e-9)
    assert result.objective < -float(start.log_prob(x).mean())
