"""The mixture as a distribution: densities against scipy, torch and mpmath, samples against moments."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats
import torch
from conftest import FAMILIES, random_mixture
from torch.distributions import MixtureSameFamily

import gmmkeops as gk
from gmmkeops.components import check_finite


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("D", [1, 2, 5, 32])
def test_log_prob_against_torch_and_scipy(family, D):
    mixture = random_mixture(family, D=D, condition=1e4)
    x = mixture.sample(200)
    truth = MixtureSameFamily(mixture.mixture_distribution, mixture.component_distribution).log_prob(x)
    assert torch.allclose(mixture.log_prob(x), truth, rtol=1e-10, atol=1e-10)
    covariances = mixture.factor.covariances().expand(4, D, D).numpy()
    dense = sum(
        w * scipy.stats.multivariate_normal(m, C).pdf(x.numpy())
        for w, m, C in zip(mixture.weights.numpy(), mixture.means.numpy(), covariances, strict=True)
    )
    assert np.allclose(mixture.log_prob(x).exp().numpy(), dense, rtol=1e-8)
    assert torch.allclose(mixture.log_joint(x).logsumexp(1), truth, rtol=1e-10, atol=1e-10)
    assert torch.allclose(mixture.responsibilities(x).sum(1), torch.ones(200).double())


def test_log_prob_against_mpmath_far_out():
    mpmath.mp.dps = 40
    mixture = gk.Mixture.from_parameters([0.25, 0.75], [[-1.0], [2.0]], [0.5, 3.0], "spherical")
    for value in (-40.0, 0.3, 1000.0):
        terms = [w * mpmath.npdf(mpmath.mpf(value), m, mpmath.sqrt(v)) for w, m, v in ((0.25, -1, 0.5), (0.75, 2, 3))]
        truth = mpmath.log(sum(terms))
        got = float(mixture.log_prob([[value]])[0])
        assert abs(got - truth) <= 1e-12 * max(1, abs(truth))


def test_density_integrates_to_one():
    mixture = random_mixture("full", D=2)
    grid = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    assert mixture.log_prob(points).shape == (1201, 1201)
    integral = scipy.integrate.simpson(scipy.integrate.simpson(mixture.log_prob(points).exp().numpy(), x=grid), x=grid)
    assert abs(integral - 1) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_has_the_moments_and_the_labels(family):
    """100 000 draws: a mean is off by 5 standard errors with chance 6e-7 per coordinate."""
    mixture = random_mixture(family, D=3)
    generator = torch.Generator().manual_seed(0)
    x, labels = mixture.sample((100_000,), return_labels=True, generator=generator)
    error = (mixture.variance / 1e5).sqrt()
    assert bool(((x.mean(0) - mixture.mean).abs() < 5 * error).all())
    assert torch.allclose(torch.cov(x.T), mixture.covariance_matrix, rtol=0.05, atol=0.1)
    share = torch.bincount(labels, minlength=4) / 1e5
    assert bool(((share - mixture.weights).abs() < 5 * (mixture.weights / 1e5).sqrt()).all())
    k = int(mixture.weights.argmax())
    cloud = x[labels == k]
    covariance = mixture.factor.covariances()[0 if mixture.factor.leading == 1 else k]
    assert torch.allclose(torch.cov(cloud.T), covariance, rtol=0.1, atol=0.05 * float(covariance.max()))
    again = mixture.sample(100_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, again)


def test_closed_form_mean_and_covariance():
    mixture = gk.Mixture.from_parameters([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], [[1.0, 2.0], [3.0, 4.0]], "diag")
    assert mixture.mean.tolist() == [0.0, 0.0]
    assert torch.allclose(mixture.covariance_matrix, torch.tensor([[3.0, 0.0], [0.0, 3.0]]).double())
    assert mixture.stddev.shape == (2,)
    assert mixture.parameter_count == 1 + 4 + 4


def test_top_responsibilities_and_labels():
    mixture = random_mixture("full", K=6)
    x = mixture.sample((10, 7), generator=torch.Generator().manual_seed(0))
    dense = mixture.responsibilities(x)
    probability, component = mixture.responsibilities(x, k=2)
    assert probability.shape == component.shape == (10, 7, 2)
    assert torch.allclose(probability, dense.topk(2).values)
    assert torch.equal(component, dense.topk(2).indices)
    assert torch.equal(mixture.predict(x), dense.argmax(-1))


def test_gradients_reach_parameters_and_points():
    mixture = random_mixture("full")
    logits, means = mixture.logits.clone().requires_grad_(), mixture.means.clone().requires_grad_()
    raw = [tensor.clone().requires_grad_() for tensor in mixture.factor.tensors.values()]
    x = mixture.sample(8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def score(x, logits, means, *raw):
        return gk.Mixture(logits, means, gk.FullFactor(*raw)).log_prob(x)

    assert torch.autograd.gradcheck(score, (x, logits, means, *raw))


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_expand(family):
    mixture = random_mixture(family)
    batch = mixture.expand((3, 2))
    assert batch.batch_shape == (3, 2)
    assert batch.sample((5,)).shape == (5, 3, 2, 2)
    x = mixture.sample((5, 3, 2), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(batch.log_prob(x), mixture.log_prob(x))
    assert torch.allclose(batch.covariance_matrix[2, 1], mixture.covariance_matrix)
    points, labels = batch.sample((2000,), return_labels=True, generator=torch.Generator().manual_seed(0))
    centered = points[:, 1, 0] - mixture.means[labels[:, 1, 0]]
    assert bool((centered.mean(0).abs() < 5 * (mixture.variance / 2000).sqrt()).all())


def test_float32_points_in_a_float64_mixture_keep_their_dtype():
    mixture = random_mixture("full")
    x = mixture.sample(50).float()
    assert mixture.log_prob(x).dtype == torch.float32
    assert torch.allclose(mixture.log_prob(x).double(), mixture.log_prob(x.double()), atol=1e-5)
    assert mixture.log_joint(x).dtype == torch.float32


def test_containers():
    mixture = random_mixture("diag")
    x = mixture.sample(5)
    for other in (x.numpy(), x.tolist(), pd.DataFrame(x.numpy())):
        assert torch.equal(mixture.log_prob(other), mixture.log_prob(x))


def test_a_component_without_weight():
    full = gk.Mixture.from_parameters([0.0, 1.0], [[0.0], [1.0]], [1.0, 1.0], "spherical")
    one = gk.Mixture.from_parameters([1.0], [[1.0]], [1.0], "spherical")
    x = torch.linspace(-3, 3, 7).double()[:, None]
    assert torch.allclose(full.log_prob(x), one.log_prob(x))
    assert torch.equal(full.predict(x), torch.ones(7, dtype=torch.int64))
    assert torch.allclose(full.select(torch.tensor([1])).log_prob(x), one.log_prob(x))


EYE = torch.eye(2).double()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: gk.Mixture.from_parameters([0.5, 0.6], EYE, EYE, "diag"),
            ValueError,
            "weights must sum to one, got 1.1",
        ),
        (
            lambda: gk.Mixture.from_parameters([1.5, -0.5], EYE, EYE, "diag"),
            ValueError,
            "negative, got -0.5 in component 1",
        ),
        (lambda: gk.Mixture.from_parameters([1.0], EYE, EYE, "diag"), ValueError, r"weights must have shape \(K,\)"),
        (
            lambda: gk.Mixture.from_parameters([0.5, 0.5], EYE, EYE),
            ValueError,
            r"shape \(2, 2, 2\) for covariance_type='full'",
        ),
        (lambda: gk.Mixture.from_parameters([0.5, 0.5], EYE, -EYE, "tied"), ValueError, "positive definite"),
        (lambda: gk.Mixture.from_parameters([0.5, 0.5], EYE, EYE, "x"), ValueError, "covariance_type must be one of"),
        (lambda: gk.Mixture(torch.zeros(2), EYE, EYE), TypeError, "factor must be a Factor, got Tensor"),
        (lambda: gk.Mixture(torch.zeros(3), EYE, gk.DiagonalFactor(EYE)), ValueError, "logits must have shape"),
        (
            lambda: gk.Mixture(torch.zeros(2), EYE, gk.DiagonalFactor(torch.zeros(3, 2))),
            ValueError,
            "leading dimension 2 or 1",
        ),
        (
            lambda: gk.Mixture(torch.full((2,), math.nan), EYE, gk.DiagonalFactor(EYE)),
            ValueError,
            "logits must not be NaN",
        ),
        (
            lambda: gk.Mixture(torch.full((2,), -math.inf), EYE, gk.DiagonalFactor(EYE)),
            ValueError,
            "at least one component",
        ),
        (
            lambda: gk.Mixture(torch.zeros(2), EYE * math.inf, gk.DiagonalFactor(EYE)),
            ValueError,
            "means must be finite",
        ),
        (
            lambda: random_mixture("full").log_prob(torch.zeros(3)),
            ValueError,
            r"x must have 2 columns, shape \(\*, 2\)",
        ),
        (lambda: random_mixture("full").log_prob([[math.nan, 0.0]]), ValueError, "x must be finite, got NaN at row 0"),
        (lambda: random_mixture("full").log_prob([["a", "b"]]), TypeError, "x must be numeric"),
        (
            lambda: random_mixture("full").log_prob(torch.zeros(1, 2, device="meta")),
            TypeError,
            "x must contain numbers, got a tensor on the meta device",
        ),
        (lambda: random_mixture("full").expand((2,)).predict(torch.zeros(1, 2)), ValueError, "needs one mixture"),
    ],
)
def test_bad_input_gets_one_sentence(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("settings", [{"truncate": 0.01}, {"backend": "keops"}])
def test_a_batch_refuses_what_it_cannot_do(settings):
    """Its log-densities come from torch operations at all components."""
    mixture = random_mixture("full").expand([2])
    x = torch.zeros(5, 1, mixture.n_features, dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=f"a batch of mixtures does not support {'truncation' if 'truncate' in settings else 'backend='}",
    ):
        mixture.log_prob(x, **settings)
    with pytest.raises(ValueError, match="backend must be one of"):
        mixture.log_prob(x, backend="dens")
    assert torch.equal(mixture.log_prob(x, truncate=0, backend="dense"), mixture.log_prob(x))


def sizes(family, K=3, D=2, batch=()):
    """Shape of covariances in scikit-learn's convention."""
    leading = () if family.startswith("tied") else (K,)
    return (*batch, *leading, *{"full": (D, D), "diag": (D,), "spherical": ()}[family.removeprefix("tied_")])


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_covariances_and_back(family, batch):
    """The properties have scikit-learn's shapes, and the constructor accepts them."""
    mixture = random_mixture(family, K=3).expand(batch)
    assert (mixture.n_components, mixture.n_features) == (3, 2)
    assert mixture.covariances.shape == mixture.precisions.shape == sizes(family, batch=batch)
    names = {"weights": mixture.weights, "means": mixture.means, "covariances": mixture.covariances}
    again = gk.Mixture(**names, covariance_type=mixture.covariance_type)
    assert again.covariance_type == mixture.covariance_type
    x = mixture.sample(7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(again.log_prob(x), mixture.log_prob(x), rtol=1e-10)
    dense = mixture.factor.covariances()
    assert torch.allclose(mixture.factor.precisions() @ dense, torch.eye(2).double().expand_as(dense), atol=1e-9)
    if family in ("full", "tied_full"):
        assert torch.allclose(torch.linalg.inv(mixture.covariances), mixture.precisions, rtol=1e-8)
    else:
        assert torch.allclose(1 / mixture.covariances, mixture.precisions)


def test_covariance_types_are_those_of_scikit_learn():
    found = [random_mixture(family).covariance_type for family in ("full", "tied_full", "diag", "spherical")]
    assert found == ["full", "tied", "diag", "spherical"]
    assert random_mixture("tied_diag", K=1).covariance_type == "diag"


def test_logits_and_factors_combine_with_covariances_and_weights():
    means, C = [[0.0], [2.0]], [1.0, 4.0]
    right = gk.Mixture.from_parameters([0.25, 0.75], means, C, "spherical")
    factor = gk.SphericalFactor.from_covariances(torch.tensor(C).double(), 1)
    logits = torch.tensor([1.0, 3.0]).log().double()
    for other in (
        gk.Mixture(weights=[0.25, 0.75], means=means, factor=factor),
        gk.Mixture(logits=logits, means=means, covariances=C, covariance_type="spherical"),
    ):
        assert torch.allclose(other.log_prob([[0.5]]), right.log_prob([[0.5]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_components_by_index(family):
    mixture = random_mixture(family).named(["a", "b"])
    assert len(mixture) == 4
    x = mixture.sample(5, generator=torch.Generator().manual_seed(0))
    whole = mixture.log_joint(x)
    for index, components in (
        (2, [2]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        ([3, 0], [3, 0]),
        (np.array([False, True, False, True]), [1, 3]),
        (torch.tensor([0, 1]), [0, 1]),
    ):
        part = mixture[index]
        expected = whole[:, components] - mixture.log_weights[components].logsumexp(0)
        assert torch.allclose(part.log_joint(x), expected)
        assert part.columns == ("a", "b")
    assert [part.n_components for part in mixture] == [1, 1, 1, 1]
    for index, kind in ((4, IndexError), ([0, 9], IndexError), ([], IndexError), ("a", TypeError), (None, IndexError)):
        with pytest.raises(kind, match=r"mixture|select one or more|out of range"):
            mixture[index]


def test_a_component_without_weight_by_index():
    mixture = gk.Mixture.from_parameters([0.0, 1.0], [[0.0], [1.0]], [1.0, 1.0], "spherical")
    assert mixture[0].weights.tolist() == [1.0]
    assert float(mixture[0].log_prob([[0.0]])[0]) == pytest.approx(-0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("family", FAMILIES)
def test_entries_of_a_batch_by_index(family):
    mixture = random_mixture(family)
    shifts = torch.randn(2, 3, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    batch = mixture.expand((2, 3))
    batch = gk.Mixture(batch.logits, batch.means + shifts, batch.factor)
    x = mixture.sample(5, generator=torch.Generator().manual_seed(0))
    whole = batch.log_prob(x[:, None, None])
    assert len(batch) == 4
    assert torch.allclose(batch[1, 2].log_prob(x), whole[:, 1, 2])
    assert torch.allclose(batch[1].log_prob(x[:, None]), whole[:, 1])
    assert torch.allclose(batch[..., ::2].log_prob(x[:, None, None]), whole[..., ::2])
    with pytest.raises(IndexError, match=r"is out of range for a batch of shape \(2, 3\)"):
        batch[2]


def test_a_mixture_is_one_object_for_numpy_and_pandas():
    mixtures = [random_mixture("full"), random_mixture("diag", K=2)]
    assert np.asarray(mixtures[0]).shape == ()
    assert np.array(mixtures).shape == (2,)
    assert pd.Series(mixtures)[1] is mixtures[1]
    with pytest.raises(TypeError, match="x must be an array of numbers, got a Mixture"):
        mixtures[0].log_prob(mixtures[0])


def test_criteria_and_files_by_methods(tmp_path):
    mixture = random_mixture("full")
    x, g = mixture.sample(50), torch.arange(50).double()
    assert mixture.score(x, sample_weight=g) == gk.analysis.score(mixture, x, sample_weight=g)
    assert mixture.bic(x) == gk.analysis.bic(mixture, x)
    assert mixture.aic(x) == gk.analysis.aic(mixture, x)
    mixture.save(tmp_path / "m.safetensors")
    assert torch.equal(gk.load(tmp_path / "m.safetensors").means, mixture.means)


def test_table_of_a_notebook():
    mixture = random_mixture("diag", K=12, D=9).named([f"<{d}>" for d in range(9)])
    table = mixture._repr_html_()
    assert table.count("<tr>") == 11
    assert "the 10 components with the largest weights" in table
    assert "mean &lt;0&gt;" in table
    assert "…" in table
    one = gk.Mixture(weights=[0.3, 0.7], means=[[1.0], [2.5]], covariances=[4.0, 0.25], covariance_type="spherical")
    assert "<td>1</td><td>0.7</td><td>2.5</td><td>0.5</td>" in one._repr_html_()
    assert "largest weights" not in one._repr_html_()
    assert one.expand((3,))._repr_html_() == f"<code>{one.expand((3,))!r}</code>"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gk.Mixture(), "Mixture needs means="),
        (lambda: gk.Mixture(means=EYE, covariances=EYE), "either weights= or logits="),
        (
            lambda: gk.Mixture(weights=[0.5, 0.5], means=EYE, covariances=EYE, factor=gk.DiagonalFactor(EYE)),
            "either covariances= .* or factor=",
        ),
        (
            lambda: gk.Mixture(torch.zeros(2), EYE, gk.DiagonalFactor(EYE), covariance_type="diag"),
            "covariance_type can only be given with covariances=",
        ),
        (lambda: gk.Mixture(probs=[1.0], means=EYE), "no argument probs; pass weights="),
        (lambda: gk.Mixture(weights=[1.0], locs=EYE), "no argument locs; pass means="),
        (lambda: gk.Mixture(covariance_matrix=EYE), "no argument covariance_matrix; pass covariances="),
        (lambda: gk.Mixture(n_components=3), "no argument n_components; pass weights=, means= and covariances="),
        (lambda: gk.Mixture(torch.ones(2) / 2, EYE, EYE), r"pass Mixture\(weights=..., means=..., covariances=..."),
    ],
)
def test_wrong_names_get_the_right_one(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda m, x: m.log_prob(x),
        lambda m, x: m.log_prob(x, truncate=1e-3),
        lambda m, x: m.log_prob(x.float()),
        lambda m, x: m.log_joint(x),
        lambda m, x: m.predict(x),
        lambda m, x: m.responsibilities(x),
        lambda m, x: m.responsibilities(x, k=2),
    ],
)
def test_distant_points_are_checked_once(monkeypatch, evaluate):
    checked = []

    def count(tensor, *, name, **options):
        checked.append(name)
        check_finite(tensor, name=name, **options)

    for module in ("gmmkeops.models.points", "gmmkeops.data.points"):
        monkeypatch.setattr(f"{module}.check_finite", count)
    means = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    m = gk.Mixture(weights=[0.5, 0.3, 0.2], means=means, covariances=torch.ones(3), covariance_type="spherical")
    # The extent of points near the components shows that they are finite.
    evaluate(m, torch.full((50, 2), 1e5, dtype=torch.float64))
    assert checked == ["x"]
