r"""Mixtures of Student's t: what is left of a Gaussian mixture when its parameters are integrated out.

.. math:: t_d(x; m, UU^\top) = \frac{\Gamma(\frac{d+D}2)\,|U|}{\Gamma(\frac d2)\,(d\pi)^{D/2}}
          \Bigl(1 + \frac{\lVert U^\top (x-m) \rVert^2}{d}\Bigr)^{-\frac{d+D}2}

Diagonal precisions are integrated out column by column, so theirs is a product over columns. Reference: Bishop 2006,
*Pattern Recognition and Machine Learning*, §2.3.7.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from gmmkeops.components import Factor
from gmmkeops.data import as_points, generator_on, table_of
from gmmkeops.models import Mixture

__all__ = ["StudentMixture"]

# Numbers that an intermediate (rows, K, D) array may hold.
_CHUNK = 1 << 22


class StudentMixture(Distribution):
    r"""A mixture of K Student's t distributions in D dimensions.

    .. math:: p(x) = \sum_k W_k\, \frac{\Gamma((d_k + D) / 2)}{\Gamma(d_k / 2) (d_k \pi)^{D/2}} |\det U_k|
              \Bigl(1 + \frac{\lVert U_k^\top (x - m_k) \rVert^2}{d_k}\Bigr)^{-(d_k + D) / 2}

    With diagonal factors each component is a product of one-dimensional ones.

    Args:
        logits: Unnormalized log-weights (K,), nats.
        means: Locations (K, D), data units.
        factor: Scales: U with leading dimension K, 1 / data units.
        degrees: Degrees of freedom (K,).

    Attributes:
        columns: Names of the D columns, or None where they are not known; tables are matched to them by name.

    Reference:
        Bishop 2006, *Pattern Recognition and Machine Learning*, equations 10.81 and 10.82.

    Example:
        >>> import torch, gmmkeops as gk
        >>> factor = gk.SphericalFactor(torch.zeros(1, 1).double(), 1)
        >>> cauchy = gk.bayes.StudentMixture(torch.zeros(1).double(), torch.zeros(1, 1).double(), factor, torch.ones(1).double())
        >>> torch.allclose(cauchy.log_prob([[2.0]]), torch.distributions.Cauchy(0.0, 1.0).log_prob(torch.tensor(2.0)).double())
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False
    columns: tuple[str, ...] | None = None

    def __init__(self, logits: Tensor, means: Tensor, factor: Factor, degrees: Tensor) -> None:
        self.logits, self.means, self.factor, self.degrees = logits, means, factor, degrees
        super().__init__(torch.Size(), means.shape[-1:], validate_args=False)

    def log_joint(self, value: Any) -> Tensor:
        """log W_k + log t_k(x) for points (N, D), data units: (N, K), nats."""
        x = as_points(table_of(value, self.columns), features=self.means.shape[1], differentiable=True)
        rows = max(1, _CHUNK // self.means.numel())
        return torch.cat([self._exponents(part.to(self.means)) for part in x.split(rows)]).to(x.dtype)

    def _exponents(self, x: Tensor) -> Tensor:
        d, D = self.degrees, self.means.shape[1]
        squares = self.factor.whiten(x[:, None, :] - self.means).square()
        wide = self.factor.student_width(D)
        squares = squares if wide == 1 else squares.sum(-1, keepdim=True)
        shapes = torch.lgamma(0.5 * (d + wide)) - torch.lgamma(0.5 * d) - 0.5 * wide * (d * math.pi).log()
        constant = torch.log_softmax(self.logits, 0) + self.factor.log_determinant() + D // wide * shapes
        return constant - 0.5 * ((d + wide)[:, None] * torch.log1p(squares / d[:, None])).sum(-1)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of points (N, D), data units: (N,), nats.

        Raises:
            TypeError, ValueError: Points that are not numeric, of the wrong width, or not finite.
        """
        x = as_points(table_of(value, self.columns), features=self.means.shape[1], differentiable=True)
        rows = max(1, _CHUNK // self.means.numel())
        parts = [torch.logsumexp(self._exponents(part.to(self.means)), -1) for part in x.split(rows)]
        return torch.cat(parts).to(x.dtype)

    @property
    def mean(self) -> Tensor:
        """Mean (D,), data units; that of the locations where degrees are one or less."""
        return torch.softmax(self.logits, 0) @ self.means

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance (D, D), squared data units; infinite where degrees are two or less."""
        grow = torch.where(self.degrees > 2, self.degrees / (self.degrees - 2).clamp(min=1e-300), math.inf)
        W = torch.softmax(self.logits, 0)
        away = self.means - self.mean
        return ((W * grow)[:, None, None] * self.factor.covariances()).sum(0) + (away * W[:, None]).T @ away

    @property
    def variance(self) -> Tensor:
        """Variances (D,), squared data units."""
        return self.covariance_matrix.diagonal()

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draws points (*S, D), data units; without a generator by torch's global one, as all distributions of torch do."""
        shape = torch.Size([sample_shape] if isinstance(sample_shape, int) else sample_shape)
        count, D = shape.numel(), self.means.shape[1]
        generator = generator_on(generator, self.means.device)
        gaussian = Mixture(self.logits, torch.zeros_like(self.means), self.factor, validate_args=False)
        noise, labels = gaussian.sample(count, return_labels=True, generator=generator)
        d = self.degrees[labels][:, None].expand(-1, D // self.factor.student_width(D))
        chi = torch._standard_gamma((0.5 * d).contiguous(), generator=generator) / (0.5 * d)
        return (self.means[labels] + noise / chi.sqrt()).reshape(*shape, D)
