"""Penalties on the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import as_number
from gmmkeops.components import Surrogate, as_tensor
from gmmkeops.models import Mixture
from gmmkeops.penalties.penalty import Penalty

__all__ = ["Dirichlet", "SqrtWeights", "WeightEntropy"]


def _finite(name: str, value: float, least: float, *, strict: bool = False) -> None:
    bound = "greater than" if strict else "at least"
    as_number(value, name, least, above=strict, clause=f"must be finite and {bound} {least:g}")


def _told(values: Tensor) -> str:
    return str(values.tolist()) if values.numel() <= 4 else f"an array of shape {tuple(values.shape)}"


class _OfWeights(Penalty):
    """Base class of penalties on the weights."""

    @property
    def of_weights(self) -> bool:
        # A subclass of the user may depend on other parameters.
        return self.portable


@dataclass(frozen=True)
class SqrtWeights(_OfWeights):
    r"""Sparsity penalty on the square roots of the weights, from the KeOps tutorial.

    .. math:: \frac{s}{K} \sum_k \sqrt{W_k}

    Its derivative grows without bound as a weight approaches zero, so that components of small weight are pruned. The tutorial
    uses s = 20.

    Args:
        strength: Strength s >= 0, nats per point.

    Reference:
        KeOps documentation, *Fitting a Gaussian Mixture Model* (log-likelihood plus sparsity cost).

    Example:
        >>> import torch, gmmkeops as gk
        >>> even = gk.Mixture.from_parameters([0.25] * 4, torch.zeros(4, 1), torch.ones(4, 1), "diag")
        >>> float(gk.penalties.SqrtWeights(20)(even))
        10.0
    """

    strength: float

    def __post_init__(self) -> None:
        _finite("strength", self.strength, 0)

    @property
    def prunes(self) -> bool:
        return self.strength > 0

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        return self.strength * (0.5 * mixture.log_weights).exp().mean()

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        slopes = 0.5 * self.strength / mixture.n_components * (-0.5 * mixture.log_weights).exp()
        return replace(Surrogate.none(mixture), slopes=slopes)


@dataclass(frozen=True)
class WeightEntropy(_OfWeights):
    r"""Entropy of the weights as a penalty.

    .. math:: -s \sum_k W_k \log W_k

    A positive strength favors few components, a negative one favors equal weights.

    Args:
        strength: Strength s, dimensionless.

    Reference:
        Brand 1999, *Structure learning in conditional probability models via an entropic prior*, Neural Computation 11.

    Example:
        >>> import torch, gmmkeops as gk
        >>> even = gk.Mixture.from_parameters([0.5, 0.5], torch.zeros(2, 1), torch.ones(2, 1), "diag")
        >>> round(float(gk.penalties.WeightEntropy(1.0)(even)), 4)
        0.6931
    """

    strength: float

    def __post_init__(self) -> None:
        as_number(self.strength, "strength")

    @property
    def prunes(self) -> bool:
        return self.strength > 0

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        # W log W and its derivative with respect to the logit tend to zero with W; 0 · (-inf) would be NaN.
        logs = mixture.log_weights.masked_fill(mixture.weights == 0, 0.0)
        return -self.strength * (mixture.weights * logs).sum()

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        if self.strength < 0:
            raise TypeError(
                f"EM does not support WeightEntropy with a negative strength, got {self.strength}; use gmmkeops.Adam(...)."
            )
        return replace(Surrogate.none(mixture), slopes=-self.strength * (mixture.log_weights + 1))


@dataclass(frozen=True)
class Dirichlet(_OfWeights):
    r"""Dirichlet prior on the weights, without its normalizing constant.

    .. math:: -\frac1N \sum_k (\alpha_k - 1) \log W_k

    Concentrations above one favor equal weights (no component is then pruned); concentrations below one favor sparse weights;
    one is the uniform distribution.

    Args:
        concentration: Concentration α > 0, one number or one per component (K,).

    Reference:
        Gelman et al. 2013, *Bayesian Data Analysis*, 3rd ed., §22.

    Example:
        >>> import torch, gmmkeops as gk
        >>> even = gk.Mixture.from_parameters([0.5, 0.5], torch.zeros(2, 1), torch.ones(2, 1), "diag")
        >>> round(float(gk.penalties.Dirichlet(2.0)(even, points=10)), 4)
        0.1386
    """

    concentration: Any

    def __post_init__(self) -> None:
        alpha = as_tensor(self.concentration, name="concentration")
        if alpha.ndim > 1 or not bool(((alpha > 0) & torch.isfinite(alpha)).all()):
            raise ValueError(
                f"concentration must be positive and finite, a number or an array (K,), got {_told(alpha)}."
            )

    @property
    def prunes(self) -> bool:
        return bool((as_tensor(self.concentration, name="concentration") < 1).any())

    def __call__(self, mixture: Mixture, points: float = 1.0) -> Tensor:
        alpha = self._alpha(mixture)
        # The uniform prior is constant, also for log-weights of -inf.
        return -((alpha - 1) * mixture.log_weights.masked_fill(alpha == 1, 0.0)).sum() / points

    def m_step(self, mixture: Mixture, points: float) -> Surrogate:
        none = Surrogate.none(mixture)
        return replace(none, counts=none.counts + self._alpha(mixture) - 1)

    def _alpha(self, mixture: Mixture) -> Tensor:
        alpha = as_tensor(self.concentration, name="concentration").to(mixture.logits)
        if alpha.ndim == 1 and alpha.shape[0] != mixture.n_components:
            raise ValueError(
                f"concentration has {alpha.shape[0]} entries, expected {mixture.n_components}, one per component."
            )
        return alpha
