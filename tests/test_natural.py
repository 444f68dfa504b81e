"""Natural gradients of components: the inverse Fisher information, and fits with it."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, random_mixture

import gmmkeops as gk
from gmmkeops.fitting.natural import naturally


def divergence(first, other):
    """Kullback-Leibler divergence of a Gaussian distribution from another one; each is a mixture of one component."""
    delta = other.means - first.means
    ratio = other.factor.precisions() @ first.factor.covariances()
    log_ratio = 2 * (first.factor.log_determinant() - other.factor.log_determinant())
    mahalanobis = other.factor.whiten(delta).square().sum(-1)
    return 0.5 * (ratio.diagonal(dim1=-2, dim2=-1).sum(-1) - first.n_features + mahalanobis + log_ratio).sum()


@pytest.mark.parametrize("D", [1, 2, 4])
@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_it_is_the_inverse_of_the_fisher_information(family, D):
    """The Fisher information is the second derivative of the divergence."""
    mixture = random_mixture(family, K=1, D=D, condition=5.0)
    shapes = {"means": mixture.means, **mixture.factor.tensors}
    sizes = [tensor.numel() for tensor in shapes.values()]

    def build(flat):
        parts = {name: part.view(shapes[name].shape) for name, part in zip(shapes, flat.split(sizes), strict=True)}
        means = parts.pop("means")
        return gk.Mixture(mixture.logits, means, mixture.factor.replace(**parts), validate_args=False)

    here = torch.cat([tensor.reshape(-1) for tensor in shapes.values()])
    fisher = torch.autograd.functional.hessian(lambda flat: divergence(mixture, build(flat)), here)
    slope = torch.randn(len(here), generator=torch.Generator().manual_seed(0)).double()
    parts = {name: part.view(shapes[name].shape) for name, part in zip(shapes, slope.split(sizes), strict=True)}
    means, found = mixture.factor.natural_gradient(parts.pop("means"), parts)
    natural = torch.cat([means.reshape(-1), *(found[name].reshape(-1) for name in mixture.factor.tensors)])
    assert torch.allclose(fisher @ natural, slope, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_stay_and_the_weights_have_their_own_gradient(family):
    mixture = random_mixture(family, K=3)
    x = mixture.sample(50, generator=torch.Generator().manual_seed(0))
    leaves = {"logits": mixture.logits, "means": mixture.means, **mixture.factor.tensors}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    rest = {name: leaf for name, leaf in leaves.items() if name not in ("logits", "means")}
    own = gk.Mixture(leaves["logits"], leaves["means"], mixture.factor.replace(**rest))
    plain = torch.autograd.grad(own.log_prob(x).mean(), list(leaves.values()))
    value = naturally(own).log_prob(x)
    assert torch.equal(value, own.log_prob(x))
    natural = torch.autograd.grad(value.mean(), list(leaves.values()))
    slopes = dict(zip(leaves, plain, strict=True))
    assert torch.equal(natural[0], slopes.pop("logits"))
    means, others = own.factor.detach().natural_gradient(slopes.pop("means"), slopes)
    assert torch.allclose(natural[1], means)
    for name, slope in zip(rest, natural[2:], strict=True):
        assert torch.allclose(slope, others[name])


@pytest.mark.parametrize("family", ["full", "diag"])
def test_a_small_step_follows_em(family):
    """From the gradient of the likelihood, a natural step moves the means towards those of the M-step, scaled by the counts."""
    mixture = random_mixture(family, K=3)
    x = mixture.sample(2000, generator=torch.Generator().manual_seed(0)) + 0.3
    means = mixture.means.clone().requires_grad_()
    own = gk.Mixture(mixture.logits, means, mixture.factor)
    (slope,) = torch.autograd.grad(naturally(own).log_prob(x).sum(), [means])
    sums = gk.reductions.moments(x, mixture.offsets, mixture.means, mixture.factor)
    assert torch.allclose(slope, sums.S0[:, None] * (sums.means - mixture.means), atol=1e-6)


def test_fits_with_and_without_a_context():
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(600, 1, generator=generator)
    y = torch.where(torch.rand(600, 1, generator=generator) < 0.5, 1.0, -1.0) * (1 + c)
    y = y + 0.1 * torch.randn(600, 1, generator=generator)
    torch.manual_seed(0)
    model = gk.GMM(1, context=1, n_components=2)
    model.initialize(y, context=c, generator=generator)
    method = gk.Adam(lr=0.01, natural_gradient=True, batch_size=100)
    result = gk.fit(model, y, method, context=c, max_iter=30, generator=0)
    assert result.history["objective"][-1] < result.history["objective"][0] - 0.1
    assert "natural_gradient=True" in repr(method)
    start = gk.initialize(y, 2, "kmeans")
    plain = gk.fit(start, y, gk.Adam(lr=0.02), max_iter=400)
    natural = gk.fit(start, y, gk.Adam(lr=0.02, natural_gradient=True), max_iter=400)
    assert natural.objective == pytest.approx(plain.objective, abs=1e-3)
