r"""
The number of cell populations in a sample
==========================================

How many kinds of cells are in a sample? A flow cytometer measures the light of each cell in several channels, and cells of one
kind form a cluster. The number of clusters is estimated by minimizing the Bayesian information criterion,

.. math:: \mathrm{BIC} = -2 \sum_n \log p(x_n) + P \log N,

where P is the number of free parameters. The criterion increases if a further component improves the likelihood by less than
the penalty for its parameters. Several numbers of components and covariance types are compared.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_iris
from sklearn.metrics.cluster import contingency_matrix

import gmmkeops as gk
from gmmkeops import plotting
from gmmkeops.analysis import selection

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
# Models with one to nine components and four covariance types are compared. For each number of components, all covariance types
# use the same initialization.

table = selection.select(x, range(1, 10), ["full", "tied", "diag", "spherical"], generator=generator)
print(table)
best = table.best
print(f"choosing: {best.n_components} components, {best.factor.family} covariances")

# %%
# The plots show the criteria against the number of components. A difference of 10 in the BIC corresponds to a likelihood ratio
# of e⁵, so the differences here are decisive.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plotting.selection(table, ax=left)
left.set_title("Bayesian information criterion")
plotting.selection(table, ax=right, criterion="icl")
right.set_title("integrated completed likelihood")

# %%
# The best model is shown for each pair of channels: marginal densities on the diagonal, ellipses at two standard deviations
# below it.

axes = plotting.pairs(best, x, names=["channel 1 (decades)", "channel 2 (decades)", "channel 3 (decades)"])
exact, centroid = selection.silhouette(x, best.predict(x), samples=4000, generator=generator)
print(f"choosing: silhouette {exact:.3f} on 4000 cells, {centroid:.3f} by centroids on all")
plt.show()

# %%
# The second data set is Fisher's iris data: 150 flowers of three species, with four measurements (cm).

irises = load_iris()
small = selection.select(irises.data, range(1, 7), ["full", "tied", "diag"], generator=generator, max_iter=500)
chosen = small.best
agree = contingency_matrix(irises.target, chosen.predict(irises.data).numpy())
print(f"choosing: irises: {chosen.n_components} components, {chosen.factor.family} covariances; species by component:")
print(agree)

# %%
# With full covariances, the criterion finds exactly five populations; the other covariance types need more components. The
# silhouette is only moderate, because it depends on distances and not on the shapes of clusters, and two populations are close.
# For the iris data, the criterion selects two components: 150 flowers are too few to separate versicolor from virginica.
