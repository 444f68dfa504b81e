r"""
A palette for a photograph
==========================

How can the colors of a photograph be reduced to a palette? Each of the 273 280 pixels is a point with the coordinates red,
green and blue. A mixture of 64 Gaussians with full covariances is fitted by Adam, with a penalty on the square roots of the
weights. Its means are the colors of the palette. Each pixel is replaced by the mean of its most probable component,

.. math:: \hat x_n = \mu_{k(n)}, \qquad k(n) = \arg\max_k W_k\, \mathcal N(x_n; \mu_k, \Sigma_k).
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_image

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The photograph is part of scikit-learn. Uniform noise spreads its 8-bit colors over their bins; otherwise thousands of equal
# points would lead to components with singular covariances.

image = load_sample_image("china.jpg")
pixels = torch.from_numpy(image.reshape(-1, 3).astype(np.float32))
generator = torch.Generator().manual_seed(0)
x = (pixels + torch.rand(pixels.shape, generator=generator)) / 256
print(f"photograph: {len(x)} pixels, {len(pixels.unique(dim=0))} distinct colors")

# %%
# The initial mixture is computed by k-means++. The learning rate of Adam decreases to zero by cosine annealing.

steps = 150
method = gk.Adam(lr=0.05, scheduler=lambda adam: torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps))
start = gk.initialize(x, 64, "kmeans++", generator=generator)
result = gk.fit(start, x, method, penalty=gk.penalties.SqrtWeights(2), max_iter=steps)
print("photograph:", result)

# %%
# The plots show the photograph before and after the replacement.

labels = result.mixture.predict(x)
palette = result.mixture.means.clamp(0, 1)
recolored = palette[labels].reshape(image.shape).numpy()
error = (palette[labels] - x).square().mean().sqrt().item()
print(f"photograph: root mean square error of a color channel {255 * error:.1f} of 255")

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
left.imshow(image)
left.set_title(f"photograph, {len(x)} pixels")
right.imshow(recolored)
right.set_title(f"{len(labels.unique())} component means")
for ax in (left, right):
    ax.axis("off")

# %%
# The plots show the palette, in which the width of a color is its weight, and the loss.

figure, (left, right) = plt.subplots(2, 1, figsize=(9, 4.6), layout="constrained", height_ratios=(1, 2))
order = palette.sum(1).argsort()
weights = result.mixture.weights[order]
edges = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
for k, color in enumerate(palette[order].tolist()):
    left.axvspan(float(edges[k]), float(edges[k + 1]), color=color, linewidth=0)
left.set(xlim=(0, 1), yticks=[], xlabel="weight (cumulated, dark to light)", title="the palette")
plotting.objective(result, ax=right)
plt.show()

# %%
# Each component is shown by its mean only, so areas with many similar colors, such as leaves, look flatter than in the
# photograph. The mean log-likelihood is in nats per pixel, for colors between 0 and 1.
