r"""
Dirichlet process mixture of colors
===================================

How many components does a Dirichlet process mixture use? The number of components is not fixed in advance. The weights are
defined by stick-breaking,

.. math:: \pi_k = v_k \prod_{j<k} (1 - v_j), \qquad v_k \sim \mathrm{Beta}(1, \alpha),

and the posterior determines how many components have a non-negligible weight. Variational Bayes approximates the posterior; an
iteration takes as long as an iteration of EM, but more iterations are needed. The data are the 273 280 pixels of a photograph.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_image

import gmmkeops as gk

# %%
# The photograph is part of scikit-learn. Uniform noise spreads its 8-bit colors over their bins.

image = load_sample_image("flower.jpg")
generator = torch.Generator().manual_seed(0)
pixels = torch.from_numpy(image.reshape(-1, 3).astype(np.float32))
x = (pixels + torch.rand(pixels.shape, generator=generator)) / 256

# %%
# Mixtures of at most sixty components are fitted for two concentrations, to increasing numbers of pixels. Each fit begins with a
# mixture from which surplus components have been merged (``init_params="auto"``).

sizes, models = (300, 1000, 3000, 10_000, 30_000), {}
used: dict[float, list[int]] = {0.01: [], 10.0: []}
order = torch.randperm(len(x), generator=generator)
for alpha, counts in used.items():
    for size in sizes:
        models[alpha] = gk.BayesianGaussianMixture(
            n_components=60, weight_concentration_prior=alpha, random_state=0
        ).fit(x[order[:size]])
        counts.append(int((models[alpha].weights_ * size > 1).sum()))
    print(f"process: concentration {alpha:g}: components with more than one pixel of {sizes}: {counts}")

# %%
# The plots show the number of used components, and the photograph with each pixel replaced by the mean of its component.

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
for (alpha, counts), marker in zip(used.items(), "o^", strict=True):
    left.semilogx(sizes, counts, marker + "-", label=f"concentration {alpha:g}")
left.set(xlabel="pixels", ylabel="components with more than one pixel", ylim=(0, 60), title="number of used components")
left.legend()
model = models[0.01]
painted = model.means_[model.predict(x)].clamp(0, 1).reshape(image.shape)
right.imshow(painted.numpy())
right.set_title(f"each pixel by its component's mean, {used[0.01][-1]} colors")
right.set_axis_off()

# %%
# The predictive density is a mixture of Student's t distributions. It is wider than the plug-in mixture for components with few
# pixels; with this many pixels the two densities hardly differ.

few = x[:: len(x) // 2000].double()
gap = float((model.posterior_.predictive().log_prob(few) - model.mixture_.log_prob(few)).abs().mean())
print(f"process: predictive and plug-in densities differ by {gap:.4f} nats on average")
plt.show()

# %%
# The number of used components grows with the number of pixels, and differs little between the two concentrations. It is not an
# estimate of a true number of colors. Even if the data come from a finite mixture, the posterior of a Dirichlet process mixture
# is not consistent for the number of components (Miller and Harrison 2014, *Inconsistency of Pitman-Yor process mixtures for the
# number of components*, JMLR 15).
