"""Mixtures with a context: Zuko's grid, the network carried between units, fits, and bounded memory."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PEAK

import gmmkeops as gk

ZUKO = [(family, tied) for family in ("full", "diagonal", "spherical") for tied in (False, True)]


def branches(N=3000, seed=0):
    """A target with two values for each context, in units far from one: contexts near 1000, targets near 50 +- 100."""
    generator = torch.Generator().manual_seed(seed)
    c = 1000 + 20 * torch.rand(N, 1, generator=generator)
    side = torch.where(torch.rand(N, 1, generator=generator) < 0.5, 1.0, -1.0)
    y = 50 + 100 * side * torch.sin((c - 1000) / 3) + 5 * torch.randn(N, 1, generator=generator)
    return c, y


def conditional(family="full", tied=False, D=3, C=2, K=4, **options):
    torch.manual_seed(0)
    return gk.GMM(D, context=C, n_components=K, covariance_type=family, tied=tied, **options).double()


@pytest.mark.parametrize(("family", "tied"), ZUKO)
@pytest.mark.parametrize("strategy", ["random", "kmeans", "kmeans++"])
@pytest.mark.parametrize("context", [0, 5])
def test_zukos_grid(family, tied, strategy, context):
    """The same calls; and the density at the start is that of the clusters, whatever the context."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    labels = torch.randint(3, (2000,), generator=generator)
    x = centers[labels] + torch.randn(2000, 2, generator=generator) * torch.tensor([0.5, 1.0])
    torch.manual_seed(1)
    gmm = gk.GMM(features=2, context=context, n_components=3, covariance_type=family, tied=tied)
    gmm.initialize(x, strategy=strategy)
    c = torch.randn(2000, context)
    dist = gmm(c) if context else gmm()
    value = dist.log_prob(x)
    assert value.shape == (2000,)
    # k-means by its definition: shares, means and covariances of the clusters.
    hard = torch.cdist(x, centers).argmin(1)
    shares = torch.bincount(hard) / len(x)
    scatter = torch.stack([torch.cov(x[hard == k].T, correction=0) for k in range(3)])
    if tied:
        scatter = torch.einsum("k,kij->ij", shares, scatter).expand(3, 2, 2)
    if family != "full":
        scatter = torch.diag_embed(scatter.diagonal(dim1=1, dim2=2))
    if family == "spherical":
        scatter = scatter.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(2)
    means = torch.stack([x[hard == k].mean(0) for k in range(3)])
    baseline = gk.Mixture.from_parameters(shares, means, scatter).log_prob(x).mean()
    if strategy != "random":
        assert float(value.detach().mean()) >= float(baseline) - 1e-3
    (-value.mean()).backward()
    assert all(p.grad is not None for p in gmm.parameters())
    assert (gmm(c[:7]).sample((10,)) if context else gmm().sample((10, 7))).shape == (10, 7, 2)


@pytest.mark.parametrize(("family", "tied"), ZUKO)
@pytest.mark.parametrize("hidden", [(), (16,)])
def test_a_network_in_other_units_is_the_same_density(family, tied, hidden):
    model = conditional(family, tied, epsilon=1e-2, hidden_features=hidden)
    c, x = torch.randn(50, 2).double(), torch.randn(50, 3).double()
    shift = torch.tensor([1.0, 2, 3, 4, 5]).double()
    scale = torch.tensor([2.0, 2, 2, 0.5, 8] if family == "spherical" else [2.0, 0.5, 4, 0.5, 8]).double()
    other = model.rescaled(shift, scale)
    logs = other((c - shift[3:]) / scale[3:]).log_prob((x - shift[:3]) / scale[:3]) - scale[:3].log().sum()
    assert torch.allclose(logs, model(c).log_prob(x), atol=1e-12)
    back = other.rescaled(-shift / scale, 1 / scale)
    assert torch.allclose(back(c).log_prob(x), model(c).log_prob(x), atol=1e-12)


