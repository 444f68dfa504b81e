"""Variational Bayes with Normal-Wishart posteriors."""
