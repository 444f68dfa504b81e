r"""
Conditional distributions of a robot arm
========================================

Can one model predict outputs from inputs and inputs from outputs? A regression predicts in one direction only. A mixture of all
columns predicts in every direction: the conditional distribution of some columns given the others is a mixture in closed form,

.. math::

    p(y \mid x) &= \sum_k W_k(x)\, \mathcal N\bigl(y;\ \mu_k^y + \Sigma_k^{yx} (\Sigma_k^{xx})^{-1} (x - \mu_k^x),\
          \Sigma_k^{yy} - \Sigma_k^{yx} (\Sigma_k^{xx})^{-1} \Sigma_k^{xy}\bigr), \\
    W_k(x) &\propto W_k\, \mathcal N(x; \mu_k^x, \Sigma_k^{xx}).

The example is a robot arm with two links. The forward problem is to predict the position of the hand from the angles of the
joints, and the inverse problem is to find the angles for a position. The inverse problem has two solutions (elbow up and elbow
down), and their average is not a solution.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import gmmkeops as gk

# %%
# The data are 40 000 poses: two angles in degrees, and the position of the hand in meters, measured with an error of 5 mm.

LINKS = 0.5, 0.4


def joints(angles):
    """Return the positions of elbow and hand, each (N, 2), for poses (N, 2)."""
    shoulder, elbow = np.deg2rad(angles).T
    first = LINKS[0] * np.stack([np.cos(shoulder), np.sin(shoulder)], 1)
    return first, first + LINKS[1] * np.stack([np.cos(shoulder + elbow), np.sin(shoulder + elbow)], 1)


rng = np.random.default_rng(0)
angles = rng.uniform([0, -150], [180, 150], (40_000, 2))
hands = joints(angles)[1] + 0.005 * rng.normal(size=angles.shape)
poses = np.concatenate([angles, hands], 1)

# %%
# One mixture is fitted to all four columns.

start = gk.initialize(poses, 150, generator=torch.Generator().manual_seed(0))
result = gk.fit(start, poses, gk.EM(tol=1e-4), max_iter=200)
print("arm:", result)
mixture = result.mixture

# %%
# The forward prediction is the mean given the angles. The inverse prediction, given the position of the hand, is the mean of
# the most probable component or, as in least-squares regression, the conditional mean.

new = rng.uniform([10, -140], [170, 140], (2000, 2))
hand = joints(new)[1]


def missed(pose):
    return 1000 * np.linalg.norm(joints(np.asarray(pose))[1] - hand, axis=1)


forward = 1000 * np.linalg.norm(mixture.condition([0, 1], new).mean.numpy() - hand, axis=1)
answers = mixture.condition([2, 3], hand)
likely = answers.means[torch.arange(len(new)), answers.weights.argmax(1)]
print(
    f"arm: forward {np.median(forward):.0f} mm off; backward by the most probable answer {np.median(missed(likely)):.0f} mm, "
    f"by the mean of all {np.median(missed(answers.mean)):.0f} mm"
)

# %%
# The angles that lead to the x coordinate of one target form a curve (left). Two points of it also lead to its y coordinate.

target = [0.35, 0.55]
curve = mixture.condition(2, target[:1]).marginal([0, 1])
both = mixture.condition([2, 3], target)
likely = both.weights.argsort(descending=True).tolist()
up, down = (next(k for k in likely if sign * both.means[k, 1] > 0) for sign in (1, -1))
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
gk.plotting.density(curve, ax=left, extent=(0, 180, -150, 150), levels=0, resolution=400)
for pose, style, name in (
    (both.means[up].numpy(), "C0o-", f"elbow one way, {float(both.weights[both.means[:, 1] > 0].sum()):.0%}"),
    (both.means[down].numpy(), "C2s-", f"elbow the other way, {float(both.weights[both.means[:, 1] < 0].sum()):.0%}"),
    (both.mean.numpy(), "C1X--", "conditional mean"),
):
    elbow, end = joints(pose[None])
    left.plot(*pose, style, ms=9, label=name)
    right.plot(*np.concatenate([[[0, 0]], elbow, end]).T, style, lw=3, ms=7, label=name)
left.set(xlabel="shoulder (degrees)", ylabel="elbow (degrees)", title="angles that bring the hand to x = 0.35 m")
right.plot(*target, "o", mfc="none", mec="k", ms=18, mew=1.5)
right.plot(*hands[::40].T, ".", ms=1, color="0.7", zorder=0)
right.axvline(target[0], color="0.7", lw=0.8, zorder=0)
right.set(aspect="equal", xlabel="x (m)", ylabel="y (m)", title="the arm, its target, and the reachable positions")
right.legend(loc="lower left")
plt.show()

# %%
# The same mixture solves the forward and the inverse problem. It returns both solutions of the inverse problem with their
# probabilities and covariances. The average of the two solutions, to which least squares converges, misses the target.
