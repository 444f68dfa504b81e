"""The same call gives the same bits in every process, and global random states are left alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import gmmkeops as gk

# Every public function that draws random numbers, called without a generator; one digest of its results by name.
SCRIPT = r"""
import hashlib, importlib.util, json, random, warnings
import numpy as np, torch, gmmkeops as gk
from torch.distributions import Dirichlet, Normal, Wishart

warnings.simplefilter("ignore")
rng = np.random.default_rng(3)
X = np.concatenate([rng.normal(size=(150, 2)) @ [[1, 0.4], [0, 0.6]], 5 + 0.5 * rng.normal(size=(90, 2))]).astype(float)
x = torch.from_numpy(X)
large = np.tile(X, (100, 1)) + 0.1 * rng.normal(size=(24000, 2))
line = x[:, :1]

def tensors(value):
    if isinstance(value, gk.Mixture):
        return [value.logits, value.means, value.factor.covariances()]
    if isinstance(value, torch.nn.Module):
        return list(value.state_dict().values())
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors(part)]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in tensors(part)]
    return [torch.as_tensor(value)]

def digest(value):
    found = hashlib.sha256()
    for tensor in tensors(value):
        found.update(tensor.detach().double().contiguous().numpy().tobytes())
    return found.hexdigest()

def states():
    return (torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), str(random.getstate()))

start = gk.Mixture.from_parameters([0.3, 0.5, 0.2], X[[0, 100, 200]], [np.eye(2), 2 * np.eye(2), 0.5 * np.eye(2)])
other = gk.Mixture.from_parameters([0.6, 0.4], X[[5, 210]], [[1.0, 2.0], [0.5, 0.7]], "diag")
prior = gk.bayes.Prior(2, weights=Dirichlet(torch.tensor([1.5, 2.0])), means=Normal(torch.zeros(2, 1), 3.0),
                       scales=torch.tensor([0.5, 0.8]), covariance_type="spherical")
def blocks():
    return iter(np.array_split(large, 7))
def network():
    torch.manual_seed(1)
    model = gk.GMM(1, context=1, n_components=2)
    return model.initialize(x[:, :1], context=x[:, 1:])
def twice(model):
    return [model.sample(20)[0], model.sample(20)[0]]
few = {"draws": 20, "warmup": 5, "progress": False}
calls = {
    **{f"initialize {s}": lambda s=s: gk.initialize(x, 3, s) for s in ("kmeans", "kmeans++", "random", "responsibilities")},
    "initialize from a sample": lambda: gk.initialize(large, 5),
    "initialize from a source": lambda: gk.initialize(blocks, 4),
    "initialize a module": lambda: gk.GMM(2, n_components=3).initialize(x, "kmeans++"),
    "initialize a network": network,
    "survey": lambda: gk.Source.of(blocks).survey(500).reservoir.sample(),
    "Adam in minibatches": lambda: gk.fit(start, x, gk.Adam(batch_size=50), max_iter=3).mixture,
    "stepwise EM": lambda: gk.fit(start, x, gk.EM(batch_size=50), max_iter=3).mixture,
    "stepwise EM from a source": lambda: gk.fit(start, gk.Source.of(large, chunk_rows=999), gk.EM(batch_size=3000),
                                                max_iter=2).mixture,
    "stochastic EM": lambda: gk.fit(start, x, gk.EM(assignment="stochastic"), max_iter=5, tol=0).mixture,
    "annealed EM": lambda: gk.fit(start, x, gk.EM(temperature=(0.2, 3)), max_iter=5, tol=0).mixture,
    "one stochastic update": lambda: gk.EM(assignment="stochastic").update(start, x)[0],
    "variational Bayes in batches": lambda: gk.fit(start, x, gk.bayes.VariationalBayes(batch_size=60), max_iter=3).mixture,
    **{f"GaussianMixture {i}": lambda i=i: gk.GaussianMixture(3, init_params=i, n_init=2, max_iter=7).fit(X).means_
       for i in ("kmeans", "k-means++", "random", "random_from_data")},
    "GaussianMixture by Adam": lambda: gk.GaussianMixture(3, solver=gk.Adam(batch_size=40), max_iter=4).fit(X).means_,
    "GaussianMixture.partial_fit": lambda: gk.GaussianMixture(3).partial_fit(X[:99]).partial_fit(X[99:]).means_,
    "GaussianMixture.sample": lambda: twice(gk.GaussianMixture(2).fit(X)),
    "BayesianGaussianMixture": lambda: gk.BayesianGaussianMixture(n_components=3, max_iter=9).fit(X).covariances_,
    "BayesianGaussianMixture.sample": lambda: twice(gk.BayesianGaussianMixture(n_components=2).fit(X)),
    "select": lambda: [result.mixture for result in gk.analysis.select(x, [1, 2, 3], ["full", "diag"]).results],
    "silhouette": lambda: gk.analysis.silhouette(x, start.predict(x), samples=60),
    "kl_divergence": lambda: gk.analysis.kl_divergence(start, other, samples=500),
    "jensen_shannon": lambda: gk.analysis.jensen_shannon(start, other, samples=500),
    "total_variation": lambda: gk.analysis.total_variation(start, other, samples=500),
    "gibbs": lambda: gk.bayes.gibbs(prior, line[:40], **few).values,
    "langevin": lambda: gk.bayes.langevin(prior, line[:40], **few).values,
    **{f"importance {p}": lambda p=p: gk.bayes.importance(prior, line[:40], draws=50, proposal=p).values
       for p in ("prior", "laplace", "variational")},
}
if importlib.util.find_spec("pyro"):
    calls["nuts"] = lambda: gk.bayes.nuts(prior, line[:40], draws=5, warmup=5, chains=1, progress=False).values
