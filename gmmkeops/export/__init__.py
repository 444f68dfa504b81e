r"""Mixtures for other programs: arrays for scikit-learn, ellipsoids for mesh viewers, Gaussian splats for splat viewers.

.. math:: \Sigma_k = R_k\, \mathrm{diag}(s_k)^2 R_k^\top

A splat holds the centre, the logarithms of :math:`s_k`, :math:`R_k` as a unit quaternion, an opacity (as its logit) and a
colour (as the constant term of its spherical harmonics). References: Kerbl, Kopanas, Leimkühler and Drettakis 2023, *3D
Gaussian splatting for real-time radiance field rendering*, whose file layout this is; Shepperd 1978, *Quaternion from
rotation matrix*.
"""

from gmmkeops.export.files import ellipsoids, npz, splats

__all__ = ["ellipsoids", "npz", "splats"]
