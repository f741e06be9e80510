"""How robustness is drawn: accuracy against strength with bands of 95 %, a colour a model; and the altered pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vitrail.analysis.figures import FIRST, INK, SECOND, panel
from vitrail.analysis.figures_inside import Pane, add_caption, caption_lines, display, panes
from vitrail.core.types import Row

COLOURS = (FIRST, SECOND, "#3c9a6d", "#7a55b8")
DASHES: Mapping[str, str | tuple[int, tuple[int, ...]]] = {
    "solid": "-",
    "dashed": (0, (5, 2)),
    "dotted": (0, (1.5, 2)),  # type: ignore[dict-item]
}


@dataclass(frozen=True)
class Line:
    """One model in one test. x: where each row stands. colour: which of `COLOURS`. apart: points without a line."""

    name: str
    x: tuple[float, ...]
    rows: tuple[Row, ...]
    colour: int = 0
    dashes: str = "solid"
    apart: bool = False


@dataclass(frozen=True)
class Panel:
    """ticks: names for places on the x axis. level: a name and a value drawn across."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...] = ()
    level: tuple[str, float] | None = None
    top: float | None = 100.0
    log: bool = False
    right: float | None = None


def robustness_curves(panels: Sequence[Panel], caption: str, columns: int = 3) -> Figure:
    """Panels side by side, `columns` a row."""
    across = min(columns, len(panels))
    down = -(-len(panels) // across)
    width = max(4.6, 3.7 * across)
    height = 3.1 * down + 0.17 * caption_lines(caption, width) + 0.15
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, one in zip(axes, panels, strict=False):
        _curves(panel(axis), one)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    add_caption(figure, caption)
    return figure


def by_corruption(means: Mapping[str, Mapping[str, Row]], clean: Mapping[str, Row], caption: str) -> Figure:
    """For each corruption (outer names) a line, on it a point a model (inner names) with its interval; unaltered on top."""
    names = ["unaltered", *means]
    figure = Figure(figsize=(6.4, 0.27 * len(names) + 1.0 + 0.17 * caption_lines(caption, 6.4)), layout="constrained")
    axis = panel(figure.subplots())
    for number, model in enumerate(clean):
        rows = [clean[model], *(means[name][model] for name in means)]
        places = np.arange(len(rows)) + 0.16 * (number - (len(clean) - 1) / 2)
        values = np.array([row.value for row in rows])
        axis.hlines(
            places, [r.low or 0 for r in rows], [r.high or 0 for r in rows], color=COLOURS[number], linewidth=1.2
        )
        axis.plot(values, places, "o", color=COLOURS[number], markersize=4.5, label=model)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    axis.grid(axis="x", color=INK, alpha=0.18, linewidth=0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("accuracy (%)")
    axis.set_xlim(0, 100)
    axis.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(clean))
    add_caption(figure, caption)
    return figure


def altered_pictures(
    strip: UInt8[Tensor, "rows columns c h w"], titles: Sequence[str], caption: str, rows: Sequence[str] = ()
) -> Figure:
    """A picture a row, a strength a column."""
    size = (strip.shape[3], strip.shape[4])
    table = [
        [Pane(display(picture), titles[column] if row == 0 else "") for column, picture in enumerate(line)]
        for row, line in enumerate(strip)
    ]
    return panes(table, size=size, caption=caption, rows=rows or [" "] * len(table), side=1.05)


def _curves(axis: Axes, of: Panel) -> None:
    for line in of.lines:
        colour = COLOURS[line.colour]
        values = [row.value for row in line.rows]
        bounded = [row for row in line.rows if row.low is not None and row.high is not None]
        if line.apart:
            places = np.array(line.x) + 0.1 * (line.colour - 0.5)
            for place, row in zip(places, line.rows, strict=True):
                if row.low is not None and row.high is not None:
                    axis.vlines(place, row.low, row.high, color=colour, linewidth=1.2)
            axis.plot(places, values, "o", color=colour, markersize=5, label=line.name)
            continue
        axis.plot(
            line.x, values, color=colour, linestyle=DASHES[line.dashes], marker="o", markersize=3, label=line.name
        )
        if len(bounded) == len(line.rows):
            low, high = ([getattr(row, end) for row in line.rows] for end in ("low", "high"))
            axis.fill_between(line.x, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.set_title(of.title, color=INK, fontsize=10, loc="left")
    axis.set_xlabel(of.x)
    axis.set_ylabel(of.y)
    if of.log:
        axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    if of.ticks:
        axis.set_xticks([place for place, _ in of.ticks], [name for _, name in of.ticks])
        axis.minorticks_off()
    if of.level is not None:
        axis.axhline(of.level[1], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=of.level[0])
    if of.lines and all(line.apart for line in of.lines):
        axis.margins(x=0.15)
    axis.set_ylim(0, of.top)
    if of.right is not None:
        axis.set_xlim(0, of.right)
    axis.legend(frameon=False, labelcolor=INK, fontsize=7.5, loc="best")
