r"""How many components, of which shape, and how good a clustering they make.

.. math::

    \mathrm{BIC} = -2 \sum_n \log p(x_n) + P \log N, \qquad \mathrm{AIC} = -2 \sum_n \log p(x_n) + 2P, \qquad
    \mathrm{ICL} = \mathrm{BIC} + 2 \sum_n H(r_n)

with P free parameters and H the entropy of a point's responsibilities. References: Schwarz 1978, *Estimating the dimension
of a model*; Akaike 1974, *A new look at the statistical model identification*; Biernacki, Celeux and Govaert 2000,
*Assessing a mixture model for clustering with the integrated completed likelihood*; Rousseeuw 1987, *Silhouettes*.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import ConvergenceWarning, as_choice, as_integer, as_number
from gmmkeops.components import as_tensor, check_finite
from gmmkeops.data import Source, as_generator, as_points, chunked, readable, table_names, weight_unit
from gmmkeops.fitting import EM, FitResult, Method, fit, initialize
from gmmkeops.models import Mixture, as_mixture

__all__ = ["CRITERIA", "Selection", "aic", "anomaly_threshold", "bic", "icl", "score", "select", "silhouette"]

_ROWS = 1 << 16

CRITERIA = ("bic", "aic", "icl")


def _sums(mixture: Mixture, x: Any, weights: Any, *, entropy: bool = False) -> tuple[float, float, float, float]:
    """Σ g ℓ, Σ g, and Σ g H if it is asked for, in a unit of weight; and that unit."""
    as_mixture(mixture)
    total = mass = disorder = unit = 0.0
    for chunk in chunked(x, weights, features=mixture.features, columns=mixture.columns):
        with torch.no_grad():
            values, g = mixture.log_prob(chunk.points).double(), chunk.weights
            if g is not None and len(g):
                unit = unit or weight_unit(float(g.max()))
                g = g / unit
            total += float(values.sum() if g is None else values @ g)
            mass += float(len(values) if g is None else g.sum())
            rows = max(1, (1 << 22) // mixture.components)
            for start in range(0, len(values) if entropy else 0, rows):
                h = torch.special.entr(mixture.responsibilities(chunk.points[start : start + rows])).sum(1).double()
                disorder += float(h.sum() if g is None else h @ g[start : start + rows])
    return total, mass, disorder, unit or 1.0


def score(mixture: Mixture, x: Any, *, weights: Any = None) -> float:
    r"""Mean log-density :math:`\sum_n g_n \log p(x_n) / \sum_n g_n`, nats per point; arguments and errors as for :func:`bic`.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> round(gk.analysis.score(m, [[0.0], [1.0]]), 4)  # -log(2π)/2 - 1/4
        -1.1689
    """
    total, mass, _, _ = _sums(mixture, x, weights)
    return total / mass


def bic(mixture: Mixture, x: Any, *, weights: Any = None) -> float:
    r"""Bayesian information criterion :math:`-2 \sum_n g_n \log p(x_n) + P \log \sum_n g_n`, the lower the better.

    Args:
        mixture: One mixture, with P free parameters.
        x: Points (N, D), data units; or what :meth:`gmmkeops.Source.of` takes, here and in all of this module.
        weights: Weight of each point (N,); their sum stands for N.

    Returns:
        Twice nats, of all points together.

    Raises:
        TypeError, ValueError: Points or weights that are not numeric, of the wrong shape, or not finite.

    Reference:
        Schwarz 1978, *Estimating the dimension of a model*, The Annals of Statistics 6.

    Example:
        >>> import math, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")  # two parameters
        >>> x = [[0.0], [1.0], [2.0]]
        >>> gk.analysis.bic(m, x) == -6 * gk.analysis.score(m, x) + 2 * math.log(3)
        True
    """
    total, mass, _, unit = _sums(mixture, x, weights)
    return -2 * total * unit + mixture.parameter_count * (math.log(mass) + math.log(unit))


def aic(mixture: Mixture, x: Any, *, weights: Any = None) -> float:
    r"""Akaike information criterion :math:`-2 \sum_n g_n \log p(x_n) + 2 P`; arguments, units and errors as for :func:`bic`.

    Reference:
        Akaike 1974, *A new look at the statistical model identification*, IEEE Transactions on Automatic Control 19.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0]], [1.0], "spherical")
        >>> gk.analysis.aic(m, [[0.0], [1.0]]) == -4 * gk.analysis.score(m, [[0.0], [1.0]]) + 2 * 2
        True
    """
    total, _, _, unit = _sums(mixture, x, weights)
    return -2 * total * unit + 2 * mixture.parameter_count


def icl(mixture: Mixture, x: Any, *, weights: Any = None) -> float:
    """Integrated completed likelihood, the lower the better: BIC plus twice the entropy of the assignments.

    Arguments, units and errors as for :func:`bic`.

    Reference:
        Biernacki, Celeux and Govaert 2000, *Assessing a mixture model for clustering with the integrated completed
        likelihood*, IEEE Transactions on Pattern Analysis and Machine Intelligence 22.

    Example:
        >>> import math, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([0.5, 0.5], [[0.0], [0.0]], [1.0, 1.0], "spherical")  # nothing tells them apart
        >>> x = [[0.0], [1.0], [2.0]]
        >>> round(gk.analysis.icl(m, x) - gk.analysis.bic(m, x), 6) == round(2 * 3 * math.log(2), 6)
        True
    """
    total, mass, disorder, unit = _sums(mixture, x, weights, entropy=True)
    return 2 * (disorder - total) * unit + mixture.parameter_count * (math.log(mass) + math.log(unit))


def anomaly_threshold(mixture: Mixture, x: Any, percentile: float = 5.0) -> float:
    """The log-density (nats) below which ``percentile`` per cent of the points lie; what scores lower is anomalous.

    Args:
        mixture: One mixture.
        x: Points (N, D) that are mostly normal, data units.
        percentile: Between 0 and 100.

    Raises:
        ValueError: The percentile is out of range.

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
            for chunk in chunked(x, features=mixture.features, columns=mixture.columns)
        ]
    values = torch.cat(parts).sort().values
    place = percentile / 100 * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (place - low) * (values[high] - values[low]))


