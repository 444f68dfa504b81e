"""Priors, posterior densities, and the samplers that draw from them."""
