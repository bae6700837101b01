"""Curves of a run's statistics over its steps, as SVG inside the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from wadi.distill.report import html_parts
from wadi.io.figures import canvas, figure_svg, look, plain_labels, styled

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One figure: the statistics it shows and how to read it."""

    title: str
    caption: str
    names: tuple[str, ...]
    logarithmic: bool = False


PLOTS = (
    Plot(
        "Losses",
        "The student's loss says nothing about quality. The fake model's loss should fall, then stay.",
        ("loss_student", "loss_fake"),
        logarithmic=True,
    ),
    Plot(
        "Teacher-fake distance by quarter of the schedule",
        "Distance of the images that teacher and fake model predict. Where it stops falling, more steps change little.",
        tuple(f"teacher_fake_distance_q{i}" for i in range(1, 5)),
    ),
    Plot("Angles, RMS (rad)", "Steady growth that slows down is healthy.", ("student_angle_rms", "fake_angle_rms")),
    Plot(
        "Direction change of the weights",
        "1 - cosine between a row of the teacher's weight and the adapted one, mean over rows and layers.",
        ("student_direction_change", "fake_direction_change"),
        logarithmic=True,
    ),
    Plot(
        "Norm change of the weights",
        "Relative change of the norm of a row. LoRaD changes none, up to rounding.",
        ("student_norm_change", "fake_norm_change"),
    ),
    Plot("Gradient norms", "Before clipping.", ("student_grad_norm", "fake_grad_norm"), logarithmic=True),
    Plot(
        "Student's grid compared with the teacher's",
        "Same-prompt diversity and contrast, as shares of the teacher's. Near 1 is good; when they fall, images become alike.",
        ("diversity_ratio", "contrast_ratio"),
    ),
    Plot("Images per second", "Training throughput, images of all processes together.", ("images_per_second",)),
)


def curves(lines: Sequence[dict[str, float]]) -> str:
    """Return a figure for each of `PLOTS` of which the statistics have at least one value."""
    figures = []
    for shown in PLOTS:
        series = {name: [(line["step"], line[name]) for line in lines if name in line] for name in shown.names}
        series = {name: points for name, points in series.items() if points}
        if series:
            content = f"<b>{escape(shown.title)}</b>{plot_svg(series, shown.logarithmic)}"
            figures.append(html_parts.figure(content, shown.caption))
    return html_parts.figures(figures)


@styled
def plot_svg(series: dict[str, Points], logarithmic: bool = False) -> str:
    """Plot points ``(step, value)`` of each name; return the SVG element."""
    figure, (axes,) = canvas(width=6, height=3)
    # A logarithmic axis cannot show 0, the student's loss at the first step.
    positive = {name: shown for name, points in series.items() if (shown := [(x, y) for x, y in points if y > 0])}
    if logarithmic and positive:
        axes.set_yscale("log")
        plain_labels(axes.yaxis)
        series = positive
    for index, (name, points) in enumerate(series.items()):
        style, few = look(index), len(points) < 20
        x, y = zip(*points, strict=True)
        axes.plot(
            x, y, linestyle=style.dashes, color=style.colour, linewidth=1.2, label=name.replace("_", " "),
            marker=style.marker if few else None, markersize=3,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # above the axes, where no curve is
    document = figure_svg(figure).decode()
    return document[document.index("<svg") :]
