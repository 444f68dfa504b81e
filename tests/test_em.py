"""EM: scikit-learn's steps, monotone objectives, invariances, priors, penalties, variants, and degenerate clouds."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import ENGINES, FAMILIES, random_mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk
from gmmkeops import penalties as P


def cloud(seed=0, N=300, K=3, D=2):
    rng = np.random.RandomState(seed)
    return torch.from_numpy(4 * rng.randn(K, D)[rng.randint(K, size=N)] + rng.randn(N, D))


def plain_start(x, K, family):
    """Points of the cloud, unit covariances, equal weights."""
    kind, tied = gk.components.factor_class(family)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x)))[:K]
    lead = 1 if tied else K
    zeros = torch.zeros(lead, x.shape[1], dtype=torch.float64)
    factor = kind(zeros) if kind is not gk.SphericalFactor else kind(zeros[:, :1], x.shape[1])
    return gk.Mixture(torch.zeros(K, dtype=torch.float64), x[rows], factor)


def rises(result):
    """Largest rise of the objective from one iteration to the next."""
    values = result.history["objective"] + [result.objective]
    return max([b - a for a, b in itertools.pairwise(values)], default=0.0)


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("seed", range(10))
def test_fifty_iterations_of_scikit_learn(family, seed):
    rng = np.random.RandomState(seed)
    D, K = rng.randint(1, 6), rng.randint(1, 6)
    x = cloud(seed, K=K, D=D)
    start = plain_start(x, K, family)
    given = {"full": np.stack([np.eye(D)] * K), "tied": np.eye(D), "diag": np.ones((K, D)), "spherical": np.ones(K)}
    theirs = Theirs(
        K,
        covariance_type=family,
        tol=0,
        max_iter=50,
        weights_init=np.full(K, 1 / K),
        means_init=start.means.numpy(),
        precisions_init=given[family],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.fit(x.numpy())
    result = gk.fit(start, x, gk.EM(tol=0), max_iter=50)
    ours = gk.GaussianMixture.from_mixture(result.mixture)
    ours.set_params(covariance_type=family)
    ours._adopt(result.mixture, False)
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert np.abs(a - b).max() <= 1e-8 * np.abs(b).max(), name
    assert abs(ours.bic(x.numpy()) - theirs.bic(x.numpy())) < 1e-6
    assert abs(ours.aic(x.numpy()) - theirs.aic(x.numpy())) < 1e-6


def ridge_data(name):
    rng = np.random.RandomState(5)
    blobs = np.r_[
        rng.randn(120, 2) @ [[1.0, 0.3], [0.0, 1.2]], [5, 4] + 1.5 * rng.randn(140, 2), [9, 0] + 0.4 * rng.randn(90, 2)
    ]
    return {
        "blobs": blobs,
        "constant column": np.c_[blobs, np.full(len(blobs), 3.0)],
        "integer counts": rng.poisson([2, 5, 9], (400, 3)).astype(float),
        "variance near the ridge": 1e-3 * blobs,
        "heavy tails": rng.standard_t(2, (400, 2)),
    }[name]


def ridge_start(x, K, family):
    """Equal weights, points of the data, and the mean variance: what both libraries take as arguments."""
    D, precision = x.shape[1], 1 / x.var(0).mean()
    shapes = {
        "full": np.stack([precision * np.eye(D)] * K),
        "tied": precision * np.eye(D),
        "diag": np.full((K, D), precision),
        "spherical": np.full(K, precision),
    }
    means = x[np.random.RandomState(2).choice(len(x), K, replace=False)]
    return {"weights_init": np.full(K, 1 / K), "means_init": means, "precisions_init": shapes[family]}


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("ridge", [0, 1e-6, 1e-2, 1, 10])
@pytest.mark.parametrize(
    "name", ["blobs", "constant column", "integer counts", "variance near the ridge", "heavy tails"]
)
@pytest.mark.filterwarnings("ignore:reg_covar:gmmkeops.PrecisionWarning")
@pytest.mark.filterwarnings("ignore:Initialization did not converge", "ignore:Best performing init")
def test_the_ridge_is_that_of_scikit_learn(name, ridge, family):
    x = ridge_data(name)
    for K in (1, 3):
        settings = {
            "covariance_type": family,
            "reg_covar": ridge,
            "tol": 0,
            "max_iter": 50,
            **ridge_start(x, K, family),
        }
        ours = gk.GaussianMixture(K, **settings).fit(x)
        history = np.array(ours.result_.history["objective"])
        assert np.diff(history).max() <= 1e-12 * max(1, np.abs(history).max())
        eigenvalues = torch.linalg.eigvalsh(ours.mixture_.factor.covariances())
        assert float(eigenvalues.min()) >= ridge * (1 - 1e-9)
        if ridge == 0 and name == "constant column" and family != "spherical":
            with pytest.raises(ValueError, match="ill-defined empirical covariance"):
                Theirs(K, **settings).fit(x)
            continue
        theirs = Theirs(K, **settings).fit(x)
        unit = x.var(0).max()
        assert np.abs(ours.weights_ - theirs.weights_).max() < 1e-8
        assert np.abs(ours.means_ - theirs.means_).max() < 1e-8 * math.sqrt(unit)
        assert np.abs(ours.covariances_ - theirs.covariances_).max() < 1e-8 * max(unit, ridge)
        assert ours.bic(x) == pytest.approx(theirs.bic(x), rel=1e-8)
        assert ours.aic(x) == pytest.approx(theirs.aic(x), rel=1e-8)
        assert ours.lower_bound_ == pytest.approx(theirs.score(x), rel=1e-8, abs=1e-8)


VARIANTS = {
    "plain": {},
    "accelerated": {"accelerate": True},
    "hard": {"assignment": "hard"},
    "stochastic": {"assignment": "stochastic"},
    "annealed": {"temperature": (0.3, 10)},
    "frozen": {"frozen_means": [True, False, False]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_adds_the_ridge_to_its_last_covariances(variant, family):
    """With one component every variant is in closed form: the covariance of the data plus the ridge."""
    x = torch.from_numpy(ridge_data("blobs"))
    keywords = {name: value for name, value in VARIANTS[variant].items() if name != "frozen_means"}
    start = gk.Mixture.from_parameters([1.0], [[1.0, 1.0]], torch.ones(1, 2), "diag")
    kind, _ = gk.components.factor_class(family)
    start = gk.Mixture(
        start.logits,
        start.means,
        kind(
            torch.zeros(1, 2 if kind is not gk.SphericalFactor else 1),
            **({"features": 2} if kind is gk.SphericalFactor else {}),
        ),
    )
    result = gk.fit(start, x, gk.EM(reg_covar=10.0, tol=0, **keywords), max_iter=30)
    exact = np.cov(x.numpy().T, bias=True) + 10 * np.eye(2)
    if kind is not gk.FullFactor:
        exact = np.diag(np.diag(exact))
    if kind is gk.SphericalFactor:
        exact = np.eye(2) * np.diag(exact).mean()
    got = result.mixture.factor.covariances()[0].numpy()
    assert np.abs(got - exact).max() < 1e-9 * np.abs(exact).max()
    # Three components: no eigenvalue is below the ridge, and no variant returns its start.
    start = plain_start(x, 3, family)
    result = gk.fit(start, x, gk.EM(reg_covar=2.0, tol=0, **VARIANTS[variant]), max_iter=30)
    assert float(torch.linalg.eigvalsh(result.mixture.factor.covariances()).min()) > 2.0 * (1 - 1e-9)
    assert float((result.mixture.means - start.means).abs().max()) > 0.1
    if variant in ("plain", "accelerated", "hard", "frozen"):
        assert max(b - a for a, b in itertools.pairwise(result.history["objective"])) < 1e-10


@pytest.mark.parametrize("read", ["memory", "chunks", "truncated"])
@pytest.mark.parametrize("penalty", [None, P.SqrtWeights(0.5), P.InverseWishart(3.0, 6.0)])
def test_the_ridge_holds_however_the_points_are_read(read, penalty):
    x = torch.from_numpy(ridge_data("heavy tails"))
    start, method = plain_start(x, 3, "full"), gk.EM(reg_covar=1.0, tol=0)
    points = gk.Source.of(x, chunk_rows=64) if read == "chunks" else x
    result = gk.fit(start, points, method, max_iter=40, penalty=penalty, truncate=1e-9 if read == "truncated" else 0)
    assert max(b - a for a, b in itertools.pairwise(result.history["objective"])) < 1e-8
    assert float(torch.linalg.eigvalsh(result.mixture.factor.covariances()).min()) > 1 - 1e-9
    exact = result.mixture.log_prob(x).mean() - (0 if penalty is None else penalty(result.mixture, len(x)))
    assert result.objective == pytest.approx(-float(exact), abs=1e-7)


def tutorial_spiral(N, seed):
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 2 * math.pi, N + 1)[:-1].double()
    x = torch.stack((0.5 + 0.4 * (t / 7) * t.cos(), 0.5 + 0.3 * t.sin()), 1)
    return x + 0.02 * torch.randn(N, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "strength"),
    [
        (2000, 20, 0),
        (2000, 20, 20),
        (2000, 8, 2),
        pytest.param(1000, 12, 20, marks=pytest.mark.slow),
        pytest.param(1000, 30, 60, marks=pytest.mark.slow),
    ],
)
def test_a_converged_fit_has_little_left_to_gain(N, K, strength, accelerate):
    x, tol = tutorial_spiral(N, 1), gk.EM().tol
    penalty = P.SqrtWeights(strength) if strength else None
    result = gk.fit(gk.initialize(x, K), x, gk.EM(accelerate=accelerate), penalty=penalty, max_iter=2000)
    assert result.converged
    more = gk.fit(result.mixture, x, gk.EM(tol=0), penalty=penalty, max_iter=1000)
    assert result.objective - more.objective <= 3 * tol


@pytest.mark.slow
def test_most_converged_fits_have_little_left_to_gain():
    """Random mixtures that overlap: after convergence at the default tolerance, 1000 iterations gain 3 tolerances."""
    kept, iterations = [], []
    for seed in range(24):
        rng = np.random.RandomState(seed)
        K, D = rng.randint(2, 30), rng.randint(1, 8)
        scales = np.exp(0.5 * rng.randn(K))
        labels = rng.choice(K, 3000, p=rng.dirichlet(np.full(K, 2.0)))
        x = torch.from_numpy(2.5 * rng.randn(K, D)[labels] + scales[labels, None] * rng.randn(3000, D))
        result = gk.fit(gk.initialize(x, K), x, gk.EM(), max_iter=3000)
        more = gk.fit(result.mixture, x, gk.EM(tol=0), max_iter=1000)
        kept.append(result.objective - more.objective <= 3 * gk.EM().tol)
        iterations.append(result.n_iter)
    assert np.mean(kept) >= 0.75, (np.mean(kept), np.median(iterations))


def test_annealing_spares_components_until_it_is_over():
    x = tutorial_spiral(4000, 0)
    start, method = gk.initialize(x, 30), gk.EM(temperature=(0.1, 20), tol=0)
    for penalty in (P.SqrtWeights(20), P.Dirichlet(0.1)):
        cold = gk.fit(start, x, gk.EM(tol=0), penalty=penalty, max_iter=200)
        warm = gk.fit(start, x, method, penalty=penalty, max_iter=200)
        assert set(warm.history["live"][:20]) == {30}
        assert warm.objective < cold.objective + 0.01
    assert 1 < gk.fit(start, x, method, penalty=P.SqrtWeights(20), max_iter=200).report.live_components < 30


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalized", [False, True])
def test_monotone(engine, family, penalized):
    """10 seeds on the dense engine, 5 on KeOps, in float64; rounding aside the objective never rises."""
    backend, device = engine
    penalty = (
        P.SqrtWeights(1.0) + P.Dirichlet(1.5) + P.NormalInverseWishart([0.0, 0.0], 0.5, 1.0, 4.0) if penalized else None
    )
    for seed in range(10 if backend == "dense" else 5):
        x = cloud(seed, N=150).to(device)
        start = plain_start(x.cpu(), 5, family).to(device)
        result = gk.fit(start, x, gk.EM(tol=0, reg_covar=0), penalty=penalty, max_iter=20, backend=backend)
        assert rises(result) < 1e-9, seed


@pytest.mark.parametrize("penalty", [P.SqrtWeights(20.0), P.WeightEntropy(0.5)], ids=repr)
@pytest.mark.parametrize("family", ["full", "tied_diag"])
def test_monotone_while_components_are_pruned(penalty, family):
    x = cloud(1)
    result = gk.fit(plain_start(x, 6, family), x, gk.EM(tol=0, reg_covar=0), penalty=penalty, max_iter=100)
    assert result.report.dead_components
    assert rises(result) < 1e-8  # pruning may cost a millionth of a point


def test_closed_form_map():
    """One component: the posterior mode is known."""
    x = cloud(2, K=1)
    n, mean = len(x), x.mean(0)
    m, kappa, psi, nu = torch.tensor([3.0, -2.0]).double(), 7.0, torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), 6.0
    result = gk.fit(plain_start(x, 1, "full"), x, gk.EM(reg_covar=0), penalty=P.NormalInverseWishart(m, kappa, psi, nu))
    expected = (n * mean + kappa * m) / (n + kappa)
    assert torch.allclose(result.mixture.means[0], expected)
    z, w = x - expected, expected - m
    covariance = (z.mT @ z + kappa * torch.outer(w, w) + psi) / (n + nu + 2 + 2)
    assert torch.allclose(result.mixture.factor.covariances()[0], covariance)


def test_dirichlet_counts_are_pseudo_points():
    x = cloud(3)
    start = plain_start(x, 3, "full")
    sums = gk.reductions.moments(x, start.offsets, start.means, start.factor)
    alpha = torch.tensor([5.0, 1.0, 30.0]).double()
    result = gk.fit(start, x, gk.EM(tol=0), penalty=P.Dirichlet(alpha), max_iter=1)
    expected = (sums.S0 + alpha - 1) / (len(x) + alpha.sum() - 3)
    assert torch.allclose(result.mixture.weights, expected)


def test_sqrt_prior_empties_components_like_adam():
    x = cloud(4, N=2000)
    start = gk.initialize(x, 12)
    em = gk.fit(start, x, gk.EM(tol=1e-9), penalty=P.SqrtWeights(5.0), max_iter=2000)
    adam = gk.fit(start, x, gk.Adam(lr=0.05), penalty=P.SqrtWeights(5.0), max_iter=1500)
    assert em.report.live_components < 12
    assert em.report.dead_components
    assert em.objective < adam.objective + 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_integer_weights_are_repetition(family):
    x = cloud(5)
    counts = torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(0))
    start = plain_start(x, 3, family)
    for penalty in (None, P.SqrtWeights(0.5) + P.NormalInverseWishart([0.0, 0.0], 1.0, 1.0, 4.0)):
        a = gk.fit(start, x, gk.EM(tol=0), penalty=penalty, sample_weight=counts, max_iter=15)
        b = gk.fit(start, x.repeat_interleave(counts, 0), gk.EM(tol=0), penalty=penalty, max_iter=15)
        assert abs(a.objective - b.objective) < 1e-10
        assert torch.allclose(a.mixture.factor.covariances(), b.mixture.factor.covariances(), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(FAMILIES), st.floats(-1e6, 1e6), st.integers(-20, 20))
def test_translation_scaling_and_permutation_change_nothing(seed, family, shift, power):
    x = cloud(seed)
    scale = 2.0**power
    start = plain_start(x, 3, family)
    method = gk.EM(tol=0, reg_covar=0)
    plain = gk.fit(start, x, method, max_iter=10)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    swap = torch.tensor([2, 0, 1])
    moved = gk.Mixture(
        start.logits[swap],
        start.means[swap] * scale + shift,
        start.factor.select(swap).rescale(torch.full((2,), 1 / scale).double()),
    )
    result = gk.fit(moved, x[order] * scale + shift, method, max_iter=10)
    # What the shift itself rounds away.
    lost = 1e-13 * max(1.0, abs(shift) / scale) + 1e-9
    assert torch.allclose((result.mixture.means - shift) / scale, plain.mixture.means[swap], atol=10 * lost)
    swapped = plain.mixture.factor.select(swap).covariances()
    assert torch.allclose(result.mixture.factor.covariances() / scale**2, swapped, atol=100 * lost)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["full", "tied_full", "spherical", "tied_spherical"]))
def test_rotation_changes_nothing(seed, family):
    x = cloud(seed, D=3)
    Q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double())
    start = plain_start(x, 3, family)
    method = gk.EM(tol=0, reg_covar=0)
    plain = gk.fit(start, x, method, max_iter=10)
    turned = gk.fit(gk.Mixture(start.logits, start.means @ Q, start.factor), x @ Q, method, max_iter=10)
    assert torch.allclose(turned.mixture.means, plain.mixture.means @ Q, atol=1e-8)
    assert torch.allclose(turned.mixture.factor.covariances(), Q.mT @ plain.mixture.factor.covariances() @ Q, atol=1e-8)


@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical", "tied_diag", "tied_spherical"])
@pytest.mark.parametrize(("shift", "sigma"), [(5e6, 0.5), (0.0, 1e-6), (-3e7, 100.0)])
def test_variances_far_away_and_tiny(family, shift, sigma):
    rng = np.random.RandomState(0)
    noise = rng.randn(4000, 2) * sigma
    x = noise + shift
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.PrecisionWarning)
        got = gk.GaussianMixture(1, covariance_type=family, reg_covar=0).fit(x).covariances_
    exact = x - shift
    exact = np.cov(exact.T, bias=True)
    if "diag" in family or "spherical" in family:
        exact = np.diag(exact)
    if "spherical" in family:
        exact = exact.mean()
    assert np.abs(np.squeeze(got) - exact).max() <= 1e-5 * np.abs(exact).max()


def test_a_ridge_in_other_units_is_called_out():
    x = cloud() * 1e-6
    with pytest.warns(gk.PrecisionWarning, match=r"reg_covar=1e-06 is much larger than the variance of every column"):
        gk.GaussianMixture(2, random_state=0).fit(x)


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parts_stay(family, accelerate):
    x = cloud(6)
    start = random_mixture(family, K=3, D=2, condition=2.0)
    keep = [True, False, False]
    tied = start.factor.leading == 1
    result = gk.fit(
        start,
        x,
        gk.EM(
            tol=0,
            frozen_weights=keep,
            frozen_means=keep,
            frozen_covariances=True if tied else keep,
            accelerate=accelerate,
        ),
        max_iter=10,
    )
    mixture = result.mixture
    assert torch.allclose(mixture.weights[0], start.weights[0])
    assert torch.allclose(mixture.means[0], start.means[0])
    assert torch.allclose(mixture.factor.covariances()[0], start.factor.covariances()[0])
    assert not torch.allclose(mixture.means[1], start.means[1], atol=1e-3)
    assert rises(result) < 1e-9
    if tied:
        with pytest.raises(ValueError, match="a tied covariance is frozen for all components or for none"):
            gk.fit(start, x, gk.EM(frozen_covariances=keep))


def test_hard_em_with_a_frozen_sphere_is_k_means():
    from sklearn.cluster import KMeans

    x = cloud(7)
    start = plain_start(x, 3, "tied_spherical")
    method = gk.EM(assignment="hard", frozen_covariances=True, frozen_weights=True, tol=0)
    ours = gk.fit(start, x, method, max_iter=60).mixture.means
    theirs = KMeans(3, init=start.means.numpy(), n_init=1, max_iter=60, tol=0, algorithm="lloyd").fit(x.numpy())
    assert np.allclose(ours.numpy(), theirs.cluster_centers_, atol=1e-9)


def test_classification_likelihood_is_monotone():
    for seed in range(10):
        x = cloud(seed)
        result = gk.fit(plain_start(x, 4, "full"), x, gk.EM(assignment="hard", tol=0, reg_covar=0), max_iter=20)
        values = result.history["objective"]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(values))
        # What is returned is the likelihood of the mixture, not of the classification.
        assert abs(result.log_likelihood - float(result.mixture.log_prob(x).mean())) < 1e-12


def test_stochastic_em_wanders_near_the_optimum_and_repeats():
    x = cloud(8, N=3000)
    start = gk.initialize(x, 3)
    best = gk.fit(start, x, gk.EM(tol=1e-8), max_iter=200)
    runs = [gk.fit(start, x, gk.EM(assignment="stochastic", tol=0), max_iter=30) for _ in range(2)]
    assert runs[0].history["objective"] == runs[1].history["objective"]
    assert torch.equal(runs[0].mixture.means, runs[1].mixture.means)
    assert torch.equal(runs[0].mixture.means, runs[1].mixture.means)
    assert best.log_likelihood - 0.01 < runs[0].log_likelihood < best.log_likelihood + 1e-6


@pytest.mark.parametrize("average", [False, True])
def test_stepwise_em_nears_full_em_in_three_passes(average):
    x = cloud(9, N=20_000)
    start = gk.initialize(x, 3)
    full = gk.fit(start, x, gk.EM(tol=0), max_iter=400)
    method = gk.EM(batch_size=500, average=average, tol=0)
    parts = gk.fit(start, x, method, max_iter=3)
    assert full.log_likelihood - parts.log_likelihood < 1e-3
    assert abs(parts.log_likelihood - float(parts.mixture.log_prob(x).mean())) < 1e-10


def test_partial_fit_follows_a_stream():
    x = cloud(10, N=20_000) + 5e6
    model = gk.GaussianMixture(3, random_state=0)
    for part in x.split(500):
        model.partial_fit(part)
    full = gk.GaussianMixture(3, random_state=0, tol=1e-8, max_iter=300).fit(x)
    assert full.score(x) - model.score(x) < 5e-3
    with pytest.raises(AttributeError, match="partial_fit is a step of EM"):
        gk.GaussianMixture(2, solver="adam").partial_fit(x)


def test_annealing_escapes_a_bad_start():
    """Three of four components start on one blob; heated they meet in the middle, and come apart one by one."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[-6.0], [-3.0], [3.0], [6.0]]).double()
    x = centers[torch.arange(2000) % 4] + 0.5 * torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    start = gk.Mixture.from_parameters([0.25] * 4, [[-6.2], [-6.0], [-5.8], [5.0]], [0.25] * 4, "spherical")
    cold = gk.fit(start, x, gk.EM(tol=1e-6, frozen_covariances=True), max_iter=500)
    method = gk.EM(tol=1e-6, frozen_covariances=True, temperature=(0.002, 1000))
    warm = gk.fit(start, x, method, max_iter=1500)
    assert warm.log_likelihood > cold.log_likelihood + 0.1
    assert torch.allclose(warm.mixture.means.sort(0).values, centers, atol=0.2)
    # Objectives are those of the mixture, not of the heated one.
    assert abs(warm.history["log_likelihood"][0] - float(start.log_prob(x).mean())) < 1e-12


