r"""
How many colors has a flower?
==============================

A Dirichlet process does not ask for the number of components: weights are broken off a stick,

.. math:: \pi_k = v_k \prod_{j<k} (1 - v_j), \qquad v_k \sim \mathrm{Beta}(1, \alpha),

and as many pieces are used as the data pay for. Variational Bayes finds a posterior of such mixtures by passes that cost what
EM's do, if by more of them. Here it meets the 273 280 pixels of a photograph.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_image

import gmmkeops as gk

# %%
# The photograph of a flower that comes with scikit-learn; its 8-bit colors are spread over their bins.

image = load_sample_image("flower.jpg")
generator = torch.Generator().manual_seed(0)
pixels = torch.from_numpy(image.reshape(-1, 3).astype(np.float32))
x = (pixels + torch.rand(pixels.shape, generator=generator)) / 256

# %%
# Sixty components at most, for two concentrations, on more and more of the pixels.

sizes, models = (300, 1000, 3000, 10_000, 30_000), {}
used: dict[float, list[int]] = {0.01: [], 10.0: []}
order = torch.randperm(len(x), generator=generator)
for alpha, counts in used.items():
    for size in sizes:
        models[alpha] = gk.BayesianGaussianMixture(
            n_components=60, weight_concentration_prior=alpha, max_iter=100, tol=1e-3 * size, random_state=0
        ).fit(x[order[:size]])
        counts.append(int((models[alpha].weights_ * size > 1).sum()))
    print(f"process: concentration {alpha:g}: components that own more than a pixel of {sizes}: {counts}")

# %%
# How many are used, and the photograph painted with the means of each pixel's component.

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
for (alpha, counts), marker in zip(used.items(), "o^", strict=True):
    left.semilogx(sizes, counts, marker + "-", label=f"concentration {alpha:g}")
left.set(
    xlabel="pixels", ylabel="components that own more than one", ylim=(0, 60), title="the number that is used grows"
)
left.legend()
model = models[0.01]
painted = model.means_[model.predict(x)].clamp(0, 1).reshape(image.shape)
right.imshow(painted.numpy())
right.set_title(f"each pixel by its component's mean, {used[0.01][-1]} colors")
right.set_axis_off()

# %%
# The predictive density is a mixture of Student's t, wider than the plug-in mixture where a component has few pixels; with
# this many pixels they hardly differ.

few = x[:: len(x) // 2000].double()
gap = float((model.posterior_.predictive().log_prob(few) - model.mixture_.log_prob(few)).abs().mean())
print(f"process: predictive and plug-in densities differ by {gap:.4f} nats on average")
plt.show()

# %%
# The number that is used grows with the number of pixels, and the prior has little to say in it: it tells how finely so many
# pixels let Gaussians describe the colors, not how many colors there are. Even where the truth is a finite mixture, the
# posterior of a Dirichlet process does not settle on its number of components (Miller and Harrison 2014, *Inconsistency of
# Pitman-Yor process mixtures for the number of components*, JMLR 15).
