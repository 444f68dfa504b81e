r"""
Local optima and the initial mixture
====================================

How much depends on the mixture with which a fit begins? EM increases the likelihood in every step, but only until it reaches an
optimum near its initial mixture. k-means prefers round clusters of equal size, so that it cuts large clusters and joins small
ones, and EM cannot undo this. The default, ``"auto"``, also moves components over long distances: it splits every component,
performs EM steps, and merges the pairs with the smallest cost

.. math:: d_{ij} = (w_i + w_j) \, \mathrm{KL}\!\left( \tfrac{w_i p_i + w_j p_j}{w_i + w_j} \,\Big\|\, p_{ij} \right),

where :math:`p_{ij}` is the Gaussian with the mean and the covariance of the pair.
"""

import matplotlib.pyplot as plt
import torch

import gmmkeops as gk
from gmmkeops import plotting
from gmmkeops.models import split

# %%
# The data are 6000 points in 12 clusters: two large ones, two elongated ones, and eight small ones.

generator = torch.Generator().manual_seed(0)
centers = [[-6.0, 0.0], [7.0, 1.0], [0.0, 6.0], [0.0, -6.0]] + [
    [x, y] for x in (-0.9, 0.9) for y in (-2.1, -0.7, 0.7, 2.1)
]
spreads = [[[4.0, 0.0], [0.0, 4.0]], [[3.0, 1.0], [1.0, 3.0]], [[9.0, 0.0], [0.0, 0.02]], [[9.0, 1.2], [1.2, 0.2]]]
truth = gk.Mixture.from_parameters(
    weights=[0.3, 0.3, 0.08, 0.08] + [0.03] * 8,
    means=centers,
    covariances=spreads + [[[0.03, 0.0], [0.0, 0.03]]] * 8,
)
x = truth.sample((6000,), generator=generator)

# %%
# Two fits of 12 components differ only in their initial mixtures. A number instead of an initial mixture lets ``fit`` call
# ``initialize(x, 12, "auto")``, and ``report.start`` tells how the initial mixture was found.

em = gk.EM(tol=1e-4, accelerate=True)
fits = {
    '"kmeans"': gk.fit(gk.initialize(x, 12, "kmeans"), x, em, max_iter=1000),
    '"auto"': gk.fit(12, x, em, max_iter=1000),
}
for name, result in fits.items():
    print(f"starts: {name}: log-likelihood {result.log_likelihood:.4f} after {result.n_iter} iterations")
start = fits['"auto"'].report.start
print(f"starts: {start.rounds} rounds from {start.candidates} candidates, {start.sweeps:.0f} E-steps")
print(f"starts: true mixture: log-likelihood {gk.analysis.score(truth, x):.4f}")

extent = (-12, 13, -9, 9)


def show(ax, mixture, title):
    plotting.points(x, ax=ax, limit=3000, s=1, color="0.6")
    plotting.ellipses(mixture, ax=ax, alpha=1.0)
    ax.set(
        title=title,
        xlabel="x (units)",
        ylabel="y (units)",
        aspect="equal",
        xlim=extent[:2],
        ylim=extent[2:],
    )


figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
for ax, (name, result) in zip(axes, fits.items(), strict=True):
    show(ax, result.mixture, f"{name}: {result.log_likelihood:.3f} nats per point")
    ax.label_outer()

# %%
# A round, step by step, from the optimum to which k-means leads. Each step changes the number of components or the likelihood.

twice = split(fits['"kmeans"'].mixture)
climbed = gk.fit(twice, x, gk.EM(tol=0), max_iter=10).mixture
merged, _ = gk.analysis.reduce(climbed, 12)
final = gk.fit(merged, x, gk.EM(tol=0), max_iter=15).mixture
figure, axes = plt.subplots(2, 2, figsize=(11, 8.2), layout="constrained")
steps = {"split": twice, "ten EM steps": climbed, "merge": merged, "EM steps again": final}
for ax, (name, mixture) in zip(axes.flat, steps.items(), strict=True):
    score = gk.analysis.score(mixture, x)
    print(f"starts: {name}: {mixture.n_components} components, log-likelihood {score:.4f}")
    show(ax, mixture, f"{name}: {mixture.n_components} components, {score:.3f} nats per point")
    ax.label_outer()

# %%
# Halves of a large cluster have a small cost and are merged; halves that EM has moved to different small clusters are kept. The
# search keeps the result of a round if it is better, and continues with the next round.
#
# ``reduce`` merges components of any mixture. The costs of the merges show how many components are needed: they increase where
# the next merge would join two clusters. (A cost is an estimate. Those that are zero are not shown.)

large = gk.fit(60, x, gk.EM(tol=0), max_iter=50).mixture
reduced, tree = gk.analysis.reduce(large, 1)
twelve, _ = gk.analysis.reduce(large, 12)
print(f"starts: 60 components reduced to 12: log-likelihood {gk.analysis.score(twelve, x):.4f}")
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
left.semilogy(range(59, 0, -1), tree.costs, "o", ms=5)
left.axvline(12, color="0.5", linewidth=0.8)
left.set(xlabel="number of components after the merge", ylabel="cost of the merge (nats per point)", title="merge tree")
left.invert_xaxis()
show(right, twelve, "60 components reduced to 12")
plt.show()
