"""Marginal and conditional distributions of a mixture, which are mixtures in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gmmkeops._checks import as_integer
from gmmkeops.components import as_tensor, check_finite

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture

__all__ = ["condition", "marginal"]


def marginal(mixture: Mixture, columns: Sequence[int] | int) -> Mixture:
    """Return the marginal distribution of some columns, which is a mixture.

    Args:
        columns: Indices of the columns, in the order of the result; negative indices count from the end.

    Raises:
        ValueError: A column does not exist or is given twice.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[1.0], means=[[1.0, 2.0]], covariances=[[[2.0, 1.0], [1.0, 3.0]]]).marginal(1)
        >>> m.mean.tolist(), m.variance.round(decimals=6).tolist()
        ([2.0], [3.0])
    """
    keep = _indices(mixture, columns)
    names = None if mixture.columns is None else [mixture.columns[d] for d in keep]
    return mixture._like(mixture.logits, mixture.means[..., keep], mixture.factor.marginal(keep)).named(names)


def condition(mixture: Mixture, columns: Sequence[int] | int, values: Any) -> Mixture:
    r"""Return the conditional distribution of the other columns given the values of some columns, which is a mixture.

    .. math::

        \mu_{a|b} = \mu_a - P_{aa}^{-1} P_{ab} (x_b - \mu_b), \quad \Sigma_{a|b} = P_{aa}^{-1}, \quad
        W_k \propto W_k\, \mathcal N(x_b; \mu_{k,b}, \Sigma_{k,bb})

    The mean of this distribution is the prediction of Gaussian mixture regression.

    Args:
        columns: Indices of the known columns b.
        values: Values x_b of the known columns: (len(columns),), or (*B, len(columns)) for a batch; data units.

    Returns:
        A mixture of the other columns a, in their order; a batch (*B) of mixtures for values of shape (*B, len(columns)).

    Raises:
        ValueError: A column does not exist or is given twice, no column is left, values have another shape or are not
            finite, or the mixture itself is a batch.

    Reference:
        Bishop 2006, *Pattern Recognition and Machine Learning*, §2.3.1.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[1.0], means=[[0.0, 0.0]], covariances=[[[1.0, 0.5], [0.5, 1.0]]])
        >>> m.condition(0, [2.0]).mean.tolist()
        [1.0]
    """
    given = _indices(mixture, columns)
    rest = [d for d in range(mixture.n_features) if d not in given]
    if not rest:
        raise ValueError("condition needs at least one column that is not given; or use log_prob.")
    if mixture.batch_shape:
        raise ValueError(
            f"condition needs one mixture, got a batch of shape {tuple(mixture.batch_shape)}; "
            "select one of them first, for example mixture[0]."
        )
    x = as_tensor(values, name="values").to(mixture.means)
    if x.ndim == 0 or x.shape[-1] != len(given):
        raise ValueError(f"values must have shape (*, {len(given)}), one per known column, got {tuple(x.shape)}.")
    check_finite(x, name="values")
    logits = marginal(mixture, given).log_joint(x)
    batch = x.shape[:-1]
    means = mixture.means[:, rest].expand(*batch, -1, -1)
    factor, gain = mixture.factor.conditional(given, rest)
    if gain is not None:
        means = means - (gain @ (x.unsqueeze(-2) - mixture.means[:, given]).unsqueeze(-1)).squeeze(-1)
    names = None if mixture.columns is None else [mixture.columns[d] for d in rest]
    return mixture._like(logits, means, factor.expand(batch)).named(names)


def _indices(mixture: Mixture, columns: Sequence[int] | int) -> list[int]:
    """Convert column indices to integers from 0 to D - 1, and check them."""
    one = not isinstance(columns, Iterable) or isinstance(columns, (str, bytes))
    wanted: Any = [columns] if one else columns
    chosen = [as_integer(column, "each column") for column in wanted]
    chosen = [column + mixture.n_features if column < 0 else column for column in chosen]
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= c < mixture.n_features for c in chosen):
        raise ValueError(f"columns must be distinct indices below D={mixture.n_features}, got {columns}.")
    return chosen
