"""report.html: a run on one page, in one file that asks for nothing from outside and can be mailed.

Figures are inline SVG that takes the page's colours, mistakes are data URIs. Every word that comes from outside (class
names, paths, settings) is escaped where it is put in.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail.analysis.figures import as_svg, confusion, curves, reliability
from vitrail.core.runs import write_whole
from vitrail.core.types import Row, Source
from vitrail.data.decode import decode
from vitrail.evaluation.metrics import Mistake, Tally
from vitrail.experiments.page import PAGE

MISTAKES = 24
THUMBNAIL = 224
"""Pixels of a mistake's longer side: twice what the page shows, for sharp screens."""
MOST_DRAWN = 200
"""The most classes of which a confusion matrix says anything on a page."""
MOST_OPEN = 40
"""Longer tables begin folded."""


def write_report(
    folder: Path,
    *,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    tally: Tally,
    rows: Sequence[Row],
    source: Source,
    classes: Sequence[str],
) -> Path:
    """Writes folder/report.html and returns its path.

    config, metrics: what config.json and metrics.jsonl hold. tally, rows: what was measured on `source`; the first row
    is the headline, and its name begins with that of the split. classes: the names, in the order of the tally.
    """
    title = f"{folder.resolve().name}: {rows[0].value:.2f} %"
    sections = [
        _headline(rows, config),
        _section("Training", as_svg(curves(metrics), "Loss, validation accuracy and learning rate against the step")),
        _section("Worst mistakes", _mistakes(tally.worst(MISTAKES), source, classes)),
        _section("What is taken for what", _confusions(tally, classes)),
        _section("Classes", _classes(tally, classes)),
        _section("Calibration", _calibration(tally)),
        _section("Data", _data(config.get("data", {}))),
        _section("Run it again", _again(config)),
    ]
    return _write_page(folder, title, sections)


def write_task_report(
    folder: Path,
    *,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    sections: Mapping[str, str],
) -> Path:
    """Writes folder/report.html of a run that learned no classes, and returns its path.

    config, metrics: as in `write_report`. rows: what was measured, the headline first; there may be none. sections: HTML by
    title, after the curves; empty ones are left out.
    """
    parts = [
        _task_headline(rows, config),
        _section("Training", as_svg(curves(metrics), "Loss, validation accuracy and learning rate against the step")),
        *(_section(title, body) for title, body in sections.items() if body),
        _section("Data", _data(config.get("data", {}))),
        _section("Run it again", _again(config)),
    ]
    said = f": {_plain(rows[0])}" if rows else ""
    return _write_page(folder, f"{folder.resolve().name}{said}", parts)


def _write_page(folder: Path, title: str, sections: Sequence[str]) -> Path:
    before, after = PAGE.replace("@title", escape(title).replace("@", "&#64;")).split("@body")
    page = before + "\n".join(sections) + after
    # Class names and paths may hold what is no valid UTF-8.
    raw = page.encode("utf-8", "backslashreplace")
    path = folder / "report.html"
    write_whole(path, lambda part: _write(part, raw))
    return path


def _write(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>"


def _headline(rows: Sequence[Row], config: Mapping[str, Any]) -> str:
    first = rows[0]
    split = first.name.removesuffix("top-1").strip() or "evaluated"
    sure = "" if first.low is None else f", with 95 % confidence between {first.low:.2f} and {first.high:.2f} %"
    if first.expected is not None:
        sure += f"; expected were {first.expected:.2f} %"
    of = f"of {first.count:,} {escape(split)} pictures are recognised{sure}."
    others = "".join(f"<div><dt>{escape(_short(row, split))}</dt><dd>{_value(row)}</dd></div>" for row in rows[1:])
    return (
        f"{_of(config)}\n"
        f'<h1>{first.value:.2f}<span class="unit"> %</span></h1>\n<p class="lead">{of}</p>\n'
        f'<dl class="figures">{others}</dl>'
    )


def _task_headline(rows: Sequence[Row], config: Mapping[str, Any]) -> str:
    if not rows:
        return f"{_of(config)}\n<h1>done</h1>\n"
    first = rows[0]
    digits, unit = (2, " %") if first.unit == "%" else (3, f" {first.unit}" if first.unit else "")
    sure = (
        ""
        if first.low is None
        else f", with 95 % confidence between {first.low:.{digits}f} and {first.high:.{digits}f}"
    )
    of = f"{escape(first.name)}{'' if first.count is None else f', of {first.count:,}'}{sure}."
    if first.expected is not None:
        of += f" Expected were {first.expected:.{digits}f}."
    others = "".join(f"<div><dt>{escape(row.name)}</dt><dd>{_value(row)}</dd></div>" for row in rows[1:])
    return (
        f"{_of(config)}\n"
        f'<h1>{first.value:.{digits}f}<span class="unit">{escape(unit)}</span></h1>\n<p class="lead">{of}</p>\n'
        f'<dl class="figures">{others}</dl>'
    )


def _of(config: Mapping[str, Any]) -> str:
    origin = escape(str(config.get("data", {}).get("origin", "")))
    model = escape(str(config.get("settings", {}).get("model", "")))
    return f'<p class="origin">{model}{" on " if model and origin else ""}{origin}</p>'


def _plain(row: Row) -> str:
    return f"{row.value:.2f} %" if row.unit == "%" else f"{row.value:.3f} {row.unit}".rstrip()


def _short(row: Row, split: str) -> str:
    return row.name.removeprefix(split).strip()


def _value(row: Row) -> str:
    digits = 2 if row.unit == "%" else 3
    unit = f'<span class="unit"> {escape(row.unit)}</span>' if row.unit else ""
    between = "" if row.low is None else f'<span class="between">{row.low:.{digits}f} to {row.high:.{digits}f}</span>'
    return f"{row.value:.{digits}f}{unit}{between}"


def _mistakes(mistakes: Sequence[Mistake], source: Source, classes: Sequence[str]) -> str:
    if not mistakes:
        return "<p>There are none.</p>"
    cards = []
    for mistake in mistakes:
        sample = source[mistake.index]
        uri, pixelated = thumbnail(sample.picture, sample.name)
        kind = ' class="pixelated"' if pixelated else ""
        cards.append(
            f'<figure title="{escape(sample.name)}"><div class="frame"><img src="{uri}" alt="{escape(sample.name)}"'
            f"{kind}></div><figcaption>"
            f"<b>{escape(classes[mistake.predicted])}</b> {_percent(mistake.probability)}<br>"
            f"is {escape(classes[mistake.true])} {_percent(mistake.probability_of_true)}</figcaption></figure>"
        )
    note = "The pictures that the model got wrong while most sure of itself: what it saw, and what it is."
    return f'<p class="note">{note}</p><div class="mistakes">{"".join(cards)}</div>'


def thumbnail(picture: Any, name: str, quality: int = 85) -> tuple[str, bool]:
    """A data URI, and whether the picture is so small that it is to be shown pixel by pixel."""
    image = decode(picture, 3, (THUMBNAIL, THUMBNAIL), name)
    small = max(image.size) < THUMBNAIL // 2
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=quality)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", small


