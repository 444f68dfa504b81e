"""Tensors on a device: every public path on a fake one, which tells where CUDA would refuse and what it would wait for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from types import SimpleNamespace

import fake_keops
import pytest
import torch
from conftest import make_case
from fake_device import fake_device, on_device

import gmmkeops as gk
from gmmkeops import doctor


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


def test_every_fallback_of_an_engine_is_said_once(monkeypatch, tmp_path):
    case = make_case("full", torch.float32, condition=10.0)
    for reason in ("pykeops is not installed (pip install pykeops)", "no C++ compiler was found (install g++)"):
        with fake_device(monkeypatch):
            fake_keops.install(monkeypatch, tmp_path, reason=reason)
            arguments = [on_device(value) for value in (case.x, case.offsets, case.means, case.factor.U)]
            with pytest.warns(UserWarning, match="KeOps is the faster engine here but " + re.escape(reason)):
                values = gk.reductions.logsumexp(*arguments)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(values.cpu(), gk.reductions.logsumexp(*arguments, backend="keops").cpu())
                gk.reductions.moments(*arguments)
