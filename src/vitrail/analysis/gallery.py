"""Each figure of a model's inside: what is computed for it, its caption, and the numbers that it rests on.

A figure is a function from Subject to Drawn. One that the model or the pictures do not allow raises UserError.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitrail.analysis import figures_inside as draw
from vitrail.analysis.agreement import reference_picture
from vitrail.analysis.attention import attention_distances, attention_of, uniform_distance
from vitrail.analysis.figures_inside import Pane, display, masked
from vitrail.analysis.filters import filter_components
from vitrail.analysis.internals import Model, Trace, answer_reads, evaluating, normalized, one_token, trace, vit_of
from vitrail.analysis.position_similarity import position_similarity, structure
from vitrail.analysis.rollout import class_relevance, rollout
from vitrail.analysis.tokens import token_colours, token_similarity
from vitrail.core.errors import UserError
from vitrail.core.types import Features
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet
from vitrail.models.vit import ViT

MAP_NUMBERS = 2**25
"""Numbers of one layer's maps that are held at once; so many pictures are looked at together."""
BRIGHT = 98
"""The percentile of a rollout that is drawn brightest. The paper has the largest, but a single odd patch, as DINOv2 has
some, would leave the others dark."""
MOST_ROWS, MOST_HEADS, LIKELIEST = 6, 8, 3


@dataclass(frozen=True)
class Subject:
    """What is looked at, and where.

    name: of the model, for captions. pixels: all pictures as the model is given them. shown: how many of them are drawn.
    layers, heads: which, from 0; () for some that are evenly spread. query: a patch, (row, column) from 0; None for the
    class token (the mean, where there is none). classes: for the gradients; () for the likeliest.
    """

    model: Model
    name: str
    pixels: UInt8[Tensor, "b c h w"]
    shown: int = 4
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    query: tuple[int, int] | None = None
    classes: tuple[int, ...] = ()

    def some(self, count: int | None = None) -> UInt8[Tensor, "some c h w"]:
        """The first pictures, on the model's device. Raises UserError where there are none."""
        if not len(self.pixels):
            raise UserError("this figure needs pictures: name some after the weights, or give --data.")
        return self.pixels[: count or self.shown].to(next(self.model.parameters()).device)

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[3]

    def chosen_layers(self, most: int) -> tuple[int, ...]:
        return self.layers or _spread(_backbone(self.model).depth, most)


@dataclass(frozen=True)
class Drawn:
    """numbers: what the figure rests on or shows, short enough for JSON."""

    figure: draw.Figure
    caption: str
    numbers: dict[str, Any] = field(default_factory=dict)


def filters(of: Subject) -> Drawn:
    components, shares = filter_components(of.model)
    backbone = _backbone(of.model)
    trunk = backbone if isinstance(backbone, ResNet) else backbone.trunk
    count = backbone.width if trunk is None else trunk.root.weight.shape[0]
    caption = (
        f"Principal components of the first layer's {count:,} filters of {of.name} (the paper's Fig. 7, "
        f"left): the first {len(components)} explain {100 * shares[: len(components)].sum():.1f} % of the variance. Each "
        "tile has a scale of its own, grey is 0, and its sign means nothing."
    )
    numbers = {"explained": [round(float(share), 6) for share in shares[: len(components)]], "components": len(shares)}
    return Drawn(draw.filters({of.name: (components, shares)}, caption), caption, numbers)


