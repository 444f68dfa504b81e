"""Parser of the command line: commands, options and help texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gmmkeops import __version__
from gmmkeops.cli.values import count

__all__ = ["parser"]

_TYPES = ("full", "tied", "diag", "spherical", "tied_diag", "tied_spherical")


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; ``run`` names the module in this folder and the function of a command."""
    made = argparse.ArgumentParser(prog="gmmkeops", description="Gaussian mixture models for large data sets.")
    made.add_argument("--version", action="version", version=f"gmmkeops {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="command")
    _add_fit(commands)
    _add_evaluation(commands)
    _add_select(commands)
    _add_files(commands)
    _add_machine(commands)
    return made


def _command(commands: Any, run: str, what: str, examples: str) -> argparse.ArgumentParser:
    module, name = run.split(".")
    made = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.set_defaults(run=(module, name))
    return made


def _add_fit(commands: Any) -> None:
    fit = _command(
        commands,
        "fitting.fit",
        "fit a mixture to files of points",
        "  gmmkeops fit scan.laz -k 500 --out scan.safetensors\n"
        '  gmmkeops fit "shards/*.parquet" -k 2000 --columns ra,dec,z --checkpoint stars.ckpt --out stars.safetensors\n'
        "  torchrun --nproc-per-node 4 -m gmmkeops.cli fit scan.laz -k 500 --out scan.safetensors",
    )
    _add_points(fit)
    fit.add_argument("-k", "--components", type=count, required=True, help="number of components, or auto to choose it")
    fit.add_argument("--out", type=Path, required=True, help="output file for the mixture (.safetensors)")
    fit.add_argument("--solver", choices=("em", "adam"), default="em", help="default: em")
    fit.add_argument("--batch-size", type=int, help="points per step (default: all points)")
    fit.add_argument("--tol", type=float, default=1e-3, help="convergence tolerance, nats per point (default: 1e-3)")
    fit.add_argument("--device", help="device of the computation, e.g. cuda")
    fit.add_argument("--checkpoint", type=Path, help="checkpoint file; if it exists the fit resumes from it")
    fit.add_argument("--checkpoint-every", type=float, default=60.0, metavar="SECONDS", help="default: 60")
    _add_limits(fit)


def _add_evaluation(commands: Any) -> None:
    score = _command(
        commands,
        "evaluation.score",
        "mean log-density of files of points, and optionally the log-density of each point",
        "  gmmkeops score scan.safetensors other.laz\n  gmmkeops score scan.safetensors other.laz --out densities.npy",
    )
    predict = _command(
        commands,
        "evaluation.predict",
        "most probable component of each point",
        "  gmmkeops predict scan.safetensors other.laz --out labels.npy",
    )
    for made, needed in ((score, False), (predict, True)):
        _add_model(made)
        _add_points(made)
        made.add_argument("--out", type=Path, required=needed, help=".npy or .csv file with one number per point")

    sample = _command(
        commands,
        "evaluation.sample",
        "draw points from a mixture",
        "  gmmkeops sample scan.safetensors -n 100000 --seed 0 --out points.npy",
    )
    _add_model(sample)
    sample.add_argument("-n", "--number", type=int, default=1000, help="number of points (default: 1000)")
    sample.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    sample.add_argument("--out", type=Path, required=True, help=".npy or .csv file")


def _add_select(commands: Any) -> None:
    select = _command(
        commands,
        "fitting.select",
        "choose the number of components and the covariance type",
        "  gmmkeops select scan.laz --covariance full,diag --out best.safetensors\n"
        "  gmmkeops select scan.laz -k 5,10,20",
    )
    _add_points(select)
    select.add_argument(
        "-k",
        "--components",
        default="auto",
        help="auto (default) to choose the number, or the numbers to compare: 2,4,8, or 1:10, or 10:100:10 (both ends included)",
    )
    select.add_argument(
        "--criterion",
        choices=("bic", "aic", "aic3", "icl", "icl_hard", "held_out"),
        help="default: held_out from 1000 points on, else aic3 (few points per parameter) or bic; for a list of numbers, bic",
    )
    select.add_argument(
        "--most", type=int, metavar="K", help="largest number of components with -k auto (default: 100)"
    )
    select.add_argument("--out", type=Path, help="output file for the best mixture (.safetensors)")
    _add_limits(select)


def _add_files(commands: Any) -> None:
    info = _command(commands, "evaluation.info", "parameters of a mixture", "  gmmkeops info scan.safetensors")
    _add_model(info)

    convert = _command(
        commands,
        "evaluation.convert",
        "export a mixture for other programs",
        "  gmmkeops convert scan.safetensors scan.npz                    arrays under scikit-learn's names\n"
        "  gmmkeops convert scan.safetensors scan.ply --as splats        Gaussian splats (three dimensions)\n"
        "  gmmkeops convert scan.safetensors mesh.ply --as ellipsoids    a mesh of ellipsoids (three dimensions)",
    )
    _add_model(convert)
    convert.add_argument("out", type=Path, help=".npz or .ply file")
    kinds = ("splats", "ellipsoids")
    convert.add_argument("--as", dest="kind", choices=kinds, default="splats", help="content of a .ply file")


def _add_machine(commands: Any) -> None:
    doctor = _command(
        commands,
        "machine.doctor",
        "check the installation and suggest fixes, or time the engines",
        "  gmmkeops doctor\n  gmmkeops doctor --json > report.json\n"
        "  gmmkeops doctor --measure      about a minute: which engine is faster on this machine",
    )
    doctor.add_argument("--measure", action="store_true", help="time all engines on all devices instead")
    warmup = _command(
        commands,
        "machine.warmup",
        "compile KeOps formulas in advance",
        "  gmmkeops warmup -d 3\n  gmmkeops warmup -d 2,3 --covariance full,diag --dtype float32,float64 --device cuda",
    )
    warmup.add_argument("-d", "--dimensions", required=True, help="numbers of features: 3, or 2,3")
    warmup.add_argument("--covariance", default="full", help="covariance types, separated by commas (default: full)")
    warmup.add_argument("--dtype", default="float32", help="float32, float64 or both (default: float32)")
    warmup.add_argument("--device", default="cpu", help="default: cpu")


def _add_model(made: argparse.ArgumentParser) -> None:
    made.add_argument("model", type=Path, help="file of a mixture (.safetensors)")


def _add_points(made: argparse.ArgumentParser) -> None:
    made.add_argument("input", nargs="+", help="files (.npy .parquet .las .laz .ply), folders or glob patterns")
    made.add_argument("--columns", help="names or indices of the columns to read, separated by commas")
    made.add_argument("--classes", help="classes of points to read from LAS files, separated by commas")
    made.add_argument("--weights", help="name or index of the column of weights")


def _add_limits(made: argparse.ArgumentParser) -> None:
    made.add_argument("--covariance", default="full", help=f"one of {', '.join(_TYPES)} (default: full)")
    made.add_argument("--max-iter", type=int, default=100, help="maximum number of iterations (default: 100)")
    made.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    made.add_argument(
        "--dtype", choices=("float32", "float64"), help="dtype of the computation (default: dtype of the data)"
    )
    made.add_argument("--max-memory", help="memory limit for the fit, e.g. 1.5GB")
    made.add_argument("--quiet", action="store_true", help="do not show progress")
