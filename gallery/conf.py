"""Configuration of the documentation: pages from this folder, examples from ``scripts``, the reference from docstrings."""

import os
import re
import sys
from pathlib import Path

import gmmkeops

sys.path.insert(0, str(Path(__file__).parent))

import look

os.environ.setdefault("OMP_NUM_THREADS", "2")

project = "gmmkeops"
author = "the gmmkeops founders"
version = release = gmmkeops.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
    "sphinxcontrib.bibtex",
]
root_doc = "index"
templates_path = ["_templates"]
exclude_patterns = ["scripts", "auto/**/*.ipynb", "recipes.md"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "amsmath"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "pydata_sphinx_theme"
html_title = "gmmkeops"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
toc_object_entries_show_parents = "hide"
html_context = {"default_mode": "auto"}
html_theme_options = {
    "show_prev_next": False,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 6,
}
html_sidebars = {
    page: []
    for page in (
        "index",
        "choose",
        "mathematics",
        "big_data",
        "gpus",
        "performance",
        "errors",
        "changes",
        "contributing",
    )
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "scripts",
    "gallery_dirs": "auto",
    "filename_pattern": r"plot_",
    "download_all_examples": False,
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": ("matplotlib", "look.dress"),
    "image_scrapers": ("look.scrape",),
    "thumbnail_size": (400, 280),
    "capture_repr": (),
}
suppress_warnings = ["config.cache"]

# Shapes such as (*B, K), determinants such as |U| and attributes such as means_ are plain text in docstrings, markup in
# reStructuredText.
_KEPT = re.compile(r"(``.*?``|:[\w:]+:`.*?`|`[^`]+`__?)")
_MARKS = (
    (re.compile(r"\*(?=[A-Z][,)])"), r"\\*"),
    (re.compile(r"\|"), r"\\|"),
    (re.compile(r"(\w)_(?!\w)"), r"\1\\_"),
)


def escape(app, what, name, obj, options, lines):
    """Escape markup in the plain text of a docstring, but not in formulas, literals, roles and examples."""
    formula, example = None, False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if formula is not None and line.strip() and indent <= formula:
            formula = None
        if line.strip().startswith(".. math::"):
            formula = indent
        example = bool(line.strip()) and (example or line.strip().startswith(">>>"))
        if formula is not None or example:
            continue
        parts = _KEPT.split(line)
        for place in range(0, len(parts), 2):
            for mark, plain in _MARKS:
                parts[place] = mark.sub(plain, parts[place])
        lines[number] = "".join(parts)


def setup(app):
    # Called after the scripts have run.
    app.connect("builder-inited", look.hang, priority=900)
    app.connect("autodoc-process-docstring", escape, priority=100)
