"""report.html of `vitrail fit`: how good the model is, and which pictures to look at, in one file that can be mailed.

Unusual: most of it is about the photos, not about the model. What is likely mislabelled or twice there is shown as pictures,
since only a person can tell. Every word that comes from outside is escaped where it is put in.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vitrail.analysis.figures import as_svg, confusion, curves
from vitrail.core.runs import RunFolder, write_whole
from vitrail.core.types import Row, Sample
from vitrail.data.decode import UnreadablePicture
from vitrail.data.survey import Pair
from vitrail.experiments.page import PAGE
from vitrail.experiments.photos_data import FEW, Photos
from vitrail.experiments.photos_folder import PROMISE, Named, State
from vitrail.experiments.report import thumbnail

SUSPECTS, NEXT, PAIRS, MISTAKES = 48, 12, 24, 24
"""Pictures shown at most; of suspects that are not counted as wrong, NEXT."""
MOST_DRAWN = 60
STYLE = """<style>
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.6rem 1.5rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
.pair p { grid-column: 1 / -1; margin: 0; font-size: .82rem; }
.pair figure { margin: 0; min-width: 0; }
figcaption .file { color: var(--soft); font-size: .9em; }
</style>"""


def write_report(
    state: State,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    folder: RunFolder,
    commands: Sequence[str],
) -> None:
    """Writes report.html. config, metrics: what config.json and metrics.jsonl hold. commands: to do next."""
    title = f"{folder.path.resolve().name}: {state.rows[0].value:.1f} %"
    sections = [
        _headline(state),
        _section("Likely mislabelled", _suspects(state)),
        _section("The same picture twice", _duplicates(state.photos)),
        _section("Worst mistakes", _mistakes(state)),
        _section("What is taken for what", _confusions(state)),
        _section("Classes", _classes(state)),
        _section("How sure it must be", _trust(state)),
        _section("Next", _next(commands)),
        _section("Training", as_svg(curves(metrics), "Loss, validation accuracy and rate")) if metrics else "",
        _section("The record", _record(config)),
    ]
    before, after = PAGE.replace("@title", escape(title).replace("@", "&#64;")).split("@body")
    page = before + STYLE + "\n".join(filter(None, sections)) + after
    # Class names and paths may hold what is no valid UTF-8.
    raw = page.encode("utf-8", "backslashreplace")
    write_whole(folder.file("report.html"), lambda part: _write(part, raw))


def _write(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>"


def _headline(state: State) -> str:
    first, photos = state.rows[0], state.photos
    sure = "" if first.low is None else f", with 95 % confidence between {first.low:.1f} and {first.high:.1f} %"
    where = {
        "cross-validated": "of your pictures are recognised by models that had not seen them (cross-validated)",
        "held out": "of the pictures that were held out are recognised",
    }.get(
        state.headline.name,
        f"of your {escape(state.headline.name)} pictures are recognised, none of which taught or chose",
    )
    others = "".join(
        f"<div><dt>{escape(row.name.removeprefix(state.headline.name).strip())}</dt><dd>{_value(row)}</dd></div>"
        for row in state.rows[1:]
    )
    said = filter(None, (state.comparison.said() if state.comparison else "", state.late))
    notes = "\n".join(f'<p class="note">{escape(line[0].upper() + line[1:])}.</p>' for line in said)
    return (
        f'<p class="origin">{escape(photos.origin)}: {photos.count:,} pictures of {len(photos.classes)} classes; '
        f"{escape(state.what)}</p>\n"
        f'<h1>{first.value:.1f}<span class="unit"> %</span></h1>\n'
        f'<p class="lead">{first.count or 0:,} pictures: {first.value:.1f} % {where}{sure}.</p>\n{notes}'
        f'<dl class="figures">{others}</dl>'
    )


def _value(row: Row) -> str:
    digits = 1 if row.unit == "%" else 3
    unit = f'<span class="unit"> {escape(row.unit)}</span>' if row.unit else ""
    between = "" if row.low is None else f'<span class="between">{row.low:.{digits}f} to {row.high:.{digits}f}</span>'
    return f"{row.value:.{digits}f}{unit}{between}"


def _suspects(state: State) -> str:
    likely, names = state.likely, state.photos.classes
    after = [named for named in state.suspects if not named.suspect.likely][:NEXT]

    def card(named: Named) -> str:
        found = named.suspect
        return _card(
            named.sample,
            f"labelled <b>{escape(names[found.given])}</b> {_percent(found.probability_of_given)}<br>"
            f"looks like <b>{escape(names[found.other])}</b> {_percent(found.probability)}",
        )

    shown = likely[:SUSPECTS]
    more = f"; the first {len(shown)} are shown, all are in results.json" if len(likely) > len(shown) else ""
    note = (
        f"{len(likely):,} that a model which had not seen them takes for another class than they are labelled with{more}. "
        "Some will be right and merely hard: look before you move them."
        if likely
        else "None stands out."
    )
    rest = (
        f'<details><summary>The next in line</summary><div class="mistakes">{"".join(map(card, after))}</div></details>'
        if after
        else ""
    )
    return f'<p class="note">{note}</p><div class="mistakes">{"".join(map(card, shown))}</div>{rest}'


def _duplicates(photos: Photos) -> str:
    pairs = photos.seen.pairs
    if not pairs:
        return '<p class="note">No picture lies in two classes or in two splits.</p>'
    wanted = {name for pair in pairs[:PAIRS] for name in pair.names}
    sources = (photos.train, *photos.own.values())
    samples = {s.name: s for source in sources for s in map(source.__getitem__, range(len(source))) if s.name in wanted}

    def card(pair: Pair) -> str:
        classes = " and ".join(dict.fromkeys(map(escape, pair.classes)))
        splits = " and ".join(dict.fromkeys(pair.splits))
        kind = "Equal byte for byte" if pair.exact else "Look the same"
        figures = "".join(_card(samples[name], "") for name in pair.names if name in samples)
        return f'<div class="pair"><p>{kind}: in <b>{classes}</b>, {escape(splits)}</p>{figures}</div>'

    more = f"; the first {PAIRS} are shown, all are in results.json" if len(pairs) > PAIRS else ""
    note = (
        f"{len(pairs):,} pairs{more}. In two classes, one of the labels is wrong; in two splits, the accuracy comes out too "
        "good."
    )
    return f'<p class="note">{note}</p><div class="pairs">{"".join(map(card, pairs[:PAIRS]))}</div>'


def _mistakes(state: State) -> str:
    names, part = state.photos.classes, state.headline
    mistakes = part.tally.worst(MISTAKES)
    if not mistakes:
        return '<p class="note">There are none.</p>'
    cards = [
        _card(
            part.source[mistake.index],
            f"<b>{escape(names[mistake.predicted])}</b> {_percent(mistake.probability)}<br>"
            f"is {escape(names[mistake.true])} {_percent(mistake.probability_of_true)}",
        )
        for mistake in mistakes
    ]
    note = "What the model got wrong while most sure of itself: what it saw, and what the label says."
    return f'<p class="note">{note}</p><div class="mistakes">{"".join(cards)}</div>'


def _card(sample: Sample, words: str) -> str:
    """A picture with words (HTML already) and its file's name below."""
    name = escape(sample.name)
    try:
        uri, small = thumbnail(sample.picture, sample.name, quality=80)
    except UnreadablePicture:
        return f'<figure title="{name}"><div class="frame"></div><figcaption>{words}<br>cannot be read</figcaption></figure>'
    kind = ' class="pixelated"' if small else ""
    short = escape("/".join(Path(sample.name).parts[-2:]))
    words = f"{words}<br>" if words else ""
    return (
        f'<figure title="{name}"><div class="frame"><img src="{uri}" alt="{name}" loading="lazy"{kind}></div>'
        f'<figcaption>{words}<span class="file">{short}</span></figcaption></figure>'
    )


