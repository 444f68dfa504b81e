"""The contract of component families, which a new one inherits by a line in the list KINDS."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES, make_factor
from torch.distributions import MixtureSameFamily, MultivariateNormal

import gmmkeops as gk
from gmmkeops import DiagonalFactor, FullFactor, SphericalFactor
from gmmkeops.components.families import factor_class
from gmmkeops.components.parameters import gamma


class GradedFactor(gk.Factor):
    """A family of this test: columns d have the standard deviations (1 + d) s_k, so that there is one parameter."""

    family, names, isotropic = "graded", ("graded",), True

    def __init__(self, log_diagonal, features):
        self.log_diagonal, self.features = log_diagonal, features

    @classmethod
    def shapes(cls, leading, features):
        return {"log_diagonal": (leading, 1)}

    @classmethod
    def count(cls, components, features, tied=False):
        return 1 if tied else components

    @classmethod
    def of(cls, tensors, features):
        return cls(tensors["log_diagonal"], features)

    @property
    def log_scales(self):
        return self.log_diagonal - torch.arange(1.0, 1 + self.features).to(self.log_diagonal).log()

    @classmethod
    def from_scales(cls, logs, features):
        grades = torch.arange(1.0, 1 + logs.shape[-1]).to(logs)
        return cls(-0.5 * ((-2 * logs).exp() / grades**2).mean(-1, keepdim=True).log(), logs.shape[-1])

    @classmethod
    def rescaling(cls, scale):
        return super().rescaling(scale[:1])

    @classmethod
    def directions(cls, features):
        return torch.diag(torch.arange(1.0, 1 + features).double() ** 2)[None]

    @classmethod
    def quadratics(cls, y):
        return (y.square() * torch.arange(1.0, 1 + y.shape[-1]).to(y) ** 2).sum(-1, keepdim=True)

    @classmethod
    def student(cls, degrees, features):
        return features * degrees, torch.ones_like(degrees)

    @classmethod
    def student_width(cls, features):
        return features

    def wishart(self, degrees, generator):
        shape = (0.5 * self.features * degrees)[..., None]
        return self.replace(log_diagonal=self.log_diagonal + 0.5 * (gamma(shape, generator) / shape).log())


KINDS = [FullFactor, DiagonalFactor, SphericalFactor, GradedFactor]


def random_factor(kind, leading, D, seed=0):
    """Random parameters, so that every component has a determinant of its own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = kind.shapes(leading, D).items()
    tensors = {n: 0.4 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes}
    return kind.of(tensors, D)


