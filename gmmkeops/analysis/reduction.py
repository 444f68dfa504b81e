"""Reduction of a mixture to fewer components."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gmmkeops._checks import as_choice, as_integer
from gmmkeops.models import COSTS, MergeTree, Mixture, as_mixture, merge_down, merged_by

__all__ = ["MergeTree", "Reduction", "reduce"]


class Reduction(NamedTuple):
    """Result of :func:`reduce`.

    Args:
        mixture: The reduced mixture.
        tree: The merges, with their costs.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.5, 0.5], means=[[0.0], [0.1]], covariances=[1.0, 1.0], covariance_type="spherical")
        >>> gk.analysis.reduce(m, 1).mixture.means.round(decimals=4).tolist()
        [[0.05]]
    """

    mixture: Mixture
    tree: MergeTree


def reduce(mixture: Mixture, n_components: int, *, cost: str = "divergence") -> Reduction:
    r"""Reduce a mixture to fewer components by merging pairs of components, the least costly ones first.

    A merged component has the weight, mean and covariance of its pair, so that the mean of the mixture is kept (and its
    covariance, if the covariances are full). The default cost of a merge is

    .. math:: d_{ij} = (w_i + w_j) \, \mathrm{KL}\!\left( \tfrac{w_i p_i + w_j p_j}{w_i + w_j} \,\Big\|\, p_{ij} \right)

    in nats per point. For many components only neighbors are candidates, and mutually best pairs are merged together, so that
    the time is proportional to the number of components (apart from the search for neighbors).

    Args:
        mixture: A mixture of any family; weights may be zero.
        n_components: Number of components that remain.
        cost: ``"divergence"`` estimates the formula above at fixed quasi-random points. ``"bound"`` is Runnalls' upper bound
            :math:`\frac12 [(w_i + w_j) \log |\Sigma_{ij}| - w_i \log |\Sigma_i| - w_j \log |\Sigma_j|]`, which takes less time
            and favors merges of components of small weight. ``"classification"`` is this bound minus
            :math:`w_i \log \frac{w_i + w_j}{w_i} + w_j \log \frac{w_i + w_j}{w_j}`, the loss of the likelihood of points and
            labels. It is a lower bound of the divergence, may be negative, and keeps small separate clusters. Components with a
            common (tied) covariance use the upper bound instead of the divergence.

    Returns:
        The reduced mixture, float64, and the tree of merges; :meth:`MergeTree.labels` tells which components were merged.

    Raises:
        TypeError: The argument is not a mixture.
        ValueError: ``n_components`` is not between 1 and the number of components, the cost is unknown, or the mixture is a
            batch.

    Reference:
        Runnalls 2007, *Kullback-Leibler approach to Gaussian mixture reduction*, IEEE TAES 43.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.2, 0.2, 0.6], means=[[0.0], [0.2], [9.0]], covariances=[[[1.0]]] * 3)
        >>> reduced, tree = gk.analysis.reduce(m, 2)
        >>> reduced.weights.round(decimals=2).tolist(), reduced.means.round(decimals=2).tolist()
        ([0.4, 0.6], [[0.1], [9.0]])
        >>> bool(tree.costs[0] < 1e-4)
        True
    """
    K = as_mixture(mixture).n_components
    n = as_integer(n_components, "n_components", 1)
    if n > K:
        raise ValueError(f"n_components must be at most {K}, the number of components, got {n}.")
    as_choice(cost, "cost", COSTS)
    with torch.no_grad():
        tree = merge_down(mixture, n, cost=cost)
        return Reduction(merged_by(mixture, tree.labels(n), n), tree)
