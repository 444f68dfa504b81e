r"""
Informative priors for three components
=======================================

How can prior knowledge be included in a mixture? A coffee machine has three buttons. The caffeine of thirty cups is measured
with an error of 5 mg, but the buttons were not recorded. According to the manufacturer, the contents are 80, 120 and 160 mg,
with a standard deviation of 20 mg,

.. math::

    \mu_k \sim \mathcal N(m_k, 20^2), \quad m = (80, 120, 160), \qquad \pi \sim \mathrm{Dirichlet}(1, 1, 1), \qquad
    x_n \sim \textstyle\sum_k \pi_k\, \mathcal N(\mu_k, 5^2).

The prior means differ, so the prior identifies the components. The posterior of the means, the weights and the standard
deviation of the measurements is estimated.
"""

import matplotlib.pyplot as plt
import torch
from torch.distributions import Dirichlet, HalfNormal, Normal

import gmmkeops as gk

# %%
# The cups are simulated with means that differ slightly from the prior means.

generator = torch.Generator().manual_seed(1)
truth = gk.Mixture.from_parameters([0.3, 0.45, 0.25], [[86.0], [118.0], [166.0]], [25.0, 25.0, 25.0], "spherical")
x = truth.sample(30, generator=generator)

promised = Normal(torch.tensor([[80.0], [120.0], [160.0]]), 20.0)
prior = gk.bayes.Prior(3, weights=Dirichlet(torch.ones(3)), means=promised, scales=5.0, covariance_type="spherical")
draws = gk.bayes.gibbs(prior, x, draws=1500, warmup=200, chains=2, generator=generator, progress=False)
print("coffees:", draws)

# %%
# In the second model the standard deviation is unknown, with a half-normal prior of scale 10 mg. This prior is not conjugate,
# so Gibbs sampling is not possible, and the no-U-turn sampler (NUTS) is used.

open_prior = gk.bayes.Prior(
    3, weights=Dirichlet(torch.ones(3)), means=promised, scales=HalfNormal(10.0), covariance_type="tied_spherical"
)
free = gk.bayes.nuts(open_prior, x, draws=300, warmup=100, chains=1, generator=generator)
low, high = free.interval("scales", 0.9).flatten().tolist()
print(f"coffees: scatter {float(free.mean('scales')):.1f} mg, 90 % between {low:.1f} and {high:.1f}")

# %%
# The plots show prior and posterior of the means, and the posterior predictive density of the next cup.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
grid = torch.linspace(40, 210, 600, dtype=torch.float64)
for k, (name, color) in enumerate(zip(("small", "medium", "large"), ("C0", "C1", "C2"), strict=True)):
    left.plot(grid, Normal(promised.loc[k, 0], 20.0).log_prob(grid).exp(), color=color, ls="--")
    left.hist(draws.values["means"][:, k, 0].numpy(), bins=50, density=True, color=color, alpha=0.6, label=name)
left.set(xlabel="mean caffeine (mg)", ylabel="density (1/mg)", title="means: prior (dashed) and posterior")
left.legend()
right.hist(x[:, 0].numpy(), bins=24, density=True, color="0.85", label="30 cups")
right.plot(grid, truth.log_prob(grid[:, None]).exp(), "k:", label="truth")
right.plot(grid, draws.log_prob(grid).exp(), "C0", label="standard deviation known")
right.plot(grid, free.log_prob(grid).exp(), "C1--", label="standard deviation unknown")
right.set(xlabel="caffeine of the next cup (mg)", ylabel="density (1/mg)", title="posterior predictive density")
right.legend()
plt.show()

# %%
# The posterior means differ from the prior means by a few milligrams, and the weights have standard deviations of about 0.1. In
# about one draw in thirty, two neighboring components are exchanged, because the priors overlap. This causes the small second
# peaks of the histograms and increases the standard deviations of the means. The estimated standard deviation of the
# measurements is near the true value of 5 mg.