def positions(of: Subject) -> Drawn:
    backbone = vit_of(of.model)
    kind = backbone.config.positions
    traced = None
    if kind == "relative":
        size = backbone.config.image
        one = reference_picture(size, backbone.config.channels)[None].to(next(backbone.parameters()).device)
        traced = trace(of.model, of.some() if len(of.pixels) else one)
    layer = of.layers[0] if of.layers else 0
    alike = position_similarity(of.model, layer, traced)
    seen = "pictures" if len(of.pixels) else "a drawn picture of ramps, squares and rings"
    what = {
        "learned": "learned position embeddings",
        "learned2d": "learned 2-D position embeddings",
        "sincos2d": "sin-cos position embeddings",
        "rotary": "rotary angles, as their cosines and sines",
        "relative": f"relative positions: the mean over heads, layers and {seen} of what they add to the logits",
    }[kind]
    where = "" if backbone.config.position_layers != "every" else f" before block {layer + 1}"
    found = structure(alike.values)
    y, x = backbone.config.grid
    few = " Not all rows and columns are shown." if max(y, x) > draw.MOST_TILES else ""
    caption = (
        f"{alike.unit.capitalize()} of the {what}{where}; {of.name} (the paper's Fig. 7, centre, and 10): each tile "
        f"compares one patch with all others, laid out as the picture is.{few} Likeness falls with distance with a "
        f"correlation of {found.nearness:.2f}; patches of one row or column have {found.lines:.3f} in the mean, others as "
        f"far apart {found.elsewhere:.3f}."
    )
    numbers = {"nearness": found.nearness, "lines": found.lines, "elsewhere": found.elsewhere, "unit": alike.unit}
    return Drawn(draw.places({of.name: alike}, caption), caption, numbers)


def distance(of: Subject) -> Drawn:
    found = np.concatenate(
        [attention_distances(trace(of.model, part), of.layers or None) for part in _batches(of, len(of.pixels))]
    )
    mean = found.mean(0)
    backbone = vit_of(of.model)
    grid = of.size[0] // backbone.config.stride[0], of.size[1] // backbone.config.stride[1]
    even = uniform_distance(grid, backbone.config.stride)
    blocks = tuple(layer + 1 for layer in of.layers) or tuple(range(1, backbone.depth + 1))
    caption = (
        f"Mean attention distance of each head of {of.name} over {len(found)} picture{'s' * (len(found) > 1)} of "
        f"{of.size[0]} x {of.size[1]} pixels (the paper's Fig. 7, right, and 11); class token and registers are left out. "
        f"Block {blocks[0]}: heads from {mean[0].min():.0f} to {mean[0].max():.0f} pixels; block {blocks[-1]}: from "
        f"{mean[-1].min():.0f} to {mean[-1].max():.0f}. Attention to all patches alike would be {even:.0f}."
    )
    numbers = {"blocks": blocks, "pixels": np.round(mean, 3).tolist(), "even": round(even, 3), "pictures": len(found)}
    return Drawn(draw.distances({of.name: (mean, even)}, caption, blocks), caption, numbers)


def attention(of: Subject) -> Drawn:
    of.some()
    traced = trace(of.model, of.some(1))
    layers = of.chosen_layers(MOST_ROWS)
    heads = of.heads or _spread(vit_of(of.model).config.heads, MOST_HEADS)
    start, marks = _start(of, traced)
    table = []
    for number, layer in enumerate(layers):
        maps = attention_of(traced, layer, start)[0]
        tops = [("all heads" if number == 0 else "", maps.mean(0))]
        tops += [(f"head {head + 1}" if number == 0 else "", maps[head]) for head in heads]
        picture = Pane(display(of.pixels[0]), "picture" if number == 0 else "", marks)
        table.append([picture, *(Pane(_to_one(values), title, marks) for title, values in tops)])
    asked = "class token" if of.query is None and vit_of(of.model).config.class_token else "mean over all patches"
    if of.query is not None:
        asked = f"patch in row {of.query[0] + 1}, column {of.query[1] + 1} (marked)"
    caption = (
        f"What {of.name} looks at in each block and head: the attention of the {asked} to the {traced.grid[0]} x "
        f"{traced.grid[1]} patches, each map from 0 to its own largest share."
    )
    names = [f"block {layer + 1}" for layer in layers]
    figure = draw.panes(table, size=of.size, caption=caption, rows=names, scale="share of the map's largest", side=1.05)
    return Drawn(figure, caption, {"blocks": [layer + 1 for layer in layers], "heads": [head + 1 for head in heads]})


