"""The pages: their code runs, every public name is in the reference, and the built site holds in a real browser."""

from __future__ import annotations

import base64
import html
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import gmmkeops as gk

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "gallery").glob("*.md"))
SITE = ROOT / "build/site"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODULES = (
    "analysis",
    "bayes",
    "components",
    "data.distributed",
    "export",
    "penalties",
    "plotting",
    "reductions",
)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "recipes.md"], ids=lambda page: page.stem)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """Those of a page one after the other, in a folder that holds a scan; shell lines too, if they do not install or build."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    scope: dict = {}
    text = page.read_text()
    if "scan.laz" in text:
        laspy = pytest.importorskip("laspy")
        scan = laspy.create()
        scan.x, scan.y, scan.z = np.random.default_rng(0).normal(size=(3, 20_000))
        scan.classification = np.arange(20_000) % 3
        scan.write(tmp_path / "scan.laz")
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, page.name, "exec"), scope)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.strip().splitlines():
            words = line.split("#")[0].split()
            assert words[0] in ("gmmkeops", "make", "pip", "torchrun"), line
            if words[0] == "make":
                assert set(words[1:]) <= targets, line
            programs = {"gmmkeops": ["gmmkeops.cli"], "torchrun": ["torch.distributed.run", "--standalone"]}
            # Other tests time the engines.
            if words[0] in programs and not {"--nnodes", "--measure"} & set(words):
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-m", *programs[words[0]], *words[1:]]
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=300, env=environment, check=False
                )
                assert done.returncode == 0, done.stderr


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "gallery/api.md").read_text()
    listed = set(re.findall(r"^   (\w+)$", text, re.M))
    names = {name for name in gk.__all__ if not isinstance(getattr(gk, name), types.ModuleType)}
    for module in MODULES:
        found = importlib.import_module(f"gmmkeops.{module}")
        names |= {name for name in found.__all__ if not isinstance(getattr(found, name), (tuple, types.ModuleType))}
    assert listed == names


def public():
    """Every public name and what it stands for."""
    for module in ("gmmkeops", *(f"gmmkeops.{name}" for name in MODULES)):
        found = importlib.import_module(module)
        for name in found.__all__:
            value = getattr(found, name)
            if not isinstance(value, (tuple, types.ModuleType)):
                yield pytest.param(value, id=f"{module}.{name}".removeprefix("gmmkeops."))


@pytest.mark.parametrize("value", list(public()))
def test_every_public_name_is_explained(value):
    """An example that doctest runs; every argument, and what raises; by the class itself or by its methods."""
    own = inspect.getdoc(value) or ""
    methods = (
        [member for name, member in vars(value).items() if not name.startswith("_")] if isinstance(value, type) else []
    )
    texts = [own, *(inspect.getdoc(getattr(member, "__func__", member)) or "" for member in methods)]
    assert any(">>>" in text for text in texts), "no example"
    if inspect.isfunction(value):
        explained = "As for" in own or "as for" in own
        for name in inspect.signature(value).parameters:
            assert explained or re.search(rf"\b{name}\b", own), f"{name} is not explained"


def test_links_between_pages_lead_somewhere():
    scripts = {f"auto/{path.parent.name}/{path.stem}" for path in (ROOT / "gallery/scripts").glob("*/plot_*.py")}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
            if not target.startswith("http"):
                assert target in scripts or (ROOT / "gallery" / target).exists(), (page.name, target)


class Links(HTMLParser):
    """What a built page points at, and what in it can be pointed at."""

    def __init__(self, path):
        super().__init__()
        self.targets, self.names = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value and tag in ("a", "img", "link", "script"):
                self.targets.add(value)
            if name in ("id", "name") and value:
                self.names.add(value)


@pytest.fixture(scope="module")
def site():
    if not (SITE / "index.html").exists():
        pytest.fail("the site is not built; run make gallery")
    return sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)


@pytest.mark.gallery
def test_links_and_images_of_the_built_site(site):
    pages = {path.resolve(): Links(path) for path in site}
    wrong = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (parts.fragment and file in pages and parts.fragment not in pages[file].names):
                wrong.append(f"{path.relative_to(SITE.resolve())}: {target}")
    assert not wrong, wrong[:20]


@pytest.mark.gallery
@pytest.mark.parametrize(
    "says",
    [r"gmmkeops fit \S+\.laz", r"penalty=gk\.penalties", r"truncate=.*s per iteration", r"torchrun --nnodes 2"],
    ids=["laz", "penalty", "truncation", "two machines"],
)
def test_two_clicks_from_the_start_page(site, says):
    """What a reader looks for first is on the start page, or on a page that it links to."""
    start = SITE / "index.html"
    near = [start] + [SITE / urllib.parse.urlsplit(target).path for target in Links(start).targets]
    pages = [path for path in near if path.suffix == ".html" and path.exists()]
    texts = [html.unescape(re.sub(r"<[^>]+>", "", path.read_text())) for path in pages]
    assert any(re.search(says, text, re.S) for text in texts)


# Opens pages one after the other in a frame of some width, and writes down what it sees.
LOOK = """<!doctype html><meta charset="utf-8"><iframe id="frame" style="width:%dpx;height:1600px;border:0"></iframe>
<pre id="said"></pre><script>
const frame = document.getElementById("frame"), said = {};
// What may be wider than the page, since it scrolls by itself.
const SCROLLS = "pre, .highlight, .math, .pst-scrollable-table-container";
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function main() {
  for (const page of %s) {
    const loaded = new Promise((done) => (frame.onload = done));
    frame.src = page;
    await loaded;
    await wait(page.includes("search") ? 4000 : 400);
    const root = frame.contentDocument.documentElement;
    said[page] = {
      wide: Math.max(root.scrollWidth, ...[...root.querySelectorAll("main *")]
        .filter((part) => !part.closest(SCROLLS) && part.getBoundingClientRect().width)
        .map((part) => Math.floor(part.getBoundingClientRect().right))),
      text: frame.contentDocument.body.innerText,
      plain: [...root.querySelectorAll(".math")].filter((math) => !math.querySelector("mjx-container")).length,
    };
  }
  document.getElementById("said").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(said))));
}
main();
</script>"""


@pytest.fixture(params=[390, 1400], scope="module")
def seen(request, site, tmp_path_factory):
    """What a browser of a phone's or a desk's width makes of all pages, and what it logs on the way."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    folder = tmp_path_factory.mktemp("browser")
    pages = [path.as_uri() for path in site if path.name not in ("genindex.html", "py-modindex.html")]
    pages.append((SITE / "search.html").as_uri() + "?q=SqrtWeights")
    (folder / "look.html").write_text(LOOK % (request.param, json.dumps(pages)))
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-web-security",
        "--allow-file-access-from-files",
    ]
    flags += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=1600,1800"]
    flags += ["--virtual-time-budget=600000", "--dump-dom"]
    address = (folder / "look.html").as_uri()
    done = subprocess.run([BROWSER, *flags, address], capture_output=True, text=True, timeout=500, check=False)
    coded = re.search(r'<pre id="said">([^<]+)</pre>', done.stdout)
    assert coded, done.stderr[-2000:]
    # The theme tells which mode it has chosen.
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "[PST]" not in line]
    return request.param, json.loads(base64.b64decode(coded[1])), logged


@pytest.mark.gallery
def test_every_page_in_a_browser(seen):
    width, pages, logged = seen
    assert len(pages) > 100
    assert not logged, logged[:5]
    for page, what in pages.items():
        assert "gmmkeops" in what["text"], page
        assert what["wide"] <= width, (page, what["wide"])
        assert what["plain"] == 0, (page, "formulas that are not typeset")


@pytest.mark.gallery
def test_search_finds_names(seen):
    _, pages, _ = seen
    (found,) = [what["text"] for page, what in pages.items() if "search.html?" in page]
    assert found.count("SqrtWeights") > 3
