"""Inputs at the edges of the number range: the right value, or one sentence about the input."""

from __future__ import annotations

import math
import re
import warnings

import mpmath
import numpy as np
import pytest
import torch

import gmmkeops as gk

SENTENCE = re.compile(r"^[^\n]*(overflows?|underflows?|in float64)[^\n]*\.$")
KINDS = ["full", "diag", "spherical", "tied"]


def mixture(kind="full", D=2):
    """Three components with unequal weights and shapes."""
    generator = torch.Generator().manual_seed(5)
    A = torch.randn(3, D, D, generator=generator, dtype=torch.float64) + 2 * torch.eye(D, dtype=torch.float64)
    covariances = A @ A.mT
    shapes = {
        "full": covariances,
        "tied": covariances[0],
        "diag": covariances.diagonal(dim1=1, dim2=2),
        "spherical": covariances[:, 0, 0],
    }
    means = torch.tensor([[0.0, 1.0, -2.0], [3.0, -1.0, 0.5], [-4.0, 2.0, 1.0]], dtype=torch.float64)[:, :D]
    return gk.Mixture.from_parameters([0.2, 0.5, 0.3], means, shapes[kind], kind)


def oracle(m, point):
    """log p(x, k) of one point, with 400 digits."""
    with mpmath.workdps(400):
        values, D = [], m.n_features
        covariances = m.component_distribution.covariance_matrix if m.factor.family == "full" else None
        for k in range(m.n_components):
            if covariances is None:
                S = mpmath.diag([mpmath.mpf(v) for v in m.component_distribution.variance[k].tolist()])
            else:
                U = mpmath.matrix(m.factor.matrices()[k if m.factor.leading > 1 else 0].tolist())
                S = (U * U.T) ** -1
            z = mpmath.matrix([mpmath.mpf(a) - mpmath.mpf(b) for a, b in zip(point, m.means[k].tolist(), strict=True)])
            quadratic = (z.T * S**-1 * z)[0]
            weight = mpmath.log(mpmath.mpf(float(m.weights[k])))
            values.append(weight - (D * mpmath.log(2 * mpmath.pi) + mpmath.log(mpmath.det(S)) + quadratic) / 2)
        top = max(values)
        total = top + mpmath.log(sum(mpmath.exp(v - top) for v in values))
        return values, total, [float(mpmath.exp(v - total)) for v in values]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "far"),
    [(torch.float32, far) for far in (1e2, 3e2, 1e3, 1e5, 1e9, 1e16, 3e30)]
    + [(torch.float64, far) for far in (1e2, 3e2, 1e3, 1e5, 1e9, 1e16, 3e30, 1e100, 1e140)],
)
def test_far_points(kind, dtype, far):
    m = mixture(kind)
    point = torch.tensor([[far, -0.7 * far]], dtype=dtype)
    _, total, shares = oracle(m, point[0].tolist())
    found = m.responsibilities(point)[0]
    np.testing.assert_allclose(found.numpy(), shares, atol=2e-5 if dtype == torch.float32 else 1e-9)
    best, index = m.responsibilities(point, k=2)
    order = np.argsort(shares)[::-1][:2]
    np.testing.assert_allclose(best[0].numpy(), np.array(shares)[order], atol=2e-5 if dtype == torch.float32 else 1e-9)
    if shares[order[0]] > 0.6:
        assert int(index[0, 0]) == int(m.predict(point)[0]) == int(order[0])
    if dtype == torch.float32 and float(-total) > 3e38:
        for call in (m.log_prob, m.log_joint):
            with pytest.raises(
                ValueError, match=r"^x reaches .* overflow float32; pass float64, or rescale the columns\.$"
            ):
                call(point)
    else:
        assert float(m.log_prob(point)[0]) == pytest.approx(float(total), rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [1e154, 1e200, 1.7e308])