def rolled_out(of: Subject) -> Drawn:
    maps, on_patches = [], []
    for part in _batches(of, of.shown):
        traced = trace(of.model, part)
        start, marks = _start(of, traced) if of.query is not None else (None, ())
        flow = rollout(traced, start)
        maps.append(traced.on_grid(flow))
        on_patches.append(flow[:, traced.prefixes :].sum(1))
    pictures = [display(pixels) for pixels in of.pixels[: of.shown]]
    tops = [brightened(values) for values in np.concatenate(maps)]
    table = [
        [Pane(picture, marks=marks) for picture in pictures],
        [Pane(values) for values in tops],
        [Pane(masked(picture, values)) for picture, values in zip(pictures, tops, strict=True)],
    ]
    reads = "where the answer is read" if of.query is None else "the marked patch"
    share = float(np.concatenate(on_patches).mean())
    caption = (
        f"Attention rollout of {of.name} (the paper's Fig. 6 and 14): how much of each patch reaches {reads} through all "
        f"blocks, each map from 0 to its {BRIGHT}th percentile; below, multiplied onto the picture."
    )
    if vit_of(of.model).config.prefixes:
        caption += f" Patches give {100 * share:.0f} % of the flow, the prefix tokens the rest."
    figure = draw.panes(
        table,
        size=of.size,
        caption=caption,
        rows=("picture", "rollout", "picture x rollout"),
        scale=f"share of the map's {BRIGHT}th percentile",
    )
    return Drawn(figure, caption, {"share of patches": round(share, 4)})


def brightened(values: Float[np.ndarray, "y x"]) -> Float[np.ndarray, "y x"]:
    """A rollout as it is drawn: from 0 to its `BRIGHT`th percentile as 0 to 1; what is above is 1."""
    return np.clip(values / max(float(np.percentile(values, BRIGHT)), 1e-12), 0, 1)


