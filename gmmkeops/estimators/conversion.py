r"""Conversion from and to fitted mixtures of scikit-learn.

.. math:: \Sigma_k^{-1} = U_k U_k^\top, \qquad U_k = \text{precisions\_cholesky\_}_k
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gmmkeops.estimators.gaussian import GaussianMixture
from gmmkeops.models import Mixture

__all__ = ["from_sklearn", "to_sklearn"]


def from_sklearn(model: Any) -> GaussianMixture:
    """Create an estimator with the parameters of a fitted ``sklearn.mixture.GaussianMixture``.

    Args:
        model: The fitted estimator of scikit-learn.

    Raises:
        ValueError: The model is not fitted.

    Example:
        >>> import numpy as np, gmmkeops as gk
        >>> from sklearn.mixture import GaussianMixture
        >>> X = np.random.default_rng(0).normal(size=(50, 2))
        >>> theirs = GaussianMixture(2, random_state=0).fit(X)
        >>> bool(np.allclose(gk.from_sklearn(theirs).score_samples(X), theirs.score_samples(X)))
        True
    """
    if not hasattr(model, "covariances_"):
        raise ValueError(f"{type(model).__name__} is not fitted; call its fit first.")
    mixture = Mixture.from_parameters(model.weights_, model.means_, model.covariances_, model.covariance_type)
    names = getattr(model, "feature_names_in_", None)
    mixture = mixture.named(None if names is None else tuple(names))
    ours = GaussianMixture.from_mixture(mixture, covariance_type=model.covariance_type)
    for name in ("converged_", "n_iter_"):
        if hasattr(model, name):
            setattr(ours, name, getattr(model, name))
    return ours


def to_sklearn(mixture: Mixture | GaussianMixture) -> Any:
    """Create a fitted ``sklearn.mixture.GaussianMixture`` with the parameters of a mixture.

    Tied diagonal and tied spherical covariances are converted to tied full covariances, the only tied type of scikit-learn.

    Args:
        mixture: A single mixture, or a fitted estimator.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: The argument is not a single mixture, or the estimator is not fitted.

    Example:
        >>> import gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([0.5, 0.5], [[0.0], [9.0]], [1.0, 1.0], "spherical")
        >>> gk.to_sklearn(m).predict([[1.0], [8.0]]).tolist()
        [0, 1]
    """
    from sklearn.mixture import GaussianMixture as Theirs

    if isinstance(mixture, GaussianMixture):
        mixture._require_fitted()
    ours = mixture if isinstance(mixture, GaussianMixture) else GaussianMixture.from_mixture(mixture)
    fitted = ours.mixture_.detach().to(device="cpu", dtype=torch.float64)
    tied, factor = ours._fitted_type.startswith("tied_"), fitted.factor
    # The only tied covariances of scikit-learn are full.
    theirs = Theirs(fitted.n_components, covariance_type="tied" if tied else factor.type_name())
    matrices = factor.covariances(), factor.precisions(), factor.matrices()
    covariances, precisions, factors = (m[0] if tied else factor.compact(m) for m in matrices)
    theirs.weights_, theirs.means_ = fitted.weights.numpy(), fitted.means.numpy()
    theirs.covariances_, theirs.precisions_ = covariances.numpy(), precisions.numpy()
    theirs.precisions_cholesky_ = factors.numpy()
    # scikit-learn needs these attributes for warm starts.
    theirs.converged_, theirs.n_iter_ = bool(getattr(ours, "converged_", False)), int(getattr(ours, "n_iter_", 0))
    theirs.n_features_in_ = fitted.n_features
    if fitted.columns is not None:
        theirs.feature_names_in_ = np.array(fitted.columns, dtype=object)
    theirs.lower_bound_ = getattr(ours, "lower_bound_", -float("inf"))
    return theirs
