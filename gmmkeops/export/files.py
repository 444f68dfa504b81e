r"""Export to files: arrays for scikit-learn, ellipsoids for mesh viewers, Gaussian splats for splat viewers.

.. math:: \Sigma_k = R_k\, \mathrm{diag}(s_k)^2 R_k^\top

A splat consists of the mean, the logarithms of :math:`s_k`, the rotation :math:`R_k` as a unit quaternion, the logit of the
opacity, and a color (the constant term of spherical harmonics). References: Kerbl, Kopanas, Leimkühler and Drettakis 2023, *3D
Gaussian splatting for real-time radiance field rendering* (the file layout); Shepperd 1978, *Quaternion from rotation matrix*.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from gmmkeops._checks import as_number
from gmmkeops.models import Mixture, as_mixture, check_output, principal_axes, write_whole
from gmmkeops.plotting import by_height, surfaces

__all__ = ["ellipsoids", "npz", "splats"]

# Value of the constant spherical harmonic function.
_HARMONIC = 0.28209479177387814

# Number of coefficients of higher harmonics that splat viewers expect: degrees one to three of three colors.
_REST = 45


def npz(mixture: Mixture, path: str | os.PathLike[str]) -> None:
    """Write the fitted attributes of ``sklearn.mixture.GaussianMixture`` to a file that ``numpy.load`` reads.

    The arrays are ``weights_`` (K,), ``means_`` (K, D), ``covariances_`` and ``precisions_cholesky_`` in scikit-learn's shape for
    the covariance type, float64, data units; ``covariance_type``; and ``feature_names_in_`` if the columns have names.

    Args:
        mixture: A single mixture. Tied diagonal and tied spherical covariances, which scikit-learn does not support, are
            written as "tied".
        path: The ``.npz`` file.

    Raises:
        ValueError: The mixture is a batch, or the path has another suffix.
        OSError: The file cannot be written; an existing file is kept.

    Example:
        >>> import os, tempfile, numpy as np, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[0.0, 2.0]], [4.0], "spherical")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gk.export.npz(m, os.path.join(folder, "m.npz"))
        ...     np.load(os.path.join(folder, "m.npz"))["covariances_"]
        array([4.])
    """
    from gmmkeops.estimators import GaussianMixture

    path = check_output(path, (".npz",))
    model: Any = GaussianMixture.from_mixture(as_mixture(mixture).detach().to("cpu"))
    kind = model.covariance_type
    if kind in ("tied_diag", "tied_spherical"):
        K, D, C = mixture.n_components, mixture.n_features, mixture.factor.covariances().detach().cpu().numpy()
        full = np.broadcast_to(C, (K, D, D))[0]
        arrays = {"covariances_": full, "precisions_cholesky_": np.diag(1 / np.sqrt(np.diag(full)))}
        kind = "tied"
    else:
        arrays = {"covariances_": model.covariances_, "precisions_cholesky_": model.precisions_cholesky_}
    arrays |= {"weights_": model.weights_, "means_": model.means_, "covariance_type": np.array(kind)}
    if mixture.columns is not None:
        arrays["feature_names_in_"] = np.array(mixture.columns)
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_whole(path, file.getvalue())


def ellipsoids(mixture: Mixture, path: str | os.PathLike[str], *, radius: float = 2.0) -> None:
    """Write one ellipsoid per component as a colored triangle mesh in PLY, with coordinates in float64.

    Args:
        mixture: One mixture in three dimensions.
        path: The ``.ply`` file.
        radius: Radius of the ellipsoids, standard deviations.

    Raises:
        ValueError: The mixture is not three-dimensional, or the path has another suffix.
        ImportError: plyfile is not installed.

    Example:
        >>> import os, tempfile, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[4e5, 5e6, 0.0]], [4.0], "spherical")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gk.export.ellipsoids(m, os.path.join(folder, "m.ply"))
        ...     gk.Source.of(os.path.join(folder, "m.ply")).survey().rows  # vertices
        144
    """
    from plyfile import PlyData, PlyElement

    path = check_output(path, (".ply",))
    _, means, scales, R = principal_axes(mixture)
    radius = as_number(radius, "radius", 0, above=True)
    vertices, triangles = surfaces(means, scales, R, radius)
    K, count, _ = vertices.shape
    rows = np.empty(K * count, [(name, "f8") for name in "xyz"] + [(name, "u1") for name in _COLORS])
    for d, name in enumerate("xyz"):
        rows[name] = vertices[:, :, d].ravel()
    for d, name in enumerate(_COLORS):
        rows[name] = np.repeat((255 * by_height(means)[:, d]).astype(np.uint8), count)
    faces = np.empty(K * len(triangles), [("vertex_indices", "i4", (3,))])
    faces["vertex_indices"] = (triangles[None] + count * np.arange(K)[:, None, None]).reshape(-1, 3)
    elements = [PlyElement.describe(rows, "vertex"), PlyElement.describe(faces, "face")]
    _write(PlyData(elements, comments=[f"{K} ellipsoids of {radius:g} standard deviations"]), path)


def splats(mixture: Mixture, path: str | os.PathLike[str]) -> np.ndarray:
    """Write the components as Gaussian splats in the PLY layout that splat viewers read.

    Viewers read float32. To keep a precision of millimeters for map coordinates, an integer offset near the median of the
    means is subtracted. The file contains the offset as a comment, ``offset X Y Z``. Covariances have a relative precision
    of about 1e-6.

    Args:
        mixture: One mixture in three dimensions.
        path: The ``.ply`` file.

    Returns:
        The offset (3,), data units. Adding it to the coordinates in the file gives data coordinates.

    Raises:
        ValueError: The mixture is not three-dimensional, or the path has another suffix.
        ImportError: plyfile is not installed.

    Reference:
        Kerbl, Kopanas, Leimkühler and Drettakis 2023, *3D Gaussian splatting for real-time radiance field rendering*, ACM
        Transactions on Graphics 42; the layout is that of the authors' program.

    Example:
        >>> import os, tempfile, gmmkeops as gk
        >>> m = gk.Mixture.from_parameters([1.0], [[4e5, 5e6, 0.0]], [4.0], "spherical")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gk.export.splats(m, os.path.join(folder, "m.ply")).tolist()
        [400000.0, 5000000.0, 0.0]
    """
    from plyfile import PlyData, PlyElement

    path = check_output(path, (".ply",))
    W, means, scales, R = principal_axes(mixture)
    offset = np.round(np.median(means, 0))
    area = np.sort(scales, 1)[:, 1:].prod(1)
    cover = W / area
    opacity = np.clip(1 - np.exp(-2 * cover / np.median(cover)), 0.02, 0.99)
    columns = {name: (means - offset)[:, d] for d, name in enumerate("xyz")}
    columns |= {name: np.zeros(len(W)) for name in ("nx", "ny", "nz")}
    columns |= {f"f_dc_{d}": (by_height(means)[:, d] - 0.5) / _HARMONIC for d in range(3)}
    columns |= {f"f_rest_{i}": np.zeros(len(W)) for i in range(_REST)}
    columns |= {"opacity": np.log(opacity / (1 - opacity))}
    columns |= {f"scale_{d}": np.log(scales[:, d]) for d in range(3)}
    columns |= {f"rot_{d}": part for d, part in enumerate(_quaternions(R).T)}
    rows = np.empty(len(W), [(name, "f4") for name in columns])
    for name, values in columns.items():
        rows[name] = values
    note = "offset " + " ".join(f"{value:.17g}" for value in offset)
    _write(PlyData([PlyElement.describe(rows, "vertex")], comments=[note]), path)
    return offset


_COLORS = ("red", "green", "blue")


def _write(data: Any, path: Path) -> None:
    file = io.BytesIO()
    data.write(file)
    write_whole(path, file.getvalue())


def _quaternions(R: np.ndarray) -> np.ndarray:
    """Convert rotations (K, 3, 3) to unit quaternions w, x, y, z (K, 4), from the largest entry to avoid cancellation."""
    diagonal = R.diagonal(axis1=1, axis2=2)
    trace = diagonal.sum(1)
    squares = np.concatenate([1 + trace[:, None], 1 - trace[:, None] + 2 * diagonal], 1)
    w = np.stack([squares[:, 0], R[:, 2, 1] - R[:, 1, 2], R[:, 0, 2] - R[:, 2, 0], R[:, 1, 0] - R[:, 0, 1]], 1)
    x = np.stack([w[:, 1], squares[:, 1], R[:, 1, 0] + R[:, 0, 1], R[:, 0, 2] + R[:, 2, 0]], 1)
    y = np.stack([w[:, 2], x[:, 2], squares[:, 2], R[:, 2, 1] + R[:, 1, 2]], 1)
    z = np.stack([w[:, 3], x[:, 3], y[:, 3], squares[:, 3]], 1)
    rows = np.stack([w, x, y, z], 1)[np.arange(len(R)), squares.argmax(1)]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
