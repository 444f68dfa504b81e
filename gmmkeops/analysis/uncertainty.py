r"""Standard errors of maximum-likelihood estimates, from the score vectors of the points.

.. math:: B = \sum_n g_n\, s_n s_n^\top, \qquad s_n = \nabla_\theta \log p(x_n), \qquad
          A = -\nabla^2_\theta \sum_n g_n \log p(x_n), \qquad
          \mathrm{cov}(f(\hat\theta)) \approx J_f\, A^{-1} B A^{-1} J_f^\top

B is the empirical Fisher information. A is the observed information: the complete-data information minus the missing information
of the labels (Louis 1982). The parameters are scaled so that scores are of the order of one. Let
:math:`y = U_k^\top(x - \mu_k)`, let :math:`\eta_k` be the logits, and let the matrices :math:`E_m` be a basis of the
covariances. Component k has the mean :math:`\mu_k + L_k a_k`, the covariance
:math:`L_k (1 + \textstyle\sum_m b_{km} E_m) L_k^\top`, and the scores

.. math::

    \partial_{\eta_k} = r_k - W_k, \qquad \partial_{a_k} = r_k\, y, \qquad
    \partial_{b_{km}} = \tfrac12 r_k (y^\top E_m y - \mathrm{tr} E_m).

References: McLachlan and Peel 2000, *Finite Mixture Models*, §2.15; Louis 1982, *Finding the observed information matrix when
using the EM algorithm*, JRSS B 44; White 1982, *Maximum likelihood estimation of misspecified models*, Econometrica 50.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmkeops._checks import accepts, renamed
from gmmkeops.data import chunked
from gmmkeops.models import Mixture, as_mixture

__all__ = ["StandardErrors", "standard_errors"]

# Maximum number of parameters for which the joint information matrix is computed by default.
_JOINT = 2000

# Maximum number of elements of an intermediate array (rows, K, D + 1, D + 1).
_CHUNK = 1 << 22


@dataclass(frozen=True, repr=False)
class StandardErrors:
    r"""Standard errors of the parameters of a mixture, the result of :func:`standard_errors`.

    Args:
        weights: Standard errors of the weights (K,).
        means: Standard errors of the means (K, D), data units.
        covariances: Standard errors of the covariances in scikit-learn's shapes: (K, D, D) full, (K, D) diagonal, (K,) spherical,
            without the dimension K when tied; squared data units.
        joint: Whether the information matrix of all parameters was inverted. Otherwise the parameters of the other components
            were treated as known, which underestimates the errors of overlapping components.
        points: Total weight of the points.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.linspace(-3, 3, 400).double()[:, None]
        >>> errors = gk.standard_errors(gk.fit(gk.initialize(x, 1), x, gk.EM(reg_covar=0)).mixture, x)
        >>> bool((errors.means[0, 0] - x.std(correction=0) / 20).abs() < 1e-6)  # σ / √N
        True
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    joint: bool
    points: float

    def __repr__(self) -> str:
        K, D = self.means.shape
        return f"StandardErrors(components={K}, features={D}, joint={self.joint}, points={self.points:g})"


