r"""
How strong are three coffees?
=============================

Thirty cups from a machine with three buttons, of which nobody noted which was pressed: the caffeine of each is measured, to
5 mg. The makers promise about 80, 120 and 160 mg, give or take 20,

.. math::

    \mu_k \sim \mathcal N(m_k, 20^2), \quad m = (80, 120, 160), \qquad \pi \sim \mathrm{Dirichlet}(1, 1, 1), \qquad
    x_n \sim \textstyle\sum_k \pi_k\, \mathcal N(\mu_k, 5^2).

Since the promises differ, the prior tells the buttons apart, and the labels keep their names. What do the cups say of the
means, of how often each button is pressed, and of whether the scatter is 5 mg at all?
"""

import matplotlib.pyplot as plt
import torch
from torch.distributions import Dirichlet, HalfNormal, Normal

import gmmkeops as gk

# %%
# The cups, drawn from a machine that is a little off its promises.

generator = torch.Generator().manual_seed(1)
truth = gk.Mixture.from_parameters([0.3, 0.45, 0.25], [[86.0], [118.0], [166.0]], [25.0, 25.0, 25.0], "spherical")
x = truth.sample(30, generator=generator)

promised = Normal(torch.tensor([[80.0], [120.0], [160.0]]), 20.0)
prior = gk.bayes.Prior(3, weights=Dirichlet(torch.ones(3)), means=promised, scales=5.0, covariance_type="spherical")
draws = gk.bayes.gibbs(prior, x, draws=1500, warmup=200, chains=2, generator=generator, progress=False)
print("coffees:", draws)

# %%
# The scatter made unknown, the same for all buttons, with a half-normal prior of 10 mg. That prior is not conjugate, so Gibbs
# has no formula for it; the no-U-turn sampler needs none.

open_prior = gk.bayes.Prior(
    3, weights=Dirichlet(torch.ones(3)), means=promised, scales=HalfNormal(10.0), covariance_type="tied_spherical"
)
free = gk.bayes.nuts(open_prior, x, draws=300, warmup=100, chains=1, generator=generator)
low, high = free.interval("scales", 0.9).flatten().tolist()
print(f"coffees: scatter {float(free.mean('scales')):.1f} mg, 90 % between {low:.1f} and {high:.1f}")

# %%
# Prior and posterior of the means, and the density of the next cup with what is unknown averaged out.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
grid = torch.linspace(40, 210, 600, dtype=torch.float64)
for k, (name, color) in enumerate(zip(("small", "medium", "large"), ("C0", "C1", "C2"), strict=True)):
    left.plot(grid, Normal(promised.loc[k, 0], 20.0).log_prob(grid).exp(), color=color, ls="--")
    left.hist(draws.values["means"][:, k, 0].numpy(), bins=50, density=True, color=color, alpha=0.6, label=name)
left.set(xlabel="mean caffeine (mg)", ylabel="density (1/mg)", title="means: prior (dashed) and posterior")
left.legend()
right.hist(x[:, 0].numpy(), bins=24, density=True, color="0.85", label="30 cups")
right.plot(grid, truth.log_prob(grid[:, None]).exp(), "k:", label="truth")
right.plot(grid, draws.log_prob(grid).exp(), "C0", label="scatter known")
right.plot(grid, free.log_prob(grid).exp(), "C1--", label="scatter unknown")
right.set(xlabel="caffeine of the next cup (mg)", ylabel="density (1/mg)", title="posterior predictive density")
right.legend()
plt.show()

# %%
# Thirty cups move the means by a few milligrams off the promises, and leave the shares of the buttons open by a tenth. One
# draw in thirty or so takes two neighboring buttons for each other, since promises "give or take 20" allow it: that is the
# small second hump in the histograms, and it makes the standard deviations of the means larger than the peaks look. The
# scatter, once unknown, comes out near the truth of 5 mg.
