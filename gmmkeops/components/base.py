r"""The component family: precision factors :math:`U_k` with :math:`\Sigma_k^{-1} = U_k U_k^\top`.

A family is a subclass of :class:`Factor`. It owns its names, the stored parameters, conversions from and to covariances, the
layout of second moments, and the M-step of its covariances. No other code distinguishes families.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from gmmkeops.components.arrays import as_tensor
from gmmkeops.components.parameters import gamma, positive

__all__ = ["FAMILIES", "Factor"]

# The families by ``covariance_type``, and whether it ties the covariances of all components.
FAMILIES: dict[str, tuple[type[Factor], bool]] = {}


class Factor(ABC):
    r"""A component family: a precision factor U for each component, :math:`\Sigma_k^{-1} = U_k U_k^\top`, or one for all (tied).

    U is upper triangular, in 1 / data units. The leading dimension is K, or 1 when all components share one covariance; any
    number of batch dimensions may come before it. A subclass with ``names`` is registered under them: a mixture of its factors
    can be fitted by every method, saved and loaded. The methods of this class are those of a family whose columns are
    independent within a component; a subclass states at least ``family``, ``names``, :meth:`shapes` and :meth:`count`.

    Reference:
        The KeOps mixture tutorial stores factors of the precisions, :math:`\Sigma^{-1} = AA^\top`; scikit-learn's
        ``precisions_cholesky_`` is the same upper factor.

    Example:
        >>> import torch, gmmkeops as gk
        >>> factor = gk.FullFactor.from_covariances(torch.tensor([[[4.0, 0.0], [0.0, 1.0]]]).double())
        >>> isinstance(factor, gk.Factor), factor.log_determinant().exp()  # |det U|
        (True, tensor([0.5000], dtype=torch.float64))
        >>> factor.whiten(torch.tensor([[2.0, 1.0]]).double())
        tensor([[1., 1.]], dtype=torch.float64)
    """

    #: Name of the family in files and reports.
    family: ClassVar[str]
    #: Names as ``covariance_type``; the first one is that of scikit-learn. Tied ones begin with ``tied_``.
    names: ClassVar[tuple[str, ...]]
    #: Whether all columns must have the same unit, so that standardized coordinates divide them by one number.
    isotropic: ClassVar[bool] = False
    #: Whether U holds matrices, because columns are correlated within a component.
    coupled: ClassVar[bool] = False
    #: Number of columns D, and the stored parameter that every family has.
    features: int
    log_diagonal: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls).get("names", ()):
            FAMILIES[name], FAMILIES[f"tied_{name}"] = (cls, False), (cls, True)

    @classmethod
    def type_name(cls, tied: bool = False) -> str:
        """The ``covariance_type`` of this family."""
        return ("tied_" if tied else "") + cls.names[0]

    @classmethod
    @abstractmethod
    def shapes(cls, leading: int, features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored, unconstrained parameters by name, for K or 1 factors of D columns.

        One of them is ``log_diagonal``; adding to it multiplies U by a number.
        """

    @classmethod
    @abstractmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        """Number of free parameters."""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], features: int | None) -> Factor:
        """The factor with given stored parameters and number of columns."""
        return cls(**tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored parameters by name; each (*B, K or 1, ...)."""
        return {name: getattr(self, name) for name in self.shapes(1, 1)}

    def replace(self, **tensors: Tensor) -> Factor:
        """A factor of the same family with other stored parameters."""
        return self.of(tensors, self.features)

    @classmethod
    def rescaling(cls, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors and shifts of each stored parameter that convert it to coordinates x / scale, with scale (D,)."""
        return {"log_diagonal": (torch.ones_like(scale[:1]), scale.log())}

    def rescale(self, scale: Tensor) -> Factor:
        """The factor in coordinates x / scale, with scale (D,); an isotropic family needs equal entries."""
        change = self.rescaling(scale)
        return self.replace(**{name: t * change[name][0] + change[name][1] for name, t in self.tensors.items()})

    def scaled(self, scale: Tensor) -> Factor:
        """The factors scale_k U_k for positive numbers (K or 1,)."""
        tensors = self.tensors
        return self.replace(**tensors | {"log_diagonal": tensors["log_diagonal"] + scale.log().unsqueeze(-1)})

    @property
    def log_scales(self) -> Tensor:
        """Logarithms of the diagonal of U (*B, K or 1, D), or (*B, K or 1, 1) if they are equal."""
        return self.log_diagonal

    @property
    def U(self) -> Tensor:
        """The factor itself, (*B, K or 1, D, D) full, (*B, K or 1, D) diagonal, (*B, K or 1, 1) spherical; 1 / data units."""
        return self.log_scales.exp()

    @staticmethod
    def times(U: Tensor, z: Tensor) -> Tensor:
        """Uᵀ z for factors in the form of :attr:`U` and vectors z (..., D)."""
        return z * U

    def whiten(self, residuals: Tensor) -> Tensor:
        """U_kᵀ z for residuals z (*B, K, D), data units; returns (*B, K, D), unitless."""
        return self.U * residuals

    def unwhiten_all(self, noise: Tensor) -> Tensor:
        """U_kᵀ⁻¹ y (*B, K, D), data units, for vectors y (*B, K, D); the inverse of :meth:`whiten`."""
        return noise / self.U

    def unwhiten(self, noise: Tensor, labels: Tensor) -> Tensor:
        """U_kᵀ⁻¹ y for rows y (S, D) that belong to components ``labels`` (S,); returns (S, D), data units."""
        sigma = (-self.log_scales).exp()
        return noise * (sigma if self.leading == 1 else sigma[labels])

    def log_determinant(self) -> Tensor:
        """log |det U_k| (*B, K or 1), nats."""
        logs = self.log_scales.sum(-1)
        return logs if self.log_scales.shape[-1] == self.features else self.features * logs

    def largest(self) -> Tensor:
        """The largest absolute value of an entry of any factor, a scalar; 1 / data units."""
        return self.log_scales.amax().exp()

    def row_norms(self) -> Tensor:
        """Norms of the rows of U (*B, K or 1, D): how far a whitened residual moves with each column; 1 / data units."""
        return self._wide(self.U)

    def matrices(self) -> Tensor:
        """The factor in dense form (*B, K or 1, D, D), 1 / data units."""
        return torch.diag_embed(self._wide(self.U))

    def covariances(self) -> Tensor:
        """Covariance matrices in dense form (*B, K or 1, D, D), squared data units."""
        return torch.diag_embed(self._wide((-2 * self.log_scales).exp()))

    def compact_covariances(self) -> Tensor:
        """Covariances in the shape that ``from_covariances`` takes."""
        return self.compact(self.covariances())

    def cholesky(self) -> Tensor:
        """Dense lower-triangular Cholesky factors of the covariances (*B, K or 1, D, D), data units."""
        return torch.diag_embed(self._wide(1 / self.U))

    def precisions(self) -> Tensor:
        """Precision matrices in dense form (*B, K or 1, D, D), 1 / squared data units."""
        U = self.matrices()
        return U @ U.mT

    def precision_diagonals(self) -> Tensor:
        """Diagonals of the precision matrices (*B, K or 1, D), 1 / squared data units."""
        return self._wide(self.U.square())

    def _wide(self, columns: Tensor) -> Tensor:
        return columns.expand(*columns.shape[:-1], self.features)

    @classmethod
    def from_scales(cls, logs: Tensor, features: int | None) -> Factor:
        """From logarithms of the diagonal of U (*B, K or 1, D or 1)."""
        return cls.of({"log_diagonal": logs}, features)

    @classmethod
    def from_factors(cls, factors: Any, features: int | None = None) -> Factor:
        """From any A with Σ⁻¹ = A Aᵀ, in the shapes that ``U`` returns."""
        return cls.from_scales(positive(as_tensor(factors, name="factors"), "factors").log(), features)

    @classmethod
    def from_covariances(cls, covariances: Any, features: int | None = None) -> Factor:
        """From covariances: (*B, K or 1, D, D) full, variances (*B, K or 1, D) diagonal, (*B, K or 1) spherical."""
        variances = positive(as_tensor(covariances, name="covariances"), "covariances")
        return cls.from_scales(-0.5 * cls.variances(variances).log(), features)

    @classmethod
    def from_precisions(cls, precisions: Any, features: int | None = None) -> Factor:
        """From precisions (inverse covariances), in the shapes of :meth:`from_covariances`."""
        given = positive(as_tensor(precisions, name="precisions"), "precisions")
        return cls.from_scales(0.5 * cls.variances(given).log(), features)

    @classmethod
    def from_cholesky(cls, cholesky: Any, features: int | None = None) -> Factor:
        """From lower Cholesky factors of the covariances (full), or standard deviations (diagonal, spherical)."""
        given = positive(as_tensor(cholesky, name="cholesky"), "cholesky")
        return cls.from_scales(-cls.variances(given).log(), features)

    @classmethod
    def spread_shape(cls, features: int) -> tuple[int, ...]:
        """Shape of the covariance of one component as scikit-learn stores it, and of its second moments S2."""
        return (features,)

    @classmethod
    def second_moments(cls, matrices: Tensor) -> Tensor:
        """The part of matrices (..., D, D) that S2 keeps: all, the diagonal, or the trace."""
        return matrices.diagonal(dim1=-2, dim2=-1)

    @classmethod
    def outer(cls, z: Tensor) -> Tensor:
        """Second moments z zᵀ of vectors (..., D), as S2 keeps them."""
        return z.square()

    @classmethod
    def compact(cls, matrices: Tensor) -> Tensor:
        """Covariances of this family that are nearest to matrices (..., D, D), in the shape that ``from_covariances`` takes."""
        return cls.second_moments(matrices)

    @classmethod
    def variances(cls, covariances: Tensor) -> Tensor:
        """Variances of the columns (..., D), or (..., 1) if they are equal, of covariances as ``from_covariances`` takes them."""
        return covariances

    @classmethod
    def mean_scatter(cls, scatter: Tensor, features: int) -> Tensor:
        """Second moments (..., ...) as covariances: those that sum over the columns are divided by their number."""
        return scatter

    @classmethod
    def directions(cls, features: int) -> Tensor:
        """Symmetric matrices E (q, D, D), float64, along which a covariance of this family can change, one per parameter."""
        return torch.diag_embed(torch.eye(features, dtype=torch.float64))

    @classmethod
    def quadratics(cls, y: Tensor) -> Tensor:
        """Quadratic forms yᵀ E y (..., q) of vectors (..., D) with the matrices of :meth:`directions`."""
        return y.square()

    def trace(self, spreads: Tensor) -> Tensor:
        """Σ_k tr(U_k U_kᵀ S_k) of matrices S in the shape of covariances, a scalar."""
        return (self.precision_diagonals() * self.variances(spreads)).sum()

    @classmethod
    def maximize(
        cls, scatter: Tensor, counts: Tensor, features: int, *, ridge: Tensor, floor: float | Tensor
    ) -> tuple[Factor, Tensor]:
        """M-step of the covariances: factors of the mean scatter plus a ridge.

        Args:
            scatter: Second moments S2 about the means (K or 1, ...), as :meth:`second_moments` keeps them.
            counts: Expected counts (K or 1,).
            features: Number of columns D.
            ridge: Added to the variance of each column (D,).
            floor: Smallest variance: a number, or one per covariance (K or 1,).

        Returns:
            The factors, and a Boolean mask (K or 1,) of singular covariances that were repaired.
        """
        counts = counts.clamp(min=1e-300).reshape(-1, *[1] * (scatter.ndim - 1))
        covariances = cls.mean_scatter(scatter, features) / counts + cls.compact(torch.diag(ridge))
        return cls.nearest(covariances, features, floor)

    @classmethod
    def nearest(cls, covariances: Tensor, features: int, floor: float | Tensor) -> tuple[Factor, Tensor]:
        """Precision factors of covariances that may not be positive definite because of rounding.

        Only where that is so are variances of columns raised to ``floor``, and eigenvalues of the correlation matrix to the
        rounding error.

        Args:
            covariances: (K, D, D), (K, D) or (K,), with K = 1 when tied; not batched.
            features: Number of columns D.
            floor: Lower bound of the variances: a number, or one per covariance (K,).

        Returns:
            The factor, and a Boolean mask (K or 1,) of covariances that were changed.
        """
        least = torch.as_tensor(floor).to(covariances).expand(len(covariances))
        raised = torch.maximum(covariances, least.reshape(-1, *[1] * (covariances.ndim - 1)))
        low = (cls.variances(covariances) < least[:, None]).any(1)
        return cls.from_covariances(raised, features=features), low

    @torch.no_grad()
    def floored(self, minimum: float) -> tuple[Factor, Tensor]:
        """Raise the eigenvalues of covariances to at least ``minimum``.

        Args:
            minimum: Lower bound, squared units of the factor.

        Returns:
            The new factor, and a Boolean mask (K or 1,) of covariances with an eigenvalue below the bound.
        """
        limit, logs = -0.5 * math.log(minimum), self.log_scales
        low = (logs > limit + 1e-12).any(-1)
        return (self.from_scales(logs.clamp(max=limit), self.features) if bool(low.any()) else self), low

    def distribution(self, means: Tensor) -> Distribution:
        """The Gaussians of these factors and of means (*B, K, D), as a torch distribution of batch shape (*B, K)."""
        return Independent(Normal(means, (1 / self.U).expand_as(means)), 1)

    def marginal(self, columns: list[int]) -> Factor:
        """The factors of the marginal distribution of some columns.

        Raises:
            NotImplementedError: Marginal distributions are not of this family.
        """
        raise NotImplementedError(f"{self.family} components have no marginal distributions of their family.")

    def conditional(self, given: list[int], rest: list[int]) -> tuple[Factor, Tensor | None]:
        r"""The factors of the columns ``rest`` given the others, and the gain :math:`P_{aa}^{-1} P_{ab}` (K or 1, ...) or None.

        None is for families in which columns are independent within a component.
        """
        return self.marginal(rest), None

    @classmethod
    def student(cls, degrees: Tensor, features: int) -> tuple[Tensor, Tensor]:
        """Degrees of freedom of the predictive Student's t distribution under a Wishart distribution of such degrees (K,).

        Returns:
            The degrees (K,), and the factors (K,) by which the predictive precision differs from the expected one.

        Reference:
            Bishop 2006, eq. 10.81. Independent columns have one-dimensional Student's t distributions.
        """
        return degrees, torch.ones_like(degrees)

    @classmethod
    def student_width(cls, features: int) -> int:
        """Number of columns that share one Student's t distribution."""
        return 1

    def wishart(self, degrees: Tensor, generator: torch.Generator | None) -> Factor:
        """Draw precisions from Wishart distributions of the expectation U Uᵀ.

        Args:
            degrees: Degrees of freedom (count, K or 1).
            generator: Random number generator; None uses torch's global one.

        Returns:
            Factors of batch shape (count,).
        """
        own = self.log_scales
        shape = (0.5 * degrees[..., None] * (self.features / own.shape[-1])).expand(len(degrees), *own.shape)
        return self.from_scales(own + 0.5 * (gamma(shape, generator) / shape).log(), self.features)

    @property
    def leading(self) -> int:
        """K, or 1 when tied."""
        return self.log_diagonal.shape[-2]

    @property
    def batch_shape(self) -> torch.Size:
        """Batch dimensions before the leading one."""
        return self.log_diagonal.shape[:-2]

    @property
    def dtype(self) -> torch.dtype:
        return self.log_diagonal.dtype

    @property
    def device(self) -> torch.device:
        return self.log_diagonal.device

    def select(self, index: Tensor) -> Factor:
        """The factors of some components (a tied factor stays as it is)."""
        if self.leading == 1:
            return self
        return self.replace(**{name: tensor[..., index, :] for name, tensor in self.tensors.items()})

    def scatter(self, index: Tensor, source: Factor) -> Factor:
        """This factor with the components ``index`` taken from ``source`` (differentiable in the source)."""
        if self.leading == 1:
            return source
        mine, theirs = self.tensors, source.tensors
        return self.replace(**{name: mine[name].index_copy(-2, index, theirs[name]) for name in mine})

    def to(self, *args: Any, **kwargs: Any) -> Factor:
        """Move or cast the stored tensors, as :meth:`torch.Tensor.to`."""
        return self.replace(**{name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()})

    def detach(self) -> Factor:
        """Copy the factor out of any autograd graph, into memory of its own."""
        return self.replace(**{name: tensor.detach().clone() for name, tensor in self.tensors.items()})

    def expand(self, batch_shape: Any) -> Factor:
        """Expand the factor to a larger batch, without a copy."""
        return self.replace(**{name: t.expand(*batch_shape, *t.shape[-2:]) for name, t in self.tensors.items()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}(leading={self.leading}, features={self.features}, dtype={self.dtype})"
