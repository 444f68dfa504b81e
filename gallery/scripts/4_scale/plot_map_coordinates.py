r"""
Why are millimetres lost at map coordinates?
============================================

Surveyors' coordinates are millions of metres from the origin, and the scan of a kerb is about centimetres. A variance computed as

.. math:: \frac1N \sum_n x_n^2 - \Bigl(\frac1N \sum_n x_n\Bigr)^2

subtracts two numbers of size :math:`10^{13}` to find one of size :math:`10^{-4}`. Float64 holds sixteen digits. Here every
fit runs in a frame that is centered and scaled in float64 first; float32 then has its seven digits where they are needed.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk

# %%
# Two kerbs, 2 cm wide and 40 cm apart, at growing distances from the origin; variances of the best of both packages' fits, with
# diagonal covariances, against the truth.

rng = np.random.default_rng(0)
shape = rng.normal(size=(20_000, 2)) * [0.02, 1.0]
shape[10_000:, 0] += 0.4
true = np.array([shape[:10_000, 0].var(), shape[10_000:, 0].var()])
distances = [0.0, 1e3, 1e4, 1e5, 1e6, 5e6, 2e7]
errors: dict[str, list[float]] = {
    "scikit-learn, float64": [],
    "gmmkeops, float64": [],
    "gmmkeops, computed in float32": [],
}
for far in distances:
    X = shape + far
    start = {"weights_init": [0.5, 0.5], "means_init": np.array([[0.0, 0.0], [0.4, 0.0]]) + far}
    start["precisions_init"] = np.array([[2500.0, 1.0], [2500.0, 1.0]])
    settings = {"covariance_type": "diag", "reg_covar": 0, "max_iter": 30, "tol": 0, **start}
    for name, model in (
        ("scikit-learn, float64", Theirs(2, **{**settings, "tol": 1e-12})),
        ("gmmkeops, float64", gk.GaussianMixture(2, **settings)),
        ("gmmkeops, computed in float32", gk.GaussianMixture(2, **settings)),
    ):
        if "float32" in name:
            first = gk.Mixture.from_parameters([0.5, 0.5], start["means_init"], 1 / start["precisions_init"], "diag")
            method = gk.EM(reg_covar=0, tol=0)
            mixture = gk.fit(first, X, method, max_iter=30, dtype="float32").mixture
            found = mixture.factor.covariances().diagonal(dim1=1, dim2=2)[:, 0].numpy()
        else:
            try:
                found = model.fit(X).covariances_[:, 0]
            except ValueError:  # variances that came out negative
                found = np.full(2, np.nan)
        errors[name].append(float(np.abs(found / true - 1).max()))

# %%
# The error of the variance, in parts of it.

figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
for (name, values), marker in zip(errors.items(), "sox", strict=True):
    ax.plot(range(len(distances)), np.maximum(values, 1e-16), marker + "-", label=name)
    print(f"map coordinates: {name}: " + " ".join(f"{value:.0e}" for value in values))
ax.set_yscale("log")
ax.set_xticks(range(len(distances)), [f"{d:.0e}" if d else "0" for d in distances])
ax.set(xlabel="distance from the origin (m)", ylabel="relative error of the variance", title="a kerb 2 cm wide")
ax.legend()
plt.show()

# %%
# Points that are stored as float32 at such coordinates have lost their millimetres before any package sees them: at 5·10⁶ the
# steps of float32 are half a metre. The library warns of that.

coarse = torch.from_numpy(X[:, :1]).float()
steps = float(torch.nextafter(coarse[:1], coarse[:1] + 1e9) - coarse[:1])
print(f"map coordinates: float32 steps at 2e7: {steps:.0f} m")

# %%
# Subtracting the center first costs one pass, and nothing is lost: the same errors at every distance, those of the cloud itself
# and of the coordinates' own rounding.
