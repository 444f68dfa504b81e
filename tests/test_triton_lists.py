"""Candidate lists that are computed and checked by Triton kernels, against the formulas and against float64 brute force."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import INTERPRETED, make_case, needs_triton
from test_truncation import Maker, brute_force

from gmmkeops.reductions import choice
from gmmkeops.reductions.dense import dense
from gmmkeops.reductions.problem import Exponents
from gmmkeops.reductions.protocol import Argmax, LogSumExp, PointGradient, Statistics, TopK
from gmmkeops.reductions.triton import lists, partial, residuals, triton
from gmmkeops.reductions.triton.packing import Scale
from gmmkeops.reductions.truncation.passes import evaluate
from gmmkeops.reductions.truncation.tolerance import Tolerance
from gmmkeops.reductions.truncation.tree import Cloud
from gmmkeops.reductions.truncation.truncation import Truncation, lists_of

DEVICES = [INTERPRETED, pytest.param(("triton", "cuda"), id="triton-cuda", marks=needs_triton)]

pytestmark = pytest.mark.parametrize("on", DEVICES)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(residuals, "_CHUNK", 8)
    monkeypatch.setattr(choice, "_told", set())


def estimates(cloud, seed=0):
    """Minima of leaves; some need no list, one needs a list of all components, and one is the lowest floating-point number."""
    minima = -5 - 20 * torch.rand(cloud.boxes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    minima[::5], minima[1], minima[2] = math.inf, -math.inf, -1.7e308
    return minima.to(cloud.points.device)


def kept(schedule, components):
    """Whether each component is in the list of each leaf (B, K), for leaves with a list; and their bounds on what was pruned."""
    B = int(schedule.boxes.max()) + 1
    found = torch.zeros(B, components, dtype=torch.bool)
    leaf = schedule.boxes.cpu().repeat_interleave(schedule.pointer.diff().cpu())
    found[leaf, schedule.index.cpu()] = True
    return found


def compare(found, expected, wanted):
    """Compare lists of all leaves with those of the leaves that need one."""
    own = found.pointer.diff()
    assert not own[~wanted].any()
    assert torch.equal(expected.boxes, wanted.nonzero()[:, 0])
    assert torch.equal(own[wanted], expected.pointer.diff())
    assert torch.equal(found.index, expected.index)
    assert found.index.dtype == found.pointer.dtype == torch.int64
    assert found.whole.pairs == expected.pairs
    assert found.whole.longest == int(expected.pointer.diff().max())
    pruned, bound = found.pruned[wanted], expected.pruned
    assert torch.equal(pruned == -math.inf, bound == -math.inf)
    # Where exponentials underflow, the kernel computes an upper bound.
    pruned, bound = pruned.nan_to_num(neginf=0), bound.nan_to_num(neginf=0)
    assert bool((pruned >= bound - 1e-9 * bound.abs()).all())
    assert bool((pruned <= bound + 1e-9 * bound.abs() + math.log(1000.0)).all())


@pytest.mark.parametrize(
    ("family", "D"),
    [
        *(("full", 1), ("full", 2), ("full", 3), ("full", 4), ("tied_full", 3), ("diag", 2), ("diag", 4)),
        *(("tied_diag", 6), ("spherical", 1), ("spherical", 3), ("tied_spherical", 2)),
    ],
)
def test_lists_are_those_of_the_formulas(on, family, D):
    # The interpreter takes seconds for each case.
    for K, epsilon in ((5, 1e-6), (300, 1e-6), (300, None)) if D == 3 else ((300, None if D % 2 else 1e-6),):
        case = make_case(
            family, torch.float32, N=400, K=K, D=D, condition=5.0 if D > 1 else 1.0, spread=10.0, device=on[1]
        )
        cloud = Cloud.tree(case.x, 25)
        assert [len(boxes.center) for boxes in cloud.levels] == [2, 16]
        problem = Exponents.of(cloud.points, *case.arguments[1:])
        tolerance = replace(Tolerance.of(torch.float32, epsilon), give=0.25)
        minima = estimates(cloud)
        expected = lists_of(cloud, problem, minima, tolerance)
        found = lists.candidate_lists(cloud, problem, minima, tolerance)
        compare(found, expected, minima < math.inf)
        torch.testing.assert_close(found.floor, tolerance.floor(found.pruned), rtol=1e-15, atol=0)
        # Two of twelve lists have all components.
        assert K == 5 or len(found.index) < 0.7 * 12 * K


def test_lists_of_groups_of_unequal_sizes(on):
    case = make_case("full", torch.float64, N=300, K=20, D=5, condition=5.0, spread=10.0, device=on[1])
    labels = torch.randint(7, (300,), generator=torch.Generator().manual_seed(0)).clamp(min=2)
    cloud = Cloud.grouped(case.x, labels.to(on[1]), 40)
    assert len(cloud.starts.diff().unique()) > 1
    problem, minima = Exponents.of(cloud.points, *case.arguments[1:]), estimates(cloud)
    tolerance = Tolerance.of(torch.float64, 1e-9)
    compare(
        lists.candidate_lists(cloud, problem, minima, tolerance),
        lists_of(cloud, problem, minima, tolerance),
        minima < math.inf,
    )


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold_in_random_scenes(on, seed):
    """Ties, components of weight zero, scales of many orders, far points and means, and leaves that lie in a point or a line."""
    maker = Maker(1000 + seed)
    D, K, N = int(maker.i(1, 5, 1)), maker.number(1, 300), maker.number(20, 300)
    x, _ = maker.points(N, D)
    offsets, means, U = maker.components(x, K)
    if seed % 3 == 0:
        cloud = Cloud.grouped(x.to(on[1]), maker.i(0, 4, N).to(on[1]), 30)
    else:
        cloud = Cloud.tree(x.to(on[1]), max(1, N // 8))
    problem = Exponents.of(cloud.points, *(part.to(on[1]) for part in (offsets, means, U)))
    e, rounding = brute_force(cloud.points.cpu(), offsets, means, U)
    values, spans = e.logsumexp(1), cloud.starts.tolist()
    least = torch.stack([values[a:b].min() for a, b in pairwise(spans)]).to(on[1])
    for epsilon in (10 ** float(maker.u(-12, -1, 1)), None):
        tolerance = Tolerance.of(torch.float64, epsilon)
        found = lists.candidate_lists(cloud, problem, least, tolerance)
        expected = lists_of(cloud, problem, least, tolerance)
        differences = kept(found, K) ^ kept(expected, K)
        # Margins for rounding differ, since lengths are measured from the centers of other nodes.
        assert int(differences.sum()) <= 1 + 0.01 * differences.numel()
        inside, pruned = kept(found, K), found.pruned.cpu()
        assert bool(inside.any(1).all())
        for leaf, (a, b) in enumerate(pairwise(spans)):
            out = ~inside[leaf]
            if not out.any():
                continue
            lost = e[a:b, out].logsumexp(1) if epsilon is not None else e[a:b, out].amax(1)
            slack = rounding[a:b, out].amax(1) + 1e-12 * lost.abs()
            assert bool((lost <= pruned[leaf] + slack).all())
            limit = float(tolerance.limit(least)[leaf])
            assert pruned[leaf] <= limit + 1e-9 or int(inside[leaf].sum()) <= K // 2 + 1


def test_equal_bounds_below_the_limit(on):
    """Components with the largest bound are kept if all are below the limit, and the others are pruned."""
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(on[1])
    cloud = Cloud.tree(x, 40)
    offsets = torch.zeros(300, dtype=torch.float64, device=on[1])
    offsets[280:] = -0.3
    problem = Exponents.of(cloud.points, offsets, torch.zeros(300, 2, device=on[1]), torch.ones(1, 1, device=on[1]))
    for depth in (3.5, 6.5):
        tolerance = replace(Tolerance.of(torch.float64, None), single=False)
        found, expected = (
            make(cloud, problem, torch.full((1,), depth, dtype=torch.float64, device=on[1]), tolerance)
            for make in (lists.candidate_lists, lists_of)
        )
        assert found.index.tolist() == expected.index.tolist() == list(range(280))


def test_memory_that_does_not_suffice_is_enlarged(on, monkeypatch):
    case = make_case("full", torch.float32, N=800, K=60, D=3, condition=5.0, spread=10.0, device=on[1])
    cloud = Cloud.tree(case.x, 50)
    problem, minima = Exponents.of(cloud.points, *case.arguments[1:]), estimates(cloud)
    tolerance = Tolerance.of(torch.float32, 1e-6)
    expected = lists_of(cloud, problem, minima, tolerance)
    monkeypatch.setattr(lists, "_ROOM_LEAST", 0)
    asked, refined = [], lists._refined
    monkeypatch.setattr(lists, "_refined", lambda *given: (asked.append(given[-1]), refined(*given))[1])
    key = "sizes of lists", 60, False
    for size in (None, 40, 1):
        if size is not None:
            cloud.cache[key] = [size]
        found = lists.candidate_lists(cloud, problem, minima, tolerance)
        compare(found, expected, minima < math.inf)
        assert cloud.cache[key][0] > 40
    assert [rooms is None for rooms in asked] == [True, False, True, False, True]
    monkeypatch.setattr(lists, "_MOST", 100)
    found = lists.candidate_lists(cloud, problem, minima, tolerance)
    assert found.whole is None
    assert torch.equal(found.index, expected.index)


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_checks_of_all_leaves(on, k, weighted, monkeypatch):
    """Values that are NaN, infinite or equal to a floor, in leaves of more points than a program reads at a time."""
    monkeypatch.setattr(lists, "_POINTS", 16)
    case = make_case("full", torch.float32, N=300, K=6, D=2, condition=5.0, spread=10.0, device=on[1])
    cloud = Cloud.tree(case.x, 40)
    problem = Exponents.of(cloud.points, *case.arguments[1:])
    tolerance = Tolerance.of(torch.float32, None if k else 1e-3)
    generator = torch.Generator().manual_seed(3)
    M, B = len(cloud.points), cloud.boxes
    values = -20 * torch.rand(M, max(1, k), generator=generator).sort(1, descending=True).values
    weights = torch.randn(M, generator=generator, dtype=torch.float64).to(on[1]) if weighted else None
    if weighted:
        weights[5], weights[7], weights[9] = 0.0, 1e-30, -1e20
    schedule = lists.candidate_lists(
        cloud, problem, torch.full((B,), -9.0, dtype=torch.float64, device=on[1]), tolerance
    )
    scale = Scale.of(problem)
    for broken in (None, math.nan, -math.inf, -1e38, 1e37):
        values = values.clone()
        if broken is not None:
            values[int(cloud.starts[3]) + 20] = broken
        own = (values if k else values[:, 0]).to(on[1])
        last = scale.nats(own if own.ndim == 1 else own[:, -1])
        truth = torch.stack([last[a:b].min() for a, b in pairwise(cloud.starts)])
        if broken in (-math.inf, -1e38) or (broken is not None and math.isnan(broken)):
            truth[3] = -math.inf
        pruned = truth - torch.linspace(2, 9, B, dtype=torch.float64, device=on[1])
        pruned[1] = -math.inf
        floor = tolerance.floor(pruned)
        floor[4], floor[5] = truth[4], truth[5] - 1
        for short in (False, True):
            if short:
                floor[5] = truth[5] + 1e-9
            given = replace(schedule, pruned=pruned, floor=floor)
            more = torch.arange(k, dtype=torch.float64, device=on[1])
            minima, check, ranges, same = lists.checked(given, own, weights, scale, tolerance, more)
            assert torch.equal(same, more.cpu())
            torch.testing.assert_close(minima, truth, rtol=1e-15, atol=0)
            low = tolerance.lower(truth)
            torch.testing.assert_close(check.low, low, rtol=1e-15, atol=0)
            assert check.failed == (not bool(given.good(truth).all()))
            lost = torch.where(pruned > -math.inf, pruned - low, -math.inf).max()
            assert check.lost == pytest.approx(float(lost), rel=1e-12) or math.isnan(lost)
            first = own if own.ndim == 1 else own[:, 0]
            least = first.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf).min()
            assert ranges[0] == float(least)
            assert ranges[1] == float(first[~first.isnan()].max())
            assert ranges[4] == float(scale.middle)
            if weighted:
                assert ranges[2:4] == [1e-30, 1e20]


def scene(on, family, D, dtype=torch.float32):
    """Components in a few clusters that are far from one another, so that most pairs are negligible."""
    generator = torch.Generator().manual_seed(D)
    case = make_case(family, dtype, N=20, K=12, D=D, condition=5.0, spread=1.0, device=on[1])
    centers = 60 * torch.arange(4, dtype=torch.float64)[:, None] * torch.linspace(1, 0.2, D, dtype=torch.float64)
    means = centers[torch.arange(12) % 4] + torch.randn(12, D, generator=generator, dtype=torch.float64)
    x = means[torch.randint(12, (121,), generator=generator)]
    x = x + torch.randn(121, D, generator=generator, dtype=torch.float64)
    return type(case)(x.to(on[1], dtype), case.offsets, means.to(on[1], dtype), case.factor)


REQUESTS = {
    "logsumexp": lambda g: LogSumExp(),
    "argmax": lambda g: Argmax(),
    "topk": lambda g: TopK(2),
    "moments": lambda g: Statistics(),
    "weighted": lambda g: Statistics(g),
    "values": lambda g: Statistics(g, values=True),
    "on_cpu": lambda g: Statistics(g, on_cpu=True),
    "far": lambda g: Statistics(g, on_cpu=True),
    "hard": lambda g: Statistics(g, assignment="hard"),
    "gradient": lambda g: PointGradient(g, values=True),
}


# Variants of requests that are tested anyway, on the interpreter.
SLOW, SLOWER = pytest.mark.slow, ("values", "weighted", "topk")


@pytest.mark.parametrize(
    ("family", "D", "dtype", "kind"),
    [pytest.param("full", 3, torch.float32, kind, marks=SLOW if kind in SLOWER else ()) for kind in REQUESTS]
    + [("tied_diag", 2, torch.float32, "far"), ("spherical", 4, torch.float64, "moments")],
)
def test_passes_with_lists(on, family, D, dtype, kind):
    """Estimates that are right, and so high that some or all lists are too short and their leaves are evaluated again."""
    case = scene(on, family, D, dtype)
    if kind == "far":
        # Squares of this row overflow in float32, so that the dense engine evaluates it.
        case.x[7] = 1e20
    cloud = Cloud.tree(case.x, 20)
    problem = Exponents.of(cloud.points, *case.arguments[1:])
    g = torch.rand(len(cloud.points), generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(on[1])
    request = REQUESTS[kind](g)
    expected = [part.cpu() for part in evaluate(triton, problem, request)]
    values = evaluate(dense, problem, TopK(request.rank) if request.rank else LogSumExp())[0].view(len(g), -1)[:, -1]
    least = torch.stack([values[a:b].min() for a, b in pairwise(cloud.starts)]).double()
    blocks = Truncation(cloud, 1e-9)
    high = least + torch.where(torch.arange(len(least)) % 3 == 0, 1e4, 0.0).to(on[1])
    for estimate in (least, None, high, least + 1e4):
        if estimate is not None:
            blocks.minima = estimate
        found = evaluate(triton, problem, request, blocks)
        # Moments that may be on the CPU are on the device of the points if some rows are far or some lists were too short.
        places = {part.device.type for part in found}
        assert places == {on[1]} or (places == {"cpu"} and kind in ("on_cpu", "far"))
        assert 0 < blocks.share < (0.5 if estimate is least or estimate is None else 2)
        assert 0 <= blocks.certificate <= 1.0001e-9
        usual = least > -1e30
        assert bool((blocks.minima[~usual] == -math.inf).all())
        torch.testing.assert_close(blocks.minima[usual], least[usual], rtol=1e-5, atol=1e-5)
        # The log-density of the far row is beyond the range of float32.
        for part, truth in zip(found[: 3 if kind == "far" else None], expected, strict=kind != "far"):
            if part.dtype == torch.int64:
                assert torch.equal(part.cpu(), truth)
            else:
                scale = float(truth.abs().max())
                torch.testing.assert_close(part.cpu(), truth, rtol=1e-6, atol=2e-6 * scale)


def test_sums_over_lists_are_computed_in_slabs(on, monkeypatch):
    """With pieces of few chunks, and with all of them in one piece, for whose size there is a bound."""
    monkeypatch.setattr(residuals, "_CHUNK", 7)
    case = scene(on, "diag", 3)
    cloud = Cloud.tree(case.x, 20)
    problem = Exponents.of(cloud.points, *case.arguments[1:])
    made, add_up = [], partial.add_up
    monkeypatch.setattr(partial, "add_up", lambda part, *rest: (made.append(part.shape[1]), add_up(part, *rest)))
    evaluate(triton, problem, Statistics())
    results, columns = [], []
    for slab, chunks in ((1 << 26, 65_535), (600, 65_535), (1 << 26, 5)):
        monkeypatch.setattr(partial, "SLAB", slab)
        monkeypatch.setattr(partial, "MOST_CHUNKS", chunks)
        blocks = Truncation(cloud, 1e-9, minima=torch.full((cloud.boxes,), -20.0, dtype=torch.float64, device=on[1]))
        made.clear()
        results.append(evaluate(triton, problem, Statistics(), blocks))
        assert (len(made) == 1) == (slab > 600 and chunks > 5)
        columns.append(sum(made))
    assert columns[0] >= columns[1] == columns[2]
    for found in results[1:]:
        for part, truth in zip(found, results[0], strict=True):
            torch.testing.assert_close(part, truth, rtol=1e-12, atol=1e-12)
