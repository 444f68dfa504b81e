"""The look of the gallery's figures, and what each must have: units on every axis, colours that can be told apart.

A script's picture in the gallery is the last panel of its first figure.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from colorspacious import cspace_convert
from matplotlib.colors import to_rgb
from PIL import Image, ImageOps
from sphinx_gallery.scrapers import matplotlib_scraper

# What has no unit: counts, probabilities, and the sides of made clouds.
NUMBERS = (
    "iteration",
    "components",
    "passes over the file",
    "pixels",
    "points",
    "probability",
    "share",
    "weight",
    "relative",
)
# Differences in CAM02-UCS below which two colours look alike side by side, for everyone and for the colour-blind.
ALIKE = 10.0
SIGHTS = (None, "deuteranomaly", "protanomaly", "tritanomaly")


def dress(gallery_conf: Any = None, name: Any = None) -> None:
    """Puts on the gallery's style."""
    plt.style.use(Path(__file__).with_name("gallery.mplstyle"))


# Of each script that has run: the pattern of its pictures' names, and its thumbnail.
thumbnails: dict[Path, np.ndarray] = {}


def scrape(block: Any, variables: Any, gallery_conf: Any) -> str:
    """Saves the figures of a cell for its page, once they have been checked."""
    pattern = Path(str(variables["image_path_iterator"].image_path))
    for number in plt.get_fignums():
        figure = plt.figure(number)
        check(figure)
        thumbnails.setdefault(pattern, panel(figure, *gallery_conf["thumbnail_size"]))
    return matplotlib_scraper(block, variables, gallery_conf)


def panel(figure: Any, width: int, height: int) -> np.ndarray:
    """The last large axes of a figure in a window of this shape (height, width, 3)."""
    boxes = [ax.get_window_extent() for ax in figure.axes]
    box = [box for box in boxes if box.width * box.height > 0.5 * max(b.width * b.height for b in boxes)][-1]
    picture = np.asarray(figure.canvas.buffer_rgba())
    # As large as the axes fill in one direction, about their middle.
    side = max(box.width / width, box.height / height)
    x, y = (box.x0 + box.x1) / 2, len(picture) - (box.y0 + box.y1) / 2
    rows, columns = (
        slice(max(0, round(middle - side * size / 2)), round(middle + side * size / 2))
        for middle, size in ((y, height), (x, width))
    )
    image = Image.fromarray(picture[rows, columns]).convert("RGB")
    return np.asarray(ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="white"))


def hang(app: Any) -> None:
    """Puts the panels in the place of the thumbnails of whole figures."""
    for pattern, pixels in thumbnails.items():
        name = pattern.name.rpartition("_")[0]
        Image.fromarray(pixels).save(pattern.parent / "thumb" / f"{name}_thumb.png")


def check(figure: Any) -> None:
    """Raises what is wrong with a figure."""
    figure.canvas.draw()
    for ax in figure.axes:
        where = f"the axes titled {ax.get_title()!r}"
        for name in _axes(ax):
            label = getattr(ax, f"get_{name}label")()
            if not re.search(r"\(.+\)|lower is better", label) and not any(word in label for word in NUMBERS):
                raise ValueError(f"{where}: the label {label!r} of {name} names no unit.")
        legend = ax.get_legend()
        shown = legend.legend_handles if legend else []
        for one, other in itertools.combinations(shown, 2):
            a, b = _look(one), _look(other)
            if a[1:] == b[1:] and min(_differences(a[0], b[0])) < ALIKE:
                raise ValueError(f"{where}: {one.get_label()!r} and {other.get_label()!r} look alike to some.")


def _axes(ax: Any) -> list[str]:
    """The axes that have numbers on them."""
    if not ax.axison:
        return []
    names = [name for name in "xyz" if hasattr(ax, f"get_{name}ticklabels")]
    return [
        name
        for name in names
        if any(tick.get_visible() and tick.get_text() for tick in getattr(ax, f"get_{name}ticklabels")())
    ]


def _look(handle: Any) -> tuple[tuple[float, float, float], Any, Any]:
    """Colour, marker and line style of what a legend shows."""
    if hasattr(handle, "get_marker"):
        return to_rgb(handle.get_color()), handle.get_marker(), handle.get_linestyle()
    faces, edges = (np.atleast_2d(colours) for colours in (handle.get_facecolor(), handle.get_edgecolor()))
    return tuple((faces if faces.size else edges)[0][:3]), None, type(handle).__name__


def _differences(one: tuple[float, ...], other: tuple[float, ...]) -> list[float]:
    """How different two colours look to each kind of sight."""
    return [float(np.linalg.norm(_seen(one, sight) - _seen(other, sight))) for sight in SIGHTS]


def _seen(colour: tuple[float, ...], sight: str | None) -> np.ndarray:
    space: Any = "sRGB1" if sight is None else {"name": "sRGB1+CVD", "cvd_type": sight, "severity": 100}
    return cspace_convert(np.clip(cspace_convert(colour, space, "sRGB1"), 0, 1), "sRGB1", "CAM02-UCS")
