"""Variational Bayes: the posterior in the Normal-Wishart family."""
