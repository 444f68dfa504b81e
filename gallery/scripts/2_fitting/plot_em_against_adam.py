r"""
EM and Adam for a penalized likelihood
======================================

Can EM minimize the penalized objective for which the KeOps tutorial uses Adam? The penalty on the square roots of the weights
is concave, so it is bounded by its tangent at the current weights. With the tangent in place of the penalty, the M-step is

.. math:: W_k = \frac{S^0_k}{\lambda + N c_k}, \qquad c_k = \frac{s}{2 K \sqrt{W_k}},

where λ is determined by :math:`\sum_k W_k = 1`. A step never increases the penalized objective (majorization-minimization).
This example compares EM, accelerated EM and Adam by computing time.
"""

import math

import matplotlib.pyplot as plt
import torch

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The data are those of the tutorial, and the initial mixture is computed by k-means.

generator = torch.Generator().manual_seed(0)
N, K, strength = 10_000, 30, 3.0
t = torch.linspace(0, 2 * math.pi, N + 1)[:-1]
x = torch.stack((0.5 + 0.4 * (t / 7) * t.cos(), 0.5 + 0.3 * t.sin()), dim=1)
x = x + 0.02 * torch.randn(N, 2, generator=generator)
start = gk.initialize(x, K, "kmeans", generator=generator)
penalty = gk.penalties.SqrtWeights(strength)

# %%
# Three methods are compared.

methods = {
    "EM": (gk.EM(tol=1e-6), 600),
    "EM, accelerated": (gk.EM(tol=1e-6, accelerate=True), 200),
    "Adam, lr 0.05": (gk.Adam(lr=0.05), 600),
}
gk.fit(start, x, gk.Adam(), max_iter=1)  # imports torch.optim before the timing
results = {}
for name, (method, iterations) in methods.items():
    results[name] = gk.fit(start, x, method, penalty=penalty, max_iter=iterations)
    print(f"EM against Adam: {name}:", results[name])

# %%
# The plots show the objective against time, and the mixtures of accelerated EM and Adam.

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
        title=f"{name}: {result.report.n_active_components} active",
    )
plt.show()

# %%
# The objective of EM decreases monotonically, without a learning rate. The objective of Adam is not monotone, and Adam can
# leave a local minimum to which EM converges. The method with the lower final objective depends on the initial mixture.
