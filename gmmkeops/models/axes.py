"""Principal axes of the components of a mixture."""

from __future__ import annotations

import numpy as np

from gmmkeops.models.mixture import Mixture, as_mixture

__all__ = ["principal_axes"]


def principal_axes(mixture: Mixture) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Principal axes of the components of a mixture in three dimensions.

    Returns:
        Weights (K,), means (K, 3), standard deviations along the axes (K, 3), both in data units, and the axes as rotation
        matrices (K, 3, 3).

    Raises:
        ValueError: The argument is not one mixture in three dimensions.
    """
    if as_mixture(mixture).n_features != 3:
        raise ValueError(
            f"only one mixture in 3 dimensions can be drawn in space, got {mixture.n_features} dimensions."
        )
    mixture = mixture.detach().to("cpu")
    C = mixture.factor.covariances().expand(mixture.n_components, 3, 3).double().numpy()
    values, R = np.linalg.eigh(C)
    # A reflection becomes a rotation by a change of sign.
    R = R * np.where(np.linalg.det(R) < 0, -1.0, 1.0)[:, None, None]
    return mixture.weights.double().numpy(), mixture.means.double().numpy(), np.sqrt(np.maximum(values, 1e-300)), R
