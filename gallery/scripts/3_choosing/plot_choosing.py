r"""
The number of cell populations in a sample
==========================================

How many kinds of cells are in a sample? A flow cytometer measures the light of each cell in several channels, and cells of one
kind form a cluster. The number of components K is chosen automatically: a mixture with too many components is fitted, and its
components are merged one after the other. A criterion is computed for each of these levels, for example

.. math::

    \mathrm{BIC} = -2 \sum_n \log p(x_n) + P \log N, \qquad \mathrm{AIC3} = -2 \sum_n \log p(x_n) + 3 P, \qquad
    \mathrm{ICL} = \mathrm{BIC} + 2 \sum_n H(r_n),

where P is the number of free parameters, and H the entropy of the responsibilities of a cell. Alternatively, the criterion is
the mean log-likelihood of cells that were held out from the fit.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_iris
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The data are 40 000 simulated cells in three channels from five known populations. Two populations are close, and one is rare.

truth = gk.Mixture.from_parameters(
    weights=[0.34, 0.28, 0.2, 0.14, 0.04],
    means=[[2.0, 2.0, 1.0], [3.2, 3.0, 1.2], [5.5, 2.0, 3.0], [2.0, 5.5, 4.0], [6.0, 6.0, 5.0]],
    covariances=[
        [[0.30, 0.12, 0.0], [0.12, 0.20, 0.0], [0.0, 0.0, 0.10]],
        [[0.20, -0.10, 0.0], [-0.10, 0.25, 0.05], [0.0, 0.05, 0.15]],
        [[0.40, 0.0, 0.15], [0.0, 0.15, 0.0], [0.15, 0.0, 0.30]],
        [[0.15, 0.05, 0.0], [0.05, 0.50, 0.20], [0.0, 0.20, 0.35]],
        [[0.20, 0.0, 0.0], [0.0, 0.20, 0.0], [0.0, 0.0, 0.20]],
    ],
)
generator = torch.Generator().manual_seed(0)
x, kind = truth.sample(40_000, return_labels=True, generator=generator)

# %%
# ``select`` without a list of numbers chooses the number of components. Each row of the table is a level: the mixture after a
# merge and a few EM steps on a sample. "fitted" marks a number of components for which a mixture was fitted to all points. The
# last line gives the reason for the choice. For this many points the default criterion is the likelihood of held-out points in
# threefold cross-validation: the fewest components within one standard error of the highest value are chosen.

table = gk.analysis.select(x)
print(table)
best = table.best
print(f"choosing: {best.n_components} components, {best.factor.family} covariances")

# %%
# ``GaussianMixture("auto")`` makes the same choice, and keeps the table as ``selection_``.

model = gk.GaussianMixture("auto").fit(x)
print(f"choosing: GaussianMixture: {model.n_components_} components, criterion {model.selection_.criterion}")

# %%
# The plots compare three criteria. Circles mark the chosen models, and dots the models that were fitted to all points. Levels
# with fewer than four components are much worse; they are outside of the plots.

tables = {name: gk.analysis.select(x, criterion=name) for name in ("held_out", "bic", "icl")}
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for ax, (name, found) in zip(axes, tables.items(), strict=True):
    plotting.selection(found, ax=ax)
    values = [row[name] for row in found.rows if row["n_components"] >= 4]
    margin = 0.08 * (max(values) - min(values))
    ax.set(xlim=(3.5, 12.5), ylim=(min(values) - margin, max(values) + margin))
    ax.set_title(f"{name}: {found.best.n_components} components")
    print(f"choosing: {name}: {found.reason}")
axes[0].set_ylabel("held-out log-likelihood (nats per point)")

# %%
# The merge tree belongs to the levels of the table. The cost of a merge is the divergence of a pair of components from the
# Gaussian that replaces it. (Costs are estimates. A cost of zero is not shown.) The right plot compares covariance types for a
# list of numbers, by BIC. With a list, a mixture is fitted for each number and type.

tree = table.trees["full"]
sweep = gk.analysis.select(x, range(3, 9), ["full", "tied", "diag", "spherical"])
row = sweep.rows[sweep.place]
print(f"choosing: list: {row['n_components']} components, {row['covariance_type']} covariances")
ratio = float(tree.costs[-4] / tree.costs[:-4].max())
print(f"choosing: the merge of 5 components to 4 costs {ratio:.0f} times as much as the costliest one before")
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogy(range(tree.n_leaves - 1, 0, -1), tree.costs, "o")
left.axvline(best.n_components, color="0.5", linewidth=0.8)
left.set(xlabel="components after the merge", ylabel="cost of the merge (nats per point)", title="merge tree")
left.invert_xaxis()
plotting.selection(sweep, ax=right)
right.set_title("covariance types")

# %%
# The best model is shown for each pair of channels: marginal densities on the diagonal, ellipses at two standard deviations
# below it.

axes = plotting.pairs(best, x, names=["channel 1 (decades)", "channel 2 (decades)", "channel 3 (decades)"])
labels = best.predict(x)
exact, centroid = gk.analysis.silhouette(x, labels, samples=4000, generator=generator)
print(f"choosing: silhouette {exact:.3f} on 4000 cells, {centroid:.3f} by centroids on all")
print(f"choosing: adjusted Rand index {adjusted_rand_score(kind, labels):.3f}")

# %%
# A penalty that prunes components is another way to choose their number. ``penalty_path`` fits mixtures for increasing strengths,
# each from the previous one. It then fits the remaining components without the penalty, and compares these fits by BIC.

path = gk.analysis.penalty_path(x, 12)
print(f"choosing: path: {path.reason}")
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plotting.selection(path, ax=left)
right.semilogx([row["strength"] for row in path.rows], [row["n_components"] for row in path.rows], "o-")
for ax, label in ((left, "BIC (lower is better)"), (right, "remaining components")):
    ax.set(xlabel="strength of the penalty (nats per point)", ylabel=label)
plt.show()

# %%
# The second data set is Fisher's iris data: 150 flowers of three species, with four measurements (cm). A component has 15
# parameters. For fewer than 1000 points and fewer than 20 per parameter the default criterion is AIC3: BIC with a penalty of 3
# for each parameter instead of log N (about 5). The best level and its neighbors are fitted to all points.

irises = load_iris()
small = gk.analysis.select(irises.data)
chosen = small.best
by_bic = gk.analysis.select(irises.data, criterion="bic").best.n_components
agree = contingency_matrix(irises.target, chosen.predict(irises.data).numpy())
print(f"choosing: irises: {small.reason}")
print(f"choosing: irises: {chosen.n_components} components, {chosen.factor.family} covariances; species by component:")
print(agree)
print(f"choosing: irises by BIC: {by_bic} components")

# %%
# For the cells, all three criteria, the list and the penalties lead to five components with full covariances, the number of
# populations. Beyond five components, ICL increases much faster than BIC, because the additional components overlap. In the merge
# tree, the costs increase sharply where the next merge would join two populations. For the other covariance types, BIC still
# decreases at eight components. The silhouette is only moderate, because it depends on distances and not on the shapes of
# clusters, and two populations are close. Of the mixtures of the iris data whose components all have enough points, AIC3 is
# lowest for three components, which are the three species except for five flowers. BIC is lowest for two components: one of them
# contains versicolor and virginica, which 150 flowers are too few to separate by this criterion.