def _confusions(tally: Tally, classes: Sequence[str]) -> str:
    figure = ""
    if len(classes) <= MOST_DRAWN:
        figure = as_svg(confusion(tally.confusion, classes), "Confusion matrix: true classes against predicted ones")
    pairs, counts = np.unique(np.stack([tally.true, tally.predicted], 1)[tally.rank > 0], axis=0, return_counts=True)
    totals = np.bincount(tally.true, minlength=len(classes))
    lines = [
        (escape(classes[true]), escape(classes[predicted]), f"{count:,}", f"{100 * count / totals[true]:.1f}")
        for (true, predicted), count in (
            (pairs[place].tolist(), int(counts[place])) for place in np.argsort(-counts, kind="stable")[:10]
        )
    ]
    table = _table(("is", "taken for", "times", "% of the class"), lines) if lines else "<p>Nothing.</p>"
    return f'<div class="beside"><div class="wide">{figure}</div><div>{table}</div></div>'


def _classes(tally: Tally, classes: Sequence[str]) -> str:
    lines = []
    for c in tally.per_class:
        if c.recall is None:
            continue
        bar = f'<span class="bar"><i style="width:{100 * c.recall:.1f}%"></i></span>'
        between = f"{100 * (c.low or 0):.1f} to {100 * (c.high or 0):.1f}"
        lines.append(
            (
                escape(classes[c.label]),
                f"{c.count:,}",
                bar,
                _number(c.recall),
                between,
                _number(c.precision),
                _number(c.f1),
            )
        )
    heads = ("class", "pictures", "", "recall %", "95 %", "precision %", "F1 %")
    return _folded(_table(heads, lines), len(lines), "classes")


def _calibration(tally: Tally) -> str:
    figure = as_svg(reliability(tally.calibration()), "Reliability diagram: accuracy against predicted probability")
    text = (
        f"Where the bars meet the dashed line, a probability of 80 % means right 4 times in 5. Over 15 bins the mean "
        f"gap, weighted by pictures, is <b>{100 * tally.calibration_error:.2f} %</b> (expected calibration error); the "
        f"mean negative log-likelihood is <b>{tally.mean_loss:.4f}</b> nats."
    )
    return f'<div class="beside"><div>{figure}</div><p class="note">{text}</p></div>'


def _data(data: Mapping[str, Any]) -> str:
    unreadable = list(data.get("unreadable", ()))
    facts = {
        "origin": data.get("origin", ""),
        **({"classes": len(data["classes"])} if data.get("classes") else {}),
        **{f"pictures, {split}": f"{count:,}" for split, count in data.get("counts", {}).items()},
        "unreadable, left out": f"{len(unreadable):,}",
        "fingerprint": str(data.get("fingerprint", ""))[:16],
    }
    named = "".join(
        f"<li>{escape(str(one.get('reason', one)) if isinstance(one, Mapping) else str(one))}</li>"
        for one in unreadable[:100]
    )
    more = f"<p>and {len(unreadable) - 100} more</p>" if len(unreadable) > 100 else ""
    named = f"<details><summary>Pictures left out</summary><ul>{named}</ul>{more}</details>" if named else ""
    return _facts(facts) + named


def _again(config: Mapping[str, Any]) -> str:
    settings, versions = config.get("settings", {}), config.get("versions", {})
    commit = {"commit": config["commit"]} if config.get("commit") else {}
    return (
        f"<pre>{escape(str(config.get('command', '')))}</pre>"
        f"<details><summary>All {len(settings)} settings</summary>{_facts(_flat(settings))}</details>"
        f"<details><summary>Versions</summary>{_facts(_flat({**versions, **commit}))}</details>"
    )


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested tables as one, with dotted names."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{before}{name}."))
        else:
            flat[before + name] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return flat


def _facts(facts: Mapping[str, Any]) -> str:
    lines = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v)) or '–'}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{lines}</dl>'


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _folded(table: str, count: int, what: str) -> str:
    return table if count <= MOST_OPEN else f"<details><summary>All {count:,} {what}</summary>{table}</details>"


def _percent(share: float) -> str:
    percent = 100 * share
    return f'<span class="soft">{percent:.0f} %</span>' if percent >= 1 else '<span class="soft">&lt;1 %</span>'


def _number(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
