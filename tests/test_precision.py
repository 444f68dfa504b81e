"""Accuracy far from the center and for narrow components: every engine, family and entry point against float64 residuals."""

from __future__ import annotations

import json
import warnings

import mpmath
import numpy as np
import pytest
import torch
from conftest import ENGINES, FAMILIES

import gmmkeops as gk
from gmmkeops import cli

TOLERANCE = 1e-4
FAR = ["own 1e6", "own 1e8", "own 1e10", "far 1e6", "far 1e8", "far 1e10"]
SITES = ["sites 1e7", "sites 1e8"]
NARROW = ["narrow 1e-3", "narrow 1e-4", "narrow 1e-5"]
SCENES = [*FAR, *SITES, *NARROW, "map"]
DTYPES = [torch.float32, torch.float64]


def points_of(scene, D, dtype, N=400):
    """Points (N, D), the means (4, D) and the scales (4,) of components that describe them, float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    means = torch.randn(4, D, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1.0, 0.8, 1.3, 1.1], dtype=torch.float64)
    kind, _, size = scene.partition(" ")
    size = float(size or 0)
    if kind in ("own", "far"):
        x[7] = size * torch.linspace(1, 0.3, D, dtype=torch.float64)
    if kind == "own":
        x[8] = x[7] * (1 + 1e-7)
        scales[3] = 2e-7 * size
    if kind == "narrow":
        x[50:60] = x[5] + size * x[50:60]
        scales[2] = size
    if kind == "sites":
        x[N // 2 :] += size
        means[2:] += size
    if kind == "map":
        offset = torch.tensor([5e5, 5.4e6, 120.0], dtype=torch.float64)[:D]
        x, means, scales = offset + 30 * x, offset + 30 * means, 20 * scales
        x[:3] = 0
    x = x.to(dtype)
    if kind == "own":
        means[3] = x[7].double()
    if kind == "narrow":
        means[2] = x[5].double()
    return x, means, scales


def mixture_of(scene, family, D, dtype):
    """Points, and a mixture with other shapes and weights in every component."""
    x, means, scales = points_of(scene, D, dtype)
    generator = torch.Generator().manual_seed(2)
    A = torch.eye(D, dtype=torch.float64) + 0.3 * torch.randn(4, D, D, generator=generator, dtype=torch.float64)
    covariances = scales[:, None, None] ** 2 * (A @ A.mT)
    if family.startswith("tied"):
        covariances = covariances[2]
    if family.endswith("diag"):
        covariances = covariances.diagonal(dim1=-2, dim2=-1)
    if family.endswith("spherical"):
        covariances = covariances[..., 0, 0]
    return x, gk.Mixture.from_parameters([0.4, 0.3, 0.2, 0.1], means, covariances, family)


def oracle(x, mixture):
    """Exponents (N, K), residuals (N, K, D) and dense factors (K, D, D), from differences alone, float64."""
    U = mixture.factor.matrices().double().expand(mixture.n_components, -1, -1)
    z = x.detach().double()[:, None] - mixture.means.detach().double()
    y = torch.einsum("kde,nkd->nke", U, z)
    return mixture.offsets.double() - 0.5 * y.square().sum(-1), z, U


def error(found, right):
    """Largest error relative to max(1, |right|)."""
    return float(((found.double() - right).abs() / right.abs().clamp(min=1)).max())


def check_moments(sums, e, z, U):
    """S0, S1 and S2 of each component, in its own whitened coordinates."""
    r = torch.softmax(e, 1)
    S0, S1 = r.sum(0), torch.einsum("nk,nkd->kd", r, z)
    S2 = torch.einsum("nk,nkd,nke->kde", r, z, z)
    assert torch.allclose(sums.S0, S0, rtol=TOLERANCE, atol=1e-6)
    size = torch.linalg.matrix_norm(U, 2)
    mass = S0 + 1e-6
    first = (torch.einsum("kde,kd->ke", U, sums.S1 - S1)).norm(dim=1)
    scale = torch.einsum("nk,nk->k", r, torch.einsum("kde,nkd->nke", U, z).norm(dim=2))
    assert bool((first <= TOLERANCE * (mass + scale)).all())
    if sums.S2.ndim == 2:
        S2 = S2.diagonal(dim1=1, dim2=2)
    elif sums.S2.ndim == 1:
        S2 = S2.diagonal(dim1=1, dim2=2).sum(1)
    difference = (sums.S2 - S2).abs().flatten(1).amax(1) if S2.ndim > 1 else (sums.S2 - S2).abs()
    largest = S2.abs().flatten(1).amax(1) if S2.ndim > 1 else S2.abs()
    assert bool((difference <= TOLERANCE * (largest + mass / size**2)).all())


def differentiable(x, mixture):
    """Gradients of Σ ℓ in points, offsets, means and factor through float64 residuals."""
    inputs = [x.double(), mixture.offsets, mixture.means, mixture.factor.U]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    points, offsets, means, U = inputs
    z, U = points[:, None] - means, U.expand(len(means), *U.shape[1:])
    y = torch.einsum("kde,nkd->nke", U, z) if U.ndim == 3 else U * z
    return torch.autograd.grad((offsets - 0.5 * y.square().sum(-1)).logsumexp(1).sum(), inputs)


def check_reductions(scene, family, D, dtype, backend, truncate):
    x, mixture = mixture_of(scene, family, D, dtype)
    e, z, U = oracle(x, mixture)
    right = e.logsumexp(1)
    options = {"backend": backend, "truncate": truncate}
    arguments = (mixture.offsets, mixture.means, mixture.factor)
    assert error(mixture.log_prob(x, **options), right) < TOLERANCE
    sums = gk.reductions.moments(x, *arguments, **options)
    check_moments(sums, e, z, U)
    assert abs(float(sums.total - right.sum())) <= TOLERANCE * float(right.abs().clamp(min=1).sum())
    best = e.topk(2, 1).values
    values, components = gk.reductions.topk(x, *arguments, 2, **options)
    assert error(values, best) < TOLERANCE
    # Where two components are as good as equal, either is right.
    for labels in (gk.reductions.argmax(x, *arguments, **options), components[:, 0]):
        assert error(e.gather(1, labels[:, None])[:, 0], best[:, 0]) < 1e-6
    points = x.clone().requires_grad_()
    parameters = [points, *(t.detach().clone().requires_grad_() for t in (*arguments[:2], mixture.factor.U))]
    found = torch.autograd.grad(gk.reductions.logsumexp(*parameters, **options).sum(), parameters)
    for one, other in zip(found, differentiable(x, mixture), strict=True):
        rows = (one.double() - other).flatten(1).amax(1) if other.ndim > 1 else (one.double() - other)
        sizes = other.flatten(1).abs().amax(1) if other.ndim > 1 else other.abs()
        assert bool((rows.abs() <= TOLERANCE * (1 + sizes)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scene", SCENES)
def test_reductions(scene, dtype):
    for family in FAMILIES:
        for D, truncate in ((2, 0), (3, 0), (3, 1e-9)):
            check_reductions(scene, family, D, dtype, "dense", truncate)


# The points of these scenes are on the CPU.
COMPILED = [engine for engine in ENGINES if engine.values[0][1] == "cpu" and engine.id != "dense-cpu"]


@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("scene", SCENES)
def test_engines(scene, engine):
    backend, _ = engine
    for family in ("full", "tied_diag", "spherical"):
        check_reductions(scene, family, 3, torch.float32, backend, 0)
    check_reductions(scene, "full", 3, torch.float32, backend, 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_dimensions(dtype):
    """Tiles with fewer components than they have dimensions for, and a component far from the others."""
    generator = torch.Generator().manual_seed(0)
    D = 30
    means = torch.randn(3, D, generator=generator, dtype=torch.float64)
    A = torch.eye(D, dtype=torch.float64) + 0.1 * torch.randn(3, D, D, generator=generator, dtype=torch.float64)
    x = means[torch.arange(300) % 3] + torch.randn(300, D, generator=generator, dtype=torch.float64)
    means[2] += 1e7
    x[2::3] += 1e7
    x = x.to(dtype)
    means[2] = x[2::3].double().mean(0)
    mixture = gk.Mixture.from_parameters([0.5, 0.3, 0.2], means, A @ A.mT)
    e, z, U = oracle(x, mixture)
    assert error(mixture.log_prob(x), e.logsumexp(1)) < TOLERANCE
    check_moments(gk.reductions.moments(x, mixture.offsets, means, mixture.factor), e, z, U)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_tiles(family):
    """More points than a tile holds: sums of the components that are evaluated from residuals add up over tiles."""
    x, mixture = mixture_of("own 1e6", family, 3, torch.float64)
    arguments = (mixture.offsets, mixture.means, mixture.factor)
    once, often = gk.reductions.moments(x, *arguments), gk.reductions.moments(x.repeat(100, 1), *arguments)
    for name in ("S0", "S1", "S2", "total", "mass"):
        assert error(getattr(often, name) / 100, getattr(once, name)) < 1e-9, name


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_products(precision, request):
    """Asked for, and taken only where they are accurate enough: not for the few points and components that are far away."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9000, 3, generator=generator)
    x[4001], x[4002] = 3e6, 3e6 + 1
    means = torch.tensor([[0.0, 0, 0], [1, 1, 1], [3e6, 3e6, 3e6]], dtype=torch.float64)
    mixture = gk.Mixture.from_parameters([0.5, 0.3, 0.2], means, [1.0, 2.0, 0.5], "spherical")
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision(precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.PrecisionWarning)
        found = mixture.log_prob(x)
        sums = gk.reductions.moments(x, mixture.offsets, means, mixture.factor)
    e, z, U = oracle(x, mixture)
    assert error(found, e.logsumexp(1)) < TOLERANCE
    check_moments(sums, e, z, U)


