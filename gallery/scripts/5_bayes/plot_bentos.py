r"""
Posterior of two means
======================

How well do samplers approximate a known posterior? Twenty lunches were weighed. A shop sells two kinds of lunches, one near 350
g and one near 500 g, each with a standard deviation of 2 g. What are the mean weights of the two kinds, and which kind is a
lunch of 425 g? The means have normal priors, and the labels are marginalized,

.. math::

    \mu_0, \mu_1 \sim \mathcal N(400, 50^2), \qquad
    p(x_n \mid \mu) = \tfrac12 \mathcal N(x_n; \mu_0, 2^2) + \tfrac12 \mathcal N(x_n; \mu_1, 2^2),

Only the two means are unknown, so four sampling methods can be compared with numerical integration on a grid. The example is
that of the mixture chapter of *A probability introduction* (josephausterweil/probintro), where importance sampling with 1000
draws from the prior fails.
"""

import math
import warnings

import matplotlib.pyplot as plt
import torch
from torch.distributions import Normal

import gmmkeops as gk

# %%
# The prior is the same for both components, so the posterior is symmetric under their exchange. The components of every draw
# are sorted by their means.

generator = torch.Generator().manual_seed(5)
noise = torch.randn(20, generator=generator, dtype=torch.float64)
x = torch.cat([350 + 2 * noise[:10], 500 + 2 * noise[10:]])
prior = gk.bayes.Prior(
    2, weights=torch.tensor([0.5, 0.5]), means=Normal(400.0, 50.0), scales=2.0, covariance_type="spherical"
)

# %%
# The posterior on a grid around its mode is the reference for the samplers.

axes = [torch.linspace(c - 4, c + 4, 401, dtype=torch.float64) for c in (350, 500)]
light, heavy = torch.meshgrid(*axes, indexing="ij")
logs = Normal(400, 50).log_prob(light) + Normal(400, 50).log_prob(heavy)
for lunch in x:
    logs += torch.logaddexp(Normal(light, 2).log_prob(lunch), Normal(heavy, 2).log_prob(lunch)) - math.log(2)
share = torch.softmax(logs.flatten(), 0).view_as(logs)
means = [float((share * m).sum()) for m in (light, heavy)]
sds = [float((share * (m - mean) ** 2).sum()) ** 0.5 for m, mean in zip((light, heavy), means, strict=True)]

# %%
# Four samplers are compared. The first one draws from the prior, as in the chapter, and warns that its result is unreliable.

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    naive = gk.bayes.importance(prior, x, draws=1000, proposal="prior", generator=generator)
print(f"bentos: {said[0].message}")
found = {
    "importance": gk.bayes.importance(prior, x, draws=4000, generator=generator),
    "Gibbs": gk.bayes.gibbs(prior, x, draws=1000, warmup=100, chains=2, generator=generator, progress=False),
    "NUTS": gk.bayes.nuts(prior, x, draws=300, warmup=100, chains=2, generator=generator),
}
print(f"bentos: grid means {means[0]:.2f} {means[1]:.2f} sd {sds[0]:.3f} {sds[1]:.3f}")
for name, draws in found.items():
    mean, sd = draws.mean("means")[:, 0].tolist(), draws.sd("means")[:, 0].tolist()
    print(f"bentos: {name} means {mean[0]:.2f} {mean[1]:.2f} sd {sd[0]:.3f} {sd[1]:.3f}")

# %%
# The probability of the heavy kind is computed for each weight of a lunch. Each draw has a sharp decision boundary, but the
# boundaries of the draws differ. The posterior probability is their average, which is near one half at 425 g.

weights = torch.linspace(422, 428, 601, dtype=torch.float64)
heavier = found["Gibbs"].responsibilities(weights)[:, 1]
ambiguous = float(found["Gibbs"].responsibilities(torch.tensor([425.0]))[0, 1])
print(f"bentos: P(heavy | 425 g) = {ambiguous:.2f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
left.contourf(light, heavy, share / share.max(), levels=12, cmap="Blues")
markers = {"importance": "o", "Gibbs": "s", "NUTS": "^"}
for name, draws in found.items():
    rows = torch.multinomial(draws.weights, 150, replacement=True, generator=generator)
    left.plot(*draws.values["means"][rows, :, 0].T, markers[name], ms=3, alpha=0.6, label=name)
left.set(xlabel="mean of the light kind (g)", ylabel="mean of the heavy kind (g)", title="posterior: grid and draws")
left.set(xlim=(347.2, 352), ylim=(498, 502.8))
left.legend()
few = found["Gibbs"].mixtures
for s in range(0, 2000, 100):
    one = gk.Mixture(few.logits[s], few.means[s], gk.SphericalFactor(few.factor.log_diagonal[s], 1))
    label = "one draw each" if s == 0 else None
    right.plot(weights, one.responsibilities(weights[:, None])[:, 1], color="0.7", lw=0.8, label=label)
right.plot(weights, heavier, color="C1", lw=2, label="posterior")
right.axvline(425, color="k", ls=":", lw=1)
right.set(xlabel="weight of a lunch (g)", ylabel="probability of the heavy kind", title="classification of a lunch")
right.legend(loc="upper left")
plt.show()

# %%
# The last three samplers reproduce the means and standard deviations of the grid. Importance sampling from the prior does not,
# and issues a warning. With a point estimate of the means, the lunch of 425 g would be classified with near certainty. The
# posterior shows that its kind is uncertain.
