"""The README says only what is so: its code runs, its table is the committed result, its make targets exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import matplotlib.image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert "of 8 components live" in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "mixture.png")[..., :3].std() > 0.05


def test_table_is_the_committed_result():
    rows = json.loads((ROOT / "bench/results/tutorial.json").read_text())["rows"]
    for row in rows:
        seconds = row["seconds"]
        points = f"{row['N']:,}".replace(",", " ")
        line = (
            f"| {points} | {row['K']} | {row['D']} | {seconds['tutorial']:.3f} s | {seconds['module']:.3f} s | "
            f"{seconds['fit']:.3f} s | {row['ratio']:.1f}x |"
        )
        assert line in README


def test_commands_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make (\w+)", README)) <= targets
