"""A robustness run's figures, JSON and page. The page is one file that asks for nothing from outside."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from vitrail.analysis import robustness
from vitrail.analysis.figures import as_svg
from vitrail.analysis.figures_inside import save_both
from vitrail.analysis.figures_robustness import Line, Panel, altered_pictures, by_corruption, robustness_curves
from vitrail.analysis.robustness import Curve
from vitrail.core.runs import write_json, write_whole
from vitrail.core.types import Row
from vitrail.evaluation.metrics import spoken
from vitrail.experiments.page import PAGE
from vitrail.experiments.robustness import Finished, slug

STYLE = """<style>
h1.small { font-size: 2.6rem; } .note { max-width: 48rem; } section svg { margin: 0 0 1.2rem; }
section table { margin-bottom: 1.2rem; } details svg { margin-bottom: 1rem; }
</style>"""
DRAWN = 7
"""Most strengths of a test whose pictures are shown."""


@dataclass(frozen=True)
class Subject:
    """What a report is of. facts: lines for its table, by name; chance: per cent right by always saying one class."""

    title: str
    data: str
    names: tuple[str, ...]
    count: int
    chance: float
    facts: Mapping[str, str]
    command: str


@dataclass(frozen=True)
class Drawing:
    """A figure by the name of its file; draw: from the caption to the figure; on the page it has its caption below."""

    name: str
    caption: str
    draw: Callable[[str], Any]


@dataclass(frozen=True)
class Section:
    """claim: what the paper found."""

    title: str
    claim: str
    drawings: tuple[Drawing, ...]
    table: str = ""


def write(folder: Path, of: Subject, found: Finished, record: Mapping[str, Any]) -> None:
    """robustness.json, report.html and figures/ in `folder`. record: what else the JSON is to say."""
    parts = sections(of, found)
    (folder / "figures").mkdir(exist_ok=True)
    body = [STYLE, _opening(of, found)]
    for part in parts:
        html = f'<p class="note"><b>The paper:</b> {escape(part.claim)}</p>' if part.claim else ""
        for drawing in part.drawings:
            save_both(drawing.draw(drawing.caption), folder / "figures" / drawing.name)
            html += as_svg(drawing.draw(""), drawing.caption) + f'<p class="note">{escape(drawing.caption)}</p>'
        body.append(f"<section><h2>{escape(part.title)}</h2>\n{html}{part.table}</section>")
    body.append(f"<section><h2>Run it again</h2><pre>{escape(of.command)}</pre></section>")
    before, after = PAGE.replace("@title", escape(of.title).replace("@", "&#64;")).split("@body")
    raw = (before + "\n".join(body) + after).encode("utf-8", "backslashreplace")
    write_whole(folder / "report.html", lambda part: _write(part, raw))
    write_json(folder / "robustness.json", {**record, **as_json(found)})


def as_json(found: Finished) -> dict[str, Any]:
    """Every number of the run, with intervals and counts."""
    curves = []
    for curve in found.curves.values():
        data = robustness.to_json(curve)
        for point in data["points"]:
            del point["right"]
        curves.append(data)
    groups: dict[str, Any] = {}
    if means := corruption_means(found):
        groups = {name: [asdict(row) for row in rows] for name, rows in means.items()}
    return {
        "unaltered": {name: asdict(row) for name, row in found.clean.items()},
        "curves": curves,
        "mean over corruptions, by severity from 0": groups,
        "local classifier and edges": found.checks,
        "properties": found.properties,
    }


def corruption_means(found: Finished) -> dict[str, list[Row]]:
    curves = [curve for curve in found.curves.values() if curve.group == "corruptions"]
    return {name: robustness.mean_of_curves(curves, name) for name in found.clean} if curves else {}


def sections(of: Subject, found: Finished) -> list[Section]:
    """Those whose tests were done."""
    made = [_drops(of, found), _shuffles(of, found), _textures(of, found), _patches(of, found)]
    made += [_corruptions(of, found), _properties(of, found)]
    return [section for section in made if section is not None]


def _drops(of: Subject, found: Finished) -> Section | None:
    curves = [curve for curve in found.curves.values() if curve.group == "drop"]
    if not curves:
        return None
    panels = [
        Panel(
            curve.name,
            "area dropped (%)",
            "accuracy (%)",
            tuple(
                Line(name, tuple(100 * (p.share or 0.0) for p in curve.points), _rows(curve, name), number)
                for number, name in enumerate(of.names)
            ),
            level=("one class", of.chance),
            right=100.0,
        )
        for curve in curves
    ]
    caption = (
        f"Accuracy on {of.count:,} pictures against the area whose pixels are lost, with 95 % intervals. Salient patches "
        f"are the fewest that hold {_shares(curves)} of the attention, non-salient ones all but those that hold the "
        "rest; so their places on the axis are means over pictures."
    )
    claim = (
        "ViTs are highly robust to severe occlusions, and keep as much as 60 % top-1 accuracy on ImageNet with 80 % of the "
        "picture dropped at random (abstract)."
    )
    pictures = tuple(_strip(found, curve.name) for curve in curves)
    return Section("Patches dropped", claim, (_curves("drop", caption, panels), *pictures), _table(curves, of.names))


def _shares(curves: Sequence[Curve]) -> str:
    """10, 20, 95 %: what was asked for."""
    asked = sorted({point.strength for curve in curves for point in curve.points if point.strength > 0})
    return ", ".join(f"{100 * share:g}" for share in asked) + " %"


def _shuffles(of: Subject, found: Finished) -> Section | None:
    curve = found.curves.get("shuffle")
    if curve is None:
        return None
    x = tuple(max(1.0, p.strength) for p in curve.points)
    lines = tuple(Line(name, x, _rows(curve, name), number) for number, name in enumerate(of.names))
    ticks = tuple((place, f"{place:g}") for place in x)
    level = ("one class", of.chance)
    panels = [Panel("shuffled", "cells a side (log scale)", "accuracy (%)", lines, ticks=ticks, level=level, log=True)]
    caption = (
        f"Accuracy on {of.count:,} pictures whose cells are in an order of chance, each in its own; 1 is unaltered."
    )
    claim = "ViTs are highly robust to perturbations, spatial permutations among them (abstract)."
    return Section(
        "Patches shuffled", claim, (_curves("shuffle", caption, panels), _strip(found, curve.name)),
        _table([curve], of.names),
    )  # fmt: skip


def _textures(of: Subject, found: Finished) -> Section | None:
    curves = [found.curves[name] for name in ("texture removed", "shape removed") if name in found.curves]
    if not curves:
        return None
    panels = []
    for curve in curves:
        x = tuple(float(place) for place in range(len(curve.points)))
        lines = tuple(Line(name, x, _rows(curve, name), n, apart=True) for n, name in enumerate(of.names))
        ticks = tuple((place, "\n".join(p.label.rsplit(" ", 1))) for place, p in zip(x, curve.points, strict=True))
        panels.append(Panel(curve.name, "", "accuracy (%)", lines, ticks=ticks, level=("one class", of.chance)))
    caption = (
        f"Accuracy on {of.count:,} pictures without texture (diffused: Perona and Malik 1990; restyled, outlines: noise "
        "whose contrast follows the original's edges) and without shape (cells shuffled; phases at random), 95 % intervals."
    )
    claim = (
        "ViTs are significantly less biased towards local textures than CNNs; properly trained to encode shape, they "
        "recognise it about as people do (abstract)."
    )
    pictures = tuple(_strip(found, curve.name) for curve in curves)
    drawings = (_curves("texture-and-shape", caption, panels, columns=2), *pictures)
    return Section("Texture or shape removed", claim, drawings, _checks(found.checks) + _table(curves, of.names))


def _patches(of: Subject, found: Finished) -> Section | None:
    curves = [curve for curve in found.curves.values() if curve.group == "patch"]
    if not curves:
        return None
    panels = [
        Panel(
            curve.name,
            "area covered (%)",
            "accuracy (%)",
            tuple(
                Line(name, tuple(100 * (p.share or 0.0) for p in curve.points), _rows(curve, name), number)
                for number, name in enumerate(of.names)
            ),
            level=("one class", of.chance),
        )
        for curve in curves
    ]
    caption = (
        f"Accuracy on {len(curves[0].points[0].right[of.names[0]]):,} pictures with a square patch at a random place and "
        "quarter turn (Brown et al. 2017), made on as many others against the model named, or of plain noise."
    )
    claim = "ViTs are highly robust to perturbations, adversarial ones among them (abstract)."
    pictures = tuple(_strip(found, curve.name) for curve in curves)
    return Section(
        "Adversarial patches", claim, (_curves("patch", caption, panels), *pictures), _table(curves, of.names)
    )


def _corruptions(of: Subject, found: Finished) -> Section | None:
    means = corruption_means(found)
    if not means:
        return None
    curves = [curve for curve in found.curves.values() if curve.group == "corruptions"]
    lines = tuple(
        Line(name, tuple(float(s) for s in range(len(means[name]))), tuple(means[name]), n)
        for n, name in enumerate(of.names)
    )
    panels = [Panel("mean over corruptions", "severity", "accuracy (%)", lines, level=("one class", of.chance))]
    caption = (
        f"Mean accuracy on {of.count:,} pictures over {len(curves)} corruptions (Hendrycks and Dietterich 2019) by "
        "severity; 0 is unaltered. The interval is over pictures."
    )
    each = {curve.name: {name: robustness.mean_of_points(curve, name) for name in of.names} for curve in curves}
    apart = "The same by corruption, mean over the five severities; the lines are 95 % intervals over pictures."
    drawings = [
        _curves("corruptions", caption, panels),
        Drawing("by-corruption", apart, lambda caption: by_corruption(each, found.clean, caption)),
    ]
    drawings += [_strip(found, curve.name, rows=1) for curve in curves]
    claim = "ViTs are highly robust to perturbations, natural ones among them (abstract)."
    return Section("Common corruptions", claim, tuple(drawings), _table(curves, of.names))


def _properties(of: Subject, found: Finished) -> Section | None:
    if not found.properties:
        return None
    shifts, radii, top = [], [], 0.0
    for number, name in enumerate(of.names):
        said = found.properties[name]
        x = tuple(float(one["pixels"]) for one in said["shifts"])
        for what, label, dashes in (("error", name, "solid"), ("unmoved", f"{name}, map left as it was", "dotted")):
            rows = tuple(Row(**one[what]) for one in said["shifts"])
            top = max([top, *(row.value for row in rows)])
            if rows:
                shifts.append(Line(label, x, rows, number, dashes))
        depth = max(1, len(said["radii"]) - 1)
        radii.append(
            Line(
                name,
                tuple(100 * place / depth for place in range(len(said["radii"]))),
                tuple(Row(name, value / said["even"], unit="") for value in said["radii"]),
                number,
            )
        )
    ticks = tuple((place, f"{place:g}") for place in sorted({place for line in shifts for place in line.x}))
    panels = [
        Panel("a shifted picture", "pixels to the right (log scale)", "relative error", tuple(shifts), ticks=ticks,
              top=1.1 * top or 1.0, log=True),
        Panel("how far layers read", "depth (%)", "distance / that of even reading", tuple(radii), top=None),
    ]  # fmt: skip
    caption = (
        "Left: |f(g(x)) - g(f(x))| / |g(f(x))| of the last features when the picture is shifted round its border. Right: "
        "the mean distance of the pixels that the middle cell depends on (effective receptive field), over that of all."
    )
    lines = []
    for name in of.names:
        order = found.properties[name].get("permutation")
        if order:
            lines.append(
                f"{name}: with its patches in another order the features follow with a relative error of "
                f"{order['with_positions']:.3g} with positions, {order['without_positions']:.2g} without in fp32, "
                f"{order['exact']:.2g} with sums that have no order."
            )
        within = found.properties[name].get("attention within")
        if within:
            lines.append(
                f"{name}: within {within['pixels'][0]:g} pixels stay {100 * within['shares'][0][0]:.0f} % of the first "
                f"block's attention and {100 * within['shares'][-1][0]:.0f} % of the last's; evenly it would be "
                f"{100 * within['even'][0]:.0f} %."
            )
    table = "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
    return Section("Equivariance and locality", "", (_curves("properties", caption, panels, columns=2),), table)


def _rows(curve: Curve, name: str) -> tuple[Row, ...]:
    return tuple(point.row(name) for point in curve.points)


def _curves(name: str, caption: str, panels: Sequence[Panel], columns: int = 3) -> Drawing:
    return Drawing(name, caption, lambda said: robustness_curves(panels, said, columns))


def _strip(found: Finished, name: str, rows: int = 3) -> Drawing:
    curve, strip = found.curves[name], found.strips[name]
    count = strip.shape[1]
    # Some, evenly spread, the first and the last among them.
    places = sorted({round(place * (count - 1) / (DRAWN - 1)) for place in range(DRAWN)}) if count > DRAWN else None
    chosen = list(range(count)) if places is None else places
    labels = [curve.points[place].label for place in chosen]
    caption = f"{name[:1].upper()}{name[1:]}: pictures as the models were given them."
    shown = strip[:rows, chosen]
    return Drawing(f"pictures-{slug(name)}", caption, lambda said: altered_pictures(shown, labels, said))


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return ""
    lines = [
        (
            escape(one["alteration"]),
            escape(one["removes"]),
            escape(spoken(Row(**one["local"]))),
            escape(spoken(Row(**one["local, learned again"]))),
            escape(spoken(Row(**one["edges"]))),
        )
        for one in checks
    ]
    note = (
        f"What is gone and what is left: a classifier of windows of {checks[0]['window']} pixels, wherever they lie, that "
        "learned from unaltered pictures, and one that learned from pictures altered alike (chance is "
        f"{checks[0]['chance']:.1f} %); and how far edge energies agree with the original's."
    )
    heads = ("alteration", "removes", "local windows", "learned again", "edges, correlation")
    return f'<p class="note">{escape(note)}</p>{_html(heads, lines)}'


def _table(curves: Sequence[Curve], names: Sequence[str]) -> str:
    lines = [
        (escape(curve.name), escape(p.label), *(escape(spoken(p.row(name))) for name in names))
        for curve in curves
        for p in curve.points
    ]
    table = _html(("test", "strength", *names), lines)
    return f"<details><summary>All {len(lines)} numbers</summary>{table}</details>"


def _html(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _opening(of: Subject, found: Finished) -> str:
    values = "".join(
        f'<div><dt>{escape(name)}</dt><dd>{row.value:.2f}<span class="unit"> %</span>'
        f'<span class="between">{row.low:.2f} to {row.high:.2f}</span></dd></div>'
        for name, row in found.clean.items()
    )
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in of.facts.items())
    return (
        f'<p class="origin">{escape(of.data)}</p><h1 class="small">{escape(of.title)}</h1>'
        f'<p class="lead">The tests of "Intriguing Properties of Vision Transformers" (arXiv 2105.10497) on {of.count:,} '
        f'pictures. Unaltered, these are right:</p><dl class="figures">{values}</dl>'
        f'<section><h2>What was done</h2><dl class="facts">{facts}</dl></section>'
    )


def _write(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
