"""Messages about the compilation of formulas: one at the first, one after it, and none for formulas that are in the cache."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import needs_keops

import gmmkeops as gk
from gmmkeops.reductions.keops import compilation


def compiles(function):
    """Marks a test that compiles real formulas."""
    for mark in (*needs_keops, pytest.mark.skipif(sys.platform != "linux", reason="a compiler that is a shell script")):
        function = mark(function)
    return function


SCRIPT = """
import json, logging, sys
PREPARE
import torch, gmmkeops as gk
records = []

class Handler(logging.Handler):
    def emit(self, record):
        records.append((record.levelname, record.getMessage()))

arguments = torch.zeros(4, 2), torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2)
gk.reductions.logsumexp(*arguments, backend="keops")
print("second", file=sys.stderr)
logging.getLogger("gmmkeops").addHandler(Handler())
logging.getLogger("gmmkeops").setLevel(logging.INFO)
gk.reductions.logsumexp(*arguments, backend="keops")
gk.reductions.argmax(*arguments, backend="keops")
gk.reductions.argmax(*arguments, backend="keops")
print(json.dumps(records))
"""


@pytest.fixture
def keops(monkeypatch):
    """A module of KeOps that says what it does, in a process in which nothing has been compiled and logging is not set up."""
    module = SimpleNamespace(KeOps_Message=print)
    monkeypatch.setitem(sys.modules, "keopscore.binders.LinkCompile", module)
    monkeypatch.setattr(compilation, "_shown", [])
    monkeypatch.setattr(compilation, "_logger", logging.Logger("alone"))
    return module


def test_only_the_first_formula_that_is_compiled_is_shown(keops, capsys, tmp_path):
    for name, compiled in (("cached", False), ("first", True), ("second", True), ("cached", False)):
        with compilation.announced(name, tmp_path):
            if compiled:
                keops.KeOps_Message("Generating code ...", end="")
                keops.KeOps_Message("OK", use_tag=False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f"KeOps compiles first. The result is kept in {tmp_path}.",
        "KeOps compiled first in 0.0 s.",
    ]
    assert keops.KeOps_Message is print


def test_a_compilation_that_fails_has_no_duration(keops, capsys, tmp_path):
    def fail():
        with compilation.announced("first", tmp_path):
            keops.KeOps_Message("Generating code ...")
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert capsys.readouterr().err == f"KeOps compiles first. The result is kept in {tmp_path}.\n"
    assert keops.KeOps_Message is print


def test_nothing_is_shown_if_a_level_is_set(keops, capsys, tmp_path):
    compilation._logger.setLevel(logging.WARNING)
    with compilation.announced("first", tmp_path):
        keops.KeOps_Message("Generating code ...")
    assert capsys.readouterr().err == ""


def run(folder, prepare=""):
    """The lines that a process writes to its error stream for the first formula, and its records of the second one."""
    # Without optimization, since no times are compared.
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {
        "PYTHONPATH": str(Path(gk.__file__).parents[1]),
        "KEOPS_CACHE_FOLDER": str(folder / "cache"),
        "CXX": str(compiler),
    }
    (folder / "cache").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", SCRIPT.replace("PREPARE", prepare)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines().count("second") == 1
    before, _, after = done.stderr.partition("second\n")
    assert after == "" or "basicConfig" in prepare
    *printed, records = done.stdout.splitlines()
    # KeOps itself prints when it is imported, if the user imports it.
    assert not any("Generating" in line or "Compiling" in line for line in printed if prepare), printed
    assert prepare or not printed
    return before.splitlines(), json.loads(records)


def assert_messages(messages, reduction):
    first, last = messages
    described = re.escape(f"the formula {reduction} (D = 2, float32, cpu)")
    assert re.fullmatch(rf"KeOps compiles {described}\. The result is kept in /.*\.", first)
    seconds = re.fullmatch(rf"KeOps compiled {described} in (\d+\.\d) s\.", last)
    assert seconds
    assert 0.5 < float(seconds[1]) < 300


@compiles
def test_the_first_compilation_is_shown_and_all_are_logged(tmp_path):
    shown, records = run(tmp_path)
    assert_messages(shown, "logsumexp")
    assert [level for level, _ in records] == ["INFO", "INFO"]
    assert_messages([message for _, message in records], "topk")
    # Another process finds both in the cache.
    assert run(tmp_path) == ([], [])


@pytest.mark.slow
@compiles
def test_nothing_is_shown_if_logging_is_configured(tmp_path):
    shown, records = run(tmp_path, "logging.basicConfig(level=logging.WARNING)")
    assert shown == []
    assert_messages([message for _, message in records], "topk")


@pytest.mark.slow
@compiles
def test_keops_prints_nothing_beside_the_messages_if_the_user_has_imported_it(tmp_path):
    shown, records = run(tmp_path, "import pykeops.torch")
    assert_messages(shown, "logsumexp")
    assert_messages([message for _, message in records], "topk")
