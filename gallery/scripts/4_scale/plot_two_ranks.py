r"""
Do two processes find what one finds?
=====================================

Each process reads its share, Moments are added over all of them, and every process makes the same M-step,

.. math:: S = \sum_{\text{ranks}} \sum_{n \in \text{share}} r_n\, (1, x_n, x_n x_n^\top).

So the model is that of one process, whatever their number. The script that a cluster would run is the script of one process with
one more line.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import gmmkeops as gk

# %%
# A cloud in a file that both processes can see.

rng = np.random.default_rng(0)
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
x = (rng.normal(size=(300_000, 2)) + rng.normal(scale=6, size=(12, 2))[rng.integers(12, size=300_000)]).astype(
    np.float32
)
np.save(folder / "x.npy", x)
gk.save(gk.initialize(x, 12), folder / "start.safetensors")

# %%
# The script. ``join`` makes the process one of its group; started alone, it changes nothing.

script = folder / "script.py"
script.write_text(
    """
import sys, time
import gmmkeops as gk

gk.distributed.join()
folder = sys.argv[1]
began = time.perf_counter()
result = gk.fit(gk.load(folder + "/start.safetensors"), folder + "/x.npy", gk.EM(tol=0), max_iter=20)
if gk.distributed.World().rank == 0:
    gk.save(result.mixture, folder + f"/{sys.argv[2]}.safetensors")
    print(f"{time.perf_counter() - began:.2f}")
"""
)
environment = {**os.environ, "OMP_NUM_THREADS": "1"}
seconds = {}
for ranks in (1, 2):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launch, script, folder, f"ranks{ranks}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds[ranks] = float(done.stdout.split()[-1])

one, two = (gk.load(folder / f"ranks{ranks}.safetensors") for ranks in (1, 2))
gap = float((one.means - two.means).abs().max())
print(f"two ranks: means differ by {gap:.1e} at most; one process {seconds[1]:.2f} s, two {seconds[2]:.2f} s")

figure, ax = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
half = len(x) // 2
for name, part, color in (("share of rank 0", x[:half:40], "C0"), ("share of rank 1", x[half::40], "C1")):
    ax.plot(*part.T, ".", ms=1, alpha=0.5, color=color, label=name)
ax.plot(*one.means.T, "o", mfc="none", mec="k", ms=11, label="means of one process")
ax.plot(*two.means.T, "x", color="k", ms=7, label="means of two")
ax.set(
    aspect="equal",
    xlabel="x (standard deviations)",
    ylabel="y (standard deviations)",
    title="one model from two shares",
)
for handle in ax.legend(loc="best").legend_handles[:2]:
    handle.set(markersize=8, alpha=1)
plt.show()
temporary.cleanup()

# %%
# The crosses lie in the circles. On a cluster the same script runs under ``torchrun`` on every machine; with ``checkpoint=`` and
# ``--max-restarts`` it survives the loss of one.
