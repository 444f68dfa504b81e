r"""
Mixture density networks
========================

How can a regression predict several outputs for one input? In the example, one reading of a sensor corresponds to two
temperatures. Least squares predicts their average, which may be neither of them. A mixture with parameters that depend on c,

.. math:: p(y \mid c) = \sum_k W_k(c)\, \mathcal N\bigl(y; \mu_k(c), \sigma_k^2(c)\bigr),

predicts all of them with their probabilities. Two methods are compared: a neural network that predicts the parameters from c
(Bishop 1994), and a joint mixture of both columns that is conditioned on the first one in closed form.
"""

import math

import matplotlib.pyplot as plt
import torch

import gmmkeops as gk

# %%
# The readings c are near 1000, not standardized as networks require. Each reading corresponds to two temperatures.


def readings(count, seed):
    generator = torch.Generator().manual_seed(seed)
    c = 1000 + 20 * torch.rand(count, 1, generator=generator)
    side = torch.where(torch.rand(count, 1, generator=generator) < 0.7, 1.0, -1.0)
    return c, 50 + 100 * side * torch.sin((c - 1000) / 3) + 6 * torch.randn(count, 1, generator=generator)


c, y = readings(4000, 0)
new_c, new_y = readings(4000, 1)

# %%
# ``initialize`` sets the mixture to the clusters of y and initializes the first layer for the mean and the standard deviation
# of c. ``fit`` trains the network on minibatches in standardized coordinates.

torch.manual_seed(0)
model = gk.GMM(1, context=1, n_components=4)
model.initialize(y, context=c, generator=torch.Generator().manual_seed(0))
schedule = lambda adam: torch.optim.lr_scheduler.CosineAnnealingLR(adam, 60)  # noqa: E731
method = gk.Adam(lr=1e-2, batch_size=256, scheduler=schedule)
result = gk.fit(model, y, method, context=c, max_iter=60, generator=torch.Generator().manual_seed(0))
print("density network:", result)

# %%
# With ``natural_gradient=True`` the gradients with respect to each component are multiplied by the inverse Fisher information of
# its Gaussian distribution (Chen, Bayrooti and Morad 2026, arXiv 2602.10602). The objective is the same.

torch.manual_seed(0)
other = gk.GMM(1, context=1, n_components=4)
other.initialize(y, context=c, generator=torch.Generator().manual_seed(0))
natural = gk.Adam(lr=1e-2, batch_size=256, scheduler=schedule, natural_gradient=True)
slower = gk.fit(other, y, natural, context=c, max_iter=60, generator=torch.Generator().manual_seed(0))
for name, found in (("plain", result), ("natural", slower)):
    values = ", ".join(f"{found.history['objective'][i]:.3f}" for i in (4, 14, 59))
    print(f"density network: {name} gradient: objective after 5, 15 and 60 passes: {values} nats")

# %%
# The joint mixture of the pairs (c, y) is fitted by EM and conditioned on c.

pairs = torch.cat([c, y], 1)
joint = gk.fit(gk.initialize(pairs, 24), pairs, gk.EM(tol=1e-4), max_iter=300).mixture

# %%
# The baseline is least-squares regression on a polynomial of the reading, with a constant residual variance.

powers = lambda c: torch.cat([((c - 1010) / 10) ** p for p in range(10)], 1).double()  # noqa: E731
coefficients = torch.linalg.lstsq(powers(c), y.double()).solution
scatter = float((y - powers(c) @ coefficients).square().mean()) ** 0.5
residuals = (new_y - powers(new_c) @ coefficients) / scatter
squares = float((-0.5 * residuals**2).mean()) - math.log(scatter) - 0.5 * math.log(2 * math.pi)

with torch.no_grad():
    network = float(model(new_c).log_prob(new_y).mean())
exact = float(joint.condition(0, new_c).log_prob(new_y.double()).mean())
print(
    f"density network: nats per new reading: network {network:.3f}, conditioned {exact:.3f}, least squares {squares:.3f}"
)

# %%
# The plots show the density of y for each c, with the 10 %, 50 % and 90 % quantiles of the mixtures.

grid = torch.linspace(1000, 1020, 300)[:, None]
heights = torch.linspace(-100, 200, 300)
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
with torch.no_grad():
    views = {
        "density network": model(grid),
        "conditioned mixture": joint.condition(0, grid),
    }
    for ax, (title, batch) in zip(axes[1:], views.items(), strict=True):
        density = batch.log_prob(heights[:, None, None].expand(-1, 300, -1)).exp()
        ax.pcolormesh(grid[:, 0], heights, density, cmap="Blues", vmax=0.05, rasterized=True)
        ax.plot(grid, batch.quantile([0.1, 0.5, 0.9]).T, "C1", lw=0.9)
        ax.set(title=f"{title}: 10, 50, 90 %", xlabel="reading c (mV)")
axes[0].plot(new_c[:1500], new_y[:1500], ".", ms=2, color="0.6")
axes[0].plot(grid, powers(grid) @ coefficients, "C1", label="least squares")
axes[0].set(title="new readings", xlabel="reading c (mV)", ylabel="answer y (°C)")
axes[0].legend()
plt.show()

# %%
# Least squares predicts values between the branches, where there are no data. Both mixtures represent the branches, their
# crossing and their probabilities. The network needs gradient training but scales to many inputs. The conditioned mixture needs
# EM only, but also models the distribution of the readings. Natural gradients do not help here: the objective decreases more
# slowly, and ends higher.
