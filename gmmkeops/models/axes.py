"""Principal axes of the components of a mixture."""

from __future__ import annotations

import numpy as np

from gmmkeops.models.mixture import Mixture, as_mixture

__all__ = ["principal_axes"]


def principal_axes(mixture: Mixture) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute the principal axes of the components of a mixture in three dimensions.

    Returns:
        Weights (K,), means (K, 3) and standard deviations along the axes (K, 3) in data units, and rotation matrices
        (K, 3, 3), whose columns are the axes.

    Raises:
        ValueError: The argument is a batch of mixtures, or does not have three columns.
    """
    if as_mixture(mixture).n_features != 3:
        raise ValueError(f"mixture must have 3 columns, got {mixture.n_features}; take a marginal of 3 columns.")
    mixture = mixture.detach().to("cpu")
    C = mixture.factor.covariances().expand(mixture.n_components, 3, 3).double().numpy()
    values, R = np.linalg.eigh(C)
    # A change of sign turns a reflection into a rotation.
    R = R * np.where(np.linalg.det(R) < 0, -1.0, 1.0)[:, None, None]
    return mixture.weights.double().numpy(), mixture.means.double().numpy(), np.sqrt(np.maximum(values, 1e-300)), R
