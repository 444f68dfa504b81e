"""The command line, and what the doctor finds where something is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HAS_KEOPS

import gmmkeops as gk
from gmmkeops import cli, doctor
from gmmkeops.reductions import _keops


def finding(what):
    return next(found for found in doctor.examine() if found.what == what)


def test_doctor_on_this_machine(capsys):
    code = cli.main(["doctor"])
    text = capsys.readouterr().out
    assert "ok  dense on the CPU" in text
    assert ("ok  KeOps on the CPU" in text) == (HAS_KEOPS and shutil.which("g++") is not None)
    assert code == int("!!" in text)


def test_doctor_as_json(capsys):
    cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"what", "ok", "says", "remedy"} == set(found[0])
    assert all(entry["remedy"] or entry["ok"] is not False or entry["says"] for entry in found)


def test_without_pykeops(monkeypatch, capsys):
    monkeypatch.setitem(_keops._state, "lazy", None)
    monkeypatch.setitem(_keops._state, "reason", "pykeops is not installed (pip install pykeops)")
    found = finding("KeOps on the CPU")
    assert found.ok is False
    assert found.remedy == "pip install pykeops"
    assert cli.main(["doctor"]) == 1
    assert "type: pip install pykeops" in capsys.readouterr().out


def test_a_driver_that_torch_cannot_use(monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else which(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = finding("CUDA")
    assert found.ok is False
    assert "build for the CPU" in found.says
    assert "pip install torch" in found.remedy


def test_a_wrong_engine_is_found(monkeypatch):
    dense = doctor.reductions.logsumexp
    monkeypatch.setattr(
        doctor.reductions,
        "logsumexp",
        lambda x, *args, **options: dense(x, *args, **options) + (x.dtype == torch.float32),
    )
    found = finding("dense on the CPU")
    assert found.ok is False
    assert "wrong by 1.0e+00" in found.says


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
    assert facts["bic"] == pytest.approx(gk.selection.bic(mixture, x))
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
    assert gk.load(folder / "b.safetensors").components == 3


def test_errors_are_one_sentence_and_a_code(scene, capsys):
    folder, _ = scene
    for arguments, says in (
        (["fit", folder / "none.npy", "-k", 3, "--out", folder / "m"], "there is no file"),
        (["fit", folder / "x.npy", "-k", 3, "--out", folder / "no" / "m"], "there is no folder"),
        (["fit", folder / "x.npy", "-k", 0, "--out", folder / "m"], "at least 1"),
        (["fit", folder / "x.npy", "-k", 3, "--columns", "0,9", "--out", folder / "m"], "no column 9"),
        (["info", folder / "x.npy"], "not a complete safetensors file"),
        (["select", folder / "x.npy", "-k", "a:b"], "look like"),
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
    code, said = run(capsys, "fit", DATA / name, "-k", 60, "--out", tmp_path / "m.safetensors", "--max-iter", 8)
    assert "warning: The best of 1 starts did not converge" in said.err
    assert code == 0
    mixture = gk.load(tmp_path / "m.safetensors")
    rows = torch.cat([chunk.points for chunk in gk.Source.of(DATA / name).chunks()])
    again = gk.fit(mixture, rows, gk.EM(tol=0), max_iter=1).mixture
    single = gk.fit(mixture, rows, gk.EM(tol=0), max_iter=1, dtype="float32").mixture
    assert float((single.means - again.means).abs().max()) < 1e-3
    low, high = rows.amin(0), rows.amax(0)
    assert bool((mixture.means >= low).all())
    assert bool((mixture.means <= high).all())
