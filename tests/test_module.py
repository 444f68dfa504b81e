"""The trainable module, and what a reader of Zuko's page would type."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from conftest import ZUKO, elongated_blobs, random_mixture
from torch import nn

import gmmkeops as gk


@pytest.mark.parametrize(("family", "tied"), ZUKO)
def test_parameters_are_real(family, tied):
    model = gk.GMM(3, n_components=4, covariance_type=family, tied=tied)
    names = {"logits", "means", "log_diagonal"} | ({"upper"} if family == "full" else set())
    assert set(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.means.add_(1)
    assert not torch.equal(twin.means, model.means)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(twin().log_prob(x), model().log_prob(x))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    wide = copy.deepcopy(model).to(torch.float64)
    assert wide.means.dtype == torch.float64
    assert torch.allclose(wide().log_prob(x).float(), model().log_prob(x), atol=1e-4)
    model().log_prob(x).mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_epsilon_is_a_least_variance():
    for family in ("diagonal", "spherical"):
        model = gk.GMM(2, n_components=1, covariance_type=family, epsilon=0.25)
        with torch.no_grad():
            model.log_diagonal.zero_()
        assert torch.allclose(model().factor.covariances(), 1.25 * torch.eye(2))
    mixture = random_mixture("full", K=2, dtype=torch.float32)
    model = gk.GMM(2, n_components=2).assign(mixture)
    x = mixture.sample(20)
    assert torch.allclose(model().log_prob(x), mixture.log_prob(x), atol=1e-4)


def test_zuko_page_as_typed():
    """The page's snippets, with its documented names (two of which its own class lacks)."""
    torch.manual_seed(0)
    x = elongated_blobs(1000)
    gmm = gk.GMM(features=2, n_components=3, covariance_type="full", epsilon=1e-6)
    gmm.initialize(x, strategy="kmeans")
    optimizer = torch.optim.Adam(gmm.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = -gmm().log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # k-means has found the optimum but for 1e-6 nats.
    assert min(losses[1:]) < losses[0]
    dist = gmm()
    assert dist.sample((1000,)).shape == (1000, 2)
    log_probs = dist.component_distribution.log_prob(x.unsqueeze(1)) + dist.mixture_distribution.logits
    assert torch.equal(log_probs.argmax(-1), dist.predict(x))
    assert torch.allclose(log_probs.softmax(-1), dist.responsibilities(x), atol=1e-5)
    grid = torch.randn(100, 100, 2)
    assert dist.log_prob(grid).shape == (100, 100)


def test_conditional_gmm():
    torch.manual_seed(0)
    model = gk.GMM(features=2, context=5, n_components=3, hidden_features=[128, 128])
    assert model(torch.randn(5)).sample((100,)).shape == (100, 2)
    y = elongated_blobs(64)
    model.initialize(y, "kmeans")
    c = torch.randn(64, 5)
    batch = model(c)
    assert batch.batch_shape == (64,)
    value = batch.log_prob(y)
    assert value.shape == (64,)
    one = model(c[7])
    assert torch.allclose(one.log_prob(y[7]), value[7], atol=1e-5)
    value.mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: gk.GMM(0), ValueError, "features must be an integer of at least 1, got 0"),
        (lambda: gk.GMM(2, n_components=1.5), ValueError, "components must be an integer"),
        (lambda: gk.GMM(2, 3), TypeError, "got 2; pass n_components= for the number of components, and context= for"),
        (lambda: gk.GMM(2, n_mixtures=3), TypeError, "GMM has no argument n_mixtures; pass n_components="),
        (lambda: gk.GMM(2, num_components=3), TypeError, "no argument num_components; pass n_components="),
        (lambda: gk.GMM(2, n_clusters=3), TypeError, "no argument n_clusters; pass n_components="),
        (lambda: gk.GMM(2, k=3), TypeError, "no argument k; pass n_components="),
        (lambda: gk.GMM(2, n_components=3, components=3), TypeError, "got both n_components and components"),
        (lambda: gk.GMM(2, n_components=1.5), ValueError, "^n_components must be an integer"),
        (lambda: gk.GMM(2, covariance_type="foo"), ValueError, "covariance_type must be one of"),
        (lambda: gk.GMM(2, epsilon=-1), ValueError, "epsilon must be finite"),
        (lambda: gk.GMM(2)(torch.zeros(3)), ValueError, "this GMM has no context"),
        (lambda: gk.GMM(2, context=3)(), ValueError, "needs a context of 3 columns"),
        (lambda: gk.GMM(2, context=3)(torch.zeros(2)), ValueError, r"shape \(\*, 3\), got \(2,\)"),
        (
            lambda: gk.GMM(2, n_components=5).initialize(torch.zeros(4, 2)),
            ValueError,
            "x has 4 rows, expected at least 5",
        ),
        (lambda: gk.GMM(2).initialize(torch.zeros(9, 2), "best"), ValueError, "strategy must be one of 'auto'"),
        (lambda: gk.GMM(2).initialize(torch.zeros(9, 3)), ValueError, "x has 3 columns, expected 2"),
        (
            lambda: gk.GMM(2).assign(random_mixture("full", K=3)),
            ValueError,
            "the mixture must have parameters of shapes",
        ),
        (lambda: gk.initialize(torch.zeros(9, 2), 0), ValueError, "components must be at least 1"),
        (lambda: gk.initialize(torch.full((9, 2), math.nan), 2), ValueError, "x must be finite"),
        (
            lambda: gk.initialize(torch.zeros(3, 2), 2, sample_weight=[1, 0, 0]),
            ValueError,
            "at least 2 points with positive",
        ),
    ],
)
def test_bad_input_gets_one_sentence(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_refused_initialization_leaves_the_module_as_it_was():
    model = gk.GMM(2, n_components=3, activation=nn.Tanh)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="finite"):
        model.initialize(torch.full((9, 2), math.inf))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_aliases_of_the_module():
    x, g = elongated_blobs(300), torch.rand(300, generator=torch.Generator().manual_seed(0))
    model, old = gk.GMM(2, n_components=3), gk.GMM(2, n_components=3)
    assert (model.n_components, old.n_components) == (3, 3)
    model.initialize(x, sample_weight=g, random_state=5)
    old.initialize(x, sample_weight=g, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model.means, old.means)
    assert repr(model) == "GMM(features=2, context=0, n_components=3, covariance_type='full', tied=False)"
    with pytest.raises(TypeError, match=r"GMM.initialize got both sample_weight and weights"):
        model.initialize(x, sample_weight=g, weights=g)
    with pytest.raises(TypeError, match=r"random_state must be a torch\.Generator, a seed or None, got str"):
        model.initialize(x, random_state="x")
