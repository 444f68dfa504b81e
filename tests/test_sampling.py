"""Posteriors of mixtures: grids, closed forms, every sampler against the others, calibration, and honest refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import (
    Dirichlet,
    Gamma,
    HalfNormal,
    InverseGamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    Uniform,
    Wishart,
)

import gmmkeops as gk
from gmmkeops.bayes.sampling.draws import _arviz
from gmmkeops.bayes.sampling.pareto import smoothed
from gmmkeops.bayes.sampling.target import Target

SEED = 3


def bentos(seed=SEED):
    rng = np.random.default_rng(seed)
    return torch.as_tensor(np.r_[350 + 2 * rng.standard_normal(14), 500 + 2 * rng.standard_normal(6)])


def bento_prior(weights=(0.5, 0.5)):
    return gk.bayes.Prior(
        2, weights=torch.tensor(weights), means=Normal(400.0, 50.0), scales=2.0, covariance_type="spherical"
    )


def grid(x, weights, prior=(400.0, 50.0), sigma=2.0, half=8.0, steps=801):
    """Posterior means and standard deviations of both means, by summing over a grid around the mode in order."""
    centers = x[x < 425].mean(), x[x > 425].mean()
    axes = [torch.linspace(float(c) - half, float(c) + half, steps).double() for c in centers]
    a, b = torch.meshgrid(*axes, indexing="ij")
    logs = Normal(*prior).log_prob(a) + Normal(*prior).log_prob(b)
    for value in x:
        both = [Normal(m, sigma).log_prob(value) + math.log(w) for m, w in zip((a, b), weights, strict=True)]
        logs = logs + torch.logaddexp(*both)
    p = torch.softmax(logs.flatten(), 0).view_as(logs)
    means = [float((p * m).sum()) for m in (a, b)]
    return means, [float((p * (m - mean) ** 2).sum()) ** 0.5 for m, mean in zip((a, b), means, strict=True)]


METHODS = {
    "importance": lambda prior, x, g: gk.bayes.importance(prior, x, draws=4000, generator=g),
    "variational": lambda prior, x, g: gk.bayes.importance(prior, x, draws=4000, proposal="variational", generator=g),
    "gibbs": lambda prior, x, g: gk.bayes.gibbs(prior, x, draws=700, warmup=50, chains=2, generator=g, progress=False),
    "nuts": lambda prior, x, g: gk.bayes.nuts(prior, x, draws=300, warmup=100, chains=2, generator=g),
}


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        *((method, (0.5, 0.5)) for method in METHODS),
        *((method, (0.9, 0.1)) for method in ("importance", "gibbs")),
    ],
)
def test_bentos_have_the_posterior_of_the_grid(method, weights):
    """Means within a tenth and standard deviations within 12 % of one: five Monte-Carlo errors of the 600 NUTS draws."""
    x = bentos()
    found = METHODS[method](bento_prior(weights), x, torch.Generator().manual_seed(0))
    means, sds = grid(x, weights)
    assert found.mean("means")[:, 0].tolist() == pytest.approx(means, abs=0.1)
    assert found.sd("means")[:, 0].tolist() == pytest.approx(sds, rel=0.12)
    # The bento halfway between the two is nobody's, though each draw is sure of it.
    middle = torch.tensor([sum(means) / 2])
    assert abs(float(found.responsibilities(middle)[0, 0]) - 0.5) < 0.1
    certain = found.mixtures.log_joint(middle.double()[:, None, None]).softmax(-1).amax(-1)
    assert float(certain.mean()) > 0.9
    assert found.responsibilities(x)[:14, 0].min() > 0.999
    assert found.rule.startswith("components are sorted" if weights == (0.5, 0.5) else "components are in the order")
    assert "means" in str(found)


def test_the_prior_as_a_proposal_collapses_and_says_so():
    """What the mixture chapter finds with a thousand particles from the prior."""
    with pytest.warns(gk.bayes.SamplingWarning, match="weights are degenerate"):
        found = gk.bayes.importance(
            bento_prior(), bentos(), draws=1000, proposal="prior", generator=torch.Generator().manual_seed(0)
        )
    assert found.diagnostics["ess"] < 10


@pytest.mark.parametrize("sd", [10.0, 20.0])
def test_three_coffees_keep_the_order_of_their_priors(sd):
    """With a prior sd of 20 mg, one draw in twenty takes the first two coffees for each other: both samplers know it
    (the Gibbs chains' share has a standard error of about 0.015)."""
    rng = np.random.default_rng(0)
    x = torch.as_tensor(
        np.r_[82 + 5 * rng.standard_normal(8), 118 + 5 * rng.standard_normal(12), 165 + 5 * rng.standard_normal(10)]
    )
    means = Normal(torch.tensor([[80.0], [120.0], [160.0]]), sd)
    prior = gk.bayes.Prior(3, weights=Dirichlet(torch.ones(3)), means=means, scales=5.0, covariance_type="spherical")
    assert not prior.exchangeable
    gibbs = METHODS["gibbs"](prior, x, torch.Generator().manual_seed(0))
    importance = METHODS["importance"](prior, x, torch.Generator().manual_seed(0))
    swapped = [
        float(f.expectation(lambda m: (m.means[:, 0, 0] > m.means[:, 1, 0]).double())) for f in (gibbs, importance)
    ]
    assert swapped[0] == pytest.approx(swapped[1], abs=0.05)
    assert (swapped[1] > 0.01) == (sd == 20.0)
    for name in ("means", "weights") if sd == 10.0 else ():
        assert torch.allclose(gibbs.mean(name), importance.mean(name), atol=0.2 if name == "means" else 0.02)
        assert torch.allclose(gibbs.sd(name), importance.sd(name), rtol=0.15)


def test_one_gaussian_has_its_closed_form():
    """Known scale: a Normal posterior; evidence, predictive density and quantiles with it."""
    x = torch.tensor([1.0, 2.0, 4.0]).double()
    prior = gk.bayes.Prior(1, weights=torch.ones(1), means=Normal(0.0, 3.0), scales=2.0, covariance_type="diag")
    precision = 1 / 9 + 3 / 4
    mean, sd = float(x.sum() / 4 / precision), precision**-0.5
    found = gk.bayes.importance(prior, x, draws=20_000, generator=torch.Generator().manual_seed(0))
    assert float(found.mean("means")) == pytest.approx(mean, abs=0.03)
    assert float(found.sd("means")) == pytest.approx(sd, rel=0.03)
    low, high = found.interval("means", 0.9).flatten().tolist()
    assert (low, high) == pytest.approx((mean - 1.645 * sd, mean + 1.645 * sd), abs=0.06)
    evidence = MultivariateNormal(torch.zeros(3).double(), 4 * torch.eye(3).double() + 9).log_prob(x)
    assert found.diagnostics["log_evidence"] == pytest.approx(float(evidence), abs=0.02)
    places = torch.tensor([-2.0, 2.0, 7.0]).double()
    expected = Normal(mean, (sd**2 + 4) ** 0.5).log_prob(places)
    assert torch.allclose(found.log_prob(places), expected, atol=0.02)
    draws = found.sample(50_000, generator=torch.Generator().manual_seed(1))
    assert draws.shape == (50_000, 1)
    assert float(draws.std()) == pytest.approx((sd**2 + 4) ** 0.5, rel=0.02)


PRIORS = {
    "scales": {"scales": HalfNormal(2.0), "covariance_type": "diag"},
    "spherical": {"covariances": InverseGamma(3.0, 2.0), "covariance_type": "spherical"},
    "tied": {"precisions": Gamma(2.0, 1.0), "covariance_type": "tied_diag"},
    "full": {"precisions": Wishart(torch.tensor(4.0).double(), torch.eye(2).double()), "covariance_type": "full"},
    "lognormal": {"scales": LogNormal(0.0, 0.5), "covariance_type": "spherical"},
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("weights", [Dirichlet(torch.tensor([1.0, 2.0, 3.0])), gk.bayes.StickBreaking(1.5, 3)])
def test_unbounded_numbers_and_back(name, weights):
    """The way there and back, the density's Jacobian by automatic differentiation, and the reduction's gradient."""
    prior = gk.bayes.Prior(3, weights=weights, means=Normal(torch.zeros(2), 3.0), **PRIORS[name])
    generator = torch.Generator().manual_seed(0)
    values = prior.sample(4, generator)
    z = prior.unbounded(values)
    assert z.shape == (4, prior.size)
    again, logs = prior.values(z)
    for site in prior.sites:
        assert torch.allclose(again[site.name], values[site.name], atol=1e-6)

    def free(z):
        """As many free numbers as z has, in which the prior's density is written."""
        v = prior.values(z[None])[0]
        spread = v[prior.spread][0]
        if spread.ndim == 3:
            row, column = torch.tril_indices(2, 2)
            spread = spread[:, row, column]
        return torch.cat([v["weights"][0, :-1], v["means"][0].flatten(), spread.flatten()])

    jacobian = torch.autograd.functional.jacobian(free, z[1])
    expected = prior.log_prob({k: v[1:2] for k, v in again.items()})[0] + torch.linalg.slogdet(jacobian).logabsdet
    assert float(logs[1]) == pytest.approx(float(expected), abs=1e-8)

    x = torch.randn(5000, 2, generator=generator).double()
    few, many = Target(prior, x[:50]), Target(prior, x)
    _value, slope = few.slopes(z[:2])
    step = 1e-5 * torch.randn(prior.size, generator=generator, dtype=torch.float64)
    up, down = few.log_density(z[:2] + step), few.log_density(z[:2] - step)
    assert torch.allclose((up - down).detach() / 2, slope @ step, rtol=1e-4, atol=1e-9)
    parts = [Target(prior, part).log_likelihood(prior.mixtures(again)) for part in x.split(2500)]
    assert torch.allclose(many.log_likelihood(prior.mixtures(again)), sum(parts), rtol=1e-10)


def test_stick_breaking_is_a_density_and_draws_from_it():
    sticks = gk.bayes.StickBreaking(2.0, 3)
    steps = 400
    u = (torch.arange(steps).double() + 0.5) / steps
    a, b = torch.meshgrid(u, u, indexing="ij")
    inside = a + b < 1
    weights = torch.stack([a, b, 1 - a - b], -1)[inside]
    density = sticks.log_prob(weights).exp() / steps**2
    assert float(density.sum()) == pytest.approx(1, abs=0.02)
    draws = sticks.sample((40_000,), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(draws.sum(-1), torch.ones(40_000).double())
    assert torch.allclose(draws.mean(0), density @ weights, atol=0.01)
    assert torch.allclose(draws.mean(0), torch.tensor([1 / 3, 2 / 9, 4 / 9]).double(), atol=0.01)


@pytest.mark.parametrize("name", ["tied", pytest.param("full", marks=pytest.mark.slow)])
def test_gibbs_and_nuts_agree_where_all_is_unknown(name):
    """Means of the ordered means and weights, within five Monte-Carlo errors by ArviZ's effective sample sizes."""
    generator = torch.Generator().manual_seed(5)
    truth = gk.Mixture.from_parameters([0.4, 0.6], [[-2.0, 0.0], [2.0, 1.0]], [1.0, 0.5], "spherical")
    x = truth.sample(60, generator=generator)
    prior = gk.bayes.Prior(
        2, weights=Dirichlet(torch.full((2,), 2.0)), means=Normal(torch.zeros(2), 4.0), **PRIORS[name]
    )
    a = gk.bayes.gibbs(prior, x, draws=800, warmup=50, chains=2, generator=generator, progress=False)
    b = gk.bayes.nuts(prior, x, draws=100, warmup=50, chains=2, generator=generator)
    converged = [found.convergence() for found in (a, b)]
    for site in ("weights", "means", prior.spread):
        assert all(float(c[f"rhat_{site}"].max()) < 1.1 for c in converged)
        errors = [f.sd(site) / c[f"ess_{site}"].sqrt() for f, c in zip((a, b), converged, strict=True)]
        gap = (a.mean(site) - b.mean(site)).abs() / (errors[0] ** 2 + errors[1] ** 2).sqrt()
        assert float(gap.max()) < 5, site
    assert a.diagnostics == {}
    assert set(b.diagnostics) == {"divergences", "acceptance"}


def test_a_dirichlet_process_finds_the_clusters():
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    x = centers[torch.arange(3000) % 3] + torch.randn(3000, 2, generator=generator)
    prior = gk.bayes.Prior(
        15,
        weights=gk.bayes.StickBreaking(1.0, 15),
        means=Normal(torch.zeros(2), 10.0),
        precisions=Gamma(2.0, 2.0),
        covariance_type="diag",
    )
    found = gk.bayes.gibbs(prior, x, draws=150, warmup=250, chains=1, generator=generator, progress=False)
    counts = found.components()
    assert float(counts.sum()) == pytest.approx(1)
    assert float(counts[2:6].sum()) > 0.9
    truth = gk.Mixture.from_parameters(torch.full((3,), 1 / 3), centers, torch.ones(3), "spherical")
    assert float((found.log_prob(x[:300]) - truth.log_prob(x[:300].double())).abs().mean()) < 0.05
    with pytest.raises(ValueError, match="draws no labels"):
        METHODS["importance"](bento_prior(), bentos(), generator).components()


def test_langevin_has_the_spread_of_the_posterior():
    """30 000 points, two components, all unknown: standard deviations within 20 % of NUTS', which looks at all of them."""
    generator = torch.Generator().manual_seed(0)
    truth = gk.Mixture.from_parameters([0.4, 0.6], [[-2.0], [2.0]], [1.0, 0.5], "spherical")
    x = truth.sample(30_000, generator=generator)
    prior = gk.bayes.Prior(
        2, weights=Dirichlet(torch.ones(2)), means=Normal(0.0, 5.0), precisions=Gamma(2.0, 2.0), covariance_type="diag"
    )
    target = Target(prior, x)
    mode, root = target.laplace(generator, starts=1)
    laplace = prior.values(mode + torch.randn(4000, prior.size, generator=generator).double() @ root.T)[0]
    laplace = gk.bayes.Draws.of(prior, laplace, "Laplace")
    found = gk.bayes.langevin(
        prior, x, draws=250, warmup=30, thin=3, step=0.3, batch_size=3000, generator=generator, progress=False
    )
    for name in ("weights", "means", "precisions"):
        assert torch.allclose(found.sd(name), laplace.sd(name), rtol=0.25)
        assert float(((found.mean(name) - laplace.mean(name)).abs() / laplace.sd(name)).max()) < 0.5


def test_pareto_k_is_that_of_arviz():
    rng = np.random.default_rng(0)
    for tail in (0.2, 0.6, 0.9):
        logs = tail * rng.exponential(size=3000)
        mine, k = smoothed(torch.as_tensor(logs))
        theirs, other = _arviz().psislw(logs)
        assert k == pytest.approx(float(other), abs=1e-6)
        assert np.allclose(mine.numpy(), theirs, atol=1e-6)


def test_draws_answer_in_weights_and_any_order():
    prior = bento_prior()
    values = {
        "weights": torch.tensor([[0.5, 0.5]]).double().expand(3, 2),
        "means": torch.tensor([[[1.0], [2.0]], [[4.0], [3.0]], [[5.0], [9.0]]]).double(),
        "scales": torch.full((3, 2, 1), 2.0).double(),
    }
    shares = torch.tensor([0.5, 0.25, 0.25]).double()
    found = gk.bayes.Draws.of(prior, values, "hand", log_weights=shares.log())
    assert found.values["means"][1, :, 0].tolist() == [3.0, 4.0]
    assert found.mean("means")[:, 0].tolist() == [0.5 * 1 + 0.25 * 3 + 0.25 * 5, 0.5 * 2 + 0.25 * 4 + 0.25 * 9]
    assert found.quantile("means", 0.5)[:, 0].tolist() == [1.0, 2.0]
    assert float(found.expectation(lambda m: m.mean[:, 0])) == pytest.approx(0.5 * 1.5 + 0.25 * 3.5 + 0.25 * 7)
    x = torch.tensor([0.0, 3.0]).double()
    densities = [Normal(m[:, 0], 2.0).log_prob(x[:, None]).exp().mean(1) for m in values["means"]]
    assert torch.allclose(found.log_prob(x).exp(), sum(w * d for w, d in zip(shares, densities, strict=True)))


def test_chains_that_have_not_met_say_so():
    """Two chains of draws about different places; and about the same."""
    prior = bento_prior()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 2, 1, generator=generator).double()
    values = {
        "weights": torch.full((400, 2), 0.5).double(),
        "means": torch.tensor([[350.0], [500.0]]).double() + noise,
        "scales": torch.full((400, 2, 1), 2.0).double(),
    }
    gk.bayes.Draws.of(prior, values, "hand", chains=2).warn_unless_mixed()
    values["means"][200:, 0] += 2
    with pytest.warns(gk.bayes.SamplingWarning, match="chains of hand have not converged"):
        gk.bayes.Draws.of(prior, values, "hand", chains=2).warn_unless_mixed()


def test_divergent_trajectories_say_so():
    """Steps that are fifty times too long."""
    options = {"step_size": 100.0, "adapt_step_size": False, "generator": torch.Generator().manual_seed(0)}
    with pytest.warns(gk.bayes.SamplingWarning, match="trajectories diverged"):
        gk.bayes.nuts(bento_prior(), bentos(), draws=20, warmup=1, chains=1, **options)


def test_torch_itself_is_left_alone():
    state = torch.get_rng_state()
    for name in ("importance", "gibbs"):
        METHODS[name](bento_prior(), bentos(), torch.Generator().manual_seed(0))
    gk.bayes.nuts(bento_prior(), bentos(), draws=5, warmup=5, chains=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


def test_equal_seeds_give_equal_draws():
    first, second = (METHODS["gibbs"](bento_prior(), bentos(), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.values["means"], second.values["means"])


def anything(**changed):
    settings = {
        "weights": Dirichlet(torch.ones(2)),
        "means": Normal(0.0, 1.0),
        "scales": 1.0,
        "covariance_type": "diag",
    }
    return gk.bayes.Prior(2, **{**settings, **changed})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: anything(means=None), "means is required, got None"),
        (lambda: anything(scales=None), "exactly one of scales"),
        (lambda: anything(precisions=Gamma(1.0, 1.0)), "exactly one of scales"),
        (lambda: anything(means=Normal(0.0, math.inf)), "the prior on means is improper"),
        (lambda: anything(means=Normal(torch.zeros(3, 1), 1.0)), r"prior on means must be broadcastable to \(2, 1\)"),
        (lambda: anything(weights=torch.tensor([0.5, 0.6])), "known weights must be nonnegative and sum to one"),
        (lambda: anything(scales=-1.0), "scales must be positive"),
        (lambda: anything(covariance_type="full"), "scales require covariance_type"),
        (lambda: gk.bayes.StickBreaking(0.0, 3), "concentration must be positive"),
        (
            lambda: gk.bayes.gibbs(anything(means=Uniform(0.0, 1.0)), torch.zeros(9)),
            "gibbs does not support the prior Uniform on means",
        ),
        (
            lambda: gk.bayes.gibbs(anything(scales=HalfNormal(1.0)), torch.zeros(9)),
            "gibbs does not support the prior HalfNormal on scales",
        ),
        (lambda: gk.bayes.gibbs(anything(), torch.zeros(9), draws=0), "draws must be an integer of at least 1"),
        (lambda: gk.bayes.importance(anything(), torch.zeros(9), proposal="guess"), "proposal must be one of"),
        (lambda: gk.bayes.importance(anything(), torch.zeros(9, 2)), "x has 2 columns, expected 1"),
        (lambda: gk.bayes.importance(anything(), torch.full((9,), math.nan)), "x must be finite"),
        (lambda: gk.bayes.langevin(anything(), torch.zeros(9), step=2.0), "step must be above 0 and at most 1"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Calibration: minutes each, run by `make test-slow`.


def simulated(prior, count, generator):
    """Parameters from the prior and points from them."""
    values = prior.sample(1, generator)
    return values, prior.mixtures(values).sample((count,), generator=generator)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "gibbs", "nuts"])
def test_ninety_percent_intervals_cover(method):
    """200 data sets drawn from the prior, both ordered means: 400 intervals, most of them independent; if 90 % is right, fewer
    than 85 % or more than 95 % of 200 has a chance of 2 %.
    """
    prior, covered = bento_prior(), []
    draw = {**METHODS, "nuts": lambda p, x, g: gk.bayes.nuts(p, x, draws=150, warmup=60, chains=1, generator=g)}[method]
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        values, x = simulated(prior, 20, generator)
        low, high = draw(prior, x, generator).interval("means", 0.9)
        truth = values["means"][0].sort(0).values
        covered.append(((low <= truth) & (truth <= high)).double().mean())
    assert 0.85 <= float(torch.stack(covered).mean()) <= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("method", "simulations"), [("gibbs", 300), ("nuts", 150)])
def test_ranks_are_uniform(method, simulations):
    """Simulation-based calibration (Talts et al. 2018): ranks of truths among 49 thinned draws, in ten bins; each of the five
    chi-squared tests fails by chance in 0.1 % of the seeds.
    """
    prior = gk.bayes.Prior(
        2,
        weights=Dirichlet(torch.full((2,), 3.0)),
        means=Normal(0.0, 3.0),
        precisions=Gamma(4.0, 4.0),
        covariance_type="diag",
    )
    ranks = []
    for seed in range(simulations):
        generator = torch.Generator().manual_seed(1000 + seed)
        values, x = simulated(prior, 20, generator)
        if method == "gibbs":
            found = gk.bayes.gibbs(
                prior, x, draws=49, warmup=100, chains=1, thin=12, generator=generator, progress=False
            )
        else:
            found = gk.bayes.nuts(prior, x, draws=196, warmup=100, chains=1, generator=generator)
        truth = gk.bayes.Draws.of(prior, values, "truth").values
        kept = slice(None) if method == "gibbs" else slice(3, None, 4)
        flat = [(name, k) for name, k in itertools.product(("means", "precisions"), (0, 1))] + [("weights", 0)]
        below = [found.values[n][kept].flatten(1)[:, k] < truth[n].flatten(1)[0, k] for n, k in flat]
        ranks.append(torch.stack([b.sum() for b in below]))
    counts = torch.stack(ranks) // 5
    for column in counts.T:
        observed = torch.bincount(column, minlength=10).double()
        chi = float(((observed - simulations / 10) ** 2).sum() / (simulations / 10))
        assert chi < 27.88
