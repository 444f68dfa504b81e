r"""
How many Gaussians does a spiral need?
======================================

The KeOps tutorial fits thirty Gaussians to a spiral and lets a sparsity prior on the square roots of their weights
decide how many to keep,

.. math::

    \min_\theta \; -\frac1N \sum_n \log \sum_k W_k\, \mathcal N\bigl(x_n; \mu_k, (A_k A_k^\top)^{-1}\bigr)
    + \frac{s}{K} \sum_k \sqrt{W_k}, \qquad s = 20, \quad K = 30.

The slope of the square root is infinite at zero, so a component that explains little loses weight faster and faster.
Here is the same experiment: the same data, start, optimizer and number of steps.
"""

import math

import matplotlib.pyplot as plt
import torch

import gmmkeops as gk
from gmmkeops import plotting

# %%
# Ten thousand points on a noisy spiral in the unit square, and the tutorial's start: means uniform in the square,
# factors A = 15 I, equal weights.

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
# Adam with learning rate 0.1 for 501 steps. A callback keeps the mixture at the tutorial's iterations.

snapshots = {}


def keep(step):
    if step.iteration in (0, 10, 100, 150, 250, 500):
        snapshots[step.iteration] = step.mixture, step.objective, len(step.active)


result = gk.fit(start, x, gk.Adam(lr=0.1), penalty=gk.penalties.SqrtWeights(20), max_iter=501, callback=keep)
print("spiral:", result)

# %%
# The density, its log-contours and the two-sigma ellipses on the way.

figure, axes = plt.subplots(2, 3, figsize=(11, 7.4), layout="constrained")
for ax, (iteration, (mixture, objective, live)) in zip(axes.flat, snapshots.items(), strict=True):
    plotting.density(mixture, ax=ax, extent=(0, 1, 0, 1))
    plotting.points(x, ax=ax, limit=5000, s=1, alpha=0.4)
    plotting.ellipses(mixture, ax=ax)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="x (sides of the square)", ylabel="y (sides)", aspect="equal")
    ax.set_title(f"iteration {iteration}: {objective:.3f} nats, {live} live", fontsize=10)

# %%
# The loss, which the tutorial plots without the constant :math:`\tfrac D2 \log \pi` (its log-likelihood lacks it).

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plotting.objective(result, ax=left)
left.set_title("penalized negative log-likelihood")
right.plot(result.history["active"], color="C1")
right.set(xlabel="iteration", ylabel="live components", ylim=(0, K + 1), title="components that own a point")
plt.show()

# %%
# Four Gaussians carry the spiral, one per arm, and a few more hold a trace of weight; the others have left the work on
# the way. A strength of 20 is a strong opinion: halve it and more components stay.
