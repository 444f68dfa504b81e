"""Matrix products of the dense engine: in float32, in parts for tensor cores, and without features of the points."""

from __future__ import annotations

import pytest
import torch
from conftest import ENGINES, FAMILIES, make_case

from gmmkeops import PrecisionWarning, reductions

DTYPES = [torch.float32, torch.float64]


def error(got, expected):
    """Largest error relative to max(1, |expected|)."""
    return float(((got.double() - expected).abs() / expected.abs().clamp(min=1)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "K"), [(6, 1), (13, 2), (32, 5)])
def test_few_components_in_many_dimensions(dtype, D, K, monkeypatch):
    """Tiles that do without the features of points: everything that they give, and the same with features."""
    case = make_case("full", dtype, D=D, K=K, N=500, condition=30.0, seed=D)
    g = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = case.oracle(g)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11

    def everything():
        sums = reductions.moments(*case.arguments, weights=g, backend="dense")
        hard = reductions.moments(*case.arguments, assignment="hard", backend="dense")
        x = case.x.clone().requires_grad_()
        reductions.total(x, *case.arguments[1:], weights=g, backend="dense").backward()
        return sums.S0, sums.S1, sums.S2, sums.total, hard.S0, hard.S1, hard.S2, hard.total, x.grad

    asked = []
    true = reductions.dense.tile.Tile._residuals
    monkeypatch.setattr(
        reductions.dense.tile.Tile, "_residuals", lambda tile: (asked.append(tile.height), true(tile))[1]
    )
    found = everything()
    assert asked
    assert error(reductions.logsumexp(*case.arguments, backend="dense"), truth["values"]) < tolerance
    for value, name in zip(found, ("S0", "S1", "S2"), strict=False):
        assert float((value - truth[name]).abs().max() / truth[name].abs().max()) < tolerance
    assert float((found[-1] - truth["gradient"]).abs().max() / truth["gradient"].abs().max()) < tolerance
    monkeypatch.setattr(reductions.dense.tile, "_FEW", 10**9)
    for value, featured in zip(found, everything(), strict=True):
        assert float((value - featured).abs().max() / featured.abs().max()) < tolerance


def test_few_components_beyond_range():
    """Exponents below float32's range in tiles without features: finite, and the responsibilities too."""
    x, means = torch.full((3, 12), 1e25), torch.zeros(2, 12)
    means[1] += 1e24
    problem = x, torch.zeros(2), means, torch.eye(12).expand(2, 12, 12)
    values = reductions.logsumexp(*problem, backend="dense")
    assert bool(torch.isfinite(values).all())
    assert bool((values < -1e38).all())
    assert bool(torch.isfinite(reductions.moments(*problem, backend="dense").S0).all())


@pytest.fixture
def high(monkeypatch):
    """float32 products are asked for; gives whether each worker's tiles took float64 ones."""
    precise = []

    def tile(*arguments):
        precise.append(arguments[-2])
        return reductions.dense.tile.Tile(*arguments)

    monkeypatch.setattr(reductions.dense.engine, "Tile", tile)
    torch.set_float32_matmul_precision("high")
    yield precise
    torch.set_float32_matmul_precision("highest")


DEVICES = [engine for engine in ENGINES if engine.id.startswith("dense")]