def test_acceleration_never_rises_and_needs_fewer_passes():
    saved = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
        x[:1000, 0] += 1.5
        start = plain_start(x, 3, "full")
        # An accelerated iteration reads the points three times: fewer readings lead further.
        slow = gk.fit(start, x, gk.EM(tol=0), max_iter=300)
        fast = gk.fit(start, x, gk.EM(tol=0, accelerate=True), max_iter=70)
        assert rises(fast) < 1e-10
        saved.append(fast.log_likelihood - slow.log_likelihood)
    assert np.median(saved) > 1e-5


def test_a_component_that_dies_is_named_and_finite():
    x = cloud(11)
    start = gk.Mixture.from_parameters([0.5, 0.3, 0.2], [[0.0, 0.0], [1.0, 1.0], [1e4, 1e4]], [[1.0, 1.0]] * 3, "diag")
    result = gk.fit(start, x, gk.EM(tol=1e-6))
    assert result.report.dead_components == (2,)
    assert result.mixture.components == 3
    assert bool(torch.isfinite(result.mixture.log_prob(x)).all())


SHAPES = {
    "identical": np.ones((20, 2)),
    "constant column": np.c_[np.random.RandomState(0).randn(50), np.ones(50)],
    "a line": np.linspace(0, 1, 40)[:, None] * [1, 2],
    "duplicates": np.repeat(np.random.RandomState(1).randn(6, 2), 10, 0),
    "an outlier at 1e8 sigma": np.r_[np.random.RandomState(2).randn(100, 2), [[1e8, 0]]],
    "as many points as components": np.random.RandomState(3).randn(6, 2),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_degenerate_clouds_end_finite(shape, family):
    for dtype, K, ridge, strategy in itertools.product(
        (np.float32, np.float64), (1, 3, 6), (1e-6, 0.0), ("kmeans", "random", "random_from_data")
    ):
        x = SHAPES[shape].astype(dtype)
        model = gk.GaussianMixture(K, covariance_type=family, reg_covar=ridge, init_params=strategy, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gk.ConvergenceWarning)
            model.fit(x)
        assert math.isfinite(model.lower_bound_)
        assert np.isfinite(model.means_).all()
        assert np.isfinite(model.covariances_).all()
        assert np.isfinite(model.score_samples(x)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gk.EM(assignment="fuzzy"), "assignment must be one of 'soft', 'hard', 'stochastic', got 'fuzzy'"),
        (lambda: gk.EM(batch_size=0), "batch_size must be at least 1"),
        (lambda: gk.EM(step_exponent=0.5), "step_exponent must be above 0.5"),
        (lambda: gk.EM(step_offset=0), "step_offset must be positive"),
        (lambda: gk.EM(reg_covar=-1), "reg_covar must be finite"),
        (lambda: gk.EM(temperature=(2, 5)), "temperature must be"),
        (
            lambda: gk.fit(plain_start(cloud(), 3, "full"), cloud(), gk.EM(frozen_means=[True])),
            "frozen_means must be True",
        ),
    ],
)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prior_weighs_against_all_points_when_they_come_in_batches():
    """Batches stand for all points: the prior's 1000 points pull as they do against the 4000 of a full pass."""
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    penalty = P.NormalMean(torch.tensor([6.0, 6.0]), 1000.0)
    start = gk.Mixture.from_parameters([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    batches = gk.fit(start, x, gk.EM(batch_size=200, tol=0), penalty=penalty, max_iter=10).mixture
    # (4000 · mean + 1000 · 6) / 5000
    assert torch.allclose(batches.means[0], (4000 * x.mean(0) + 6000) / 5000, atol=0.05)


def test_an_average_over_batches_is_far_less_noisy_than_the_last_one():
    """Both are about the points' mean; a running average with other weights than 1 / n keeps the last batches' noise."""
    x = torch.randn(2000, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = gk.Mixture.from_parameters([1.0], torch.zeros(1, 30).double(), torch.ones(1, 30).double(), "diag")
    last, average = (
        gk.fit(start, x, gk.EM(batch_size=20, average=average, tol=0), max_iter=5).mixture.means[0] - x.mean(0)
        for average in (False, True)
    )
    assert float(average.norm()) < 0.3 * float(last.norm())
