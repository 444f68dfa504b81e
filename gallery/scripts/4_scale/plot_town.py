r"""
What does a town look like to five hundred Gaussians?
=====================================================

A laser scanner flies over a town and returns points: flat roofs, streets, the fuzz of trees. A Gaussian is a flat plate where the
points are a plane, a needle along a ridge, a ball in a tree; the eigenvalues of each covariance tell which,

.. math:: \lambda_1 \ge \lambda_2 \ge \lambda_3: \qquad \text{ball if } \lambda_3 > 0.1 \lambda_1, \qquad
          \text{else needle if } \lambda_2 < 0.1 \lambda_1, \qquad \text{else plate.}

So five hundred components are a map of the scene, in map coordinates, and a splat file that viewers open.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import gmmkeops as gk

# %%
# A town of some 400 000 returns in map coordinates (m): ground, gabled houses, trees.

rng = np.random.default_rng(0)
parts = [np.c_[rng.uniform(0, 200, (160_000, 2)), 0.02 * rng.normal(size=160_000)]]
for _ in range(28):
    cx, cy = rng.uniform(10, 190, 2)
    w, d, h, turn = rng.uniform(8, 16), rng.uniform(10, 24), rng.uniform(4, 9), rng.uniform(0, np.pi)
    u, v = rng.uniform(-1, 1, (2, 5000))
    roof = np.c_[w / 2 * u, d / 2 * v, h + 3 * (1 - np.abs(u))]
    c, s = np.cos(turn), np.sin(turn)
    parts.append(roof @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + [cx, cy, 0] + 0.03 * rng.normal(size=roof.shape))
for _ in range(40):
    top = np.array([*rng.uniform(0, 200, 2), rng.uniform(5, 8)])
    parts.append(top + rng.normal(size=(2500, 3)) * rng.uniform(1.0, 2.0) * [1, 1, 1.3])
corner = np.array([446_000.0, 5_411_000.0, 210.0])
x = np.concatenate(parts) + corner

# %%
# Five hundred components, computed in float32; the frame keeps the millimetres of the coordinates.

start = gk.initialise(x, 500, generator=torch.Generator().manual_seed(0))
result = gk.fit(start, x, gk.EM(tol=1e-3), max_iter=30, dtype="float32")
print("town:", result)
mixture = result.mixture

values = torch.linalg.eigvalsh(mixture.factor.covariances()).flip(-1)
ball = values[:, 2] > 0.1 * values[:, 0]
needle = ~ball & (values[:, 1] < 0.1 * values[:, 0])
kinds = torch.where(ball, 2, torch.where(needle, 1, 0))
shares = [float(mixture.weights[kinds == kind].sum()) for kind in range(3)]
print("town: plates {:.0%}, needles {:.0%}, balls {:.0%} of the weight".format(*shares))

# %%
# The scene as the ellipsoids of what stands on the ground: plates blue, needles orange, balls green; the ground's own in grey,
# by their centres.

figure = plt.figure(figsize=(12, 5.6), layout="constrained")
origin = corner
left = figure.add_subplot(1, 2, 1, projection="3d")
few = rng.choice(len(x), 15_000, replace=False)
left.scatter(*(x[few] - origin).T, s=0.3, c=x[few, 2], cmap="viridis", rasterized=True)
left.set_title("15 000 of the returns")
right = figure.add_subplot(1, 2, 2, projection="3d")
t, p = np.meshgrid(np.linspace(0, 2 * np.pi, 11), np.linspace(0, np.pi, 7))
sphere = np.stack([np.cos(t) * np.sin(p), np.sin(t) * np.sin(p), np.cos(p)], -1)
L = torch.linalg.cholesky(mixture.factor.covariances()).numpy()
centres = mixture.means.numpy() - origin
ground = centres[:, 2] < 1.5
right.plot(*centres[ground].T, ".", ms=2, color="0.6")
for k in np.flatnonzero(~ground & (mixture.weights.numpy() > 1e-4)):
    surface = 1.6 * sphere @ L[k].T + centres[k]
    colour = ("#0072B2", "#E69F00", "#009E73")[int(kinds[k])]
    right.plot_surface(*np.moveaxis(surface, -1, 0), color=colour, linewidth=0, alpha=0.9)
right.set_title("what stands on the ground, at 1.6 standard deviations")
for ax in (left, right):
    ax.set(xlabel="east (m)", ylabel="north (m)", zlabel="height (m)", xlim=(0, 200), ylim=(0, 200), zlim=(0, 30))
    ax.set_box_aspect((1, 1, 0.35))
    ax.view_init(38, -60)
plt.show()

# %%
# The same as a file of Gaussian splats, with the coordinates' millimetres kept.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "town.ply"
    gk.export.splats(mixture, path)
    print(f"town: a splat file of {path.stat().st_size / 1024:.0f} kB for {len(x)} returns")

# %%
# Roofs and streets come out as plates, trees as balls: a scan of 400 000 points says in 500 Gaussians what it is made of.
