r"""
A spiral with a sparsity penalty
================================

How many components does a spiral need? The KeOps tutorial fits thirty Gaussians to a spiral, with a sparsity penalty on the
square roots of the weights that determines how many components remain,

.. math::

    \min_\theta \; -\frac1N \sum_n \log \sum_k W_k\, \mathcal N\bigl(x_n; \mu_k, (A_k A_k^\top)^{-1}\bigr)
    + \frac{s}{K} \sum_k \sqrt{W_k}, \qquad s = 20, \quad K = 30.

The slope of the square root is infinite at zero, so the weight of a component that explains few points decreases at an
increasing rate. This example repeats the experiment with the same data, initial mixture, optimizer and number of steps.
"""

import math

import matplotlib.pyplot as plt
import torch

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The data are 10 000 points of a noisy spiral in the unit square. The initial mixture is that of the tutorial: means that are
# uniform in the square, factors A = 15 I, and equal weights.

generator = torch.Generator().manual_seed(0)
N, K = 10_000, 30
t = torch.linspace(0, 2 * math.pi, N + 1)[:-1]
x = torch.stack((0.5 + 0.4 * (t / 7) * t.cos(), 0.5 + 0.3 * t.sin()), dim=1)
x = x + 0.02 * torch.randn(N, 2, generator=generator)

start = gk.Mixture(
    logits=torch.ones(K),
    means=torch.rand(K, 2, generator=generator),
    factor=gk.FullFactor.from_factors(15 * torch.eye(2).expand(K, 2, 2)),
)

# %%
# The optimizer is Adam with learning rate 0.1 and 501 steps. A callback stores the mixtures that the tutorial plots.

snapshots = {}


def keep(step):
    if step.iteration in (0, 10, 100, 150, 250, 500):
        snapshots[step.iteration] = step.mixture, step.objective, len(step.active)


result = gk.fit(start, x, gk.Adam(lr=0.1), penalty=gk.penalties.SqrtWeights(20), max_iter=501, callback=keep)
print("spiral:", result)

# %%
# The plots show the density, the contours of its logarithm, and ellipses at two standard deviations.

figure, axes = plt.subplots(2, 3, figsize=(11, 7.4), layout="constrained")
for ax, (iteration, (mixture, objective, live)) in zip(axes.flat, snapshots.items(), strict=True):
    plotting.density(mixture, ax=ax, extent=(0, 1, 0, 1))
    plotting.points(x, ax=ax, limit=5000, s=1, alpha=0.4)
    plotting.ellipses(mixture, ax=ax)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="x (sides of the square)", ylabel="y (sides)", aspect="equal")
    ax.set_title(f"iteration {iteration}: {objective:.3f} nats, {live} active", fontsize=10)

# %%
# The left plot shows the loss. The loss in the tutorial omits the constant :math:`\tfrac D2 \log \pi` of the log-likelihood.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plotting.objective(result, ax=left)
left.set_title("penalized negative log-likelihood")
right.plot(result.history["active"], color="C1")
right.set(xlabel="iteration", ylabel="active components", ylim=(0, K + 1), title="number of active components")
plt.show()

# %%
# Four components with large weights represent the spiral, and a few more have very small weights. The others have been pruned.
# With a smaller strength than 20, more components remain.
