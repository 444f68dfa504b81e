"""The questions of ``make gpu``, in small sizes on a CPU, and their tables and plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import gpu
import gpu_checks
import gpu_times
import report_gpu
from gpu_run import problem

from gmmkeops import reductions

FAMILIES = ["full", "tied_full", "diag", "spherical"]


@pytest.fixture(autouse=True)
def _own(monkeypatch):
    """Engines that need neither a compiler nor an interpreter."""
    names = [name for name in ("native", "dense") if reductions.unavailable(name, torch.zeros(1, 2)) is None]
    monkeypatch.setattr(gpu.Run, "engines", tuple(names))


@pytest.fixture
def run():
    return gpu.Run("cpu", quick=True, until=float("inf"))


@pytest.mark.filterwarnings("ignore:.*did not converge")
def test_all_questions_are_answered(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert list(record["questions"]) == list(gpu.QUESTIONS)
    for name, answer in record["questions"].items():
        assert answer["question"].endswith((".", "?"))
        assert answer["rows"], name
    assert "flash_gmm is missing" in capsys.readouterr().out
    for row in record["questions"]["correctness"]["rows"]:
        assert row["wrong labels"] == row["hard counts"] == 0
        names = ("log-sum-exp", "largest exponents", "S0", "S1", "S2", "total", "hard total")
        assert all(row[name] < 2e-6 for name in names)
        assert row["lists"] or row["point gradient"] < 2e-6

    lines = report_gpu.tables(record)
    assert "## engines" in lines
    head = lines.index("| family | D | N | K | engine | log-sum-exp ms | moments ms | labels ms | auto |")
    first = next(row for row in record["questions"]["engines"]["rows"] if "moments ms" in row)
    assert f"| {first['moments ms']:.3g} |" in lines[head + 2]
    summary = report_gpu.compared(record)
    shown = " / ".join(f"{first[f'{what} ms']:.3g}" for what in ("log-sum-exp", "moments", "labels"))
    assert any(line.startswith(f"| {first['family']}, D = {first['D']} |") and shown in line for line in summary)
    assert report_gpu.plot(record, tmp_path / "gpu.png")
    assert matplotlib.image.imread(tmp_path / "gpu.png").std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrong", ["S0", "S1", "S2", "total", "values", "gradient"])
def test_wrong_results_are_seen(run, family, wrong):
    arguments = problem(run, 500, 5, 3, family)
    g = torch.randn(500, dtype=torch.float64)
    truth = gpu_checks.oracle(arguments, g)
    truth[wrong] = truth[wrong] * (1 + 1e-3)
    found = gpu_checks.errors(arguments, g, truth, {"backend": "dense", "truncate": 0}, arguments[0])
    column = {"values": "log-sum-exp", "gradient": "point gradient"}.get(wrong, wrong)
    assert found[column] > 1e-4
    assert all(found[name] < 2e-6 for name in ("S0", "S1", "S2", "log-sum-exp", "point gradient") if name != column)


def test_a_question_that_fails_keeps_its_rows_and_the_others_are_answered(monkeypatch, tmp_path):
    def half(run):
        """Is this half done?"""
        yield {"value": 1.0}
        raise RuntimeError("no memory\nand more")

    monkeypatch.setattr(gpu, "QUESTIONS", {"half": half, "tiles": gpu_times.tiles})
    path = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--json", str(path)]) == 1
    record = json.loads(path.read_text())
    assert record["questions"]["half"]["rows"] == [{"value": 1.0}]
    assert record["questions"]["half"]["failure"] == "RuntimeError: no memory"
    assert len(record["questions"]["tiles"]["rows"]) == 2
    assert "Failure: RuntimeError: no memory." in report_gpu.tables(record)
    # One question is asked again; the others keep their answers.
    monkeypatch.setitem(gpu.QUESTIONS, "half", lambda run: iter([{"value": 2.0}]))
    assert gpu.main(["--device", "cpu", "--quick", "--only", "half", "--json", str(path)]) == 0
    again = json.loads(path.read_text())
    assert again["questions"]["half"]["rows"] == [{"value": 2.0}]
    assert again["questions"]["tiles"] == record["questions"]["tiles"]


def test_no_question_is_begun_after_the_budget(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--budget", "0", "--only", "tiles", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["questions"]["tiles"]["skipped"] == "no time was left"


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    assert gpu.main(["--device", "cpu"]) == 1
    assert "gmmkeops needs no_such_package" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_sentence_is_printed(capsys):
    assert gpu.main([]) == 1
    assert "torch finds no CUDA device" in capsys.readouterr().out
