"""The command line, and what the doctor finds where something is missing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import HAS_KEOPS

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
