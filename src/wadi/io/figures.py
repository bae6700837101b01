"""One style for all figures, readable without colours, and each figure saved with its data.

The colours are Okabe and Ito's, which colour-blind readers can distinguish, ordered so that neighbours differ in lightness.
Lines also differ in dashes, points in their marker and bars in hatching, so a grey print shows everything. `save_figure` writes
a figure as SVG and PNG, and its data as CSV.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from wadi.io.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

F = TypeVar("F", bound=Callable[..., Any])


class Look(NamedTuple):
    """The style of one series, as a line, as points or as bars."""

    colour: str
    marker: str
    dashes: Any  # a matplotlib line style
    hatch: str


# Dark and light alternate, so that neighbours differ in lightness, not only in hue.
LOOKS = (
    Look("#0072B2", "o", "-", ""),
    Look("#E69F00", "^", "--", "//"),
    Look("#000000", "s", ":", ".."),
    Look("#CC79A7", "<", (0, (3, 1)), "--"),
    Look("#56B4E9", "D", "-.", "\\\\"),
    Look("#D55E00", "v", (0, (5, 1, 1, 1, 1, 1)), "xx"),
    Look("#F0E442", "P", (0, (1, 3)), "++"),
    Look("#009E73", "X", (0, (8, 2)), "oo"),
)
INK, FAINT = "#222222", "#999999"
DPI = 110

STYLE: Any = {  # matplotlib's rcParams
    "text.parse_math": False,  # names may contain dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "wadi",  # so that the same figure gives the same file
}


def look(index: int) -> Look:
    """Return the look of series ``index``. After the last look they start again."""
    return LOOKS[index % len(LOOKS)]


def styled(draw: F) -> F:
    """Decorate a function that draws: it runs in our style, and matplotlib's settings are the same afterwards."""

    @wraps(draw)
    def draw_in_style(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_in_style  # type: ignore[return-value]


def canvas(
    columns: int = 1, rows: int = 1, width: float = 7.2, height: float = 3.2, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``width x height`` inches and its panels, row by row. It uses no pyplot, so it needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    panels: Any = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, list(panels.flat)


def plain_labels(axis: Axis) -> None:
    """Label a logarithmic axis in plain text. matplotlib's own labels are formulas, which our style does not render."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


@styled
def figure_svg(figure: Figure) -> bytes:
    """Return a figure as an SVG file. The same figure always gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


@styled
def figure_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def csv_table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as a CSV file, with the columns of the first row. None, NaN and infinity become empty cells."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    return stream.getvalue().encode()


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.6g}" if math.isfinite(value) else None


def save_figure(figure: Figure, folder: Path, name: str, data: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write ``name.svg``, ``name.png`` and the figure's data ``name.csv``. Return their paths.

    Raises:
        WadiError: if they cannot be written.
    """
    contents = {".svg": figure_svg(figure), ".png": figure_png(figure), ".csv": csv_table(data)}
    for suffix, content in contents.items():
        write_whole(folder / f"{name}{suffix}", content)
    return [folder / f"{name}{suffix}" for suffix in contents]
