"""Export of mixtures to other programs: arrays for scikit-learn, meshes of ellipsoids, and Gaussian splats."""

from gmmkeops.export.files import ellipsoids, npz, splats

__all__ = ["ellipsoids", "npz", "splats"]
