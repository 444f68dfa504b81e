r"""
Standard errors
===============

How accurate are the parameters of a fit? The asymptotic covariance of maximum-likelihood estimates is

.. math:: A^{-1} B A^{-1}, \qquad A = -\nabla^2 \sum_n \log p(x_n), \qquad B = \sum_n s_n s_n^\top,
          \quad s_n = \nabla \log p(x_n),

and computing it takes one pass over the data. The bootstrap needs hundreds of fits but fewer assumptions. Both are compared.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import gmmkeops as gk

# %%
# The data are 3000 points of two overlapping clusters.

truth = gk.Mixture.from_parameters(
    [0.4, 0.6],
    [[0.0, 0.0], [3.0, 1.0]],
    [[[1.0, 0.5], [0.5, 1.0]], [[2.0, -0.4], [-0.4, 0.5]]],
).to(torch.float64)
generator = torch.Generator().manual_seed(0)
x = truth.sample(3000, generator=generator)
method = gk.EM(reg_covar=0, tol=1e-6, accelerate=True)


def fitted(points):
    return gk.fit(truth, points, method, max_iter=100, verbose=False).mixture


mixture = fitted(x)
errors = gk.standard_errors(mixture, x)
apart = gk.standard_errors(mixture, x, joint=False)

# %%
# For the bootstrap, a mixture is fitted to each of 200 samples that are drawn from the points with replacement.

fits = [fitted(x[torch.randint(len(x), (len(x),), generator=generator)]) for _ in range(200)]


def flat(weights, means, covariances):
    return torch.cat([weights, means.flatten(), covariances.flatten()]).numpy()


bootstrap = np.std([flat(m.weights, m.means, m.factor.covariances()) for m in fits], axis=0, ddof=1)
joint = flat(errors.weights, errors.means, errors.covariances)
block = flat(apart.weights, apart.means, apart.covariances)
worst = float(np.abs(joint / bootstrap - 1).max())
apart_worst = float(np.abs(block / bootstrap - 1).max())
print(f"standard errors: joint against bootstrap, worst of {len(joint)}: {worst:.1%}; by component {apart_worst:.1%}")
for k in range(2):
    place = ", ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(mixture.means[k], errors.means[k], strict=True))
    print(f"standard errors: mean {k}: {place}; truth {truth.means[k].tolist()}")

# %%
# The plots compare both kinds of standard errors with the bootstrap, and show the means of all bootstrap fits.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
left.plot([0, bootstrap.max() * 1.1], [0, bootstrap.max() * 1.1], color="0.7", lw=1)
left.plot(bootstrap, joint, "o", label="all parameters jointly")
left.plot(bootstrap, block, "^", mfc="none", label="one component at a time")
left.set(
    xlabel="by 200 bootstrap fits (data units)",
    ylabel="by one pass (data units)",
    title="standard errors of 14 parameters",
)
left.legend()
for k, (color, marker) in enumerate((("C0", "o"), ("C1", "^"))):
    away = torch.stack([m.means[k] for m in fits]) - mixture.means[k]
    right.plot(*away.T, marker, ms=3, alpha=0.6, color=color, label=f"mean {k} of 200 bootstrap fits")
    across, up = 2 * errors.means[k]
    label = "two standard errors" if k == 0 else None
    right.errorbar(0, 0, xerr=across, yerr=up, color="k", capsize=4 + 4 * k, lw=1.5, label=label)
right.set(
    xlabel="x from the fit (data units)", ylabel="y from the fit (data units)", title="means of the bootstrap fits"
)
right.legend()
plt.show()

# %%
# The standard errors from the joint information matrix agree with the bootstrap. Those computed for one component at a time are
# too small if clusters overlap, because they ignore the uncertainty of the labels.