def gradient(of: Subject) -> Drawn:
    if not isinstance(of.model, Classifier):
        raise UserError("the model has no head, so there is no class to ask for: give a classifier's checkpoint.")
    vit_of(of.model)
    images, labels = of.some(), of.model.labels
    with torch.no_grad(), evaluating(of.model):
        shares = of.model(images).float().softmax(1)
    asked = (
        torch.tensor([of.classes] * len(images)) if of.classes else shares.topk(min(LIKELIEST, shares.shape[1])).indices
    )
    asked = asked.to(images.device)
    table = [[Pane(display(pixels))] for pixels in of.pixels[: of.shown]]
    for column in range(asked.shape[1]):
        for row, part in enumerate(images.split(1)):
            label = asked[row : row + 1, column]
            found = class_relevance(of.model, part, label)[0]
            y, x = (length // cell for length, cell in zip(of.size, vit_of(of.model).config.stride, strict=True))
            name = labels[int(label)] if labels else f"class {int(label)}"
            title = f"{name[:22]} {100 * float(shares[row, label]):.0f} %"
            table[row].append(Pane(_to_one(found[-y * x :].reshape(y, x), bottom=True), title))
    caption = (
        f"What in a picture speaks for a class, by gradient-weighted attention of {of.name} (arXiv 2103.15679), for "
        f"{'the classes asked for' if of.classes else 'the likeliest classes'}, with their probabilities; each map from its "
        "smallest to its largest value."
    )
    figure = draw.panes(table, size=of.size, caption=caption, scale="relevance, of the map's range")
    return Drawn(figure, caption, {"classes": asked.tolist()})


def similarity(of: Subject) -> Drawn:
    features = _features(of, ())
    grid = _grid(features)
    y, x = grid
    some = ((y // 2, x // 2), (y // 4, x // 4), (3 * y // 4, 3 * x // 4))
    asked = tuple(dict.fromkeys(some if of.query is None else (_inside(of.query, grid),)))
    found = token_similarity(features.tokens, tuple(row * x + column for row, column in asked)).reshape(
        -1, len(asked), y, x
    )
    cell = of.size[0] / y, of.size[1] / x
    pixel_marks = tuple(((row + 0.5) * cell[0] - 0.5, (column + 0.5) * cell[1] - 0.5) for row, column in asked)
    letters = "abcdefgh" if len(asked) > 1 else " "
    table = []
    for number, maps in enumerate(found):
        line = [Pane(display(of.pixels[number]), marks=pixel_marks)]
        line += [
            Pane(values, f"like {letters[place]}".rstrip() if number == 0 else "", (asked[place],))
            for place, values in enumerate(maps)
        ]
        table.append(line)
    caption = (
        f"How alike {of.name} finds patches: the cosine similarity of the marked patch's last token with every other's, on "
        f"{y} x {x} cells."
    )
    limits = (min(0.0, float(found.min())), 1.0)
    figure = draw.panes(
        table, size=of.size, caption=caption, limits=limits, scale="cosine similarity", colours=draw.ALIKE
    )
    return Drawn(figure, caption, {"mean": round(float(found.mean()), 4)})


def colours(of: Subject) -> Drawn:
    layers = of.chosen_layers(4)
    features = _features(of, layers)
    kind = "stage" if isinstance(_backbone(of.model), ResNet) else "block"
    columns = [(f"{kind} {layer + 1}", part) for layer, part in zip(layers, features.layers, strict=True)]
    columns.append(("after the last norm", features))
    table = [[Pane(display(pixels), "picture" if row == 0 else "")] for row, pixels in enumerate(of.pixels[: of.shown])]
    numbers = {}
    for name, part in columns:
        found, shares = token_colours(part.tokens)
        numbers[name] = [round(float(share), 4) for share in shares]
        for row, line in enumerate(table):
            title = f"{name}\n{100 * shares.sum():.0f} % of variance" if row == 0 else ""
            line.append(Pane(found[row].reshape(*_grid(part), 3), title))
    caption = (
        f"The three principal components of {of.name}'s patch tokens as red, green and blue, at several depths; found for "
        "each depth over all pictures shown, so that within a column equal colours are equal directions."
    )
    return Drawn(draw.panes(table, size=of.size, caption=caption), caption, {"explained": numbers})


FIGURES: dict[str, Callable[[Subject], Drawn]] = {
    "filters": filters,
    "positions": positions,
    "distance": distance,
    "attention": attention,
    "rollout": rolled_out,
    "gradient": gradient,
    "similarity": similarity,
    "colours": colours,
}


def _to_one(values: Float[np.ndarray, "y x"], bottom: bool = False) -> Float[np.ndarray, "y x"]:
    low = float(values.min()) if bottom else 0.0
    return (values - low) / max(float(values.max()) - low, 1e-12)


def _start(of: Subject, traced: Trace) -> tuple[Float[Tensor, "b t"], tuple[tuple[int, int], ...]]:
    """Where attention is followed from, and what to mark on a map."""
    if of.query is None:
        return (one_token(traced, 0) if traced.backbone.config.class_token else answer_reads(traced)), ()
    row, column = _inside(of.query, traced.grid)
    x = traced.grid[1]
    return one_token(traced, traced.prefixes + row * x + column), ((row, column),)


def _inside(query: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    if not (0 <= query[0] < grid[0] and 0 <= query[1] < grid[1]):
        asked = f"{query[0] + 1} {query[1] + 1}"
        raise UserError(f"--query {asked} is outside of the {grid[0]} rows and {grid[1]} columns of patches.")
    return query


def _batches(of: Subject, count: int) -> Sequence[Tensor]:
    config = vit_of(of.model).config
    together = max(1, min(16, MAP_NUMBERS // (config.heads * config.tokens(of.size) ** 2)))
    return of.some(count).split(together)


@torch.no_grad()
def _features(of: Subject, layers: tuple[int, ...]) -> Features:
    with evaluating(of.model):
        return _backbone(of.model).features(normalized(of.model, of.some()), keep=layers)


def _grid(features: Features) -> tuple[int, int]:
    assert features.grid is not None
    return features.grid[0], features.grid[1]


def _backbone(model: Model) -> ViT | ResNet:
    return model.backbone if isinstance(model, Classifier) else model


def _spread(length: int, most: int) -> tuple[int, ...]:
    return tuple(sorted({round(place) for place in np.linspace(0, length - 1, min(length, most))}))
