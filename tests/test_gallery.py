"""The gallery scripts run, and the numbers that they print hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

GALLERY = Path(__file__).parent.parent / "gallery"
# For each script: how many figures, and what must hold of (objective, log-likelihood, live components).
SCRIPTS = {
    "plot_spiral.py": (2, lambda objective, likelihood, live: objective <= -0.38 and live <= 15),
    "plot_photograph.py": (2, lambda objective, likelihood, live: likelihood > 3.5 and live <= 64),
}


def test_every_script_is_tested():
    assert {path.name for path in GALLERY.glob("plot_*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, tmp_path):
    figures, holds = SCRIPTS[script]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::DeprecationWarning:gmmkeops",
            str(GALLERY / "run.py"),
            str(tmp_path),
            str(GALLERY / script),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(GALLERY.parent)},
    )
    assert done.returncode == 0, done.stderr
    pattern = r"objective (-?[\d.]+), mean log-likelihood (-?[\d.]+) nats per point, (\d+) of"
    objective, likelihood, live = re.search(pattern, done.stdout).groups()
    assert re.search(r"in [\d.]+ s on cpu \(dense, float32\)", done.stdout)
    assert holds(float(objective), float(likelihood), int(live)), done.stdout
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == figures
    for picture in pictures:
        pixels = matplotlib.image.imread(picture)
        assert pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.05
