"""A mixture as a torch distribution: empty shapes, validation, compilers, quantiles, entropy, divergences, wrappers."""

from __future__ import annotations

import math
import shutil

import mpmath
import pytest
import torch
from conftest import FAMILIES, make_factor, random_mixture
from torch.distributions import (
    AffineTransform,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

import gmmkeops as gk


def batch_of(family, batch, K=3, D=2, seed=0):
    """A batch of mixtures, no two components of which are alike."""
    generator = torch.Generator().manual_seed(seed)
    number = math.prod(batch)
    factor = make_factor(family, max(1, number) * K, D, 10.0, generator)
    lead = 1 if family.startswith("tied") else K
    parts = {name: t.expand(max(1, number) * K, *t.shape[1:]) for name, t in factor.tensors.items()}
    parts = {name: t[: number * lead].reshape(*batch, lead, *t.shape[1:]) for name, t in parts.items()}
    draw = lambda *shape: torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return gk.Mixture(draw(K), 2 * draw(K, D), factor.replace(**parts))


@pytest.mark.parametrize("sample_shape", [(0,), (2, 0), (0, 3), (4,)])
@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_shapes(family, batch, sample_shape):
    m = batch_of(family, batch)
    draws, labels = m.sample(sample_shape, return_labels=True)
    assert draws.shape == (*sample_shape, *batch, 2)
    assert labels.shape == draws.shape[:-1]
    assert m.sample(sample_shape, confidence=0.5).shape == draws.shape
    x = draws.clone().requires_grad_()
    values = m.log_prob(x)
    assert values.shape == (*sample_shape, *batch)
    assert torch.autograd.grad(values.sum(), x)[0].shape == x.shape
    assert m.log_joint(x).shape == m.responsibilities(x).shape == (*values.shape, 3)
    if not batch:
        assert m.predict(x).shape == values.shape
        assert [t.shape for t in m.responsibilities(x, 2)] == [(*values.shape, 2)] * 2
        assert m.predict(x).dtype == torch.int64
    one = m.marginal(1)
    assert one.cdf(draws[..., 1:]).shape == values.shape
    assert one.icdf(torch.full(values.shape, 0.3)).shape == (*values.shape, 1)
    assert m.mean.shape == (*batch, 2)
    assert m.variance.shape == (*batch, 2)


def test_a_context_without_rows():
    model = gk.GMM(2, context=3, n_components=2)
    mixtures = model(torch.zeros(0, 3))
    assert mixtures.batch_shape == (0,)
    assert mixtures.sample((5,)).shape == (5, 0, 2)
    values = mixtures.log_prob(torch.zeros(0, 2))
    assert values.shape == (0,)
    values.sum().backward()
    assert mixtures.responsibilities(torch.zeros(0, 2)).shape == (0, 2)
    assert model(torch.zeros(4, 0, 3)).log_prob(torch.zeros(4, 0, 2)).shape == (4, 0)
    assert random_mixture("full").condition(0, torch.zeros(0, 1)).log_prob(torch.zeros(0, 1).double()).shape == (0,)
    with pytest.raises(ValueError, match="k must be between 1 and the 4 components, got 5"):
        random_mixture("full").responsibilities(torch.zeros(0, 2), 5)


@pytest.fixture
def checks():
    """The default of torch for checks, as it was before the test; torch.compile changes it for good."""
    before = Distribution._validate_args
    yield
    Distribution.set_default_validate_args(before)


@pytest.fixture
def unchecked(checks):
    Distribution.set_default_validate_args(False)


BAD = torch.tensor([[0.0, 0.0], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, 1.0], [1.0, 2.0]]).double()


