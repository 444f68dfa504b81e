"""The command line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HAS_KEOPS

import gmmkeops as gk
from gmmkeops import cli


def test_unknown_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctr"])
    assert "doctr" in capsys.readouterr().err


@pytest.fixture
def scene(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3)) + 9 * rng.integers(0, 3, (4000, 1)) + [5e5, 4e6, 100]
    np.save(tmp_path / "x.npy", x)
    return tmp_path, x


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_fit_score_predict_sample_info_convert(scene, capsys):
    folder, x = scene
    model = folder / "m.safetensors"
    code, said = run(capsys, "fit", folder / "x.npy", "-k", 3, "--out", model, "--checkpoint", folder / "ck", "--json")
    assert code == 0
    facts = json.loads(said.out)
    assert (facts["components"], facts["features"], facts["converged"]) == (3, 3, True)
    assert "iteration 0" in said.err
    mixture = gk.load(model)
    assert facts["log_likelihood"] == pytest.approx(float(mixture.log_prob(x).mean()), abs=1e-5)
    code, said = run(capsys, "score", model, folder / "x.npy", "--out", folder / "s.npy", "--json")
    facts = json.loads(said.out)
    assert facts["rows"] == 4000
    assert facts["log_likelihood"] == pytest.approx(float(np.load(folder / "s.npy").mean()))
    assert facts["bic"] == pytest.approx(gk.analysis.bic(mixture, x))
    code, said = run(capsys, "predict", model, folder / "x.npy", "--out", folder / "l.npy")
    assert "4000 points in 3 of 3 components" in said.out
    assert np.array_equal(np.load(folder / "l.npy"), mixture.predict(x).numpy())
    for name in ("p.npy", "p.csv"):
        assert run(capsys, "sample", model, "-n", 7, "--seed", 1, "--out", folder / name)[0] == 0
    assert np.allclose(np.load(folder / "p.npy"), np.loadtxt(folder / "p.csv", delimiter=","), rtol=1e-15)
    facts = json.loads(run(capsys, "info", model, "--json")[1].out)
    assert facts["parameters"] == mixture.parameter_count
    assert "components" in run(capsys, "info", model)[1].out
    for out in ("m.npz", "m.ply"):
        assert run(capsys, "convert", model, folder / out)[0] == 0
        assert (folder / out).exists()
    assert run(capsys, "convert", model, folder / "e.ply", "--as", "ellipsoids")[0] == 0


def test_select_writes_the_best(scene, capsys):
    folder, _ = scene
    code, said = run(capsys, "select", folder / "x.npy", "-k", "2:4", "--out", folder / "b.safetensors", "--quiet")
    assert code == 0
    assert "<- best" in said.out
    assert gk.load(folder / "b.safetensors").n_components == 3


def test_errors_are_one_sentence_and_a_code(scene, capsys):
    folder, _ = scene
    for arguments, says in (
        (["fit", folder / "none.npy", "-k", 3, "--out", folder / "m"], "there is no file"),
        (["fit", folder / "x.npy", "-k", 3, "--out", folder / "no" / "m"], "there is no folder"),
        (["fit", folder / "x.npy", "-k", 0, "--out", folder / "m"], "at least 1"),
        (["fit", folder / "x.npy", "-k", 3, "--columns", "0,9", "--out", folder / "m"], "no column 9"),
        (["info", folder / "x.npy"], "not a complete safetensors file"),
        (["select", folder / "x.npy", "-k", "a:b"], "--components must be a list"),
        (["warmup", "-d", "2", "--dtype", "int8"], "--dtype must be"),
    ):
        code, said = run(capsys, *arguments)
        assert code == 1
        assert says in said.err
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert said.out == ""
    for arguments in ([], ["fit"], ["nonsense"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2


def test_a_command_that_is_not_understood_imports_no_torch():
    """It takes the tenth of a second that Python takes, not the seconds of torch."""
    code = """
