"""All that is drawn of results; figures_inside.py and this file alone import matplotlib. Both make their own Figures, never
pyplot's global ones.

Each figure has to read on a light page and on a dark one. So the background is transparent, areas get their depth from
opacity, and the ink is the grey that stands out from white as much as from black (4.5 : 1); inside an HTML page,
`as_svg` gives it the text colour and the font of the page.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from jaxtyping import Int
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from vitrail.evaluation.metrics import Bin

INK = "#76787b"
FIRST, SECOND = "#3f78d8", "#d07f1d"
MOST_NUMBERS = 20
"""The largest confusion matrix whose cells hold numbers; up to three times as many classes are named at the sides."""


def curves(metrics: Sequence[Mapping[str, Any]], path: Path | None = None) -> Figure:
    """Loss, validation accuracy and learning rate against the step, from the lines of metrics.jsonl.

    Lines may hold "loss", "rate", "validation/loss" and "validation/accuracy" (per cent); each has a "step", and an
    "epoch". What was never measured leaves its panel empty. Saved as PNG where a path is given.
    """
    figure = Figure(figsize=(11, 3.1), layout=ConstrainedLayoutEngine(w_pad=0.12))
    losses, accuracies, rates = (panel(axis) for axis in figure.subplots(1, 3))

    losses.set_title("loss (nats)", loc="left", color=INK, fontsize=10)
    steps, values = _measured(metrics, "loss")
    window = max(1, len(values) // 40)
    if window > 1:
        losses.plot(steps, values, color=FIRST, alpha=0.3, linewidth=0.8)
        # The mean over a window that is cut off at both ends, so that the curve neither starts nor ends early.
        weight = np.convolve(np.ones(len(values)), np.ones(window), "same")
        values = np.convolve(values, np.ones(window), "same") / weight
    losses.plot(steps, values, color=FIRST, label="training")
    losses.plot(*_measured(metrics, "validation/loss"), color=SECOND, marker="o", markersize=3, label="validation")
    if _measured(metrics, "validation/loss")[0].size:
        losses.legend(frameon=False, labelcolor=INK, fontsize=8)

    accuracies.set_title("validation accuracy (%)", loc="left", color=INK, fontsize=10)
    steps, values = _measured(metrics, "validation/accuracy")
    accuracies.plot(steps, values, color=SECOND, marker="o", markersize=3)
    if len(values):
        best = int(np.argmax(values))
        accuracies.plot(steps[best], values[best], "o", markersize=8, markerfacecolor="none", color=SECOND)
        accuracies.annotate(
            f"{values[best]:.2f}",
            (steps[best], values[best]),
            (0, -16),
            textcoords="offset points",
            ha="right",
            color=INK,
        )

    rates.set_title("learning rate", loc="left", color=INK, fontsize=10)
    rates.plot(*_measured(metrics, "rate"), color=FIRST)
    rates.set_ylim(bottom=0)
    rates.yaxis.set_major_formatter("{x:g}")

    last = max((int(line["step"]) for line in metrics), default=1)
    epochs = max((float(line.get("epoch") or 0) for line in metrics), default=0.0)
    for axis in (losses, accuracies, rates):
        axis.set_xlim(0, max(last, 1))
        axis.set_xlabel(f"step ({epochs:.4g} epochs in all)" if epochs > 1 else "step")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if path is not None:
        save(figure, path)
    return figure


def compared(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    reached: Mapping[str, float],
    level: tuple[str, float],
    path: Path | None = None,
) -> Figure:
    """Validation accuracy of two runs against the step, with what each reached on the test pictures at its end.

    metrics: lines of metrics.jsonl by run. reached: test accuracies in per cent, likewise. level: name and accuracy of
    something without steps, drawn across. Saved as PNG where a path is given.
    """
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axis = panel(figure.subplots())
    title = "accuracy (%): on held-out pictures while learning, on test pictures at the end"
    axis.set_title(title, loc="left", color=INK, fontsize=10)
    last = max((int(line["step"]) for lines in metrics.values() for line in lines), default=1)
    for (name, lines), colour in zip(metrics.items(), (SECOND, FIRST), strict=False):
        axis.plot(*_measured(lines, "validation/accuracy"), color=colour, linewidth=1.4)
        axis.plot(last, reached[name], "o", color=colour, markersize=6, clip_on=False)
        axis.annotate(
            f"{name}  {reached[name]:.1f}",
            (last, reached[name]),
            (9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )
    axis.axhline(level[1], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.annotate(
        f"{level[0]}  {level[1]:.1f}", (0, level[1]), (2, 3), textcoords="offset points", color=INK, fontsize=8
    )
    axis.set_xlim(0, last)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if path is not None:
        save(figure, path)
    return figure


def confusion(counts: Int[np.ndarray, "k k"], names: Sequence[str]) -> Figure:
    """A row a true class, a column a predicted one; the number is the count, the shade the root of its share.

    The root, because a diagonal that is nearly full would leave every mistake too faint to see.
    """
    size = len(names)
    side = min(9.0, max(3.2, 1.5 + 0.55 * size))
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = panel(figure.subplots())
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shade = np.empty((size, size, 4))
    shade[..., :3] = [int(FIRST[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    shade[..., 3] = share**0.5
    axis.imshow(shade, interpolation="nearest")
    axis.grid(False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.xaxis.set_label_position("top")
    axis.spines[:].set_visible(False)
    if size <= 3 * MOST_NUMBERS:
        short = [name if len(name) <= 20 else name[:19] + "…" for name in names]
        font = 9 if size <= MOST_NUMBERS else 6
        axis.set_xticks(
            range(size), short, rotation=45, ha="left", rotation_mode="anchor", fontsize=font, parse_math=False
        )
        axis.set_yticks(range(size), short, fontsize=font, parse_math=False)
        axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    if size <= MOST_NUMBERS:
        for true, predicted in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[true, predicted] > 0.4 else INK
            axis.text(predicted, true, f"{counts[true, predicted]}", ha="center", va="center", color=colour, fontsize=8)
    return figure


def reliability(bins: Sequence[Bin]) -> Figure:
    """How often the model is right where it says how sure it is; below, how many pictures each bar rests on."""
    figure = Figure(figsize=(4.4, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    panel(upper)
    panel(lower)
    filled = [b for b in bins if b.accuracy is not None]
    left, width = [100 * b.low for b in filled], 100 / len(bins)
    upper.bar(
        left, [100 * (b.accuracy or 0) for b in filled], width, align="edge", color=FIRST, alpha=0.55, label="found"
    )
    upper.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
    upper.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper left")
    upper.set(xlim=(0, 100), ylim=(0, 100))
    upper.set_ylabel("pictures that are right (%)")
    lower.bar(left, [b.count for b in filled], width, align="edge", color=INK, alpha=0.55)
    lower.set_ylabel("pictures")
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    lower.set_xlabel("probability of the predicted class (%)")
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG, at twice the usual resolution, transparent; whatever the path's ending."""
    settle(figure).savefig(path, format="png", dpi=200, transparent=True)


