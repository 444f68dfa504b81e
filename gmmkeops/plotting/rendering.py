r"""Meshes and shaded images of the ellipsoids :math:`\{\mu + r \sum_d \sigma_d u_d e_d : |u| = 1\}` of components.

:math:`\sigma_d^2` and :math:`e_d` are the eigenvalues and eigenvectors of the covariance.
"""

from __future__ import annotations

import numpy as np

__all__ = ["by_height", "camera", "rendered", "surfaces"]

# Numbers of latitude bands and longitude sectors of the mesh of an ellipsoid.
_BANDS, _SECTORS = 8, 16

# Direction of the light (from the left, from above, from the viewer), and the fraction of ambient light.
_LIGHT, _AMBIENT = np.array([-0.45, 0.55, 0.70]), 0.35


def surfaces(means: np.ndarray, scales: np.ndarray, R: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (K, V, 3) of ellipsoids of ``radius`` standard deviations, and vertex indices of triangles (T, 3)."""
    bands, sectors = np.linspace(0, np.pi, _BANDS + 1), np.linspace(0, 2 * np.pi, _SECTORS, endpoint=False)
    theta, phi = (grid.ravel() for grid in np.meshgrid(bands, sectors, indexing="ij"))
    sphere = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], 1)
    vertices = means[:, None] + radius * (sphere * scales[:, None]) @ R.transpose(0, 2, 1)
    band, sector = (grid.ravel() for grid in np.meshgrid(np.arange(_BANDS), np.arange(_SECTORS), indexing="ij"))
    a, b = band * _SECTORS + sector, band * _SECTORS + (sector + 1) % _SECTORS
    upper, lower = np.stack([a, a + _SECTORS, b], 1), np.stack([b, a + _SECTORS, b + _SECTORS], 1)
    # At the poles, one of the two triangles of a cell is degenerate.
    return vertices, np.concatenate([upper[band > 0], lower[band < _BANDS - 1]])


def camera(azimuth: float, elevation: float) -> np.ndarray:
    """Return the rotation (3, 3) to the axes of a view (right, up, towards the viewer) from angles in degrees."""
    a, e = np.deg2rad([azimuth, elevation])
    return np.array(
        [
            [-np.sin(a), np.cos(a), 0.0],
            [-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)],
            [np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)],
        ]
    )


def rendered(
    means: np.ndarray, covariances: np.ndarray, colors: np.ndarray, radius: float, extent: tuple[float, ...], rows: int
) -> np.ndarray:
    r"""Render shaded ellipsoids to an RGBA image (rows, columns, 4) with a transparent background.

    At position (u, v) of the view, the surface of an ellipsoid of :math:`r` standard deviations has the depth

    .. math:: E[w \mid u, v] + \sqrt{\operatorname{var}(w \mid u, v)\, (r^2 - d^2(u, v))},

    where d < r is the Mahalanobis distance of (u, v).

    Args:
        means: Means (K, 3) in the axes of the view: to the right, up and towards the viewer.
        covariances: Covariances (K, 3, 3) in the same coordinates.
        colors: Colors (K, 3), from 0 to 1.
        radius: Radius r of the ellipsoids, standard deviations.
        extent: (left, right, bottom, top) of the view.
        rows: Height of the image in pixels, which are square.
    """
    left, right, bottom, top = extent
    pixel = (top - bottom) / rows
    columns = max(1, round((right - left) / pixel))
    picture, depth = np.zeros((rows, columns, 4)), np.full((rows, columns), -np.inf)
    light = _LIGHT / np.linalg.norm(_LIGHT)
    u, v = left + pixel * (np.arange(columns) + 0.5), bottom + pixel * (np.arange(rows) + 0.5)
    for mean, thin, color in zip(means, covariances, colors, strict=True):
        # Flat ellipsoids get a thickness of a tenth of a pixel.
        C = thin + (0.1 * pixel / radius) ** 2 * np.eye(3)
        reach = radius * np.sqrt(np.diag(C)[:2])
        a, b = np.searchsorted(u, [mean[0] - reach[0], mean[0] + reach[0]])
        c, d = np.searchsorted(v, [mean[1] - reach[1], mean[1] + reach[1]])
        if a == b or c == d:
            continue
        z = np.stack(np.meshgrid(u[a:b] - mean[0], v[c:d] - mean[1]), -1)
        slope = np.linalg.solve(C[:2, :2], C[:2, 2])
        room = radius**2 - np.einsum("rcd,rcd->rc", z @ np.linalg.inv(C[:2, :2]), z)
        away = z @ slope + np.sqrt(max(C[2, 2] - slope @ C[:2, 2], 0) * np.maximum(room, 0))
        seen = (room > 0) & (mean[2] + away > depth[c:d, a:b])
        normal = np.concatenate([z, away[..., None]], -1)[seen] @ np.linalg.inv(C)
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        shade = _AMBIENT + (1 - _AMBIENT) * np.maximum(normal @ light, 0)
        depth[c:d, a:b][seen] = (mean[2] + away)[seen]
        picture[c:d, a:b][seen] = np.concatenate([shade[:, None] * color, np.ones((len(shade), 1))], 1)
    return picture


def by_height(means: np.ndarray) -> np.ndarray:
    """Return colors (K, 3) from 0 to 1 by the third coordinate, from a color map suitable for color-blind readers."""
    import matplotlib

    low, high = np.quantile(means[:, 2], [0.02, 0.98])
    return matplotlib.colormaps["viridis"]((means[:, 2] - low) / max(high - low, 1e-300))[:, :3]
