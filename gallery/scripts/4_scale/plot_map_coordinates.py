r"""
Numerical accuracy for large coordinates
========================================

Why do map coordinates cause large numerical errors? Map coordinates are millions of meters, while the details of a scan are
centimeters. A variance computed as

.. math:: \frac1N \sum_n x_n^2 - \Bigl(\frac1N \sum_n x_n\Bigr)^2

is a difference of two numbers of size :math:`10^{13}` with a result of size :math:`10^{-4}`, but float64 has only 16 digits.
This package fits in standardized coordinates, computed in float64, for which the seven digits of float32 are sufficient.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.mixture import GaussianMixture as Theirs

import gmmkeops as gk

# %%
# The data are two curbs, 2 cm wide and 40 cm apart, at increasing distances from the origin. Fitted variances are compared with
# the true variances.

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
            except ValueError:  # negative variances
                found = np.full(2, np.nan)
        errors[name].append(float(np.abs(found / true - 1).max()))

# %%
# The plot shows the relative error of the variance.

figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
for (name, values), marker in zip(errors.items(), "sox", strict=True):
    ax.plot(range(len(distances)), np.maximum(values, 1e-16), marker + "-", label=name)
    print(f"map coordinates: {name}: " + " ".join(f"{value:.0e}" for value in values))
ax.set_yscale("log")
ax.set_xticks(range(len(distances)), [f"{d:.0e}" if d else "0" for d in distances])
ax.set(xlabel="distance from the origin (m)", ylabel="relative error of the variance", title="a curb 2 cm wide")
ax.legend()
plt.show()

# %%
# If the input itself is float32, its millimeters are already lost: at 5·10⁶ the spacing of float32 numbers is half a meter. The
# package then issues a warning.

coarse = torch.from_numpy(X[:, :1]).float()
steps = float(torch.nextafter(coarse[:1], coarse[:1] + 1e9) - coarse[:1])
print(f"map coordinates: float32 steps at 2e7: {steps:.0f} m")

# %%
# With standardized coordinates, which take one pass over the data, the error does not depend on the distance, except for the
# rounding errors of the coordinates themselves.
