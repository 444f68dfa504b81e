"""Stored results of every kind of fit and score, which changes of the code must reproduce.

``python tests/test_reference.py`` writes the results of the current code to ``tests/reference.json``. All fits are
short, so that rounding is not amplified: other numbers mean another computation, not another machine.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Dirichlet, Gamma, InverseGamma, Normal, Wishart

import gmmkeops as gk

STORED = Path(__file__).with_name("reference.json")
# Largest differences as fractions of max(1, |value|). Single precision rounds at about 6e-8.
# Distances by matrix products lose half of the digits where points coincide, as each does with itself.
DOUBLE, ROUGH, SINGLE = 1e-10, 1e-8, 1e-5
FAMILIES = ["full", "diag", "spherical", "tied", "tied_diag", "tied_spherical"]
CASES, TOLERANCES = {}, {}


def case(function, *arguments, tolerance=DOUBLE):
    """Adds a function to the cases, under its name and those of its arguments."""
    name = "_".join([function.__name__, *map(str, arguments)])
    assert name not in CASES, name
    CASES[name], TOLERANCES[name] = lambda: function(*arguments), tolerance
    return function


def single(function):
    return case(function, tolerance=SINGLE)


def rough(function):
    return case(function, tolerance=ROUGH)


def each(values):
    """Adds a function of one argument to the cases, once for each value."""

    def add(function):
        for value in values:
            case(function, value)
        return function

    return add


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(N=600, D=2, seed=0):
    """Three groups of different shapes, float64."""
    generator = seeded(seed)
    centers = torch.tensor([[0.0, 0.0, 0.0], [3.0, 1.0, -1.0], [-1.0, 4.0, 2.0]], dtype=torch.float64)[:, :D]
    shapes = torch.tensor([[0.5, 0.2, 0.0], [0.0, 1.0, 0.3], [0.2, 0.0, 0.7]], dtype=torch.float64)[:D, :D]
    labels = torch.randint(3, (N,), generator=generator)
    noise = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return centers[labels] + (0.7 + 0.3 * labels.double())[:, None] * (noise @ shapes)


def masses(N=600, seed=1):
    """Weights of points, some of them zero."""
    return (3 * torch.rand(N, generator=seeded(seed), dtype=torch.float64) - 0.3).clamp(min=0)


def start(family="full", K=3, D=2):
    """A mixture that is not close to any optimum."""
    k = torch.arange(K, dtype=torch.float64)
    weights = (1 + 0.5 * k) / (1 + 0.5 * k).sum()
    means = 1 + 2 * torch.randn(K, D, generator=seeded(7), dtype=torch.float64)
    full = (1.5 + 0.2 * k)[:, None, None] * (torch.eye(D, dtype=torch.float64) + 0.2)
    kind, tied = {"tied": "full"}.get(family, family.removeprefix("tied_")), family.startswith("tied")
    covariances = {"full": full, "diag": full.diagonal(dim1=1, dim2=2), "spherical": full[:, 0, 0]}[kind]
    return gk.Mixture.from_parameters(weights, means, covariances[0] if tied else covariances, family)


def chain(family, N=6000, groups=12):
    """Distant groups of points, with two components each: most components can be neglected at most points."""
    places = 16 * torch.arange(groups, dtype=torch.float64)
    first = start(family, 2 * groups)
    means = torch.stack([places.repeat_interleave(2), first.means[:, 1]], 1)
    x = cloud(N)
    x[:, 0] += places.repeat_interleave(N // groups)
    return x, gk.Mixture(first.logits, means, first.factor)


def numbers(value):
    """A number, or a flat list of them."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    array = np.array(value.detach().numpy() if torch.is_tensor(value) else value, dtype=float)
    return array.item() if array.ndim == 0 else array.ravel().tolist()


