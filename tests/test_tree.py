"""The compiled kd-tree: its order is that of torch with any number of threads, and its boxes contain their points."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import interrupted, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st

from gmmkeops import reductions
from gmmkeops.reductions.truncation import tree
from gmmkeops.reductions.truncation.tree import Boxes, Cloud

pytestmark = needs_native
ROOT = Path(__file__).parent.parent


def points(kind, N, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(N, D, generator=generator, dtype=torch.float64)
    match kind:
        case "random":
            return normal
        case "far":
            return normal + 1e7
        case "grid":
            return torch.randint(-2, 3, (N, D), generator=generator).double()
        case "few":
            return normal[torch.randint(min(N, 7), (N,), generator=generator)]
        case "equal":
            return normal[:1].expand(N, D).clone()
        case "line":
            return normal[:, :1] * torch.randn(1, D, generator=generator, dtype=torch.float64)
        case "sorted":
            return normal.sort(0).values
        case "periodic":
            # The sampled rows of a node are all in one half of it.
            return normal + 100.0 * (torch.arange(N) % 64 != 0)[:, None]
        case "scales":
            return normal * 10.0 ** torch.linspace(-100, 30, D, dtype=torch.float64)
    raise AssertionError(kind)


KINDS = ("random", "far", "grid", "few", "equal", "line", "sorted", "periodic", "scales")


def by_torch(monkeypatch, make):
    """A cloud by the code that runs without the library."""
    with monkeypatch.context() as patch:
        patch.setattr(tree, "unavailable", lambda: "the code in torch is asked for")
        return make()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_order_is_that_of_torch(kind, D, dtype, monkeypatch):
    for N, rows in ((1, 4), (7, 2), (1000, 16), (9001, 200), (40_000, 3000)):
        x = points(kind, N, D).to(dtype)
        found = Cloud.tree(x, rows)
        expected = by_torch(monkeypatch, lambda x=x, rows=rows: Cloud.tree(x, rows))
        assert torch.equal(found.rank, expected.rank)
        assert torch.equal(found.points, expected.points)
        assert torch.equal(found.starts, expected.starts)
        assert [len(level.reach) for level in found.levels] == [len(level.reach) for level in expected.levels]


def test_ties_are_split_by_their_order(monkeypatch):
    """Points that are equal along the axis keep their order, also across the halves."""
    x = torch.tensor([[2.0], [1.0], [2.0], [0.0], [2.0], [2.0], [2.0], [9.0]])
    make = lambda: Cloud.tree(x, 4)  # noqa: E731
    for cloud in (make(), by_torch(monkeypatch, make)):
        assert cloud.points[:, 0].tolist() == [2, 1, 2, 0, 2, 2, 2, 9]
        assert cloud.rank.tolist() == list(range(8))
    # A node whose variances are equal in all directions is split along the first coordinate.
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    for cloud in (Cloud.tree(x, 2), by_torch(monkeypatch, lambda: Cloud.tree(x, 2))):
        assert cloud.rank.tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("N", [12, 20, 28, 100, 900])
def test_rounding_does_not_choose_the_axis(N, monkeypatch):
    """Points on a circle have equal variances in all directions, up to rounding."""
    angle = 2 * torch.pi * torch.arange(N, dtype=torch.float64) / N
    x = torch.stack([angle.cos(), angle.sin()], 1) + 5
    assert torch.equal(Cloud.tree(x, N // 2).points[: N // 2, 0] <= 5 + 1e-12, torch.ones(N // 2, dtype=torch.bool))
    for rows in (N // 2, N // 4):
        expected = by_torch(monkeypatch, lambda rows=rows: Cloud.tree(x, rows))
        assert torch.equal(Cloud.tree(x, rows).rank, expected.rank)


@pytest.mark.parametrize("kind", ["random", "grid", "periodic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_threads_gives_the_same_bits(kind, dtype, threads):
    x = points(kind, 400_001, 3).to(dtype)
    labels = torch.randint(40, (len(x),), generator=torch.Generator().manual_seed(0))
    clouds = []
    for count in (1, 2, 3, 7):
        threads(count)
        clouds.append((Cloud.tree(x, 1000), Cloud.grouped(x, labels, 1000)))
    for pair in clouds[1:]:
        for found, expected in zip(pair, clouds[0], strict=True):
            assert torch.equal(found.rank, expected.rank)
            for a, b in zip(found.levels, expected.levels, strict=True):
                assert all(torch.equal(p, q) for p, q in zip(a.tensors, b.tensors, strict=True))


def check_boxes(cloud):
    """Every level contains its points up to rounding, in the box and in the ellipsoid; axes are orthonormal."""
    for boxes in cloud.levels:
        step = cloud.boxes // len(boxes.reach)
        for node in range(len(boxes.reach)):
            # Lengths are in units of the reach, so that squares stay in the range of float64.
            unit, axes, room = boxes.reach[node].clamp(min=1e-300), boxes.axes[node], 1e-14
            part = cloud.points[cloud.starts[node * step] : cloud.starts[(node + 1) * step]].double()
            z = part / unit - boxes.center[node] / unit
            t = (z @ axes).abs()
            assert bool((t <= boxes.half[node] / unit + room).all())
            semi = (boxes.semi[node] / unit).clamp(min=1e-300)
            assert bool(((t - room).clamp(min=0) / semi).square().sum(1).le(1 + 1e-12).all())
            assert bool((z.norm(dim=1) <= 1 + room).all())
            assert torch.allclose(axes.mT @ axes, torch.eye(len(axes), dtype=torch.float64), rtol=0, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_boxes_contain_their_points(data):
    kind, D = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([1, 2, 3, 4, 5, 9]))
    N, rows = data.draw(st.integers(1, 700)), data.draw(st.integers(2, 200))
    x = points(kind, N, D, data.draw(st.integers(0, 1000))) * 10.0 ** data.draw(st.integers(-30, 30))
    x = x.to(data.draw(st.sampled_from([torch.float32, torch.float64]))).clamp(-3e38, 3e38)
    check_boxes(Cloud.tree(x, rows))
    labels = torch.arange(N) * 7919 % 5
    check_boxes(Cloud.grouped(x, labels, rows))


def test_sizes_beyond_the_range_of_squares():
    x = points("random", 3000, 3)
    for scale in (1e-200, 1e200, 1e300):
        cloud = Cloud.tree(scale * x, 100)
        check_boxes(cloud)
        assert bool((cloud.levels[-1].half.amax(1) < 2 * scale).all())


@pytest.mark.parametrize("D", [1, 2, 3, 4, 8])
def test_boxes_are_as_tight_as_those_of_torch(D):
    """Nodes of random points have one principal frame, so that all numbers agree up to the order and signs of the axes."""
    x = points("random", 30_000, D) @ torch.diag(1.5 ** torch.arange(D).double())
    labels = torch.randint(20, (len(x),), generator=torch.Generator().manual_seed(0))
    for cloud in (Cloud.tree(x, 900), Cloud.grouped(x, labels, 900)):
        for boxes in cloud.levels:
            nodes = cloud.starts[:: cloud.boxes // len(boxes.reach)].tolist()
            parts = [Boxes.of(cloud.points[a:b][None]) for a, b in pairwise(nodes)]
            expected = Boxes(*(torch.cat(parts) for parts in zip(*(part.tensors for part in parts), strict=True)))
            match = (expected.axes.mT @ boxes.axes).abs().round()
            assert bool((match.sum(1) == 1).all())
            for name in ("half", "semi"):
                own = (match @ getattr(boxes, name)[..., None])[..., 0]
                assert torch.allclose(own, getattr(expected, name), rtol=1e-6)
            assert torch.allclose(boxes.center, expected.center, atol=1e-6)
            assert torch.allclose(boxes.reach, expected.reach, rtol=1e-6)


def test_memory_of_other_shapes():
    """Points that are not contiguous, and leaves of one point."""
    x = points("random", 500, 6)
    assert torch.equal(Cloud.tree(x[::2, 1::2], 30).rank, Cloud.tree(x[::2, 1::2].contiguous(), 30).rank)
    cloud = Cloud.tree(x[:8, :3], 1)
    assert cloud.boxes == 8
    check_boxes(cloud)


def test_interruption_within_a_second():
    x = torch.rand(20_000_000, 3, generator=torch.Generator().manual_seed(0))
    interrupted(lambda: Cloud.tree(x, 50), 0.2)
    assert Cloud.tree(x[:1000], 50).boxes == 32


def test_too_little_memory():
    script = """