def random_spreads(kind, K, D, seed=0):
    """Scatter matrices (K, D, D) of random points."""
    z = torch.randn(K, 4 * D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.mT @ z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
class TestFamily:
    """Every method, file and engine relies on these properties of a family."""

    def test_is_found_by_its_names(self, kind, tied):
        assert factor_class(kind.type_name(tied)) == (kind, tied)
        assert all(factor_class(("tied_" if tied else "") + name) == (kind, tied) for name in kind.names)

    def test_precisions_are_those_of_the_factor(self, kind, tied):
        factor = random_factor(kind, 1 if tied else 4, 3)
        eye = torch.eye(3).double()
        assert torch.allclose(factor.covariances() @ factor.precisions(), eye.expand(factor.leading, 3, 3), atol=1e-10)
        assert torch.allclose(factor.cholesky() @ factor.cholesky().mT, factor.covariances())
        assert torch.allclose(factor.matrices() @ factor.matrices().mT, factor.precisions())
        assert torch.allclose(factor.log_determinant(), -0.5 * torch.logdet(factor.covariances()))
        assert torch.allclose(factor.precision_diagonals(), factor.precisions().diagonal(dim1=-2, dim2=-1))
        assert torch.allclose(factor.row_norms(), factor.matrices().norm(dim=-1))
        assert float(factor.largest()) == pytest.approx(float(factor.matrices().abs().max()))

    def test_whitening(self, kind, tied):
        factor = random_factor(kind, 1 if tied else 4, 3)
        z = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = factor.whiten(z)
        assert torch.allclose(y, torch.einsum("kde,nkd->nke", factor.matrices().expand(4, 3, 3), z))
        assert torch.allclose(factor.unwhiten_all(y), z)
        labels = torch.arange(7) % factor.leading
        rows = factor.unwhiten(y[torch.arange(7), labels], labels)
        assert torch.allclose(rows, z[torch.arange(7), labels])
        assert torch.allclose(factor.times(factor.U[labels], z[:, 0]), factor.whiten(z[:, :1])[torch.arange(7), labels])

    def test_conversions_lead_back(self, kind, tied):
        factor = random_factor(kind, 1 if tied else 4, 3)
        for back in (
            kind.from_covariances(factor.compact(factor.covariances()), features=3),
            kind.from_precisions(factor.compact(factor.precisions()), features=3),
            kind.from_cholesky(factor.compact(factor.cholesky()), features=3),
            kind.from_factors(factor.U, features=3),
            kind.of(factor.tensors, 3),
        ):
            assert torch.allclose(back.covariances(), factor.covariances())
        assert torch.allclose(factor.compact_covariances(), factor.compact(factor.covariances()))
        scale = torch.full((3,), 4.0).double() if kind.isotropic else torch.tensor([1.0, 2.0, 8.0]).double()
        assert torch.allclose(factor.rescale(scale).covariances(), factor.covariances() / scale[:, None] / scale)
        more = torch.rand(factor.leading, generator=torch.Generator().manual_seed(0)).double() + 0.5
        assert torch.allclose(factor.scaled(more).matrices(), factor.matrices() * more[:, None, None])

    def test_layout_of_second_moments(self, kind, tied):
        z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        matrices = z[:, :, None] * z[:, None, :]
        assert torch.allclose(kind.outer(z), kind.second_moments(matrices))
        assert kind.outer(z).shape == (5, *kind.spread_shape(3))
        assert torch.allclose(kind.mean_scatter(kind.second_moments(matrices), 3), kind.compact(matrices))
        factor = random_factor(kind, 5, 3)
        spreads = factor.compact(random_spreads(kind, 5, 3))
        dense = kind.from_covariances(spreads, features=3).covariances()
        expected = (factor.precisions() * dense).sum()
        assert torch.allclose(factor.trace(kind.from_covariances(spreads, features=3).compact_covariances()), expected)

    def test_the_m_step_maximizes_the_expected_likelihood(self, kind, tied):
        """The gradient in the stored parameters is zero, by autograd through dense matrices."""
        leading, D = 1 if tied else 4, 3
        scatter, counts = random_spreads(kind, leading, D), torch.arange(3.0, 3 + leading).double()
        kept = kind.second_moments(scatter)
        factor, repaired = kind.maximize(kept, counts, D, ridge=torch.zeros(D).double(), floor=1e-20)
        assert not bool(repaired.any())
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in factor.tensors.items()}
        at = kind.of(leaves, D)
        value = (counts * at.log_determinant()).sum() - 0.5 * (at.precisions() * scatter).sum()
        for slope in torch.autograd.grad(value, list(leaves.values())):
            assert float(slope.abs().amax()) < 1e-9
        ridged, _ = kind.maximize(kept, counts, D, ridge=torch.full((D,), 0.5).double(), floor=1e-20)
        added = kind.compact(torch.eye(D).double()) * 0.5
        wanted = kind.from_covariances(factor.compact_covariances() + added, features=D)
        if kind is not GradedFactor:
            assert torch.allclose(ridged.covariances(), wanted.covariances())

    def test_floors(self, kind, tied):
        factor = random_factor(kind, 1 if tied else 4, 3)
        same, low = factor.floored(1e-9)
        assert same is factor
        assert not bool(low.any())
        raised, low = factor.floored(0.5)
        below = torch.linalg.eigvalsh(factor.covariances())[:, 0] < 0.5
        assert torch.equal(low, below)
        assert bool(below.any())
        if kind is not GradedFactor:
            assert float(torch.linalg.eigvalsh(raised.covariances()).min()) >= 0.5 * (1 - 1e-9)

    def test_singular_covariances_are_repaired(self, kind, tied):
        """Zero variances become the floor; a covariance of lower rank is reported and changed by rounding alone."""
        raised, repaired = kind.nearest(torch.zeros(2, *kind.spread_shape(3)).double(), 3, 1e-4)
        assert repaired.tolist() == [True, True]
        if kind is not GradedFactor:
            assert torch.allclose(raised.covariances(), 1e-4 * torch.eye(3).double().expand(2, 3, 3))
        assert bool(torch.isfinite(raised.U).all())
        directions = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.3, 4.0]]).double()
        lines = kind.compact(directions[:, :, None] * directions[:, None, :])
        found, repaired = kind.nearest(lines, 3, 1e-9)
        if kind is FullFactor:
            assert repaired.tolist() == [True, True]
        if kind is not GradedFactor:
            assert torch.allclose(found.compact_covariances(), lines, rtol=1e-6)
        assert bool(torch.isfinite(found.U).all())

    def test_is_a_distribution(self, kind, tied):
        factor = random_factor(kind, 1 if tied else 4, 3)
        generator = torch.Generator().manual_seed(0)
        means, x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        peer = MultivariateNormal(means, factor.covariances())
        assert torch.allclose(factor.distribution(means).log_prob(x), peer.log_prob(x))
        mixture = gk.Mixture(torch.tensor([0.3, -0.2, 1.0, 0.1]).double(), means, factor)
        whole = MixtureSameFamily(mixture.mixture_distribution, peer)
        assert torch.allclose(mixture.log_prob(x), whole.log_prob(x))

    def test_marginals_and_conditionals(self, kind, tied):
        factor, columns, rest = random_factor(kind, 1 if tied else 4, 4), [3, 1], [2, 0]
        if kind is GradedFactor:
            with pytest.raises(
                NotImplementedError, match="marginal distributions are not implemented for graded components"
            ):
                factor.marginal(columns)
            return
        C = factor.covariances()
        assert torch.allclose(factor.marginal(columns).covariances(), C[:, columns][:, :, columns])
        conditional, gain = factor.conditional(columns, rest)
        # The covariance and the slope of a regression of the rest on the columns.
        slope = torch.linalg.solve(C[:, columns][:, :, columns], C[:, columns][:, :, rest]).mT
        left = C[:, rest][:, :, rest] - slope @ C[:, columns][:, :, rest]
        assert torch.allclose(conditional.covariances(), left)
        assert torch.allclose(torch.zeros_like(slope) if gain is None else -gain, slope)

    def test_wishart_distribution_and_its_predictive_density(self, kind, tied):
        """Draws have the expected precision, and the Gaussians of the draws average to Student's t distribution."""
        factor, D = random_factor(kind, 1 if tied else 4, 3), 3
        degrees = torch.arange(7.0, 7 + factor.leading).double()
        draws = factor.wishart(degrees.expand(20_000, -1), torch.Generator().manual_seed(0))

        def close(values, expected):
            return bool(((values.mean(0) - expected).abs() < 5 * values.std(0) / len(values) ** 0.5 + 1e-12).all())

        assert close(draws.precisions(), factor.precisions())
        z = torch.tensor([0.7, -1.2, 0.4]).double().expand(factor.leading, D)
        logs = draws.log_determinant() - 0.5 * draws.whiten(z.expand(20_000, -1, -1)).square().sum(-1)
        freedom, ratio = kind.student(degrees, D)
        width = kind.student_width(D)
        terms = factor.whiten(z).square() * ratio[:, None]
        square = terms if width == 1 else terms.sum(1, keepdim=True)
        scale = 0.5 * D * ratio.log() + factor.log_determinant()
        df = freedom[:, None]
        student = torch.lgamma((df + width) / 2) - torch.lgamma(df / 2) - 0.5 * width * (df / 2).log()
        student = (student - 0.5 * (df + width) * (square / df).log1p()).sum(1) + scale
        assert close(logs.exp(), student.exp())

    def test_copies(self, kind, tied):
        factor = random_factor(kind, 1 if tied else 4, 3)
        narrow = factor.to(torch.float32)
        assert narrow.dtype == torch.float32
        assert {t.dtype for t in narrow.tensors.values()} == {torch.float32}
        leaves = kind.of({name: t.requires_grad_() for name, t in factor.tensors.items()}, 3)
        kept = leaves.detach()
        for name, tensor in kept.tensors.items():
            assert torch.equal(tensor, leaves.tensors[name])
            assert not tensor.requires_grad
            assert tensor.data_ptr() != leaves.tensors[name].data_ptr()

    def test_directions_of_its_covariances(self, kind, tied):
        E = kind.directions(3)
        assert len(E) == kind.count(1, 3)
        y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.allclose(kind.quadratics(y), torch.einsum("nd,qde,ne->nq", y, E, y))

    def test_components(self, kind, tied):
        factor = random_factor(kind, 1 if tied else 4, 3)
        index = torch.tensor([2, 0])
        assert torch.equal(factor.select(index).U, factor.U if tied else factor.U[index])
        other = random_factor(kind, factor.leading, 3, seed=1)
        mixed = factor.scatter(index, other.select(index)).covariances()
        assert torch.equal(mixed[[2, 0] if not tied else [0]], other.covariances()[[2, 0] if not tied else [0]])
        assert factor.expand((5,)).covariances().shape == (5, factor.leading, 3, 3)
        assert sum(t.numel() for t in factor.tensors.values()) == kind.count(4, 3, tied)

    def test_fits_by_every_method_and_is_saved(self, kind, tied, tmp_path):
        """EM ends where the objective has no slope, Adam comes near it, and a file holds the mixture."""
        generator = torch.Generator().manual_seed(0)
        truth = gk.Mixture(
            torch.zeros(2).double(), torch.tensor([[-6.0, 0], [6, 3]]).double(), random_factor(kind, 2, 2)
        )
        x = truth.sample((400,), generator=generator)
        start = gk.initialize(x, 2, covariance_type=kind.type_name(tied))
        assert type(start.factor) is kind
        fitted = gk.fit(start, x, gk.EM(tol=1e-10, reg_covar=0), max_iter=500)
        leaves = {n: t.clone().requires_grad_() for n, t in fitted.mixture.factor.tensors.items()}
        density = gk.Mixture(fitted.mixture.logits, fitted.mixture.means, kind.of(leaves, 2)).log_prob(x).mean()
        assert all(float(slope.abs().amax()) < 1e-5 for slope in torch.autograd.grad(density, list(leaves.values())))
        by_gradient = gk.fit(start, x, gk.Adam(lr=0.05, tol=0), max_iter=150)
        assert by_gradient.log_likelihood == pytest.approx(fitted.log_likelihood, abs=2e-3)
        gk.save(fitted.mixture, tmp_path / "model.safetensors")
        back = gk.load(tmp_path / "model.safetensors")
        assert type(back.factor) is kind
        assert torch.equal(back.log_prob(x), fitted.mixture.log_prob(x))
        errors = gk.standard_errors(fitted.mixture, x).covariances
        assert (
            errors.shape
            == ((1,) if not tied else ()) * 0
            + fitted.mixture.factor.compact_covariances()[0 if tied else slice(None)].shape
        )
        again = gk.fit(start, x, gk.EM(), max_iter=4, checkpoint=tmp_path / "fit.ckpt")
        assert gk.fit(start, x, gk.EM(), max_iter=4, checkpoint=tmp_path / "fit.ckpt").n_iter == again.n_iter


def natural(factor, matrices):
    """A stack of dense matrices in the shape that the factor's constructors take."""
    return factor.compact(matrices)


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
        (lambda: SphericalFactor(torch.zeros(3, 2), 2), ValueError, r"log_diagonal must have shape \(\*, 1\)"),
        (lambda: FullFactor(torch.zeros(3, 2), torch.zeros(3, 2)), ValueError, "upper must have shape"),
        (lambda: factor_class("round"), ValueError, "covariance_type must be one of 'full'"),
        (lambda: gk.DiagonalFactor.from_covariances([["a"]]), TypeError, "must be numeric"),
    ],
)
def test_bad_input_gets_one_sentence(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
