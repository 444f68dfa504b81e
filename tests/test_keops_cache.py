"""Compiled formulas that are damaged, and compilers that fail: KeOps heals or the dense engine runs, and no process dies."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HAS_KEOPS, needs_keops

import gmmkeops as gk
from gmmkeops.reductions.keops import cache

pytestmark = [*needs_keops, pytest.mark.skipif(sys.platform != "linux", reason="shared objects of Linux")]


SCRIPT = """
import json, sys, warnings
import torch, gmmkeops as gk
generator = torch.Generator().manual_seed(0)
x, means = torch.randn(40, 2, generator=generator), torch.randn(3, 2, generator=generator)
arguments = x, torch.tensor([0.3, -0.2, 0.5]), means, torch.tensor([[1.0, 2.0], [0.5, 1.5], [2.0, 0.7]])
right = torch.logsumexp(arguments[1] - 0.5 * (arguments[3] * (x[:, None] - means)).square().sum(-1), 1)
errors = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        values = gk.reductions.logsumexp(*arguments, backend="keops")
        errors.append(float((values - right).abs().max()))
print(json.dumps([errors, [str(w.message) for w in caught]]))
"""


def run(folder, **environment):
    """Warnings of a process with a cache folder, which must neither crash nor give wrong values."""
    paths = {"PYTHONPATH": str(Path(gk.__file__).parents[1]), "KEOPS_CACHE_FOLDER": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    errors, warned = json.loads(done.stdout.strip().splitlines()[-1])
    assert max(errors) < 1e-4
    return warned


def works(folder, **environment):
    assert run(folder, **environment) == []


def compiler(folder, text):
    """A C++ compiler that is a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def fails(warned, *words):
    """The dense engine has run, and one warning gives the reason."""
    assert len(warned) == 1, warned
    assert all(word in warned[0] for word in words), warned


@pytest.mark.parametrize("command", ["exit 3", "kill -SEGV $$", "exit 0"])
def test_a_compiler_that_fails_is_named(command, tmp_path):
    path = compiler(tmp_path, command)
    fails(run(tmp_path / "cache", CXX=path), path, "exit status")


def test_a_missing_compiler_is_named(tmp_path):
    fails(run(tmp_path / "cache", CXX="no-such-compiler", PATH=str(tmp_path)), "no C++ compiler was found")


def test_a_file_in_the_place_of_the_cache_folder_is_named(tmp_path):
    cache = tmp_path / "cache"
    cache.write_bytes(b"mine")
    fails(run(cache), str(cache), "is not writable")
    assert cache.read_bytes() == b"mine"


def test_a_cache_that_cannot_be_read_is_made_anew_and_nothing_is_deleted(tmp_path):
    cache, broken = tmp_path / "cache", compiler(tmp_path, "exit 3")
    cache.mkdir()
    (cache / "my_formulas.pkl").write_bytes(b"mine")
    run(cache, CXX=broken)
    pickles = [path for path in cache.rglob("*.pkl") if path.parent != cache]
    assert pickles
    for path in pickles:
        path.write_bytes(b"cut short")
    # It is the compiler again that fails, not the import.
    fails(run(cache, CXX=broken), broken)
    assert not any(path.read_bytes() == b"cut short" for path in cache.rglob("*.pkl"))
    assert sum(path.read_bytes() == b"cut short" for path in cache.rglob("*.pkl.*")) == len(pickles)
    assert (cache / "my_formulas.pkl").read_bytes() == b"mine"
    fails(run(cache, CXX=broken), broken)


def test_an_incomplete_shared_object_is_never_loaded(tmp_path):
    # A compiler that makes good objects of the empty program that tries it, and half of one of everything else.
    half = 'for last; do :; done; g++ "$@" -O0 -fno-lto; case "$*" in *pykeops_cpp*) truncate -s 9000 "$last";; esac'
    fails(run(tmp_path / "cache", CXX=compiler(tmp_path, half)), "cannot compile or load", str(tmp_path / "cache"))


