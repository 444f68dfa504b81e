"""Truncation: sorted points, bounds of exponents, and candidate lists with certified errors."""
