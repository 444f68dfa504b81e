r"""What minibatch methods remember of earlier batches: moments of one point's mass, blended.

.. math:: M \leftarrow (1 - \rho_t)\, M + \rho_t\, \bar M_t, \qquad \rho_t = (t + t_0)^{-\kappa}

For EM this is stepwise EM (Cappé and Moulines 2009, *On-line EM algorithm for latent data models*); for variational Bayes
it is the natural-gradient step of Hoffman, Blei, Wang and Paisley 2013, *Stochastic variational inference*.
"""

from __future__ import annotations

import torch

from gmmkeops.components import Moments
from gmmkeops.models import Mixture

__all__ = ["blended", "expected"]


def blended(memory: Moments, sums: Moments, share: float) -> Moments:
    """A batch's moments enter the memory of those before, as so large a share of one point's mass."""
    return memory * (1 - share) + sums * (share / float(sums.mass))


def expected(mixture: Mixture) -> Moments:
    """The moments of one point's mass spread exactly as the mixture says: what there is to remember at the start."""
    W, zero = mixture.weights, mixture.means.new_zeros(())
    C = mixture.factor.second_moments(mixture.factor.covariances().expand(mixture.components, -1, -1))
    S2 = W.reshape(-1, *[1] * (C.ndim - 1)) * C
    return Moments(W, torch.zeros_like(mixture.means), S2, mixture.means, zero, zero + 1)
