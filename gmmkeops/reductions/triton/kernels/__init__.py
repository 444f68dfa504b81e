"""Triton kernels, which are imported on first use; this is the only folder that imports Triton."""
