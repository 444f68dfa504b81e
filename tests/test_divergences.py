"""Entropy and Kullback-Leibler divergence of torch: closed forms of one component, and what has none."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, batch_of, random_mixture
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

import gmmkeops as gk


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_entropy_and_divergence_of_one_component(family, batch):
    p, q = batch_of(family, batch, K=1, D=3), batch_of(family, batch, K=1, D=3, seed=1)
    kl = torch.distributions.kl_divergence

    def gaussian(m):
        return MultivariateNormal(m.means[..., 0, :], m.factor.covariances()[..., 0, :, :])

    def low_rank(m):
        inflated = m.factor.covariances()[..., 0, :, :]
        root = torch.linalg.cholesky(inflated - 0.5 * torch.linalg.eigvalsh(inflated)[..., :1, None] * torch.eye(3))
        noise = 0.5 * torch.linalg.eigvalsh(inflated)[..., :1].expand(*batch, 3)
        return LowRankMultivariateNormal(m.means[..., 0, :], root, noise)

    assert torch.allclose(p.entropy(), gaussian(p).entropy(), rtol=1e-10)
    right = kl(gaussian(p), gaussian(q))
    assert float(right.min()) > 0.1
    for a, b in ((p, q), (p, gaussian(q)), (gaussian(p), q), (p, low_rank(q)), (low_rank(p), q)):
        assert torch.allclose(kl(a, b), right, rtol=1e-8)
    assert torch.allclose(kl(p.to(torch.float32), q), right, rtol=1e-3)
    one = batch_of(family, (), K=1, D=3, seed=2)
    assert torch.allclose(kl(p, one), kl(gaussian(p), gaussian(one)), rtol=1e-8)
    assert torch.allclose(kl(one, p), kl(gaussian(one), gaussian(p)), rtol=1e-8)
    if p.factor.family != "full":
        normals = [
            Independent(Normal(m.means[..., 0, :], (1 / m.factor.U[..., 0, :]).expand(*batch, 3)), 1) for m in (p, q)
        ]
        assert torch.allclose(kl(normals[0], q), right, rtol=1e-10)
        assert torch.allclose(kl(p, normals[1]), right, rtol=1e-10)


@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_gradients_of_entropy_and_divergence(family):
    """Against those of torch's Gaussians, whose covariances are made of the same parameters."""
    p, q = batch_of(family, (2,), K=1, D=3), batch_of(family, (2,), K=1, D=3, seed=1)
    gradients = []
    for form in (
        lambda m: m,
        lambda m: MultivariateNormal(m.means[..., 0, :], m.factor.covariances()[..., 0, :, :]),
    ):
        leaves, made = [], []
        for m in (p, q):
            tensors = {name: t.clone().requires_grad_() for name, t in m.factor.tensors.items()}
            means = m.means.clone().requires_grad_()
            leaves += [means, *tensors.values()]
            made.append(form(gk.Mixture(m.logits, means, m.factor.replace(**tensors))))
        values = torch.distributions.kl_divergence(*made) + made[0].entropy()
        gradients.append(torch.autograd.grad(values.sum(), leaves))
    for ours, right in zip(*gradients, strict=True):
        assert torch.allclose(ours, right, rtol=1e-8, atol=1e-8)


def test_entropy_and_divergence_that_have_no_closed_form():
    many, one = random_mixture("full"), random_mixture("full", K=1)
    with pytest.raises(NotImplementedError, match=r"^the entropy of a mixture of 4 components .*gmmkeops\.analysis"):
        many.entropy()
    for p, q in ((many, one), (one, many), (many, many)):
        with pytest.raises(
            NotImplementedError, match=r"no closed form; estimate it by sampling with gmmkeops\.analysis\.kl_divergence"
        ):
            torch.distributions.kl_divergence(p, q)
    with pytest.raises(ValueError, match="got 2 and 3"):
        torch.distributions.kl_divergence(one, random_mixture("full", K=1, D=3))
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        torch.distributions.kl_divergence(one.expand((2,)), one.expand((3,)))
    poisson = Independent(torch.distributions.Poisson(torch.ones(2)), 1)
    with pytest.raises(NotImplementedError, match="MultivariateNormal"):
        torch.distributions.kl_divergence(one, poisson)
