"""Limits of formulas in float32, which the engines share whose residuals are float32."""

__all__ = ["CONDITION", "DEEPEST"]

# Largest condition number of full factors for which float32 is used, with errors of about 2e-5 nats (measured for D = 3 and 10).
CONDITION = 128.0

# Distance of log-sum-exps from their usual size, nats, beyond which differences of float32 exponents are not accurate enough.
DEEPEST = 300.0