@accepts(old={"weights": "sample_weight"})
@torch.no_grad()
def standard_errors(
    mixture: Mixture, x: Any, *, sample_weight: Any = None, joint: bool | None = None, robust: bool = True
) -> StandardErrors:
    r"""Compute standard errors of the parameters of a mixture, in one pass over the points.

    .. math:: \sqrt{\operatorname{diag}(A^{-1} B A^{-1})}, \qquad A = -\nabla^2 \sum_n g_n \log p(x_n), \qquad
              B = \sum_n g_n s_n s_n^\top, \quad s_n = \nabla \log p(x_n)

    Args:
        mixture: A maximum-likelihood fit to these points.
        x: Points (N, D), data units, or any data that :meth:`gmmkeops.Source.of` accepts.
        sample_weight: Weight g of each point (N,), a number of repetitions; or None.
        joint: Whether to invert the information matrix of all parameters; by default for up to 2000 parameters.
        robust: Whether to use the sandwich estimator :math:`A^{-1} B A^{-1}`, which is also valid for misspecified models;
            otherwise the inverse :math:`B^{-1}` of the empirical information is used.

    Returns:
        The standard errors, float64.

    Raises:
        TypeError, ValueError: Points are invalid, or the information matrix is singular (fewer points than parameters, or a
            component of nearly zero weight).

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> mixture = gk.fit(gk.initialize(x, 1), x, gk.EM()).mixture
        >>> gk.standard_errors(mixture, x).means.round(decimals=3).tolist()
        [[0.01]]
    """
    m = as_mixture(mixture).detach().to(torch.float64)
    layout = _Layout(m)
    joint = layout.size <= _JOINT if joint is None else bool(joint)
    tally = _Tally(layout, joint)
    with renamed("weights", "sample_weight"):
        chunks = chunked(x, sample_weight, features=m.n_features, columns=m.columns)
    for chunk in chunks:
        rows = max(1, _CHUNK // (m.n_components * (m.n_features + 1) ** 2))
        g = chunk.points.new_ones(len(chunk.points), dtype=torch.float64) if chunk.weights is None else chunk.weights
        for part, own in zip(chunk.points.to(m.means.device).split(rows), g.split(rows), strict=True):
            tally.add(part.double(), own.to(m.means))
    spread = [tally.covariance(place, robust) for place in range(len(tally.B))]
    return StandardErrors(*layout.errors(spread, joint), joint, float(tally.mass))


class _Layout:
    """Order of the parameters in the score vectors of a mixture.

    Args:
        mixture: The mixture, float64.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.m, factor = mixture, mixture.factor
        K, D = mixture.means.shape
        self.tied = factor.leading == 1 and K > 1
        #: Matrices E (spreads, D, D), a basis of the covariances.
        self.basis = factor.directions(D).to(mixture.means)
        self.spreads = len(self.basis)
        # Parameters of one component: its logit, its mean, and, unless tied, its covariance.
        self.own = 1 + D + (0 if self.tied else self.spreads)
        self.size = K * self.own + (self.spreads if self.tied else 0)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute responsibilities (n, K), and scores (n, K, D) and (n, K, spreads) for responsibilities of one."""
        m = self.m
        r = torch.softmax(m.log_joint(x), -1)
        y = m.factor.whiten(x[:, None, :] - m.means)
        traces = self.basis.diagonal(dim1=1, dim2=2).sum(1)
        return r, y, 0.5 * (m.factor.quadratics(y) - traces)

    def complete(self, S0: Tensor, T: Tensor) -> Tensor:
        """Compute the complete-data information (K, D + spreads, D + spreads) of means and covariances.

        Args:
            S0: Expected count of each component (K,).
            T: Weighted sums of the scores (K, D + spreads), from which the second moments of y are computed.
        """
        D, E = self.m.n_features, self.basis
        traces = E.diagonal(dim1=1, dim2=2).sum(1)
        # Sums of yᵀ E y, and the corresponding second moments of y.
        squares = 2 * T[:, D:] + S0[:, None] * traces
        S2 = torch.einsum("km,mij->kij", squares / (E.square().sum((1, 2))), E)
        products = torch.einsum("mij,njl->mnil", E, E)
        H = torch.einsum("mnil,kli->kmn", products, S2)
        H = 0.5 * (H + H.mT) - 0.5 * S0[:, None, None] * products.diagonal(dim1=2, dim2=3).sum(-1)
        cross = torch.einsum("mij,kj->kim", E, T[:, :D])
        eye = torch.eye(D, dtype=torch.float64, device=T.device) * S0[:, None, None]
        return torch.cat([torch.cat([eye, cross], 2), torch.cat([cross.mT, H], 2)], 1)

    def errors(self, inverses: list[Tensor], joint: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Convert covariance matrices of the scaled parameters to standard errors of weights, means and covariances."""
        m, D, K, own = self.m, self.m.n_features, self.m.n_components, self.own
        W = m.weights
        if joint:
            C = inverses[0][0]
            places = torch.arange(K * own, device=C.device).view(K, own)
            logs = C[places[:, 0]][:, places[:, 0]]
            J = torch.diag(W) - torch.outer(W, W)
            weights = (J @ logs @ J).diagonal()
            blocks = C[places[:, :, None], places[:, None, :]]
            shared = C[K * own :, K * own :][None]
        else:
            blocks, shared = inverses[0], inverses[-1]
            weights = (W * (1 - W)).square() * blocks[:, 0, 0]
        L = m.factor.cholesky().expand(K, D, D)
        means = (L @ blocks[:, 1 : D + 1, 1 : D + 1] @ L.mT).diagonal(dim1=1, dim2=2)
        spread = shared if self.tied else blocks[:, D + 1 :, D + 1 :]
        covariances = self._covariance_errors(spread, L[:1] if self.tied else L)
        return weights.clamp(min=0).sqrt(), means.clamp(min=0).sqrt(), covariances[0] if self.tied else covariances

    def _covariance_errors(self, C: Tensor, L: Tensor) -> Tensor:
        """Convert covariance matrices C of the scaled parameters to standard errors of the covariances."""
        # The derivative of Σ with respect to b_m is L E_m Lᵀ.
        moved = L[:, None] @ self.basis @ L[:, None].mT
        J = self.m.factor.compact(moved).reshape(len(L), self.spreads, -1)
        variances = (J * (C @ J)).sum(1)
        return variances.clamp(min=0).sqrt().reshape(len(L), *self.m.factor.spread_shape(self.m.n_features))


class _Tally:
    """Sums over the points that determine both information matrices.

    Args:
        layout: Order of the parameters.
        joint: Whether all parameters form one block. Otherwise each component and a tied covariance form blocks of their own.
    """

    def __init__(self, layout: _Layout, joint: bool) -> None:
        self.layout, self.joint = layout, joint
        new, (K, D), q = layout.m.means.new_zeros, layout.m.means.shape, layout.spreads
        self.mass, self.S0, self.T, self.M = new(()), new(K), new(K, D + q), new(K, D + q, D + q)
        self.B = [new(1, layout.size, layout.size)] if joint else [new(K, layout.own, layout.own)]
        if layout.tied and not joint:
            self.B.append(new(1, q, q))

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add points (n, D) with weights (n,)."""
        layout = self.layout
        r, y, v = layout.scores(x)
        t = torch.cat([y, v], -1).transpose(0, 1)
        weighted = (g[:, None] * r).T
        self.mass += g.sum()
        self.S0 += weighted.sum(1)
        self.T += (weighted[:, None, :] @ t)[:, 0]
        self.M += (weighted[:, :, None] * t).mT @ t
        inner = y if layout.tied else torch.cat([y, v], -1)
        own = torch.cat([(r - layout.m.weights)[..., None], r[..., None] * inner], -1)
        shared = (r[..., None] * v).sum(1)
        if self.joint:
            whole = torch.cat([own.flatten(1), shared], 1) if layout.tied else own.flatten(1)
            self.B[0][0] += (g[:, None] * whole).T @ whole
            return
        each = own.transpose(0, 1)
        self.B[0] += (g[:, None] * each).mT @ each
        if layout.tied:
            self.B[1][0] += (g[:, None] * shared).T @ shared

    def _curvature(self) -> list[Tensor]:
        """Compute the observed information A, in the same blocks as B."""
        layout, W, N = self.layout, self.layout.m.weights, self.mass
        K, D = layout.m.means.shape
        lost = layout.complete(self.S0, self.T) - self.M
        if not self.joint:
            inner = D if layout.tied else D + layout.spreads
            A = torch.zeros_like(self.B[0])
            A[:, 0, 0] = N * W * (1 - W) - self.S0 * (1 - W).square() - (N - self.S0) * W.square()
            A[:, 0, 1:] = A[:, 1:, 0] = -(1 - W)[:, None] * self.T[:, :inner]
            A[:, 1:, 1:] = lost[:, :inner, :inner]
            rest = [lost[:, D:, D:].sum(0, keepdim=True)] if layout.tied else []
            return [a + b for a, b in zip([A, *rest], self.B, strict=True)]
        A = torch.zeros_like(self.B[0][0])
        first = layout.own * torch.arange(K, device=W.device)
        eye = torch.eye(K, dtype=W.dtype, device=W.device)
        J, crossed = torch.diag(W) - torch.outer(W, W), torch.outer(self.S0, W)
        A[first[:, None], first] = N * J - (torch.diag(self.S0) - crossed - crossed.T + N * torch.outer(W, W))
        shared = K * layout.own + torch.arange(layout.spreads, device=W.device)
        for k in range(K):
            place = first[k] + 1 + torch.arange(layout.own - 1, device=W.device)
            place = torch.cat([place, shared]) if layout.tied else place
            A[place[:, None], place] += lost[k]
            pull = -torch.outer(eye[k] - W, self.T[k])
            A[first[:, None], place] += pull
            A[place[:, None], first] += pull.T
        return [A[None] + self.B[0]]

    def covariance(self, block: int, robust: bool) -> Tensor:
        """Compute the covariance matrices of the parameters of a block."""
        B = self.B[block]
        # The weights do not depend on the sum of the logits, so any positive information of this sum gives the same errors.
        free = torch.zeros_like(B)
        if self.joint:
            v = B.new_zeros(self.layout.size)
            v[: self.layout.m.n_components * self.layout.own : self.layout.own] = 1
            free = (v[:, None] * v)[None] * B.diagonal(dim1=1, dim2=2).amax() / len(v)
        if not robust:
            return _inverse(B + free)
        inverse = _inverse(self._curvature()[block] + free)
        return inverse @ B @ inverse


def _inverse(information: Tensor) -> Tensor:
    """Invert information matrices (blocks, P, P), scaled to a unit diagonal.

    Raises:
        ValueError: A matrix is singular.
    """
    scale = information.diagonal(dim1=1, dim2=2).clamp(min=1e-300).rsqrt()
    scaled = scale[:, :, None] * information * scale[:, None, :]
    values, vectors = torch.linalg.eigh(scaled)
    if bool((values[:, 0] < 1e-12 * values[:, -1]).any()):
        raise ValueError(
            "the information matrix is singular: the model is not identifiable from these points, or the fit has not converged; "
            "fit to convergence, use fewer components or more points, or pass joint=False."
        )
    inverse = (vectors / values[:, None, :]) @ vectors.mT
    return scale[:, :, None] * inverse * scale[:, None, :]
