"""The README says only what is so: its code runs, its tables are the committed results, its make targets exist."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
import torch

import gmmkeops as gk

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


RESULTS = ROOT / "bench/results"
sys.path.insert(0, str(ROOT / "bench"))

import how_many  # noqa: E402
import report  # noqa: E402
import starts  # noqa: E402


def test_code_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 8
    # A script is run again in its folder, and a cell of a notebook in its session: both end where they did at first.
    first: dict = {}
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), first)
    for block in blocks:
        for _ in range(2 if "checkpoint=" in block else 1):
            exec(compile(block, "README.md", "exec"), scope)
    assert torch.equal(first["result"].mixture.means, scope["result"].mixture.means)
    assert first["result"].objective == scope["result"].objective
    said = capsys.readouterr().out
    assert "of 8 components active" in said
    assert "100 draws by Gibbs sampling in 2 chains" in said
    assert matplotlib.image.imread(tmp_path / "mixture.png")[..., :3].std() > 0.05
    assert (tmp_path / "model.safetensors").exists()
    assert scope["quick"].objective - scope["result"].objective < 1e-2
    # Then the shell commands of the section on big data, as they stand there.
    shell = re.search(r"```sh\n(gmmkeops fit.*?)```", README, re.S)[1].strip().splitlines()
    assert len(shell) == 4
    for line in [*shell, shell[0]]:
        words = shlex.split(line)
        program = {"gmmkeops": ["gmmkeops.cli"], "torchrun": ["torch.distributed.run", "--standalone"]}[words[0]]
        command = [sys.executable, "-m", *program, *words[1:]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    one, ranks = (scope["gk"].load(tmp_path / name) for name in ("scan.safetensors", "ranks.safetensors"))
    assert float((one.means - ranks.means).abs().max()) < 1e-6
    assert (tmp_path / "scan.ply").read_bytes().startswith(b"ply")


def recipe(name, scope):
    text = (ROOT / "gallery/recipes.md").read_text()
    block = re.search(rf"## {name}.*?```python\n(.*?)```", text, re.S)[1]
    exec(compile(block, "recipes.md", "exec"), scope)
    return scope


def test_the_dask_recipe_runs():
    pytest.importorskip("dask.array")
    scope = recipe("Dask", {})
    expected = gk.fit(scope["start"], scope["points"].compute(), gk.EM(tol=0), max_iter=10)
    assert float((scope["mixture"].means - expected.mixture.means).abs().max()) < 1e-6


class Ray(types.ModuleType):
    """As much of Ray as its recipe uses, in this process."""

    remote = staticmethod(lambda function: types.SimpleNamespace(remote=function))
    put = staticmethod(lambda value: value)
    get = staticmethod(list)


class Spark:
    """As much of a Spark session and of a data frame as the recipe uses."""

    def __init__(self, partitions):
        self.partitions, self.sparkContext, self.rdd = partitions, self, self

    def broadcast(self, value):
        return types.SimpleNamespace(value=value)

    def mapPartitions(self, function):
        return Spark([found for part in self.partitions for found in function(iter(part))])

    def reduce(self, both):
        return functools.reduce(both, self.partitions)


@pytest.mark.parametrize("name", ["Ray", "Spark"])
def test_recipes_run_on_stand_ins(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", Ray("ray"))
    x = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0)).double()
    start, parts = gk.initialize(x, 4), x.numpy().reshape(3, 1000, 3)
    scope = recipe(name, {"mixture": start, "partitions": parts, "points": Spark(parts), "spark": Spark(parts)})
    expected = gk.fit(start, x, gk.EM(tol=0), max_iter=10)
    assert float((scope["mixture"].means - expected.mixture.means).abs().max()) < 1e-6


def test_tables_are_the_committed_results():
    record = json.loads((RESULTS / "cpu.json").read_text())
    between = README.split(report.MARKS[0])[1].split(report.MARKS[1])[0]
    assert between.strip() == report.readme(record).strip()
    assert (RESULTS / "report.md").read_text().startswith("\n".join(report.markdown(record)).rstrip()[:2000])


def test_the_tables_of_how_to_choose_are_the_committed_results():
    record = json.loads((RESULTS / "choose.json").read_text())
    assert (RESULTS / "choose.md").read_text() == report.choices(record)
    for part in ("methods", "covariances", "engines", "truncations"):
        assert f"<!-- end of {part} -->" in (ROOT / "gallery/choose.md").read_text()
    for row in record["truncations"]:
        assert 0 <= row["lost"] <= row["certificate"] <= 1.01e-2


def test_the_table_of_numbers_of_components_is_the_committed_result():
    record = json.loads((RESULTS / "how_many.json").read_text())
    assert (RESULTS / "how_many.md").read_text() == how_many.page(record)
    assert "<!-- end of numbers -->" in (ROOT / "gallery/choose.md").read_text()


def test_the_tables_of_initial_mixtures_are_the_committed_results():
    record = json.loads((RESULTS / "starts.json").read_text())
    between = README.split(starts.MARKS[0])[1].split(starts.MARKS[1])[0]
    assert between.strip() == starts.overview(record)
    assert (RESULTS / "starts.md").read_text() == starts.page(record)
    page = (ROOT / "gallery/choose.md").read_text()
    assert all(mark in page for mark in starts.MARKS)
    assert matplotlib.image.imread(RESULTS / "starts.png")[..., :3].std() > 0.02
    found = starts.summaries(record)
    assert set(found) == set(starts.SETS)
    synthetic = (
        "8 clusters and noise",
        "20 overlapping clusters",
        "30 unequal clusters",
        "50 clusters",
        "noisy curves",
    )
    gains = {name: found[name]["auto"]["gain"] - found[name]["kmeans"]["gain"] for name in found}
    # The sentences of the README and of the page "How to choose".
    assert sorted(0.015 < gains[name] < 0.155 for name in synthetic) == [False, True, True, True, True]
    real = {"breast cancer": 0.02, "digits": 0.03, "iris": -0.08, "wine": -0.48}
    assert {name: round(gains[name], 2) for name in found if name not in synthetic} == real
    times = sorted(row["auto"]["cpu"] for row in found.values())
    assert [round(times[i], 2) for i in (0, 5, 6, -1)] == [0.05, 0.5, 0.7, 0.99]
    few = {"iris", "wine", "digits", "30 unequal clusters", "50 clusters"}
    assert {name for name in found if found[name][starts.PRIOR]["gain"] > found[name]["auto"]["gain"] + 1e-3} == few


def test_committed_results_agree_among_peers():
    record = json.loads((RESULTS / "cpu.json").read_text())
    assert {"exp_per_s", "float64_flops", "float32_flops"} <= set(record["roofline"])
    for case, rows in report.by_case([row for row in record["rows"] if row["kind"] == "em"]).items():
        found = {row["peer"]: row["log_likelihood"] for row in rows if "log_likelihood" in row}
        ours = {peer: value for peer, value in found.items() if peer.startswith("gmmkeops")}
        assert max(ours.values()) - min(ours.values()) < 2e-4, case
        if "scikit-learn" in found:
            assert found["scikit-learn"] == pytest.approx(next(iter(ours.values())), abs=1e-4), case
    for row in record["rows"]:
        if row.get("pairs", 1) < 1:
            assert 0 <= row["certificate"] <= 1.01e-4
    losses = [row for row in record["rows"] if "loss" in row]
    for case, rows in report.by_case(losses).items():
        values = [row["loss"] for row in rows]
        assert max(values) - min(values) < 1e-4 * max(1.0, abs(values[0])), case


def test_pictures_are_there():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert matplotlib.image.imread(ROOT / name)[..., :3].std() > 0.02


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([\w-]+)", README)) <= targets


def test_the_oldest_python_is_the_same_everywhere():
    """The pinned versions decide it: the newest numpy that they name needs this one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    least = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["ruff"]["target-version"] == "py" + least.replace(".", "")
    assert f"Programming Language :: Python :: {least}" in project["project"]["classifiers"]
    for page in ("README.md", "gallery/index.md"):
        assert set(re.findall(r"Python (3\.\d+) or later", (ROOT / page).read_text())) == {least}, page
    assert f"Python {least} or later" in (ROOT / "constraints.txt").read_text()
    for name in ("numpy", "scipy", "scikit-learn", "matplotlib"):
        needs = importlib.metadata.metadata(name)["Requires-Python"]
        (bound,) = re.findall(r">=\s*(3\.\d+)", needs)
        assert tuple(map(int, bound.split("."))) <= tuple(map(int, least.split("."))), (name, needs)


def test_the_pinned_torch_is_the_one_that_the_readme_names():
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    named = re.findall(r"torch==(\S+) --index-url", README + (ROOT / "constraints.txt").read_text())
    assert named == [pinned, pinned]
