"""Reference results of fixed fits and evaluations of every kind, which no restructuring may change.

The numbers were stored before the restructuring of version 0.2; ``python tests/test_reference.py`` stores them anew.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Gamma, MultivariateNormal, Normal

import gmmkeops as gk

STORED = Path(__file__).parent / "reference.json"
TYPES = ("full", "diag", "spherical", "tied", "tied_diag", "tied_spherical")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(N=900, D=2, K=3, seed=0):
    """Clusters with spreads of their own, float64."""
    random = {"generator": generator(seed), "dtype": torch.float64}
    centers, spread = 3 * torch.randn(K, D, **random), 0.5 + torch.rand(K, D, **random)
    labels = torch.arange(N) % K
    return centers[labels] + spread[labels] * torch.randn(N, D, **random)


def begin(kind="full", K=3, D=2, seed=1):
    """A generic mixture of this type that no fit has made."""
    random = {"generator": generator(seed), "dtype": torch.float64}
    tied, family = kind.startswith("tied"), kind.removeprefix("tied_").replace("tied", "full")
    lead = 1 if tied else K
    root = torch.eye(D).double() + 0.3 * torch.randn(lead, D, D, **random)
    spread = {"full": root @ root.mT + torch.eye(D).double(), "diag": 1 + torch.rand(lead, D, **random)}
    spread["spherical"] = 1 + torch.rand(lead, **random)
    weights = torch.rand(K, **random) + 0.5
    means, chosen = 3 * torch.randn(K, D, **random), spread[family]
    return gk.Mixture.from_parameters(weights / weights.sum(), means, chosen[0] if tied else chosen, kind)


def numbers(value):
    """Floats in nested lists."""
    if isinstance(value, gk.Mixture):
        return [numbers(value.log_weights), numbers(value.means), numbers(value.factor.covariances())]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return torch.as_tensor(value).detach().double().reshape(-1).tolist()
    if isinstance(value, (list, tuple)):
        return [numbers(part) for part in value]
    return float(value)


def fitted(method, start=None, x=None, **settings):
    settings = {"max_iter": 8, "tol": 0, "generator": generator(), **settings}
    result = gk.fit(begin() if start is None else start, points() if x is None else x, method, **settings)
    return result.mixture, result.objective, result.log_likelihood, result.history["objective"]


def weights(N=900):
    return torch.rand(N, generator=generator(5), dtype=torch.float64)


def streamed():
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "x.npy", points().numpy())
        source = gk.Source.of(Path(folder) / "x.npy", chunk_rows=250)
        return fitted(gk.EM(), x=source), fitted(gk.EM(batch_size=200), x=source, max_iter=2)


def conditional():
    torch.manual_seed(0)
    model = gk.GMM(2, context=1, components=2, hidden_features=(8,)).double()
    x = points(300)
    c = x[:, :1] * 0.5 + 0.1 * torch.randn(300, 1, generator=generator(3), dtype=torch.float64)
    model.initialize(x, context=c, generator=generator())
    result = gk.fit(model, x, gk.Adam(lr=1e-3), context=c, max_iter=4)
    return result.history["objective"], model(c[:3]).means


def estimator(kind=gk.GaussianMixture, **settings):
    x = points().numpy()
    model = kind(3, tol=0, max_iter=6, random_state=0, **settings).fit(x)
    scores = [model.score(x), model.score_samples(x[:5]), model.predict_proba(x[:3]), model.lower_bound_]
    return [model.weights_, model.means_, model.covariances_, model.precisions_cholesky_, *scores]


def bayesian(**settings):
    model = gk.BayesianGaussianMixture(n_components=3, tol=0, max_iter=6, random_state=0, **settings).fit(
        points().numpy()
    )
    q = model.posterior_
    draws = q.sample(2, generator())
    return [model.lower_bounds_, model.means_, q.concentration, q.predictive().log_prob(points()[:4]), draws.means]


def derivatives():
    m, x = begin(), points(20).requires_grad_()
    means = m.means.clone().requires_grad_()
    total = gk.Mixture(m.logits, means, m.factor).log_prob(x).sum()
    first = torch.autograd.grad(total, (x, means), create_graph=True)
    return total, *first, *torch.autograd.grad(first[0].square().sum(), (x, means))


def reduced(kind):
    m, x, g = begin(kind), points(), weights() - 0.3
    arguments = x, m.offsets, m.means, m.factor
    sums = [gk.reductions.moments(*arguments, weights=g, assignment=a, seed=3) for a in ("soft", "hard", "stochastic")]
    leaf = x.clone().requires_grad_()
    gk.reductions.total(leaf, *arguments[1:], weights=g).backward()
    values = gk.reductions.logsumexp(*arguments), *gk.reductions.topk(*arguments, 2), gk.reductions.argmax(*arguments)
    return [part[:50] for part in values], [[s.S0, s.S1, s.S2, s.total] for s in sums], leaf.grad[:50]


def prior():
    return gk.bayes.Prior(
        2,
        weights=torch.distributions.Dirichlet(torch.full((2,), 3.0)),
        means=Normal(torch.zeros(2, 1).double(), 5.0),
        precisions=Gamma(torch.tensor(3.0).double(), 2.0),
        covariance_type="spherical",
    )


def sampled(name):
    x = torch.cat([torch.randn(40, 1, generator=generator(), dtype=torch.float64) + s for s in (-4, 4)])
    settings = {"gibbs": {"draws": 5, "warmup": 2, "chains": 1}, "importance": {"draws": 50}}[name]
    draws = getattr(gk.bayes, name)(prior(), x, generator=generator(), **settings)
    return draws.values["means"], draws.values["weights"]


def selected():
    x = points()
    table = gk.analysis.select(x, [1, 2, 3], generator=generator(), max_iter=8)
    m = begin()
    return [
        [float(row["bic"]) for row in table.rows],
        gk.analysis.score(m, x),
        gk.analysis.bic(m, x),
        gk.analysis.aic(m, x),
        gk.analysis.icl(m, x),
        gk.analysis.silhouette(x[:200], m.predict(x[:200])),
        gk.analysis.anomaly_threshold(m, x, 5.0),
    ]


def compared():
    p, q = begin(), begin("diag", seed=4)
    estimates = [
        f(p, q, samples=500, generator=generator()) for f in (gk.analysis.kl_divergence, gk.analysis.jensen_shannon)
    ]
    one = p.select(torch.tensor([0])), q.select(torch.tensor([1]))
    closed = torch.distributions.kl_divergence(*one)
    return [[e.value, e.error] for e in estimates], closed, gk.analysis.merge(p, [[0, 2]])


def errors(kind):
    x, K = points(K=2), 2
    m = gk.fit(begin(kind, K=K), x, gk.EM(), max_iter=60, tol=0).mixture
    found = [gk.standard_errors(m, x, robust=robust) for robust in (False, True)]
    return [[e.weights, e.means, e.covariances] for e in found]


def described(kind):
    m, x = begin(kind), points(30)
    line = m.marginal(0)
    value = [m.log_prob(x), m.responsibilities(x), *m.responsibilities(x, 2), m.predict(x), m.mean, m.covariance_matrix]
    value += [m.marginal([1]), m.condition(0, [0.5]), line.cdf(x[:5, :1]), line.icdf([0.1, 0.9]), line.quantile([0.3])]
    value += [m.sample(4, generator=generator()), m.sample(4, generator=generator(), confidence=0.5), m.parameter_count]
    return [*value, m.component_distribution.log_prob(x[:, None])]


def single():
    x = points().float()
    return fitted(gk.EM(), x=x, start=begin().to(torch.float32)), fitted(gk.Adam(lr=0.02), x=x)


def maximized():
    m = begin()
    return gk.EM().maximize(m, gk.reductions.moments(points(), m.offsets, m.means, m.factor))


def clusters(kind):
    return gk.initialize(points(), 3, covariance_type=kind, sample_weight=weights(), generator=generator())


P = gk.penalties
PENALTIES = {
    "sqrt": lambda: P.SqrtWeights(0.5),
    "entropy": lambda: P.WeightEntropy(0.1),
    "dirichlet": lambda: P.Dirichlet(3.0),
    "normal mean": lambda: P.NormalMean(torch.zeros(2).double(), 2.0),
    "wishart": lambda: P.InverseWishart(2.0, 6.0),
    "normal wishart": lambda: P.NormalInverseWishart(torch.zeros(2).double(), 2.0, 2.0, 6.0),
    "ridge": lambda: P.PrecisionRidge(0.01),
    "floor": lambda: P.EigenvalueFloor(1.1),
    "sum": lambda: 2 * P.SqrtWeights(0.1) + P.Dirichlet(2.0),
}

CASES = {
    **{f"EM {kind}": lambda kind=kind: fitted(gk.EM(reg_covar=1e-3), begin(kind)) for kind in TYPES},
    **{f"Adam {kind}": lambda kind=kind: fitted(gk.Adam(lr=0.02), begin(kind)) for kind in TYPES},
    **{f"EM with {name}": lambda make=make: fitted(gk.EM(), penalty=make()) for name, make in PENALTIES.items()},
    **{
        f"Adam with {name}": lambda name=name: fitted(gk.Adam(lr=0.02), penalty=PENALTIES[name]())
        for name in ("sum", "floor")
    },
    **{
        f"tied EM with {n}": lambda n=n: fitted(gk.EM(), begin("tied"), penalty=PENALTIES[n]())
        for n in ("wishart", "normal wishart")
    },
    **{f"reductions {kind}": lambda kind=kind: reduced(kind) for kind in TYPES},
    **{f"mixture {kind}": lambda kind=kind: described(kind) for kind in TYPES},
    **{f"standard errors {kind}": lambda kind=kind: errors(kind) for kind in TYPES},
    **{f"estimator {kind}": lambda kind=kind: estimator(covariance_type=kind) for kind in TYPES},
    **{
        f"bayesian {kind}": lambda kind=kind: bayesian(covariance_type=kind)
        for kind in ("full", "diag", "spherical", "tied")
    },
    "bayesian dirichlet": lambda: bayesian(weight_concentration_prior_type="dirichlet_distribution"),
    "EM weighted": lambda: fitted(gk.EM(), weights=weights()),
    "EM accelerated": lambda: fitted(gk.EM(accelerate=True)),
    "EM stepwise": lambda: fitted(gk.EM(batch_size=200), max_iter=2),
    "EM averaged": lambda: fitted(gk.EM(batch_size=200, average=True), max_iter=2),
    "EM annealed": lambda: fitted(gk.EM(temperature=(0.5, 4))),
    "EM hard": lambda: fitted(gk.EM(assignment="hard")),
    "EM stochastic": lambda: fitted(gk.EM(assignment="stochastic")),
    "EM frozen": lambda: fitted(gk.EM(frozen_means=[True, False, False], frozen_weights=True)),
    "EM truncated": lambda: fitted(gk.EM(), truncate=1e-6),
    "EM pruning": lambda: fitted(gk.EM(), penalty=P.SqrtWeights(40.0), max_iter=30),
    "EM streamed": streamed,
    "EM far away": lambda: fitted(
        gk.EM(), gk.Mixture(begin().logits, begin().means + 5e6, begin().factor), points() + 5e6
    ),
    "Adam on batches": lambda: fitted(gk.Adam(lr=0.02, batch_size=300), max_iter=2),
    "SGD": lambda: fitted(gk.Gradient(lambda p: torch.optim.SGD(p, lr=0.05))),
    "variational Bayes": lambda: fitted(gk.bayes.VariationalBayes()),
    "stochastic variational Bayes": lambda: fitted(gk.bayes.VariationalBayes(batch_size=300), max_iter=2),
    "conditional": conditional,
    "estimator partial_fit": lambda: [gk.GaussianMixture(3, random_state=0).partial_fit(points().numpy()).means_],
    "update": lambda: gk.EM().update(begin(), points())[0],
    "maximize": lambda: gk.EM().maximize(
        begin(), gk.reductions.moments(points(), begin().offsets, begin().means, begin().factor)
    ),
    **{
        f"start {s}": lambda s=s: gk.initialize(points(), 3, s, generator=generator())
        for s in ("random", "kmeans", "kmeans++", "responsibilities")
    },
    **{
        f"kmeans {k}": lambda k=k: gk.initialize(
            points(), 3, covariance_type=k, sample_weight=weights(), generator=generator()
        )
        for k in TYPES
    },
    "derivatives": derivatives,
    "gibbs": lambda: sampled("gibbs"),
    "importance": lambda: sampled("importance"),
    "selection": selected,
    "comparison": compared,
    "float32": single,
    "torch": lambda: [MultivariateNormal(begin().mean, begin().covariance_matrix).log_prob(points(5))],
}
# Results of float32 points, and of a network, whose gradient amplifies rounding errors.
LOOSE = {"float32": 1e-4, "conditional": 1e-7}


def flat(value):
    return [part for item in value for part in flat(item)] if isinstance(value, list) else [value]


def computed(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return numbers(CASES[name]())


@pytest.mark.parametrize("name", CASES)
def test_reference_result(name):
    expected, found = flat(json.loads(STORED.read_text())[name]), flat(computed(name))
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, rel=LOOSE.get(name, 1e-10), abs=LOOSE.get(name, 1e-10))


if __name__ == "__main__":
    STORED.write_text(json.dumps({name: computed(name) for name in CASES}))
