"""Merging and splitting of components."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gmmkeops as gk
from gmmkeops.models import COSTS, cheapest_merges, merge_down, merged_by, split

TYPES = ("full", "tied", "diag", "tied_diag", "spherical", "tied_spherical")


def mixture(K=12, D=3, covariance_type="full", seed=0, spread=6.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kind, tied = gk.components.factor_class(covariance_type)
    L = 1 if tied else K
    A = 0.7 * draw(L, D, D) + torch.eye(D)
    covariances = kind.compact(A @ A.mT)
    weights = torch.rand(K, generator=generator, dtype=torch.float64) + 0.1
    return gk.Mixture(weights.log(), spread * draw(K, D), kind.from_covariances(covariances, features=D))


def divergence(mixture, i, j, draws=200_000):
    """Divergence of a pair from its merged component by sampling, times the weight of the pair."""
    pair = mixture[[i, j]]
    W = float(mixture.weights[[i, j]].sum())
    one = gk.analysis.merge(pair, [[0, 1]])
    x = pair.sample((draws,), generator=torch.Generator().manual_seed(1))
    return W * float((pair.log_prob(x) - one.log_prob(x)).mean())


@pytest.mark.parametrize("covariance_type", TYPES)
def test_mean_and_total_variance_are_kept(covariance_type):
    m = mixture(covariance_type=covariance_type)
    for n in (1, 3, 11, 12):
        reduced, tree = gk.analysis.reduce(m, n)
        assert reduced.n_components == n == tree.n_components
        assert reduced.covariance_type == (m.covariance_type if n > 1 or not m.tied else reduced.covariance_type)
        torch.testing.assert_close(reduced.mean, m.mean, rtol=1e-10, atol=1e-10)
        assert float(reduced.variance.sum()) == pytest.approx(float(m.variance.sum()), rel=1e-10)
        if "full" in m.covariance_type or m.covariance_type == "tied":
            torch.testing.assert_close(reduced.covariance_matrix, m.covariance_matrix, rtol=1e-9, atol=1e-9)


def test_levels_of_the_tree_are_the_reduced_mixtures():
    m = mixture(K=20)
    _, tree = gk.analysis.reduce(m, 1)
    for n in (2, 7, 19):
        reduced, part = gk.analysis.reduce(m, n)
        assert torch.equal(part.merges, tree.merges[: 20 - n])
        again = merged_by(m, tree.labels(n), n)
        torch.testing.assert_close(again.means, reduced.means)
        assert tree.labels(n).tolist() == part.labels(n).tolist()
        assert sorted(set(tree.labels(n).tolist())) == list(range(n))


def test_the_cost_is_the_divergence_of_the_pair():
    m = mixture(K=2, D=2, spread=1.0)
    for seed in range(6):
        m = mixture(K=2, D=2, seed=seed, spread=1.0)
        sampled, bound = (float(gk.analysis.reduce(m, 1, cost=cost).tree.costs[0]) for cost in ("divergence", "bound"))
        truth = divergence(m, 0, 1)
        entropy = float(torch.distributions.Categorical(m.weights).entropy())
        assert sampled == pytest.approx(truth, rel=0.1, abs=0.03)
        assert bound - entropy - 1e-12 <= sampled <= bound + 1e-12
        assert truth <= bound + 0.01


def test_the_bound_is_that_of_runnalls():
    m = mixture(K=2, D=3, covariance_type="full")
    cost = float(gk.analysis.reduce(m, 1, cost="bound").tree.costs[0])
    whole = torch.logdet(m.covariance_matrix)
    parts = (m.weights * torch.logdet(m.factor.covariances())).sum()
    assert cost == pytest.approx(0.5 * float(whole - parts), rel=1e-10)


def greedy(m, n, cost):
    """Merge the best of all pairs, one after the other, with the cost of pairs computed alone."""
    groups = [[k] for k in range(m.n_components)]
    while len(groups) > n:
        found = {}
        for a in range(len(groups)):
            for b in range(a):
                pair = gk.analysis.merge(
                    m[groups[a] + groups[b]], [list(range(len(groups[a])))] if len(groups[a]) > 1 else []
                )
                pair = (
                    pair if len(groups[b]) == 1 else gk.analysis.merge(pair, [[k for k in range(1, pair.n_components)]])
                )
                W = float(m.weights[groups[a] + groups[b]].sum())
                found[a, b] = W * float(gk.analysis.reduce(pair, 1, cost=cost).tree.costs[0])
        a, b = min(found, key=found.get)
        groups[b] = sorted(groups[a] + groups[b])
        del groups[a]
    return sorted(map(tuple, groups))


@pytest.mark.parametrize("cost", ["divergence", "bound"])
def test_few_components_are_merged_in_the_greedy_order_of_all_pairs(cost):
    m = mixture(K=9, D=2, seed=3, spread=2.0)
    _, tree = gk.analysis.reduce(m, 4, cost=cost)
    labels = tree.labels(4)
    own = sorted(tuple((labels == g).nonzero()[:, 0].tolist()) for g in range(4))
    assert own == greedy(m, 4, cost)


def test_neighbors_lose_little_against_all_pairs(monkeypatch):
    from gmmkeops.models import merging

    m = mixture(K=240, D=3, spread=3.0)
    reduced = gk.analysis.reduce(m, 24).mixture
    monkeypatch.setattr(merging, "_ALL", 10_000)
    monkeypatch.setattr(merging, "_TOGETHER", 0.0)
    full = gk.analysis.reduce(m, 24).mixture
    x = m.sample((20_000,), generator=torch.Generator().manual_seed(0))
    own, best = (float((m.log_prob(x) - other.log_prob(x)).mean()) for other in (reduced, full))
    assert own <= 1.2 * best


def test_units_and_order_do_not_matter():
    m = mixture(K=60, D=3)
    scale, shift = torch.tensor([1e-6, 1.0, 1e7]).double(), torch.tensor([0.0, 1e3, -1e9]).double()
    other = gk.Mixture(m.logits, m.means * scale + shift, m.factor.rescale(1 / scale))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    a, b, c = (gk.analysis.reduce(each, 20).tree for each in (m, other, m[order.tolist()]))
    assert torch.equal(a.merges, b.merges)
    torch.testing.assert_close(a.costs, b.costs, rtol=1e-4, atol=1e-9)
    groups = a.labels(20)[order]
    again = c.labels(20)
    assert len(set(zip(groups.tolist(), again.tolist(), strict=True))) == 20


@pytest.mark.parametrize("covariance_type", TYPES)
def test_components_of_weight_zero_cost_nothing(covariance_type):
    m = mixture(K=6, covariance_type=covariance_type)
    logits = m.logits.clone()
    logits[[1, 4]] = -math.inf
    m = gk.Mixture(logits, m.means, m.factor)
    reduced, tree = gk.analysis.reduce(m, 4)
    assert float(tree.costs.max()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(reduced.mean, m.mean)
    x = m.sample((500,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reduced.log_prob(x), m.log_prob(x), rtol=1e-8, atol=1e-8)
    assert torch.isfinite(gk.analysis.reduce(m, 1).mixture.log_prob(x)).all()


@pytest.mark.parametrize("n", [0, 13, 2.5])
def test_wrong_numbers_are_refused(n):
    with pytest.raises((ValueError, TypeError), match="n_components must be"):
        gk.analysis.reduce(mixture(), n)
    with pytest.raises(ValueError, match="n_components must be from 3 to 12, got 2"):
        gk.analysis.reduce(mixture(), 3).tree.labels(2)


def test_column_names_are_kept_and_the_input_is_unchanged():
    m = mixture(D=2).named(["a", "b"])
    before = m.means.clone(), m.factor.covariances().clone()
    assert gk.analysis.reduce(m, 3).mixture.columns == ("a", "b")
    assert torch.equal(m.means, before[0])
    assert torch.equal(m.factor.covariances(), before[1])


def test_many_components_take_time_in_proportion():
    m = mixture(K=5000, spread=30.0)
    reduced, tree = gk.analysis.reduce(m, 500)
    assert len(tree.merges) == 4500
    torch.testing.assert_close(reduced.mean, m.mean)
    # Nodes are created once, and each is merged once.
    assert len(np.unique(tree.merges.numpy())) == 9000


@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_split_keeps_the_moments_of_each_component(covariance_type):
    m = mixture(K=5, covariance_type=covariance_type)
    both = split(m)
    assert both.n_components == 10
    pairs = torch.arange(5).repeat(2)
    again = merged_by(both, pairs, 5)
    torch.testing.assert_close(again.weights, m.weights)
    torch.testing.assert_close(again.means, m.means)
    if not m.tied:
        torch.testing.assert_close(again.factor.covariances(), m.factor.covariances())
    assert bool((torch.linalg.eigvalsh(both.factor.covariances()) > 0).all())


def test_a_split_component_is_merged_again():
    m = mixture(K=5, D=3, spread=20.0)
    tree = merge_down(split(m), 5)
    assert tree.labels(5).tolist() == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
@pytest.mark.parametrize("cost", ["divergence", "bound"])
@pytest.mark.parametrize("D", [1, 3, 20])
def test_costs_of_the_library_equal_those_in_torch(covariance_type, cost, D, monkeypatch):
    m = mixture(K=9, D=D, covariance_type=covariance_type, spread=1.0)
    logits = m.logits.clone()
    logits[3] = -math.inf
    m = gk.Mixture(logits, m.means, m.factor)
    own = gk.analysis.reduce(m, 3, cost=cost).tree
    monkeypatch.setattr(gk.reductions, "pair_costs", lambda *arguments: None)
    expected = gk.analysis.reduce(m, 3, cost=cost).tree
    assert torch.equal(own.merges, expected.merges)
    torch.testing.assert_close(own.costs, expected.costs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_the_cheapest_single_merges_are_those_of_the_reductions(covariance_type):
    m = mixture(8, covariance_type=covariance_type, spread=2.0)
    expected = {tuple(gk.analysis.reduce(m, 7, cost=cost).tree.merges[0].tolist()) for cost in COSTS}
    found = cheapest_merges(m)
    assert {tuple(tree.merges[0].tolist()) for tree in found} == expected
    assert len(found) == len(expected)


def test_the_classification_cost_is_the_bound_minus_the_entropy_of_the_weights():
    m = mixture(2, spread=1.0)
    bound, loss = (float(merge_down(m, 1, cost=cost).costs[0]) for cost in ("bound", "classification"))
    a, b = m.weights.tolist()
    entropy = -(a * math.log(a) + b * math.log(b))
    assert loss == pytest.approx(bound - entropy, abs=1e-12)
