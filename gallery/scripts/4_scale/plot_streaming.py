r"""
What if the file is larger than the memory?
===========================================

Moments add, so a file is fitted a chunk at a time: exact EM is a sum of Moments over chunks, pass after pass, and stepwise
EM updates after every chunk,

.. math:: M \leftarrow (1 - \rho_t) M + \rho_t M_t, \qquad \rho_t = (t + 2)^{-0.6},

and is near the answer after a pass or two. Here a file of 48 MB stands for a larger one, read in chunks of 1 MB.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import gmmkeops as gk

# %%
# Two million stars on a spiral galaxy's two arms, sorted by their distance from its center, written piece by piece.

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
# The start comes from a sample of the first pass. EM reads the file once per iteration; stepwise EM blends chunk after chunk.

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
left.plot([1, 2, 3], passes, "s--", label="stepwise EM, after so many")
left.set(xlabel="passes over the file", ylabel="mean log-likelihood (nats per star)", title="how many passes it takes")
left.legend()
plt.show()
folder.cleanup()

# %%
# One pass of stepwise EM is worth several of EM, though the file is sorted: chunks are read from several places at a time. Memory
# is that of a few chunks, whatever the number of rows.
