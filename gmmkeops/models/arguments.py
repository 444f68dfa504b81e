"""Names of keyword arguments in other libraries, and the arguments of this package that error messages recommend instead."""

from __future__ import annotations

__all__ = ["COMPONENTS", "MIXTURE"]

# Names of the number of components in other libraries.
COMPONENTS = dict.fromkeys(
    ("K", "k", "n_clusters", "n_gaussians", "n_mixtures", "num_clusters", "num_components", "num_mixtures"),
    "n_components=",
)

# Names of the parameters of a mixture in other libraries.
MIXTURE = dict.fromkeys(("probs", "pi", "weight", "coefficients"), "weights=")
MIXTURE |= dict.fromkeys(("loc", "locs", "mu", "mus", "mean", "centers"), "means=")
MIXTURE |= dict.fromkeys(("covariance", "covariance_matrix", "covs", "cov", "sigma", "Sigma"), "covariances=")
MIXTURE |= {
    "precisions": "factor=, for example gmmkeops.FullFactor.from_precisions(precisions)",
    "scale_tril": "factor=, for example gmmkeops.FullFactor.from_cholesky(scale_tril)",
    "precisions_cholesky": "factor=, for example gmmkeops.FullFactor.from_factors(precisions_cholesky)",
    "covariance_types": "covariance_type=",
}
MIXTURE |= dict.fromkeys(
    ("K", "k", "n_clusters", "n_components", "n_mixtures", "num_components", "components"),
    "weights=, means= and covariances= of the components, or use gmmkeops.GaussianMixture(n_components=...) to fit them",
)
