"""The contract of penalties, which a new one inherits by a line in the list PENALTIES."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, random_mixture
from torch.distributions import Dirichlet, MultivariateNormal, Wishart

import gmmkeops as gk
from gmmkeops import penalties as P


@dataclass(frozen=True)
class EvenWeights(P.Penalty):
    """A penalty of this test: the Kullback-Leibler divergence of the weights from equal ones, up to a constant."""

    strength: float

    def __call__(self, mixture, points=1.0):
        return -self.strength * mixture.log_weights.mean()

    def m_step(self, mixture, points):
        none = P.Surrogate.none(mixture)
        return replace(none, counts=none.counts + self.strength * points / mixture.n_components)


def small_means(mixture):
    """A penalty that is a plain function."""
    return 0.01 * mixture.means.square().sum()


@dataclass(frozen=True)
class Written:
    """A mixture written out: weights (K,), means, dense covariances (K or 1, D, D) and precisions, and the points N."""

    W: torch.Tensor
    mu: torch.Tensor
    C: torch.Tensor
    P: torch.Tensor
    N: float

    @classmethod
    def of(cls, mixture, points):
        C = mixture.factor.covariances().double()
        return cls(mixture.logits.double().softmax(0), mixture.means.double(), C, torch.linalg.inv(C), points)

    def distances(self, center):
        z = self.mu - torch.as_tensor(center).double()
        return torch.einsum("kd,kde,ke->k", z, self.P.expand(len(z), -1, -1), z)


def normal_mean(w, m, kappa):
    return (0.5 * kappa * w.distances(m).sum() + 0.5 * torch.logdet(w.C).expand(len(w.mu)).sum()) / w.N


def inverse_wishart(w, psi, nu):
    psi = torch.as_tensor(psi).double()
    trace = (psi * w.P).sum()
    return (0.5 * (nu + 2 + 1) * torch.logdet(w.C).sum() + 0.5 * trace) / w.N


@dataclass(frozen=True)
class Case:
    """A penalty, its value by the formula, and what it claims.

    Args:
        penalty: Whatever ``fit`` takes.
        value: The same of a mixture that is written out.
        moved: The penalty of the data ``scale * x + shift`` that acts as this one on x; None where it is the same.
        prunes, bounds: As the attributes of a penalty.
        em: Whether EM minimizes it.
        file: Whether a file of an estimator holds it.
    """

    penalty: Any
    value: Callable[[Written], torch.Tensor]
    moved: Callable[[float, torch.Tensor], Any] | None = None
    prunes: bool = False
    bounds: bool = False
    em: bool = True
    file: bool = True


ALPHA, M, PSI = [0.5, 1.0, 2.0, 3.0], [0.5, -1.0], [[2.0, 0.5], [0.5, 1.0]]
EACH = [[0.0, 1.0], [2.0, -1.0], [0.5, 0.5], [-3.0, 1.0]]
PENALTIES = {
    "square roots": Case(P.SqrtWeights(0.4), lambda w: 0.1 * w.W.sqrt().sum(), prunes=True),
    "entropy": Case(P.WeightEntropy(0.07), lambda w: -0.07 * (w.W * w.W.log()).sum(), prunes=True),
    "negative entropy": Case(P.WeightEntropy(-0.3), lambda w: 0.3 * (w.W * w.W.log()).sum(), em=False),
    "Dirichlet": Case(P.Dirichlet(20.0), lambda w: -19 * w.W.log().sum() / w.N),
    "Dirichlet of each": Case(
        P.Dirichlet(ALPHA), lambda w: -((torch.tensor(ALPHA) - 1) * w.W.log()).sum() / w.N, prunes=True
    ),
    "normal means": Case(
        P.NormalMean(M, 2.0),
        lambda w: normal_mean(w, M, 2.0),
        lambda s, shift: P.NormalMean(s * torch.tensor(M) + shift, 2.0),
    ),
    "normal means of each": Case(
        P.NormalMean(EACH, 2.0),
        lambda w: normal_mean(w, EACH, 2.0),
        lambda s, shift: P.NormalMean(s * torch.tensor(EACH) + shift, 2.0),
    ),
    "inverse Wishart": Case(
        P.InverseWishart(PSI, 30.0),
        lambda w: inverse_wishart(w, PSI, 30.0),
        lambda s, _: P.InverseWishart(s**2 * torch.tensor(PSI), 30.0),
    ),
    "inverse Wishart of a number": Case(
        P.InverseWishart(7.0, 9.0),
        lambda w: inverse_wishart(w, 7.0 * torch.eye(2), 9.0),
        lambda s, _: P.InverseWishart(7.0 * s**2, 9.0),
    ),
    "pseudo-points of the covariances": Case(
        P.CovariancePrior(PSI, 3.0),
        lambda w: inverse_wishart(w, 3.0 * torch.tensor(PSI), 0.0),
        lambda s, _: P.CovariancePrior(s**2 * torch.tensor(PSI), 3.0),
    ),
    "normal-inverse-Wishart": Case(
        P.NormalInverseWishart(M, 3.0, PSI, 5.0),
        lambda w: normal_mean(w, M, 3.0) + inverse_wishart(w, PSI, 5.0),
        lambda s, shift: P.NormalInverseWishart(s * torch.tensor(M) + shift, 3.0, s**2 * torch.tensor(PSI), 5.0),
    ),
    "precision ridge": Case(
        P.PrecisionRidge(0.1),
        lambda w: 0.1 * w.P.diagonal(dim1=1, dim2=2).sum(1).mean(),
        lambda s, _: P.PrecisionRidge(0.1 * s**2),
    ),
    "eigenvalue floor": Case(
        P.EigenvalueFloor(0.3), lambda w: torch.zeros(()), lambda s, _: P.EigenvalueFloor(0.3 * s**2), bounds=True
    ),
    "a sum": Case(
        2 * P.SqrtWeights(0.1) + P.PrecisionRidge(0.2) * 0.5 + P.EigenvalueFloor(0.3),
        lambda w: 0.05 * w.W.sqrt().sum() + 0.1 * w.P.diagonal(dim1=1, dim2=2).sum(1).mean(),
        lambda s, _: P.SqrtWeights(0.2) + P.PrecisionRidge(0.1 * s**2) + P.EigenvalueFloor(0.3 * s**2),
        prunes=True,
        bounds=True,
        file=False,
    ),
    "even weights": Case(EvenWeights(0.2), lambda w: -0.2 * w.W.log().mean(), file=False),
    "a function": Case(
        small_means,
        lambda w: 0.01 * w.mu.square().sum(),
        lambda s, shift: lambda m: small_means(gk.Mixture(m.logits, (m.means - shift) / s, m.factor)),
        em=False,
        file=False,
    ),
}


def leaves_of(mixture):
    """The mixture as a function of its tensors, and the tensors."""
    names = list(mixture.factor.tensors)

    def of(logits, means, *raw):
        return gk.Mixture(logits, means, mixture.factor.replace(**dict(zip(names, raw, strict=True))))

    return of, [mixture.logits, mixture.means, *mixture.factor.tensors.values()]


def surrogate_value(terms, w):
    """Terms of an M-step as the function that the M-step minimizes, in nats."""
    pulls = sum((0.5 * kappa * w.distances(center).sum() for kappa, center in terms.means), torch.zeros(()))
    logs = torch.logdet(w.C)
    counts = 0.5 * (terms.degrees * logs.sum() + terms.degrees_per_component * logs.expand(len(w.mu)).sum())
    scatter = 0.0 if terms.scatter is None else 0.5 * (terms.scatter * w.P).sum()
    return w.N * (terms.slopes * w.W).sum() - (terms.counts * w.W.log()).sum() + pulls + counts + scatter


def moved_mixture(mixture, scale, shift):
    """The density of ``scale * x + shift``."""
    factor = mixture.factor.rescale(torch.full((mixture.n_features,), 1 / scale).double())
    return gk.Mixture(mixture.logits, scale * mixture.means + shift, factor)


@pytest.fixture(scope="module")
def data():
    """Points of four clusters that touch each other, their weights, and a start for each family."""
    means = torch.tensor([[-3.0, 0.0], [2.5, 1.5], [0.5, -3.5], [-1.0, 4.0]]).double()
    truth = gk.Mixture(torch.tensor([0.2, 0.5, -0.3, 0.0]).double(), means, random_mixture("full").factor)
    generator = torch.Generator().manual_seed(0)
    x = truth.sample((200,), generator=generator)
    weights = torch.rand(200, generator=generator, dtype=torch.float64) + 0.5
    return x, weights, {family: gk.initialize(x, 4, covariance_type=family) for family in FAMILIES}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.filterwarnings("ignore::gmmkeops.ConvergenceWarning")
class TestPenalty:
    """Every method, checkpoint and estimator relies on these properties of a penalty."""

    def test_value_and_gradient(self, name):
        """By the formula, in every family; gradients by finite differences."""
        penalty = P.as_penalty(PENALTIES[name].penalty)
        for family, points in itertools.product(FAMILIES, (1.0, 7.0)):
            mixture = random_mixture(family)
            right = PENALTIES[name].value(Written.of(mixture, points))
            for ours, times in ((penalty, 1), (3 * penalty, 3), (penalty + penalty * 0.5, 1.5)):
                value = ours(mixture, points)
                assert value.shape == ()
                assert float(value) == pytest.approx(times * float(right), rel=1e-9, abs=1e-12)
            of, leaves = leaves_of(mixture)
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            if PENALTIES[name].penalty != P.EigenvalueFloor(0.3):  # a constant
                assert torch.autograd.gradcheck(lambda *t, of=of, N=points: penalty(of(*t), N), leaves)

    def test_order_of_components_does_not_matter(self, name):
        """Unless a component has a prior of its own."""
        penalty, order = P.as_penalty(PENALTIES[name].penalty), torch.tensor([2, 0, 3, 1])
        for family in FAMILIES:
            a = random_mixture(family)
            b = gk.Mixture(a.logits[order], a.means[order], a.factor.select(order))
            same = float(penalty(b, 9.0)) == pytest.approx(float(penalty(a, 9.0)), rel=1e-12)
            assert same == (not name.endswith("of each"))

    def test_other_units_add_a_constant(self, name):
        case, shift = PENALTIES[name], torch.tensor([50.0, -7.0]).double()
        there = case.penalty if case.moved is None else case.moved(1024.0, shift)
        for family in FAMILIES:
            pairs = [(m, moved_mixture(m, 1024.0, shift)) for m in (random_mixture(family, seed=s) for s in (0, 1))]
            first, second = (P.as_penalty(there)(b, 9.0) - P.as_penalty(case.penalty)(a, 9.0) for a, b in pairs)
            assert float(first) == pytest.approx(float(second), abs=1e-9)

    def test_terms_of_the_m_step_are_a_tight_upper_bound(self, name):
        """The terms bound N times the penalty from above, with equal value and gradient at the mixture."""
        penalty, generator = P.as_penalty(PENALTIES[name].penalty), torch.Generator().manual_seed(0)
        if not PENALTIES[name].em:
            return
        for family, ours in itertools.product(FAMILIES, (penalty, 3 * penalty + EvenWeights(0.1))):
            mixture = random_mixture(family)
            terms = ours.m_step(mixture, 7.0)
            of, leaves = leaves_of(mixture)
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]

            def values(tensors, of=of, ours=ours, terms=terms):
                return surrogate_value(terms, Written.of(of(*tensors), 7.0)), 7 * ours(of(*tensors), 7.0)

            bound, value = values(leaves)
            slopes = [torch.autograd.grad(v, leaves, allow_unused=True, materialize_grads=True)
                      for v in (bound, value + 0 * leaves[0].sum())]  # fmt: skip
            assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*slopes, strict=True))
            for _ in range(5):
                steps = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in leaves]
                higher, at = values([t.detach() + 0.7 * step for t, step in zip(leaves, steps, strict=True)])
                assert float((higher - bound - at + value).detach()) >= -1e-9

    @pytest.mark.parametrize("family", FAMILIES)
    def test_em(self, name, family, data):
        """The penalized objective falls and ends where its gradient is zero; or an error names what minimizes it."""
        case, (x, weights, starts) = PENALTIES[name], data
        given = {"penalty": case.penalty, "sample_weight": weights}
        if not case.em:
            with pytest.raises(TypeError, match=r"EM does not support.*gmmkeops\.Adam"):
                gk.fit(starts[family], x, gk.EM(), **given)
            return
        result = gk.fit(starts[family], x, gk.EM(tol=0, reg_covar=0), max_iter=60, **given)
        objectives = torch.tensor(result.history["objective"], dtype=torch.float64)
        assert float(objectives.diff().max()) < 1e-9
        penalty, N = P.as_penalty(case.penalty), float(weights.sum())
        of, leaves = leaves_of(result.mixture)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        value = -(weights * of(*leaves).log_prob(x)).sum() / N + case.value(Written.of(of(*leaves), N))
        assert value.item() == pytest.approx(result.objective, abs=1e-9)
        assert not bool(penalty.project(result.mixture)[1].any())
        if not case.bounds and not result.report.pruned_components:
            assert all(float(slope.abs().max()) < 2e-4 for slope in torch.autograd.grad(value, leaves))

    def test_adam(self, name, data):
        """It lowers the objective, to about that of EM, and the reported one is that of the formula."""
        case, (x, weights, starts) = PENALTIES[name], data
        given = {"penalty": case.penalty, "sample_weight": weights}
        start = gk.Mixture(torch.zeros(4), starts["full"].means + 0.7, starts["full"].factor)
        result = gk.fit(start, x, gk.Adam(lr=0.05, tol=0), max_iter=200, **given)
        value = -float((weights * result.mixture.log_prob(x)).sum() / weights.sum())
        value += float(case.value(Written.of(result.mixture, float(weights.sum()))))
        assert result.objective == pytest.approx(value, abs=1e-9)
        assert result.objective < result.history["objective"][0] - 0.05
        assert not bool(P.as_penalty(case.penalty).project(result.mixture)[1].any())
        if case.em:
            other = gk.fit(result.mixture, x, gk.EM(tol=0, reg_covar=0), max_iter=60, **given)
            assert 0 <= result.objective - other.objective < (0.05 if case.bounds else 5e-3)

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_weights_of_any_size(self, name, size, data):
        """The penalty is that of the weights as they were given, although a fit counts in another unit."""
        case, (x, weights, starts) = PENALTIES[name], data
        for method in (gk.EM(tol=0, reg_covar=0), gk.Adam(tol=0))[0 if case.em and size > 1 else 1 :]:
            result = gk.fit(starts["full"], x, method, penalty=case.penalty, sample_weight=size * weights, max_iter=3)
            value = case.value(Written.of(result.mixture, size * float(weights.sum())))
            value = float(value) - float((weights * result.mixture.log_prob(x)).sum() / weights.sum())
            assert result.objective == pytest.approx(value, rel=1e-9)
            if isinstance(method, gk.EM):
                assert result.history["objective"][2] <= result.history["objective"][0]

    @pytest.mark.parametrize("method", [gk.EM(tol=0, reg_covar=0), gk.Adam(tol=0)], ids=["EM", "Adam"])
    def test_fits_in_other_units_correspond(self, name, method, data):
        case, (x, weights, starts) = PENALTIES[name], data
        if isinstance(method, gk.EM) and not case.em:
            return
        shift = torch.tensor([5e4, -7e3]).double()
        there = case.penalty if case.moved is None else case.moved(1024.0, shift)
        a = gk.fit(starts["full"], x, method, penalty=case.penalty, sample_weight=weights, max_iter=8).mixture
        start = moved_mixture(starts["full"], 1024.0, shift)
        b = gk.fit(start, 1024 * x + shift, method, penalty=there, sample_weight=weights, max_iter=8).mixture
        expected = moved_mixture(a, 1024.0, shift)
        assert torch.allclose(b.weights, expected.weights, rtol=1e-6)
        assert torch.allclose(b.means, expected.means, rtol=1e-6)
        assert torch.allclose(b.factor.covariances(), expected.factor.covariances(), rtol=1e-6)

    def test_checkpoints_know_it(self, name, data, tmp_path):
        """A fit resumes bit by bit; one with another argument of the penalty is another fit."""
        case, (x, _, starts) = PENALTIES[name], data
        method, keep = gk.EM(tol=0) if case.em else gk.Adam(tol=0), gk.Checkpoint(tmp_path / "fit.ckpt", every=0)

        def run(penalty, iterations, checkpoint=None):
            return gk.fit(starts["full"], x, method, penalty=penalty, max_iter=iterations, checkpoint=checkpoint)

        whole = run(case.penalty, 5)
        run(case.penalty, 2, keep)
        others = [2 * P.as_penalty(case.penalty), None]
        if is_dataclass(case.penalty):
            numbers = [f.name for f in fields(case.penalty) if f.name not in ("parts", "part")]
            others += [
                replace(case.penalty, **{n: (1.5 * torch.tensor(getattr(case.penalty, n))).tolist()}) for n in numbers
            ]
        for other in others:
            with pytest.raises(ValueError, match="whose penalty differs"):
                run(other, 5, keep)
        resumed = run(case.penalty, 5, keep)
        assert resumed.history["objective"] == whole.history["objective"]
        assert torch.equal(resumed.mixture.means, whole.mixture.means)

    @pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
    def test_is_a_value(self, name, tmp_path):
        case = PENALTIES[name]
        penalty = P.as_penalty(case.penalty)
        assert (penalty.prunes, penalty.bounds) == (case.prunes, case.bounds)
        assert ((3 * penalty).prunes, (3 * penalty + small_means).bounds) == (case.prunes, case.bounds)
        assert pickle.loads(pickle.dumps(penalty)) == penalty == copy.deepcopy(penalty)
        assert "\n" not in repr(penalty)
        if not case.file:
            return
        assert eval(repr(penalty), vars(P)) == penalty
        x = random_mixture("full").sample((50,), generator=torch.Generator().manual_seed(0)).numpy()
        solver = "em" if case.em else "adam"
        model = gk.GaussianMixture(4, penalty=penalty, solver=solver, max_iter=2).fit(x)
        model.save(tmp_path / "model.safetensors")
        assert gk.GaussianMixture.load(tmp_path / "model.safetensors").penalty == penalty


def test_every_penalty_has_a_case():
    public = {getattr(P, name) for name in P.__all__}
    classes = {c for c in public if isinstance(c, type) and issubclass(c, P.Penalty) and c is not P.Penalty}
    assert classes <= {type(case.penalty) for case in PENALTIES.values()}


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


def test_what_is_no_penalty_is_refused():
    mixture, a = random_mixture("diag"), P.SqrtWeights(2.0)
    assert torch.allclose(sum([a, a])(mixture), 2 * a(mixture))
    with pytest.raises(TypeError, match="unsupported operand"):
        a + 3
    with pytest.raises(TypeError, match="must be a Penalty or a function"):
        P.as_penalty(3)
    with pytest.raises(TypeError, match=r"must return a scalar tensor, got \(4,\)"):
        P.as_penalty(lambda m: m.weights)(mixture)


def test_a_negative_multiple_of_a_penalty_has_no_m_step(data):
    x, _, starts = data
    with pytest.raises(TypeError, match=r"does not support penalties with a negative factor.*gmmkeops\.Adam"):
        gk.fit(starts["full"], x, gk.EM(), penalty=-1 * P.SqrtWeights(1.0))
    assert not (-1 * P.SqrtWeights(1.0)).prunes


@pytest.mark.parametrize("family", FAMILIES)
def test_eigenvalue_floor(family):
    mixture = random_mixture(family, condition=1e6)
    bound = 2 * P.EigenvalueFloor(0.01) + P.SqrtWeights(1)
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


def test_covariances_of_uncorrelated_columns_are_symmetric_up_to_rounding():
    """Those of principal components are rounding errors, whose relative differences are large."""
    covariance = torch.diag(torch.tensor([4.0, 1.0]).double())
    covariance[0, 1], covariance[1, 0] = 1e-17, -3e-17
    assert P.CovariancePrior(covariance, 3.0).points == 3.0
    covariance[0, 1] = 1e-4
    with pytest.raises(ValueError, match="covariance must be symmetric"):
        P.CovariancePrior(covariance, 3.0)


def test_two_priors_on_covariances_act_as_one_with_the_sums():
    """Σ (ν + D + 1) and Σ Ψ: in the penalty, and in the fits that it leads to."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = random_mixture("full", K=2)
    both = P.InverseWishart(2.0, 5.0) + P.InverseWishart(30.0, 40.0)
    one = P.InverseWishart(32.0, 5.0 + 40.0 + 3.0)
    assert float(both(start, 60.0)) == pytest.approx(float(one(start, 60.0)), rel=1e-12)
    found, right = (gk.fit(start, x, gk.EM(tol=0), penalty=penalty, max_iter=5).mixture for penalty in (both, one))
    assert torch.allclose(found.factor.covariances(), right.factor.covariances(), rtol=1e-9)


