r"""Reductions over points or components without an N x K array: log-sum-exps, labels and moments.

.. math::

    e_{nk} = c_k - \tfrac12 \lVert U_k^\top (x_n - \mu_k) \rVert^2, \qquad
    \ell_n = \log \sum_k \exp e_{nk}, \qquad r_{nk} = g_n \exp(e_{nk} - \ell_n)

with offsets c, means μ, precision factors U, weights g and responsibilities r. The engines ``native``, ``keops``,
``triton`` and ``dense`` have the same interface (:mod:`gmmkeops.reductions.protocol`); none stores an N x K array.

The gradients of :math:`\sum_n g_n \ell_n` follow from the moments of r:

.. math::

    \partial_{c_k} = S^0_k, \qquad \partial_{\mu_k} = U_k U_k^\top S^1_k, \qquad \partial_{U_k} = -S^2_k U_k, \qquad
    \partial_{x_n} = -\sum_k r_{nk}\, U_k U_k^\top (x_n - \mu_k)

so that one pass over the data gives the gradients of all parameters and the sufficient statistics of EM.
"""

from gmmkeops.reductions.arrangement import arrange, may_arrange
from gmmkeops.reductions.choice import BACKENDS, TABLE, engine, fallback
from gmmkeops.reductions.choice import unavailable as unavailable
from gmmkeops.reductions.cores import alone as alone
from gmmkeops.reductions.cores import one_thread as one_thread
from gmmkeops.reductions.cores import threads_for as threads_for
from gmmkeops.reductions.cores import user_threads as user_threads
from gmmkeops.reductions.derivatives import recordable as recordable
from gmmkeops.reductions.derivatives import recording as recording
from gmmkeops.reductions.dispatch import ASSIGNMENTS
from gmmkeops.reductions.functions import argmax, attached, logsumexp, moments, topk, total
from gmmkeops.reductions.host_moments import mixture_moments as mixture_moments
from gmmkeops.reductions.host_moments import valid_gradients as valid_gradients
from gmmkeops.reductions.host_steps import em_steps as em_steps
from gmmkeops.reductions.keops.loading import unavailable as keops_unavailable  # noqa: F401
from gmmkeops.reductions.library import instruction_set as instruction_set
from gmmkeops.reductions.library import reason as native_unavailable  # noqa: F401
from gmmkeops.reductions.native.columns import native_white as native_white
from gmmkeops.reductions.native.columns import spread_of as spread_of
from gmmkeops.reductions.native.kmeans import Clustering as Clustering
from gmmkeops.reductions.native.kmeans import kmeans_runs as kmeans_runs
from gmmkeops.reductions.native.kmeans import lloyd_settings as lloyd_settings
from gmmkeops.reductions.native.pairs import pair_costs as pair_costs
from gmmkeops.reductions.native.rounds import Clusters as Clusters
from gmmkeops.reductions.native.rounds import Rounds as Rounds
from gmmkeops.reductions.native.rounds import RoundSettings as RoundSettings
from gmmkeops.reductions.native.rounds import em_climb as em_climb
from gmmkeops.reductions.native.seeds import chosen_seeds as chosen_seeds
from gmmkeops.reductions.native.steps import Pool as Pool
from gmmkeops.reductions.native.steps import Steps as Steps
from gmmkeops.reductions.native.steps import StepSettings as StepSettings
from gmmkeops.reductions.native.steps import maximizes as maximizes
from gmmkeops.reductions.native.steps import native_m_step as native_m_step
from gmmkeops.reductions.prepared import Prepared as Prepared
from gmmkeops.reductions.truncation.truncation import Truncation

__all__ = [
    "ASSIGNMENTS",
    "BACKENDS",
    "TABLE",
    "Truncation",
    "argmax",
    "arrange",
    "attached",
    "engine",
    "fallback",
    "logsumexp",
    "may_arrange",
    "moments",
    "topk",
    "total",
]