def settle(figure: Figure) -> Figure:
    """Laid out once and for all; else that is done at each drawing, twice a file, and takes longer than drawing."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def as_svg(figure: Figure, title: str) -> str:
    """One <svg> element for use inside HTML, with text as text. `title` is what a screen reader says."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}), warnings.catch_warnings():
        # Our own font may lack a class name's letters; the page's will have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        settle(figure).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    whole = text.getvalue()
    opening, rest = whole[whole.index("<svg") :].split(">", 1)
    # It scales with the page, up to its natural width.
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    opening += (
        f' role="img" aria-label={quoteattr(title)} style="width: 100%; max-width: {96 * figure.get_figwidth():.0f}px"'
    )
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL).replace(INK, "currentColor")
    rest = re.sub(r"font-family: [^;\"]*", "font-family: var(--font, sans-serif)", rest)
    return f"{opening}>{rest}"


def panel(axis: Axes) -> Axes:
    axis.set_facecolor("none")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK)
    axis.spines[["left", "bottom"]].set_linewidth(0.6)
    axis.tick_params(colors=INK, labelsize=8, width=0.6, length=3)
    axis.grid(axis="y", color=INK, alpha=0.18, linewidth=0.6)
    axis.set_axisbelow(True)
    for text in (axis.xaxis.label, axis.yaxis.label):
        text.set(color=INK, fontsize=9)
    return axis


def _measured(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)
