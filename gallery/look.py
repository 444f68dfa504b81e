"""Style and checks of the figures of the gallery: units on every axis, and distinguishable colors.

The thumbnail of a script is the last panel of its first figure.
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

# Words in labels of axes without a unit: counts and probabilities.
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
# Distance in CAM02-UCS below which two colors are hard to distinguish, and the kinds of color vision that are tested.
ALIKE = 10.0
SIGHTS = (None, "deuteranomaly", "protanomaly", "tritanomaly")


def dress(gallery_conf: Any = None, name: Any = None) -> None:
    """Apply the style of the gallery."""
    plt.style.use(Path(__file__).with_name("gallery.mplstyle"))


# Thumbnail of each script that has run, by the pattern of its file names.
thumbnails: dict[Path, np.ndarray] = {}


def scrape(block: Any, variables: Any, gallery_conf: Any) -> str:
    """Check the figures of a cell, and save them for its page."""
    pattern = Path(str(variables["image_path_iterator"].image_path))
    for number in plt.get_fignums():
        figure = plt.figure(number)
        check(figure)
        thumbnails.setdefault(pattern, panel(figure, *gallery_conf["thumbnail_size"]))
    return matplotlib_scraper(block, variables, gallery_conf)


def panel(figure: Any, width: int, height: int) -> np.ndarray:
    """Render the last large axes of a figure as an image (height, width, 3)."""
    boxes = [ax.get_window_extent() for ax in figure.axes]
    box = [box for box in boxes if box.width * box.height > 0.5 * max(b.width * b.height for b in boxes)][-1]
    picture = np.asarray(figure.canvas.buffer_rgba())
    # The image is centered at the axes, which fill it in one direction.
    side = max(box.width / width, box.height / height)
    x, y = (box.x0 + box.x1) / 2, len(picture) - (box.y0 + box.y1) / 2
    rows, columns = (
        slice(max(0, round(middle - side * size / 2)), round(middle + side * size / 2))
        for middle, size in ((y, height), (x, width))
    )
    image = Image.fromarray(picture[rows, columns]).convert("RGB")
    return np.asarray(ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="white"))


def hang(app: Any) -> None:
    """Replace the thumbnails of whole figures by those of single panels."""
    for pattern, pixels in thumbnails.items():
        name = pattern.name.rpartition("_")[0]
        Image.fromarray(pixels).save(pattern.parent / "thumb" / f"{name}_thumb.png")


def check(figure: Any) -> None:
    """Raise a ValueError if a label has no unit, or if two legend entries have similar colors."""
    figure.canvas.draw()
    for ax in figure.axes:
        where = f"the axes titled {ax.get_title()!r}"
        for name in _axes(ax):
            label = getattr(ax, f"get_{name}label")()
            if not re.search(r"\(.+\)|lower is better", label) and not any(word in label for word in NUMBERS):
                raise ValueError(f"{where}: the label {label!r} of {name} has no unit.")
        legend = ax.get_legend()
        shown = legend.legend_handles if legend else []
        for one, other in itertools.combinations(shown, 2):
            a, b = _look(one), _look(other)
            if a[1:] == b[1:] and min(_differences(a[0], b[0])) < ALIKE:
                raise ValueError(f"{where}: {one.get_label()!r} and {other.get_label()!r} look alike to some.")


def _axes(ax: Any) -> list[str]:
    """Return the names of the axes with tick labels."""
    if not ax.axison:
        return []
    names = [name for name in "xyz" if hasattr(ax, f"get_{name}ticklabels")]
    return [
        name
        for name in names
        if any(tick.get_visible() and tick.get_text() for tick in getattr(ax, f"get_{name}ticklabels")())
    ]


def _look(handle: Any) -> tuple[tuple[float, float, float], Any, Any]:
    """Return color, marker and line style of a legend entry."""
    if hasattr(handle, "get_marker"):
        return to_rgb(handle.get_color()), handle.get_marker(), handle.get_linestyle()
    faces, edges = (np.atleast_2d(colors) for colors in (handle.get_facecolor(), handle.get_edgecolor()))
    return tuple((faces if faces.size else edges)[0][:3]), None, type(handle).__name__


def _differences(one: tuple[float, ...], other: tuple[float, ...]) -> list[float]:
    """Return the distance of two colors for each kind of color vision."""
    return [float(np.linalg.norm(_seen(one, sight) - _seen(other, sight))) for sight in SIGHTS]


def _seen(color: tuple[float, ...], sight: str | None) -> np.ndarray:
    space: Any = "sRGB1" if sight is None else {"name": "sRGB1+CVD", "cvd_type": sight, "severity": 100}
    return cspace_convert(np.clip(cspace_convert(color, space, "sRGB1"), 0, 1), "sRGB1", "CAM02-UCS")
