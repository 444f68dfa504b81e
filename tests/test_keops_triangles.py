"""Triangles in the formulas of KeOps: packing, products, and every dimension, family and form of a factor."""

from __future__ import annotations

import fake_keops
import pytest
import torch
from conftest import FAMILIES, HAS_KEOPS, make_case
from fake_keops import LazyTensor

from gmmkeops import reductions
from gmmkeops.reductions.keops import triangles
from gmmkeops.reductions.problem import upper_factor

DIMENSIONS = [1, 2, 3, 7, 16, 17, 40]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("D", DIMENSIONS)
def test_products_of_packed_triangles_are_those_of_matrices(D):
    matrices, vectors, others = random(4, D, D), random(5, 1, D, seed=1), random(5, 1, D, seed=2)
    lower, upper = matrices.tril(), matrices.triu()
    for triangle, packed, product in (
        (lower, triangles.pack(lower), triangles.lower_product),
        (upper, triangles.pack(upper, lower=False), triangles.upper_product),
    ):
        assert packed.shape == (4, triangles.packed_size(D))
        # Entries before and after the packed matrix must not be read.
        parameters = LazyTensor(torch.cat([random(4, 3, seed=3), packed, random(4, 2, seed=4)], 1)[None])
        found = product(LazyTensor, parameters, 3, LazyTensor(vectors), D).value()
        assert torch.allclose(found, torch.einsum("kab,nb->nka", triangle, vectors[:, 0]), rtol=1e-12, atol=1e-12)
    assert D > 16 or triangles.packed_size(D) == D * (D + 1) // 2
    assert triangles.packed_size(D) < 0.56 * D**2 + D / 2

    weighted = (0.5 + random(5, seed=5)[:, None, None]) * vectors
    found = triangles.outer_product(LazyTensor, LazyTensor(weighted), LazyTensor(vectors), D).value()[:, 0]
    expected = torch.einsum("na,nb->nab", weighted[:, 0], vectors[:, 0])
    assert torch.allclose(triangles.symmetric(found, D), expected, rtol=1e-12, atol=1e-12)
    mixed = triangles.outer_product(LazyTensor, LazyTensor(others), LazyTensor(vectors), D).value()[:, 0]
    below = torch.einsum("na,nb->nab", others[:, 0], vectors[:, 0]).tril()
    assert torch.allclose(triangles.symmetric(mixed, D).tril(), below, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("D", DIMENSIONS)
def test_a_square_factor_becomes_an_upper_triangle_of_the_same_precision(D):
    U = random(4, D, D)
    found = upper_factor(U)
    assert torch.equal(found, found.triu())
    assert torch.allclose(found @ found.mT, U @ U.mT, rtol=1e-10, atol=1e-10)


def assert_equal_requests(x, offsets, means, factor, tolerance, backend="keops", **options):
    """Every request of the KeOps engine equals that of the dense engine in float64."""
    weights = random(len(x), seed=6)

    def requests(x, backend):
        points = x.clone().requires_grad_()
        reductions.total(points, offsets, means, factor, weights=weights, backend=backend, **options).backward()
        sums = reductions.moments(x, offsets, means, factor, weights=weights, backend=backend, **options)
        values, labels = reductions.topk(x, offsets, means, factor, 2, backend=backend, **options)
        density = reductions.logsumexp(x, offsets, means, factor, backend=backend, **options)
        return {
            **{name: getattr(sums, name) for name in ("S0", "S1", "S2", "total")},
            "gradient": points.grad,
            "values": values,
            "labels": labels,
            "density": density,
        }

    expected = requests(x.double(), "dense")
    for name, found in requests(x, backend).items():
        assert found.shape == expected[name].shape, name
        error = float((found.double() - expected[name]).abs().max())
        assert error <= tolerance * max(1.0, float(expected[name].abs().max())), (name, error)


@pytest.mark.parametrize("D", [1, 2, 5, 17, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_request_in_every_dimension(monkeypatch, tmp_path, family, D):
    fake_keops.install(monkeypatch, tmp_path)
    assert_equal_requests(*make_case(family, torch.float64, N=100, D=D, condition=10.0).arguments, 1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_a_factor_that_is_not_triangular_has_its_own_precision(monkeypatch, tmp_path, tied):
    fake_keops.install(monkeypatch, tmp_path)
    x, means, offsets = random(200, 4), random(3, 4, seed=1), random(3, seed=2)
    U = (0.5 + random(1 if tied else 3, 1, 1, seed=3).abs()) * (
        torch.eye(4) + 0.4 * random(3, 4, 4, seed=4)[: 1 if tied else 3]
    )
    assert float(U.tril(-1).abs().max()) > 0.1
    assert_equal_requests(x, offsets, means, U, 1e-10)


@pytest.mark.slow
@pytest.mark.keops
@pytest.mark.skipif(not HAS_KEOPS, reason="no pykeops")
@pytest.mark.parametrize(("family", "D"), [("full", 17), ("full", 1), ("spherical", 7)])
def test_compiled_formulas_in_other_dimensions(family, D):
    case = make_case(family, torch.float32, N=1000, D=D, condition=10.0)
    assert_equal_requests(*case.arguments, 3e-5)
    assert_equal_requests(*case.arguments, 3e-5, truncate=0)


@pytest.mark.keops
@pytest.mark.skipif(not HAS_KEOPS, reason="no pykeops")
def test_a_compiled_formula_with_a_factor_that_is_not_triangular():
    case = make_case("full", torch.float32, condition=10.0)
    rotation = torch.linalg.qr(random(len(case.means), 3, 3)).Q
    U = case.factor.to(torch.float64).U @ rotation
    assert_equal_requests(case.x, case.offsets, case.means, U, 2e-5)
