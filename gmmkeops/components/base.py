r"""The component family: precision factors :math:`U_k` with :math:`\Sigma_k^{-1} = U_k U_k^\top`.

A family is a subclass of :class:`Factor`. It defines its names, the stored parameters, conversions from and to covariances, the
shape of second moments, and the M-step of its covariances. No other code distinguishes families.
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

# Component family of each ``covariance_type``, and whether all components share one covariance (tied).
FAMILIES: dict[str, tuple[type[Factor], bool]] = {}


class Factor(ABC):
    r"""Base class of component families: precision factors :math:`U_k` with :math:`\Sigma_k^{-1} = U_k U_k^\top`.

    U is upper triangular, in 1 / data units. The leading dimension is K, or 1 when all components share one covariance (tied);
    any number of batch dimensions may come before it. A subclass defines at least ``family``, ``names``, :meth:`shapes` and
    :meth:`count`; it is then registered under its names and can be fitted, saved and loaded. The methods of this class
    implement families whose columns are independent within a component; other families override them.

    Reference:
        The factor A of the KeOps mixture tutorial, :math:`\Sigma^{-1} = AA^\top`, and ``precisions_cholesky_`` of scikit-learn.

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
    #: Values of ``covariance_type``; the first one is scikit-learn's. The tied covariances add the prefix ``tied_``.
    names: ClassVar[tuple[str, ...]]
    #: Whether standardized coordinates must divide all columns by the same scale.
    isotropic: ClassVar[bool] = False
    #: Whether U is a matrix, because columns may be correlated within a component.
    coupled: ClassVar[bool] = False
    #: Number of columns D.
    features: int
    #: Logarithms of the diagonal of U, the stored parameter that all families have.
    log_diagonal: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls).get("names", ()):
            FAMILIES[name], FAMILIES[f"tied_{name}"] = (cls, False), (cls, True)

    @classmethod
    def type_name(cls, tied: bool = False) -> str:
        """Return the ``covariance_type`` of this family."""
        return ("tied_" if tied else "") + cls.names[0]

    @classmethod
    @abstractmethod
    def shapes(cls, leading: int, features: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored, unconstrained parameters by name, for K factors or one (tied) of D columns.

        One of them is ``log_diagonal``; adding to it multiplies U by a number.
        """

    @classmethod
    @abstractmethod
    def count(cls, components: int, features: int, tied: bool = False) -> int:
        """Count the free parameters of the covariances."""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], features: int | None) -> Factor:
        """Create a factor from its stored parameters and the number of columns."""
        return cls(**tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored parameters by name; each (*B, K or 1, ...)."""
        return {name: getattr(self, name) for name in self.shapes(1, 1)}

    def replace(self, **tensors: Tensor) -> Factor:
        """Return a factor of the same family in which some stored parameters are replaced."""
        return self.of(tensors, self.features)

    @classmethod
    def rescaling(cls, scale: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Return the factor a and shift b with which each stored parameter t becomes a t + b in coordinates x / scale (D,).

        A factor of one and a shift of zero are None.
        """
        return {"log_diagonal": (None, scale.log())}

    def rescale(self, scale: Tensor) -> Factor:
        """Convert the factor to coordinates x / scale, with scale (D,); isotropic families need equal scales."""
        tensors = self.tensors
        for name, (factor, shift) in self.rescaling(scale).items():
            scaled = tensors[name] if factor is None else tensors[name] * factor
            tensors[name] = scaled if shift is None else scaled + shift
        return self.replace(**tensors)

    def scaled(self, scale: Tensor) -> Factor:
        """Multiply the factor U_k of each component by a positive number scale_k, (K or 1,)."""
        tensors = self.tensors
        return self.replace(**tensors | {"log_diagonal": tensors["log_diagonal"] + scale.log().unsqueeze(-1)})

    @property
    def log_scales(self) -> Tensor:
        """Logarithms of the diagonal of U (*B, K or 1, D), or (*B, K or 1, 1) if they are equal."""
        return self.log_diagonal

    @property
    def U(self) -> Tensor:
        """Factor U: full (*B, K or 1, D, D), diagonal (*B, K or 1, D) or spherical (*B, K or 1, 1); 1 / data units."""
        return self.log_scales.exp()

    @staticmethod
    def times(U: Tensor, z: Tensor) -> Tensor:
        """Compute Uᵀ z for factors U in the shape of :attr:`U` and vectors z (..., D)."""
        return z * U

    @classmethod
    def times_all(cls, U: Tensor, Z: Tensor) -> Tensor:
        """Compute Uᵀ Z for factors U in the shape of :attr:`U` and the columns of matrices Z (..., D, n)."""
        return U.mT @ Z if cls.coupled else Z * U.unsqueeze(-1)

    def whiten(self, residuals: Tensor) -> Tensor:
        """Compute the whitened residuals U_kᵀ z (*B, K, D), unitless, of residuals z = x - μ_k (*B, K, D), data units."""
        return self.U * residuals

    def unwhiten_all(self, noise: Tensor) -> Tensor:
        """Compute U_kᵀ⁻¹ y (*B, K, D), data units, for whitened vectors y (*B, K, D): the inverse of :meth:`whiten`."""
        return noise / self.U

    def unwhiten(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Compute U_kᵀ⁻¹ y (S, D), data units, for whitened rows y (S, D) of the components k in ``labels`` (S,)."""
        sigma = (-self.log_scales).exp()
        return noise * (sigma if self.leading == 1 else sigma[labels])

    def log_determinant(self) -> Tensor:
        """Compute log |det U_k| (*B, K or 1), nats."""
        logs = self.log_scales.sum(-1)
        return logs if self.log_scales.shape[-1] == self.features else self.features * logs

    def largest(self) -> Tensor:
        """Return the largest absolute value of the entries of all factors, a scalar, 1 / data units."""
        return self.log_scales.amax().exp()

    def row_norms(self) -> Tensor:
        """Compute the Euclidean norms of the rows of U (*B, K or 1, D), 1 / data units."""
        return self._wide(self.U)

    def matrices(self) -> Tensor:
        """Return the factors as dense matrices (*B, K or 1, D, D), 1 / data units."""
        return torch.diag_embed(self._wide(self.U))

    def covariances(self) -> Tensor:
        """Compute the covariances as dense matrices (*B, K or 1, D, D), squared data units."""
        return torch.diag_embed(self._wide((-2 * self.log_scales).exp()))

    def compact_covariances(self) -> Tensor:
        """Compute the covariances in the shape that ``from_covariances`` accepts."""
        return self.compact(self.covariances())

    def cholesky(self) -> Tensor:
        """Compute the lower Cholesky factors of the covariances as dense matrices (*B, K or 1, D, D), data units."""
        return torch.diag_embed(self._wide(1 / self.U))

    def precisions(self) -> Tensor:
        """Compute the precisions as dense matrices (*B, K or 1, D, D), 1 / squared data units."""
        U = self.matrices()
        return U @ U.mT

    def precision_diagonals(self) -> Tensor:
        """Compute the diagonals of the precision matrices (*B, K or 1, D), 1 / squared data units."""
        return self._wide(self.U.square())

    def _wide(self, columns: Tensor) -> Tensor:
        return columns.expand(*columns.shape[:-1], self.features)

    @classmethod
    def from_scales(cls, logs: Tensor, features: int | None) -> Factor:
        """Create a factor from the logarithms of the diagonal of U (*B, K or 1, D or 1)."""
        return cls.of({"log_diagonal": logs}, features)

    @classmethod
    def from_factors(cls, factors: Any, features: int | None = None) -> Factor:
        """Create a factor from any A with Σ⁻¹ = A Aᵀ, in the shape of :attr:`U`."""
        return cls.from_scales(positive(as_tensor(factors, name="factors"), "factors").log(), features)

    @classmethod
    def from_covariances(cls, covariances: Any, features: int | None = None) -> Factor:
        """Create a factor from covariances: full (*B, K or 1, D, D), diagonal (*B, K or 1, D) or spherical (*B, K or 1)."""
        variances = positive(as_tensor(covariances, name="covariances"), "covariances")
        return cls.from_scales(-0.5 * cls.variances(variances).log(), features)

    @classmethod
    def from_precisions(cls, precisions: Any, features: int | None = None) -> Factor:
        """Create a factor from precisions (inverse covariances), in the shapes of :meth:`from_covariances`."""
        given = positive(as_tensor(precisions, name="precisions"), "precisions")
        return cls.from_scales(0.5 * cls.variances(given).log(), features)

    @classmethod
    def from_cholesky(cls, cholesky: Any, features: int | None = None) -> Factor:
        """Create a factor from lower Cholesky factors of covariances (full) or standard deviations (diagonal, spherical)."""
        given = positive(as_tensor(cholesky, name="cholesky"), "cholesky")
        return cls.from_scales(-cls.variances(given).log(), features)

    @classmethod
    def spread_shape(cls, features: int) -> tuple[int, ...]:
        """Return the shape of one component's covariance in scikit-learn, which is also the shape of its second moment S2."""
        return (features,)

    @classmethod
    def second_moments(cls, matrices: Tensor) -> Tensor:
        """Reduce matrices (..., D, D) to the shape of S2: the whole matrix, its diagonal, or its trace."""
        return matrices.diagonal(dim1=-2, dim2=-1)

    @classmethod
    def outer(cls, z: Tensor) -> Tensor:
        """Compute the outer products z zᵀ of vectors (..., D), reduced to the shape of S2."""
        return z.square()

    @classmethod
    def compact(cls, matrices: Tensor) -> Tensor:
        """Project matrices (..., D, D) to covariances of this family, in the shape that ``from_covariances`` accepts."""
        return cls.second_moments(matrices)

    @classmethod
    def variances(cls, covariances: Tensor) -> Tensor:
        """Return the variances of the columns (..., D), or (..., 1) if equal, of covariances in the shape of :meth:`compact`."""
        return covariances

    @classmethod
    def mean_scatter(cls, scatter: Tensor, features: int) -> Tensor:
        """Convert second moments (..., ...) to the scale of covariances: a trace is divided by the number of columns."""
        return scatter

    @classmethod
    def directions(cls, features: int) -> Tensor:
        """Return a basis of symmetric matrices E (q, D, D), float64, for the covariances of this family; q parameters."""
        return torch.diag_embed(torch.eye(features, dtype=torch.float64))

    @classmethod
    def quadratics(cls, y: Tensor) -> Tensor:
        """Compute the quadratic forms yᵀ E y (..., q) of vectors y (..., D) with the matrices E of :meth:`directions`."""
        return y.square()

    def trace(self, spreads: Tensor) -> Tensor:
        """Compute the scalar Σ_k tr(U_k U_kᵀ S_k) for matrices S in the shape of covariances."""
        return (self.precision_diagonals() * self.variances(spreads)).sum()

    @classmethod
    def maximize(
        cls, scatter: Tensor, counts: Tensor, features: int, *, ridge: Tensor, floor: float | Tensor
    ) -> tuple[Factor, Tensor]:
        """Perform the M-step of the covariances: mean scatter plus a ridge, converted to precision factors.

        Args:
            scatter: Second moments S2 about the means (K or 1, ...), in the shape of :meth:`second_moments`.
            counts: Expected counts (K or 1,).
            features: Number of columns D.
            ridge: Constants (D,) that are added to the variances of the columns.
            floor: Smallest variance: a number, or one per covariance (K or 1,).

        Returns:
            The factors, and a Boolean mask (K or 1,) of singular covariances that were regularized.
        """
        counts = counts.clamp(min=1e-300).reshape(-1, *[1] * (scatter.ndim - 1))
        covariances = cls.mean_scatter(scatter, features) / counts + cls.compact(torch.diag(ridge))
        return cls.nearest(covariances, features, floor)

    @classmethod
    def nearest(cls, covariances: Tensor, features: int, floor: float | Tensor) -> tuple[Factor, Tensor]:
        """Compute precision factors of covariances that may not be positive definite because of rounding errors.

        In covariances that are not positive definite, variances of columns are raised to ``floor``, and eigenvalues of the
        correlation matrix to the size of rounding errors. All others are unchanged.

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
        """Return the K Gaussians with these factors and means (*B, K, D) as a torch distribution of batch shape (*B, K)."""
        return Independent(Normal(means, (1 / self.U).expand_as(means)), 1)

    def marginal(self, columns: list[int]) -> Factor:
        """Return the factors of the marginal distribution of some columns.

        Raises:
            NotImplementedError: Marginal distributions do not belong to this family.
        """
        raise NotImplementedError(f"marginal distributions are not implemented for {self.family} components.")

    def conditional(self, given: list[int], rest: list[int]) -> tuple[Factor, Tensor | None]:
        r"""Return the factors of the columns ``rest`` given the others, and the gain :math:`P_{aa}^{-1} P_{ab}` (K or 1, ...).

        The gain is None for families whose columns are independent within a component.
        """
        return self.marginal(rest), None

    @classmethod
    def student(cls, degrees: Tensor, features: int) -> tuple[Tensor, Tensor]:
        """Compute the degrees of freedom of the predictive Student's t distribution for a Wishart distribution of precisions.

        Args:
            degrees: Degrees of freedom of the Wishart distributions (K,).
            features: Number of columns D.

        Returns:
            The degrees of freedom (K,), and the ratios (K,) of the predictive precision to the expected precision.

        Reference:
            Bishop 2006, eq. 10.81. Independent columns have one-dimensional Student's t distributions.
        """
        return degrees, torch.ones_like(degrees)

    @classmethod
    def student_width(cls, features: int) -> int:
        """Return the number of columns that share one Student's t distribution."""
        return 1

    def wishart(self, degrees: Tensor, generator: torch.Generator | None) -> Factor:
        """Draw precisions from the Wishart distributions with expectation U Uᵀ.

        Args:
            degrees: Degrees of freedom (count, K or 1).
            generator: Random number generator; None uses torch's global generator.

        Returns:
            Factors of the drawn precisions, with batch shape (count,).
        """
        own = self.log_scales
        shape = (0.5 * degrees[..., None] * (self.features / own.shape[-1])).expand(len(degrees), *own.shape)
        return self.from_scales(own + 0.5 * (gamma(shape, generator) / shape).log(), self.features)

    def natural_gradient(
        self, means: Tensor, slopes: dict[str, Tensor], U: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Multiply gradients by the inverse Fisher information of the Gaussian distribution of each component.

        Args:
            means: Gradient with respect to the means (*B, K, D).
            slopes: Gradients with respect to :attr:`tensors`, by their names.
            U: The property :attr:`U` if it has been computed before.

        Returns:
            The natural gradients in the same shapes.
        """
        # The scores of a scale of d columns have variance 2 d; those of a mean the precision.
        columns = self.features / self.log_scales.shape[-1]
        return means * (-2 * self.log_scales).exp(), {name: slope / (2 * columns) for name, slope in slopes.items()}

    @property
    def leading(self) -> int:
        """Leading dimension: K, or 1 when tied."""
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
        """Select the factors of some components; a tied factor is returned unchanged."""
        if self.leading == 1:
            return self
        return self.replace(**{name: tensor[..., index, :] for name, tensor in self.tensors.items()})

    def scatter(self, index: Tensor, source: Factor) -> Factor:
        """Replace the factors of the components ``index`` by those of ``source`` (differentiable in the source)."""
        if self.leading == 1:
            return source
        mine, theirs = self.tensors, source.tensors
        return self.replace(**{name: mine[name].index_copy(-2, index, theirs[name]) for name in mine})

    def to(self, *args: Any, **kwargs: Any) -> Factor:
        """Move or cast the stored tensors, as :meth:`torch.Tensor.to`."""
        tensors = self.tensors
        found = {name: tensor.to(*args, **kwargs) for name, tensor in tensors.items()}
        return self if all(found[name] is tensor for name, tensor in tensors.items()) else self.replace(**found)

    def detach(self) -> Factor:
        """Return a copy that is detached from the autograd graph and does not share memory."""
        return self.replace(**{name: tensor.detach().clone() for name, tensor in self.tensors.items()})

    def expand(self, batch_shape: Any) -> Factor:
        """Expand the factor to a larger batch, without a copy."""
        return self.replace(**{name: t.expand(*batch_shape, *t.shape[-2:]) for name, t in self.tensors.items()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}(leading={self.leading}, features={self.features}, dtype={self.dtype})"
