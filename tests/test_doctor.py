"""``gmmkeops doctor``: what it finds on a machine where something is missing, and how to repair it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from conftest import HAS_KEOPS
from fake_device import fake_device

from gmmkeops import cli, reductions
from gmmkeops.cli import doctor, race
from gmmkeops.reductions.keops import loading as _keops


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
    assert found.ok is None, "it is optional"
    assert found.remedy == "pip install pykeops"
    cli.main(["doctor"])
    assert "pykeops is not installed; it is optional" in capsys.readouterr().out


def test_pykeops_that_does_not_see_cuda(monkeypatch):
    monkeypatch.setattr(
        doctor.reductions, "unavailable", lambda *_, **__: "pykeops does not see CUDA, although torch does"
    )
    found = doctor._engine("KeOps on CUDA", "keops", torch.device("cpu"))
    assert found.ok is False
    assert "cuda-toolkit" in found.remedy


def test_a_driver_that_torch_cannot_use(monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else which(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = finding("CUDA")
    assert found.ok is False
    assert "CPU build" in found.says
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
    assert "error of 1.0e+00" in found.says


@pytest.mark.keops
@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("bash") is None, reason="no g++")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are found in another way")
def test_the_doctor_says_how_keops_finds_the_compiler_of_cuda(monkeypatch, tmp_path):
    pytest.importorskip("pykeops")
    # The wheel of CUDA's compiler, whose library has no name without a version.
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    library = ["g++", "-shared", "-fPIC", "-x", "c++", "/dev/null", "-Wl,-soname,libnvrtc.so.13", "-o"]
    subprocess.run([*library, str(folder / "libnvrtc.so.13")], check=True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    properties = SimpleNamespace(name="fake", total_memory=80 << 30)
    with fake_device(monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        found = {finding.what: finding for finding in doctor.examine()}
    assert found["dense on CUDA"].ok
    if found["KeOps on CUDA"].ok is not False or "libnvrtc" not in found["KeOps on CUDA"].says:
        pytest.skip("this machine has CUDA's compiler")
    remedy = found["KeOps on CUDA"].remedy
    assert "cuda-toolkit-13-0" in remedy
    assert "nvidia-cuda-nvrtc==13.0.*" in remedy
    commands = [command for command in remedy.split(": ", 1)[1].split("; ") if not command.startswith("pip install")]
    look = f"{sys.executable} -c 'from ctypes.util import find_library; print(find_library(\"nvrtc\"))'"

    def run(commands):
        return subprocess.run(
            ["bash", "-ec", "; ".join([*commands, look])], capture_output=True, text=True, check=True
        ).stdout

    assert run(["export CUDA_PATH=" + str(folder.parent), "export LD_LIBRARY_PATH=" + str(folder)]).strip() == "None"
    assert run(commands).strip() == "libnvrtc.so.13"


@pytest.fixture
def short(monkeypatch):
    """A race of few small problems."""
    monkeypatch.setattr(race, "_FULL", (2,))
    monkeypatch.setattr(race, "_DIAGONAL", (3,))
    monkeypatch.setattr(race, "_KEOPS", 0)
    monkeypatch.setattr(race, "_CPU", (300, 4))


def test_the_engines_are_timed(short, capsys):
    assert cli.main(["doctor", "--measure", "--json"]) == 0
    full, diagonal = (row for row in json.loads(capsys.readouterr().out) if row["device"] == "cpu")
    assert (full["full"], full["features"], full["points"], full["components"]) == (True, 2, 300, 4)
    assert (diagonal["full"], diagonal["features"]) == (False, 3)
    for row in (full, diagonal):
        assert row["chosen"] in row["seconds"]
        assert row["fastest"] == min(row["seconds"], key=row["seconds"].get)
        assert all(0 < value < 10 for value in row["seconds"].values())
        assert "dense" in row["seconds"]
        assert "at most 0 features" in row["failures"]["keops"]
        assert set(row["seconds"]) | set(row["failures"]) == set(reductions.BACKENDS[1:])


def test_the_table_of_engines_is_printed_with_its_figures(short, capsys, monkeypatch):
    monkeypatch.setattr(race, "seconds_of", lambda call: (call(), next(clock))[1])
    clock = iter([2e-3, 1e-3] * 10)
    assert cli.main(["doctor", "--measure"]) == 0
    said = capsys.readouterr().out
    for line in reductions.TABLE:
        assert f"{', '.join(line.engines)}   ({line.figure})" in said
    if reductions.native_unavailable() is None and reductions.unavailable("triton", torch.zeros(1, 2)) is not None:
        assert (
            "full D=2   300 x 4: native 2 ms, dense 1 ms; auto uses native; dense is faster here: pass backend='dense'"
            in said
        )


def test_an_engine_that_fails_is_not_timed(short, monkeypatch):
    def fails(*arguments, backend, **options):
        raise RuntimeError(f"{backend} has no memory left\nand more")

    monkeypatch.setattr(race.reductions, "moments", fails)
    row = next(race.race([torch.device("cpu")]))
    assert row.seconds == {}
    assert row.failures["dense"] == "dense has no memory left"
    assert row.chosen in str(row)


def test_an_engine_whose_results_are_wrong_is_found(monkeypatch):
    """Its first results are compared with float64, and another engine replaces it."""
    native = reductions.native.native
    if native.unavailable(torch.device("cpu")) is not None:
        pytest.skip("the native engine has not been compiled")
    kind = reductions.native.engine._Evaluation
    result = kind.result
    monkeypatch.setattr(native._comparison, "_done", set())
    monkeypatch.setattr(native._comparison, "failure", None)
    monkeypatch.setattr(kind, "result", lambda self: tuple(part + 1 for part in result(self)))
    with pytest.warns(UserWarning, match="a check of 256 points"):
        found = finding("native on the CPU")
    assert found.ok is False
    assert "found a relative error" in found.says
