r"""
Anomaly detection
=================

Which points are anomalies? A mixture is fitted to data that are mostly normal. A point is classified as an anomaly if its
log-density is below a threshold,

.. math:: \log p(x) < t, \qquad t = \text{the 5th percentile of } \log p(x_n),

so that about 5 % of the normal points are false alarms.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import gmmkeops as gk
from gmmkeops import plotting
from gmmkeops.analysis import selection

# %%
# The data are 60 000 normal points on two arcs, and 300 anomalies with a uniform distribution on the square.

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
# The mixture is fitted to all points. The anomalies are too few and too widely spread to have a component of their own.

model = gk.GaussianMixture(12, random_state=0, tol=1e-4).fit(x)
threshold = selection.anomaly_threshold(model.mixture_, x, percentile=5)
score = model.score_samples(x)
caught = float((score[60_000:] < threshold).double().mean())
false = float((score[:60_000] < threshold).double().mean())
print(
    f"anomalies: threshold {threshold:.2f} nats, {100 * caught:.1f} % of the anomalies detected, {100 * false:.2f} % false alarms"
)

# %%
# The plots show the distribution of the log-densities, and the contour of the density at the threshold.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
plotting.density(model.mixture_, ax=right, extent=(-1.5, 2.5, -1.25, 1.75), levels=0)
u, v = np.meshgrid(np.linspace(-1.5, 2.5, 200), np.linspace(-1.25, 1.75, 200))
right.contour(u, v, model.score_samples(np.stack([u, v], -1).reshape(-1, 2)).reshape(u.shape), [threshold], colors="C1")
plotting.points(normal, ax=right, s=0.3, limit=8000, color="0.5")
plotting.points(strays, ax=right, s=6, color="k")
right.set(xlabel="x (radii of an arc)", ylabel="y (radii of an arc)", title="anomalies (dots) and the threshold (line)")
bins = np.linspace(-30, 2, 80)
for name, part, color in (("normal", score[:60_000], "C0"), ("anomalies", score[60_000:], "C1")):
    left.hist(part.clamp(min=-30).numpy(), bins=bins, density=True, alpha=0.6, label=name, color=color)
left.axvline(threshold, color="k", linewidth=1)
left.set(
    xlabel="log-density (nats)",
    ylabel="fraction of points per nat",
    title="log-densities and the threshold (line)",
    yscale="log",
)
left.legend()
plt.show()

# %%
# Most anomalies have log-densities far below the threshold. The undetected ones are on the arcs, where they do not differ from
# normal points.