found, touched = {}, []
for name, call in calls.items():
    before = states()
    found[name] = digest(call())
    if states() != before and name != "initialize a network" and name != "initialize a module":
        touched.append(name)
print(json.dumps([found, touched]))
"""


def _run(hash_seed):
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_give_the_same_bits():
    (first, touched), (second, _) = _run(1), _run(2)
    assert [name for name in first if first[name] != second[name]] == []
    assert touched == []
    assert len(first) > 35
    # A digest that ignored its input would pass the comparison as well.
    assert len(set(first.values())) == len(first)


@pytest.mark.parametrize("seed", [0, 7])
def test_global_seeds_do_not_matter(seed):
    x = np.random.default_rng(0).normal(size=(300, 2)) * [1.0, 3.0]

    def results():
        model = gk.GaussianMixture(3, init_params="random_from_data", max_iter=5, tol=0).fit(x)
        sampled = model.sample(4)[0]
        divergence = gk.analysis.kl_divergence(model.mixture_, gk.initialize(x, 2), samples=100)
        return model.means_.tolist(), sampled.tolist(), divergence

    before = results()
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    assert results() == before


def test_samples_of_an_estimator():
    x = np.random.default_rng(1).normal(size=(400, 2)) * [1.0, 3.0]
    model = gk.GaussianMixture(2).fit(x)
    first, second = model.sample(1000)[0], model.sample(1000)[0]
    # Two calls are independent draws of one distribution, not one draw twice.
    assert np.abs(np.corrcoef(first[:, 1], second[:, 1])[0, 1]) < 0.15
    assert np.abs(first.mean(0) - second.mean(0)).max() < 0.6
    assert np.array_equal(gk.GaussianMixture(2).fit(x).sample(1000)[0], first)
    # As in scikit-learn an integer seeds every call alike, and a RandomState goes on.
    model.set_params(random_state=3)
    assert np.array_equal(model.sample(9)[0], model.sample(9)[0])
    model.set_params(random_state=np.random.RandomState(3))
    assert not np.array_equal(model.sample(9)[0], model.sample(9)[0])


def test_distributions_draw_by_torchs_generator():
    mixture = gk.Mixture.from_parameters([0.4, 0.6], [[0.0], [3.0]], [1.0, 4.0], "spherical")
    torch.manual_seed(4)
    first, second = mixture.sample((5,)), mixture.sample((5,))
    torch.manual_seed(4)
    assert torch.equal(mixture.sample((5,)), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("generator", [0.5, True, "seed"])
def test_what_is_no_generator_is_refused_in_one_sentence(generator):
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    mixture = gk.initialize(x, 2)
    for call in (
        lambda: gk.initialize(x, 2, generator=generator),
        lambda: gk.fit(mixture, x, gk.EM(), generator=generator),
    ):
        with pytest.raises(TypeError, match=r"^generator must be a torch.Generator, a seed or None, got .*\.$"):
            call()


@pytest.mark.parametrize("name", ["generator", "random_state"])
@pytest.mark.parametrize("value", ["seed", 0.5, True])
def test_what_is_neither_generator_nor_seed_is_refused_by_analysis(name, value):
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    mixture = gk.initialize(x, 2)
    for call in (
        lambda: gk.analysis.select(x, [1], **{name: value}),
        lambda: gk.analysis.kl_divergence(mixture, mixture, **{name: value}),
        lambda: gk.analysis.silhouette(x, x[:, 0] > 0, samples=9, **{name: value}),
        lambda: gk.GMM(1).initialize(x, **{name: value}),
    ):
        with pytest.raises(TypeError, match=rf"^{name} must be a torch.Generator, a seed or None, got .*\.$"):
            call()
