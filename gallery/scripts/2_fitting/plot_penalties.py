r"""
Comparison of penalties
=======================

How does a penalty change a fitted mixture? A fit minimizes the mean negative log-likelihood plus a penalty, in nats per point,

.. math:: -\frac1N \sum_n \log p(x_n) + \text{penalty}(\theta).

A penalty on the square roots of the weights removes components, a Dirichlet prior with a concentration above one keeps them,
and an inverse-Wishart prior makes covariances more isotropic. Any function of a mixture can be a penalty. The function below is
smallest if all components have the same distance from the center of a ring.
"""

import matplotlib.pyplot as plt
import torch

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The data are 2000 points of a ring with a gap.

generator = torch.Generator().manual_seed(0)
angle = 5.2 * torch.rand(2000, generator=generator)
x = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 0.08 * torch.randn(2000, 1, generator=generator))
start = gk.initialize(x, 20, generator=generator)

# %%
# A user-defined penalty is a function of the mixture.


def round_ring(mixture):
    radii = mixture.means.norm(dim=-1)
    return 50 * (mixture.weights * (radii - radii.mean()) ** 2).sum()


# %%
# EM supports all built-in penalties and never increases the objective. User-defined functions need a method such as Adam.

em, adam = gk.EM(tol=1e-6), gk.Adam(lr=0.03)
fits = {
    "none": gk.fit(start, x, em, max_iter=500),
    "SqrtWeights(3)": gk.fit(start, x, em, penalty=gk.penalties.SqrtWeights(3.0), max_iter=500),
    "Dirichlet(50)": gk.fit(start, x, em, penalty=gk.penalties.Dirichlet(50.0), max_iter=500),
    "InverseWishart": gk.fit(start, x, em, penalty=gk.penalties.InverseWishart(0.05, 3.0), max_iter=500),
    "round_ring": gk.fit(start, x, adam, penalty=round_ring, max_iter=250),
    "SqrtWeights + ring": gk.fit(start, x, adam, penalty=gk.penalties.SqrtWeights(3.0) + round_ring, max_iter=250),
}
for name, result in fits.items():
    W = result.mixture.weights
    print(f"penalties: {name}: {result.report.n_active_components} active, log-likelihood {result.log_likelihood:.3f}")

figure, axes = plt.subplots(2, 3, figsize=(11, 7.4), layout="constrained", sharex=True, sharey=True)
for ax, (name, result) in zip(axes.flat, fits.items(), strict=True):
    plotting.points(x, ax=ax, limit=1000, color="0.6")
    plotting.ellipses(result.mixture, ax=ax)
    ax.set(
        title=f"{name}: {result.report.n_active_components} active",
        aspect="equal",
        xlabel="x (radii)",
        ylabel="y (radii)",
    )
    ax.label_outer()
plt.show()

# %%
# All six fits used the same points and the same initial mixture; only the penalty differs.