@pytest.mark.slow
def test_folders_for_formulas_that_cannot_be_loaded_are_few(tmp_path):
    # Formulas for another architecture, as no folder makes them better.
    alien = (
        'for last; do :; done; g++ "$@" -O0 -fno-lto; case "$*" in '
        "*pykeops_cpp*) printf '\\267' | dd of=\"$last\" bs=1 seek=18 conv=notrunc status=none;; esac"
    )
    cache, path = tmp_path / "cache", compiler(tmp_path, alien)
    fails(run(cache, CXX=path), "cannot compile or load")
    first = min(cache.iterdir())
    for number in range(1, 10):
        Path(f"{first}-{number}").mkdir(exist_ok=True)
    folders = set(cache.iterdir())
    fails(run(cache, CXX=path), "cannot compile or load")
    assert set(cache.iterdir()) == folders


@pytest.mark.slow
def test_damaged_formulas_are_compiled_anew_in_every_kind_of_cache(tmp_path):
    cache = tmp_path / "cache"
    works(cache)

    def damage(pattern, change):
        paths = [path for path in cache.rglob(pattern) if path.is_file()]
        assert paths
        for path in paths:
            path.write_bytes(change(path.read_bytes()))

    for pattern, change in (
        ("pykeops_cpp_*.so", lambda data: data[: len(data) // 2]),
        ("pykeops_cpp_*.so", lambda data: data[:100]),
        ("pykeops_cpp_*.so", lambda data: b""),
        ("pykeops_cpp_*.so", lambda data: b"text"),
        ("pykeops_cpp_*.so", lambda data: data[:18] + b"\xb7\x00" + data[20:]),  # another architecture
        ("*.pkl", lambda data: data[: len(data) // 2]),
        ("*.nfo", lambda data: data[:5]),
    ):
        damage(pattern, change)
        for _ in range(2):
            works(cache)


@pytest.mark.slow
def test_a_cache_folder_that_was_moved_is_made_anew(tmp_path):
    works(tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("pykeops_cpp_*.so"):
        path.unlink()
    # The lists of formulas name sources by their old paths.
    (tmp_path / "cache").rename(tmp_path / "moved")
    works(tmp_path / "moved")


@pytest.mark.keops
@pytest.mark.skipif(not HAS_KEOPS, reason="no pykeops")
def test_a_damaged_cache_heals_itself(tmp_path):
    code = """
import torch, gmmkeops as gk
from gmmkeops.reductions.keops import loading as _keops
a = torch.zeros(4, 1), torch.zeros(3), torch.zeros(3, 1), torch.ones(3, 1)
print(float(gk.reductions.logsumexp(*a, backend="keops")[0]))
print(_keops._state["lock"].parent)
"""
    environment = {k: v for k, v in os.environ.items() if k != "KEOPS_CACHE_FOLDER"} | {"XDG_CACHE_HOME": str(tmp_path)}

    def run():
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment
        )

    first = run()
    assert first.returncode == 0, first.stderr
    value, folder = first.stdout.split()
    assert abs(float(value) - math.log(3)) < 1e-6
    damaged = list(Path(folder).glob("*.pkl"))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:10])
    second = run()
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    # A compiler that was killed leaves the end of its file unwritten, which would be a bus error on loading it.
    formulas = [path for path in Path(folder).rglob("*.so") if path.stat().st_size > 1000]
    assert formulas
    for path in formulas:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    third = run()
    assert third.returncode == 0, third.stderr
    assert third.stdout == first.stdout


def test_each_compiler_has_its_own_folder(tmp_path, monkeypatch):
    """What one compiler has built may not work beside what another one builds."""
    monkeypatch.setenv("KEOPS_CACHE_FOLDER", str(tmp_path))
    found = set()
    for compiler in ("", "/usr/bin/g++", "clang++"):
        monkeypatch.setenv("CXX", compiler)
        found |= {cache.cache_folder("-O1"), cache.cache_folder("-O2")}
    assert len(found) == 6
    monkeypatch.delenv("CXX")
    assert cache.cache_folder("-O1") in found
