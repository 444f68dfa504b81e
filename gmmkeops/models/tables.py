"""HTML tables of mixtures and results for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gmmkeops.models.mixture import Mixture

__all__ = ["html_table", "mixture_table"]

# Maximum numbers of components and of columns in the table of a mixture.
_COMPONENTS, _COLUMNS = 10, 8


def html_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], bold: int | None = None) -> str:
    """Format a table as HTML.

    Args:
        caption: Caption, one line.
        header: Names of the columns.
        rows: Texts of the cells, row by row.
        bold: Index of a row that is printed in bold, or None.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(cells, "th" if number == bold else "td") for number, cells in enumerate(rows))
    return f"<table><caption>{html.escape(caption)}</caption><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def mixture_table(mixture: Mixture) -> str:
    """Format weights, means and standard deviations of the components with the largest weights as an HTML table.

    A batch of mixtures is shown by its one-line representation.
    """
    if mixture.batch_shape:
        return f"<code>{html.escape(repr(mixture))}</code>"
    K, D = mixture.n_components, mixture.n_features
    with torch.no_grad():
        weights = mixture.weights.double()
        # The selected components stay in the order of the mixture; among equal weights, the first ones are selected.
        shown = weights.sort(descending=True, stable=True).indices[:_COMPONENTS].sort().values
        means = mixture.means[shown].double()
        factor = mixture.factor.select(shown)
        deviations = factor.covariances().diagonal(dim1=-2, dim2=-1).double().sqrt().expand(len(shown), D)
    names = list(mixture.columns or map(str, range(D)))[:_COLUMNS]
    more = ["…"] if D > _COLUMNS else []
    header = ["component", "weight", *(f"mean {name}" for name in names), *more]
    header += [*(f"std {name}" for name in names), *more]
    rows = []
    for k, weight, mean, deviation in zip(
        shown.tolist(), weights[shown].tolist(), means.tolist(), deviations.tolist(), strict=True
    ):
        cells = [str(k), f"{weight:.4g}", *(f"{value:.5g}" for value in mean[:_COLUMNS]), *more]
        rows.append([*cells, *(f"{value:.4g}" for value in deviation[:_COLUMNS]), *more])
    note = f"; the {_COMPONENTS} components with the largest weights" if K > _COMPONENTS else ""
    return html_table(repr(mixture) + note, header, rows)
