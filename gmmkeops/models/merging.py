r"""Merging of components that are close to each other, and splitting of all components.

A merged component has the weight, mean and covariance of the components that it replaces. Pairs are merged in the order of the
Kullback-Leibler divergence between the pair and its merged component, which is estimated at fixed quasi-random points and lies
between two bounds. References: Runnalls 2007, *Kullback-Leibler approach to Gaussian mixture reduction*, IEEE TAES 43;
Zhou, Xu, Fazel and Du 2025, arXiv 2506.06584.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gmmkeops import reductions
from gmmkeops._checks import as_integer
from gmmkeops.components import Factor

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture

__all__ = [
    "COSTS",
    "HALF",
    "MergeTree",
    "cheapest_merges",
    "merge_down",
    "merged_by",
    "merges_singly",
    "noise",
    "split",
]

# Costs of a merge: the estimated divergence, its upper bound, and its lower bound.
COSTS = ("divergence", "bound", "classification")

# Points at which the divergence of a pair is estimated: this many, and their reflections, for each of the two components.
_POINTS = 12

# Number of components up to which all pairs are candidates; number of neighbors of each of more components; and number of those
# that are nearest in standardized coordinates, among which the neighbors are chosen.
_ALL, _NEIGHBORS, _NEAR = 32, 8, 32

# Fraction of the components that are merged at a time, all of them pairs of mutually best partners.
_TOGETHER = 1 / 16

# Numbers in an array (pairs, points, D), and in an array (components, K, D).
_NUMBERS = 1 << 20

# Distance of the halves of a component from its mean, in standard deviations along its longest axis.
HALF = 0.7

# Smallest variance of a merged component relative to its largest one.
_FLOOR = 1e-300


@dataclass(frozen=True)
class MergeTree:
    r"""Merges that reduce a mixture, in the order in which they were performed.

    Components 0, ..., K - 1 are those of the mixture; merge m creates component K + m. In the trees of
    :class:`~gmmkeops.analysis.Selection`, EM steps follow each merge, and the next costs are computed after these steps.

    Args:
        merges: Pairs of merged components (M, 2), int64.
        costs: Cost of each merge (M,), nats per point, by the ``cost`` of :func:`~gmmkeops.analysis.reduce`. By default it
            estimates the Kullback-Leibler divergence of the pair from the merged component, times the weight of the pair. The
            sum of costs ``"bound"`` is an upper bound on the divergence of the whole mixture.
        n_leaves: Number of components K of the mixture.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.3, 0.3, 0.4], means=[[0.0], [0.1], [9.0]], covariances=[[[1.0]]] * 3)
        >>> reduced, tree = gk.analysis.reduce(m, 2)
        >>> tree.labels(2).tolist(), tree.merges.tolist()
        ([0, 0, 1], [[0, 1]])
    """

    merges: Tensor
    costs: Tensor
    n_leaves: int

    @property
    def n_components(self) -> int:
        """Number of components after all merges."""
        return self.n_leaves - len(self.merges)

    def labels(self, n_components: int) -> Tensor:
        """Return for each component of the mixture (K,) the index of the one that contains it after some of the merges, int64.

        Args:
            n_components: Number of components that remain; they are numbered by their first components in the mixture.

        Raises:
            ValueError: The tree has no level of that many components.
        """
        n = as_integer(n_components, "n_components")
        if not self.n_components <= n <= self.n_leaves:
            raise ValueError(f"n_components must be from {self.n_components} to {self.n_leaves}, got {n}.")
        count = self.n_leaves - n
        parent = np.arange(self.n_leaves + count)
        parent[self.merges[:count].cpu().numpy().reshape(-1)] = np.repeat(np.arange(count) + self.n_leaves, 2)
        # The last nodes are roots, so that one step from the top down finds the root of every node.
        for node in range(len(parent) - 1, -1, -1):
            parent[node] = parent[parent[node]]
        roots = parent[: self.n_leaves]
        _, first, inverse = np.unique(roots, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return torch.from_numpy(rank[inverse.reshape(-1)])


def merge_down(mixture: Mixture, n_components: int, *, cost: str = "divergence") -> MergeTree:
    """Merge pairs of components until ``n_components`` are left, the least costly ones first.

    Args:
        mixture: A mixture of any family; components may have a weight of zero.
        n_components: Number of components that remain.
        cost: ``"divergence"``, estimated for each pair at quasi-random points; ``"bound"``, Runnalls' upper bound; or
            ``"classification"``, the loss of the classification likelihood, which is the bound minus the entropy of the two
            weights and may be negative. A common (tied) covariance uses the bound instead of the divergence.
    """
    with reductions.one_thread():
        return _Merger(mixture, cost).run(n_components)


def merges_singly(n_components: int) -> bool:
    """Return whether :func:`merge_down` compares all pairs of so many components, and merges one pair at a time."""
    return n_components <= _ALL and int(n_components * _TOGETHER) <= 1


def cheapest_merges(mixture: Mixture) -> list[MergeTree]:
    """Return the different single merges that have the lowest cost, by each of the costs."""
    with reductions.one_thread():
        merger = _Merger(mixture, "divergence")
        pairs = merger.candidates()
        divergence = merger.divergences(pairs, sampled=not merger.tied)
        bound = divergence if merger.tied else merger.divergences(pairs, sampled=False)
        found: dict[int, MergeTree] = {}
        for costs in (divergence, bound, bound - merger.entropies(pairs)):
            place = int(costs.argmin())
            one = slice(place, place + 1)
            found.setdefault(
                place, MergeTree(torch.from_numpy(pairs[one]), torch.from_numpy(divergence[one]), merger.K)
            )
        return list(found.values())


def merged_by(mixture: Mixture, labels: Tensor, n_components: int) -> Mixture:
    """Replace components of equal labels (K,) by one component of their weight, mean and covariance."""
    kind, w, index = type(mixture.factor), mixture.weights.detach().double(), labels.to(mixture.means.device)
    means, spreads = mixture.means.detach().double(), _spreads(mixture)
    W = w.new_zeros(n_components).index_add(0, index, w)
    sizes = w.new_zeros(n_components).index_add(0, index, torch.ones_like(w))
    share = torch.where(W[index] > 0, w / W[index].clamp(min=1e-300), 1 / sizes[index])
    center = means.new_zeros(n_components, means.shape[1]).index_add(0, index, share[:, None] * means)
    between = _outer(kind, means - center[index])
    scale = _like(share, between)
    if mixture.factor.leading == 1:
        spread = spreads + (_like(w, between) * between).sum(0, keepdim=True)
    else:
        spread = spreads.new_zeros(n_components, *spreads.shape[1:]).index_add(0, index, scale * (spreads + between))
    factor, _ = kind.nearest(spread, means.shape[1], _FLOOR)
    logits = W.clamp(min=1e-300).log()
    return mixture._like(logits, center, factor).named(mixture.columns)


def split(mixture: Mixture) -> Mixture:
    """Split every component into two halves along its longest axis, so that weight, mean and covariance of the pair are kept.

    Returns:
        A mixture of 2K components; the halves of component k are k and K + k. A common (tied) covariance stays common.
    """
    kind, means, spreads = type(mixture.factor), mixture.means.detach().double(), _spreads(mixture)
    K, D = means.shape
    if kind.coupled:
        values, vectors = torch.linalg.eigh(spreads)
        axis = vectors[..., -1] * values[..., -1:].clamp(min=0).sqrt()
        # The first half lies where the longest axis has its largest entry, whose sign is arbitrary.
        largest = axis.gather(-1, axis.abs().argmax(-1, keepdim=True))
        axis = torch.where(largest < 0, -axis, axis)
    else:
        variances = kind.variances(spreads).expand(-1, D)
        # The components of a spherical family have no longest axis; they are split along one column after the other.
        longest = variances.argmax(1) if spreads.ndim > 1 else torch.arange(len(spreads), device=means.device) % D
        axis = torch.zeros_like(variances).scatter(1, longest[:, None], variances.gather(1, longest[:, None]).sqrt())
    shift = (HALF * axis).expand(K, D)
    factor, _ = kind.nearest(spreads - _outer(kind, HALF * axis), D, _FLOOR)
    both = factor if factor.leading == 1 else factor.select(torch.arange(K, device=means.device).repeat(2))
    logits = mixture.log_weights.detach().double() - math.log(2)
    return mixture._like(logits.repeat(2), torch.cat([means + shift, means - shift]), both).named(mixture.columns)


def _spreads(mixture: Mixture) -> Tensor:
    """Return the covariances (K or 1, ...) in the shape that the family stores."""
    return mixture.factor.detach().to(torch.float64).compact_covariances()


def _outer(kind: type, z: Tensor) -> Tensor:
    """Compute the outer products of vectors (..., D) in the shape of covariances of a family."""
    found: Tensor = kind.mean_scatter(kind.outer(z), z.shape[-1])  # type: ignore[attr-defined]
    return found


def _like(values: Tensor, other: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (other.ndim - 1))


@cache
def noise(features: int) -> Tensor:
    """Return fixed quasi-random points (2 _POINTS, D) of the standard normal distribution, in pairs z and -z."""
    u = torch.quasirandom.SobolEngine(features, scramble=True, seed=0).draw(_POINTS, dtype=torch.float64)
    z = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-9, 1 - 1e-9))
    # Their second moments become those of the distribution as far as possible, so that quadratic functions are averaged exactly.
    if features <= _POINTS:
        z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.mT @ z / _POINTS).mT, z, upper=True, left=False)
    else:
        z = z * (features / z.square().sum(1).mean()).sqrt()
    return torch.cat([z, -z])


class _Merger:
    """The components during a reduction. A merged component takes the place of the first one of its pair.

    Args:
        mixture: The mixture.
        cost: As for :func:`merge_down`.
    """

    def __init__(self, mixture: Mixture, cost: str) -> None:
        factor = mixture.factor.detach().to(torch.float64)
        self.kind, self.features, self.tied = type(factor), factor.features, mixture.tied
        self.w, self.means = mixture.weights.detach().double(), mixture.means.detach().double().clone()
        self.spreads = _spreads(mixture).clone()
        self.sampled = cost == "divergence" and not self.tied
        self.classifies = cost == "classification"
        self.K = len(self.w)
        self.alive = np.ones(self.K, dtype=bool)
        self.node = np.arange(self.K)
        self.merges: list[np.ndarray] = []
        self.costs: list[np.ndarray] = []
        self.count = 0

    def run(self, n_components: int) -> MergeTree:
        left = self.K
        edges = self.candidates()
        costs = self._costs(edges)
        everything = left <= _ALL
        while left > n_components:
            if not len(edges) or (left <= _ALL and not everything):
                everything = left <= _ALL
                edges = self.candidates()
                costs = self._costs(edges)
            some = self._best(edges, costs, min(left - n_components, max(1, int(left * _TOGETHER))))
            pairs = edges[some]
            self._merge(pairs, costs[some])
            left -= len(pairs)
            edges, costs = self._contract(edges, costs, pairs)
        merges = np.concatenate(self.merges) if self.merges else np.empty((0, 2), dtype=np.int64)
        found = np.concatenate(self.costs) if self.costs else np.empty(0)
        return MergeTree(torch.from_numpy(merges), torch.from_numpy(found), self.K)

    def candidates(self) -> np.ndarray:
        """Return pairs (P, 2) of components that may be merged: all of them, or each component and its nearest ones."""
        index = np.flatnonzero(self.alive)
        if len(index) <= _ALL:
            i, j = np.triu_indices(len(index), 1)
            return np.stack([index[i], index[j]], 1)
        rows = torch.from_numpy(index).to(self.means.device)
        near = self._nearest(rows)
        pairs = np.stack([np.repeat(index, near.shape[1]), index[near.cpu().numpy()].reshape(-1)], 1)
        return _unique(pairs)[0]

    def _nearest(self, rows: Tensor) -> Tensor:
        """Return the positions (n, neighbors) of the nearest of the components ``rows`` (n,), relative to both variances."""
        n, D = len(rows), self.features
        means = self.means[rows]
        variances = self.kind.variances(self.spreads).expand(-1, D)
        variances = variances.expand(n, D) if self.tied else variances[rows]
        if n * n * D <= 64 * _NUMBERS:
            near = torch.arange(n, device=rows.device).expand(n, n)
        else:
            # Among many components, only those are compared that are near in columns of equal standard deviations.
            z = means / (means.var(0) + variances.mean(0)).sqrt()
            unit = z.new_ones(1, 1)
            near = reductions.topk(z, z.new_zeros(n), z, unit, min(_NEAR, n))[1]
        found = []
        step = max(1, 4 * _NUMBERS // (near.shape[1] * D))
        for first in range(0, n, step):
            some = near[first : first + step]
            own = torch.arange(first, first + len(some), device=rows.device)[:, None]
            distance = ((means[own] - means[some]).square() / (variances[own] + variances[some])).sum(-1)
            distance = distance.masked_fill(some == own, math.inf)
            found.append(some.gather(1, distance.topk(min(_NEIGHBORS, n - 1), largest=False).indices))
        return torch.cat(found)

    def _merged(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return share of the first component (P,), mean (P, D) and covariance (P, ...) of merged pairs."""
        W = self.w[i] + self.w[j]
        share = torch.where(W > 0, self.w[i] / W.clamp(min=1e-300), 0.5)
        delta = self.means[i] - self.means[j]
        mean = self.means[j] + share[:, None] * delta
        between = _outer(self.kind, delta)
        if self.tied:
            # The common covariance grows by the scatter between the two means.
            return share, mean, self.spreads + _like(W * share * (1 - share), between) * between
        own = _like(share, between)
        return share, mean, own * self.spreads[i] + (1 - own) * self.spreads[j] + own * (1 - own) * between

    def _costs(self, edges: np.ndarray) -> np.ndarray:
        """Compute the costs (P,) of merging pairs (P, 2), nats per point."""
        costs = self.divergences(edges, sampled=self.sampled)
        return costs - self.entropies(edges) if self.classifies else costs

    def entropies(self, edges: np.ndarray) -> np.ndarray:
        """Compute the entropies (P,) of the weights of pairs, times the weights of the pairs."""
        w = self.w.cpu().numpy()[edges]
        W = w.sum(1)
        share = w[:, 0] / np.maximum(W, 1e-300)
        logs = np.log(np.maximum(np.stack([share, 1 - share]), 1e-300))
        return -W * (share * logs[0] + (1 - share) * logs[1])

    def divergences(self, edges: np.ndarray, *, sampled: bool) -> np.ndarray:
        """Compute the divergences (P,) of pairs from their merged components, or upper bounds on them."""
        D = self.features
        numbers = D * (D if self.kind.coupled else 1) + (2 * _POINTS * D if sampled else 0)
        if not self.tied:
            points = noise(D).to(self.means) if sampled else None
            found = reductions.pair_costs(self.w, self.means, self.spreads, self.kind, torch.from_numpy(edges), points)
            if found is not None:
                return found.numpy()
        parts = np.array_split(edges, max(1, -(-len(edges) * numbers // (4 * _NUMBERS))))
        return np.concatenate(
            [self._cost(torch.from_numpy(part).to(self.means.device), sampled).cpu().numpy() for part in parts]
        )

    def _cost(self, pairs: Tensor, sampled: bool) -> Tensor:
        """Compute the costs (P,) of merging pairs (P, 2) by operations of torch."""
        i, j = pairs.unbind(1)
        share, mean, spread = self._merged(i, j)
        whole = self._factor(spread)
        logs = whole.log_determinant()
        if self.tied:
            return (self._factor(self.spreads).log_determinant() - logs).clamp(min=0)
        a, b = self.w[i], self.w[j]
        W, one, two = a + b, self._factor(self.spreads[i]), self._factor(self.spreads[j])
        bound = (a * one.log_determinant() + b * two.log_determinant() - W * logs).clamp(min=0)
        if not sampled:
            return bound
        z = noise(self.features).to(self.means)
        own = z.square().sum(1)
        found = torch.zeros_like(bound)
        for this, other, mine, theirs, mass, rest in ((i, j, one, two, a, b), (j, i, two, one, b, a)):
            # Points of one component, relative to its mean.
            x = self._map(self._inverse(mine.U), z)
            first = mass.log()[:, None] + mine.log_determinant()[:, None] - 0.5 * own
            second = rest.log()[:, None] + self._exponents(x, self.means[this] - self.means[other], theirs)
            gain = (
                torch.logaddexp(first, second) - W.log()[:, None] - self._exponents(x, self.means[this] - mean, whole)
            )
            found = found + torch.where(mass > 0, mass * gain.mean(1), 0.0)
        entropy = -torch.xlogy(share, share) - torch.xlogy(1 - share, 1 - share)
        return torch.minimum(torch.maximum(found, bound - W * entropy), bound).clamp(min=0)

    def _factor(self, spread: Tensor) -> Factor:
        return self.kind.nearest(spread, self.features, _FLOOR)[0]

    def _inverse(self, U: Tensor) -> Tensor:
        if not self.kind.coupled:
            return 1 / U
        return torch.linalg.solve_triangular(U, torch.eye(self.features).to(U).expand_as(U), upper=True)

    def _map(self, matrices: Tensor, z: Tensor) -> Tensor:
        """Compute M_pᵀ z (P, S, D) for vectors z (S, D) or (P, S, D)."""
        return z @ matrices if self.kind.coupled else z * matrices.unsqueeze(-2)

    def _exponents(self, x: Tensor, shift: Tensor, factor: Factor) -> Tensor:
        """Compute the exponents (P, S) of points x + shift, relative to the means of components."""
        return factor.log_determinant()[:, None] - 0.5 * self._map(factor.U, x + shift[:, None]).square().sum(-1)

    def _best(self, edges: np.ndarray, costs: np.ndarray, most: int) -> np.ndarray:
        """Return the positions of the least costly pairs, in their order; both components of a pair have no better partner."""
        if most == 1:
            return np.array([costs.argmin()])
        order = np.argsort(costs, kind="stable")
        first = np.full(self.K, len(edges))
        place = np.arange(len(edges))
        for column in (0, 1):
            np.minimum.at(first, edges[order, column], place)
        mutual = (first[edges[order, 0]] == place) & (first[edges[order, 1]] == place)
        return order[mutual][:most]

    def _merge(self, pairs: np.ndarray, costs: np.ndarray) -> None:
        """Merge disjoint pairs (P, 2)."""
        i, j = torch.from_numpy(pairs).to(self.means.device).unbind(1)
        _, mean, spread = self._merged(i, j)
        if self.tied:
            spread = self.spreads + (spread - self.spreads).sum(0, keepdim=True)
        self.means[i] = mean
        self.w = self.w.index_put((i,), self.w[i] + self.w[j])
        if self.tied:
            self.spreads = spread
        else:
            self.spreads[i] = spread
        self.alive[pairs[:, 1]] = False
        self.merges.append(np.sort(self.node[pairs], 1))
        self.costs.append(costs)
        self.node[pairs[:, 0]] = self.K + self.count + np.arange(len(pairs))
        self.count += len(pairs)

    def _contract(self, edges: np.ndarray, costs: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Replace merged components in the candidates, whose costs are computed again; return candidates and costs."""
        place = np.arange(self.K)
        place[pairs[:, 1]] = pairs[:, 0]
        touched = np.zeros(self.K, dtype=bool)
        touched[pairs[:, 0]] = True
        edges, first = _unique(place[edges])
        costs = costs[first]
        new = np.ones(len(edges), dtype=bool) if self.tied else touched[edges].any(1)
        if new.any():
            costs[new] = self._costs(edges[new])
        return edges, costs


def _unique(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different pairs (P, 2) of different components, the smaller one first, and their positions."""
    pairs = np.sort(pairs, 1)
    place = np.flatnonzero(pairs[:, 0] < pairs[:, 1])
    kept = pairs[place]
    _, first = np.unique(kept[:, 0] * (1 << 31) + kept[:, 1], return_index=True)
    return kept[first], place[first]
