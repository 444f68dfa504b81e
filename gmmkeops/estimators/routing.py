"""Metadata routing of scikit-learn: requests of ``sample_weight`` by the methods of an estimator.

Pipelines and searches query which metadata the methods of an estimator accept. scikit-learn is imported only when a function of
this module is called. Reference: scikit-learn's user guide, *Metadata routing*.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

__all__ = ["METHODS", "UNCHANGED", "request", "requests"]

E = TypeVar("E")

# Methods with the argument ``sample_weight``.
METHODS = ("fit", "partial_fit", "score")

# scikit-learn's value for a request that is not changed.
UNCHANGED = "$UNCHANGED$"


def requests(estimator: Any) -> Any:
    """Return the metadata requests of an estimator as a ``sklearn.utils.metadata_routing.MetadataRequest``."""
    from sklearn.utils.metadata_routing import MetadataRequest

    own = getattr(estimator, "_metadata_request", None)
    if own is not None:
        return copy.deepcopy(own)
    found = MetadataRequest(owner=type(estimator).__name__)
    for method in METHODS:
        if hasattr(type(estimator), method):
            getattr(found, method).add_request(param="sample_weight", alias=None)
    return found


def request(estimator: E, method: str, sample_weight: Any) -> E:
    """Set whether a method of an estimator requests ``sample_weight``, and return the estimator.

    Raises:
        RuntimeError: Metadata routing is not enabled.
    """
    import sklearn

    if not sklearn.get_config().get("enable_metadata_routing", False):
        raise RuntimeError(
            "This method is only available when metadata routing is enabled. You can enable it using "
            "sklearn.set_config(enable_metadata_routing=True)."
        )
    found = requests(estimator)
    if sample_weight != UNCHANGED:
        getattr(found, method).add_request(param="sample_weight", alias=sample_weight)
    vars(estimator)["_metadata_request"] = found
    return estimator