import resource, torch, gmmkeops as gk
x = torch.rand(4_000_000, 3)
gk.reductions.arrange(x[:10_000], 100, 1e-6)
size = int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 100 * 2**20, -1))
try:
    gk.reductions.arrange(x, 1000, 1e-6)
except MemoryError as error:
    print(error)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "There is not enough memory to sort 4000000 points in 3 dimensions into kd-tree leaves.\n"


def test_arranged_points_use_the_library(monkeypatch):
    calls = []
    monkeypatch.setattr(tree, "run", lambda *arguments, **options: calls.append(arguments[0]) or 0)
    reductions.arrange(points("random", 3000, 2), 10, 1e-6)
    assert calls == ["gmmkeops_tree"]


@pytest.mark.parametrize("D", [1, 2, 3, 4, 48])
def test_principal_axes_by_powers_of_matrices(D):
    generator = torch.Generator().manual_seed(D)
    z = torch.randn(50, 100, D, generator=generator, dtype=torch.float64)
    matrices = z.mT @ z
    # Equal variances, but for the term that decides between them; and points that are all equal.
    small = tree._PREFERRED * torch.arange(D, 0, -1, dtype=torch.float64).diag()
    matrices = torch.cat([matrices, 100 * torch.eye(D, dtype=torch.float64)[None], torch.zeros(1, D, D)]) + small
    found, expected = tree._by_powers(matrices), torch.linalg.eigh(matrices)[1][:, :, -1]
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(52, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(52, dtype=torch.float64))
