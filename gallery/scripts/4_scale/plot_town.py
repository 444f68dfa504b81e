r"""
An airborne laser scan of a town
================================

How well do three thousand Gaussians describe the laser scan of a town? A component is a flat plate on roofs and streets, a
needle along a ridge, and a ball in a tree. The eigenvalues of the covariances define these shapes,

.. math:: \lambda_1 \ge \lambda_2 \ge \lambda_3: \qquad \text{ball if } \lambda_3 > 0.1 \lambda_1, \qquad
          \text{else needle if } \lambda_2 < 0.1 \lambda_1, \qquad \text{else plate.}

The mixture is fitted in map coordinates and exported as a file of Gaussian splats.
"""

import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The environment variable ``SCAN=town.laz`` selects a scan of your own. The default is an ISPRS test town (published in
# PDAL/data under CC-BY-4.0) if its file exists beside the checkout; otherwise 400 000 returns of ground, gabled houses and
# trees are simulated. Coordinates are map coordinates in meters.


def made_town():
    rng = np.random.default_rng(0)
    parts = [np.c_[rng.uniform(0, 200, (160_000, 2)), 0.02 * rng.normal(size=160_000)]]
    for _ in range(28):
        cx, cy = rng.uniform(10, 190, 2)
        w, d, h, turn = rng.uniform(8, 16), rng.uniform(10, 24), rng.uniform(4, 9), rng.uniform(0, np.pi)
        u, v = rng.uniform(-1, 1, (2, 5000))
        roof = np.c_[w / 2 * u, d / 2 * v, h + 3 * (1 - np.abs(u))]
        c, s = np.cos(turn), np.sin(turn)
        turned = roof @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        parts.append(turned + [cx, cy, 0] + 0.03 * rng.normal(size=roof.shape))
    for _ in range(40):
        top = np.array([*rng.uniform(0, 200, 2), rng.uniform(5, 8)])
        parts.append(top + rng.normal(size=(2500, 3)) * rng.uniform(1.0, 2.0) * [1, 1, 1.3])
    return np.concatenate(parts) + np.array([446_000.0, 5_411_000.0, 210.0])


scan = Path(os.environ.get("SCAN") or Path(gk.__file__).parents[2] / "shared/data/isprs_city2.laz")
x = np.concatenate([chunk.points for chunk in gk.Source.of(scan).chunks()]) if scan.exists() else made_town()
low, high = np.quantile(x[:, 2], [0.0005, 0.9995])
x = x[(x[:, 2] > low - 5) & (x[:, 2] < high + 5)]  # removes outliers such as birds and echoes
print(f"town: {len(x)} returns of {scan.name if scan.exists() else 'a simulated town'}")

# %%
# Three thousand components are fitted in float32; in standardized coordinates, this resolves millimeters. They begin as clusters
# of k-means, which are compact. The default initial mixture leads to a higher likelihood, with more needles.

start = gk.initialize(x, 3000, "kmeans", generator=torch.Generator().manual_seed(0))
result = gk.fit(start, x, gk.EM(tol=0), max_iter=20, dtype="float32")
print("town:", result)
mixture = result.mixture

values = torch.linalg.eigvalsh(mixture.factor.covariances()).flip(-1)
ball = values[:, 2] > 0.1 * values[:, 0]
needle = ~ball & (values[:, 1] < 0.1 * values[:, 0])
kinds = torch.where(ball, 2, torch.where(needle, 1, 0))
shares = [float(mixture.weights[kinds == kind].sum()) for kind in range(3)]
print("town: plates {:.0%}, needles {:.0%}, balls {:.0%} of the weight".format(*shares))

# %%
# The plots show the returns, and ellipsoids at two standard deviations, from the south; colors show the height.

middle = np.median(x, 0)
centered = x - middle
local = gk.Mixture(mixture.logits, mixture.means - torch.from_numpy(middle), mixture.factor)
look = {"azimuth": -75.0, "elevation": 42.0}
places = plotting.view(centered, **look)
order = places[:, 2].argsort()  # the nearest points are drawn last
height = centered[order, 2]
low, high = np.quantile(height, [0.02, 0.98])

figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained", sharex=True, sharey=True)
drawn = left.scatter(*places[order, :2].T, s=0.25, c=height, vmin=low, vmax=high, linewidths=0, rasterized=True)
left.set(title=f"{len(x)} returns", aspect="equal")
colors = drawn.to_rgba(local.means[:, 2])
plotting.ellipsoids(local, ax=right, minimum_weight=5e-5, color=colors, resolution=1000, **look)
right.set_title(f"{len(colors)} Gaussians")
for ax in (left, right):
    ax.set(xlabel="horizontal (m)", ylabel="vertical (m)")
    ax.label_outer()
figure.colorbar(drawn, ax=right, label="height above the mean (m)", shrink=0.7)
plt.show()

# %%
# The mixture is exported as a file of Gaussian splats, which resolves millimeters.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "town.ply"
    gk.export.splats(mixture, path)
    print(f"town: a splat file of {path.stat().st_size / 1024:.0f} kB for {len(x)} returns")

# %%
# Most components on roofs and streets are plates, and most components in trees are balls. Three thousand components thus
# summarize a scan of more than 400 000 points.
