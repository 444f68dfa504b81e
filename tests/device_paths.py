"""Public calls, as small functions of tensors on a device, which fail where CUDA would raise an error.

Functions are registered by :func:`path`, once for each of its cases.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import fake_keops
import fake_triton
import numpy as np
import pytest
import torch
from conftest import HAS_TRITON
from fake_device import on_device

import gmmkeops as gk
from gmmkeops.fitting.initialization import start_of

R = gk.reductions
PATHS = {}
FAMILIES = ("full", "tied_full", "diag", "spherical")
PENALTIES = {
    "sqrt": lambda: gk.penalties.SqrtWeights(0.01),
    "entropy": lambda: gk.penalties.WeightEntropy(0.01),
    "dirichlet": lambda: gk.penalties.Dirichlet(2.0),
    "mean": lambda: gk.penalties.NormalMean(torch.ones(3), 2.0),
    "mean_of_the_device": lambda: gk.penalties.NormalMean(on_device(torch.ones(3)), 2.0),
    "wishart": lambda: gk.penalties.InverseWishart(5.0, 3.5),
    "covariance": lambda: gk.penalties.CovariancePrior(torch.eye(3), 4.0),
    "both": lambda: gk.penalties.NormalInverseWishart(torch.ones(3), 2.0, 0.5, 5.0),
    "ridge": lambda: gk.penalties.PrecisionRidge(0.01),
    "floor": lambda: gk.penalties.EigenvalueFloor(0.01),
    "sum": lambda: 2 * (gk.penalties.SqrtWeights(0.01) + gk.penalties.PrecisionRidge(0.01)),
    "function": lambda: lambda mixture: (mixture.means - on_device(torch.ones(3).double())).square().sum(),
}
# Penalties that EM does not support.
WITHOUT_M_STEP = ("ridge", "sum", "function")


def path(*cases):
    """Registers a function of a scene, or of a scene and each of the cases."""

    def register(function):
        for case in cases:
            name = f"{function.__name__}[{case if isinstance(case, str) else case[0]}]"
            PATHS[name] = lambda scene, case=case: function(scene, case)
        if not cases:
            PATHS[function.__name__] = function
        return function

    return register


def generator(seed=0):
    """A generator of the CPU, as most people have."""
    return torch.Generator().manual_seed(seed)


def generators():
    """A generator of the CPU, one of the device, and none."""
    return generator(), torch.Generator("cuda").manual_seed(0), None


@cache
def _host():
    """Points of three clusters, their weights, and an initial mixture, on the CPU."""
    means = torch.tensor([[0.0, 0, 0], [5, 1, 0], [0, 6, 2]], dtype=torch.float64)
    labels = torch.randint(3, (300,), generator=generator())
    noise = torch.randn(300, 3, generator=generator(1), dtype=torch.float64)
    x = means[labels] + noise * torch.tensor([0.5, 1.0, 0.8])
    weights = 0.5 + torch.rand(300, generator=generator(2), dtype=torch.float64)
    return x, weights, gk.initialize(x, 3, "kmeans", generator=generator())


class Scene:
    """Points (300, 3) with weights on the CPU and on the device, and an initial mixture of three components on the device."""

    def __init__(self, folder):
        self.folder = folder
        self.host, weights, mixture = _host()
        self.x, self.weights, self.mixture = on_device(self.host), on_device(weights), mixture.to("cuda")

    def start(self, family):
        """An initial mixture of a family."""
        return gk.initialize(self.x, 3, "random", covariance_type=family, generator=generator())

    def fit(self, method, x=None, start=None, **options):
        options = {"max_iter": 3, "generator": generator(), **options}
        result = gk.fit(self.mixture if start is None else start, self.x if x is None else x, method, **options)
        assert result.mixture.means.is_cuda
        assert result.mixture.factor.device.type == "cuda"
        return result


# Initial mixtures


@path("auto", "random", "kmeans", "kmeans++", "responsibilities", "annealed", "split-merge")
def initialize(scene, strategy):
    few = slice(None) if strategy in ("random", "kmeans") else slice(60)
    options = {"sample_weight": scene.weights[few], "generator": generator(), "refine": int(strategy == "kmeans")}
    assert gk.initialize(scene.x[few], 2, strategy, **options).means.is_cuda


@path("full", "diag")
def initialize_in_a_third_metric(scene, family):
    """Components that overlap in many columns."""
    x = torch.randn(300, 8, generator=generator(), dtype=torch.float64)
    x[:150, 0] += 2.5
    start, report = start_of(on_device(x.float()), 2, covariance_type=family, generator=generator())
    assert start.means.is_cuda
    assert report.candidates == 3


@path(*FAMILIES)
def initialize_a_family(scene, family):
    assert gk.initialize(scene.x, 2, "kmeans", covariance_type=family, generator=generator(), n_init=2).means.is_cuda


# Fits


@path(*FAMILIES)
def em(scene, family):
    scene.fit(gk.EM(), start=scene.start(family), sample_weight=scene.weights)


@path(*FAMILIES)
def adam(scene, family):
    scene.fit(gk.Adam(), start=scene.start(family), sample_weight=scene.weights)


@path(*FAMILIES)
def variational(scene, family):
    found = scene.fit(gk.bayes.VariationalBayes(), start=scene.start(family), sample_weight=scene.weights)
    assert found.posterior.concentration.is_cuda
    assert found.posterior.prior.degrees.is_cuda


@path(*FAMILIES)
def sgd(scene, family):
    scene.fit(gk.Gradient(lambda p: torch.optim.SGD(p, lr=0.01)), start=scene.start(family))


@path(
    ("minibatches", {"batch_size": 100, "average": True}),
    ("squarem", {"accelerate": True}),
    ("hard", {"assignment": "hard"}),
    ("stochastic", {"assignment": "stochastic"}),
    ("stochastic_minibatches", {"assignment": "stochastic", "batch_size": 100}),
    ("annealed", {"temperature": (0.5, 3)}),
    ("refined", {"refine": True}),
    (
        "frozen",
        {"frozen_means": (True, False, False), "frozen_weights": True, "frozen_covariances": (False, True, False)},
    ),
)
def variants_of_em(scene, case):
    scene.fit(gk.EM(**case[1]), sample_weight=scene.weights)


@path(
    ("minibatches", {"batch_size": 100}),
    ("natural", {"natural_gradient": True}),
    ("scheduled", {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)}),
)
def variants_of_adam(scene, case):
    scene.fit(gk.Adam(**case[1]), sample_weight=scene.weights)


@path(
    ("minibatches", {"batch_size": 100}),
    ("squarem", {"accelerate": True}),
    ("dirichlet", {"weights": "dirichlet_distribution"}),
    ("priors", {"means": torch.ones(3), "covariances": torch.eye(3), "degrees": 5.0}),
)
def variants_of_variational_bayes(scene, case):
    scene.fit(gk.bayes.VariationalBayes(**case[1]))


@path()
def posterior_continued(scene):
    first = scene.fit(gk.bayes.VariationalBayes()).posterior
    scene.fit(gk.bayes.VariationalBayes(begin=first))


@path()
def posterior_of_a_number_of_components(scene):
    found = scene.fit(gk.bayes.VariationalBayes(), scene.x[:60], start=2)
    assert found.mixture.n_components == 2


@path(*(name for name in PENALTIES if name not in WITHOUT_M_STEP))
def penalty_in_em(scene, name):
    scene.fit(gk.EM(), penalty=PENALTIES[name]())


@path(*PENALTIES)
def penalty_in_adam(scene, name):
    scene.fit(gk.Adam(), penalty=PENALTIES[name]())


METHODS = {"em": gk.EM, "adam": gk.Adam, "variational": gk.bayes.VariationalBayes}


@path(*METHODS)
def truncated(scene, name):
    scene.fit(METHODS[name](), truncate=1e-4)


@path()
def truncated_in_groups_of_labels(scene):
    x = scene.x.repeat(10, 2)
    start = gk.initialize(x, 3, "random", generator=generator())
    assert scene.fit(gk.EM(), x, start, truncate=1e-3, max_iter=6).report.truncate == 1e-3


@path(*METHODS)
def single_precision(scene, name):
    scene.fit(METHODS[name](), dtype="float32")
    scene.fit(METHODS[name](), scene.x.float(), scene.mixture.to(torch.float32))


@path(*METHODS)
def checkpoint(scene, name):
    for truncate, steps in ((0, 2), (0, 4), (1e-4, 2), (1e-4, 4)):
        scene.fit(
            METHODS[name](tol=0.0), checkpoint=scene.folder / f"{name}{truncate}", max_iter=steps, truncate=truncate
        )


@path()
def checkpoint_of_minibatches(scene):
    for steps in (2, 4):
        scene.fit(gk.Adam(batch_size=100), checkpoint=scene.folder / "adam", max_iter=steps)


@path()
def checkpoint_within_a_pass(scene):
    begun = []

    def chunks():
        begun.append(None)
        for number, part in enumerate(scene.host.split(100)):
            if len(begun) == 4 and number == 2:
                raise OSError("the network is down")
            yield part

    options = {"checkpoint": gk.Checkpoint(scene.folder / "em", every=0), "max_iter": 4}
    with pytest.raises(OSError, match="the network is down"):
        scene.fit(gk.EM(tol=0.0), gk.Source(chunks, chunk_rows=100), **options)
    assert (scene.folder / "em.part0").exists()
    scene.fit(gk.EM(tol=0.0), gk.Source(chunks, chunk_rows=100), **options)


@path()
def pruning(scene):
    for method in (gk.EM(), gk.Adam(lr=0.5)):
        scene.fit(method, penalty=gk.penalties.SqrtWeights(20.0), max_iter=8)
    empty = gk.Mixture(
        scene.mixture.logits - on_device(torch.tensor([0.0, 0, 1e9])), scene.mixture.means, scene.mixture.factor
    )
    for method in (gk.EM(), gk.Adam()):
        assert scene.fit(method, start=empty).report.pruned_components == (2,)


@path()
def collapsing(scene):
    repeated = on_device(scene.host[:2].repeat(50, 1))
    start = gk.Mixture(weights=[0.5, 0.5], means=scene.host[:2], covariances=torch.ones(2, 3), covariance_type="diag")
    scene.fit(gk.EM(reg_covar=0.0), repeated, start.to("cuda"), max_iter=6)


@path()
def held_out_points(scene):
    scene.fit(gk.EM(), validation=0.3, sample_weight=scene.weights)
    scene.fit(gk.Adam(), scene.x[:200], validation=scene.x[200:])


@path()
def callbacks(scene):
    seen = []
    scene.fit(gk.EM(), callback=lambda step: seen.append((step.mixture.log_prob(scene.x), step.active[0])))
    assert all(value.is_cuda for pair in seen for value in pair)


@path()
def limited_memory(scene):
    scene.fit(gk.EM(), max_memory="100MB")


@path()
def number_of_components(scene):
    found = scene.fit(gk.EM(), scene.x[:60], start=2, generator=torch.Generator("cuda"))
    assert found.mixture.n_components == 2


@path()
def batches_of_a_stream(scene):
    mixture, memory = scene.mixture, None
    for part in scene.x.split(100):
        mixture, memory = gk.EM().update(mixture, part, memory, sample_weight=scene.weights[:100])
    assert mixture.means.is_cuda


@path()
def moments_of_several_machines(scene):
    m = scene.mixture
    sums = [R.moments(part, m.offsets, m.means, m.factor) for part in scene.x.split(100)]
    assert gk.EM().maximize(m, sum(sums), penalty=gk.penalties.Dirichlet(2.0)).means.is_cuda


# Sources


@path()
def source(scene):
    scene.fit(gk.EM(), gk.Source.of(scene.x))
    scene.fit(gk.EM(), gk.Source(scene.host.numpy(), chunk_rows=100), dtype="float32")


@path()
def source_in_minibatches(scene):
    scene.fit(gk.Adam(batch_size=80), gk.Source(scene.host.numpy(), weights=np.ones(300), chunk_rows=100))
    scene.fit(gk.EM(batch_size=80), gk.Source(scene.host.float().numpy(), chunk_rows=100))


@path()
def function_of_chunks(scene):
    scene.fit(gk.EM(), lambda: scene.x.split(100))
    scene.fit(gk.EM(), lambda: scene.host.split(100), validation=scene.host[:50])


@path()
def files(scene):
    np.save(scene.folder / "x.npy", scene.host.numpy())
    scene.fit(gk.EM(), scene.folder / "x.npy", truncate=1e-4)


@path()
def loader(scene):
    data = torch.utils.data.TensorDataset(scene.host, torch.ones(300))
    scene.fit(gk.EM(), torch.utils.data.DataLoader(data, batch_size=100))


# Mixtures


@path()
def densities(scene):
    m, x = scene.mixture, scene.x
    for value in (m.log_prob(x), m.log_joint(x), m.log_prob(x.float()), m.log_prob(x[None, :5])):
        assert value.is_cuda


@path()
def posteriors(scene):
    m, x = scene.mixture, scene.x
    for value in (m.responsibilities(x), *m.responsibilities(x, 2), m.predict(x)):
        assert value.is_cuda


@path()
def moments_of_a_mixture(scene):
    m = scene.mixture
    for value in (m.mean, m.variance, m.covariance_matrix, m.weights, m.covariances, m.precisions, m.stddev, m.offsets):
        assert value.is_cuda
    repr(m), m._repr_html_()


@path()
def conditional_and_marginal(scene):
    m, x = scene.mixture, scene.x
    assert m.marginal([0, 2]).log_prob(x[:, ::2]).is_cuda
    assert m.condition([0], x[:4, :1]).mean.is_cuda
    assert m.condition([0, 1], x[:4, :2]).log_prob(x[:4, 2:]).is_cuda


@path()
def parts_of_a_mixture(scene):
    m, x = scene.mixture, scene.x
    for part in (m.select(torch.tensor([0, 2])), m.select(m.weights > 0.2), m[[0, 1]], m[1], m[:2]):
        assert part.log_prob(x).is_cuda
    m.expand((2,)).sample((3,), generator=generator())
    m.to("cpu").log_prob(scene.host)
    m.detach().named(["a", "b", "c"]).log_prob(x)


@path()
def distributions_of_a_mixture(scene):
    m = scene.mixture
    assert m.component_distribution.log_prob(scene.x[:4, None]).is_cuda
    assert m.mixture_distribution.probs.is_cuda


@path()
def quantiles(scene):
    line = scene.mixture.marginal(0)
    assert line.cdf(scene.x[:5, :1]).is_cuda
    for q in (0.3, [0.2, 0.9], on_device(torch.tensor([0.3, 0.4]))):
        assert line.quantile(q).is_cuda


@path(*FAMILIES)
def a_batch_of_mixtures(scene, family):
    m = scene.start(family)
    batch = gk.Mixture(m.logits.expand(2, -1), m.means.expand(2, -1, -1), m.factor.expand((2,)))
    assert batch.log_prob(scene.x[:, None]).is_cuda
    assert batch[0].log_prob(scene.x).is_cuda
    assert batch.sample((2,), generator=generator()).is_cuda


@path(
    ("all", {}),
    ("component", {"component": 1}),
    ("confidence", {"confidence": 0.9}),
    ("ring", {"std_range": (1.0, 2.0)}),
)
def samples(scene, case):
    for source in generators():
        points, labels = scene.mixture.sample((7,), return_labels=True, generator=source, **case[1])
        assert points.is_cuda
        assert labels.is_cuda


@path()
def scores(scene):
    for function in (scene.mixture.score, scene.mixture.bic, scene.mixture.aic):
        function(scene.x), function(scene.x, sample_weight=scene.weights)


@path("full", "diag", "spherical")
def factors(scene, family):
    m = scene.start(family)
    kind, covariances = type(m.factor), m.factor.compact_covariances()
    assert kind.from_covariances(covariances, features=3).device.type == "cuda"
    precisions = m.precisions
    assert kind.from_precisions(precisions, features=3).device.type == "cuda"
    made = gk.Mixture(weights=m.weights, means=m.means, covariances=covariances, covariance_type=family)
    assert made.log_prob(scene.x).is_cuda


# Reductions and their derivatives


@path("points", "sorted")
def reductions(scene, case):
    m = scene.mixture
    points = scene.x if case == "points" else R.arrange(scene.x, 3, 1e-3)
    arguments = (points, m.offsets, m.means, m.factor)
    for value in (R.logsumexp(*arguments), R.argmax(*arguments), *R.topk(*arguments, 2)):
        assert value.is_cuda
    assert R.total(*arguments, weights=scene.weights).is_cuda


@path(*R.ASSIGNMENTS)
def sufficient_statistics(scene, assignment):
    m = scene.mixture
    for points in (scene.x, R.arrange(scene.x, 3, 1e-3)):
        sums = R.moments(points, m.offsets, m.means, m.factor, weights=scene.weights, assignment=assignment)
        assert (sums + sums.recenter(m.means + 1)).scatters.is_cuda


@path()
def sums_with_gradients(scene):
    m = scene.mixture
    R.attached(
        R.moments(scene.x, m.offsets, m.means, m.factor), m.offsets, m.means.clone().requires_grad_(), m.factor
    ).backward()
    means = m.means.clone().requires_grad_()
    R.total(scene.x, m.offsets, means, m.factor, weights=scene.weights).backward()
    assert means.grad.is_cuda


@path()
def points_in_groups_of_labels(scene):
    x = scene.x.repeat(10, 2)
    wide = gk.initialize(x, 3, "kmeans", generator=generator())
    cloud = R.arrange(x, 3, 1e-3, labels=lambda: wide.predict(x))
    R.moments(cloud, wide.offsets, wide.means, wide.factor)


@path(*FAMILIES)
def gradients_of_parameters(scene, family):
    m = scene.start(family)
    tensors = {name: value.clone().requires_grad_() for name, value in m.factor.tensors.items()}
    traced = gk.Mixture(
        m.logits.clone().requires_grad_(), m.means.clone().requires_grad_(), m.factor.replace(**tensors)
    )
    traced.log_prob(scene.x).mean().backward()
    for leaf in (traced.logits, traced.means, *tensors.values()):
        assert leaf.grad.is_cuda


@path()
def gradients_of_points(scene):
    x = scene.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(scene.mixture.log_prob(x[:50]).sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert x.grad.is_cuda


@path()
def gradients_of_posteriors(scene):
    x = scene.x[:20].clone().requires_grad_()
    scene.mixture.log_joint(x).logsumexp(-1).sum().backward()
    scene.mixture.responsibilities(x)[:, 0].sum().backward()
    assert x.grad.is_cuda


# Modules


@path()
def module(scene):
    model = gk.GMM(3, n_components=3).double().to("cuda")
    model.initialize(scene.x, generator=generator())
    model().log_prob(scene.x).sum().backward()
    for method in (gk.EM(), gk.Adam()):
        gk.fit(model, scene.x, method, max_iter=2)
    assert model().means.is_cuda


@path()
def conditional_module(scene):
    context, x = scene.x[:, :1].contiguous(), scene.x[:, 1:].contiguous()
    model = gk.GMM(2, context=1, n_components=3).double().to("cuda")
    model.initialize(x, context=context, generator=generator())
    model(context).log_prob(x).sum().backward()
    for method in (gk.Adam(), gk.Adam(batch_size=100, natural_gradient=True)):
        gk.fit(model, x, method, context=context, max_iter=2, generator=generator())
    assert model(context).means.is_cuda


# Estimators


@path("full", "tied", "diag", "spherical")
def estimator(scene, family):
    X = scene.host.numpy()
    options = {"covariance_type": family, "random_state": 0, "max_iter": 2, "init_params": "random_from_data"}
    model = gk.GaussianMixture(3, **options, device="cuda").fit(X)
    assert model.mixture_.means.is_cuda
    model.predict(X), model.predict_proba(X), model.score_samples(X), model.score(X), model.bic(X), model.sample(5)
    model.means_, model.covariances_, model.precisions_, model.precisions_cholesky_  # noqa: B018


@path(
    ("kmeans", {"init_params": "kmeans"}),
    ("searched", {"init_params": "auto"}),
    ("adam", {"solver": "adam", "init_params": "random_from_data"}),
    ("warm", {"warm_start": True, "init_params": "random_from_data"}),
    ("prior", {"prior": "auto", "init_params": "random_from_data"}),
)
def estimator_options(scene, case):
    X = scene.host[:60].numpy()
    model = gk.GaussianMixture(2, random_state=0, max_iter=2, device="cuda", **case[1])
    model.fit(X).fit(X, sample_weight=np.ones(60))


@path()
def estimator_of_a_stream(scene):
    X, options = scene.host.numpy(), {"random_state": 0, "device": "cuda", "init_params": "random_from_data"}
    gk.GaussianMixture(3, **options).partial_fit(X).partial_fit(X).predict(X)


@path()
def estimator_from_parameters(scene):
    X = scene.host.numpy()
    start = {"means_init": X[:3], "weights_init": [0.3, 0.3, 0.4], "precisions_init": [torch.eye(3).tolist()] * 3}
    gk.GaussianMixture(3, device="cuda", max_iter=3, **start).fit(X)
    gk.GaussianMixture.from_mixture(scene.mixture).predict(scene.x)


@path()
def estimator_of_tensors(scene):
    own = gk.GaussianMixture(3, random_state=0, max_iter=2, init_params="random_from_data").fit(scene.x)
    own.predict(scene.x), own.sample(5), own.fit_predict(scene.x)


@path()
def estimator_in_a_file(scene):
    model = gk.GaussianMixture(2, random_state=0, max_iter=2, init_params="random_from_data", device="cuda")
    model.fit(scene.host.numpy()).save(scene.folder / "estimator.safetensors")
    gk.GaussianMixture.load(scene.folder / "estimator.safetensors", device="cuda").predict(scene.x)


@path()
def bayesian_estimator(scene):
    X, options = scene.host.numpy(), {"random_state": 0, "device": "cuda", "init_params": "random_from_data"}
    model = gk.BayesianGaussianMixture(n_components=3, max_iter=2, **options).fit(X)
    model.predict(X), model.predict_proba(X), model.sample(4), model.score(X)


# Posterior distributions


@path()
def posterior_and_predictive(scene):
    posterior = scene.fit(gk.bayes.VariationalBayes()).posterior
    assert posterior.sample(4, generator=generator()).means.is_cuda
    predictive = posterior.predictive()
    for source in generators():
        predictive.sample((5,), generator=source)
    assert predictive.log_prob(scene.x).is_cuda
    assert predictive.mean.is_cuda


def _prior(**given):
    shares = torch.distributions.Dirichlet(torch.ones(2))
    normal = torch.distributions.Normal(0.0, 5.0)
    given = given or {"scales": torch.distributions.HalfNormal(2.0)}
    return gk.bayes.Prior(2, weights=shares, means=normal, covariance_type="spherical", **given)


@path("prior", "laplace")
def importance(scene, proposal):
    x, w = scene.x[:, :1].contiguous(), scene.weights
    draws = gk.bayes.importance(_prior(), x, weights=w, draws=40, proposal=proposal, generator=generator())
    assert draws.log_prob(x).is_cuda
    assert draws.responsibilities(x[:5]).is_cuda
    draws.sample(4, generator=torch.Generator("cuda").manual_seed(0))


@path()
def langevin(scene):
    x, w = scene.x[:, :1].contiguous(), scene.weights
    gk.bayes.langevin(_prior(), x, weights=w, draws=3, warmup=2, generator=generator(), progress=False)


@path()
def gibbs(scene):
    prior, x = _prior(precisions=torch.distributions.Gamma(2.0, 1.0)), scene.x[:, :1].contiguous()
    gk.bayes.gibbs(prior, x, weights=scene.weights, draws=5, warmup=2, chains=1, generator=generator(), progress=False)


# Analysis


@path()
def criteria(scene):
    for criterion in (gk.analysis.bic, gk.analysis.aic, gk.analysis.icl, gk.analysis.score):
        criterion(scene.mixture, scene.x), criterion(scene.mixture, scene.x, sample_weight=scene.weights)
    gk.analysis.anomaly_threshold(scene.mixture, scene.x)


@path()
def selection(scene):
    options = {"sample_weight": scene.weights, "generator": generator(), "max_iter": 3}
    assert gk.analysis.select(scene.x, [1, 2], ["spherical"], criterion="icl", **options).best.means.is_cuda


@path("bic", "held_out")
def selection_of_a_number(scene, criterion):
    x = scene.x[:200, :1].contiguous()
    table = gk.analysis.select(x, "auto", criterion=criterion, max_components=2, generator=generator())
    assert table.best.means.is_cuda


@path()
def path_of_penalties(scene):
    table = gk.analysis.penalty_path(scene.x[:60], 2, [1.0, 0.1], generator=generator(), max_iter=2)
    assert table.best.means.is_cuda


@path()
def silhouette(scene):
    labels = scene.mixture.predict(scene.x)
    for source in generators():
        gk.analysis.silhouette(scene.x, labels, samples=100, generator=source)


@path("kl_divergence", "jensen_shannon", "total_variation")
def comparison(scene, name):
    for source in generators():
        getattr(gk.analysis, name)(scene.mixture, scene.mixture[[0, 1]], samples=200, generator=source)


@path("divergence", "bound", "classification")
def reduction(scene, cost):
    found = gk.analysis.reduce(scene.mixture, 2, cost=cost)
    assert found.mixture.log_prob(scene.x).is_cuda
    assert gk.analysis.merge(scene.mixture, [[0, 1]]).means.is_cuda


@path(*FAMILIES)
def standard_errors(scene, family):
    start = gk.initialize(scene.x, 2, "kmeans", covariance_type=family, generator=generator())
    found = scene.fit(gk.EM(), start=start, max_iter=20).mixture
    assert gk.standard_errors(found, scene.x, sample_weight=scene.weights).means.is_cuda


# Pictures and files


@path("density", "ellipses", "points", "pairs", "view", "objective", "ellipsoids", "selection")
def picture(scene, name):
    plt = pytest.importorskip("matplotlib.pyplot")
    flat, draw = scene.mixture.marginal([0, 1]), getattr(gk.plotting, name)
    arguments = {
        "points": lambda: (scene.x[:, :2],),
        "pairs": lambda: (flat, scene.x[:, :2]),
        "view": lambda: (scene.x,),
        "objective": lambda: (scene.fit(gk.EM()),),
        "ellipsoids": lambda: (scene.mixture,),
        "selection": lambda: (gk.analysis.select(scene.x, [1], ["spherical"], generator=generator()),),
    }
    options = {"resolution": 40} if name in ("density", "ellipsoids") else {}
    draw(*arguments.get(name, lambda: (flat,))(), **options)
    plt.close("all")


@path()
def safetensors(scene):
    gk.save(scene.mixture, scene.folder / "mixture.safetensors")
    assert gk.load(scene.folder / "mixture.safetensors", device="cuda").log_prob(scene.x).is_cuda
    gk.load(scene.folder / "mixture.safetensors").to("cuda").log_prob(scene.x)
    scene.mixture.save(scene.folder / "other.safetensors")


@path("npz", "splats", "ellipsoids")
def exported(scene, name):
    if name != "npz" and not importlib.util.find_spec("plyfile"):
        pytest.skip("plyfile is not installed")
    getattr(gk.export, name)(scene.mixture, scene.folder / f"mixture.{'npz' if name == 'npz' else 'ply'}")


@path()
def scikit_learn(scene):
    gk.from_sklearn(gk.to_sklearn(scene.mixture))


# The engine of KeOps


@path("em", "adam")
def fits_with_keops(scene, name):
    with pytest.MonkeyPatch.context() as patch:
        fake_keops.install(patch, scene.folder)
        for truncate in (0, 1e-4):
            scene.fit(METHODS[name](), backend="keops", truncate=truncate)


@path()
def mixtures_with_keops(scene):
    with pytest.MonkeyPatch.context() as patch:
        fake_keops.install(patch, scene.folder)
        m, x = scene.mixture, scene.x.clone().requires_grad_()
        m.log_prob(x, backend="keops").sum().backward()
        m.predict(x.detach(), backend="keops"), m.responsibilities(x.detach(), 2, backend="keops")
        traced = gk.Mixture(m.logits, m.means.clone().requires_grad_(), m.factor)
        traced.log_prob(scene.x, backend="keops").sum().backward()


if HAS_TRITON:

    @path()
    def fits_with_triton(scene):
        """Few points, since the interpreter takes milliseconds for each."""
        x, g = scene.x[:20], scene.weights[:20]
        start = gk.initialize(scene.x, 2, covariance_type="diag", generator=generator())
        with pytest.MonkeyPatch.context() as patch:
            fake_triton.install(patch)
            for truncate in (0, 1e-4):
                scene.fit(gk.EM(), x, backend="triton", truncate=truncate, sample_weight=g, max_iter=1)
            scene.fit(gk.Adam(), x, backend="triton", truncate=0, max_iter=1)
            scene.fit(gk.EM(assignment="hard"), x, start, backend="triton", truncate=0, max_iter=1)

    @path()
    def mixtures_with_triton(scene):
        with pytest.MonkeyPatch.context() as patch:
            fake_triton.install(patch)
            m, x = scene.mixture, scene.x[:20].clone().requires_grad_()
            m.log_prob(x, backend="triton").sum().backward()
            m.predict(x.detach(), backend="triton"), m.responsibilities(x.detach(), 2, backend="triton")
