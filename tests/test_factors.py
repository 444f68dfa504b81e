"""Factors: every way in leads to the same covariances, and out again."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES, make_factor

import gmmkeops as gk
from gmmkeops import DiagonalFactor, FullFactor, SphericalFactor
from gmmkeops.components.families import factor_class


def natural(factor, matrices):
    """A stack of dense matrices in the shape that the factor's constructors take."""
    if factor.family == "full":
        return matrices
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    return diagonal if factor.family == "diagonal" else diagonal[..., 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("D", [1, 2, 6])
def test_round_trips(family, D):
    factor = make_factor(family, 4, D, 100.0, torch.Generator().manual_seed(0))
    kind, tied = factor_class(family)
    assert factor.leading == (1 if tied else 4)
    covariances = factor.covariances()
    assert torch.allclose(covariances @ factor.precisions(), torch.eye(D).double().expand_as(covariances), atol=1e-10)
    assert torch.allclose(factor.cholesky() @ factor.cholesky().mT, covariances)
    assert torch.allclose(factor.log_determinant(), -0.5 * torch.logdet(covariances))
    for back in (
        kind.from_covariances(natural(factor, covariances), features=D),
        kind.from_precisions(natural(factor, factor.precisions()), features=D),
        kind.from_cholesky(natural(factor, factor.cholesky()), features=D),
        kind.from_factors(factor.U, features=D),
    ):
        assert torch.allclose(back.covariances(), covariances, rtol=1e-9, atol=1e-12)
        assert bool((back.matrices().diagonal(dim1=-2, dim2=-1) > 0).all())
        assert torch.equal(back.matrices().tril(-1), torch.zeros_like(back.matrices()))
    scale = torch.full((D,), 4.0).double() if "spherical" in family else 2.0 ** torch.arange(D).double()
    assert torch.allclose(factor.rescale(scale).covariances(), covariances / scale[:, None] / scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_whitening_and_noise(family):
    factor = make_factor(family, 3, 4, 100.0, torch.Generator().manual_seed(0))
    z = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    distance = torch.einsum("nkd,kde,nke->nk", z, factor.precisions().expand(3, 4, 4), z)
    assert torch.allclose(factor.whiten(z).square().sum(-1), distance)
    labels = torch.tensor([0, 2, 1, 1, 0]) * (factor.leading > 1)
    noise = z[:, 0]
    back = factor.whiten(factor.unwhiten(noise, labels)[:, None, :].expand(5, 3, 4))
    assert torch.allclose(back[torch.arange(5), labels], noise)


def test_any_square_factor_of_the_tutorial():
    A = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = FullFactor.from_factors(A)
    assert torch.allclose(factor.precisions(), A @ A.mT)


def test_sklearn_has_the_same_upper_factor():
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    covariances = make_factor("full", 3, 4, 50.0, torch.Generator().manual_seed(0)).covariances()
    ours = FullFactor.from_covariances(covariances).U
    assert torch.allclose(ours, torch.from_numpy(_compute_precision_cholesky(covariances.numpy(), "full")))


def test_select_scatter_expand_and_count():
    factor = make_factor("full", 4, 3, 50.0, torch.Generator().manual_seed(0))
    part = factor.select(torch.tensor([2, 0]))
    assert torch.equal(part.U, factor.U[[2, 0]])
    other = FullFactor(torch.ones(2, 3).double())
    assert torch.equal(factor.scatter(torch.tensor([1, 3]), other).U[[1, 3]], other.U)
    assert torch.equal(factor.scatter(torch.tensor([1, 3]), other).U[[0, 2]], factor.U[[0, 2]])
    assert factor.expand((5,)).U.shape == (5, 4, 3, 3)
    assert [
        kind.count(4, 3, tied) for kind in (FullFactor, DiagonalFactor, SphericalFactor) for tied in (False, True)
    ] == [
        24,
        6,
        12,
        3,
        4,
        1,
    ]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: FullFactor.from_covariances([[[1.0, 2.0], [2.0, 1.0]]]),
            ValueError,
            "positive definite, component 0 is not",
        ),
        (lambda: FullFactor.from_covariances([[[1.0, 2.0], [0.0, 9.0]]]), ValueError, "must be symmetric, component 0"),
        (lambda: FullFactor.from_covariances([[1.0, 0.0], [0.0, 1.0]]), ValueError, r"shape \(K, D, D\)"),
        (lambda: FullFactor.from_precisions([[[math.nan]]]), ValueError, "finite, got NaN at component 0"),
        (lambda: FullFactor.from_cholesky([[[-1.0]]]), ValueError, "must be positive"),
        (
            lambda: DiagonalFactor.from_covariances([[1.0, 0.0]]),
            ValueError,
            "covariances must be positive and finite, got 0",
        ),
        (lambda: SphericalFactor.from_covariances([1.0]), ValueError, "needs features=D"),
        (lambda: SphericalFactor.from_covariances([-1.0], features=2), ValueError, "must be positive"),
        (lambda: SphericalFactor(torch.zeros(3, 2), 2), ValueError, "one column"),
        (lambda: FullFactor(torch.zeros(3, 2), torch.zeros(3, 2)), ValueError, "upper must have shape"),
        (lambda: factor_class("round"), ValueError, "covariance_type must be one of 'full'"),
        (lambda: gk.DiagonalFactor.from_covariances([["a"]]), TypeError, "must be numeric"),
    ],
)
def test_bad_input_gets_one_sentence(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
