"""Initialization of an estimator by ``init_params``."""

from __future__ import annotations

import math

from gmmkeops.fitting import SEARCHED, FitResult

__all__ = ["STRATEGIES", "improves", "searches"]

# Strategy of :func:`gmmkeops.initialize` for each value of ``init_params`` in scikit-learn and tgmm.
STRATEGIES = {
    "auto": "auto",
    "kmeans": "kmeans",
    "k-means++": "kmeans++",
    "kmeans++": "kmeans++",
    "kpp": "kmeans++",
    "random": "responsibilities",
    "random_from_data": "random",
    "points": "random",
    "annealed": "annealed",
    "split-merge": "split-merge",
}

# Relative difference below which two objectives are considered equal, so that the first fit is kept.
_TIE = 1e-9


def improves(found: FitResult, best: FitResult | None) -> bool:
    """Return whether a fit is better than the best one so far, by the likelihood of held-out points if there are any."""
    if best is not None and "validation" in found.history:
        return held_out(found) > held_out(best)
    return best is None or found.objective < best.objective - _TIE * max(1.0, abs(best.objective))


def held_out(result: FitResult) -> float:
    """Return the highest mean log-likelihood of held-out points."""
    return max(result.history["validation"], default=-math.inf)


def searches(init_params: str) -> bool:
    """Return whether ``init_params`` searches on a sample, and then compares ``n_init`` initializations itself."""
    return STRATEGIES[init_params] in SEARCHED
