"""Truncation: skipping of negligible components with guaranteed error bounds."""