def test_points_beyond_the_range_of_squares(kind, far):
    m = mixture(kind)
    x = torch.zeros(5, 2, dtype=torch.float64)
    x[3, 1] = far
    batch = m.expand([2])
    calls = [
        lambda: m.log_prob(x),
        lambda: m.log_joint(x),
        lambda: m.responsibilities(x),
        lambda: m.responsibilities(x, k=2),
        lambda: m.predict(x),
        lambda: batch.log_prob(x[:, None]),
        lambda: gk.analysis.score(m, x),
        lambda: gk.analysis.bic(m, x),
        lambda: gk.fit(m, x, gk.EM()),
        lambda: gk.initialize(x, 2),
        lambda: gk.GaussianMixture(2).fit(x.numpy()),
        lambda: gk.analysis.select(x, [1, 2]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=SENTENCE):
            call()


def test_an_estimator_says_so_too():
    x = np.random.default_rng(0).normal(size=(50, 2))
    model = gk.GaussianMixture(2, random_state=0).fit(x)
    far = np.array([[1e160, 0.0]])
    for name in ("predict", "predict_proba", "score_samples", "score", "bic", "aic"):
        with pytest.raises(ValueError, match=SENTENCE):
            getattr(model, name)(far)
    proba = model.predict_proba(np.array([[1e30, -1e30]], dtype=np.float32))
    assert np.isfinite(proba).all()
    assert proba.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_everywhere(bad):
    m = mixture()
    x = torch.zeros(4, 2, dtype=torch.float64)
    x[2, 1] = bad
    batch = m.expand([3])
    calls = [
        lambda: m.log_prob(x),
        lambda: m.log_joint(x),
        lambda: m.responsibilities(x),
        lambda: m.responsibilities(x, k=1),
        lambda: m.predict(x),
        lambda: m.log_prob(x[2]),
        lambda: batch.log_prob(x[:, None]),
        lambda: batch.log_joint(x[:, None]),
        lambda: batch.responsibilities(x[:, None]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="x must be finite, got"):
            call()
    one = m.marginal(0)
    if math.isnan(bad):
        with pytest.raises(ValueError, match="x must be finite, got NaN"):
            one.cdf([[bad]])
    else:
        assert float(one.cdf(torch.tensor([[bad]], dtype=torch.float64))) == (1.0 if bad > 0 else 0.0)


@pytest.mark.parametrize("size", [1e-320, 1e-300, 1e-154, 1e154, 1e300])
@pytest.mark.parametrize("kind", ["full", "tied", "spherical"])
def test_only_ratios_of_weights_matter(kind, size):
    generator = np.random.default_rng(1)
    x = np.concatenate([generator.normal(size=(60, 2)), 6 + generator.normal(size=(40, 2))])
    g = generator.integers(1, 9, size=100).astype(float)
    # Products with whole numbers keep ratios, also where numbers have few digits.
    small = g * size if size > 1e-310 else g * 2.0**-1060
    unit = small[0] / g[0]
    starts = [gk.initialize(x, 2, covariance_type=kind, sample_weight=h) for h in (g, small)]
    torch.testing.assert_close(starts[0].means, starts[1].means, rtol=1e-9, atol=1e-9)
    fits = [gk.fit(starts[0], x, gk.EM(), sample_weight=h) for h in (g, small)]
    torch.testing.assert_close(fits[0].mixture.means, fits[1].mixture.means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fits[0].mixture.weights, fits[1].mixture.weights, rtol=1e-9, atol=1e-9)
    assert fits[1].report.total_weight == pytest.approx(g.sum() * unit, rel=1e-6)
    source = gk.Source.of(x, weights=small, chunk_rows=30)
    streamed = gk.fit(starts[0], source, gk.EM()).mixture
    torch.testing.assert_close(fits[0].mixture.means, streamed.means, rtol=1e-9, atol=1e-9)
    models = [gk.GaussianMixture(2, covariance_type=kind, random_state=0).fit(x, sample_weight=h) for h in (g, small)]
    np.testing.assert_allclose(models[0].means_, models[1].means_, rtol=1e-9, atol=1e-9)
    m = fits[0].mixture
    assert gk.analysis.score(m, x, sample_weight=small) == pytest.approx(
        gk.analysis.score(m, x, sample_weight=g), rel=1e-9
    )
    total = math.fsum(float(a) * b for a, b in zip(m.log_prob(torch.as_tensor(x)), g, strict=True))
    bic = gk.analysis.bic(m, x, sample_weight=small)
    assert bic == pytest.approx(-2 * total * unit + m.parameter_count * (math.log(g.sum()) + math.log(unit)), rel=1e-6)
    sums = [
        gk.reductions.moments(torch.as_tensor(x), m.offsets, m.means, m.factor, weights=torch.as_tensor(h)).S0
        for h in (g, small)
    ]
    torch.testing.assert_close(sums[0] * unit, sums[1], rtol=1e-6, atol=0)


def test_a_prior_sees_the_size_of_weights():
    """Pseudo-points of a Dirichlet prior are nothing against weights of 1e300, and all there is against those of 1e-300."""
    x = np.concatenate([np.linspace(-1, 1, 80), np.linspace(9, 11, 20)])[:, None]
    start = gk.initialize(x, 2)
    prior = gk.penalties.Dirichlet(3.0)
    for size, expected in ((1e300, [0.2, 0.8]), (1e-300, [0.5, 0.5])):
        result = gk.fit(start, x, gk.EM(), penalty=prior, sample_weight=np.full(100, size))
        np.testing.assert_allclose(result.mixture.weights.sort().values.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1e308, 1e308, 1e308], "must have a finite sum in float64"),
        ([0.0, 0.0, 0.0], "must not all be zero"),
        ([1.0, math.inf, 1.0], "must be finite"),
        ([1.0, math.nan, 1.0], "must be finite"),
        ([10**400, 1, 1], "within the range of float64"),
    ],
)
def test_weights_that_are_refused(weights, message):
    x = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    for call in (
        lambda: gk.fit(gk.initialize(x, 1), x, gk.EM(), sample_weight=weights),
        lambda: gk.initialize(x, 1, sample_weight=weights),
        lambda: gk.GaussianMixture(1).fit(x.numpy(), sample_weight=weights),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("size", [1e-140, 1e-100, 1e100, 1e140])
@pytest.mark.parametrize("kind", KINDS)
def test_data_of_any_size_within_range(kind, size):
    generator = np.random.default_rng(2)
    x = np.concatenate([generator.normal(size=(70, 2)), 7 + 2 * generator.normal(size=(50, 2))])
    size = 2.0 ** round(math.log2(size))
    options = {"covariance_type": kind, "reg_covar": 0, "random_state": 0, "tol": 1e-8, "max_iter": 200}
    plain, scaled = (gk.GaussianMixture(2, **options).fit(s * x) for s in (1.0, size))
    order = [model.means_[:, 0].argsort() for model in (plain, scaled)]
    np.testing.assert_allclose(scaled.means_[order[1]] / size, plain.means_[order[0]], rtol=1e-6, atol=1e-6)
    assert scaled.score(size * x) == pytest.approx(plain.score(x) - 2 * math.log(size), abs=1e-6)
    assert scaled.bic(size * x) == pytest.approx(plain.bic(x) + 480 * math.log(size), rel=1e-9)
    assert (scaled.predict(size * x)[[0, -1]] != scaled.predict(size * x)[[-1, 0]]).all()


@pytest.mark.parametrize("size", [1e-160, 1e155, 1e200])
def test_data_whose_squares_are_out_of_range(size):
    x = np.random.default_rng(3).normal(size=(50, 2)) * size
    start = mixture()
    for call in (
        lambda: gk.GaussianMixture(2).fit(x),
        lambda: gk.initialize(x, 2),
        lambda: gk.fit(start, x, gk.EM()),
        lambda: gk.analysis.select(x, [1]),
        lambda: gk.BayesianGaussianMixture(n_components=2).fit(x),
    ):
        with pytest.raises(ValueError, match=SENTENCE):
            call()


def test_float32_data_of_large_size():
    """Squares overflow float32 but not float64, in which starts and fits are found."""
    generator = np.random.default_rng(2)
    x = np.concatenate([generator.normal(size=(70, 2)), 7 + generator.normal(size=(50, 2))]).astype(np.float32)
    size = np.float32(2.0**100)
    settings = {"random_state": 0, "reg_covar": 0}
    plain, scaled = gk.GaussianMixture(2, **settings).fit(x), gk.GaussianMixture(2, **settings).fit(size * x)
    order = [model.means_[:, 0].argsort() for model in (plain, scaled)]
    np.testing.assert_allclose(scaled.means_[order[1]] / size, plain.means_[order[0]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        scaled.predict_proba(size * x)[:, order[1]], plain.predict_proba(x)[:, order[0]], atol=1e-4
    )


def test_weights_of_components_over_all_orders():
    logits = torch.tensor([0.0, -700.0, -1e5, -math.inf], dtype=torch.float64)
    means = torch.tensor([[0.0], [100.0], [1000.0], [5.0]], dtype=torch.float64)
    m = gk.Mixture(logits, means, gk.SphericalFactor(torch.zeros(4, 1, dtype=torch.float64), 1))
    x = torch.tensor([[0.0], [100.0], [1000.0], [5.0]], dtype=torch.float64)
    expected = -0.5 * math.log(2 * math.pi) + torch.tensor([0.0, -700.0, -1e5, -12.5], dtype=torch.float64)
    torch.testing.assert_close(m.log_prob(x), expected, rtol=1e-12, atol=1e-12)
    assert m.predict(x).tolist() == [0, 1, 2, 0]
    proba = m.responsibilities(x)
    torch.testing.assert_close(proba.sum(1), torch.ones(4, dtype=torch.float64))
    assert float(proba[:, 3].max()) == 0
    torch.testing.assert_close(m.responsibilities(x, k=4)[0].sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_constant_columns_and_as_many_components_as_points(kind):
    x = np.array([[0.0, 7e8], [1.0, 7e8], [5.0, 7e8]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.ConvergenceWarning)
        model = gk.GaussianMixture(3, covariance_type=kind, random_state=0).fit(x)
    assert np.isfinite(model.score_samples(x)).all()
    np.testing.assert_allclose(np.sort(model.means_[:, 0]), x[:, 0], atol=1e-3)
    np.testing.assert_allclose(model.means_[:, 1], 7e8)
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_far_away(kind):
    m = mixture(kind)
    x = torch.tensor([[0.3, 0.7], [1e9, -7e8], [3e30, 1e30], [1e140, 1e139]], dtype=torch.float64)
    batch = m.expand([2])
    found = batch.responsibilities(x[:, None].expand(4, 2, 2))
    expected = torch.tensor([oracle(m, point.tolist())[2] for point in x], dtype=torch.float64)
    torch.testing.assert_close(found, expected[:, None].expand(4, 2, 3), atol=1e-9, rtol=0)
    torch.testing.assert_close(m.responsibilities(x), expected, atol=1e-9, rtol=0)


def test_gradients_of_responsibilities_far_away():
    m = mixture("tied")
    # Between two components, 1e7 away: their difference is linear in x there, with the slope Σ⁻¹(μ₀ - μ₂).
    precision = m.factor.matrices()[0] @ m.factor.matrices()[0].mT
    slope = precision @ (m.means[0] - m.means[2])
    normal = torch.stack([-slope[1], slope[0]]) / slope.norm()
    middle = 0.5 * (m.means[0] + m.means[2]) - slope / slope.square().sum() * math.log(0.2 / 0.3)
    x = (middle + 1e7 * normal).requires_grad_()
    shares = m.responsibilities(x)
    if float(shares[1].detach()) > 0.5:
        x = (middle - 1e7 * normal).requires_grad_()
        shares = m.responsibilities(x)
    assert float(shares[0].detach()) == pytest.approx(0.5, abs=1e-6)
    (gradient,) = torch.autograd.grad(shares[0], x)
    torch.testing.assert_close(gradient, 0.25 * slope, rtol=1e-5, atol=1e-6)


def test_an_estimator_names_its_own_arguments():
    x = np.random.default_rng(0).normal(size=(50, 2))
    far = np.where(np.arange(50)[:, None] == 7, 1e200, x)
    model = gk.GaussianMixture(2, random_state=0).fit(x)
    for call in (
        lambda: gk.GaussianMixture(2).fit(far),
        lambda: gk.BayesianGaussianMixture(n_components=2).fit(far),
        lambda: gk.GaussianMixture(2).partial_fit(far),
        lambda: model.score_samples(far),
        lambda: model.predict(far),
        lambda: model.score(far),
    ):
        with pytest.raises(ValueError, match=r"^X reaches 1e\+200 (at|in) row 7"):
            call()
    with pytest.raises(ValueError, match=r"^sample_weight must be counts of points"):
        gk.BayesianGaussianMixture(n_components=2).fit(x, sample_weight=np.full(50, 1e200))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [30.0, 100.0, 300.0, 1000.0])
def test_float32_probabilities_at_a_distance(kind, far):
    """All directions, some of which lie between two components, for points and mixtures in float32."""
    m = mixture(kind)
    angle = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    x = (far * torch.stack([angle.cos(), angle.sin()], 1)).float()
    for one in (m, m.to(torch.float32)):
        right = torch.softmax(one.to(torch.float64).log_joint(x.double()), -1)
        assert float((one.responsibilities(x) - right).abs().max()) < 1e-4
        best, _ = one.responsibilities(x, k=2)
        assert float((best - right.topk(2, -1).values).abs().max()) < 1e-4
