r"""
Which of these points do not belong?
====================================

A density is a detector: what it finds improbable is strange. With a mixture fitted to points that are mostly normal, a point
is called anomalous where

.. math:: \log p(x) < t, \qquad t = \text{the 5th percentile of } \log p(x_n),

and what costs five per cent of false alarms catches what lies between, beside and beyond the clusters.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import gmmkeops as gk
from gmmkeops import plotting
from gmmkeops.analysis import selection

# %%
# Sixty thousand normal points on two arcs, and three hundred strays spread over the square.

generator = torch.Generator().manual_seed(0)
angle = torch.pi * torch.rand(60_000, generator=generator)
upper = torch.arange(60_000) % 2 == 0
arcs = torch.stack(
    (torch.where(upper, angle.cos(), 1 - angle.cos()), torch.where(upper, angle.sin(), 0.5 - angle.sin())), 1
)
normal = arcs + 0.08 * torch.randn(arcs.shape, generator=generator)
strays = torch.rand(300, 2, generator=generator) * torch.tensor([4.0, 3.0]) - torch.tensor([1.5, 1.25])
x = torch.cat([normal, strays])

# %%
# Fit, threshold, call. The strays were in the data while fitting, too few to matter: a component would have to grow huge to
# reach them.

model = gk.GaussianMixture(12, random_state=0, tol=1e-4).fit(x)
threshold = selection.anomaly_threshold(model.mixture_, x, percentile=5)
score = model.score_samples(x)
caught = float((score[60_000:] < threshold).double().mean())
false = float((score[:60_000] < threshold).double().mean())
print(
    f"anomalies: threshold {threshold:.2f} nats, {100 * caught:.1f} % of the strays caught, {100 * false:.2f} % false alarms"
)

# %%
# How the scores of both kinds are spread, and the density with the threshold as its contour.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
plotting.density(model.mixture_, ax=right, extent=(-1.5, 2.5, -1.25, 1.75), levels=0)
u, v = np.meshgrid(np.linspace(-1.5, 2.5, 200), np.linspace(-1.25, 1.75, 200))
right.contour(u, v, model.score_samples(np.stack([u, v], -1).reshape(-1, 2)).reshape(u.shape), [threshold], colors="C1")
plotting.points(normal, ax=right, s=0.3, limit=8000, color="0.5")
plotting.points(strays, ax=right, s=6, color="k")
right.set(xlabel="x (radii of an arc)", ylabel="y (radii of an arc)", title="strays (dots) and the threshold (line)")
bins = np.linspace(-30, 2, 80)
for name, part, color in (("normal", score[:60_000], "C0"), ("strays", score[60_000:], "C1")):
    left.hist(part.clamp(min=-30).numpy(), bins=bins, density=True, alpha=0.6, label=name, color=color)
left.axvline(threshold, color="k", linewidth=1)
left.set(
    xlabel="log-density (nats)",
    ylabel="share of points per nat",
    title="scores; below the line is called strange",
    yscale="log",
)
left.legend()
plt.show()

# %%
# Most strays fall far below the line; those missed lie on the arcs themselves, where nothing tells them apart.
