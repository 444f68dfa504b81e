"""Second derivatives of log-densities, torch.func, and what third derivatives say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, PEAK, make_case, needs_keops
from torch.autograd.functional import hessian

import gmmkeops as gk
from gmmkeops import reductions

# torch.func's forward mode uses a deprecated part of torch when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

# backend and truncation of a call, and whether the points are arranged before.
CALLS = [
    pytest.param({}, False, id="dense"),
    pytest.param({"truncate": 1e-13}, False, id="truncated"),
    pytest.param({}, True, id="arranged"),
    pytest.param({"backend": "keops"}, False, id="keops", marks=needs_keops),
]


def plain(x, offsets, means, U):
    """The log-sum-exp written out, from torch's own operations."""
    z = x[:, None] - means
    y = torch.einsum("kde,nkd->nke", U.expand(len(means), -1, -1), z) if U.ndim == 3 else U * z
    return torch.logsumexp(offsets - 0.5 * y.square().sum(-1), 1)


def problem(family, **options):
    case = make_case(family, torch.float64, condition=20.0, **{"N": 6, "K": 3, "D": 2, **options})
    return [t.detach() for t in (case.x, case.offsets, case.means, case.factor.U)]


def second(function, tensors, generator):
    """Gradients in all tensors of a random combination of the first gradients of a nonlinear function of the values."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    values = function(*leaves)
    first = torch.autograd.grad((values * values.sin()).sum(), leaves, create_graph=True)
    draws = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in first]
    return torch.autograd.grad(sum((a.double() * b).sum() for a, b in zip(first, draws, strict=True)), leaves)


def close(got, expected, tolerance):
    return all(
        float((a.double() - b.double()).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize(("options", "arranged"), CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives(family, options, arranged):
    """Reverse over reverse, all mixed partial derivatives at once."""
    tensors = problem(family, N=40, D=3)
    if arranged:
        x, tensors = tensors[0], tensors[1:]
        cloud = reductions.arrange(x, 3, 1e-13)
        right = second(lambda *t: plain(x, *t), tensors, torch.Generator().manual_seed(1))
        got = second(lambda *t: reductions.logsumexp(cloud, *t), tensors, torch.Generator().manual_seed(1))
    else:
        right = second(plain, tensors, torch.Generator().manual_seed(1))
        got = second(lambda *t: reductions.logsumexp(*t, **options), tensors, torch.Generator().manual_seed(1))
    assert close(got, right, 1e-9)


@pytest.mark.parametrize(("options", "arranged"), CALLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_second_derivatives_of_totals(weighted, options, arranged):
    x, *tensors = problem("full", N=40, D=3)
    g = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if weighted else None
    points = reductions.arrange(x, 3, 1e-13) if arranged else x
    ours = second(
        lambda *t: reductions.total(points, *t, weights=g, **options), tensors, torch.Generator().manual_seed(1)
    )
    right = second(lambda *t: (plain(x, *t) * (1 if g is None else g)).sum(), tensors, torch.Generator().manual_seed(1))
    assert close(ours, right, 1e-9)
    if weighted:
        # The weights are arguments like the others.
        ours = second(
            lambda g, *t: reductions.total(points, *t, weights=g, **options),
            [g, *tensors],
            torch.Generator().manual_seed(1),
        )
        right = second(lambda g, *t: (plain(x, *t) * g).sum(), [g, *tensors], torch.Generator().manual_seed(1))
        assert close(ours, right, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradgradcheck(family):
    leaves = [t.requires_grad_() for t in problem(family, N=3)]
    assert torch.autograd.gradgradcheck(reductions.logsumexp, leaves)
    assert torch.autograd.gradgradcheck(reductions.total, leaves)


def test_float32_points_have_second_derivatives_of_their_precision():
    case = make_case("full", torch.float32, condition=20.0, N=40)
    tensors = [t.detach() for t in (case.x, case.offsets, case.means, case.factor.U)]
    right = second(plain, [t.double() for t in tensors], torch.Generator().manual_seed(1))
    got = second(reductions.logsumexp, tensors, torch.Generator().manual_seed(1))
    assert [t.dtype for t in got] == [torch.float32] * 4
    assert close(got, right, 1e-4)


def mixture_of(family, parameters):
    kind, _ = gk.components.factor_class(family)
    logits, means, *rest = parameters
    if kind is gk.FullFactor:
        return gk.Mixture(logits, means, kind(*rest))
    return gk.Mixture(logits, means, kind(*rest, 2) if kind is gk.SphericalFactor else kind(*rest))


def parameters_of(family, K=3):
    """Stored parameters of a mixture in two dimensions; no two components are alike."""
    kind, tied = gk.components.factor_class(family)
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    lead = 1 if tied else K
    found = [draw(K), 2 * draw(K, 2), 0.4 * draw(lead, 1 if kind is gk.SphericalFactor else 2)]
    return [*found, draw(lead, 1)] if kind is gk.FullFactor else found


def same_family(mixture):
    return torch.distributions.MixtureSameFamily(mixture.mixture_distribution, mixture.component_distribution)


@pytest.mark.parametrize("family", FAMILIES)
def test_hessian_of_log_prob_is_that_of_mixture_same_family(family):
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    arguments = (x, *parameters_of(family))
    ours = hessian(lambda x, *p: mixture_of(family, p).log_prob(x).sum(), arguments)
    right = hessian(lambda x, *p: same_family(mixture_of(family, p)).log_prob(x).sum(), arguments)
    # torch's covariances lose some digits in two triangular solves.
    for row, expected in zip(ours, right, strict=True):
        assert close(row, expected, 1e-8)
    assert float(ours[0][1].abs().max()) > 1e-3  # d²/dx dlogits: a zero would be as silent as it was


def test_a_gradient_penalty_reaches_the_parameters():
    """Score matching: the squared gradient in the points, by ``create_graph`` and a second ``backward``."""
    generator = torch.Generator().manual_seed(0)
    model = gk.GMM(2, n_components=3).double()
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64).requires_grad_()
    gradients = []
    for log_prob in (lambda: model().log_prob(x), lambda: same_family(model()).log_prob(x)):
        model.zero_grad()
        x.grad = None
        (score,) = torch.autograd.grad(log_prob().sum(), x, create_graph=True)
        score.square().sum().backward()
        gradients.append([p.grad.clone() for p in (*model.parameters(), x)])
    assert close(*gradients, 1e-8)
    x.grad = None
    with pytest.warns(UserWarning, match="reference cycle"):
        model().log_prob(x).sum().backward(create_graph=True)
    assert x.grad.grad_fn is not None
    x.grad = None
    model.zero_grad()


def test_a_batch_of_mixtures_has_second_derivatives():
    """More mixtures than are written out at once, whose gradients are computed again."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    tensors = [torch.randn(4, 3, generator=generator, dtype=torch.float64), means, 0.3 * means]
    x = torch.randn(5, 1, 2, generator=generator, dtype=torch.float64)

    def batch(logits, means, log_diagonal):
        return gk.Mixture(logits, means, gk.DiagonalFactor(log_diagonal))

    right = second(lambda *t: same_family(batch(*t)).log_prob(x), tensors, torch.Generator().manual_seed(1))
    got = second(lambda *t: batch(*t).log_prob(x), tensors, torch.Generator().manual_seed(1))
    assert close(got, right, 1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gmmkeops.models.densities.CHUNK", 40)
        got = second(lambda *t: batch(*t).log_prob(x), tensors, torch.Generator().manual_seed(1))
    assert close(got, right, 1e-9)


@pytest.mark.parametrize("family", ["full", "tied_diag"])
def test_forward_mode_and_its_combinations(family):
    tensors = problem(family, N=4)
    directions = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) for t in tensors
    ]
    for ours, right in ((reductions.logsumexp, plain), (reductions.total, lambda *t: plain(*t).sum())):
        got = torch.func.jvp(ours, tuple(tensors), tuple(directions))
        assert close(got, torch.func.jvp(right, tuple(tensors), tuple(directions)), 1e-10)

        def ahead(function):
            """Derivative along the directions, as a function of the tensors."""
            return lambda *t: torch.func.jvp(function, t, tuple(directions))[1]

        for transform in (
            # Forward over reverse, and reverse over forward.
            lambda f: torch.func.jacfwd(torch.func.grad(lambda *t: f(*t).sum(), (0, 1, 2, 3)), (0, 1, 2, 3)),
            lambda f: torch.func.grad(lambda *t: ahead(f)(*t).sum(), (0, 1, 2, 3)),
        ):
            a, b = (torch.utils._pytree.tree_leaves(transform(f)(*tensors)) for f in (ours, right))
            assert close(a, b, 1e-9)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(a, b) for a, b in zip(tensors, directions, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(reductions.logsumexp(*dual)).tangent
    assert close([tangent], [torch.func.jvp(plain, tuple(tensors), tuple(directions))[1]], 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_func(family):
    """Per-sample gradients, Jacobians, Hessians and batches of parameters of log-densities."""
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    parameters = parameters_of(family)

    def ours(x, *p):
        return mixture_of(family, p).log_prob(x)

    def right(x, *p):
        kind, z = gk.components.factor_class(family)[0], x[..., None, :] - p[1]
        factor = mixture_of(family, p).factor
        y = torch.einsum("kde,...kd->...ke", factor.matrices().expand(3, -1, -1), z)
        offsets = torch.log_softmax(p[0], -1) + factor.log_determinant() - 1.8378770664093453
        assert kind is type(factor)
        return torch.logsumexp(offsets - 0.5 * y.square().sum(-1), -1)

    func, places = torch.func, tuple(range(1, 1 + len(parameters)))
    many = [torch.stack([p, p + 0.1, 0.5 * p]) for p in parameters]

    def everything(f):
        each = (0, *[None] * len(places))
        return torch.utils._pytree.tree_leaves(
            [
                func.grad(lambda x, *p: f(x, *p).sum())(x, *parameters),
                func.jacrev(f, places)(x, *parameters),
                func.jacfwd(f, places)(x, *parameters),
                func.hessian(lambda x, *p: f(x, *p).sum(), places)(x, *parameters),
                func.vmap(func.grad(f), each)(x, *parameters),
                func.vmap(func.grad(f, places), each)(x, *parameters),
                func.vmap(func.hessian(f), each)(x, *parameters),
                func.vmap(f, (None, *[0] * len(places)))(x, *many),
                func.vmap(f, (1, *[None] * len(places)))(x.unsqueeze(0).expand(2, -1, -1), *parameters),
                func.vmap(func.vmap(f, each), (None, *[0] * len(places)))(x, *many),
            ]
        )

    assert close(everything(ours), everything(right), 1e-8)


def test_what_vmap_cannot_take_says_so():
    m, x = mixture_of("full", parameters_of("full")), torch.zeros(3, 5, 2, dtype=torch.float64)
    for function in (m.predict, lambda x: m.responsibilities(x, 2)):
        with pytest.raises(ValueError, match=r"^torch\.func\.vmap .* outside of them, for all points at once\.$"):
            torch.func.vmap(function)(x)


def test_third_derivatives_are_refused_in_one_sentence():
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    m = mixture_of("full", parameters_of("full"))
    points = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(m.log_prob(points).sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), points, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^Third derivatives .*log_joint"):
        second.sum().backward()
    one = lambda x: m.log_prob(x).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="Third derivatives"):
        torch.func.jacrev(torch.func.hessian(one))(x)
    with pytest.raises(NotImplementedError, match=r"derivatives .* are not implemented"):
        torch.func.jacfwd(torch.func.hessian(one))(x)
    with pytest.raises(NotImplementedError, match="forward over forward"):
        torch.func.jacfwd(torch.func.jacfwd(one))(x)
    # What the message names does have them.
    third = torch.func.jacrev(torch.func.hessian(lambda x: torch.logsumexp(m.log_joint(x), -1).sum()))(x)
    assert bool(torch.isfinite(third).all())
    assert float(third.abs().max()) > 1e-3


def test_sums_that_were_attached_have_first_derivatives_only():
    x, offsets, means, U = problem("full")
    sums = reductions.moments(x, offsets, means, U)
    leaves = [t.clone().requires_grad_() for t in (offsets, means, U)]
    value = reductions.attached(sums, *leaves)
    right = torch.autograd.grad(plain(x, *leaves).sum(), leaves)
    first = torch.autograd.grad(value, leaves, create_graph=True)
    assert close(first, right, 1e-10)
    with pytest.raises(NotImplementedError, match=r"first derivatives only; use gmmkeops\.reductions\.total"):
        first[1].sum().backward()
    assert close(torch.func.grad(lambda *p: reductions.attached(sums, *p), (0, 1, 2))(offsets, means, U), right, 1e-10)


@pytest.mark.parametrize(("N", "K"), [(60_000, 40), (600, 4000)])
def test_second_derivatives_take_bounded_memory(N, K):
    """Written out, one array of points, components and dimensions takes 58 MB here, and a graph holds a dozen of them."""
    code = f"""
import torch, gmmkeops as gk
{PEAK}
def run(N, K):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator).double().requires_grad_()
    means = torch.randn(K, 3, generator=generator).double().requires_grad_()
    m = gk.Mixture(torch.zeros(K).double(), means, gk.DiagonalFactor(torch.zeros(1, 3).double()))
    (score,) = torch.autograd.grad(m.log_prob(x, truncate=0).sum(), x, create_graph=True)
    score.square().sum().backward()
run(20, 10)
before = peak()
run({N}, {K})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 220_000