def silhouette(
    x: Any, labels: Any, *, samples: int | None = 10_000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    r"""Mean silhouette :math:`(b - a) / \max(a, b)` of a clustering, from -1 to 1.

    Args:
        x: Points (N, D), data units.
        labels: Cluster of each point (N,), at least two of them.
        samples: The exact form needs all distances, so it is taken on so many points drawn at random; None takes all.
        generator: Random number generator that draws the sample. Without one a fixed seed is used, so that the same call
            gives the same result in every process.

    Returns:
        The exact silhouette of that sample (as scikit-learn's ``silhouette_score``), and the centroid form of all points,
        where a and b are distances to the own and to the nearest other cluster's mean.

    Raises:
        ValueError: Labels of another length, or fewer than two clusters.

    Reference:
        Rousseeuw 1987, *Silhouettes*, Journal of Computational and Applied Mathematics 20.

    Example:
        >>> import gmmkeops as gk
        >>> exact, centroid = gk.analysis.silhouette([[0.0], [0.0], [4.0], [4.0]], [0, 0, 1, 1])
        >>> exact, centroid
        (1.0, 1.0)
    """
    points = as_points(x, minimum=2).double()
    label = as_tensor(labels, name="labels", dtype=torch.float64, device=points.device)
    if label.shape != points.shape[:1]:
        raise ValueError(f"labels must have shape ({len(points)},), one per point, got {tuple(label.shape)}.")
    check_finite(label, name="labels")
    samples = None if samples is None else as_integer(samples, "samples", 2)
    kinds, label = label.unique(return_inverse=True)
    K = len(kinds)
    if K < 2:
        raise ValueError(f"a silhouette needs at least two clusters, got {K}.")
    counts = torch.bincount(label, minlength=K).double()
    means = torch.zeros(K, points.shape[1], dtype=torch.float64, device=points.device)
    means = means.index_add(0, label, points) / counts[:, None]
    total = 0.0
    for part, own in zip(points.split(_ROWS), label.split(_ROWS), strict=True):
        distance = torch.cdist(part, means)
        a = distance.gather(1, own[:, None])[:, 0]
        b = distance.scatter(1, own[:, None], math.inf).amin(1)
        total += float(((b - a) / torch.maximum(a, b).clamp(min=1e-300)).sum())
    return _exact_silhouette(points, label, K, samples, generator), total / len(points)


def _exact_silhouette(
    points: Tensor, label: Tensor, K: int, samples: int | None, generator: torch.Generator | None
) -> float:
    if samples is not None and samples < len(points):
        generator = as_generator(generator, points.device)
        rows = torch.randperm(len(points), generator=generator, device=points.device)[:samples]
        points, label = points[rows], label[rows]
    onehot = torch.nn.functional.one_hot(label, K).double()
    counts = onehot.sum(0)
    values = []
    for start in range(0, len(points), 1024):
        own = label[start : start + 1024]
        sums = torch.cdist(points[start : start + 1024], points) @ onehot
        mine = counts[own]
        a = sums.gather(1, own[:, None])[:, 0] / (mine - 1).clamp(min=1)
        others = (sums / counts.clamp(min=1)).masked_fill(counts == 0, math.inf)
        b = others.scatter(1, own[:, None], math.inf).amin(1)
        value = (b - a) / torch.maximum(a, b).clamp(min=1e-300)
        values.append(torch.where(mine > 1, value, torch.zeros_like(value)))
    return float(torch.cat(values).mean())


@dataclass(frozen=True)
class Selection:
    """A sweep over models.

    Args:
        rows: One dict per model: "covariance_type", "components", "log_likelihood" (mean, nats per point), "parameters",
            "bic", "aic", "icl", "iterations", "seconds", "converged".
        criterion: What "best" goes by.
        results: The fits, in the order of the rows.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.cat([torch.linspace(-1, 1, 99), torch.linspace(9, 11, 99)]).double()[:, None]
        >>> table = gk.analysis.select(x, [1, 2], ["spherical"])
        >>> table.best.components, [row["components"] for row in table.rows]
        (2, [1, 2])
    """

    rows: list[dict[str, Any]]
    criterion: str
    results: list[FitResult]

    @property
    def best(self) -> Mixture:
        """The mixture with the lowest criterion."""
        values = [row[self.criterion] for row in self.rows]
        return self.results[values.index(min(values))].mixture

    def __str__(self) -> str:
        names = [
            "covariance_type",
            "components",
            "parameters",
            "log_likelihood",
            "bic",
            "aic",
            "icl",
            "iterations",
            "seconds",
        ]
        least = min(row[self.criterion] for row in self.rows)
        cells = [[_cell(row[name]) for name in names] for row in self.rows]
        widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
        lines = ["  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))]
        for row, line in zip(self.rows, cells, strict=True):
            mark = "  <- best" if row[self.criterion] == least else ""
            lines.append("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + mark)
        return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def select(
    x: Any,
    components: Iterable[int],
    covariance_types: Sequence[str] = ("full",),
    *,
    method: Method[Any] | None = None,
    criterion: str = "bic",
    weights: Any = None,
    runs: int = 3,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Selection:
    """Fits every combination and tabulates the criteria.

    The centres of each number of components are found once, on a sample, and serve every covariance type.

    Args:
        x: Points (N, D), data units.
        components: Numbers of components to try.
        covariance_types: Covariance types to try.
        method: How to fit; ``gmmkeops.EM()`` if left out.
        criterion: ``"bic"``, ``"aic"`` or ``"icl"``.
        weights: Weight of each point (N,), or None.
        runs: Runs of k-means for each start.
        generator: Random number generator. Without one a fixed seed is used, so that the same call gives the same result
            in every process.
        **options: Passed on to :func:`gmmkeops.fit`.

    Returns:
        A :class:`Selection`; print it for the table, and see :func:`gmmkeops.plotting.selection` for the picture.

    Raises:
        ValueError: An unknown criterion, or nothing to try.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
        >>> x[:150] += 8
        >>> gk.analysis.select(x, [1, 2, 3]).best.components
        2
    """
    as_choice(criterion, "criterion", CRITERIA)
    if not isinstance(components, Iterable) or isinstance(components, (str, bytes)):
        raise TypeError(
            f"components must be a list of integers, got {type(components).__name__}; pass for example [2, 3, 4]."
        )
    if isinstance(covariance_types, (str, bytes)) or not isinstance(covariance_types, Iterable):
        raise TypeError(
            f"covariance_types must be a list of names, got {covariance_types!r}; pass for example ['full']."
        )
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"method must be a Method such as gmmkeops.EM(), got {type(method).__name__}.")
    unknown = sorted(set(options) - set(inspect.signature(fit).parameters))
    if unknown:
        raise TypeError(f"select has no argument {unknown[0]!r}, and gmmkeops.fit has none; see their documentation.")
    points, g = (Source.of(x, weights=weights), None) if readable(x) else (as_points(x), weights)
    names = points.columns if isinstance(points, Source) else table_names(x)
    device = points.device if isinstance(points, Tensor) else torch.device("cpu")
    numbers = [as_integer(number, "each of components", 1) for number in components]
    covariance_types = list(covariance_types)
    if not numbers or not covariance_types:
        raise ValueError("components and covariance_types must not be empty; pass at least one of each.")
    generator = as_generator(generator, device)
    rows, results = [], []
    for K in numbers:
        seed = int(torch.randint(1 << 62, (1,), generator=generator, device=device))
        for kind in covariance_types:
            same = torch.Generator(device).manual_seed(seed)
            start = initialize(points, K, "kmeans", covariance_type=kind, sample_weight=g, n_init=runs, generator=same)
            start = start.named(names)
            with warnings.catch_warnings():
                # The table says which fits did not converge.
                warnings.simplefilter("ignore", ConvergenceWarning)
                result = fit(start, points, method or EM(), sample_weight=g, **{"progress": False} | options)
            mixture = result.mixture
            results.append(result)
            rows.append(
                {
                    "covariance_type": kind,
                    "components": K,
                    "log_likelihood": result.log_likelihood,
                    "parameters": mixture.parameter_count,
                    "bic": bic(mixture, points, weights=g),
                    "aic": aic(mixture, points, weights=g),
                    "icl": icl(mixture, points, weights=g),
                    "iterations": result.n_iter,
                    "seconds": result.report.seconds,
                    "converged": result.converged,
                }
            )
    return Selection(rows, criterion, results)
