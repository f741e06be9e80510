"""explained.html: one picture's way through one model on a page, in one file that asks for nothing from outside.

The maps are tiny PNGs, a pixel a patch, which the browser enlarges unsmoothed; the grid with its numbers is SVG, so it is
sharp on any screen. The page takes the reader's light or dark, and its tables scroll sideways on a phone.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vitrail.analysis.figures_inside import ALIKE, heat
from vitrail.analysis.gallery import BRIGHT, brightened
from vitrail.analysis.pixels_as_words import Cost
from vitrail.analysis.walk import Step
from vitrail.core.runs import write_whole
from vitrail.experiments.page import PAGE

MOST_NUMBERED = 900
"""Patches beyond which their numbers would be too small to read."""

STYLE = """<style>
h1.small { font-size: 3.2rem; } .cut { display: block; width: 100%; max-width: 34rem; margin: 0; }
.cut line { stroke: var(--paper); }
.cut text { fill: #fff; stroke: #000; paint-order: stroke; text-anchor: middle; dominant-baseline: central; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .8rem; margin: 0 0 1rem; }
.maps figure { margin: 0; min-width: 0; } .maps figcaption { margin-top: .2rem; }
.maps img { display: block; width: 100%; border-radius: 3px; } .pixels { image-rendering: pixelated; }
.with { position: relative; } .with b { position: absolute; border: 2px solid #fff; outline: 2px solid #c2405a; }
.steps td { vertical-align: top; white-space: nowrap; }
.steps td.words { text-align: left; white-space: normal; min-width: 14rem; }
.steps td:first-child { white-space: normal; min-width: 8rem; } .steps .eq { text-align: left; color: var(--soft); }
.steps th.words, .steps th.eq { text-align: left; } .steps td.eq { white-space: normal; min-width: 9rem; }
.figures + .note { margin-top: 1rem; }
</style>"""


@dataclass(frozen=True)
class Explained:
    """What the page says. Maps are on the grid (y, x) of patches, or of a ResNet's last cells.

    prepared: the picture as the model is given it. answers: classes with their probabilities, the likeliest first.
    cut: the grid that the picture is cut into; None for a ResNet. mapped: height, width and channels of a hybrid's map,
    which is cut in the picture's place. looked: shares of attention of the token that the answer is read from, for each
    block and head; rolled: their rollout. alike: pairs of a patch and every patch's likeness to it.
    colours: pairs of a place in the model and the main directions of the tokens there.
    """

    model: str
    described: str
    picture: str
    original: UInt8[np.ndarray, "high wide 3"]
    prepared: UInt8[np.ndarray, "h w 3"]
    steps: tuple[Step, ...]
    answers: tuple[tuple[str, float], ...] = ()
    cut: tuple[int, int] | None = None
    mapped: tuple[int, int, int] | None = None
    looked: Float[np.ndarray, "layers heads y x"] | None = None
    rolled: Float[np.ndarray, "y x"] | None = None
    alike: tuple[tuple[tuple[int, int], np.ndarray], ...] = ()
    colours: tuple[tuple[str, np.ndarray], ...] = ()
    costs: tuple[Cost, ...] = ()


def write_explanation(path: Path, of: Explained) -> None:
    sections = [STYLE, _opening(of)]
    if of.cut is not None:
        sections.append(_section("The picture becomes words", _words(of, of.cut)))
    if of.looked is not None and of.rolled is not None:
        sections.append(_section("Where it looks", _looks(of.prepared, of.looked, of.rolled)))
    sections.append(_section("What it finds alike", _alike(of)))
    if of.answers:
        sections.append(_section("The answer", _answers(of.answers)))
    sections.append(_section("Every step", _steps(of.steps)))
    if of.costs:
        sections.append(_section("If pixels were words", _costs(of.costs)))
    before, after = PAGE.replace("@title", escape(f"{of.picture}, explained").replace("@", "&#64;")).split("@body")
    raw = (before + "\n".join(sections) + after).encode("utf-8", "backslashreplace")
    write_whole(path, lambda part: _write(part, raw))


def _opening(of: Explained) -> str:
    parameters, macs = sum(step.parameters for step in of.steps), sum(step.macs for step in of.steps)
    milliseconds = 1000 * sum(step.seconds for step in of.steps)
    if of.answers:
        name, share = of.answers[0]
        head = f'<h1 class="small">{100 * share:.1f}<span class="unit"> %</span></h1><p class="lead">{escape(name)}</p>'
    else:
        head = '<h1 class="small">no head</h1><p class="lead">This checkpoint ends in features; it names no class.</p>'
    facts = [
        ("parameters", f"{parameters:,}"),
        ("multiply-accumulates", spoken_macs(macs)),
        ("this run", f"{milliseconds:.1f} ms"),
        ("steps", f"{len(of.steps)}"),
    ]
    figures = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    pictures = _maps(
        [
            (_image(of.original, "the picture", False), f"the picture, {escape(of.picture)}"),
            (
                _image(of.prepared, "as the model is given it"),
                "as the model is given it: {} x {}".format(*of.prepared.shape),
            ),
        ],
        "14rem",
    )
    return (
        f'<p class="origin">{escape(of.model)}</p>{head}{pictures}<dl class="figures">{figures}</dl>'
        f'<p class="note">{escape(of.described)}</p>'
    )


def _words(of: Explained, grid: tuple[int, int]) -> str:
    y, x = grid
    height, width = of.prepared.shape[:2]
    down, across = height / y, width / x
    lines = [f'<line x1="0" x2="{width}" y1="{row * down:g}" y2="{row * down:g}"/>' for row in range(1, y)]
    lines += [
        f'<line y1="0" y2="{height}" x1="{column * across:g}" x2="{column * across:g}"/>' for column in range(1, x)
    ]
    size = 0.3 * min(down, across)
    numbers = "".join(
        f'<text x="{(n % x + 0.5) * across:g}" y="{(n // x + 0.5) * down:g}">{n + 1}</text>'
        for n in range(y * x if y * x <= MOST_NUMBERED else 0)
    )
    drawing = (
        f'<svg class="cut" viewBox="0 0 {width} {height}" role="img" aria-label="The picture cut into {y * x} patches">'
        f'<image href="{_data(of.prepared)}" width="{width}" height="{height}" class="pixels"/>'
        f'<g stroke-width="{0.08 * min(down, across):g}">{"".join(lines)}</g>'
        f'<g font-size="{size:g}" stroke-width="{size / 5:g}" font-family="sans-serif">{numbers}</g></svg>'
    )
    flat = next((step for step in of.steps if step.name.startswith("patches")), None)
    rows = "" if flat is None else f" Flattened, they are {flat.shape[0]} rows of {flat.shape[1]:,} numbers."
    if of.mapped is None:
        said = f"Cut into {y} x {x} = {y * x} patches of {down:g} x {across:g} pixels, read row by row.{rows}"
    else:
        tall, wide, channels = of.mapped
        said = (
            f"A ResNet makes a map of {tall} x {wide} cells of {channels:,} numbers, and it is the map that is cut: into "
            f"{y} x {x} = {y * x} words of {tall / y:g} x {wide / x:g} cells, read row by row. Drawn is where each lies; it "
            f"has seen more than its {down:g} x {across:g} pixels.{rows}"
        )
    return f'<p class="note">{said}</p>{drawing}'


def _looks(
    prepared: UInt8[np.ndarray, "h w 3"],
    looked: Float[np.ndarray, "layers heads y x"],
    rolled: Float[np.ndarray, "y x"],
) -> str:
    rollout = [
        (_image(prepared, "the picture"), "the picture"),
        (_image(heat(brightened(rolled)), "rollout"), "through all blocks: attention rollout"),
    ]
    means = [
        (_image(heat(_to_one(maps.mean(0))), f"block {number}"), f"block {number}")
        for number, maps in enumerate(looked, 1)
    ]
    folded = ""
    for number, maps in enumerate(looked, 1):
        heads = [
            (_image(heat(_to_one(one)), f"block {number}, head {head}"), f"head {head}")
            for head, one in enumerate(maps, 1)
        ]
        folded += f'<p class="note">block {number}</p>{_maps(heads)}'
    note = (
        '<p class="note">What the token that the answer is read from looks at: the brightest patch has the largest share of '
        f"its map. In the rollout the brightest are those from its {BRIGHT}th percentile on, for a single odd patch would "
        "leave the others dark.</p>"
    )
    folded = f"<details><summary>head by head</summary>{folded}</details>"
    return (
        note
        + _maps(rollout, "11rem")
        + '<p class="note">All heads together, block by block:</p>'
        + _maps(means)
        + folded
    )


def _alike(of: Explained) -> str:
    parts = ""
    if of.alike:
        pairs = []
        for (row, column), values in of.alike:
            y, x = values.shape
            place = f"top:{100 * row / y:.2f}%;left:{100 * column / x:.2f}%;height:{100 / y:.2f}%;width:{100 / x:.2f}%"
            number = row * x + column + 1
            tile = _image(heat(values, min(0.0, float(values.min())), 1.0, ALIKE), f"likeness to patch {number}")
            pairs.append((f'<div class="with">{tile}<b style="{place}"></b></div>', f"patch {number}"))
        parts += (
            '<p class="note">How like the marked one each place\'s last token is: yellow is a cosine similarity of 1.</p>'
            + _maps(pairs, "11rem")
        )
    if of.colours:
        tiles = [(_image(colours, name), escape(name)) for name, colours in of.colours]
        parts += (
            '<p class="note">The three main directions of the tokens as red, green and blue: equal colours are like tokens, '
            "within one tile.</p>" + _maps(tiles, "8rem")
        )
    return parts


def _answers(answers: Sequence[tuple[str, float]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{100 * share:.2f} %</td>"
        f'<td><span class="bar"><i style="width:{100 * share:.2f}%"></i></span></td></tr>'
        for name, share in answers
    )
    return f'<div class="scroll"><table><tr><th>class</th><th>probability</th><th></th></tr>{rows}</table></div>'


def _steps(steps: Sequence[Step]) -> str:
    heads = "<tr><th>step</th><th>comes out</th><th>parameters</th><th>MACs</th><th>ms</th>"
    heads += '<th class="eq">in the paper</th><th class="words">in words</th></tr>'
    found, blocks = "", 0
    for group, members in groupby(steps, key=lambda step: step.group):
        part = list(members)
        rows = "".join(_row(step) for step in part)
        table = f'<div class="scroll"><table class="steps">{heads}{rows}</table></div>'
        total = (
            f"{group}: {sum(step.parameters for step in part):,} parameters, {spoken_macs(sum(step.macs for step in part))} "
            f"MACs, {1000 * sum(step.seconds for step in part):.2f} ms"
        )
        repeated = group.startswith(("block", "stage"))
        blocks += repeated
        opened = "" if repeated and blocks > 1 else " open"
        found += f"<details{opened}><summary>{escape(total)}</summary>{table}</details>"
    note = (
        "Shapes are of what came out for this picture, MACs were counted while it ran, and times are the best of three. "
        "Measured step by step, with the attention maps written down, the whole is slower than the model in one go."
    )
    return f'<p class="note">{note}</p>{found}'


def _row(step: Step) -> str:
    cells = (
        f"<td>{escape(step.name)}</td><td>{spoken_shape(step.shape)}</td>"
        f"<td>{f'{step.parameters:,}' if step.parameters else ''}</td><td>{spoken_macs(step.macs) if step.macs else ''}</td>"
        f'<td>{1000 * step.seconds:.2f}</td><td class="eq">{escape(step.equation)}</td>'
        f'<td class="words">{escape(step.words)}</td>'
    )
    return f"<tr>{cells}</tr>"


def _costs(costs: Sequence[Cost]) -> str:
    own = costs[0]
    rows = ""
    for cost in costs:
        took = spoken_seconds(cost.seconds) + ("" if cost.measured else ", estimated")
        rows += (
            f"<tr><td>{cost.words}, {cost.size[0]} x {cost.size[1]}</td><td>{cost.tokens:,}</td><td>{spoken_macs(cost.macs)}"
            f"</td><td>{cost.macs / own.macs:,.1f}</td><td>{spoken_bytes(cost.map_bytes)}</td><td>{took}</td></tr>"
        )
    names = ("words", "tokens", "MACs", "times the patches'", "one block's maps", "time")
    heads = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    note = (
        '<p class="note">The same model with a word for each pixel. MACs and memory follow from the formula; times are '
        "measured on the model's own blocks where they fit, else estimated from the largest that did.</p>"
    )
    return f'{note}<div class="scroll"><table>{heads}{rows}</table></div>'


def spoken_shape(shape: Iterable[int]) -> str:
    return " x ".join(f"{length:,}" for length in shape)


def spoken_macs(macs: int) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if macs >= size:
            return f"{macs / size:.3g} {letter}" if macs < 999.5 * size else f"{macs / size:,.0f} {letter}"
    return str(macs)


def spoken_bytes(count: int) -> str:
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:,.1f} {name}"
    return f"{count} bytes"


def spoken_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>"


def _maps(pictures: Iterable[tuple[str, str]], least: str = "") -> str:
    style = f' style="grid-template-columns:repeat(auto-fill,minmax({least},1fr))"' if least else ""
    cells = "".join(f"<figure>{picture}<figcaption>{said}</figcaption></figure>" for picture, said in pictures)
    return f'<div class="maps"{style}>{cells}</div>'


def _image(pixels: UInt8[np.ndarray, "h w 3"], said: str, sharp: bool = True) -> str:
    kind = ' class="pixels"' if sharp else ""
    return f'<img{kind} src="{_data(pixels, sharp)}" alt="{escape(said)}">'


def _data(pixels: UInt8[np.ndarray, "h w 3"], exact: bool = True) -> str:
    file = io.BytesIO()
    kind = "PNG" if exact and pixels.shape[0] * pixels.shape[1] <= 2**17 else "JPEG"
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _to_one(values: Float[np.ndarray, "y x"]) -> Float[np.ndarray, "y x"]:
    return values / max(float(values.max()), 1e-12)


def _write(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