def test_a_batch_is_its_members():
    model = conditional()
    c, x = torch.randn(6, 2).double(), torch.randn(6, 3).double()
    batch = model(c)
    for i in range(6):
        one = model(c[i])
        assert torch.allclose(batch.log_prob(x)[i], one.log_prob(x[i]))
        assert torch.allclose(batch.mean[i], one.mean)
        assert torch.allclose(batch.covariance_matrix[i], one.covariance_matrix)
        assert torch.allclose(batch.log_joint(x).softmax(-1)[i], one.responsibilities(x[i]))
    draws = batch.sample((100_000,), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(draws.mean(0), batch.mean, atol=0.05)
    assert torch.allclose(draws.var(0), batch.variance, rtol=0.05)


@pytest.mark.parametrize("family", ["full", "diagonal", "spherical"])
def test_quantiles_invert_the_distribution_function(family):
    model = conditional(family, D=1)
    batch = model(torch.randn(5, 2).double())
    shares = torch.tensor([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6]).double()
    places = batch.quantile(shares)
    assert places.shape == (5, 5)
    assert torch.allclose(batch.cdf(places[..., None]), shares[:, None].expand(5, 5), rtol=1e-9)
    x = torch.randn(5, 1).double().requires_grad_()
    batch.cdf(x).sum().backward()
    assert torch.allclose(x.grad[:, 0], batch.log_prob(x).exp(), rtol=1e-9)
    with pytest.raises(ValueError, match="with one column"):
        conditional(family)(torch.randn(5, 2).double()).quantile(0.5)
    with pytest.raises(ValueError, match="greater than 0 and less than 1"):
        batch.quantile(1.0)


def test_a_density_network_beats_least_squares_on_two_branches():
    """Least squares sees the mean of both branches; the network sees them, in units far from one."""
    c, y = branches()
    held_c, held_y = branches(seed=1)
    torch.manual_seed(0)
    model = gk.GMM(1, context=1, n_components=3)
    model.initialize(y, context=c, generator=torch.Generator().manual_seed(0))
    result = gk.fit(
        model, y, gk.Adam(lr=1e-2, batch_size=256), context=c, max_iter=40, generator=torch.Generator().manual_seed(0)
    )
    assert result.answer(c).log_prob(y).mean().item() == pytest.approx(result.log_likelihood, abs=1e-4)
    assert model(c).log_prob(y).mean().item() == pytest.approx(result.log_likelihood, abs=1e-4)
    value = model(held_c).log_prob(held_y).mean().item()
    features = torch.cat([(held_c - 1010) ** p / 10**p for p in range(8)], 1).double()
    residual = held_y.double() - features @ torch.linalg.lstsq(features, held_y.double()).solution
    least_squares = -0.5 * math.log(2 * math.pi * float(residual.square().mean())) - 0.5
    truth = -math.log(2) - math.log(5) - 0.5 * math.log(2 * math.pi) - 0.5
    assert value > least_squares + 1.0
    assert value > truth - 0.25
    # Exact regression by one mixture of both columns sees the branches too.
    both = gk.fit(
        gk.initialize(torch.cat([c, y], 1), 30), torch.cat([c, y], 1), gk.EM(accelerate=True), max_iter=200
    ).mixture
    exact = both.condition(0, held_c).log_prob(held_y.double()).mean().item()
    assert exact > least_squares + 1.0


def run(model, x, **options):
    options = {"generator": torch.Generator().manual_seed(0), **options}
    return gk.fit(model, x, gk.Adam(lr=5e-3, batch_size=options.pop("batch", 500)), **options)


def test_files_checkpoints_weights_and_penalties(tmp_path):
    generator = torch.Generator().manual_seed(0)
    c = 4 * torch.rand(2000, 2, generator=generator) - 2
    y = 3 * torch.cat([c.sum(1, keepdim=True), c[:, :1] ** 2], 1) + torch.randn(2000, 2, generator=generator)
    whole = run(conditional(D=2, K=3), y, context=c, max_iter=12)
    run(conditional(D=2, K=3), y, context=c, max_iter=5, checkpoint=tmp_path / "c")
    resumed = run(conditional(D=2, K=3), y, context=c, max_iter=12, checkpoint=tmp_path / "c")
    assert resumed.objective == whole.objective
    np.save(tmp_path / "joint.npy", torch.cat([y, c], 1).numpy())
    source = run(conditional(D=2, K=3), tmp_path / "joint.npy", max_iter=12)
    assert source.objective == pytest.approx(whole.objective, abs=0.3)
    g = torch.randint(0, 3, (2000,), generator=generator).double()
    model = conditional(D=2, K=3)
    weighted = run(model, y, context=c, sample_weight=g, max_iter=3, batch=None)
    with torch.no_grad():
        assert weighted.log_likelihood == pytest.approx(float(model(c).log_prob(y).double() @ g / g.sum()), abs=1e-6)
    pulled = run(conditional(D=2, K=3), y, context=c, max_iter=12, penalty=gk.penalties.NormalMean(0.0, 50.0))
    assert pulled.objective > pulled.log_likelihood * -1
    sparse = run(conditional(D=2, K=3), y, context=c, max_iter=12, penalty=lambda m: 5 * m.weights.sqrt().sum())
    assert sparse.answer(c).weights.amax(-1).mean() > whole.answer(c).weights.amax(-1).mean()


MEMORY = f"""{PEAK}
import torch, gmmkeops as gk
torch.manual_seed(0)
model = gk.GMM(8, context=2, n_components=32)
c, y = torch.randn(40_000, 2), torch.randn(40_000, 8)
before = peak()
with torch.no_grad():
    params = model(c)
    middle = peak()
    params.log_prob(y)
    params.sample()
print(middle - before, peak() - middle)
"""


def test_memory_beyond_the_parameters_is_bounded():
    """B K D² is 8e7 numbers, 330 MB for each full copy; densities and draws take less than one beside the parameters."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, beyond = map(int, done.stdout.split())
    assert beyond < 330_000


def test_points_that_do_not_fit_the_batch_are_refused():
    mixtures = conditional(D=2)(torch.zeros(3, 2).double())
    with pytest.raises(
        ValueError, match=r"points of shape \(5, 4, 2\) do not match a batch of mixtures of shape \(3,\)"
    ):
        mixtures.log_prob(torch.zeros(5, 4, 2))


def test_gradients_are_the_same_in_stretches(monkeypatch):
    model = conditional(D=4, K=5)
    c, x = torch.randn(300, 2).double(), torch.randn(300, 4).double()

    def slopes():
        model.zero_grad()
        model(c).log_prob(x).sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()])

    whole = slopes()
    monkeypatch.setattr("gmmkeops.models.densities.CHUNK", 2000)
    assert torch.allclose(slopes(), whole, rtol=1e-12)


def test_contexts_far_from_the_network_are_told():
    c, y = branches(500)
    torch.manual_seed(0)
    with pytest.warns(gk.PrecisionWarning, match="saturated or linear for all contexts"):
        gk.fit(gk.GMM(1, context=1, n_components=2), y, gk.Adam(), context=c, max_iter=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, y, c: gk.fit(m, y, gk.EM(), context=c), "requires a gradient method, got EM"),
        (lambda m, y, c: gk.fit(m, y, gk.Adam(), context=c[:5]), "one row per point, expected 50, got 5"),
        (lambda m, y, c: gk.fit(m, y, gk.Adam()), "x has 3 columns, expected 5"),
        (
            lambda m, y, c: gk.fit(m, y, gk.Adam(), context=c, truncate=0.1),
            "truncate must be None or 0 for a GMM with a context, got 0.1",
        ),
        (lambda m, y, c: gk.fit(gk.GMM(3), y, gk.Adam(), context=c), "context requires a conditional GMM"),
        (lambda m, y, c: gk.GMM(3).initialize(y, context=c), "this GMM has no context; construct it"),
        (lambda m, y, c: m(c[:, :1]), r"shape \(\*, 2\)"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(conditional(), torch.randn(50, 3), torch.randn(50, 2))
