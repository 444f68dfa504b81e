"""Data that require gradients, gradients that are switched off, and gradients at weights of exactly zero."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES, make_factor, random_mixture

import gmmkeops as gk


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(60, 2, generator=generator), 4 + 0.5 * torch.randn(40, 2, generator=generator)]).double()
    return x, torch.rand(100, generator=generator).double() + 0.1


def conditional(x, w):
    model = gk.GMM(1, context=1, n_components=2, hidden_features=(4,))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    gk.fit(model, x[:, :1], gk.Adam(lr=1e-3), context=x[:, 1:], sample_weight=w, max_iter=2)
    return [p.detach().clone() for p in model.parameters()]


def unconditional(x, w):
    model = gk.GMM(2, n_components=2).initialize(x, sample_weight=w, generator=torch.Generator().manual_seed(0))
    return fitted(gk.fit(model, x, gk.Adam(), sample_weight=w, max_iter=3))


def fitted(result):
    return [result.mixture.log_weights, result.mixture.means, *result.mixture.factor.tensors.values()]


def start():
    return random_mixture("full", K=2)


def prior():
    normal = torch.distributions.Normal(torch.zeros(2).double(), torch.full((2,), 5.0).double())
    return gk.bayes.Prior(2, weights=torch.tensor([0.4, 0.6]), means=normal, scales=1.0, covariance_type="spherical")


def drawn(method, x, w, **options):
    found = method(prior(), x, weights=w, generator=torch.Generator().manual_seed(0), **options)
    return [found.mean("means")]


def estimator(cls, x, w, **options):
    found = cls(n_components=2, random_state=0, max_iter=5, tol=0.0, **options).fit(x, sample_weight=w)
    return [torch.as_tensor(t) for t in (found.means_, found.covariances_, found.predict_proba(x))]


USES = {
    "em": lambda x, w: fitted(gk.fit(start(), x, gk.EM(), sample_weight=w, max_iter=3)),
    "minibatches": lambda x, w: fitted(gk.fit(start(), x, gk.EM(batch_size=30), sample_weight=w, max_iter=3)),
    "adam": lambda x, w: fitted(gk.fit(start(), x, gk.Adam(), sample_weight=w, max_iter=3)),
    "sgd": lambda x, w: fitted(
        gk.fit(start(), x, gk.Gradient(lambda p: torch.optim.SGD(p, lr=0.1)), sample_weight=w, max_iter=3)
    ),
    "lbfgs": lambda x, w: fitted(gk.fit(start(), x, gk.Gradient(torch.optim.LBFGS), sample_weight=w, max_iter=2)),
    "variational": lambda x, w: fitted(gk.fit(start(), x, gk.bayes.VariationalBayes(), sample_weight=w, max_iter=3)),
    "penalty": lambda x, w: fitted(
        gk.fit(start(), x, gk.Adam(), sample_weight=w, max_iter=3, penalty=gk.penalties.SqrtWeights(1.0))
    ),
    "source": lambda x, w: fitted(gk.fit(start(), gk.Source.of(x, weights=w), gk.Adam(), max_iter=3)),
    "batches": lambda x, w: fitted(
        gk.fit(start(), lambda: iter([(x[:30], w[:30]), (x[30:], w[30:])]), gk.EM(), max_iter=3)
    ),
    "update": lambda x, w: [gk.EM().update(start(), x, sample_weight=w)[0].means],
    "module": unconditional,
    "context": conditional,
    "kmeans": lambda x, w: [
        gk.initialize(x, 2, "kmeans", sample_weight=w, generator=torch.Generator().manual_seed(0)).means
    ],
    "random": lambda x, w: [
        gk.initialize(x, 2, "random", sample_weight=w, generator=torch.Generator().manual_seed(0)).means
    ],
    "list": lambda x, w: [gk.initialize(list(x), 2, generator=torch.Generator().manual_seed(0)).means],
    "estimator": lambda x, w: estimator(gk.GaussianMixture, x, w),
    "estimator by adam": lambda x, w: estimator(gk.GaussianMixture, x, w, solver="adam"),
    "bayesian": lambda x, w: estimator(gk.BayesianGaussianMixture, x, w),
    "partial_fit": lambda x, w: [torch.as_tensor(gk.GaussianMixture(2, random_state=0).partial_fit(x).means_)],
    "select": lambda x, w: [gk.analysis.select(x, [2], sample_weight=w).best.means],
    "standard_errors": lambda x, w: [gk.standard_errors(start(), x, sample_weight=w, robust=False).means],
    "silhouette": lambda x, w: [torch.tensor(gk.analysis.silhouette(x, (x[:, 0] > 2).detach()))],
    "moments": lambda x, w: [gk.reductions.moments(x, start().offsets, start().means, start().factor, weights=w).S1],
    "importance": lambda x, w: drawn(gk.bayes.importance, x, w, draws=20, proposal="prior"),
    "proposal": lambda x, w: drawn(gk.bayes.importance, x, w, draws=20, proposal="variational"),
    "langevin": lambda x, w: drawn(gk.bayes.langevin, x, w, draws=5, warmup=3),
    "gibbs": lambda x, w: drawn(gk.bayes.gibbs, x, w, draws=5, warmup=3),
}
QUIET = [
    "ignore::gmmkeops.ConvergenceWarning",
    "ignore::gmmkeops.bayes.SamplingWarning",
    "ignore:most units:gmmkeops.PrecisionWarning",
]
quiet = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(scope="module")
def expected():
    return {}


class TestUses:
    pytestmark = quiet

    def right(self, name, expected):
        if name not in expected:
            expected[name] = USES[name](*data())
        return expected[name]

    def same(self, found, right):
        assert not any(t.requires_grad for t in found)
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found, right, strict=True))

    @pytest.mark.parametrize("name", USES)
    def test_data_that_require_gradients_are_constants(self, name, expected):
        right = self.right(name, expected)
        x, w = (t.requires_grad_() for t in data())
        self.same(USES[name](x, w), right)
        assert x.grad is None
        assert w.grad is None

    @pytest.mark.parametrize("name", USES)
    def test_gradients_that_are_switched_off(self, name, expected):
        right = self.right(name, expected)
        with torch.no_grad():
            self.same(USES[name](*data()), right)
        with torch.inference_mode():
            inside = data()
            self.same(USES[name](*inside), right)
        # Tensors that were made there can be used everywhere.
        self.same(USES[name](*inside), right)


@pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")
def test_results_of_inference_mode_can_be_trained_later():
    with torch.inference_mode():
        x, w = data()
        mixtures = [gk.fit(start(), x, method, sample_weight=w, max_iter=2).mixture for method in (gk.EM(), gk.Adam())]
        made = gk.Mixture(torch.zeros(2).double(), x[:2].clone(), gk.DiagonalFactor(torch.zeros(2, 2).double()))
    for mixture in mixtures:
        mixture.means.requires_grad_()
        mixture.log_prob(x).sum().backward()
        assert bool(torch.isfinite(mixture.means.grad).all())
    logits = torch.zeros(2).double().requires_grad_()
    for mixture in (made, gk.Mixture(logits, made.means, made.factor)):
        points = x.clone().requires_grad_()
        (mixture.log_prob(points).sum() + mixture.log_joint(points).sum() + mixture.log_prob(x).sum()).backward()
        assert bool(torch.isfinite(points.grad).all())


def without(mixture, component):
    """The mixture without a component."""
    rest = torch.tensor([k for k in range(mixture.n_components) if k != component])
    return mixture.select(rest), rest


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_a_weight_of_zero_are_those_without_the_component(family):
    """Of everything that is a function of a mixture, its parameters and the points."""
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    factor = make_factor(family, 3, 2, 10.0, torch.Generator().manual_seed(1))
    tensors = {name: t.clone().requires_grad_() for name, t in factor.tensors.items()}
    means = torch.randn(3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    logits = torch.tensor([0.3, -math.inf, -0.4], dtype=torch.float64).requires_grad_()
    points = x.clone().requires_grad_()
    leaves = [logits, means, *tensors.values(), points]
    whole = gk.Mixture(logits, means, factor.replace(**tensors))
    part, rest = without(whole, 1)
    for function in (
        lambda m: m.log_prob(points),
        lambda m: torch.autograd.grad(m.log_prob(points).sum(), points, create_graph=True)[0].square(),
        lambda m: m.log_joint(points).exp().sum(-1),
        lambda m: m.responsibilities(points)[:, -1],
        lambda m: m.mean,
        lambda m: m.covariance_matrix.square(),
        lambda m: m.marginal(1).cdf(points[:, :1]),
        lambda m: m.condition(0, points[:, 0:1]).mean,
        lambda m: m.weights.square(),
        gk.penalties.WeightEntropy(2.0),
        gk.penalties.WeightEntropy(-1.0),
        # An average over the components, of which there are two instead of three.
        lambda m: gk.penalties.SqrtWeights(float(m.n_components))(m),
        gk.penalties.Dirichlet(1.0),
    ):
        value, right = function(whole).sum(), function(part).sum()
        assert abs(float(value.detach()) - float(right.detach())) < 1e-12 * max(1.0, abs(float(right.detach())))
        got, expected = (
            torch.autograd.grad(v, leaves, allow_unused=True, retain_graph=True)
            if v.requires_grad
            else [None] * len(leaves)
            for v in (value, right)
        )
        for a, b in zip(got, expected, strict=True):
            a, b = (torch.zeros(()) if t is None else t for t in (a, b))
            assert float((a - b).abs().max()) < 1e-10 * max(1.0, float(b.abs().max()))
    assert rest.tolist() == [0, 2]


def test_gradients_flow_through_weights_that_are_zero():
    """A softmax that underflows, and weights of exactly zero among the parameters."""
    raw = torch.tensor([0.2, -900.0, -0.3], dtype=torch.float64).requires_grad_()
    weights = raw.softmax(0)
    assert float(weights[1].detach()) == 0
    x = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means, variances = torch.tensor([[0.0], [1.0], [2.0]]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    gk.Mixture.from_parameters(weights, means, variances, "spherical").log_prob(x).sum().backward()
    found, raw.grad = raw.grad, None
    normal = torch.distributions.Normal(means[:, 0], variances.sqrt())
    (raw.log_softmax(0) + normal.log_prob(x)).logsumexp(1).sum().backward()
    assert torch.allclose(found, raw.grad, atol=1e-12)

    merged = gk.analysis.merge(gk.Mixture.from_parameters([0.4, 0.0, 0.6], means, variances, "spherical"), [[0, 2]])
    assert torch.equal(merged.weights, torch.tensor([1.0, 0.0]).double())
    assert torch.allclose(merged.means[:, 0], torch.tensor([1.2, 1.0]).double())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_where_everything_is_equal(family):
    """Points on a mean, equal points, and equal components: no square root or norm of zero is in the way."""
    mixture = random_mixture(family, K=2)
    means = mixture.means[:1].expand(2, 2).clone().requires_grad_()
    x = means.detach()[:1].expand(3, 2).clone().requires_grad_()
    m = gk.Mixture(mixture.logits, means, mixture.factor)
    (score,) = torch.autograd.grad(m.log_prob(x).sum(), x, create_graph=True)
    gradients = torch.autograd.grad(m.log_prob(x).sum() + score.square().sum() + m.variance.sum(), (x, means))
    assert all(float(g.abs().max()) < 1e-12 for g in gradients)