def check_what_unchecked_points_give(m):
    values = m.log_prob(BAD.clone().requires_grad_())
    assert torch.isnan(values).tolist() == [False, True, False, False, False]
    assert (values == -math.inf).tolist() == [False, False, True, True, False]
    sound = gk.Mixture(m.logits, m.means, m.factor, validate_args=True)
    assert torch.equal(values[[0, 4]], sound.log_prob(BAD[[0, 4]]))
    with pytest.raises(ValueError, match="x must be finite, got NaN at row 1, column 0"):
        sound.log_prob(BAD)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_methods_that_read_points_find_nan(batch):
    m = batch_of("full", batch)
    x = torch.zeros(2, *batch, 2).double()
    x[1, ..., 0] = math.nan
    one = m.marginal(0)
    free = gk.Mixture(one.logits, one.means, one.factor, validate_args=False)
    for method in (m.log_prob, m.log_joint, m.responsibilities, lambda x: one.cdf(x[..., :1])):
        with pytest.raises(ValueError, match="x must be finite, got NaN at row"):
            method(x)
    assert torch.isnan(free.cdf(x[..., :1])[1]).all()
    for end, share in ((-math.inf, 0.0), (math.inf, 1.0)):
        assert torch.allclose(one.cdf(torch.full((*batch, 1), end)), torch.full(batch, share).double())


def test_checks_can_be_switched_off_for_one_mixture():
    m = random_mixture("full")
    with pytest.raises(ValueError, match="x must be finite"):
        m.log_prob(BAD)
    with pytest.raises(ValueError, match="means must be finite"):
        gk.Mixture(m.logits, m.means * math.nan, m.factor)
    free = gk.Mixture(m.logits, m.means, m.factor, validate_args=False)
    for one in (free, free.to(torch.float64), free.expand(()), free.detach(), free.select(torch.arange(4))):
        check_what_unchecked_points_give(one)
    gk.Mixture(m.logits, m.means * math.nan, m.factor, validate_args=False)
    with pytest.raises(ValueError, match="logits must have shape"):
        gk.Mixture(m.logits, m.means[0], m.factor, validate_args=False)


def test_checks_can_be_switched_off_for_all(unchecked):
    """As for all distributions of torch, also those that exist already; what a mixture was told itself goes first."""
    m = random_mixture("full")
    always = gk.Mixture(m.logits, m.means, m.factor, validate_args=True)
    for one in (m, m.marginal([0, 1]), m.expand(()), gk.Mixture(m.logits, m.means, m.factor)):
        check_what_unchecked_points_give(one)
    assert torch.isnan(gk.GMM(2)().log_prob(BAD.float())).tolist() == [False, True, False, False, False]
    gk.Mixture(m.logits, m.means * math.nan, m.factor)
    with pytest.raises(ValueError, match="means must be finite"):
        gk.Mixture(m.logits, m.means * math.nan, m.factor, validate_args=True)
    Distribution.set_default_validate_args(True)
    for one in (m, m.marginal([0, 1]), always, always.expand(())):
        with pytest.raises(ValueError, match="x must be finite, got NaN at row 1, column 0"):
            one.log_prob(BAD)


