"""The certificate of truncation holds for every point of random and adversarial scenes, against float64 brute force."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import gmmkeops as gk

EPSILONS = (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.1, 0.5)
EPS64 = torch.finfo(torch.float64).eps


@dataclass
class Scene:
    """Points, and the parameters of the components in one sweep after another."""

    x: torch.Tensor
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    epsilon: float
    weights: torch.Tensor | None
    labels: torch.Tensor | None
    k: int
    kind: str


class Maker:
    """Random numbers of one scene."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def u(self, low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def n(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def i(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def pick(self, options):
        return options[int(self.i(0, len(options), 1))]

    def chance(self, p):
        return float(self.u(0, 1, 1)) < p

    def number(self, low, high):
        """A whole number, even on a logarithmic scale."""
        return int(math.exp(float(self.u(math.log(low), math.log(high + 1), 1))))

    def points(self, N, D):
        kind = self.pick(["clusters", "nested", "one", "grid", "tails", "line", "equal"])
        if kind == "clusters":
            m = self.number(1, 30)
            centers = self.n(m, D) * 10 ** float(self.u(0, 2, 1))
            scale = 10 ** self.u(-1, 1, m, 1) if self.chance(0.5) else torch.ones(m, 1, dtype=torch.float64)
            label = self.i(0, m, N)
            x = centers[label] + scale[label] * self.n(N, D)
        elif kind == "nested":
            m = self.number(2, 8)
            label = self.i(0, m, N)
            x = (self.n(m, D) * 10 ** self.u(-8, 8, m, 1))[label] + self.n(N, D) * 10 ** self.u(-8, 8, m, 1)[label]
        elif kind == "one":
            x = self.n(N, D)
        elif kind == "grid":
            x = self.i(-3, 4, N, D).double()
        elif kind == "tails":
            x = self.n(N, D) / self.n(N, 1).abs().clamp(min=1e-9)
        elif kind == "line":
            x = self.n(N, 1) * self.n(1, D) + 1e-6 * self.n(1, D)
        else:
            x = self.n(1, D).expand(N, D).clone()
        if self.chance(0.3):
            few = self.i(0, N, self.number(1, 5))
            x[few] = self.n(len(few), D) * 10 ** self.u(0, 10, len(few), 1)
        if self.chance(0.2):
            x[self.i(0, N, N // 2 + 1)] = x[0].clone()
        if self.chance(0.15):
            x = x + self.n(1, D) * 10 ** float(self.u(3, 8, 1))
        if self.chance(0.15):
            x = x * 10 ** float(self.u(-8, 8, 1))
        return x, kind

    def factors(self, K, D, spread):
        """U (K or 1, ...), by the spread of the points."""
        tied = self.chance(0.25)
        lead = 1 if tied else K
        scale = spread * 10 ** (self.u(-3, 0, lead) if self.chance(0.7) else self.u(-8, 3, lead))
        family = self.pick(["full", "diagonal", "spherical"])
        if family == "spherical":
            return 1 / scale[:, None]
        U = 10 ** self.u(-1, 1, lead, D) / scale[:, None]
        if family == "full":
            U = torch.linalg.qr(self.n(lead, D, D))[0] * U[:, None, :]
            if self.chance(0.5):
                U = torch.linalg.qr(U)[1].mT.contiguous()
        return U

    def components(self, x, K):
        N, D = x.shape
        middle = x.median(0).values
        spread = float((x - middle).abs().median(0).values.max())
        spread = spread if spread > 0 else max(1e-3 * float(middle.abs().max()), 1e-6)
        means = x[self.i(0, N, K)] + spread * 0.3 * self.n(K, D)
        if self.chance(0.3):
            far = self.i(0, K, self.number(1, max(1, K // 2)))
            means[far] = middle + spread * self.n(len(far), D) * 10 ** self.u(0, 8, len(far), 1)
        if self.chance(0.2):
            means[self.i(0, K, self.number(1, K))] = means[0].clone()
        offsets = self.n(K)
        if self.chance(0.3):
            offsets = -self.u(0, 10 ** float(self.u(0, 2.8, 1)), K)
        elif self.chance(0.2):
            offsets = torch.zeros(K, dtype=torch.float64)
        if self.chance(0.15) and K > 1:
            offsets[self.i(0, K, K // 2)] = -math.inf
        U = self.factors(K, D, spread)
        return offsets, means, U

    def moved(self, x, step, few):
        """Parameters after a move: slight, of a few components far, of shapes or of weights."""
        offsets, means, U = step
        K, D = means.shape
        size = self.size(U, K)
        kind = self.pick(["slight", "slight", "slight", "approach", "approach", "far", "swell", "weights"])
        if kind == "slight":
            means = means + size[:, None] * 10 ** float(self.u(-5, -1.5, 1)) * self.n(K, D)
        elif kind == "approach":
            toward = x[self.i(0, len(x), len(few))] - means[few]
            distance = toward.norm(dim=1, keepdim=True).clamp(min=1e-300)
            stride = torch.minimum(size[few][:, None] * self.u(0.5, 6, len(few), 1), distance)
            means = means.clone()
            means[few] += toward / distance * stride
        elif kind == "far":
            means = means.clone()
            means[few] = x[self.i(0, len(x), len(few))]
        elif kind == "swell":
            U = U * torch.exp(10 ** float(self.u(-4, 0.5, 1)) * self.n(len(U))).view(-1, *[1] * (U.ndim - 1))
        else:
            offsets = offsets + 10 ** float(self.u(-4, 2, 1)) * self.n(K)
        return offsets, means, U

    @staticmethod
    def size(U, K):
        """Length of one standard deviation of each component (K,), in the direction where it is least."""
        return 1 / U.flatten(1).norm(dim=1).expand(K)

    def lonely(self, N, D):
        """Tight clusters, and a few points so far from them that no sample of a box knows of them."""
        x = self.n(1, D) + 10 ** float(self.u(-3, -1, 1)) * self.n(N, D)
        few = self.i(0, N, self.number(1, 2))
        x[few] = self.n(1, D) * 10 ** self.u(1, 2.5, len(few), 1)
        return x, "lonely"

    def scattered(self, x, K):
        """Components in all directions, of which few are near the points."""
        D = x.shape[1]
        means = self.n(K, D) * 10 ** self.u(1, 2.5, K, 1)
        near = self.i(0, K, 1)
        means[near] = x.median(0).values
        scale = 10 ** self.u(-1.5, 0.5, K)
        scale[near] = 10 ** self.u(-3, -1, len(near))
        offsets = -D * scale.log() + self.n(K)
        return (
            offsets,
            means,
            torch.linalg.qr(self.n(K, D, D))[0] * 10 ** self.u(-0.3, 0.3, K, 1, D) / scale[:, None, None],
        )

    def creeping(self, N):
        """Components that rest, but for one that comes nearer, grows or gains weight by steps a few times as long as the last."""
        D, K = int(self.i(1, 4, 1)), int(self.i(120, 301, 1))
        x = 10 ** float(self.u(-2, 0.5, 1)) * self.n(N, D)
        means = self.n(K, D)
        away = 1 + torch.arange(2 * K // 3)
        means[away] = 10 ** self.u(1.5, 3, len(away), 1) * torch.nn.functional.normalize(self.n(len(away), D), dim=1)
        lead = 1 if self.chance(0.2) else K
        U = torch.linalg.qr(self.n(lead, D, D))[0] * 10 ** self.u(-0.3, 0.3, lead, 1, D)
        kind = self.pick(["full", "diagonal", "spherical"])
        U = U if kind == "full" else U[:, 0].abs() + 0.1 if kind == "diagonal" else 10 ** self.u(-0.3, 0.3, lead, 1)
        own = U[0] if kind == "full" else (U[0].expand(D) * torch.ones(D, dtype=torch.float64)).diag()
        unit = torch.linalg.solve(own.mT, torch.nn.functional.normalize(self.n(1, D), dim=1)[0])
        what = self.pick(["nearer", "nearer", "heavier", "larger"]) if lead > 1 else "nearer"
        stride = float(self.u(1, 6, 1))
        place = float(self.u(3, 6, 1)) * stride + float(self.u(0, 8, 1))
        offsets, steps = self.n(K), []
        far = [place + stride, place, *(place - stride * self.u(0.2, 4, int(self.i(1, 4, 1)))).tolist()]
        for distance in far:
            means, offsets, U = means.clone(), offsets.clone(), U.clone()
            if what == "larger":
                means[0] = x[0] + unit * place
                U[0] = (own if kind == "full" else own.diagonal()[: U.shape[1]]) * max(distance, 0.1) / place
            elif what == "heavier":
                means[0] = x[0] + unit * place
                offsets[0] = -distance * place
            else:
                means[0] = x[0] + unit * distance
            steps.append((offsets, means, U))
        return x, steps

    def scene(self):
        D = self.number(1, 8) if self.chance(0.5) else int(self.i(1, 4, 1))
        K = self.number(1, 300) if self.chance(0.4) else int(self.i(50, 301, 1))
        # Boxes have at least 512 points: few points are one box, some are two, and a tree of several levels is rare.
        N = self.number(1, 300) if self.chance(0.75) else int(self.i(1025, 1100, 1))
        if self.chance(0.004):
            D, K, N = min(D, 3), min(K, 80), 16_500
        x, kind = self.points(N, D)
        dtype = torch.float32 if self.chance(0.3) else torch.float64
        if self.chance(0.2):
            D, K, N = max(D, 2), self.number(2, 8), max(N, 30)
            x, kind = self.lonely(N, D)
            steps = [self.scattered(x, K)]
        elif self.chance(0.15):
            x, steps = self.creeping(N)
            D, K, kind = x.shape[1], len(steps[0][1]), "creeping"
        else:
            steps = [self.components(x.to(dtype).double(), K)]
        x = x.to(dtype)
        few = self.i(0, K, max(1, K // 60))
        if kind != "creeping" and self.chance(0.3):
            # A few components that come nearer to the data step by step, from a few deviations away.
            offsets, means, U = steps[0]
            means = means.clone()
            away = self.n(len(few), D)
            away = away / away.norm(dim=1, keepdim=True)
            far = self.size(U, K)[few][:, None] * self.u(4, 30, len(few), 1)
            means[few] = x.double()[self.i(0, N, len(few))] + far * away
            steps[0] = offsets, means, U
        for _ in range(0 if kind == "creeping" else int(self.i(0, 6, 1))):
            steps.append(self.moved(x.double(), steps[-1], few))
        weights = None
        if self.chance(0.4):
            weights = 10 ** self.u(-6, 6, N) * (self.u(0, 1, N) < 0.8)
            weights[0] = 1.0
        labels = self.i(0, min(K, 4), N) if D > 4 and self.chance(0.5) else None
        return Scene(x, steps, self.pick(EPSILONS), weights, labels, min(K, self.number(1, 5)), kind)


def brute_force(x, offsets, means, U):
    """Exponents (N, K), and what rounding of the points may change of each, nats."""
    x, K = x.double(), len(means)
    z = x[:, None] - means
    full = U.expand(K, *U.shape[1:])
    y = torch.einsum("kde,nkd->nke", full, z) if U.ndim == 3 else z * full
    e = offsets.clamp(min=-1e30) - 0.5 * y.square().sum(-1)
    size = full.flatten(1).norm(dim=1)
    near = size * (x.norm(dim=1)[:, None] + means.norm(dim=1) + means.median(0).values.norm())
    rounding = 32 * EPS64 * near * (y.norm(dim=-1) + 32 * EPS64 * near)
    return e, rounding + 8 * EPS64 * offsets.clamp(min=-1e30).abs()


def violations(seed):
    """What is wrong in a scene (nothing, one hopes), and how many of its sweeps left something out."""
    scene = Maker(seed).scene()
    x, dtype, epsilon = scene.x, scene.x.dtype, scene.epsilon
    labels = None if scene.labels is None else lambda: scene.labels
    cloud = gk.reductions.arrange(x, len(scene.steps[0][1]), epsilon, labels=labels)
    assert isinstance(cloud, gk.reductions.Truncation)
    g = torch.ones(len(x), dtype=torch.float64) if scene.weights is None else scene.weights
    bound = -math.log1p(-epsilon)
    wrong, active = [], 0

    def expect(truth, number, what):
        if not truth:
            wrong.append(f"seed {seed} ({scene.kind}, {dtype}), step {number}: {what}")

    for number, step in enumerate(scene.steps):
        e, rounding = brute_force(x, *step)
        truth = e.logsumexp(1)
        values = gk.reductions.logsumexp(cloud, *step, backend="dense").double()
        active += cloud.share < 1
        certificate = cloud.certificate
        expect(0 <= certificate <= bound * (1 + 1e-9), number, f"certificate {certificate} above {bound}")
        if dtype == torch.float64:
            share = (e - truth[:, None]).exp()
            slack = 1e-10 * truth.abs().clamp(min=1) + (share * rounding).sum(1)
        else:
            truth = gk.reductions.logsumexp(x, *step, backend="dense", truncate=0).double()
            slack = 4e-6 * truth.abs().clamp(min=1)
        lost = truth - values
        expect(bool((lost >= -slack).all()), number, f"ℓ too large by {float(-lost.min())}")
        expect(bool((lost <= certificate + slack).all()), number, f"ℓ too small by {float(lost.max())} > {certificate}")
        if number % 2 == seed % 2:
            problems = _others(scene, cloud, step, e, rounding, g, bound)
            for problem in problems:
                expect(False, number, problem)
    return wrong, active, len(scene.steps)


def _others(scene, cloud, step, e, rounding, g, bound):
    """What is wrong with the labels, the largest exponents and the moments."""
    x, k = scene.x, scene.k
    single = x.dtype == torch.float32
    # float32: what rounding of the engine may do to an exponent, which is another test's question.
    slack = rounding + (1e-4 if single else 1e-12) * e.abs().clamp(min=1)
    if single:
        near = step[2].flatten(1).norm(dim=1) * (x.double().norm(dim=1)[:, None] + step[1].norm(dim=1))
        slack = slack + 1e-9 * near**2
    label = gk.reductions.argmax(cloud, *step, backend="dense")
    best = e.max(1)
    chosen = label[:, None]
    room = slack.gather(1, chosen)[:, 0] + slack.gather(1, best.indices[:, None])[:, 0]
    if bool((e.gather(1, chosen)[:, 0] < best.values - room).any()):
        yield "argmax is not the largest"
    found, index = gk.reductions.topk(cloud, *step, k, backend="dense")
    expected = e.topk(k, dim=1)
    room = slack.gather(1, index) + slack.gather(1, expected.indices)
    # Engines limit float32 exponents to the range of their dtype.
    limit = 2.9e38 if single else math.inf
    if bool(((found.double().clamp(min=-limit) - expected.values.clamp(min=-limit)).abs() > room).any()):
        yield "topk differs"
    if any(len(row.unique()) < k for row in index[:20]):
        yield "topk repeats a component"
    if single:
        return
    sums = gk.reductions.moments(cloud, *step, weights=scene.weights, backend="dense")
    values = e.logsumexp(1)
    r = (e - values[:, None]).exp()
    # A responsibility changes by less than ε, and by what rounding does to its exponent.
    rounded = (r * (2 * (slack + (r * slack).sum(1, keepdim=True))).expm1()).clamp(max=1.0)
    change = g[:, None] * (math.expm1(bound) + rounded.nan_to_num(nan=1.0))
    z = x.double()[:, None] - step[1]
    about = (x.double().norm(dim=1)[:, None] + step[1].norm(dim=1) + step[1].median(0).values.norm()) * 1e-13
    far = z.norm(dim=-1)
    weighted = g[:, None] * r
    pairs = [
        (sums.S0, weighted.sum(0), change.sum(0)),
        (sums.S1, torch.einsum("nk,nkd->kd", weighted, z), ((change * far) + weighted * about).sum(0)[:, None]),
    ]
    square = torch.einsum("nk,nkd,nke->kde", weighted, z, z)
    shape = sums.S2.shape
    square = square if len(shape) == 3 else square.diagonal(dim1=1, dim2=2)
    square = square if len(shape) > 1 else square.sum(1)
    size = (
        weighted * (x.double().norm(dim=1)[:, None] + step[1].norm(dim=1) + step[1].median(0).values.norm()) ** 2
    ).sum(0)
    room = (change * far**2).sum(0) + 1e-13 * size
    pairs.append((sums.S2, square.reshape(shape), room.view(-1, *[1] * (len(shape) - 1))))
    for name, (a, b, allowed) in zip(("S0", "S1", "S2"), pairs, strict=True):
        if bool(((a - b).abs() > allowed + 1e-12 * b.abs() + 1e-300).any()):
            yield f"{name} differs by {float(((a - b).abs() - allowed).max())} more than truncation may change it"
    lost = float(g @ values - sums.total)
    most = float(g @ (bound + 1e-10 * values.abs().clamp(min=1) + (r * rounding).sum(1)))
    if not -most + bound * float(g.sum()) * (1 - 1e-9) <= lost + bound * float(g.sum()) and lost <= most:
        yield f"the total is wrong by {lost}"


def search(first, count):
    wrong, active, sweeps = [], 0, 0
    for seed in range(first, first + count):
        bad, some, steps = violations(seed)
        wrong += bad
        active, sweeps = active + some, sweeps + steps
    return wrong, active / sweeps


def test_three_hundred_scenes():
    wrong, active = search(0, 300)
    assert not wrong, "\n".join(wrong)
    # Scenes prove little where nothing is left out.
    assert active > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_hundred_thousand_scenes(part):
    """About 70 minutes in all on one core."""
    wrong, _ = search(1000 + 5000 * part, 5000)
    assert not wrong, "\n".join(wrong[:20])


def test_a_far_point_whose_component_no_sample_knows_of():
    """The point's density is all of the second component, whose mean is the square root of 100² + 60² away."""
    x = 0.02 * torch.randn(4001, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[-1] = torch.tensor([100.0, 0.0, 0.0])
    mixture = gk.Mixture.from_parameters([0.4, 0.6], [[0.0, 0.0, 0.0], [0.0, 60.0, 0.0]], [0.02**2, 0.25], "spherical")
    expected = math.log(0.6) - 1.5 * math.log(2 * math.pi * 0.25) - 0.5 * (100**2 + 60**2) / 0.25
    assert float(mixture.log_prob(x, truncate=1e-6)[-1]) == pytest.approx(expected, rel=1e-12)


def test_many_dimensions_are_not_sorted_on_a_cpu():
    """Bounds over leaves would take much longer there than every pair."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert torch.is_tensor(gk.reductions.arrange(x, 64, 1e-4))
    assert not torch.is_tensor(gk.reductions.arrange(x[:, :4], 64, 1e-4))
    mixture = gk.Mixture.from_parameters(torch.full((64,), 1 / 64), x[:64], torch.ones(64, 64), "diag")
    assert torch.equal(mixture.log_prob(x, truncate=1e-4), mixture.log_prob(x, truncate=0))
