r"""
Can EM do what the tutorial does with Adam?
===========================================

The √-weight prior is said to need a gradient. But it is concave in the weights, so it lies below its tangent at the current
ones, and maximizing the likelihood with the tangent in its place is an M-step,

.. math:: W_k = \frac{S^0_k}{\lambda + N c_k}, \qquad c_k = \frac{s}{2 K \sqrt{W_k}},

with one number λ that makes the weights sum to one. Each step can only lower the penalized objective (majorize-minimize). Here
it runs against Adam on the spiral, on one axis of time, plain and accelerated.
"""

import math

import matplotlib.pyplot as plt
import torch

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The tutorial's spiral, from a k-means start.

generator = torch.Generator().manual_seed(0)
N, K, strength = 10_000, 30, 3.0
t = torch.linspace(0, 2 * math.pi, N + 1)[:-1]
x = torch.stack((0.5 + 0.4 * (t / 7) * t.cos(), 0.5 + 0.3 * t.sin()), dim=1)
x = x + 0.02 * torch.randn(N, 2, generator=generator)
start = gk.initialize(x, K, "kmeans", generator=generator)
penalty = gk.penalties.SqrtWeights(strength)

# %%
# Three methods, one loop.

methods = {
    "EM": (gk.EM(tol=1e-6), 600),
    "EM, accelerated": (gk.EM(tol=1e-6, accelerate=True), 200),
    "Adam, lr 0.05": (gk.Adam(lr=0.05), 600),
}
gk.fit(start, x, gk.Adam(), max_iter=1)  # torch.optim's import is not Adam's time
results = {}
for name, (method, iterations) in methods.items():
    results[name] = gk.fit(start, x, method, penalty=penalty, max_iter=iterations)
    print(f"EM against Adam: {name}:", results[name])

# %%
# Objective against seconds, and what each of the two kinds keeps.

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for (name, result), style in zip(results.items(), ("-", "--", "-."), strict=True):
    plotting.objective(result, ax=axes[0], against="seconds", label=name, linestyle=style)
axes[0].legend()
axes[0].set_title("penalized objective")
for ax, name in zip(axes[1:], ("EM, accelerated", "Adam, lr 0.05"), strict=True):
    result = results[name]
    plotting.density(result.mixture, ax=ax, extent=(0, 1, 0, 1), levels=0)
    plotting.points(x, ax=ax, limit=3000, s=1, alpha=0.4)
    plotting.ellipses(result.mixture, ax=ax)
    ax.set(
        xlabel="x (sides of the square)",
        ylabel="y (sides)",
        aspect="equal",
        title=f"{name}: {result.report.n_active_components} live",
    )
plt.show()

# %%
# EM falls without a rise and knows no learning rate; Adam, from the same start, wanders first and can leave a valley that EM
# settles in. Which ends lower depends on the start: try another seed.
