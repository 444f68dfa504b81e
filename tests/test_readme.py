"""The README says only what is so: its code runs, its tables are the committed results, its make targets exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def rows(name):
    return json.loads((ROOT / "bench/results" / name).read_text())["rows"]


def test_code_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert "of 8 components live" in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "mixture.png")[..., :3].std() > 0.05
    assert (tmp_path / "model.safetensors").exists()


def test_table_against_the_tutorial_is_the_committed_result():
    for row in rows("tutorial.json"):
        seconds = row["seconds"]
        points = f"{row['N']:,}".replace(",", " ")
        line = (
            f"| {points} | {row['K']} | {row['D']} | {seconds['tutorial']:.3f} s | {seconds['module']:.3f} s | "
            f"{seconds['fit']:.3f} s | {row['ratio']:.1f}x |"
        )
        assert line in README


def test_tables_against_peers_are_the_committed_results():
    results = rows("em.json")
    for case in {row["case"] for row in results}:
        peers = {row["peer"]: row for row in results if row["case"] == case}
        ours, sk, tg = (peers[name] for name in ("gmmkeops", "scikit-learn", "tgmm"))
        line = (
            f"| {case} | {ours['seconds']:.3f} s | {sk['seconds']:.3f} s ({sk['ratio']:.1f}x) | "
            f"{tg['seconds']:.3f} s ({tg['ratio']:.1f}x) | "
            f"{ours['peak_MB']:.0f} / {sk['peak_MB']:.0f} / {tg['peak_MB']:.0f} MB |"
        )
        assert line in README
        assert ours["log_likelihood"] == pytest.approx(sk["log_likelihood"], abs=1e-4)
    for row in rows("fit.json"):
        assert (
            f"| {row['peer']} | {row['seconds']:.1f} s | {row['ratio']:.1f}x | {row['log_likelihood']:.4f} |" in README
        )


def test_commands_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make (\w+)", README)) <= targets
