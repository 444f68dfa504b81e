"""Sampling from the posterior: priors, targets, and samplers."""
