r"""Scores, information criteria and anomaly thresholds of a mixture.

.. math::

    \mathrm{BIC} = -2 \sum_n \log p(x_n) + P \log N, \qquad \mathrm{AIC} = -2 \sum_n \log p(x_n) + 2P, \qquad
    \mathrm{AIC3} = -2 \sum_n \log p(x_n) + 3P, \qquad \mathrm{ICL} = \mathrm{BIC} + 2 \sum_n H(r_n)

Here P is the number of free parameters, and H the entropy of the responsibilities of a point. With hard assignments, ICL contains
the negative logarithm of the largest responsibility instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gmmkeops._checks import accepts, as_number, renamed
from gmmkeops.data import World, chunked, weight_unit
from gmmkeops.models import Mixture, as_mixture

__all__ = ["CRITERIA", "aic", "aic3", "anomaly_threshold", "bic", "criteria", "icl", "score"]

CRITERIA = ("bic", "aic", "aic3", "icl", "icl_hard")

# Maximum number of responsibilities (rows, K) in memory.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Sums:
    """Sums over points, divided by a unit: a power of two near the largest weight, so that extreme weights do not overflow.

    Args:
        total: Sum of the log-densities.
        count: Sum of the weights.
        entropies: Sum of the entropies of the responsibilities; 0 if they were not requested.
        doubts: Sum of the negative logarithms of the largest responsibilities; 0 if they were not requested.
        unit: The unit.
    """

    total: float
    count: float
    entropies: float
    doubts: float
    unit: float

    @classmethod
    @renamed("weights", "sample_weight")
    def of(cls, mixture: Mixture, x: Any, weights: Any, *, labels: bool = False) -> _Sums:
        """Compute the sums, with those of responsibilities if ``labels`` is True."""
        as_mixture(mixture)
        total = count = entropies = doubts = unit = 0.0
        for chunk in chunked(x, weights, features=mixture.n_features, columns=mixture.columns):
            with torch.no_grad():
                values, g = mixture.log_prob(chunk.points).double(), chunk.weights
                if g is not None and len(g):
                    unit = unit or weight_unit(float(g.max()))
                    g = g / unit
                total += float(values.sum() if g is None else values @ g)
                count += float(len(values) if g is None else g.sum())
                rows = max(1, _CHUNK // mixture.n_components)
                for first in range(0, len(values) if labels else 0, rows):
                    r = mixture.responsibilities(chunk.points[first : first + rows])
                    some = None if g is None else g[first : first + rows]
                    h, loss = torch.special.entr(r).sum(1).double(), -r.amax(1).log().double()
                    entropies += float(h.sum() if some is None else h @ some)
                    doubts += float(loss.sum() if some is None else loss @ some)
        return cls(total, count, entropies, doubts, unit or 1.0)

    def criteria(self, parameters: int) -> dict[str, float]:
        """Return all criteria by their names, for a number of free parameters; nats, summed over all points."""
        unit = self.unit
        bic = -2 * self.total * unit + parameters * (math.log(self.count) + math.log(unit))
        return {
            "bic": bic,
            "aic": -2 * self.total * unit + 2 * parameters,
            "aic3": -2 * self.total * unit + 3 * parameters,
            "icl": bic + 2 * self.entropies * unit,
            "icl_hard": bic + 2 * self.doubts * unit,
        }


def sample_criteria(mixture: Mixture, x: Any, weights: Any, total: float) -> tuple[float, dict[str, float]]:
    """Compute the mean log-likelihood of a sample, and all criteria for points of this mean and a total weight."""
    sums = _Sums.of(mixture, x, weights, labels=True)
    scale = total / sums.count
    whole = _Sums(sums.total * scale, total, sums.entropies * scale, sums.doubts * scale, 1.0)
    return sums.total / sums.count, whole.criteria(mixture.parameter_count)


def criteria(mixture: Mixture, x: Any, weights: Any, world: World) -> dict[str, float]:
    """Compute the mean log-likelihood and all criteria of a mixture in one pass over the points of all ranks.

    Args:
        mixture: The mixture.
        x: Points (N, D), or the shard of a source of this rank.
        weights: Weights (N,), or None.
        world: The process group.
    """
    sums = _Sums.of(mixture, x, weights, labels=True)
    if world.size > 1:
        parts = [sums.total, sums.count, sums.entropies, sums.doubts]
        whole = world.sum(torch.tensor([part * sums.unit for part in parts], dtype=torch.float64))
        total, count, entropies, doubts = whole.tolist()
        sums = _Sums(total, count, entropies, doubts, 1.0)
    return {"log_likelihood": sums.total / sums.count, **sums.criteria(mixture.parameter_count)}


@accepts(old={"weights": "sample_weight"})
def score(mixture: Mixture, x: Any, *, sample_weight: Any = None) -> float:
    r"""Compute the mean log-density :math:`\sum_n g_n \log p(x_n) / \sum_n g_n`, nats per point.

    Arguments and errors are as for :func:`bic`.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> round(gk.analysis.score(m, [[0.0], [1.0]]), 4)  # -log(2π)/2 - 1/4
        -1.1689
    """
    sums = _Sums.of(mixture, x, sample_weight)
    return sums.total / sums.count


@accepts(old={"weights": "sample_weight"})
def bic(mixture: Mixture, x: Any, *, sample_weight: Any = None) -> float:
    r"""Compute the Bayesian information criterion :math:`-2 \sum_n g_n \log p(x_n) + P \log \sum_n g_n` (lower is better).

    Args:
        mixture: A single mixture, with P free parameters.
        x: Points (N, D), data units; or any data that :meth:`gmmkeops.Source.of` accepts.
        sample_weight: Weight g of each point (N,), or None. The sum of the weights replaces N.

    Returns:
        The criterion, nats, summed over all points.

    Raises:
        TypeError, ValueError: Points or weights are not numeric, not finite, or have the wrong shape.

    Reference:
        Schwarz 1978, *Estimating the dimension of a model*, The Annals of Statistics 6.

    Example:
        >>> import math, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")  # two parameters
        >>> x = [[0.0], [1.0], [2.0]]
        >>> gk.analysis.bic(m, x) == -6 * gk.analysis.score(m, x) + 2 * math.log(3)
        True
    """
    return _Sums.of(mixture, x, sample_weight).criteria(mixture.parameter_count)["bic"]


@accepts(old={"weights": "sample_weight"})
def aic(mixture: Mixture, x: Any, *, sample_weight: Any = None) -> float:
    r"""Compute the Akaike information criterion :math:`-2 \sum_n g_n \log p(x_n) + 2 P` (lower is better).

    Arguments, units and errors are as for :func:`bic`.

    Reference:
        Akaike 1974, *A new look at the statistical model identification*, IEEE Transactions on Automatic Control 19.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> gk.analysis.aic(m, [[0.0], [1.0]]) == -4 * gk.analysis.score(m, [[0.0], [1.0]]) + 2 * 2
        True
    """
    return _Sums.of(mixture, x, sample_weight).criteria(mixture.parameter_count)["aic"]


def aic3(mixture: Mixture, x: Any, *, sample_weight: Any = None) -> float:
    r"""Compute Akaike's criterion with the penalty for mixtures, :math:`-2 \sum_n g_n \log p(x_n) + 3 P` (lower is better).

    Arguments, units and errors are as for :func:`bic`.

    A component that is not needed increases the likelihood by more than as many such parameters of other models do: twice the
    increase of the log-likelihood has approximately a chi-squared distribution with twice as many degrees of freedom as the
    component has parameters, where other models have as many (Wolfe 1971). For this distribution, Bozdogan derived a penalty of 3
    for each parameter instead of 2. In contrast to the penalty of BIC it does not increase with the number of points, so that
    AIC3 splits clusters of many points that are not Gaussian.

    Reference:
        Bozdogan 1994, *Mixture-model cluster analysis using model selection criteria and a new informational measure of
        complexity*, Proceedings of the First US/Japan Conference on the Frontiers of Statistical Modeling 2; Andrews and Currim
        2003, *A comparison of segment retention criteria for finite mixture logit models*, Journal of Marketing Research 40.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> gk.analysis.aic3(m, [[0.0], [1.0]]) == -4 * gk.analysis.score(m, [[0.0], [1.0]]) + 3 * 2
        True
    """
    return _Sums.of(mixture, x, sample_weight).criteria(mixture.parameter_count)["aic3"]


@accepts(old={"weights": "sample_weight"})
def icl(mixture: Mixture, x: Any, *, sample_weight: Any = None, hard: bool = False) -> float:
    """Compute the integrated completed likelihood criterion (lower is better): BIC plus a term for components that overlap.

    Arguments, units and errors are as for :func:`bic`.

    Args:
        hard: False for twice the entropy of the responsibilities (McLachlan and Peel 2000, *Finite mixture models*, section
            6.10); True for minus twice the logarithm of the largest responsibility, summed over the points, as in the likelihood
            of the points and their most probable components (Biernacki et al.). In :func:`select`, the criteria are called
            ``"icl"`` and ``"icl_hard"``.

    Reference:
        Biernacki, Celeux and Govaert 2000, *Assessing a mixture model for clustering with the integrated completed
        likelihood*, IEEE Transactions on Pattern Analysis and Machine Intelligence 22.

    Example:
        >>> import math, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([0.5, 0.5], [[0.0], [0.0]], [1.0, 1.0], "spherical")  # two equal components
        >>> x = [[0.0], [1.0], [2.0]]
        >>> round(gk.analysis.icl(m, x) - gk.analysis.bic(m, x), 6) == round(2 * 3 * math.log(2), 6)
        True
    """
    sums = _Sums.of(mixture, x, sample_weight, labels=True)
    return sums.criteria(mixture.parameter_count)["icl_hard" if hard else "icl"]


def anomaly_threshold(mixture: Mixture, x: Any, percentile: float = 5.0) -> float:
    """Compute the log-density below which ``percentile`` percent of the points lie, as a threshold for anomalies.

    Args:
        mixture: A single mixture.
        x: Points (N, D), data units, most of which are not anomalies.
        percentile: Number from 0 to 100.

    Returns:
        The threshold, nats. Points with a lower log-density are considered anomalies.

    Raises:
        TypeError, ValueError: Points are invalid, or the percentile is out of range.

    Example:
        >>> import torch, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> x = torch.linspace(-2, 2, 1001).double()[:, None]
        >>> round(gk.analysis.anomaly_threshold(m, x, 50), 3) == round(float(m.log_prob([[1.0]])[0]), 3)
        True
    """
    as_mixture(mixture)
    if not 0 <= as_number(percentile, "percentile") <= 100:
        raise ValueError(f"percentile must be between 0 and 100, got {percentile}.")
    with torch.no_grad():
        parts = [
            mixture.log_prob(chunk.points).double()
            for chunk in chunked(x, features=mixture.n_features, columns=mixture.columns)
        ]
    values = torch.cat(parts).sort().values
    place = percentile / 100 * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (place - low) * (values[high] - values[low]))
