"""What is drawn of measurements of speed and memory; from the plain values that their JSON holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vitrail.analysis.figures import FIRST, INK, SECOND, panel


def speeds(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel a run, a bar a side: its speed beside the reference, with the interval; ours in the first colour.

    runs: as `vitrail bench --json` has them ("what", "lines" with "side", "rate" and "speedup").
    """
    rows = max(len(run["lines"]) for run in runs)
    figure = Figure(figsize=(9, 0.9 + len(runs) * (0.7 + 0.28 * rows)), layout=ConstrainedLayoutEngine(h_pad=0.1))
    axes = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axis, run in zip(axes, runs, strict=True):
        panel(axis)
        what, lines = run["what"], run["lines"]
        title = f"{what['model']}, batch {what['batch']}, {what['size']} pixels: times {run['reference']}"
        axis.set_title(title, loc="left", color=INK, fontsize=10)
        for place, line in enumerate(lines):
            speedup = line["speedup"]
            reach = [[max(speedup["value"] - speedup["low"], 0)], [max(speedup["high"] - speedup["value"], 0)]]
            ours = line["side"].startswith("vitrail")
            axis.barh(place, speedup["value"], color=FIRST if ours else SECOND, alpha=0.75, height=0.65)
            axis.errorbar(speedup["value"], place, xerr=reach, color=INK, linewidth=1)
            says = f" {speedup['value']:.2f}   {line['rate']:.3g} pictures/s"
            axis.annotate(says, (speedup["high"], place), va="center", color=INK, fontsize=8)
        axis.set_yticks(range(len(lines)), [line["side"] for line in lines])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.3 * max(line["speedup"]["high"] for line in lines))
        axis.tick_params(labelsize=8)
    return figure


def growth(series: Mapping[str, Sequence[Mapping[str, float]]], labels: Mapping[str, str]) -> Figure:
    """Time above and memory below, a column for each thing that grows: measured as dots, the formula as a line.

    series: points with "x", "seconds", "seconds_formula", "bytes" and "bytes_formula", in order of x.
    labels: of the x axes.
    """
    figure = Figure(figsize=(3.1 * len(series), 5), layout=ConstrainedLayoutEngine(w_pad=0.1))
    axes = figure.subplots(2, len(series), squeeze=False)
    for column, (name, points) in enumerate(series.items()):
        x = [point["x"] for point in points]
        for axis, key, unit in ((axes[0][column], "seconds", 1.0), (axes[1][column], "bytes", 2.0**20)):
            panel(axis)
            axis.plot(x, [p[f"{key}_formula"] / unit for p in points], color=SECOND, label="formula")
            axis.plot(x, [p[key] / unit for p in points], "o", markersize=4, color=FIRST, label="measured")
            axis.set_ylim(bottom=0)
            axis.set_xlabel(labels[name], color=INK, fontsize=8)
            axis.tick_params(labelsize=8)
    axes[0][0].set_ylabel("seconds a step", color=INK, fontsize=8)
    axes[1][0].set_ylabel("MiB at the peak", color=INK, fontsize=8)
    axes[0][0].legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure
