r"""
Coming from scikit-learn, tgmm, Zuko or GenJAX
==============================================

What are the equivalents of functions in other packages? Four short programs show them. The log-densities are compared with
those of scikit-learn,

.. math:: \log p(x) = \log \sum_k W_k\, \mathcal N(x; \mu_k, \Sigma_k).
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.mixture import GaussianMixture as Theirs
from torch.distributions import Normal

import gmmkeops as gk
from gmmkeops import plotting

rng = np.random.default_rng(0)
X = np.r_[rng.normal(size=(4000, 2)), rng.normal(size=(3000, 2)) * [0.4, 1.5] + [5, 2]]

# %%
# **From scikit-learn**: change the import. ``sample_weight`` and ``penalty`` are additional arguments. One default differs:
# ``init_params="auto"`` searches for an initial mixture; ``init_params="kmeans"`` is scikit-learn's. Models can be converted in
# both directions.

model = gk.GaussianMixture(n_components=2, covariance_type="full", random_state=0, tol=1e-8, max_iter=500).fit(X)
theirs = Theirs(n_components=2, random_state=0, tol=1e-8, max_iter=500).fit(X)
print(f"coming from: score {model.score(X):.6f}, scikit-learn {theirs.score(X):.6f} nats per point")
assert np.allclose(gk.from_sklearn(theirs).score_samples(X), theirs.score_samples(X))
labels, chances, criterion = model.predict(X), model.predict_proba(X), model.bic(X)

# %%
# **From tgmm**: use ``init_params`` for ``init_means``, penalties for priors, and ``solver=gk.EM(assignment="hard")`` for
# ``cem=True``. Samples can be restricted to a component, a confidence region, a shell or the tail, without rejection.

prior = gk.penalties.Dirichlet(2.0) + gk.penalties.NormalInverseWishart(X.mean(0), 0.01, np.eye(2), 4.0)
mapped = gk.GaussianMixture(2, covariance_type="tied_full", penalty=prior, n_init=3, random_state=42).fit(X)
inside, _ = mapped.sample(300, confidence=0.95)
shell, _ = mapped.sample(300, component=0, std_range=(1.0, 2.0))
outliers, _ = mapped.sample(60, std_range=(5.0, np.inf))
print(f"coming from: {len(outliers)} points beyond five sigma, lower bound {mapped.lower_bound_:.4f}")

# %%
# **From Zuko**: the module has the same arguments, and the mixture also has ``component_distribution`` and
# ``mixture_distribution``. Memory use is not proportional to N × K.

module = gk.GMM(features=2, n_components=2, covariance_type="full").initialize(torch.from_numpy(X).float(), "kmeans")
optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
for _ in range(50):
    loss = -module().log_prob(torch.from_numpy(X).float()).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"coming from: Zuko's loop ends at {-loss.item():.4f} nats per point")

# %%
# **From GenJAX**: a generative function that draws means, labels and values corresponds to a ``Prior``, and ``simulate`` to its
# method ``sample``. Weighted particles under a choice map correspond to ``importance``, where the labels are marginalized and
# the proposal is adapted to the posterior. The choices of a trace are ``draws.values``. If the parameters are known, use a
# ``Mixture``.

lunches = np.r_[rng.normal(350, 2, 14), rng.normal(500, 2, 6)]  # grams
shares = torch.tensor([0.7, 0.3])
prior = gk.bayes.Prior(2, weights=shares, means=Normal(400.0, 50.0), scales=2.0, covariance_type="spherical")
draws = gk.bayes.importance(prior, lunches, draws=1000, generator=torch.Generator().manual_seed(0))
kinds = [f"{m:.1f} ± {s:.1f} g" for m, s in zip(draws.mean("means")[:, 0], draws.sd("means")[:, 0], strict=True)]
known = gk.Mixture.from_parameters(shares, [[350.0], [500.0]], [4.0, 4.0], "spherical")
heavy = float(known.responsibilities([[425.0]])[0, 1])
print(f"coming from: lunches of {kinds[0]} and {kinds[1]}; known exactly, 425 g is heavy with probability {heavy:.1f}")

# %%
# The plot shows restricted samples on the fitted density.

figure, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
plotting.density(mapped.mixture_, ax=ax, extent=(-7, 10, -8, 11), levels=12)
for name, points, color in (
    ("within 95 %", inside, "C0"),
    ("component 0, one to two sigma", shell, "C3"),
    ("beyond five sigma", outliers, "C1"),
):
    ax.scatter(*points.T, s=8, color=color, label=name)
ax.set(xlabel="x (standard deviations)", ylabel="y (standard deviations)")
ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncol=3, fontsize=9)
plt.show()

# %%
# The scores of this package and scikit-learn are equal to all printed digits, because both fits converge to the same optimum.