def test_subclasses_of_penalties_on_the_weights_receive_mixtures_in_data_units():
    class Shrunk(gk.penalties.SqrtWeights):
        def __call__(self, mixture, points=1.0):
            return super().__call__(mixture, points) + 1e-4 * mixture.means.square().sum()

    x = 100 + torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
    result = gk.fit(gk.initialize(x, 1), x, gk.Adam(0.01), penalty=Shrunk(0.5), max_iter=2, backend="dense")
    assert result.history["objective"][0] + result.history["log_likelihood"][0] == pytest.approx(2.5, abs=0.05)


@pytest.mark.parametrize(
    "penalty", [gk.penalties.SqrtWeights(0.5), gk.penalties.Dirichlet(2.0), gk.penalties.WeightEntropy(0.1)]
)
def test_penalties_on_the_weights_are_equal_in_all_coordinates(penalty):
    mixture = gk.Mixture(
        weights=[0.25, 0.75], means=[[100.0], [140.0]], covariances=[4.0, 9.0], covariance_type="spherical"
    )
    moved = gk.Mixture(weights=[0.25, 0.75], means=[[0.0], [1.0]], covariances=[1.0, 1.0], covariance_type="spherical")
    assert penalty.of_weights
    assert (2 * penalty + penalty).of_weights
    assert not (penalty + gk.penalties.PrecisionRidge(0.1)).of_weights
    assert not (penalty + (lambda mixture: mixture.means.sum())).of_weights
    assert penalty(mixture, 10.0) == penalty(moved, 10.0)
