r"""Tiles of the dense engine: exponents and moments of a row range of points and of all components or a list of components.

For float32 points the exponents and the moments are each one matrix product with the quadratic features
:math:`\Phi(x) = (1, x, x x^\top)` of a tile, relative to the common center:

.. math:: E = B\,\Phi^\top, \qquad (S^0, S^1, S^2) = R\,\Phi,

with the natural parameters B and the responsibilities R of the components. Because of cancellation, the rounding error of the
exponents is about :math:`\epsilon (|U| |x|)^2` nats. The products are computed in float64, so that this error is usually smaller
than that of the float32 points themselves. For float64 points, the exponents are computed from whitened residuals
:math:`U_k^\top x - U_k^\top \mu_k` instead. For tiles with few components and many dimensions, :math:`x x^\top` is not computed.

All these formulas are expansions about the common center. If a component's error bound (:mod:`.rounding`) is too large in a
tile, its exponents and moments are computed from the residuals :math:`x - \mu_k` instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from gmmkeops.data import running_sum
from gmmkeops.reductions.dense.products import product
from gmmkeops.reductions.dense.rounding import Sizes, size_limits
from gmmkeops.reductions.problem import Exponents

__all__ = ["Columns", "Tile"]

# Smallest ratio of dimensions to components of a tile for which whitened residuals cost less than the features (measured in 10 to
# 64 dimensions).
_FEW = 6

# Number of which the number of features of a tile on CUDA is made a multiple, so that the rows of matrices are aligned.
_ALIGNED = 8

# Maximum number of entries of an array of residuals x - μ_k.
_ROOM, _ROOM_CUDA = 1 << 18, 1 << 24


class Columns(Protocol):
    """Sums of exponentials over the components of a tile, by one kernel instead of several torch operations."""

    def logsumexps(self, E: Tensor) -> Tensor:
        """Return the log-sum-exps (rows,) of exponents (components, rows), nats, in their dtype."""

    def assign(self, E: Tensor, weights: Tensor | None, depth: float) -> Tensor:
        """Overwrite exponents (components, rows), nats, by responsibilities times weights (rows,); return the log-sum-exps.

        Responsibilities whose exponents are more than ``depth`` nats below the largest one of a point are zero.
        """


class Tile:
    """Buffers of one worker, which processes one tile at a time.

    Args:
        problem: Points and components.
        rows, pairs: Maximum numbers of rows, and of pairs of row and component, in a tile.
        clamp: Whether to clamp exponents to the range of the dtype.
        featured: Whether to compute the features even if the exponents do not require them.
        sizes: Sizes of the components, for the rounding bounds of each tile; None if all tiles are known to be within the limits.
        most: Largest size for which a tile may use float32 products; None for float64 products.
        precise: Whether to compute products of float32 points in float64.
        columns: Kernel for the sums of exponentials of float32 points; None for torch operations.
    """

    def __init__(
        self,
        problem: Exponents,
        rows: int,
        pairs: int,
        clamp: bool,
        featured: bool,
        sizes: Sizes | None,
        most: float | None,
        precise: bool,
        columns: Columns | None = None,
    ) -> None:
        _, K, D = problem.shape
        x = problem.x
        self.problem, self.clamp, self.featured, self.columns = problem, clamp, featured, columns
        wide: dict[str, Any] = {"dtype": torch.float64 if precise else x.dtype, "device": x.device}
        self.full, self.spherical = problem.is_full, problem.U.shape[1:] == (1,)
        # Spherical features contain |x|² as one column. For D = 1 the diagonal formulas apply to all families.
        products = D * (D + 1) // 2 if self.full else 1 if self.spherical else D
        # Rows of Φ, and with rows of zeros that align those of other matrices.
        self.features = 1 + D + products
        self._padded = -(-self.features // _ALIGNED) * _ALIGNED if x.is_cuda else self.features
        self._features = torch.empty(self._padded * rows, **wide)
        self._e = torch.empty(pairs, **wide)
        self._r: Tensor | None = None
        self._truths: Tensor | None = None
        self.products: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self.width = self.height = 0
        # Whether the exponents have been overwritten by weighted responsibilities.
        self._has_responsibilities = False
        self.floor, self.minima = -math.inf, list[float]()
        self.row, self.column = torch.triu_indices(D, D, device=x.device)
        self.sums = torch.zeros(K, self.features, dtype=torch.float64, device=x.device)
        # Moments about their own means, of the components that are evaluated from residuals.
        self.own: Tensor | None = None
        self.total = torch.zeros((), dtype=torch.float64, device=x.device)
        self.quadratic = x.dtype == torch.float32
        # Exponents this far (nats) below the largest one of a point are negligible; and the exponential at that depth.
        self.depth = 80.0 if self.quadratic else 700.0
        self.nothing = math.exp(-self.depth) * (1 + 1e-5)
        self.offsets = problem.offsets.to(**wide)
        self.sizes, self.most = sizes, most
        # Positions of the components whose exponents, and of those whose moments, are computed from residuals.
        self.apart: Tensor | None = None
        self.apart_moments: Tensor | None = None
        self.moments_limit, self.limit = size_limits(x.dtype)
        if self.quadratic:
            self.natural = pad(self._natural(), (0, self._padded - self.features)).to(**wide)
        else:
            self.whitening = self._whitening()

    def _natural(self) -> Tensor:
        """Compute B (K, P), the coefficients of the exponents for 1, x and xxᵀ (upper triangle), relative to the center."""
        p = self.problem
        if self.full:
            P = p.U @ p.U.mT
            linear = (P @ p.means[:, :, None])[:, :, 0]
            square = -P[:, self.row, self.column] * torch.where(self.row == self.column, 0.5, 1.0)
        else:
            P = p.U**2
            linear = P * p.means
            square = -0.5 * P
        constant = p.offsets - 0.5 * (linear * p.means).sum(1)
        return torch.cat([constant[:, None], linear, square], 1)

    def _whitening(self) -> list[tuple[Tensor, Tensor, slice]]:
        """List the row of Uᵀ (K, D or 1), Uᵀμ (K, 1), and the columns of x for each whitened coordinate."""
        p = self.problem
        D = p.means.shape[1]
        if self.full:
            shift = p.U.mT @ p.means[:, :, None]
            return [(p.U[:, :, d].contiguous(), shift[:, d], slice(0, D)) for d in range(D)]
        U = p.U.expand_as(p.means)
        return [(U[:, d : d + 1].contiguous(), (U * p.means)[:, d : d + 1], slice(d, d + 1)) for d in range(D)]

    @property
    def R(self) -> Tensor:
        """Buffer (components, rows) in the dtype of the points, for exponentials."""
        if self._r is None:
            self._r = torch.empty(self._e.shape, dtype=self.problem.x.dtype, device=self._e.device)
        return self._r[: self.height * self.width].view(self.height, self.width)

    def _narrow(self, rows: int, components: int) -> None:
        """Create views of the buffers for a tile of a new shape."""
        D = self.problem.means.shape[1]
        if rows != self.width:
            # Φ (P, rows): a row of ones, the points X (D, rows), the products of their coordinates, and rows of zeros.
            self.F = self._features[: self._padded * rows].view(self._padded, rows)
            self.F[0], self.F[self.features :] = 1, 0
            self.X = self.F[1 : D + 1]
            self.products = None
        self.width, self.height = rows, components
        pairs = rows * components
        self.E = self._e[:pairs].view(components, rows)

    def load(self, start: int, stop: int, index: Tensor | None = None) -> bool:
        """Load the centered rows start:stop, and compute features and exponents ``self.E`` (components, rows).

        Returns:
            Whether the products of this tile are accurate enough; if not, the exponents are not computed.
        """
        p, self.index, self._has_responsibilities = self.problem, index, False
        height = p.means.shape[0] if index is None else len(index)
        if (stop - start, height) != (self.width, self.height):
            self._narrow(stop - start, height)
        torch.sub(p.x[start:stop].T, p.center[:, None], out=self.X)
        self.few = self.full and _FEW * self.height <= len(self.X)
        if not self._bound():
            return False
        if self.featured and not self.few:
            self._multiply()
        if self.apart is None or len(self.apart) < self.height:
            self._expand()
        if self.apart is not None:
            self._evaluate(self.apart)
            if self.clamp:
                self.E.nan_to_num_(nan=-1e300, neginf=-1e300).clamp_(min=-3e38 if self.quadratic else -1e300)
        return True

    def _bound(self) -> bool:
        """Find the components for which expansions about the center are not accurate enough in this tile.

        Returns:
            Whether the products of this tile are accurate enough for the other components.
        """
        self.apart = self.apart_moments = None
        if self.sizes is None:
            return True
        size = self.X.abs()
        if self.most is not None:
            return bool(self.sizes.most_at(size) <= self.most)
        limit = min(self.limit, self.moments_limit) if self.featured else self.limit
        reach = size.amax(1).double()
        if bool(self.sizes.most(reach) <= limit):
            return True
        sizes = self.sizes.of(reach, self.index)
        self.apart = self._beyond(sizes, self.limit)
        self.apart_moments = self._beyond(sizes, self.moments_limit)
        return True

    @staticmethod
    def _beyond(sizes: Tensor, limit: float) -> Tensor | None:
        places = (~(sizes <= limit)).nonzero()[:, 0]
        return places if len(places) else None

    def _expand(self) -> None:
        """Fill ``self.E`` by expansions about the common center."""
        if self.few:
            self._residuals()
            return
        if self.quadratic:
            if not self.featured:
                self._multiply()
            product(self.chosen(self.natural), self.F, out=self.E)
            if self.clamp:
                self.E.clamp_(min=-3e38)
            return
        self.E.copy_(self.chosen(self.offsets)[:, None].expand_as(self.E))
        for U, shift, columns in self.whitening:
            torch.addmm(self.chosen(shift), self.chosen(U), self.X[columns], beta=-1, out=self.R)
            self.E.addcmul_(self.R, self.R, value=-0.5)
        if self.clamp:
            self.E.nan_to_num_(nan=-1e300, neginf=-1e300)

    def _multiply(self) -> None:
        """Compute the features that are products of coordinates."""
        D, square = len(self.X), self.F[len(self.X) + 1 : self.features]
        if self.spherical:
            torch.sum(self.X * self.X, 0, out=square[0])
            return
        if self.products is None:
            parts = square.split(list(range(D, 0, -1))) if self.full else [square]
            lefts = [self.X[d:] for d in range(D)] if self.full else [self.X]
            self.products = list(zip(lefts, self.X if self.full else lefts, parts, strict=True))
        for left, right, out in self.products:
            torch.mul(left, right, out=out)

    def _room(self) -> Tensor:
        """Return a buffer (components, D, rows) that shares the memory of the products of coordinates."""
        D = len(self.X)
        return self.F[D + 1 :].view(-1)[: self.height * self.X.numel()].view(self.height, D, -1)

    def _residuals(self) -> None:
        """Fill ``self.E`` from whitened residuals, with one product for all components."""
        p, D, y = self.problem, len(self.X), self._room()
        U = self.chosen(p.U).mT
        # Matrices (components, D, 1 + D) that map (1, x) to the whitened residuals.
        matrices = torch.cat([-(U @ self.chosen(p.means)[:, :, None]), U], 2)
        product(matrices.view(-1, 1 + D).to(self.F.dtype), self.F[: 1 + D], out=y.flatten(0, 1))
        torch.sum(y.square_(), 1, out=self.E)
        torch.sub(self.chosen(self.offsets)[:, None], self.E, alpha=0.5, out=self.E)
        if self.clamp:
            self.E.nan_to_num_(nan=-1e300, neginf=-1e300).clamp_(min=-3e38 if self.quadratic else -1e300)

    def residuals(self, places: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Iterate over blocks of residuals x - μ, for components at positions ``places`` in the tile.

        Yields:
            Positions (b,), component indices (b,), x - μ (b, D, rows) and Uᵀ(x - μ) (b, D, rows), float64.
        """
        p, x = self.problem, self.X.double()
        most = max(1, (_ROOM_CUDA if x.is_cuda else _ROOM) // x.numel())
        for some in places.split(most):
            index = self.components(some)
            z, U = x - p.means[index][:, :, None], p.U[index]
            yield some, index, z, U.mT @ z if self.full else U[:, :, None] * z

    def _evaluate(self, places: Tensor) -> None:
        """Fill the rows ``places`` of ``self.E`` from residuals x - μ."""
        for some, index, _, y in self.residuals(places):
            self.E[some] = (self.problem.offsets[index][:, None] - 0.5 * y.square_().sum(1)).to(self.E.dtype)

    def _add_apart(self, shares: Tensor, places: Tensor) -> None:
        """Add moments about their own means for some components, and set their responsibilities ``shares`` to zero."""
        if self.own is None:
            self.own = torch.zeros_like(self.sums)
        for some, index, z, _ in self.residuals(places):
            r = shares[some].double()[:, None]
            if self.full:
                square = ((r * z) @ z.mT)[:, self.row, self.column]
            else:
                square = (r * z.square()).sum(2)
                square = square.sum(1, keepdim=True) if self.spherical else square
            self.own[index] += torch.cat([r.sum(2), (r * z).sum(2), square], 1)
        shares[places] = 0

    def shaped(self, products: Tensor) -> Tensor:
        """Convert sums of products of coordinates to second moments (K, D, D), (K, D) or (K,)."""
        if self.spherical:
            return products[:, 0]
        if not self.full:
            return products
        D = self.problem.means.shape[1]
        dense = products.new_empty(len(products), D, D)
        dense[:, self.row, self.column] = dense[:, self.column, self.row] = products
        return dense

    def pull(self, shares: Tensor) -> Tensor | None:
        """Compute Σ r U Uᵀ(x - μ) (D, rows) over components evaluated from residuals, if any, and zero their ``shares``."""
        if self.apart is None:
            return None
        found = torch.zeros_like(self.X, dtype=torch.float64)
        for some, index, _, y in self.residuals(self.apart):
            U = self.problem.U[index]
            found += (shares[some].double()[:, None] * (U @ y if self.full else U[:, :, None] * y)).sum(0)
        shares[self.apart] = 0
        return found

    def chosen(self, rows: Tensor) -> Tensor:
        """Select the rows of a tensor (K, ...) that belong to the components in the tile."""
        return rows if self.index is None else rows.index_select(0, self.index)

    def components(self, places: Tensor) -> Tensor:
        """Convert positions in the tile to component indices."""
        return places if self.index is None else self.index[places]

    def sees(self, values: Tensor) -> bool:
        """Return whether the candidate list is long enough, given the log-densities (rows,); store their minimum."""
        if self.index is None:
            return True
        least = float(values.amin())
        self.minima.append(least)
        return least >= self.floor or self.floor == -math.inf

    def add(self, values: Tensor, weights: Tensor | None) -> None:
        """Add the log-densities (rows,) to the total, and the moments of the tile to the sums."""
        self.total += values.sum(dtype=torch.float64) if weights is None else values.double() @ weights
        if self.apart_moments is not None:
            shares = self.shares(weights)
            self._add_apart(shares, self.apart_moments)
            if len(self.apart_moments) == self.height:
                return
            self._add(shares) if self.few else self._keep(product(shares, self.F.T))
        elif self.few:
            self._add(self.shares(weights))
        elif len(self.F) < self.height and not self._has_responsibilities:
            # Weights and normalization are applied to the smaller factor of the product.
            self._keep(product(self._unscaled(), self.F.mul_(self._scaling(weights)).T))
            self.F[0] = 1
        else:
            self._keep(product(self.shares(weights), self.F.T))

    def _add(self, shares: Tensor) -> None:
        """Add the moments of few components with responsibilities ``shares`` (components, rows), in one product."""
        D, z = len(self.X), self._room()
        torch.mul(shares[:, None], self.X, out=z)
        products = product(z.flatten(0, 1), self.X.T).view(-1, D * D).index_select(1, D * self.row + self.column)
        self._keep(torch.cat([product(shares, self.F[: D + 1].T), products], 1))

    def _keep(self, sums: Tensor) -> None:
        sums = sums[:, : self.features]
        if self.index is None:
            self.sums += sums
        else:
            self.sums.index_add_(0, self.index, sums.to(self.sums.dtype))

    def logsumexps(self) -> Tensor:
        """Return the log-sum-exps (rows,), nats; the exponents ``self.E`` may be overwritten."""
        return self.softmax() if self.columns is None else self.columns.logsumexps(self.E)

    def assign(self, weights: Tensor | None) -> Tensor:
        """Compute soft responsibilities, which :meth:`add` uses with the same weights; return the log-sum-exps (rows,)."""
        if self.columns is None:
            return self.softmax()
        self._has_responsibilities = True
        return self.columns.assign(self.E, weights, self.depth)

    def softmax(self) -> Tensor:
        """Fill ``self.R`` with exponentials relative to the largest one of each point; return the log-sum-exps (rows,).

        The exponents ``self.E`` are overwritten.
        """
        # Differences are computed before rounding to float32, since exponents of points far from all components are large.
        largest = self.E.amax(0)
        self.R.copy_(self.E.sub_(largest))
        # Subnormal results make exp up to eighty times slower (measured), so they are set to zero.
        torch.threshold_(self.R.clamp_(min=-self.depth).exp_(), self.nothing, 0.0)
        self._sums = self.R.sum(0)
        return largest + self._sums.log()

    def _unscaled(self) -> Tensor:
        """Return ``self.R`` in the dtype of the products; a conversion overwrites the exponents."""
        return self.R if self.R.dtype == self.E.dtype else self.E.copy_(self.R)

    def _scaling(self, weights: Tensor | None) -> Tensor:
        """Compute the factors (rows,) that convert ``self.R`` to weighted responsibilities, in the dtype of the products."""
        scale = self._sums.to(self.E.dtype).reciprocal()
        return scale if weights is None else scale.mul_(weights)

    def shares(self, weights: Tensor | None = None) -> Tensor:
        """Return weighted responsibilities (components, rows), of :meth:`assign` or from ``self.R``, which may be overwritten."""
        return self.E if self._has_responsibilities else self._unscaled().mul_(self._scaling(weights))

    def onehot(self) -> Tensor:
        """Fill ``self.R`` with hard responsibilities; return the largest exponents (rows,)."""
        best, label = self.E.max(0)
        self._label(label)
        return best

    def _label(self, label: Tensor) -> None:
        self.R.zero_().scatter_(0, label[None], 1)
        self._sums = self.R.new_ones(self.width)

    def _below(self) -> Tensor:
        """Return a boolean buffer (components, rows)."""
        if self._truths is None:
            self._truths = torch.empty(self._e.shape, dtype=torch.bool, device=self._e.device)
        return self._truths[: self.height * self.width].view(self.height, self.width)

    def draw(self, seed: int) -> Tensor:
        """Fill ``self.R`` with one drawn label per point; return the log-sum-exps (rows,)."""
        values = self.softmax()
        generator = torch.Generator(self.E.device).manual_seed(seed)
        self.E.copy_(running_sum(self.E.copy_(self.R)))
        # With u in (0, 1], the first component whose cumulative sum reaches u times the total has positive probability.
        u = 1 - torch.rand(self.width, generator=generator, dtype=self.R.dtype, device=self.R.device)
        label = torch.lt(self.E, u * self.E[-1], out=self._below()).sum(0)
        self._label(label)
        return values
