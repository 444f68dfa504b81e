"""Penalties: closed forms, gradients, algebra, bounds."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES, random_mixture
from torch.distributions import Dirichlet, MultivariateNormal, Wishart

import gmmkeops as gk
from gmmkeops import penalties as P

ALL = [
    P.SqrtWeights(20),
    P.WeightEntropy(0.7),
    P.Dirichlet(2.0),
    P.Dirichlet([0.5, 1.0, 2.0, 3.0]),
    P.NormalInverseWishart([0.5, -1.0], 0.3, [[2.0, 0.5], [0.5, 1.0]], 5.0),
    P.PrecisionRidge(0.1),
    2 * P.SqrtWeights(1) + P.Dirichlet(2.0) + (lambda m: m.means.square().sum()),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", ALL, ids=lambda p: type(p).__name__)
def test_gradients(penalty, family):
    mixture = random_mixture(family)
    tensors = [mixture.logits, mixture.means, *mixture.factor.tensors.values()]
    names = list(mixture.factor.tensors)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]

    def value(logits, means, *raw):
        factor = mixture.factor.replace(**dict(zip(names, raw, strict=True)))
        return penalty(gk.Mixture(logits, means, factor), 7.0)

    assert torch.autograd.gradcheck(value, leaves)


def test_closed_forms():
    mixture = random_mixture("full")
    W, C = mixture.weights, mixture.factor.covariances()
    assert torch.allclose(P.SqrtWeights(20)(mixture), 5 * W.sqrt().sum())
    assert torch.allclose(P.WeightEntropy(3)(mixture), 3 * mixture.mixture_distribution.entropy())
    inverse = torch.linalg.inv(C)
    assert torch.allclose(P.PrecisionRidge(2)(mixture), 2 * inverse.diagonal(dim1=1, dim2=2).sum() / 4)


def test_priors_are_log_densities_up_to_a_constant():
    a, b = random_mixture("full", seed=0), random_mixture("full", seed=1)
    alpha = torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
    ours = P.Dirichlet(alpha)(a, 10) - P.Dirichlet(alpha)(b, 10)
    theirs = Dirichlet(alpha).log_prob(a.weights) - Dirichlet(alpha).log_prob(b.weights)
    assert torch.allclose(ours, -theirs / 10)

    m, kappa, psi, nu = torch.tensor([0.5, -1.0]).double(), 0.3, torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), 5.0

    def log_density(mixture):
        """As a Wishart on the precision, with the Jacobian |Σ|^-(D+1) of its inverse, times the conditional normal."""
        C = mixture.factor.covariances()
        wishart = Wishart(torch.tensor(nu).double(), covariance_matrix=torch.linalg.inv(psi)).log_prob(
            torch.linalg.inv(C)
        )
        return (wishart - 3 * torch.logdet(C) + MultivariateNormal(m, C / kappa).log_prob(mixture.means)).sum()

    prior = P.NormalInverseWishart(m, kappa, psi, nu)
    assert torch.allclose(prior(a, 10) - prior(b, 10), -(log_density(a) - log_density(b)) / 10)


def test_algebra():
    mixture = random_mixture("diag")
    a, b = P.SqrtWeights(2.0), P.PrecisionRidge(0.5)
    assert torch.allclose((2 * a + b * 3)(mixture), 2 * a(mixture) + 3 * b(mixture))
    assert torch.allclose(sum([a, b])(mixture), a(mixture) + b(mixture))
    assert torch.allclose((a + (lambda m: m.means.sum()))(mixture), a(mixture) + mixture.means.sum())
    with pytest.raises(TypeError, match="unsupported operand"):
        a + 3
    with pytest.raises(TypeError, match="must be a Penalty or a function"):
        P.as_penalty(3)
    with pytest.raises(TypeError, match=r"must return a scalar tensor, got \(4,\)"):
        P.as_penalty(lambda m: m.weights)(mixture)


@pytest.mark.parametrize("family", FAMILIES)
def test_eigenvalue_floor(family):
    mixture = random_mixture(family, condition=1e6)
    bound = 2 * P.EigenvalueFloor(0.01) + P.SqrtWeights(1)
    assert bound.bounds
    inside, moved = bound.project(mixture)
    before = torch.linalg.eigvalsh(mixture.factor.covariances())
    after = torch.linalg.eigvalsh(inside.factor.covariances())
    assert torch.allclose(after, before.clamp(min=0.01), rtol=1e-6)
    assert moved.tolist() == (before[:, 0] < 0.01).expand(4).tolist()
    again, still = bound.project(inside)
    assert not bool(still.any())
    assert torch.equal(again.factor.U, inside.factor.U)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.SqrtWeights(-1), "strength must be finite and at least 0, got -1"),
        (lambda: P.SqrtWeights(math.nan), "strength must be finite"),
        (lambda: P.Dirichlet(0.0), "concentration must be positive"),
        (lambda: P.Dirichlet([1.0, 2.0])(random_mixture("full")), "concentration has 2 entries, expected 4"),
        (lambda: P.EigenvalueFloor(0), "minimum must be finite and greater than 0"),
        (lambda: P.NormalInverseWishart([0, 0], -1, 1.0, 3), "mean_precision must be finite"),
        (lambda: P.NormalInverseWishart([0, 0], 1, -1.0, 3), "scale must be a positive number"),
        (lambda: P.NormalInverseWishart([0, 0], 1, [[1.0, 2.0], [2.0, 1.0]], 3), "scale must be positive definite"),
        (lambda: P.NormalInverseWishart([0, 0], 1, 1.0, 0.5)(random_mixture("full")), "must exceed D - 1 = 1"),
    ],
)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_two_priors_on_covariances_act_as_one_with_the_sums():
    """Σ (ν + D + 1) and Σ Ψ: in the penalty, and in the fits that it leads to."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = random_mixture("full", K=2)
    both = P.InverseWishart(2.0, 5.0) + P.InverseWishart(30.0, 40.0)
    one = P.InverseWishart(32.0, 5.0 + 40.0 + 3.0)
    assert float(both(start, 60.0)) == pytest.approx(float(one(start, 60.0)), rel=1e-12)
    found, right = (gk.fit(start, x, gk.EM(tol=0), penalty=penalty, max_iter=5).mixture for penalty in (both, one))
    assert torch.allclose(found.factor.covariances(), right.factor.covariances(), rtol=1e-9)
