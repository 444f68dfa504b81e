r"""
Reduction of a scene of Gaussians
=================================

How many Gaussians does a scene need? A scene of Gaussian splats is a large mixture in three dimensions. Flat parts need few
components, and curved parts need many. ``reduce`` merges pairs of components, the least costly ones first. The cost of a merge
is

.. math:: d_{ij} = (w_i + w_j) \, \mathrm{KL}\!\left( \tfrac{w_i p_i + w_j p_j}{w_i + w_j} \,\Big\|\, p_{ij} \right),

where :math:`p_{ij}` is the Gaussian with the mean and the covariance of the pair. The loss of the whole reduction, from a
mixture p to a mixture q, is measured by the divergence

.. math:: \mathrm{KL}(p \,\|\, q) = \mathbb E_p [\log p - \log q].

The reduction needs only the mixture, not the points.
"""

import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The scene is a still life: a vase, a ring and a ball on a round table. Coordinates are in decimeters. 200 000 points are drawn
# from the surfaces, with a noise of one millimeter.

rng = np.random.default_rng(0)


def revolved(radius, height, count):
    """Draw points from a surface of revolution, given by the radius and the height along its profile."""
    lengths = np.hypot(np.diff(radius), np.diff(height)) * (radius[1:] + radius[:-1])
    along = np.interp(rng.uniform(size=count), np.r_[0, lengths.cumsum()] / lengths.sum(), np.arange(len(radius)))
    r, z = (np.interp(along, np.arange(len(radius)), values) for values in (radius, height))
    turn = rng.uniform(0, 2 * np.pi, count)
    return np.c_[r * np.cos(turn), r * np.sin(turn), z]


t = np.linspace(0, 1, 200)
circle = 2 * np.pi * t
vase = revolved(0.45 + 0.3 * np.sin(2 * np.pi * (t**0.8 - 0.12)), 2.4 * t, 60_000)
ring = revolved(0.8 + 0.25 * np.cos(circle), 0.25 + 0.25 * np.sin(circle), 50_000)
ball = revolved(0.5 * np.sin(np.pi * t), 0.5 - 0.5 * np.cos(np.pi * t), 20_000)
table = revolved(2.6 * np.sqrt(t), 0 * t, 70_000)
places = np.array([[-0.9, 0.5, 0.0], [0.9, -0.6, 0.0], [0.9, 1.1, 0.0]])
x = np.concatenate([vase + places[0], ring + places[1], ball + places[2], table])
x = x + 0.01 * rng.normal(size=x.shape)

# %%
# A mixture of 2000 components is fitted to the points. It begins with clusters of k-means, which have about the same size in flat
# parts as in curved ones. It is then reduced to 10 % of its components.

scene = gk.fit(gk.initialize(x, 2000, "kmeans"), x, gk.EM(tol=0), max_iter=15).mixture
began = time.perf_counter()
reduced, tree = gk.analysis.reduce(scene, 200)
seconds = time.perf_counter() - began
loss = gk.analysis.kl_divergence(scene, reduced)
print(f"reducing: {scene.n_components} components to {reduced.n_components} in {seconds:.2f} s")
on_table = [int((mixture.means[:, 2].abs() < 0.03).sum()) for mixture in (scene, reduced)]
print(f"reducing: on the table: {on_table[0]} components to {on_table[1]}")
total = float(tree.costs.sum())
print(f"reducing: divergence {loss.value:.3f} ± {loss.error:.3f} nats, sum of the costs {total:.3f} nats")

# %%
# The cost ``"bound"``, an upper bound on the divergence of a pair, leads to a larger divergence here. If the points are
# available, EM steps can follow the reduction. The result is compared with a fit of 200 components that begins with k-means.

bound = gk.analysis.reduce(scene, 200, cost="bound").mixture
print(f'reducing: divergence with cost="bound": {gk.analysis.kl_divergence(scene, bound).value:.3f} nats')
em = gk.EM(tol=0)
fits = {
    "2000 components": scene,
    "reduced to 200": reduced,
    "reduced, then 15 EM steps": gk.fit(reduced, x, em, max_iter=15).mixture,
    "200 from k-means, 15 EM steps": gk.fit(gk.initialize(x, 200, "kmeans"), x, em, max_iter=15).mixture,
}
for name, mixture in fits.items():
    print(f"reducing: {name}: log-likelihood {gk.analysis.score(mixture, x):.3f} nats per point")

# %%
# The plots show the scene before and after the reduction, by ellipsoids at two standard deviations; colors show the height.

figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharex=True, sharey=True)
for ax, mixture in zip(axes, (scene, reduced), strict=True):
    plotting.ellipsoids(mixture, ax=ax, azimuth=-65, elevation=30, resolution=800)
    ax.set(xlabel="horizontal (dm)", ylabel="vertical (dm)", title=f"{mixture.n_components} Gaussians")
    ax.label_outer()

# %%
# The costs of the merges increase as components become larger. (Many separate pairs are merged at a time, so that some costs are
# lower than those before.) The divergence is estimated for several numbers of components.

levels = (1500, 1000, 700, 500, 350, 200)
losses = [gk.analysis.kl_divergence(scene, gk.analysis.reduce(scene, n).mixture).value for n in levels]
left_over = range(tree.n_leaves - 1, tree.n_components - 1, -1)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogy(left_over, tree.costs, ".", ms=3)
left.set(xlabel="components after the merge", ylabel="cost of the merge (nats per point)", title="merge tree")
right.plot(left_over, tree.costs.cumsum(0), label="sum of the costs")
right.plot(levels, losses, "o", label="divergence")
right.set(xlabel="components", ylabel="divergence (nats per point)", title="loss of the reduction")
right.legend()
for ax in (left, right):
    ax.invert_xaxis()
plt.show()

# %%
# The reduced mixture is exported as a file of Gaussian splats.

with tempfile.TemporaryDirectory() as folder:
    sizes = []
    for name, mixture in (("scene.ply", scene), ("reduced.ply", reduced)):
        gk.export.splats(mixture, Path(folder) / name)
        sizes.append((Path(folder) / name).stat().st_size / 1024)
print(f"reducing: splat files of {sizes[0]:.0f} kB and {sizes[1]:.0f} kB")

# %%
# The flat table loses a larger fraction of its components than the curved objects, because merges of coplanar components cost
# little. In the plot, the sum of the costs is always larger than the divergence, so that it overestimates the loss here.
# The reduced mixture is also a good initial mixture: after EM steps, its likelihood is higher than that of the fit that begins
# with k-means.
