r"""
A file larger than memory
=========================

How can a mixture be fitted to a file that is larger than memory? The file is read in chunks. EM adds the sufficient statistics
of all chunks in every pass. Stepwise EM updates the mixture after every chunk t with a running average M of the statistics,

.. math:: M \leftarrow (1 - \rho_t) M + \rho_t M_t, \qquad \rho_t = (t + 2)^{-0.6},

and is close to convergence after one or two passes. In this example, a file of 48 MB is read in chunks of 1 MB.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import gmmkeops as gk

# %%
# The data are two million stars on the two arms of a spiral galaxy, sorted by their distance from its center.

rng = np.random.default_rng(0)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "stars.npy"
stars = np.lib.format.open_memmap(path, "w+", np.float32, (2_000_000, 3))
for part in range(20):
    radius = 1 + 9 * (part + rng.random(100_000)) / 20
    twist = 0.55 * radius + np.pi * rng.integers(2, size=100_000) + rng.normal(size=100_000) / (1 + 0.5 * radius)
    place = np.stack([radius * np.cos(twist), radius * np.sin(twist), 0.2 * rng.normal(size=100_000)], 1)
    stars[100_000 * part : 100_000 * (part + 1)] = place + 0.4 * rng.normal(size=place.shape) * [1, 1, 0.3]
stars.flush()
del stars

# %%
# The initial mixture is computed from a random sample of the file. EM reads the whole file in each iteration.

source = gk.Source.of(path, chunk_rows=90_000)
start = gk.initialize(source, 30, generator=torch.Generator().manual_seed(0))
exact = gk.fit(start, source, gk.EM(tol=0), max_iter=12)
quick = gk.fit(start, source, gk.EM(batch_size=50_000, average=True, tol=0), max_iter=3)
passes = [
    gk.fit(start, source, gk.EM(batch_size=50_000, average=True, tol=0), max_iter=n).log_likelihood for n in (1, 2)
]
passes.append(quick.log_likelihood)
print("streaming:", exact)
print(
    f"streaming: exact after 12 passes {exact.log_likelihood:.4f}, stepwise after 3 passes {quick.log_likelihood:.4f}"
)
memory = gk.estimate_memory(10**9, 30, 3, streamed=True)
print(f"streaming: a billion rows would take {memory / 2**20:.0f} MB")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
some = np.load(path, mmap_mode="r")[::400]
right.plot(*some[:, :2].T, ",", color="0.5", rasterized=True)
right.plot(*exact.mixture.means[:, :2].T, "o", color="C1", ms=5, label="means")
right.set(aspect="equal", xlabel="x (kpc)", ylabel="y (kpc)", title="every 400th star, and 30 means")
right.legend()
left.plot(range(12), exact.history["log_likelihood"], "o-", label="EM, before each pass")
left.plot([1, 2, 3], passes, "s--", label="stepwise EM, after each pass")
left.set(xlabel="passes over the file", ylabel="mean log-likelihood (nats per star)", title="convergence")
left.legend()
plt.show()
folder.cleanup()

# %%
# One pass of stepwise EM corresponds to several passes of EM. Since each batch combines rows from several parts of the file,
# this holds although the file is sorted. Memory use is that of a few chunks, for any number of rows.
