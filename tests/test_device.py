"""Tensors on a device: every public path on a fake one, which tells where CUDA would refuse and what it would wait for."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings

import fake_keops
import fake_triton
import pytest
import torch
from conftest import HAS_TRITON, make_case
from fake_device import fake_device, on_device

import gmmkeops as gk

PENALTIES = {
    "sqrt": lambda: gk.penalties.SqrtWeights(0.01),
    "entropy": lambda: gk.penalties.WeightEntropy(0.01),
    "dirichlet": lambda: gk.penalties.Dirichlet(2.0),
    "mean": lambda: gk.penalties.NormalMean(torch.ones(3), 2.0),
    "wishart": lambda: gk.penalties.InverseWishart(5.0, 0.5),
    "both": lambda: gk.penalties.NormalInverseWishart(torch.ones(3), 2.0, 5.0, 0.5),
    "ridge": lambda: gk.penalties.PrecisionRidge(0.01),
    "floor": lambda: gk.penalties.EigenvalueFloor(0.01),
}


FAMILIES = ("full", "tied_full", "diag", "spherical")


PATHS = {}


def path(function):
    """Adds a public path: a function of a scene, which fails where CUDA would refuse."""
    PATHS[function.__name__] = function
    return function


def generator(seed=0):
    """A generator of the CPU, as most people have."""
    return torch.Generator().manual_seed(seed)


class Scene:
    """Points of three clusters with weights, on the CPU and on the device, and a start on the device."""

    def __init__(self, folder):
        means = torch.tensor([[0.0, 0, 0], [5, 1, 0], [0, 6, 2]], dtype=torch.float64)
        labels = torch.randint(3, (600,), generator=generator())
        noise = torch.randn(600, 3, generator=generator(1), dtype=torch.float64)
        self.host = means[labels] + noise * torch.tensor([0.5, 1.0, 0.8])
        self.x = on_device(self.host)
        self.weights = on_device(0.5 + torch.rand(600, generator=generator(2), dtype=torch.float64))
        self.mixture = gk.initialize(self.x, 3, generator=generator())
        self.folder = folder

    def fit(self, method, x=None, start=None, **options):
        options = {"max_iter": 3, "generator": generator(), **options}
        result = gk.fit(self.mixture if start is None else start, self.x if x is None else x, method, **options)
        assert result.mixture.means.device.type == "cuda"
        return result


@path
def strategies(scene):
    for strategy in ("random", "kmeans", "kmeans++", "responsibilities"):
        for family in FAMILIES:
            options = {"covariance_type": family, "sample_weight": scene.weights, "generator": generator(), "refine": 1}
            assert gk.initialize(scene.x, 3, strategy, **options).means.is_cuda


@path
def fits(scene):
    for family in FAMILIES:
        start = gk.initialize(scene.x, 3, covariance_type=family, generator=generator())
        for method in (
            gk.EM(),
            gk.Adam(),
            gk.bayes.VariationalBayes(),
            gk.Gradient(lambda p: torch.optim.SGD(p, lr=0.01)),
        ):
            scene.fit(method, start=start, sample_weight=scene.weights)


@path
def variants_of_em(scene):
    frozen = {"frozen_means": (True, False, False), "frozen_weights": True, "frozen_covariances": (False, True, False)}
    for options in (
        {"batch_size": 100, "average": True},
        {"accelerate": True},
        {"assignment": "hard"},
        {"assignment": "stochastic"},
        {"temperature": (0.5, 3)},
        {"reg_covar": 0.1, **frozen},
    ):
        scene.fit(gk.EM(**options), sample_weight=scene.weights)


@path
def minibatches_of_adam(scene):
    scene.fit(gk.Adam(batch_size=100), sample_weight=scene.weights)


@path
def penalties(scene):
    for make in PENALTIES.values():
        for method in (gk.EM(), gk.Adam()):
            with contextlib.suppress(ValueError):  # not every penalty has an M-step
                scene.fit(method, penalty=make())


@path
def truncated_fits(scene):
    for method in (gk.EM(), gk.Adam(), gk.bayes.VariationalBayes()):
        scene.fit(method, truncate=1e-4)


@path
def checkpoints(scene):
    for name, method in {"em": gk.EM(tol=0.0), "adam": gk.Adam(batch_size=200)}.items():
        for steps in (2, 4):
            scene.fit(method, checkpoint=scene.folder / name, max_iter=steps)


@path
def dtypes(scene):
    scene.fit(gk.EM(), dtype="float32")
    assert scene.fit(gk.EM(), scene.x.float(), scene.mixture.to(torch.float32)).mixture.means.is_cuda


@path
def sources(scene):
    scene.fit(gk.EM(), gk.Source.of(scene.x))
    scene.fit(gk.EM(), lambda: scene.x.split(100))
    scene.fit(gk.Adam(batch_size=100), gk.Source.of(scene.host.numpy()))


@path
def variational_posteriors(scene):
    posterior = scene.fit(gk.bayes.VariationalBayes()).posterior
    posterior.sample(4, generator=generator())
    predictive = posterior.predictive()
    predictive.log_prob(scene.x)
    predictive.sample((5,), generator=generator())
    assert predictive.mean.is_cuda


@path
def gradients(scene):
    m, x = scene.mixture, scene.x.clone().requires_grad_()
    traced = gk.Mixture(m.logits.clone().requires_grad_(), m.means.clone().requires_grad_(), m.factor)
    traced.log_prob(x).sum().backward()
    (slope,) = torch.autograd.grad(m.log_prob(x[:50]).sum(), x, create_graph=True)
    slope.square().sum().backward()


@path
def methods_of_mixtures(scene):
    m, x = scene.mixture, scene.x
    for value in (m.log_prob(x), m.log_joint(x), m.responsibilities(x), *m.responsibilities(x, 2), m.predict(x)):
        assert value.is_cuda
    assert m.mean.is_cuda
    assert m.variance.is_cuda
    assert m.covariance_matrix.is_cuda
    repr(m)
    m.marginal([0, 2]).log_prob(x[:, ::2])
    m.condition([0], x[:4, :1]).mean  # noqa: B018
    m.expand((2,)).sample((3,), generator=generator())
    m.select(torch.tensor([0, 2])).log_prob(x)
    m.select(m.weights > 0.2).log_prob(x)
    m.to("cpu").log_prob(scene.host)
    line = m.marginal(0)
    line.cdf(x[:5, :1])
    for q in (0.3, [0.2, 0.9], on_device(torch.tensor([0.3, 0.4]))):
        assert line.quantile(q).is_cuda


@path
def samples(scene):
    m = scene.mixture
    regions = ({}, {"component": 1}, {"confidence": 0.9}, {"std_range": (1.0, 2.0)})
    for source in (generator(), torch.Generator("cuda").manual_seed(0), None):
        for region in regions:
            points, labels = m.sample((7,), return_labels=True, generator=source, **region)
            assert points.is_cuda
            assert labels.is_cuda


@path
def all_reductions(scene):
    m, R = scene.mixture, gk.reductions
    parameters = (m.offsets, m.means, m.factor)
    for points in (scene.x, R.arrange(scene.x, 3, 1e-3)):
        arguments = (points, *parameters)
        R.logsumexp(*arguments), R.argmax(*arguments), R.topk(*arguments, 2)
        R.total(*arguments, weights=scene.weights)
        for assignment in R.ASSIGNMENTS:
            R.moments(*arguments, weights=scene.weights, assignment=assignment)
    R.attached(R.moments(scene.x, *parameters), m.offsets, m.means.clone().requires_grad_(), m.factor).backward()
    x = scene.x.repeat(10, 2)
    wide = gk.initialize(x, 3, generator=generator())
    cloud = R.arrange(x, 3, 1e-3, labels=lambda: wide.predict(x))
    R.moments(cloud, wide.offsets, wide.means, wide.factor)


@path
def modules(scene):
    model = gk.GMM(3, n_components=3).double().to("cuda")
    model.initialize(scene.x, generator=generator())
    model().log_prob(scene.x).sum().backward()
    gk.fit(model, scene.x, gk.Adam(), max_iter=2)
    context, x = scene.x[:, :1].contiguous(), scene.x[:, 1:].contiguous()
    model = gk.GMM(2, context=1, n_components=3).double().to("cuda")
    model.initialize(x, context=context, generator=generator())
    model(context).log_prob(x).sum().backward()
    gk.fit(model, x, gk.Adam(), context=context, max_iter=2, generator=generator())


@path
def estimators(scene):
    X = scene.host.numpy()
    for family in ("full", "tied", "diag", "spherical"):
        options = {"covariance_type": family, "random_state": 0, "max_iter": 2, "device": "cuda"}
        options["init_params"] = "kmeans" if family == "full" else "random_from_data"
        model = gk.GaussianMixture(3, **options).fit(X)
        model.predict(X), model.predict_proba(X), model.score_samples(X), model.score(X), model.bic(X), model.sample(5)
        model.means_, model.covariances_, model.precisions_, model.precisions_cholesky_  # noqa: B018
    options = {"random_state": 0, "device": "cuda", "init_params": "random_from_data", "max_iter": 2}
    gk.GaussianMixture(3, **options).partial_fit(X).partial_fit(X)
    gk.GaussianMixture(3, **options, warm_start=True).fit(X).fit(X)
    start = {"means_init": X[:3], "weights_init": [0.3, 0.3, 0.4], "precisions_init": [torch.eye(3).tolist()] * 3}
    gk.GaussianMixture(3, device="cuda", max_iter=3, **start).fit(X)
    bayesian = gk.BayesianGaussianMixture(n_components=3, **options).fit(X)
    bayesian.predict(X), bayesian.sample(4)
    own = gk.GaussianMixture(3, random_state=0, max_iter=2, init_params="random_from_data").fit(scene.x)
    own.predict(scene.x), own.sample(5)


@path
def samplers(scene):
    normal, half = torch.distributions.Normal(0.0, 5.0), torch.distributions.HalfNormal(2.0)
    shares = torch.distributions.Dirichlet(torch.ones(2))
    prior = gk.bayes.Prior(2, weights=shares, means=normal, scales=half, covariance_type="spherical")
    x, w = scene.x[:, :1].contiguous(), scene.weights
    for proposal in ("prior", "laplace"):
        draws = gk.bayes.importance(prior, x, weights=w, draws=40, proposal=proposal, generator=generator())
    gk.bayes.importance(prior, x, draws=40, proposal="prior", generator=torch.Generator("cuda").manual_seed(0))
    assert draws.log_prob(x).is_cuda
    assert draws.responsibilities(x[:5]).is_cuda
    draws.sample(4, generator=torch.Generator("cuda").manual_seed(0))
    gk.bayes.langevin(prior, x, weights=w, draws=3, warmup=2, generator=generator(), progress=False)
    gamma = torch.distributions.Gamma(2.0, 1.0)
    prior = gk.bayes.Prior(2, weights=shares, means=normal, precisions=gamma, covariance_type="spherical")
    gk.bayes.gibbs(prior, x, weights=w, draws=5, warmup=2, chains=1, generator=generator(), progress=False)


@path
def model_selection(scene):
    table = gk.analysis.select(scene.x, [1, 2], sample_weight=scene.weights, generator=generator(), max_iter=3)
    assert table.best.means.is_cuda
    labels = scene.mixture.predict(scene.x)
    for source in (generator(), torch.Generator("cuda").manual_seed(0)):
        gk.analysis.silhouette(scene.x, labels, samples=100, generator=source)
    for criterion in (gk.analysis.bic, gk.analysis.aic, gk.analysis.icl):
        criterion(scene.mixture, scene.x)


@path
def comparisons(scene):
    other = gk.initialize(scene.x, 2, generator=generator())
    for measure in (gk.analysis.kl_divergence, gk.analysis.jensen_shannon, gk.analysis.total_variation):
        for source in (generator(), torch.Generator("cuda").manual_seed(0), None):
            measure(scene.mixture, other, samples=200, generator=source)
    assert gk.analysis.merge(scene.mixture, [[0, 1]]).means.is_cuda
    gk.standard_errors(scene.fit(gk.EM(), max_iter=20).mixture, scene.x, sample_weight=scene.weights)


@path
def pictures_and_files(scene):
    plt = pytest.importorskip("matplotlib.pyplot")
    x = scene.x[:, :2].contiguous()
    flat = scene.mixture.marginal([0, 1])
    gk.plotting.density(flat)
    gk.plotting.ellipses(flat)
    gk.plotting.points(x)
    gk.plotting.pairs(flat, x)
    gk.plotting.view(scene.x)
    gk.plotting.objective(scene.fit(gk.EM()))
    gk.plotting.ellipsoids(scene.mixture)
    plt.close("all")
    gk.export.npz(scene.mixture, scene.folder / "mixture.npz")
    gk.save(scene.mixture, scene.folder / "mixture.safetensors")
    gk.load(scene.folder / "mixture.safetensors").to("cuda").log_prob(scene.x)
    gk.from_sklearn(gk.to_sklearn(scene.mixture))
    if importlib.util.find_spec("plyfile"):
        gk.export.splats(scene.mixture, scene.folder / "splats.ply")
        gk.export.ellipsoids(scene.mixture, scene.folder / "ellipsoids.ply")


@path
def the_keops_engine(scene):
    with pytest.MonkeyPatch.context() as patch:
        fake_keops.install(patch, scene.folder)
        for truncate in (0, 1e-4):
            scene.fit(gk.EM(), backend="keops", truncate=truncate)
            scene.fit(gk.Adam(), backend="keops", truncate=truncate)
        m, x = scene.mixture, scene.x.clone().requires_grad_()
        m.log_prob(x, backend="keops").sum().backward()
        m.predict(x.detach(), backend="keops"), m.responsibilities(x.detach(), 2, backend="keops")


if HAS_TRITON:

    @path
    def the_triton_engine(scene):
        """The interpreter takes milliseconds for each point."""
        x, g = scene.x[:20], scene.weights[:20]
        start = gk.initialize(scene.x, 2, covariance_type="diag", generator=generator())
        with pytest.MonkeyPatch.context() as patch:
            fake_triton.install(patch)
            for truncate in (0, 1e-4):
                scene.fit(gk.EM(), x, backend="triton", truncate=truncate, sample_weight=g, max_iter=1)
            scene.fit(gk.Adam(), x, backend="triton", truncate=0, max_iter=1)
            scene.fit(gk.EM(assignment="hard"), x, start, backend="triton", truncate=0, max_iter=1)
            m, points = scene.mixture, x.clone().requires_grad_()
            m.log_prob(points, backend="triton").sum().backward()
            m.predict(x, backend="triton"), m.responsibilities(x, 2, backend="triton")


@pytest.mark.filterwarnings(
    "ignore:KeOps is the faster engine here",
    "ignore::gmmkeops.ConvergenceWarning",
    "ignore::gmmkeops.bayes.SamplingWarning",
)
@pytest.mark.parametrize(
    ("name", "deterministic"),
    # Where draws are made in another way under deterministic algorithms, both ways are taken.
    [*((name, True) for name in PATHS), *((name, False) for name in ("samples", "variants_of_em", "strategies"))],
    indirect=["deterministic"],
)
def test_path(monkeypatch, tmp_path, name, deterministic):
    with fake_device(monkeypatch):
        # Without KeOps, of which the fake device has none; one path has a stand-in.
        fake_keops.install(monkeypatch, tmp_path, reason="there is none on a device that does not exist")
        PATHS[name](Scene(tmp_path))


# Kernels, host synchronizations and copies to the device of one iteration, at most: a tenth above what they are today.
@pytest.mark.filterwarnings("ignore:KeOps is the faster engine here")
@pytest.mark.parametrize(
    ("name", "bounds"),
    [("em", (310, 36, 7)), ("em_float32", (330, 37, 7)), ("adam", (230, 20, 2)), ("variational", (400, 19, 3))],
)
def test_costs_of_an_iteration(monkeypatch, tmp_path, name, bounds):
    method = {"adam": gk.Adam, "variational": gk.bayes.VariationalBayes}.get(name, gk.EM)
    options = {"dtype": "float32"} if name == "em_float32" else {}
    with fake_device(monkeypatch) as counts:
        scene, found = Scene(tmp_path), []
        for steps in (4, 8):
            counts.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", gk.ConvergenceWarning)
                scene.fit(method(tol=0.0), max_iter=steps, backend="dense", **options)
            found.append(counts.totals)
            report = counts.report()
    costs = {what: (found[1][what] - found[0][what]) / 4 for what in found[0]}
    print(f"{name}: {costs}, and of eight iterations:\n{report}")
    for (what, cost), bound in zip(costs.items(), bounds, strict=True):
        assert cost <= bound, what


@pytest.mark.filterwarnings("ignore:KeOps is the faster engine here")
def test_generators_of_the_host_decide_on_the_device(monkeypatch, tmp_path):
    with fake_device(monkeypatch):
        scene = Scene(tmp_path)
        draw = lambda source: scene.mixture.sample((20,), generator=source).cpu()  # noqa: E731
        source = generator(3)
        first, second = draw(source), draw(source)
        assert torch.equal(first, draw(generator(3)))
        assert not torch.equal(first, second)
        assert not torch.equal(first, draw(generator(4)))
        for function in (
            lambda g: gk.analysis.kl_divergence(
                scene.mixture, scene.mixture.marginal([1, 0, 2]), samples=100, generator=g
            ),
            lambda g: gk.analysis.silhouette(scene.x, scene.mixture.predict(scene.x), samples=50, generator=g),
        ):
            assert function(generator(5)) == function(generator(5))
            assert function(generator(5)) != function(generator(6))


@pytest.mark.filterwarnings("ignore:KeOps is the faster engine here")
@pytest.mark.parametrize("deterministic", [False, True], indirect=True)
def test_draws_follow_the_weights(monkeypatch, deterministic):
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0], dtype=torch.float64).log()
    means = torch.arange(5.0, dtype=torch.float64)[:, None]
    with fake_device(monkeypatch):
        factor = gk.SphericalFactor.from_covariances(torch.full((5,), 1e-6, dtype=torch.float64), features=1).to("cuda")
        mixture = gk.Mixture(on_device(logits.clamp(min=-1e4)), on_device(means), factor)
        _, labels = mixture.sample((20_000,), return_labels=True, generator=generator())
        shares = labels.cpu().bincount(minlength=5) / 20_000
        # Stochastic EM gives every point to one component, drawn by its responsibilities.
        flat = gk.Mixture(mixture.logits, on_device(0 * means), factor)
        x = on_device(torch.zeros(20_000, 1, dtype=torch.float64))
        arguments = (x, flat.offsets, flat.means, flat.factor)
        counts = gk.reductions.moments(*arguments, assignment="stochastic", seed=1).S0.cpu()
    for found in (shares, counts / 20_000):
        # Five standard deviations of a share.
        assert float((found - logits.exp()).abs().max()) < 5 * (0.25 / 20_000) ** 0.5
        assert found[1] == found[4] == 0


@pytest.mark.filterwarnings("ignore:KeOps is the faster engine here")
def test_rows_are_drawn_on_their_device(monkeypatch):
    x = torch.randn(50_000, 2, generator=generator(), dtype=torch.float64)
    weights = torch.rand(50_000, generator=generator(1), dtype=torch.float64) ** 4
    for g in (None, weights):
        on_host = gk.initialize(x, 4, "kmeans++", sample_weight=g, generator=generator(), n_init=1, backend="dense")
        with fake_device(monkeypatch) as counts:
            points, mass = on_device(x), None if g is None else on_device(g)
            # The same numbers on the device as on the host.
            source = torch.Generator("cuda")
            source.set_state(generator().get_state())
            counts.clear()
            there = gk.initialize(
                points, 4, "kmeans++", sample_weight=mass, generator=source, n_init=1, backend="dense"
            ).to("cpu")
            copied = sum(n for (what, _), n in counts.synchronizations.items() if what == "copy to the host")
        assert copied <= 4
        assert torch.allclose(there.means, on_host.means)
        assert torch.allclose(there.weights, on_host.weights)


def test_every_fallback_of_an_engine_is_said_once(monkeypatch, tmp_path):
    case = make_case("full", torch.float32, condition=10.0)
    for reason in ("pykeops is not installed (pip install pykeops)", "no C++ compiler was found (install g++)"):
        with fake_device(monkeypatch):
            fake_keops.install(monkeypatch, tmp_path, reason=reason)
            arguments = [on_device(value) for value in (case.x, case.offsets, case.means, case.factor.U)]
            with pytest.warns(UserWarning, match="KeOps is the faster engine here but " + re.escape(reason)):
                values = gk.reductions.logsumexp(*arguments)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(values.cpu(), gk.reductions.logsumexp(*arguments, backend="keops").cpu())
                gk.reductions.moments(*arguments)