def test_settings_that_differ_between_devices(monkeypatch):
    """torch.get_float32_matmul_precision raises once CUDA alone may use TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    x, mixture = mixture_of("far 1e6", "full", 2, torch.float32)
    expected = mixture.log_prob(x)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert torch.equal(mixture.log_prob(x), expected)
        gk.reductions.moments(x, mixture.offsets, mixture.means, mixture.factor)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_against_mpmath():
    """Sites 1e10 deviations apart and factors of condition 1e4, where float64's own residuals are put to the test."""
    mpmath.mp.dps = 60
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    x[3:] += 1e10
    means = torch.tensor([[0.1, -0.2], [1e10, 1e10 + 0.5]], dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(2, 2, 2, generator=generator, dtype=torch.float64))
    U = Q * torch.tensor([1e4, 1.0], dtype=torch.float64)[:, None]
    offsets = torch.tensor([0.3, -0.7], dtype=torch.float64)
    number = lambda value: mpmath.mpf(float(value))  # noqa: E731
    for dtype in (torch.float64, torch.float32):
        points = x.to(dtype)
        for n, value in enumerate(gk.reductions.logsumexp(points, offsets, means, U).tolist()):
            exponents = []
            for k in range(2):
                z = [number(points[n, d]) - number(means[k, d]) for d in range(2)]
                y = [sum(number(U[k, d, i]) * z[d] for d in range(2)) for i in range(2)]
                exponents.append(number(offsets[k]) - sum(v * v for v in y) / 2)
            right = mpmath.log(mpmath.fsum(mpmath.exp(e - max(exponents)) for e in exponents)) + max(exponents)
            assert abs(value - right) <= 1e-6 * max(1, abs(right))


