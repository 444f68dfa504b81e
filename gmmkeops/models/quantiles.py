r"""Distribution function and quantiles of mixtures in one dimension.

.. math:: F(x) = \sum_k W_k\, \Phi\bigl((x - \mu_k) / \sigma_k\bigr), \qquad \log F(x) = \log q \text{ or }
          \log (1 - F(x)) = \log (1 - q) \text{ where } q > \tfrac12

Quantiles are computed from the logarithm of the smaller tail probability, which is accurate also near zero and one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmmkeops.components import as_tensor, check_finite, concrete
from gmmkeops.models.points import as_points_of, broadcast
from gmmkeops.reductions import recordable

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture

__all__ = ["cdf", "icdf", "quantile", "quantiles"]

# Every third step halves the bracket, and 2200 halvings reduce any interval of float64 to two adjacent numbers.
_STEPS = 3 * 2200

# Lower bound of the slope in the divisions; its square does not underflow.
_LEAST_SLOPE = 1e-150


def cdf(mixture: Mixture, value: Any) -> Tensor:
    """Compute the cumulative distribution function of a mixture in one dimension.

    Args:
        value: Points (*S, 1), or (*S, *B, 1) for a batch of mixtures; data units.

    Returns:
        Probabilities (*S, *B) in [0, 1], differentiable in points and parameters.

    Raises:
        ValueError: The mixture has more than one column; use :meth:`marginal` first.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[1.0], means=[[0.0]], covariances=[1.0], covariance_type="spherical")
        >>> m.cdf([[0.0], [1.96]]).round(decimals=3).tolist()
        [0.5, 0.975]
    """
    x = as_points_of(mixture, value)
    _check_one_column(mixture)
    if mixture._validate_args:
        # The distribution function is 0 or 1 at infinite points.
        check_finite(torch.where(torch.isinf(x), 0.0, x).reshape(-1, 1), name="x")
    z = (x - mixture.means[..., 0]) * mixture.factor.log_determinant().exp()
    return (mixture.weights * torch.special.ndtr(z)).sum(-1).clamp(max=1)


def quantile(mixture: Mixture, q: Any) -> Tensor:
    """Compute quantiles of a mixture in one dimension, in float64; not differentiable (see :meth:`icdf`).

    Args:
        q: Probabilities (*S) in (0, 1), used for all mixtures of a batch.

    Returns:
        (*S, *B), data units, in the dtype of the means.

    Raises:
        ValueError: The mixture has more than one column, or a probability is not inside (0, 1).

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.5, 0.5], means=[[-2.0], [2.0]], covariances=[1.0, 1.0], covariance_type="spherical")
        >>> m.quantile([0.025, 0.975]).round(decimals=3).tolist()
        [-3.645, 3.645]
    """
    q = as_tensor(q, name="q").to(mixture.means)
    if not bool(((q > 0) & (q < 1)).all()):
        raise ValueError("q must be greater than 0 and less than 1; use icdf for probabilities of 0 and 1.")
    q = q.reshape((*q.shape, *[1] * len(mixture.batch_shape)))
    return _of_mixture(mixture, q.detach()).detach().to(q.dtype)


def icdf(mixture: Mixture, value: Any) -> Tensor:
    """Compute the inverse cumulative distribution function (quantiles) of a mixture in one dimension.

    The quantiles are computed in float64 and rounded to the dtype of the result.

    Args:
        value: Probabilities in [0, 1], shape (*S), or (*S, *B) for a batch of mixtures.

    Returns:
        Points (*S, *B, 1), data units, twice differentiable in probabilities and parameters; -inf for 0, +inf for 1. Without
        validation of values, probabilities outside of [0, 1] give NaN.

    Raises:
        ValueError: The mixture has more than one column (use :meth:`marginal` first), a value is not in [0, 1], or the
            shape does not match the batch.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture(weights=[0.5, 0.5], means=[[-2.0], [2.0]], covariances=[1.0, 1.0], covariance_type="spherical")
        >>> m.icdf([0.025, 0.5, 1.0]).round(decimals=3).tolist()
        [[-3.645], [0.0], [inf]]
    """
    q = recordable(as_tensor(value, name="value", device=mixture.means.device))
    if mixture._validate_args and concrete(q) and not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError("value must contain probabilities from 0 to 1 for icdf; pass values such as cdf returns.")
    return _of_mixture(mixture, q).unsqueeze(-1).to(torch.promote_types(q.dtype, mixture.means.dtype))


def _of_mixture(mixture: Mixture, probabilities: Tensor) -> Tensor:
    """Compute quantiles (*S, *B) of a mixture in one dimension, float64."""
    _check_one_column(mixture)
    precisions = mixture.factor.log_determinant().double().exp()
    probabilities = broadcast(mixture, probabilities, probabilities, "probabilities")
    return quantiles(mixture.log_weights, mixture.means[..., 0], precisions, probabilities)


def _check_one_column(mixture: Mixture) -> None:
    if mixture.n_features > 1:
        raise ValueError(
            f"distribution functions need a mixture with one column, got {mixture.n_features} columns; use marginal(d) first."
        )


def quantiles(log_weights: Tensor, means: Tensor, precisions: Tensor, probabilities: Tensor) -> Tensor:
    """Compute quantiles (*S) of mixtures, float64, with first and second derivatives in all arguments.

    Args:
        log_weights: log W (*S, K), nats.
        means: μ (*S, K), data units.
        precisions: 1 / σ (*S, K) or (*S, 1), 1 / data units.
        probabilities: q (*S). The quantile is -inf for 0, +inf for 1, and NaN for numbers outside of [0, 1].

    Returns:
        (*S), float64, data units.
    """
    inside = (probabilities > 0) & (probabilities < 1)
    q = torch.where(inside, probabilities, 0.5).double()
    # The upper tail of a mixture is the lower tail of the mixture reflected at zero.
    upper = q > 0.5
    sign = torch.where(upper, -1.0, 1.0).to(q)
    tail = torch.where(upper, 1 - q, q)
    arguments = (log_weights.double(), sign.unsqueeze(-1) * means.double(), precisions.double())
    with torch.no_grad():
        x = _solve(*arguments, tail)
    # A Newton step at the solution has length zero but carries derivatives: one step gives first, two give second derivatives.
    for _ in range(2 if torch.is_grad_enabled() else 0):
        value, slope = _log_tail(*arguments, x)
        residual = tail.log() - value
        x = x + (residual - residual.detach()) / slope.clamp(min=_LEAST_SLOPE)
    x = sign * x
    edge = torch.where(probabilities == 0, -math.inf, torch.where(probabilities == 1, math.inf, math.nan)).to(x)
    return torch.where(inside, x, edge)


def _solve(log_weights: Tensor, means: Tensor, precisions: Tensor, tail: Tensor) -> Tensor:
    """Compute quantiles (*S) at lower tail probabilities (*S) of at most 1/2, by Newton's method within a bracket."""
    # The quantile of a mixture is between the smallest and the largest of its components. The margins allow for rounding.
    z = torch.special.ndtri(tail).unsqueeze(-1)
    each = means + z / precisions
    margin = 1e-6 * (1 + z.abs()) / precisions + 1e-12 * means.abs()
    low, high = (each - margin).amin(-1), (each + margin).amax(-1)
    goal = tail.log()
    eps = torch.finfo(goal.dtype).eps
    x = 0.5 * low + 0.5 * high
    for step in range(_STEPS):
        value, slope = _log_tail(log_weights, means, precisions, x)
        low, high = torch.where(value < goal, x, low), torch.where(value < goal, high, x)
        middle = 0.5 * low + 0.5 * high
        # Rounding errors of the logarithms and of x.
        rounding = 4 * eps * (1 + goal.abs()) + eps * x.abs() * slope
        solved = ((value - goal).abs() <= rounding) | (middle <= low) | (middle >= high)
        if bool(solved.all()):
            break
        newton = x + (goal - value) / slope
        inside = (newton > low) & (newton < high) & (step % 3 < 2)
        x = torch.where(solved, x, torch.where(inside, newton, middle))
    return x


def _log_tail(log_weights: Tensor, means: Tensor, precisions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log F (*S), nats, and its derivative (*S), 1 / data units, at points (*S)."""
    # Beyond 1e6 standard deviations probabilities underflow, and torch's derivative of log_ndtr may be infinite.
    z = ((x.unsqueeze(-1) - means) * precisions).clamp(-1e6, 1e6)
    value = torch.logsumexp(log_weights + torch.special.log_ndtr(z), -1)
    density = torch.logsumexp(log_weights + precisions.log() - 0.5 * z.square(), -1) - 0.5 * math.log(2 * math.pi)
    return value, (density - value).exp()