import sys
from gmmkeops import cli
for arguments in (["fit"], ["nonsense"], ["fit", "x.npy", "-k", "three", "--out", "m"], ["--help"], ["--version"], []):
    try:
        cli.main(arguments)
    except SystemExit as ended:
        print(ended.code, {"torch", "numpy", "pykeops"} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    endings = [line for line in done.stderr.splitlines() if line.endswith("set()")]
    assert endings == ["2 set()"] * 3 + ["0 set()"] * 2 + ["2 set()"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "gmmkeops.cli", "predict"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the following arguments are required" in done.stderr
    assert time.perf_counter() - started < 2


def outputs(folder, out):
    """Every command that writes a file, with the file that it writes."""
    model, points = folder / "m.safetensors", folder / "x.npy"
    return [
        ["fit", points, "-k", 1, "--out", out],
        ["score", model, points, "--out", out],
        ["predict", model, points, "--out", out],
        ["sample", model, "--out", out],
        ["select", points, "-k", 1, "--out", out],
        ["convert", model, out],
    ]


@pytest.mark.parametrize(
    "name", ["a.npy", "a.csv", "a.laz", "a.las", "a.parquet", "a.safetensors", "a.npz", "a.ply", "a.txt", "a"]
)
@pytest.mark.parametrize("before", [None, b"precious"])
def test_outputs_are_what_their_suffix_says_or_are_refused(name, before, scene, capsys):
    folder, x = scene
    gk.save(gk.fit(gk.initialize(x, 2), x, gk.EM(), max_iter=20).mixture, folder / "m.safetensors")
    whole = {
        "npy": lambda path: np.load(path),
        "csv": lambda path: np.loadtxt(path, delimiter=","),
        "safetensors": gk.load,
        "": gk.load,
        "npz": lambda path: np.load(path)["means_"],
        "ply": lambda path: gk.Source.of(path, columns=["x"]).survey(),
    }
    formats = {"fit": ["safetensors", ""], "select": ["safetensors", ""], "convert": ["npz", "ply"]}
    out, suffix = folder / name, name.removeprefix("a").removeprefix(".")
    for command in outputs(folder, out):
        out.unlink(missing_ok=True)
        if before is not None:
            out.write_bytes(before)
        code, said = run(capsys, *command)
        if suffix in formats.get(command[0], ["npy", "csv"]):
            assert code == 0, said.err
            whole[suffix](out)
            assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask()
        else:
            assert (code, said.out, said.err.count("\n")) == (1, "", 1)
            assert "is written to a" in said.err
            assert (out.read_bytes() if out.exists() else None) == before
    assert {path.name for path in folder.iterdir()} <= {"m.safetensors", "x.npy", name}


def umask():
    value = os.umask(0o22)
    os.umask(value)
    return value


@pytest.mark.parametrize("link", ["itself", "relative", "symlink", "hardlink", "by folder", "by pattern"])
def test_an_input_is_never_overwritten(link, scene, capsys, monkeypatch):
    folder, x = scene
    gk.save(gk.Mixture.from_parameters([1.0], x[:1], [1.0], "spherical"), folder / "m.safetensors")
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub")

    def named(path):
        other = folder / f"other-{path.name}"
        if link == "symlink":
            other.unlink(missing_ok=True)
            other.symlink_to(path)
            return other
        if link == "hardlink":
            other.unlink(missing_ok=True)
            os.link(path, other)
            return other
        return f"../{path.name}" if link == "relative" else path

    points = {"by folder": folder, "by pattern": f"{folder}/*.npy"}.get(link, folder / "x.npy")
    model, data = folder / "m.safetensors", folder / "x.npy"
    before = {path: path.read_bytes() for path in (model, data)}
    for command in (
        ["predict", model, points, "--out", named(data)],
        ["score", model, points, "--out", named(data)],
        ["fit", points, "-k", 1, "--out", folder / "new.safetensors", "--checkpoint", named(data)],
        ["fit", points, "-k", 1, "--out", folder / "new.safetensors", "--checkpoint", folder / "new.safetensors"],
    ):
        code, said = run(capsys, *command)
        assert (code, said.err.count("\n")) == (1, 1)
        assert "would overwrite" in said.err
        assert not (folder / "new.safetensors").exists()
    # A model under a name that could be that of points.
    os.link(model, folder / "model.npy")
    code, said = run(capsys, "sample", model, "--out", folder / "model.npy")
    assert (code, "would overwrite" in said.err) == (1, True)
    assert {path: path.read_bytes() for path in (model, data)} == before


def test_a_scan_is_not_replaced_by_labels(tmp_path, capsys):
    laspy = pytest.importorskip("laspy")
    scan = laspy.create()
    scan.x, scan.y, scan.z = np.random.default_rng(0).normal(size=(3, 500))
    scan.write(tmp_path / "scan.las")
    gk.save(gk.initialize(tmp_path / "scan.las", 2), tmp_path / "m.safetensors")
    before = (tmp_path / "scan.las").read_bytes()
    for name in ("scan.las", "labels.laz"):
        code, said = run(capsys, "predict", tmp_path / "m.safetensors", tmp_path / "scan.las", "--out", tmp_path / name)
        assert code == 1
        assert "is written to a .npy or .csv file" in said.err
    assert (tmp_path / "scan.las").read_bytes() == before
    assert not (tmp_path / "labels.laz").exists()


def test_a_failure_keeps_the_old_output(scene, capsys):
    folder, x = scene
    gk.save(gk.Mixture.from_parameters([1.0], x[:1], [1.0], "spherical"), folder / "m.safetensors")
    x[3999, 1] = np.nan
    np.save(folder / "bad.npy", x)
    (folder / "old.npy").write_bytes(b"precious")
    code, said = run(capsys, "predict", folder / "m.safetensors", folder / "bad.npy", "--out", folder / "old.npy")
    assert (code, "row 3999" in said.err) == (1, True)
    assert (folder / "old.npy").read_bytes() == b"precious"
    code, said = run(capsys, "sample", folder / "m.safetensors", "--out", folder)
    assert (code, "is a folder" in said.err or "without a suffix" in said.err) == (1, True)
    assert run(capsys, "predict", folder / "m.safetensors", folder / "x.npy", "--out", folder / "no" / "l.npy")[0] == 1


def test_savers_refuse_suffixes_of_other_formats(tmp_path):
    m = gk.Mixture.from_parameters([1.0], [[0.0, 1.0, 2.0]], [1.0], "spherical")
    for save, wrong in (
        (lambda path: gk.save(m, path), "scan.las"),
        (lambda path: gk.save(m, path), "m.npz"),
        (gk.GaussianMixture.from_mixture(m).save, "m.parquet"),
        (lambda path: gk.export.npz(m, path), "m.ply"),
        (lambda path: gk.export.splats(m, path), "m.npz"),
        (lambda path: gk.export.ellipsoids(m, path), "scan.laz"),
    ):
        (tmp_path / wrong).write_bytes(b"precious")
        with pytest.raises(ValueError, match="is written to a"):
            save(tmp_path / wrong)
        assert (tmp_path / wrong).read_bytes() == b"precious"
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "scan.las")
    with pytest.raises(ValueError, match=r"got .*scan\.las, a \.las file"):
        gk.save(m, tmp_path / "link.safetensors")
    gk.save(m, tmp_path / "M.SAFETENSORS")
    gk.export.npz(m, tmp_path / "M.NPZ")
    assert gk.load(tmp_path / "M.SAFETENSORS").n_features == 3


def test_classes_are_numbers(scene, capsys):
    folder, _ = scene
    code, said = run(capsys, "fit", folder / "x.npy", "-k", 1, "--classes", "ground", "--out", folder / "m")
    assert (code, "--classes must be comma-separated integers" in said.err) == (1, True)


@pytest.mark.parametrize(
    "command", ["fit", "score", "predict", "sample", "select", "info", "convert", "doctor", "warmup"]
)
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.keops
@pytest.mark.skipif(not HAS_KEOPS, reason="pykeops is not installed")
def test_warmup_compiles(capsys):
    code, said = run(capsys, "warmup", "-d", "2", "--json")
    assert code == 0
    # Where a test has imported pykeops by itself, that talks while it compiles.
    assert json.loads(said.out.splitlines()[-1])["formulas"][0]["dimension"] == 2


DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real clouds are not here")
@pytest.mark.parametrize("name", ["lone_star.laz", "autzen_trim.las"])
def test_real_scans(name, tmp_path, capsys):
    """Means land on the scan to a millimetre: they are averages of it, found in float64 from the file's own numbers."""
    code, said = run(capsys, "fit", DATA / name, "-k", 20, "--out", tmp_path / "m.safetensors", "--max-iter", 4)
    assert "warning: The fit did not converge" in said.err
    assert code == 0
    mixture = gk.load(tmp_path / "m.safetensors")
    rows = torch.cat([chunk.points for chunk in gk.Source.of(DATA / name).chunks()])
    again = gk.fit(mixture, rows, gk.EM(tol=0), max_iter=1).mixture
    single = gk.fit(mixture, rows, gk.EM(tol=0), max_iter=1, dtype="float32").mixture
    assert float((single.means - again.means).abs().max()) < 1e-3
    low, high = rows.amin(0), rows.amax(0)
    assert bool((mixture.means >= low).all())
    assert bool((mixture.means <= high).all())


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_formulas_for_a_device_that_does_not_exist(device, capsys):
    assert cli.main(["warmup", "-d", "2", "--device", device]) != 0
    assert (
        f"device must be an available device such as 'cpu' (no CUDA device is available), got '{device}'"
        in capsys.readouterr().err
    )