def data_of(scene, N=3000):
    """Points (N, 2), float64, and a start in their units."""
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.normal(0, 1, (N // 2, 2)), rng.normal(6, 0.7, (N - N // 2, 2))])
    means = [[0.5, 0.0], [5.0, 6.0], [1.0, -1.0]]
    variances = [1.0, 1.0, 1.0]
    kind, _, size = scene.partition(" ")
    size = float(size or 0)
    if kind == "far":
        x[7] = size
    if kind == "own":
        x[7:10] = size * np.array([[1.0, 1.0], [1.0, 1.0 + 1e-6], [1.0 - 1e-6, 1.0]])
        means[2], variances[2] = [size, size], (1e-6 * size) ** 2
    if kind == "narrow":
        x[20:220] = [2.3, -1.7] + size * rng.normal(0, 1, (200, 2))
        means[2], variances[2] = [2.3, -1.7], size**2
    if kind == "sites":
        x[N // 2 :] += size
        means[1] = [size + 5.0, size + 6.0]
    if kind == "map":
        x = x * 30 + [5e5, 5.4e6]
        x[:3] = 0
        means, variances = (np.array(means) * 30 + [5e5, 5.4e6]).tolist(), [900.0] * 3
    return torch.from_numpy(x), torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def start_of(means, variances, family):
    covariances = variances[:, None, None] * torch.tensor([[1.0, 0.2], [0.2, 0.8]], dtype=torch.float64)
    if family.startswith("tied"):
        covariances = covariances[0]
    if family.endswith("diag"):
        covariances = covariances.diagonal(dim1=-2, dim2=-1)
    if family.endswith("spherical"):
        covariances = covariances[..., 0, 0]
    return gk.Mixture.from_parameters([0.4, 0.4, 0.2], means, covariances, family)


FITS = ["far 1e6", "far 1e10", "own 1e6", "own 1e9", "narrow 1e-3", "narrow 1e-5", "sites 1e7", "sites 1e8", "map"]


def quiet_fit(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.PrecisionWarning)
        warnings.simplefilter("ignore", gk.ConvergenceWarning)
        return gk.fit(*arguments, verbose=False, **options)


def check_likelihood(found, x, mixture):
    right = oracle(x, mixture)[0].logsumexp(1).mean()
    assert abs(found - float(right)) <= TOLERANCE * max(1.0, abs(float(right)))


@pytest.mark.filterwarnings("ignore::gmmkeops.DegenerateWarning")
@pytest.mark.parametrize("scene", FITS)
def test_fit(scene):
    """A fit in float32 of float64 or float32 points says of its mixture what float64 says, and leads where float64 leads."""
    x, means, variances = data_of(scene)
    for family in ("full", "tied_full", "diag", "spherical"):
        start = start_of(means, variances, family)
        em = gk.EM(tol=0, reg_covar=0.0)
        narrow = quiet_fit(start, x, em, max_iter=4, dtype="float32")
        wide = quiet_fit(start, x, em, max_iter=4)
        check_likelihood(narrow.log_likelihood, x, narrow.mixture)
        check_likelihood(wide.log_likelihood, x, wide.mixture)
        assert narrow.mixture.means.dtype == torch.float64
        # What one fit's mixture says of a point is what the other's says.
        first, second = (oracle(x, result.mixture)[0].logsumexp(1) for result in (narrow, wide))
        assert error(first, second) < 1e-3
        rounded = quiet_fit(start, x.float(), em, max_iter=4)
        check_likelihood(rounded.log_likelihood, x.float(), rounded.mixture)


@pytest.mark.parametrize("scene", ["far 1e8", "narrow 1e-5", "map"])
@pytest.mark.parametrize("method", [gk.Adam(lr=0.01), gk.EM(tol=0, batch_size=700), gk.EM(tol=0, accelerate=True)])
def test_methods(scene, method):
    x, means, variances = data_of(scene)
    found = quiet_fit(start_of(means, variances, "full"), x, method, max_iter=3, dtype="float32")
    check_likelihood(found.log_likelihood, x, found.mixture)


@pytest.mark.parametrize("scene", ["far 1e8", "own 1e6", "narrow 1e-5", "map"])
def test_streams(scene):
    x, means, variances = data_of(scene)
    start = start_of(means, variances, "full")
    source = gk.Source.of(x.numpy(), chunk_rows=900)
    for batch_size in (None, 400):
        found = quiet_fit(start, source, gk.EM(tol=0, batch_size=batch_size), max_iter=3, dtype="float32")
        check_likelihood(found.log_likelihood, x, found.mixture)


def test_report_names_the_precision_that_was_used():
    """Components narrow during a fit: it starts in float32 and goes on in float64, truncated or not."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, (4000, 2)), [1.5, 1.5] + 1e-5 * rng.normal(0, 1, (4000, 2))])
    x = torch.from_numpy(x[rng.permutation(len(x))])
    start = gk.Mixture.from_parameters([0.6, 0.4], [[-1.0, 0.0], [1.5, 1.5]], [2.0, 0.3], "spherical")
    for truncate in (0, 1e-7):
        em = gk.EM(tol=0, reg_covar=0.0)
        early = quiet_fit(start, x, em, max_iter=1, dtype="float32", truncate=truncate)
        late = quiet_fit(start, x, em, max_iter=30, dtype="float32", truncate=truncate)
        assert (early.report.dtype, late.report.dtype) == ("float32", "float64")
        check_likelihood(late.log_likelihood, x, late.mixture)
        wide = quiet_fit(start, x, em, max_iter=30, truncate=truncate)
        assert float((late.mixture.means - wide.mixture.means).abs().max()) < 1e-8
    assert quiet_fit(start, torch.randn(500, 2), gk.EM(), dtype="float32").report.dtype == "float32"


def test_resumed_after_the_precision_has_changed(tmp_path):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, (4000, 2)), [1.5, 1.5] + 1e-5 * rng.normal(0, 1, (4000, 2))])
    x = torch.from_numpy(x[rng.permutation(len(x))])
    start = gk.Mixture.from_parameters([0.6, 0.4], [[-1.0, 0.0], [1.5, 1.5]], [2.0, 0.3], "spherical")
    options = {"dtype": "float32", "truncate": 1e-7}
    em = gk.EM(tol=0, reg_covar=0.0)
    whole = quiet_fit(start, x, em, max_iter=30, **options)
    quiet_fit(start, x, em, max_iter=25, checkpoint=tmp_path / "fit.ckpt", **options)
    resumed = quiet_fit(start, x, em, max_iter=30, checkpoint=tmp_path / "fit.ckpt", **options)
    assert torch.equal(resumed.mixture.means, whole.mixture.means)
    assert resumed.report.dtype == "float64"


@pytest.mark.parametrize("scene", ["far 1e6", "narrow 1e-4", "map"])
@pytest.mark.parametrize("family", ["full", "tied", "diag", "spherical"])
def test_estimator(scene, family):
    x, means, variances = data_of(scene)
    mixture = start_of(means, variances, family)
    given = {
        "weights_init": np.array([0.4, 0.4, 0.2]),
        "means_init": means.numpy(),
        "precisions_init": np.linalg.inv(mixture.factor.covariances().numpy()),
    }
    if family == "tied":
        given["precisions_init"] = given["precisions_init"][0]
    if family in ("diag", "spherical"):
        given["precisions_init"] = given["precisions_init"].diagonal(0, 1, 2)
    if family == "spherical":
        given["precisions_init"] = given["precisions_init"][:, 0].copy()
    model = gk.GaussianMixture(3, covariance_type=family, max_iter=3, tol=0, dtype="float32", **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x.numpy())
    fitted = gk.Mixture.from_parameters(
        *map(torch.as_tensor, (model.weights_, model.means_, model.covariances_)), family
    )
    e = oracle(x, fitted)[0]
    scores = model.score_samples(x.numpy())
    assert scores.dtype == np.float32
    assert error(torch.from_numpy(scores), e.logsumexp(1)) < TOLERANCE
    check_likelihood(model.lower_bound_, x, fitted)
    labels = torch.from_numpy(model.predict(x.numpy()))
    assert error(e.gather(1, labels[:, None])[:, 0], e.amax(1)) < 1e-6


def test_command_line_has_the_default_dtype_of_python(tmp_path, capsys):
    x, _, _ = data_of("map")
    np.save(tmp_path / "scan.npy", x.numpy())
    model = tmp_path / "model.safetensors"
    code = cli.main(["fit", str(tmp_path / "scan.npy"), "-k", "3", "--out", str(model), "--json", "--quiet"])
    said = json.loads(capsys.readouterr().out)
    assert code in (0, None)
    mixture = gk.load(model)
    assert mixture.means.dtype == torch.float64
    check_likelihood(said["log_likelihood"], x, mixture)


def test_conversion_of_float32_covariances():
    """Factors are made of float32 covariances in float64: the error does not grow with the square of the condition."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(3, 3, 3, generator=generator, dtype=torch.float64))
    S = Q @ torch.diag_embed(torch.tensor([1.0, 1e-2, 2e-5], dtype=torch.float64)).expand(3, 3, 3) @ Q.mT
    S = (0.5 * (S + S.mT)).float()
    means = torch.randn(3, 3, generator=generator)
    x = means.repeat(20, 1) + 3e-3 * torch.randn(60, 3, generator=generator)
    mixture = gk.Mixture.from_parameters(torch.tensor([0.5, 0.3, 0.2]), means, S)
    normal = torch.distributions.MultivariateNormal(means.double(), S.double())
    right = (normal.log_prob(x.double()[:, None]) + torch.tensor([0.5, 0.3, 0.2]).double().log()).logsumexp(1)
    assert error(mixture.log_prob(x), right) < TOLERANCE