def few(values, count=4):
    """Some entries of a long array, and the mean of all."""
    flat = np.atleast_1d(numbers(values))
    return [*flat[:: max(1, len(flat) // count)][:count].tolist(), float(flat.mean())]


def named(prefix, found):
    return {f"{prefix}_{name}": value for name, value in found.items()}


def of_mixture(mixture):
    covariances = mixture.factor.covariances().flatten(0, -3)
    if mixture.factor.family == "spherical":
        spread = covariances[:, 0, 0]
    elif mixture.factor.family == "diagonal":
        spread = covariances.diagonal(dim1=1, dim2=2)
    else:
        spread = covariances[:, *torch.tril_indices(*covariances.shape[1:])]
    found = {"weights": mixture.weights, "means": mixture.means, "covariances": spread}
    return {name: values if values.numel() <= 18 else few(values, 12) for name, values in found.items()}


def of_fit(result):
    found = of_mixture(result.mixture)
    found |= {name: getattr(result, name) for name in ("objective", "log_likelihood", "n_iter", "converged")}
    return found | {"history": few(result.history["objective"] or [0.0]), "live": result.report.n_active_components}


def fitted(method, first=None, x=None, *, max_iter=8, **options):
    """Return the results of a short fit, which need not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.ConvergenceWarning)
        first, x = start() if first is None else first, cloud() if x is None else x
        return gk.fit(first, x, method, max_iter=max_iter, backend="dense", verbose=False, **options)


def em(*arguments, max_iter=8, penalty=None, weights=None, generator=None, truncate=None, dtype=None, **options):
    settings = {
        "penalty": penalty,
        "sample_weight": weights,
        "generator": generator,
        "truncate": truncate,
        "dtype": dtype,
    }
    return of_fit(fitted(gk.EM(**{"tol": 0} | options), *arguments, max_iter=max_iter, **settings))


@each(FAMILIES)
def em_of(family):
    return em(start(family))


@each(["full", "tied_diag"])
def em_three_columns(family):
    return em(start(family, 4, 3), cloud(500, 3), max_iter=5)


@each(["full", "tied_spherical"])
def em_ridge(family):
    return em(start(family), reg_covar=0.05)


@each(["full", "tied"])
def em_weights(family):
    return em(start(family), weights=masses())


@each(["full", "tied_diag"])
def em_accelerated(family):
    return em(start(family), max_iter=4, accelerate=True)


@case
def em_accelerated_with_ridge_and_penalty():
    return em(max_iter=4, accelerate=True, reg_covar=0.01, penalty=gk.penalties.Dirichlet(2.0))


@case
def em_stepwise():
    return em(max_iter=3, batch_size=150, generator=seeded(2))


@case
def em_stepwise_average():
    options = {"batch_size": 200, "average": True, "step_exponent": 0.8, "step_offset": 5.0}
    return em(start("diag"), max_iter=3, weights=masses(), generator=seeded(3), **options)


@case
def em_annealed():
    return em(max_iter=7, temperature=(0.4, 4), generator=seeded(4))


@each(["full", "tied"])
def em_hard(family):
    return em(start(family), max_iter=5, assignment="hard")


@case
def em_kmeans():
    return em(start("tied_spherical"), max_iter=5, assignment="hard", frozen_covariances=True, frozen_weights=True)


@case
def em_stochastic():
    return em(max_iter=5, assignment="stochastic", generator=seeded(5))


@case
def em_frozen():
    options = {"frozen_means": [True, False, False], "frozen_covariances": [False, True, False]}
    return em(frozen_weights=[False, False, True], **options)


@case
def em_frozen_tied():
    return em(start("tied"), frozen_covariances=True)


PENALTIES = {
    "sqrt": lambda: gk.penalties.SqrtWeights(0.3),
    "entropy": lambda: gk.penalties.WeightEntropy(0.1),
    "dirichlet": lambda: gk.penalties.Dirichlet(3.0),
    "dirichlets": lambda: gk.penalties.Dirichlet([30.0, 1.0, 8.0]),
    "mean": lambda: gk.penalties.NormalMean([1.0, 2.0], 20.0),
    "wishart": lambda: gk.penalties.InverseWishart([[20.0, 5.0], [5.0, 30.0]], 12.0),
    "both": lambda: gk.penalties.NormalInverseWishart([0.5, 0.5], 10.0, 15.0, 9.0),
    "ridge": lambda: gk.penalties.PrecisionRidge(0.02),
    "floor": lambda: gk.penalties.EigenvalueFloor(0.4),
    "sum": lambda: (
        2 * gk.penalties.SqrtWeights(0.1) + gk.penalties.Dirichlet(2.0) + gk.penalties.InverseWishart(9.0, 6.0)
    ),
}


@each(PENALTIES)
def em_penalty(name):
    return em(penalty=PENALTIES[name](), max_iter=6)


@each(["wishart", "mean", "ridge"])
def em_penalty_tied_diag(name):
    return em(start("tied_diag"), penalty=PENALTIES[name](), max_iter=6, weights=masses())


@case
def em_pruned():
    """A component dies."""
    return em(start("full", 6), penalty=gk.penalties.SqrtWeights(4.0), max_iter=12)


@each(PENALTIES)
def penalty_value(name):
    """Return the results of a mixture and its slopes in the parameters."""
    penalty, mixture = PENALTIES[name](), start()
    logits, means = mixture.logits.clone().requires_grad_(), mixture.means.clone().requires_grad_()
    value = penalty(gk.Mixture(logits, means, mixture.factor), 600)
    found = {"value": value, "tied": penalty(start("tied"), 600), "spherical": penalty(start("spherical"), 600)}
    if value.requires_grad:
        slopes = torch.autograd.grad(value, [logits, means], allow_unused=True, materialize_grads=True)
        found |= {"logits": slopes[0], "means": slopes[1]}
    return found


@each(["full", "tied_spherical"])
def em_truncated(family):
    x, first = chain(family)
    result = fitted(gk.EM(tol=0), first, x, max_iter=4, truncate=1e-6)
    return of_fit(result) | {"pairs": result.report.evaluated_fraction}


@case
def em_map_coordinates():
    shift = torch.tensor([4e5, 5e6], dtype=torch.float64)
    first = start()
    return em(gk.Mixture(first.logits, first.means + shift, first.factor), cloud() + shift, max_iter=5)


@case
def em_until_tolerance():
    return em(max_iter=100, tol=0.05)


@case
def em_of_starts_only():
    return em(max_iter=0, penalty=gk.penalties.Dirichlet(3.0), weights=masses())


@case
def em_m_step():
    """The recipe for other engines: moments of parts, and an M-step."""
    mixture = start()
    for _ in range(3):
        parts = cloud().split(250)
        sums = sum(gk.reductions.moments(x, mixture.offsets, mixture.means, mixture.factor) for x in parts)
        mixture = gk.EM(reg_covar=0.01).maximize(mixture, sums)
    return of_mixture(mixture) | {"total": sums.total, "mass": sums.mass}


@each(["em", "stepwise", "adam"])
def streamed(method):
    methods = {"em": gk.EM(tol=0), "stepwise": gk.EM(batch_size=200, tol=0), "adam": gk.Adam(lr=0.1)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "points.npy"
        np.save(path, torch.cat([cloud(), masses()[:, None]], 1).numpy())
        source = gk.Source.of(path, columns=[0, 1], weights=2, chunk_rows=170)
        return of_fit(fitted(methods[method], x=source, max_iter=4, generator=seeded(6)))


@case
def resumed():
    """A fit in two parts, by a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.ckpt"
        for max_iter in (3, 7):
            result = fitted(gk.EM(tol=0), max_iter=max_iter, checkpoint=path)
    return of_fit(result)


@each(FAMILIES)
def adam(family):
    return of_fit(fitted(gk.Adam(lr=0.1), start(family)))


@each(["sum", "mean", "floor"])
def adam_penalty(name):
    return of_fit(fitted(gk.Adam(lr=0.1), penalty=PENALTIES[name](), sample_weight=masses()))


@case
def adam_own_penalty():
    penalty = gk.penalties.SqrtWeights(0.3) + (lambda m: 1e-2 * m.means.square().sum())
    return of_fit(fitted(gk.Adam(lr=0.1, betas=(0.8, 0.99)), penalty=penalty))


@each(["full", "diag"])
def adam_minibatches(family):
    return of_fit(fitted(gk.Adam(lr=0.05, batch_size=200), start(family), max_iter=3, generator=seeded(8)))


@case
def descent():
    method = gk.Gradient(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)
    )
    return of_fit(fitted(method))


def network(D, C, family, x, c):
    """A conditional mixture whose parameters are drawn by a generator of its own."""
    model = gk.GMM(D, context=C, n_components=3, covariance_type=family, hidden_features=(8,), activation=torch.nn.Tanh)
    model, generator = model.double(), seeded(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.initialize(x, context=c, generator=generator)


@each(["full", "diag", "tied", "spherical"])
def conditional(family):
    x, c = cloud(400), cloud(400, 1, seed=5)
    model = network(2, 1, family, x, c)
    result = fitted(gk.Adam(lr=0.02), model, x, context=c, max_iter=5, sample_weight=masses(400))
    batch = model(c[:3])
    found = {"mean": batch.mean, "covariance": batch.covariance_matrix, "density": batch.log_prob(x[:3])}
    return found | {"history": result.history["objective"], "objective": result.objective}


@case
def conditional_minibatches():
    x, c = cloud(400, 1), cloud(400, 2, seed=5)
    model = network(1, 2, "full", x, c)
    options = {"penalty": gk.penalties.Dirichlet(5.0), "generator": seeded(1)}
    result = fitted(gk.Adam(lr=0.02, batch_size=100), model, torch.cat([x, c], 1), max_iter=2, **options)
    quantiles = model(c[:3]).quantile([0.1, 0.5, 0.9])
    return {"history": result.history["objective"], "quantiles": quantiles, "objective": result.objective}


@each(["full", "tied_diag", "spherical"])
def module(family):
    """Density and gradients of a module without a context."""
    model = gk.GMM(2, n_components=3, covariance_type=family, epsilon=1e-3).double()
    model.initialize(cloud(), "kmeans++", generator=seeded(3))
    loss = -model().log_prob(cloud()).mean()
    loss.backward()
    return of_mixture(model()) | {"loss": loss} | {name: p.grad for name, p in model.named_parameters()}


def estimator(kind=None, K=3, **options):
    kind = gk.GaussianMixture if kind is None else kind
    return kind(n_components=K, **{"random_state": 0, "tol": 0, "max_iter": 6, "backend": "dense"} | options)


def of_estimator(model, x):
    found = {name: getattr(model, f"{name}_") for name in ("weights", "means", "covariances")}
    found |= {"score": model.score(x), "n_iter": model.n_iter_, "samples": few(model.score_samples(x))}
    found |= {
        "shares": few(model.predict_proba(x), 2),
        "precisions": few(model.precisions_cholesky_, 3),
        "labels": few(model.predict(x)),
    }
    for name in ("bic", "aic", "icl"):
        if hasattr(model, name):
            found[name] = getattr(model, name)(x)
    for name in ("lower_bound", "lower_bounds", "evidence_bound", "degrees_of_freedom", "mean_precision"):
        if hasattr(model, f"{name}_"):
            found[name] = few(getattr(model, f"{name}_"))
    if hasattr(model, "weight_concentration_"):
        found["concentration"] = np.stack(model.weight_concentration_)
    return found


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.ConvergenceWarning)
        return function(*arguments, **options)


@each(FAMILIES)
def estimator_of(family):
    first, x = start(family), cloud().numpy()
    P = first.factor.precisions()
    P = P if family in ("full", "tied") else P.diagonal(dim1=1, dim2=2)
    P = P[..., 0] if "spherical" in family else P
    given = {
        "weights_init": first.weights,
        "means_init": first.means,
        "precisions_init": P[0] if "tied" in family else P,
    }
    model = estimator(covariance_type=family, **given)
    return of_estimator(quietly(model.fit, x), x)


@each(["kmeans", "k-means++", "random"])
def estimator_start(strategy):
    x = cloud().numpy()
    return of_estimator(quietly(estimator(init_params=strategy, n_init=2, max_iter=4).fit, x), x)


@case
def estimator_weights_and_penalty():
    model = estimator(penalty=gk.penalties.InverseWishart(9.0, 6.0), reg_covar=0.01)
    return of_estimator(quietly(model.fit, cloud().numpy(), sample_weight=masses().numpy()), cloud().numpy())


@case
def estimator_adam():
    return of_estimator(
        quietly(estimator(solver="adam", init_params="random_from_data").fit, cloud().numpy()), cloud().numpy()
    )


@case
def estimator_partial_fit():
    model, found = estimator(), {}
    for part in cloud().numpy().reshape(3, 200, 2):
        model.partial_fit(part)
    return found | of_estimator(model, cloud().numpy())


@case
def estimator_warm_start():
    model = estimator(warm_start=True, max_iter=2)
    bounds = [quietly(model.fit, cloud().numpy()).lower_bound_ for _ in range(3)]
    return of_estimator(model, cloud().numpy()) | {"bounds": bounds}


@case
def estimator_samples():
    model = gk.GaussianMixture.from_mixture(start("diag"), random_state=3)
    x, labels = model.sample(6)
    far, _ = model.sample(6, std_range=(3.0, 4.0), component=1)
    return {"points": x, "labels": labels, "far": far}


@case
def estimator_of_a_file():
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "points.npy")
        np.save(path, cloud().numpy())
        model = quietly(estimator(max_iter=4).fit, path)
        return {"score": model.score(path), "bic": model.bic(path)} | of_mixture(model.mixture_)


@each(FAMILIES)
def bayesian(family):
    model = estimator(gk.BayesianGaussianMixture, 4, covariance_type=family, init_params="random_from_data")
    return of_estimator(quietly(model.fit, cloud().numpy()), cloud().numpy())


@case
def bayesian_priors():
    model = estimator(
        gk.BayesianGaussianMixture,
        init_params="kmeans",
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=2.0,
        mean_precision_prior=0.5,
        mean_prior=[1.0, 1.0],
        degrees_of_freedom_prior=5.0,
        covariance_prior=[[2.0, 0.3], [0.3, 3.0]],
    )
    quietly(model.fit, cloud().numpy(), sample_weight=masses().numpy())
    return of_estimator(model, cloud().numpy())


@case
def bayesian_minibatches():
    model = estimator(gk.BayesianGaussianMixture, init_params="kmeans", batch_size=200, max_iter=2)
    return of_estimator(quietly(model.fit, cloud().numpy()), cloud().numpy())


@case
def bayesian_warm_start():
    model = estimator(gk.BayesianGaussianMixture, init_params="kmeans", warm_start=True, max_iter=2)
    for _ in range(2):
        quietly(model.fit, cloud().numpy())
    return of_estimator(model, cloud().numpy())


@each(["random", "kmeans", "kmeans++", "responsibilities"])
def initialized(strategy):
    found, x = {}, cloud()
    for family in ("full", "tied_diag"):
        found |= named(family, of_mixture(gk.initialize(x, 3, strategy, covariance_type=family, generator=seeded(2))))
    refined = gk.initialize(
        x, 3, strategy, sample_weight=masses(), refine=2, generator=seeded(3), n_init=2, backend="dense"
    )
    return found | named("refined", of_mixture(refined))


@case
def initialized_by_chunks():
    parts = cloud(1500, 3).numpy().reshape(5, 300, 3)
    return of_mixture(gk.initialize(lambda: iter(parts), 5, generator=seeded(4)))


@each(["full", "tied", "diag", "tied_spherical"])
def variational(family):
    result = fitted(gk.bayes.VariationalBayes(concentration=0.5, tol=0), start(family, 4), max_iter=6)
    q, x = result.posterior, cloud()
    student, (judge, lack) = q.predictive(), q.expectation()
    found = of_fit(result) | {"concentration": q.concentration, "degrees": q.degrees, "precision": q.mean_precision}
    found |= {"predictive": few(student.log_prob(x)), "joint": few(student.log_joint(x), 2), "mean": student.mean}
    found |= {"variance": student.variance, "expected": few(judge.log_prob(x) + lack)}
    draws = q.sample(2, generator=seeded(1))
    return found | named("drawn", of_mixture(draws)) | {"points": student.sample(4, generator=seeded(2))}


@case
def variational_of_batches():
    method = gk.bayes.VariationalBayes("dirichlet_distribution", batch_size=200, mean_precision=2.0, tol=0)
    return of_fit(fitted(method, max_iter=2, generator=seeded(3)))


def of_draws(draws, x):
    found = {f"{name}_{what}": getattr(draws, what)(name) for name in draws.values for what in ("mean", "sd")}
    found |= {
        "interval": draws.interval("means", 0.7),
        "density": few(draws.log_prob(x)),
        "weights": few(draws.weights),
    }
    found |= {"shares": few(draws.responsibilities(x)), "points": draws.sample(3, generator=seeded(4))}
    found |= {name: value for name, value in draws.diagnostics.items() if math.isfinite(value)}
    return found | {"mean": draws.expectation(lambda m: m.mean)}


def prior_of(family, K=3, **options):
    spreads = {
        "full": {"precisions": Wishart(torch.tensor(4.0), torch.eye(2) / 4)},
        "diag": {"precisions": Gamma(2.0, 1.0)},
        "spherical": {"covariances": InverseGamma(torch.tensor(2.0), torch.tensor(1.0))},
        "scales": {"scales": torch.full((K, 2), 0.7), "covariance_type": "diag"},
    }
    settings = {
        "weights": Dirichlet(torch.ones(K)),
        "means": Normal(1.0, 3.0),
        "covariance_type": family,
        "features": 2,
    }
    return gk.bayes.Prior(K, **settings | spreads[family] | options)


def kept(function, prior, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.bayes.SamplingWarning)
        return of_draws(function(prior, x, generator=seeded(5), backend="dense", **options), x)


@each(["full", "diag", "spherical", "scales"])
def gibbs(family):
    return kept(gk.bayes.gibbs, prior_of(family), cloud(300), draws=4, warmup=2, chains=2, progress=False)


@case
def gibbs_of_sticks():
    prior = prior_of("diag", weights=gk.bayes.StickBreaking(2.5, 3))
    # Engines draw different labels from a seed.
    options = {"draws": 4, "warmup": 2, "chains": 1, "thin": 2, "progress": False, "backend": "dense"}
    draws = gk.bayes.gibbs(prior, cloud(300), generator=seeded(6), **options)
    return of_draws(draws, cloud(300)) | {"components": draws.components()}


@case
def nuts():
    return kept(gk.bayes.nuts, prior_of("diag", 2), cloud(100), draws=4, warmup=2, chains=1, progress=False)


@case
def langevin():
    options = {"draws": 3, "warmup": 2, "thin": 2, "step": 0.1, "progress": False}
    return kept(gk.bayes.langevin, prior_of("diag", 2), cloud(200), batch_size=50, **options)


@each(["prior", "laplace", "variational"])
def importance(proposal):
    # A prior that tells components apart, since equal modes are chosen from by rounding.
    prior = prior_of("scales", 2, weights=Dirichlet(torch.tensor([2.0, 6.0])))
    found = kept(gk.bayes.importance, prior, cloud(60), draws=200, proposal=proposal)
    if proposal == "laplace":
        del found["pareto_k"]  # its fit amplifies the rounding of the mode
    return found


@each(["full", "diag", "spherical"])
def prior(family):
    """Draws and densities of a prior."""
    p = prior_of(family)
    found = p.sample(2, generator=seeded(2))
    z = torch.linspace(-1, 1, p.size, dtype=torch.float64)[None]
    values, logs = p.values(z)
    return named("drawn", found) | named("given", values) | {"density": p.log_prob(found), "unbounded": logs}


@case
def selected():
    table = gk.analysis.select(
        cloud(),
        [1, 2, 3],
        ["full", "tied_diag"],
        method=gk.EM(tol=0),
        strategy="kmeans",
        runs=3,
        generator=seeded(1),
        max_iter=4,
        backend="dense",
    )
    names = ("log_likelihood", "n_parameters", "bic", "aic", "icl", "n_iter")
    former = {"n_parameters": "parameters", "n_iter": "iterations"}
    return {former.get(name, name): [row[name] for row in table.rows] for name in names} | named(
        "best", of_mixture(table.best)
    )


@each(FAMILIES)
def criteria(family):
    mixture, x, found = start(family), cloud(), {}
    for name in ("score", "bic", "aic", "icl"):
        function = getattr(gk.analysis, name)
        found |= {name: function(mixture, x), f"{name}_weighted": function(mixture, x, sample_weight=masses())}
    return found | {"threshold": gk.analysis.anomaly_threshold(mixture, x, 7.5), "count": mixture.parameter_count}


@rough
def silhouettes():
    labels = start().predict(cloud())
    some = gk.analysis.silhouette(cloud(), labels, samples=100, generator=seeded(2))
    return {"all": gk.analysis.silhouette(cloud(), labels, samples=None), "some": some}


@case
def compared():
    p, q, found = start(), start("diag", 4), {}
    for name in ("kl_divergence", "jensen_shannon", "total_variation"):
        estimate = getattr(gk.analysis, name)(p, q, samples=2000, generator=seeded(3))
        found |= {name: estimate.value, f"{name}_error": estimate.error}
    ones = [m.select(torch.tensor([1])) for m in (p, q)]
    return found | {"closed": torch.distributions.kl_divergence(*ones)}


@each(["full", "tied_diag", "spherical"])
def merged(family):
    return of_mixture(gk.analysis.merge(start(family, 5), [[0, 3], [1, 4]]))


@each(FAMILIES)
def errors(family):
    """Standard errors, of a fit and of its parameters one component at a time."""
    first = gk.initialize(cloud(), 3, covariance_type=family, generator=seeded(1))
    mixture, found = fitted(gk.EM(tol=0), first, max_iter=12).mixture, {}
    ways = {
        "joint": {},
        "alone": {"joint": False},
        "simple": {"robust": False},
        "weighted": {"sample_weight": masses()},
    }
    for way, options in ways.items():
        result = gk.standard_errors(mixture, cloud(), **options)
        found |= {f"{way}_{name}": few(getattr(result, name)) for name in ("weights", "means", "covariances")}
    return found


@each(FAMILIES)
def densities(family):
    mixture, x = start(family), cloud()
    shares, best = mixture.responsibilities(x, 2, backend="dense")
    found = {"log_prob": few(mixture.log_prob(x, backend="dense")), "joint": few(mixture.log_joint(x))}
    found |= {"shares": few(mixture.responsibilities(x), 5), "largest": few(shares), "best": few(best)}
    found |= {"labels": few(mixture.predict(x)), "covariance": mixture.covariance_matrix}
    found |= {
        "offsets": mixture.offsets,
        "precisions": mixture.factor.precisions(),
        "far": mixture.log_prob(1e3 * x[:3]),
    }
    one = mixture.select(torch.tensor([1]))
    return found | {"entropy": one.entropy(), "far_shares": mixture.responsibilities(-1e3 * x[:3])}


@each(["full", "tied", "diag", "spherical"])
def slices(family):
    """Marginal and conditional distributions, and distribution functions."""
    mixture = start(family, 4, 3)
    given = mixture.condition([0, 2], [[0.5, -1.0], [2.0, 1.0]])
    found = named("given", of_mixture(given)) | named("marginal", of_mixture(mixture.marginal([2, 0])))
    line = mixture.marginal(1)
    found |= {"cdf": line.cdf(torch.linspace(-4, 4, 5, dtype=torch.float64)[:, None]), "quantile": line.quantile([0.3])}
    q = torch.tensor([1e-6, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    found |= {"icdf": line.icdf(q), "slope": torch.autograd.grad(line.icdf(q).sum(), q)[0], "batch": given.mean}
    return found | {"density": given.log_prob(torch.tensor([[0.4], [0.6]], dtype=torch.float64))}


@each(["full", "tied_diag", "spherical"])
def samples(family):
    mixture = start(family)
    x, labels = mixture.sample((3, 2), return_labels=True, generator=seeded(1))
    inside = mixture.sample(4, confidence=0.5, generator=seeded(2))
    shell = mixture.sample(4, std_range=(5.0, math.inf), component=2, generator=seeded(3))
    batch = start(family, 4, 3).condition(0, [[0.0], [1.0]]).sample(2, generator=seeded(4))
    return {"points": x, "labels": labels, "inside": inside, "shell": shell, "batch": batch}


@each(FAMILIES)
def derivatives(family):
    """First and second derivatives of the log-density in points and parameters."""
    mixture, x = start(family), cloud(40).requires_grad_()
    leaves = {"x": x, "logits": mixture.logits, "means": mixture.means, **mixture.factor.tensors}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    factor = mixture.factor.replace(**{name: leaves[name] for name in mixture.factor.tensors})
    values = gk.Mixture(leaves["logits"], leaves["means"], factor).log_prob(leaves["x"], backend="dense")
    first = torch.autograd.grad((0.2 * values).exp().sum(), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(slope.square().sum() for slope in first), list(leaves.values()))
    found = {f"first_{name}": few(slope) for name, slope in zip(leaves, first, strict=True)}
    return found | {f"second_{name}": few(slope) for name, slope in zip(leaves, second, strict=True)}


@each(FAMILIES)
def reduced(family):
    """All reductions, and the gradient in the points."""
    R, mixture, x = gk.reductions, start(family, 5, 3), cloud(500, 3)
    arguments, dense = (mixture.offsets, mixture.means, mixture.factor), {"backend": "dense"}
    leaf, g = x.clone().requires_grad_(), masses(500)
    total = R.total(leaf, *arguments, weights=g, **dense)
    slopes = torch.autograd.grad(total, leaf)[0]
    found = {"logsumexp": few(R.logsumexp(x, *arguments, **dense)), "total": total, "slopes": few(slopes, 5)}
    exponents, best = R.topk(x, *arguments, 3, **dense)
    found |= {"topk": few(exponents), "best": few(best), "argmax": few(R.argmax(x, *arguments, **dense))}
    for way in ("soft", "hard", "stochastic"):
        sums = R.moments(x, *arguments, weights=g, assignment=way, seed=11, **dense)
        found |= {f"{way}_{name}": getattr(sums, name) for name in ("S0", "total")}
        found |= {f"{way}_S1": few(sums.S1), f"{way}_S2": few(sums.S2)}
    return found


@each(["full", "diag"])
def reduced_by_truncation(family):
    x, mixture = chain(family)
    points = gk.reductions.arrange(x, mixture.n_components, 1e-4)
    arguments = (points, mixture.offsets, mixture.means, mixture.factor)
    sums = gk.reductions.moments(*arguments, weights=masses(len(x)), backend="dense")
    found = {"S0": few(sums.S0), "S1": few(sums.S1), "S2": few(sums.S2), "total": sums.total, "share": points.share}
    values, labels = gk.reductions.logsumexp(*arguments, backend="dense"), gk.reductions.argmax(*arguments)
    return found | {"values": few(values), "labels": few(labels), "total_of_all": mixture.log_prob(x, truncate=0).sum()}


@case
def attached():
    """Gradients from moments that were added."""
    mixture = start()
    leaves = [mixture.offsets.clone().requires_grad_(), mixture.means.clone().requires_grad_()]
    given = (mixture.offsets, mixture.means, mixture.factor)
    sums = sum(gk.reductions.moments(part, *given, backend="dense") for part in cloud().split(200))
    total = gk.reductions.attached(sums, *leaves, mixture.factor)
    slopes = torch.autograd.grad(total, leaves)
    return {"total": total, "offsets": slopes[0], "means": slopes[1], "recentred": sums.recenter(given[1] + 1).S2}


@single
def single_em():
    return em(start(), cloud().float(), max_iter=4)


@single
def single_em_of_doubles():
    return em(start("diag"), cloud() + 1e5, max_iter=4, dtype="float32")


@single
def single_adam():
    return of_fit(fitted(gk.Adam(lr=0.1), start("tied"), cloud().float(), max_iter=4))


@single
def single_densities():
    mixture, x = start().to(torch.float32), cloud(300).float()
    found = {"log_prob": few(mixture.log_prob(x)), "shares": few(mixture.responsibilities(x))}
    return found | {"score": gk.analysis.score(mixture, x), "sample": mixture.sample(3, generator=seeded(1))}


@single
def single_estimator():
    x = cloud().float().numpy()
    model = quietly(estimator(covariance_type="diag", init_params="random_from_data", max_iter=4).fit, x)
    return {"score": model.score(x), "means": model.means_, "samples": few(model.score_samples(x))}


@each(FAMILIES)
def saved(family):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixture.safetensors"
        gk.save(start(family), path)
        mixture = gk.load(path)
        estimator(covariance_type=family, max_iter=2, solver=gk.Adam(lr=0.1)).fit(cloud().numpy()).save(path)
        model = gk.GaussianMixture.load(path)
    found = of_mixture(mixture) | {"log_prob": few(mixture.log_prob(cloud()))}
    return found | {"fitted": model.means_, "bound": model.lower_bound_}


@each(FAMILIES)
def exported(family):
    with tempfile.TemporaryDirectory() as folder:
        gk.export.npz(start(family), Path(folder) / "mixture.npz")
        with np.load(Path(folder) / "mixture.npz") as arrays:
            found = {name: arrays[name] for name in ("weights_", "means_", "covariances_", "precisions_cholesky_")}
    model = gk.to_sklearn(start("tied" if family.startswith("tied") else family))
    return found | {"sklearn": few(model.score_samples(cloud().numpy()))}


@single
def exported_shapes():
    from plyfile import PlyData

    mixture = start("full", 3, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shapes.ply"
        offset = gk.export.splats(mixture, path)
        vertex = PlyData.read(path)["vertex"]
        found = {name: vertex[name] for name in ("x", "z", "opacity", "f_dc_0", "scale_0", "scale_2")} | {
            "offset": offset
        }
        gk.export.ellipsoids(mixture, path, radius=1.5)
        vertex = PlyData.read(path)["vertex"]
        return found | {f"ellipsoids_{name}": few(vertex[name]) for name in "xyz"}


def result(name):
    return {key: numbers(value) for key, value in CASES[name]().items()}


def differences(found, stored):
    """The entries that differ, by how much, as fractions of max(1, |value|)."""
    away = {}
    for name, value in stored.items():
        a, b = (np.atleast_1d(np.asarray(values, dtype=float)) for values in (found[name], value))
        away[name] = (
            float((np.abs(a - b) / np.maximum(1, np.abs(b))).max(initial=0)) if a.shape == b.shape else math.inf
        )
    return away


def test_the_file_holds_every_case():
    assert set(json.loads(STORED.read_text())) == set(CASES)
    assert len(CASES) >= 50


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    stored, found = json.loads(STORED.read_text())[name], result(name)
    assert set(found) == set(stored)
    # Written so that NaN fails.
    wrong = {key: away for key, away in differences(found, stored).items() if not away <= TOLERANCES[name]}
    assert not wrong


if __name__ == "__main__":
    lines = [
        f"{json.dumps(name)}: {json.dumps(result(name), separators=(',', ':'), allow_nan=False)}" for name in CASES
    ]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
