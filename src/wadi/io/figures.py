"""One look for every figure: told apart without colour, and each with its data beside it.

Colours are Okabe and Ito's, which colour-blind readers tell apart, in an order of clearly different lightness; lines differ in
dashes as well, points in marker, bars in hatching, so that a grey print loses nothing. `save` writes what is drawn as SVG and
PNG and what it was drawn from as CSV, under one name.
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
    """How one series is drawn, whatever it is drawn as."""

    colour: str
    marker: str
    dashes: Any  # a line style as matplotlib takes it
    hatch: str


# Dark and light alternate: neighbours differ in lightness, not only in hue.
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
    "text.parse_math": False,  # a dollar in a name is a dollar
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
    "svg.hashsalt": "wadi",  # the same figure is the same file
}


def look(index: int) -> Look:
    """The look of series ``index``; past the last they start again."""
    return LOOKS[index % len(LOOKS)]


def styled(draw: F) -> F:
    """A function that draws, in the house style; nothing outside it changes."""

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn  # type: ignore[return-value]


def canvas(
    columns: int = 1, rows: int = 1, width: float = 7.2, height: float = 3.2, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``width x height`` inches and its panels, row by row; no pyplot: nothing global, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    panels: Any = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, list(panels.flat)


def plain_labels(axis: Axis) -> None:
    """Label a logarithmic axis in plain text: matplotlib's own labels are mathematics, which the style does not read."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


@styled
def svg(figure: Figure) -> bytes:
    """A figure as an SVG file; drawn again from the same data it is the same to the byte."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


@styled
def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as a CSV file, columns as in the first row; None and what is not a number are empty."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    return stream.getvalue().encode()


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.6g}" if math.isfinite(value) else None


def save(figure: Figure, folder: Path, name: str, data: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write ``name.svg``, ``name.png`` and ``name.csv``, what the figure was drawn from; returns their paths.

    Raises:
        WadiError: if they cannot be written.
    """
    written = {".svg": svg(figure), ".png": png(figure), ".csv": table(data)}
    for suffix, content in written.items():
        write_whole(folder / f"{name}{suffix}", content)
    return [folder / f"{name}{suffix}" for suffix in written]
