r"""
A palette for a photograph
==========================

Each pixel is a point in the cube of red, green and blue, so this photograph is a cloud of 273 280 points. A mixture of 64 full
Gaussians, fitted by Adam under the √-weight prior, gives a palette: each mean is a color, and each covariance its spread. The
recolored picture replaces each pixel by the mean of its most probable component,

.. math:: \hat x_n = \mu_{k(n)}, \qquad k(n) = \arg\max_k W_k\, \mathcal N(x_n; \mu_k, \Sigma_k),

"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_image

import gmmkeops as gk
from gmmkeops import plotting

# %%
# The photograph that comes with scikit-learn. Colors are 8-bit, so a little uniform noise spreads each value over its
# bin: without it thousands of equal points would pull components onto themselves.

image = load_sample_image("china.jpg")
pixels = torch.from_numpy(image.reshape(-1, 3).astype(np.float32))
generator = torch.Generator().manual_seed(0)
x = (pixels + torch.rand(pixels.shape, generator=generator)) / 256
print(f"photograph: {len(x)} pixels, {len(pixels.unique(dim=0))} distinct colors")

# %%
# k-means++ for the start, then Adam with a learning rate that falls to nothing along a cosine.

steps = 150
method = gk.Adam(lr=0.05, scheduler=lambda adam: torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps))
start = gk.initialize(x, 64, "kmeans++", generator=generator)
result = gk.fit(start, x, method, penalty=gk.penalties.SqrtWeights(2), max_iter=steps)
print("photograph:", result)

# %%
# The photograph, and the same with each pixel replaced by its component's mean.

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
# The palette, widest where the weight is, and the loss.

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
# A component that covers a whole range of colors is shown by its mean alone, so shaded leaves come out flatter than they
# are: the mixture knows their spread, the picture does not show it. The mean log-likelihood per pixel is in nats on colors
# between 0 and 1.