def _confusions(state: State) -> str:
    tally, names = state.headline.tally, state.photos.classes
    figure = ""
    if len(names) <= MOST_DRAWN:
        figure = as_svg(confusion(tally.confusion, names), "Confusion matrix: true classes against predicted ones")
    lines = [(escape(true), escape(seen), f"{count:,}") for true, seen, count in state.confusions(10)]
    table = _table(("is", "taken for", "times"), lines) if lines else "<p>Nothing.</p>"
    return f'<div class="beside"><div class="wide">{figure}</div><div>{table}</div></div>'


def _classes(state: State) -> str:
    photos, lines = state.photos, []
    for c in state.headline.tally.per_class:
        if c.recall is None:
            continue
        bar = f'<span class="bar"><i style="width:{100 * c.recall:.1f}%"></i></span>'
        between = f"{100 * (c.low or 0):.0f} to {100 * (c.high or 0):.0f}"
        precision = "–" if c.precision is None else f"{100 * c.precision:.1f}"
        lines.append(
            (escape(photos.classes[c.label]), f"{c.count:,}", bar, f"{100 * c.recall:.1f}", between, precision)
        )
    table = _table(("class", "pictures", "", "recall %", "95 %", "precision %"), lines)
    small = photos.too_small()
    note = (
        f"Fewer than {FEW} pictures, all splits together, too few to judge by: "
        + ", ".join(f"<b>{escape(name)}</b> ({count})" for name, count in small)
        + ". A few more of each help most."
        if small
        else f"All splits together, each class has {FEW} pictures at least."
    )
    return f'<p class="note">{note}</p>{table}'


def _trust(state: State) -> str:
    trusted = state.trusted
    if not trusted.trusted:
        text = (
            f"The {trusted.of} pictures that it was not trained on are too few, or too often mistaken, to promise "
            f"{100 * PROMISE:g} % for any of its answers; add pictures, or promise less (--promise)."
        )
    else:
        unsure = trusted.of - trusted.trusted
        text = (
            f"Answers with a confidence of <b>{trusted.confidence:.3f}</b> or more are right "
            f"at least {100 * PROMISE:g} % of the time "
            f"(found: {100 * trusted.accuracy:.1f} %, no less than {100 * trusted.low:.1f} % with 95 % confidence). Of "
            f"{trusted.of:,} pictures that it was not trained on, {unsure:,} would have been left unsure."
        )
    return f'<p class="note">{text}</p>'


def _next(commands: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(commands))}</pre>"


def _record(config: Mapping[str, Any]) -> str:
    data = config["data"]
    unreadable = "".join(f"<li>{escape(str(item['reason']))}</li>" for item in data["unreadable"][:100])
    named = f"<details><summary>Pictures left out</summary><ul>{unreadable}</ul></details>" if unreadable else ""
    facts = {
        **{f"pictures, {split}": f"{count:,}" for split, count in data["counts"].items()},
        "of these held out": f"{data['held_out']:,}",
        "unreadable, left out": f"{len(data['unreadable']):,}",
        "fingerprint": str(data["fingerprint"])[:16],
        **{name: value for name, value in config["settings"].items() if value not in ("", None)},
        **config["versions"],
        "commit": str(config["commit"] or "–")[:12],
    }
    lines = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    folded = f'<details><summary>Settings and versions</summary><dl class="facts">{lines}</dl></details>'
    return f"<pre>{escape(config['command'])}</pre>{named}{folded}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _percent(share: float) -> str:
    return f'<span class="soft">{100 * share:.0f} %</span>' if share >= 0.01 else '<span class="soft">&lt;1 %</span>'
