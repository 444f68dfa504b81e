"""Libraries that are measured, by the kind of case. Their adapters are in ours.py and peers.py.

An adapter does outside of the measured time what a user does once: it converts the points (N, D) and the initial parameters.

- ``EM``, ``BAYES``: ``adapter(case, x, start)`` returns ``run(iterations)``, which returns weights, means, covariances and a
  dictionary of remarks (``done``: the iterations performed, if the library may stop earlier).
- ``SCORE``: ``adapter(case, x, start)`` returns ``run()``, which returns the log-densities (N,).
- ``LOSS``: ``adapter(case, x)`` returns ``run()``, which computes a loss and its gradient and returns the loss.
- ``FIT``: ``adapter(case, x)`` fits and returns weights, means, covariances and the number of iterations.
"""

from __future__ import annotations

import ours
import peers

__all__ = ["BAYES", "EM", "FIT", "LOSS", "PACKAGES", "SCORE", "package"]

# Packages of adapters that have other names.
PACKAGES = {
    "GMM module": "gmmkeops",
    "KeOps tutorial": "pykeops",
    "torch in chunks": "torch",
    "torch.distributions": "torch",
    # A file on PYTHONPATH, from github.com/IBM/Flash-GMM; there is no package.
    "Flash-GMM": "flash_gmm",
}

EM = {
    "gmmkeops": ours.engine(),
    "gmmkeops, 1e-4": ours.engine(truncate=1e-4),
    "gmmkeops, every pair": ours.engine(truncate=0),
    "gmmkeops, native": ours.engine(truncate=0, backend="native"),
    "gmmkeops, keops": ours.engine(truncate=0, backend="keops"),
    "gmmkeops, keops 1e-4": ours.engine(truncate=1e-4, backend="keops"),
    "gmmkeops, dense": ours.engine(truncate=0, backend="dense"),
    "gmmkeops, float32 products": ours.engine(precision="high", truncate=0, backend="dense"),
    "gmmkeops, estimator": ours.estimator,
    "scikit-learn": peers.scikit_learn,
    "tgmm": peers.tgmm,
    "pomegranate": peers.pomegranate,
    "torchgmm": peers.torchgmm,
    "gmmx": peers.gmmx,
    "torch in chunks": peers.chunked_torch,
    "Flash-GMM": peers.flash_gmm("flash_gmm"),
    "Flash-GMM, H100": peers.flash_gmm("flash_gmm_h100"),
}
SCORE = {
    "gmmkeops": ours.scores("auto"),
    "gmmkeops, native": ours.scores("native"),
    "gmmkeops, keops": ours.scores("keops"),
    "gmmkeops, dense": ours.scores("dense"),
    "scikit-learn": peers.score_scikit_learn,
    "torch.distributions": peers.score_torch,
    "zuko": peers.score_zuko,
    "tgmm": peers.score_tgmm,
    "pomegranate": peers.score_pomegranate,
    "torchgmm": peers.score_torchgmm,
    "gmmx": peers.score_gmmx,
}
FIT = {"gmmkeops": ours.fitted, "scikit-learn": peers.fit_scikit_learn, "tgmm": peers.fit_tgmm}
BAYES = {
    "gmmkeops": ours.variational("gmmkeops"),
    "gmmkeops, Gibbs": ours.gibbs,
    "scikit-learn": ours.variational("sklearn.mixture"),
}
LOSS = {"gmmkeops": ours.fused, "GMM module": ours.module, "KeOps tutorial": ours.keops_tutorial, "zuko": peers.zuko}


def package(peer: str) -> str:
    """Return the package of an adapter."""
    name = peer.split(",")[0]
    return PACKAGES.get(name, name)
