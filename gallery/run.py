"""Run gallery scripts without a display and save their figures: ``python run.py OUT SCRIPT...``."""

import runpy
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from look import check, dress


def main(out: str, *scripts: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    dress()
    for script in scripts:
        began = time.perf_counter()
        plt.close("all")
        runpy.run_path(script, run_name="__main__")
        for count, number in enumerate(plt.get_fignums(), 1):
            path = folder / f"{Path(script).stem.removeprefix('plot_')}_{count}.png"
            check(plt.figure(number))
            plt.figure(number).savefig(path)
            print(f"saved {path}")
        print(f"{Path(script).name}: {time.perf_counter() - began:.1f} s in total\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
