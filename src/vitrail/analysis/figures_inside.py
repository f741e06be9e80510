"""What is drawn of a model's inside. One layout serves all that lies on pictures: a table of panes, pixels at its sides.

Colours are those of opaque tiles, so they read alike on any page; ink and background are those of figures.py. Each figure
ends with its caption, so that a file that was mailed still says what it shows.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from vitrail.analysis.figures import FIRST, INK, SECOND, panel, save, settle
from vitrail.analysis.position_similarity import PlacesAlike

HEAT, ALIKE = "inferno", "viridis"
MOST_TILES = 7
"""Tiles each way in a picture of positions; of finer grids so many rows and columns, evenly spaced."""

MARGIN = 0.12
"""Inches left of panes: the layout moves panes of a fixed shape after it has made room for their labels."""


@dataclass(frozen=True)
class Pane:
    """One picture of a table.

    image: colours, (h, w, 3), 0 to 255; or a number a patch, (y, x), which becomes a colour.
    marks: centres of patches to mark, (row, column) in `image`'s own pixels.
    """

    image: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "y x"]
    title: str = ""
    marks: tuple[tuple[int | float, int | float], ...] = ()


def panes(
    table: Sequence[Sequence[Pane]],
    *,
    size: tuple[int, int],
    caption: str,
    rows: Sequence[str] = (),
    limits: tuple[float, float] = (0.0, 1.0),
    scale: str = "",
    colours: str = HEAT,
    side: float = 1.5,
) -> Figure:
    """Rows of panes, all of one picture size (height, width) in pixels.

    rows: what each row is. limits: the numbers that are the darkest and the brightest colour. scale: what those numbers
    are; "" for no scale. side: a pane's longer side in inches.
    """
    columns = max(len(row) for row in table)
    down, across = (side * length / max(size) for length in size)
    lines = caption_lines(caption, columns * across)
    width = columns * (across + 0.1) + MARGIN + 0.75 + 0.8 * bool(scale)
    figure = Figure(figsize=(width, len(table) * (down + 0.25) + 0.5 + 0.15 * lines), layout="constrained")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(MARGIN / width, 0, 1 - MARGIN / width, 1))
    axes = figure.subplots(len(table), columns, squeeze=False)
    for row, (line, cells) in enumerate(zip(axes, table, strict=True)):
        for column, axis in enumerate(line):
            if column >= len(cells):
                axis.set_axis_off()
                continue
            _pane(axis, cells[column], size, limits, colours)
            if column == 0:
                axis.set_yticks((0, size[0]))
                axis.set_ylabel(rows[row] if row < len(rows) else "pixels", color=INK, fontsize=8)
            if row == len(table) - 1:
                axis.set_xticks((0, size[1]))
                axis.set_xlabel("pixels", color=INK, fontsize=7)
    if scale:
        _scale(figure, list(axes.flat), limits, scale, colours)
    add_caption(figure, caption)
    return figure


def filters(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], caption: str) -> Figure:
    """For each model, by name: components (k, c, h, w) as tiles, seven a row; beneath, explained variance (all,)."""
    figure = Figure(
        figsize=(4.2 * len(panels), 3.9 + 0.17 * caption_lines(caption, 4.2 * len(panels))), layout="constrained"
    )
    for part, (name, (components, shares)) in zip(_parts(figure, len(panels)), panels.items(), strict=True):
        upper, lower = part.subplots(2, 1, height_ratios=(3, 1))
        upper.imshow(_tiles(components, 7), interpolation="none")
        height, width = components.shape[2:]
        upper.set_title(name, color=INK, fontsize=10)
        upper.set_xticks(np.arange(0, 7) * (width + 1) + (width - 1) / 2, range(1, 8))
        upper.set_yticks([])
        upper.set_xlabel(f"principal component, row by row; a tile is {height} x {width} pixels", fontsize=8, color=INK)
        upper.tick_params(colors=INK, labelsize=7, length=0)
        upper.spines[:].set_visible(False)
        panel(lower)
        count = np.arange(1, len(shares) + 1)
        lower.plot(count, 100 * np.cumsum(shares), color=FIRST)
        lower.axvline(len(components), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        lower.set(xscale="log", ylim=(0, 100), xlim=(1, max(len(shares), 2)))
        lower.xaxis.set_major_formatter("{x:g}")
        lower.set_xlabel("principal components (log scale)")
        lower.set_ylabel("explained (%)")
    add_caption(figure, caption)
    return figure


def places(panels: Mapping[str, PlacesAlike], caption: str) -> Figure:
    """For each model, by name: a tile a patch, with that patch's likeness to every other, at its place in the grid."""
    count = len(panels)
    figure = Figure(figsize=(4.6 * count, 4.5 + 0.17 * caption_lines(caption, 4.6 * count)), layout="constrained")
    for part, (name, alike) in zip(_parts(figure, count), panels.items(), strict=True):
        values, (y, x) = alike.values, alike.values.shape[:2]
        rows, columns = (_spread(length) for length in (y, x))
        cosine = alike.unit.startswith("cosine")
        off = ~np.eye(y * x, dtype=bool).reshape(values.shape)
        # Each place equals itself, which says nothing and would squeeze the scale; a bias has no such top.
        low, high = (float(values.min()), 1.0 if cosine else float(values.max()))
        if cosine and off.any() and values[off].max() < 0.5:
            high = max(float(values[off].max()), low + 1e-6)
        axes = part.subplots(len(rows), len(columns), squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
        for line, row in zip(axes, rows, strict=True):
            for axis, column in zip(line, columns, strict=True):
                axis.imshow(values[row, column], vmin=low, vmax=high, cmap=ALIKE, interpolation="none")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if row == rows[-1]:
                    axis.set_xlabel(str(column + 1), color=INK, fontsize=7, labelpad=2)
                if column == columns[0]:
                    axis.set_ylabel(
                        str(row + 1), color=INK, fontsize=7, rotation=0, ha="right", va="center", labelpad=3
                    )
        part.suptitle(f"{name}\n" * bool(name) + f"grid of {y} x {x} patches", color=INK, fontsize=9)
        part.supxlabel("column of the patch", color=INK, fontsize=8)
        part.supylabel("row of the patch", color=INK, fontsize=8)
        _scale(part, list(axes.flat), (low, high), alike.unit, ALIKE)
    add_caption(figure, caption)
    return figure


def distances(
    panels: Mapping[str, tuple[Float[np.ndarray, "layers heads"], float]], caption: str, blocks: Sequence[int] = ()
) -> Figure:
    """For each model, by name: a dot a head, its mean attention distance in pixels, and that of even attention.

    blocks: their numbers from 1, where not all are shown.
    """
    figure = Figure(
        figsize=(4.6 * len(panels), 3.5 + 0.17 * caption_lines(caption, 4.6 * len(panels))), layout="constrained"
    )
    for axis, (name, (found, even)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        panel(axis)
        numbers = np.array(blocks or range(1, len(found) + 1))
        axis.plot(np.repeat(numbers, found.shape[1]), found.ravel(), "o", color=FIRST, markersize=4, alpha=0.65)
        axis.plot(numbers, found.mean(1), color=SECOND, linewidth=1.3, label="mean of the heads")
        axis.axhline(even, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="all patches alike")
        axis.plot([], [], "o", color=FIRST, markersize=4, label="one head")
        axis.set_ylim(0, 1.12 * max(even, float(found.max())))
        axis.set_title(name, color=INK, fontsize=10, loc="left")
        axis.set_xlabel("block")
        axis.set_ylabel("mean attention distance (pixels)")
        axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axis.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right")
    add_caption(figure, caption)
    return figure


def data_plane(
    where: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, "n"], classes: Sequence[str], caption: str
) -> Figure:
    """A dot a picture, a colour a class."""
    figure = Figure(figsize=(6.6, 5 + 0.17 * caption_lines(caption, 6.6)), layout="constrained")
    axis = panel(figure.subplots())
    colours = class_colours(len(classes))
    for label in np.unique(labels):
        chosen = where[labels == label]
        name = classes[label] if 0 <= label < len(classes) else "no class"
        colour = colours[label] if label >= 0 else INK
        axis.scatter(chosen[:, 0], chosen[:, 1], s=9, color=colour, alpha=0.75, linewidths=0, label=name[:24])
    if len(np.unique(labels)) <= 30:
        axis.legend(
            frameon=False, labelcolor=INK, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2
        )
    axis.set_xlabel("t-SNE, first axis (no unit)")
    axis.set_ylabel("t-SNE, second axis (no unit)")
    axis.grid(False)
    add_caption(figure, caption)
    return figure


def class_colours(count: int) -> list[str]:
    """A hex colour a class, neither near white nor near black."""
    table = colormaps["tab10" if count <= 10 else "tab20" if count <= 20 else "hsv"]
    found = [table(place if count <= 20 else 0.95 * place / count) for place in range(count)]
    return ["#" + "".join(f"{round(215 * part):02x}" for part in colour[:3]) for colour in found]


def heat(
    values: Float[np.ndarray, "y x"], low: float = 0.0, high: float = 1.0, colours: str = HEAT
) -> UInt8[np.ndarray, "y x 3"]:
    """The colours of a map, for use outside of a figure."""
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return np.asarray(colormaps[colours](scaled, bytes=True)[..., :3], np.uint8)


def display(pixels: UInt8[Tensor, "c h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture as it is seen: grey for one channel, the first three of four, the mean of what are no colours."""
    whole = pixels.permute(1, 2, 0).cpu().numpy()
    if whole.shape[2] in (3, 4):
        return np.ascontiguousarray(whole[..., :3])
    return np.repeat(whole.mean(2, keepdims=True).round().astype(np.uint8), 3, axis=2)


def masked(picture: UInt8[np.ndarray, "h w 3"], values: Float[np.ndarray, "y x"]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture times a map in [0, 1] that was resized to it by Lanczos, as the paper's pictures are made."""
    mask = Image.fromarray(values.astype(np.float32)).resize(picture.shape[1::-1], Image.Resampling.LANCZOS)
    return np.round(picture * np.clip(np.asarray(mask), 0, 1)[..., None]).astype(np.uint8)


def save_both(figure: Figure, path: Path) -> tuple[Path, Path]:
    """path.png and path.svg, both with a transparent background; the same numbers give the same bytes."""
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    save(figure, png)
    with rc_context({"svg.hashsalt": path.stem}):
        settle(figure).savefig(svg, format="svg", transparent=True, metadata={"Date": None}, dpi=150)
    return png, svg


def _pane(axis: Axes, pane: Pane, size: tuple[int, int], limits: tuple[float, float], colours: str) -> None:
    height, width = size
    axis.imshow(
        pane.image, extent=(0, width, height, 0), vmin=limits[0], vmax=limits[1], cmap=colours, interpolation="none"
    )
    down, across = height / pane.image.shape[0], width / pane.image.shape[1]
    for number, (row, column) in enumerate(pane.marks):
        place = ((column + 0.5) * across, (row + 0.5) * down)
        axis.plot(*place, "o", markersize=6, markerfacecolor="none", markeredgecolor="white", markeredgewidth=2.2)
        axis.plot(*place, "o", markersize=6, markerfacecolor="none", markeredgecolor="#c2405a", markeredgewidth=1.1)
        if len(pane.marks) > 1:
            axis.annotate(
                "abcdefgh"[number],
                place,
                (5, 3),
                textcoords="offset points",
                color="white",
                fontsize=8,
                weight="bold",
                path_effects=[withStroke(linewidth=2, foreground="#c2405a")],
            )
    axis.set(xticks=[], yticks=[])
    axis.tick_params(colors=INK, labelsize=6, width=0.6, length=2)
    axis.spines[:].set_visible(False)
    axis.set_title(pane.title, color=INK, fontsize=7.5, pad=3, parse_math=False)


def _tiles(components: Float[np.ndarray, "k c h w"], columns: int) -> UInt8[np.ndarray, "high wide 4"]:
    """Each from its own smallest to its own largest number, grey 0 in the middle; transparent between tiles."""
    count, channels, height, width = components.shape
    colours = components if channels == 3 else components.mean(1, keepdims=True).repeat(3, 1)
    colours = colours / np.maximum(np.abs(colours).max((1, 2, 3), keepdims=True), 1e-12)
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 4), np.uint8)
    for place, tile in enumerate(colours):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        canvas[top : top + height, left : left + width, :3] = np.round(127.5 + 127.5 * tile.transpose(1, 2, 0))
        canvas[top : top + height, left : left + width, 3] = 255
    return canvas


def _spread(length: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, length - 1, min(length, MOST_TILES))})


def _parts(figure: Figure, count: int) -> list[SubFigure]:
    found = np.atleast_1d(np.asarray(figure.subfigures(1, count), dtype=object))
    for part in found:
        part.set_facecolor("none")
    return list(found)


def _scale(figure: Figure | SubFigure, axes: list[Axes], limits: tuple[float, float], label: str, colours: str) -> None:
    bar = figure.colorbar(
        ScalarMappable(Normalize(*limits), colours),
        ax=axes,
        label=label,
        fraction=0.03,
        pad=0.015,
        aspect=30,
        shrink=0.9,
    )
    bar.ax.tick_params(colors=INK, labelsize=7, length=2)
    bar.ax.yaxis.label.set(color=INK, fontsize=8)
    bar.outline.set_visible(False)


def caption_lines(caption: str, inches: float) -> int:
    return len(textwrap.wrap(caption, _characters(inches)))


def _characters(inches: float) -> int:
    return max(34, int(17.5 * inches))


def add_caption(figure: Figure, caption: str) -> None:
    wrapped = "\n".join(textwrap.wrap(caption, _characters(figure.get_figwidth() - 0.4)))
    figure.supxlabel(wrapped, x=0.02, ha="left", color=INK, fontsize=8, parse_math=False)
