r"""
Two ranks, one model
====================

Do fits with one and with two processes give the same model? Each process reads its shard of the data. The sufficient statistics
are added over all ranks, and every process performs the same M-step,

.. math:: S = \sum_{\text{ranks}} \sum_{n \in \text{shard}} r_n\, (1, x_n, x_n x_n^\top).

The model therefore does not depend on the number of processes. Compared with the script of a single process, a distributed
script has one additional line.
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
# The data are in a file that both processes can read.

rng = np.random.default_rng(0)
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
x = (rng.normal(size=(300_000, 2)) + rng.normal(scale=6, size=(12, 2))[rng.integers(12, size=300_000)]).astype(
    np.float32
)
np.save(folder / "x.npy", x)
gk.save(gk.initialize(x, 12), folder / "start.safetensors")

# %%
# In the script, ``join`` adds the process to its process group; without ``torchrun`` it has no effect.

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
for name, part, color in (("shard of rank 0", x[:half:40], "C0"), ("shard of rank 1", x[half::40], "C1")):
    ax.plot(*part.T, ".", ms=1, alpha=0.5, color=color, label=name)
ax.plot(*one.means.T, "o", mfc="none", mec="k", ms=11, label="means of one process")
ax.plot(*two.means.T, "x", color="k", ms=7, label="means of two processes")
ax.set(
    aspect="equal",
    xlabel="x (standard deviations)",
    ylabel="y (standard deviations)",
    title="one model from two shards",
)
for handle in ax.legend(loc="best").legend_handles[:2]:
    handle.set(markersize=8, alpha=1)
plt.show()
temporary.cleanup()

# %%
# The means are equal up to rounding errors. On a cluster, ``torchrun`` starts the same script on every machine. With
# ``checkpoint=`` and ``--max-restarts`` the fit resumes after the failure of a machine.
