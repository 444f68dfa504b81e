"""The pages: their code runs, every public name is in the reference, and the built site holds in a real browser."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import types
from pathlib import Path

import matplotlib
import pytest

import gmmkeops as gk

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "gallery").glob("*.md"))
SITE = ROOT / "build/site"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODULES = ("bayes", "compare", "distributed", "export", "penalties", "plotting", "reductions", "selection")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "recipes.md"], ids=lambda page: page.stem)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """Those of a page one after the other, in an empty folder; shell lines name commands that exist."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    scope: dict = {}
    text = page.read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, page.name, "exec"), scope)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.strip().splitlines():
            words = line.split("#")[0].split()
            assert words[0] in ("gmmkeops", "make", "pip", "torchrun"), line
            if words[0] == "make":
                assert set(words[1:]) <= targets, line


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "gallery/api.md").read_text()
    listed = set(re.findall(r"^   (\w+)$", text, re.M))
    names = {name for name in gk.__all__ if not isinstance(getattr(gk, name), types.ModuleType)}
    for module in MODULES:
        found = importlib.import_module(f"gmmkeops.{module}")
        names |= {name for name in found.__all__ if not isinstance(getattr(found, name), (tuple, types.ModuleType))}
    assert listed == names


def test_links_between_pages_lead_somewhere():
    scripts = {f"auto/{path.parent.name}/{path.stem}" for path in (ROOT / "gallery/scripts").glob("*/plot_*.py")}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
            if not target.startswith("http"):
                assert target in scripts or (ROOT / "gallery" / target).exists(), (page.name, target)


def opened(page, width, tmp_path):
    """What a browser makes of a built page: its text after scripts have run, what it logged, and a picture."""
    picture = tmp_path / f"{re.sub(r'[^a-z]', '-', page)}{width}.png"
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600", "--virtual-time-budget=8000"]
    path, _, query = page.partition("?")
    url = (SITE / path).as_uri() + (f"?{query}" if query else "")
    dumped = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    subprocess.run([*command, f"--screenshot={picture}", url], capture_output=True, timeout=120, check=True)
    logged = [line for line in dumped.stderr.splitlines() if "CONSOLE" in line and ("rror" in line or "WARN" in line)]
    return dumped.stdout, logged, matplotlib.image.imread(picture)


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built; run make gallery")
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1400])
def test_the_built_site_holds_in_a_browser(width, tmp_path):
    import matplotlib.image  # noqa: F401

    for page in ("index.html", "choose.html", "mathematics.html", "auto/index.html", "generated/gmmkeops.EM.html"):
        text, logged, picture = opened(page, width, tmp_path)
        assert not logged, (page, logged)
        assert "gmmkeops" in text
        assert picture[..., :3].std() > 0.03
    found, _, _ = opened("search.html?q=SqrtWeights", width, tmp_path)
    assert found.count("SqrtWeights") > 3