def test_files_are_checked_always(unchecked, tmp_path):
    m = random_mixture("full")
    gk.save(gk.Mixture(m.logits, m.means * math.nan, m.factor), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is damaged: means must be finite"):
        gk.load(tmp_path / "m.safetensors")


@pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")
def test_mixtures_that_the_package_makes_check_their_points():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    made = [
        gk.GMM(2)().to(torch.float64),
        gk.fit(gk.initialize(x, 2), x, gk.EM(), max_iter=2).mixture,
        random_mixture("full").marginal([1, 0]),
        gk.analysis.merge(random_mixture("full"), [[0, 1]]),
    ]
    for mixture in made:
        with pytest.raises(ValueError, match="x must be finite, got NaN"):
            mixture.log_prob(BAD)


class Density(torch.nn.Module):
    """The log-density of a module's mixture."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, *context):
        return self.model(*context).log_prob(x)


class Built(torch.nn.Module):
    """A mixture that is made while torch compiles."""

    def __init__(self, mixture, validate_args):
        super().__init__()
        self.mixture, self.validate_args = mixture, validate_args
        self.means = torch.nn.Parameter(mixture.means.clone())

    def forward(self, x):
        return gk.Mixture(self.mixture.logits, self.means, self.mixture.factor, self.validate_args).log_prob(x)


@pytest.fixture
def dynamo(checks):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["full", "tied_diag", "spherical"])
def test_compiled(family, dynamo):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    m = random_mixture(family)
    compiled = torch.compile(m.log_prob, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x.double()), m.log_prob(x.double()), rtol=1e-12)
    model = gk.GMM(2, n_components=3, covariance_type=family)
    conditional = gk.GMM(2, context=3, n_components=3, covariance_type=family)
    c = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for net, arguments in ((model, (x,)), (conditional, (x, c))):
        gradients = []
        for density in (Density(net), torch.compile(Density(net), fullgraph=True, backend="aot_eager")):
            net.zero_grad()
            values = density(*arguments)
            values.sum().backward()
            gradients.append([values.detach(), *(p.grad.clone() for p in net.parameters())])
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("validate_args", [False, None])
@pytest.mark.parametrize("family", ["full", "tied_diag", "spherical"])
def test_exported(family, validate_args, dynamo):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    c = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    more = torch.randn(17, 2, generator=torch.Generator().manual_seed(2))
    rows = torch.export.Dim("rows")
    for module in (
        Density(gk.GMM(2, n_components=3, covariance_type=family)),
        Built(random_mixture(family), validate_args),
    ):
        points = x.to(next(module.parameters()).dtype)
        program = torch.export.export(module, (points,), dynamic_shapes=({0: rows},))
        assert torch.allclose(program.module()(more.to(points)), module(more.to(points)), rtol=1e-4, atol=1e-4)
    conditional = Density(gk.GMM(2, context=3, n_components=3, covariance_type=family))
    for strict in (False, True):
        program = torch.export.export(conditional, (x, c), dynamic_shapes=({0: rows}, ({0: rows},)), strict=strict)
        for n in (5, 2):
            assert torch.allclose(program.module()(x[:n], c[:n]), conditional(x[:n], c[:n]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["full", "tied_diag", "spherical"])
def test_the_module_itself_is_exported_and_compiled(family, strict, dynamo, tmp_path):
    """What it returns is a mixture, before and after a program is written to a file."""
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    c = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    dynamic = ({0: torch.export.Dim("rows")},)
    for model, context in (
        (gk.GMM(2, n_components=3, covariance_type=family), ()),
        (gk.GMM(2, context=3, n_components=3, covariance_type=family), (c,)),
    ):
        example = tuple(part[:5] for part in context)
        program = torch.export.export(model, example, dynamic_shapes=dynamic if context else None, strict=strict)
        torch.export.save(program, tmp_path / "model.pt2")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for run in (program.module(), torch.export.load(tmp_path / "model.pt2").module(), compiled):
            mixture = run(*context)
            assert repr(mixture) == repr(model(*context))
            assert torch.allclose(mixture.log_prob(x), model(*context).log_prob(x), rtol=1e-4, atol=1e-4)
            assert mixture.sample((4,)).shape == (4, *mixture.batch_shape, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixtures_are_containers_of_tensors(family):
    m = random_mixture(family).named(["a", "b"])
    shifts = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    moved = torch.func.vmap(lambda shift: gk.Mixture(m.logits, m.means + shift, m.factor).named(m.columns))(shifts)
    assert (moved.batch_shape, moved.event_shape, moved.columns) == ((5,), (2,), ("a", "b"))
    assert torch.allclose(moved.log_prob(shifts), m.log_prob(torch.zeros(1, 2).double()).expand(5))
    gradient = torch.func.grad(lambda mixture: mixture.log_prob(shifts).sum())(m)
    means = m.means.clone().requires_grad_()
    gk.Mixture(m.logits, means, m.factor).log_prob(shifts).sum().backward()
    assert torch.allclose(gradient.means, means.grad)
    assert type(gradient.factor) is type(m.factor)


def test_exported_without_default_checks(unchecked, dynamo):
    module, x = Density(gk.GMM(2, n_components=3)), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch.export.export(module, (x,), strict=True).module()(x), module(x), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(Built(random_mixture("full"), None), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x.double()), random_mixture("full").log_prob(x.double()), rtol=1e-12)


@pytest.mark.slow
# torch's compiler uses what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch needs g++")
def test_compiled_to_machine_code(dynamo):
    x, m = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double(), random_mixture("full")
    assert torch.allclose(torch.compile(m.log_prob, fullgraph=True)(x), m.log_prob(x), rtol=1e-10)


def mixture_1d(condition=1.0):
    """Three components whose scales differ by up to ``condition``."""
    variances = [0.3, condition, 4.0 * condition**2]
    return gk.Mixture.from_parameters([0.2, 0.5, 0.3], [[-3.0], [0.5], [40.0]], variances, "spherical")


SHARES = [1e-300, 1e-30, 1e-9, 0.03, 0.2, 0.5, 0.69, 0.71, 0.97, 1 - 1e-9, 1 - 2.0**-53]


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_icdf_against_mpmath(condition):
    m = mixture_1d(condition)
    found = m.icdf(SHARES)
    assert found.shape == (len(SHARES), 1)
    parts = [
        (float(w), float(mu), 1 / float(u)) for w, mu, u in zip(m.weights, m.means[:, 0], m.factor.U[:, 0], strict=True)
    ]
    with mpmath.workdps(400):
        total = mpmath.fsum(w for w, _, _ in parts)
        for share, x in zip(SHARES, found[:, 0].tolist(), strict=True):
            # One Newton step, in many digits, from what was found.
            below = mpmath.fsum(w * mpmath.ncdf(x, mu, s) for w, mu, s in parts) / total
            density = mpmath.fsum(w * mpmath.npdf(x, mu, s) for w, mu, s in parts) / total
            assert abs((below - mpmath.mpf(share)) / density) < 1e-10 * max(1.0, abs(x))


def test_icdf_of_one_component_is_that_of_a_normal():
    m = gk.Mixture.from_parameters([1.0], torch.tensor([[5e6]]).double(), torch.tensor([4.0]).double(), "spherical")
    shares = torch.tensor([0.0, 1e-12, 0.3, 0.5, 0.9, 1.0]).double()
    expected = 5e6 + 2 * torch.special.ndtri(shares)
    assert torch.allclose(m.icdf(shares)[:, 0], expected, rtol=1e-12)
    assert m.icdf([0.0, 1.0]).tolist() == [[-math.inf], [math.inf]]
    assert m.quantile(0.3).shape == ()
    assert torch.equal(m.quantile(shares[1:5]), m.icdf(shares[1:5])[:, 0])


def test_icdf_of_batches():
    m = batch_of("diag", (2, 3), D=1)
    q = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = m.icdf(q)
    assert places.shape == (5, 2, 3, 1)
    assert torch.allclose(m.cdf(places), q, rtol=1e-12)
    one = gk.Mixture(m.logits[1, 2], m.means[1, 2], gk.DiagonalFactor(m.factor.U[1, 2].log()))
    assert torch.allclose(one.icdf(q[:, 1, 2]), places[:, 1, 2])
    assert torch.equal(m.icdf(0.25)[0, 1], m.icdf(torch.full((2, 3), 0.25).double())[0, 1])
    assert m.to(torch.float32).icdf(q.float()).dtype == torch.float32


def test_gradients_of_icdf():
    logits = torch.tensor([0.1, -0.4, 0.7]).double().requires_grad_()
    means = torch.tensor([[-1.0], [0.5], [2.0]]).double().requires_grad_()
    log_diagonal = torch.tensor([[0.3], [-0.2], [0.8]]).double().requires_grad_()
    q = torch.tensor([1e-3, 0.4, 0.9]).double().requires_grad_()

    def places(q, logits, means, log_diagonal):
        return gk.Mixture(logits, means, gk.DiagonalFactor(log_diagonal)).icdf(q)

    assert torch.autograd.gradcheck(places, (q, logits, means, log_diagonal), eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(
        places, (q[1:].detach().requires_grad_(), logits, means, log_diagonal), atol=1e-5
    )


def test_icdf_where_neighboring_numbers_are_far_apart():
    """The components are narrower than the spacing of float64 numbers, so that no number has the probability asked for."""
    # The last bit of each mean is set, so that rounding to even leaves it.
    means = torch.tensor([[1 + 2.0**-52], [2 + 2.0**-51]], dtype=torch.float64, requires_grad=True)
    variances = torch.tensor([1e-40, 1e-36], dtype=torch.float64)
    m = gk.Mixture.from_parameters([0.4, 0.6], means, variances, "spherical")
    places = m.icdf([0.1, 0.3, 0.4, 0.7, 0.9])
    assert torch.allclose(places[[0, 1, 3, 4]], means[[0, 0, 1, 1]], rtol=1e-15)
    assert bool(torch.isfinite(places).all())
    assert bool(torch.isfinite(torch.autograd.grad(places.sum(), means)[0]).all())


def test_values_that_do_not_fit_a_batch():
    m = batch_of("diag", (2, 3), D=1)
    for method, value in ((m.icdf, torch.rand(4)), (m.cdf, torch.rand(4, 1)), (m.log_joint, torch.rand(4, 1))):
        with pytest.raises(ValueError, match=r"do not fit a batch of mixtures of shape \(2, 3\); their leading dimen"):
            method(value)


def test_icdf_refuses_in_one_sentence():
    with pytest.raises(ValueError, match="with one column, got 2 columns; take a marginal first"):
        random_mixture("full").icdf(0.5)
    for value in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            mixture_1d().icdf(value)


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
            NotImplementedError, match=r"no closed form; estimate it with gmmkeops\.analysis\.kl_divergence"
        ):
            torch.distributions.kl_divergence(p, q)
    with pytest.raises(ValueError, match="have 2 and 3 features"):
        torch.distributions.kl_divergence(one, random_mixture("full", K=1, D=3))
    with pytest.raises(ValueError, match=r"batches of shapes \(2,\) and \(3,\)"):
        torch.distributions.kl_divergence(one.expand((2,)), one.expand((3,)))
    poisson = Independent(torch.distributions.Poisson(torch.ones(2)), 1)
    with pytest.raises(NotImplementedError, match="MultivariateNormal"):
        torch.distributions.kl_divergence(one, poisson)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrappers_of_torch(family):
    m = batch_of(family, (3,))
    peer = MixtureSameFamily(m.mixture_distribution, m.component_distribution)
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for wrap in (
        lambda d: d,
        lambda d: Independent(d, 1),
        lambda d: TransformedDistribution(d, [AffineTransform(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5]), 1)]),
        lambda d: d.expand((2, 3)),
        lambda d: Independent(d.expand((4, 3)), 2),
    ):
        ours, right = wrap(m), wrap(peer)
        assert (ours.batch_shape, ours.event_shape) == (right.batch_shape, right.event_shape)
        points = x[:, None].expand(4, 2, 3, 2) if ours.batch_shape == (2, 3) else x
        assert torch.allclose(ours.log_prob(points), right.log_prob(points), rtol=1e-9)
        assert ours.sample((5,)).shape == right.sample((5,)).shape
    for name in ("mean", "variance", "stddev"):
        assert torch.allclose(getattr(m, name), getattr(peer, name), rtol=1e-9)
    assert (m.has_rsample, m.has_enumerate_support) == (False, False)
    assert m.support.event_dim == 1
    for name, constraint in m.arg_constraints.items():
        assert bool(constraint.check(getattr(m, name)).all())
    assert repr(m).startswith("Mixture(batch=(3,), components=3, features=2, factor=")
    narrow = m.to(torch.float32)
    assert narrow.log_prob(x.float()).dtype == torch.float32
    assert torch.allclose(narrow.log_prob(x.float()).double(), m.log_prob(x), rtol=1e-3, atol=1e-3)
