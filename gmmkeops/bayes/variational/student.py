"""Mixtures of Student's t distributions: the posterior predictive distributions of Gaussian mixtures."""

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

# Maximum number of elements of a temporary (rows, K, D) array.
_CHUNK = 1 << 22


class StudentMixture(Distribution):
    r"""Mixture of K Student's t distributions in D dimensions.

    .. math:: p(x) = \sum_k W_k\, \frac{\Gamma((d_k + D) / 2)}{\Gamma(d_k / 2) (d_k \pi)^{D/2}} |\det U_k|
              \Bigl(1 + \frac{\lVert U_k^\top (x - m_k) \rVert^2}{d_k}\Bigr)^{-(d_k + D) / 2}

    With diagonal factors each component is a product of univariate Student's t distributions.

    Args:
        logits: Unnormalized log-weights (K,), nats.
        means: Locations (K, D), data units.
        factor: Inverse scale factors U_k with leading dimension K, 1 / data units.
        degrees: Degrees of freedom (K,).

    Attributes:
        columns: Names of the D columns, by which the columns of a table are selected; or None.

    Reference:
        Bishop 2006, *Pattern Recognition and Machine Learning*, §2.3.7, equations 10.81 and 10.82.

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
        """Compute the log-joint densities (N, K) of points (N, D) and components, nats."""
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
        """Compute the log-density (N,) of points (N, D), nats.

        Raises:
            TypeError, ValueError: Points that are not numeric or not finite, or have a wrong number of columns.
        """
        x = as_points(table_of(value, self.columns), features=self.means.shape[1], differentiable=True)
        rows = max(1, _CHUNK // self.means.numel())
        parts = [torch.logsumexp(self._exponents(part.to(self.means)), -1) for part in x.split(rows)]
        return torch.cat(parts).to(x.dtype)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the locations (D,), data units. It is the mean if all degrees of freedom exceed one."""
        return torch.softmax(self.logits, 0) @ self.means

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance (D, D), squared data units; infinite if degrees of freedom are two or less."""
        grow = torch.where(self.degrees > 2, self.degrees / (self.degrees - 2).clamp(min=1e-300), math.inf)
        W = torch.softmax(self.logits, 0)
        away = self.means - self.mean
        return ((W * grow)[:, None, None] * self.factor.covariances()).sum(0) + (away * W[:, None]).T @ away

    @property
    def variance(self) -> Tensor:
        """Variances (D,), squared data units."""
        return self.covariance_matrix.diagonal()

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw points (\*S, D), data units. Without a generator, torch's global random number generator is used."""
        shape = torch.Size([sample_shape] if isinstance(sample_shape, int) else sample_shape)
        count, D = shape.numel(), self.means.shape[1]
        generator = generator_on(generator, self.means.device)
        gaussian = Mixture(self.logits, torch.zeros_like(self.means), self.factor, validate_args=False)
        noise, labels = gaussian.sample(count, return_labels=True, generator=generator)
        d = self.degrees[labels][:, None].expand(-1, D // self.factor.student_width(D))
        chi = torch._standard_gamma((0.5 * d).contiguous(), generator=generator) / (0.5 * d)
        return (self.means[labels] + noise / chi.sqrt()).reshape(*shape, D)