@pytest.mark.parametrize("engine", DEVICES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("family", "D", "K"), [(f, 3, 5) for f in FAMILIES] + [("full", 12, 2), ("full", 8, 40)])
def test_float32_products(engine, split, family, D, K, high, monkeypatch):
    """Everything with float32 products, whole or in the parts that tensor cores take: near the oracle, though not as near."""
    if split:
        monkeypatch.setattr(reductions.dense.products, "_on_tensor_cores", lambda a: a.dtype == torch.float32)
    case = make_case(family, torch.float32, N=9000, D=D, K=K, condition=4.0, device=engine[1])
    g = torch.randn(9000, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(engine[1])
    # Weights of both signs cancel in the sums; rounding is relative to the sums of their sizes.
    truth, absolute = case.oracle(g), case.oracle(g.abs())
    values = reductions.logsumexp(*case.arguments, backend="dense")
    assert error(values, truth["values"]) < 1e-4
    sums = reductions.moments(*case.arguments, weights=g, backend="dense")
    for name in ("S0", "S1", "S2", "total"):
        assert float((getattr(sums, name) - truth[name]).abs().max() / absolute[name].abs().max()) < 2e-5
    assert high.count(False) >= 2 * 2  # and the samples that were looked at
    ones = reductions.moments(*case.arguments, assignment="hard", backend="dense")
    assert torch.equal(ones.S0, torch.bincount(truth["e"].argmax(1), minlength=K).double())
    # Labels and gradients in the points are precise whatever is asked for.
    high.clear()
    assert torch.equal(reductions.argmax(*case.arguments, backend="dense"), truth["e"].argmax(1))
    assert all(high)


@pytest.mark.parametrize("size", [2.0**-830, 2.0**830])
def test_float32_products_of_weights_of_any_size(size, high):
    case = make_case("full", torch.float32, N=9000, condition=10.0)
    g = torch.rand(9000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, sums = (reductions.moments(*case.arguments, weights=g * factor, backend="dense") for factor in (1.0, size))
    for name in ("S0", "S1", "S2", "total"):
        assert torch.equal(getattr(sums, name) / size, getattr(plain, name))
    assert high.count(False) > 1


def test_float32_products_of_lists(high):
    case = make_case("diag", torch.float32, N=20_000, K=300, D=2, condition=10.0)
    assert error(reductions.logsumexp(*case.arguments, truncate=1e-7, backend="dense"), case.oracle()["values"]) < 1e-4
    assert high.count(False) > 1


def test_float32_products_that_will_not_do(high):
    """Thin components far from the middle: it is said, and float64 products are taken."""
    x = 500 + 0.05 * torch.randn(9000, 2, generator=torch.Generator().manual_seed(0))
    problem = x, torch.zeros(2), torch.tensor([[500.0, 500.0], [-500.0, -500.0]]), torch.full((2, 2), 20.0)
    with pytest.warns(PrecisionWarning, match=r"allows float32 products, .* would change by more than 5e-05 \* max"):
        sums = reductions.moments(*problem, backend="dense")
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(sums.S2, reductions.moments(*problem, backend="dense").S2)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_products_where_float64_ones_are_slow(family, high, monkeypatch):
    """Without a setting of the user: in parts, where they are accurate to 1e-5, and silently not elsewhere."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(reductions.dense.engine, "has_slow_double", lambda device: True)
    monkeypatch.setattr(reductions.dense.products, "_on_tensor_cores", lambda a: a.dtype == torch.float32)
    case = make_case(family, torch.float32, N=9000, D=3, K=5, condition=2.0)
    assert error(reductions.logsumexp(*case.arguments, backend="dense"), case.oracle()["values"]) < 1e-5
    assert False in high
    high.clear()
    narrow = (case.x, case.offsets, case.means, 1e3 * case.factor.U)
    values = reductions.logsumexp(*narrow, backend="dense")
    monkeypatch.setattr(reductions.dense.engine, "has_slow_double", lambda device: False)
    assert torch.equal(values, reductions.logsumexp(*narrow, backend="dense"))


@pytest.mark.parametrize(
    ("capability", "hip", "slow"),
    [
        *(((major, 0), None, False) for major in (6, 7, 8, 9, 10)),
        *((capability, None, True) for capability in ((6, 1), (7, 5), (8, 6), (8, 9), (10, 3), (12, 0))),
        ((11, 0), "6.0", False),
    ],
)
def test_devices_with_slow_float64_products(capability, hip, slow, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert reductions.dense.products.has_slow_double(torch.device("cuda", 0)) is slow
    assert not reductions.dense.products.has_slow_double(torch.device("cpu"))


def test_products_in_parts():
    """Three products of eleven bits keep what one of them loses."""
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    exact, scale = a.double() @ b.double(), a.abs().double() @ b.abs().double()
    once = reductions.dense.products._rounded(a) @ reductions.dense.products._rounded(b)
    assert float(((once - exact).abs() / scale).max()) > 1e-5
    assert float(((reductions.dense.products.split_product(a, b) - exact).abs() / scale).max()) < 2**-21
    head, rest = reductions.dense.products.parts(a)
    assert float(((head.double() + rest.double()) / a.double() - 1).abs().max()) < 2**-22
    bits = head.view(torch.int32) & 0x1FFF
    assert int(bits.abs().max()) == 0
