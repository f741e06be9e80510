"""`vitrail evaluate W --data D`: exact measurements of a classifier on labelled pictures.

The data may list their classes in another order than the model's, and lack some: they are matched by name. ImageNet and
its relatives, given as `NAME:PATH`, are measured as their owners do (evaluation/suites.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.commands.predict import printable
from vitrail.commands.reading import Checkpoint
from vitrail.core import ranks
from vitrail.core.device import cores
from vitrail.core.errors import UserError
from vitrail.core.runs import read_json
from vitrail.core.types import Source
from vitrail.data import benchmarks, splits
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import listed, subset
from vitrail.data.transforms import Transform
from vitrail.evaluation import suites
from vitrail.evaluation.metrics import ClassResult, Tally, spoken
from vitrail.evaluation.suites import Relabelled, Suite
from vitrail.models.classifier import Classifier

Split = Literal["", "test", "validation", "train"]
MOST_CLASSES = 60
"""The most classes that are listed on a terminal, and whose confusion matrix is part of the JSON."""


@dataclass(frozen=True)
class Settings:
    """Top-1, top-5, per class, calibration: with 95 % intervals and the exact count."""

    weights: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint of any known library, or an id (hf:OWNER/NAME, official:NAME, timm:NAME)."""
    data: str
    """A folder, a CSV, JSON or parquet file, hub:NAME or sample:NAME, as for training; or a published set in its owners'
    files: imagenet, imagenet-v2, imagenet-a, imagenet-r, imagenet-sketch, objectnet, cifar10, cifar100, pets, flowers or
    vtab/TASK, then a colon and the folder."""
    labels: suites.Truth = "original"
    """Of ImageNet's validation pictures: their original labels, or all that are right (ReaL, arXiv 2006.07159)."""
    split: Split = ""
    """Which part of the data; none: test, else validation (their own, or what the run held out), else all."""
    json: bool = False
    """Print everything as one JSON object."""
    batch: int = 128
    """Pictures looked at together; no result depends on it."""
    workers: int = -1
    """Processes that decode pictures; -1: one a core."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


def run(settings: Settings) -> int:
    """On this process, or under torchrun on all of them: each looks at its share, and the first one tells."""
    if settings.batch < 1:
        raise UserError(f"--batch is {settings.batch}; give at least 1.")
    with ranks.together(settings.checkpoint.on()):
        return measured(settings)


def measured(settings: Settings) -> int:
    model = settings.checkpoint.classifier(settings.weights)
    found, what, notes = choose(settings.data, settings.split, settings.weights)
    suite = counting(settings, model, found)
    source, names = suite.source, suite.source.classes
    console = Console(stderr=True, soft_wrap=True)
    for note in (*notes, *suite.notes) if ranks.first() else ():
        console.print(Text(note))
    given = settings.checkpoint
    # Shared by several processes it stays what was asked for, which they can share.
    batch = min(settings.batch, len(source)) if ranks.count() == 1 else settings.batch
    of = given.asking(model, batch=batch, pictures=len(source), weights=settings.weights)
    loader = PictureLoader(
        source,
        Transform(model.preprocess),
        Order(len(source), batch, len(source), shuffle=False),
        workers=settings.workers if settings.workers >= 0 else cores(),
    )
    tally = suite.measure(model, loader, device=given.on(), precision="fp32" if of else given.autocast, of=of)
    problems = {place: why for part in ranks.gather_objects(loader.problems) for place, why in part.items()}
    if len(problems) == len(source):
        raise UserError(f"None of the {len(source)} pictures of {settings.data} could be read; check the files.")
    rows = suite.rows(tally, len(source) - len(problems))
    if not ranks.first():
        return 0
    if settings.json:
        result = {
            "weights": str(settings.weights),
            "data": settings.data,
            "split": what,
            "labels": settings.labels,
            "engine": of.name if of else "eager",
            "precision": of.precision if of else given.autocast,
            "merge": given.merging.said,
            "fingerprint": found.fingerprint,
            "count": tally.count,
            "unreadable": [
                {"name": printable(source[i].name), "reason": printable(why)} for i, why in sorted(problems.items())
            ],
            "rows": [asdict(row) for row in rows],
            **(details(tally, names, source) if suite.right is None else {}),
        }
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return 0
    out = Console(highlight=False)
    out.print(Text(f"{settings.weights} on {settings.data}, {what}: {tally.count:,} pictures", "bold"), soft_wrap=True)
    for row in rows:
        out.print(f"  {row.name:<24}{spoken(row)}", markup=False, soft_wrap=True)
    out.print(f"  {'unreadable':<24}{len(problems)} of {len(source):,}")
    if suite.right is None:
        out.print(table(tally, names))
    return 0


def choose(data: str, split: Split, weights: Path) -> tuple[Source, str, tuple[str, ...]]:
    """The pictures to measure on, what they are called, and notes. Raises UserError where the data lack that split."""
    found, notes = splits.read(data)
    return *part(found, data, split, weights), notes


def part(found: Mapping[str, Source], data: str, split: Split, weights: Path | None) -> tuple[Source, str]:
    """The same of what `data` was read as. weights: None where the model is of no run."""
    record = None if weights is None else (weights if weights.is_dir() else weights.parent) / "split.json"
    if record is not None and record.exists() and "train" in found and "validation" not in found:
        made = read_json(record)
        # Where these are the run's own pictures, the model has learnt from all but the ones it held out.
        if made.get("fingerprint") == found["train"].fingerprint:
            held, _ = splits.recall(record, found["train"], made["validation"])
            parts = {"train": np.flatnonzero(~held), "validation": np.flatnonzero(held)}
            found = {**found, **{name: subset(found["train"], some) for name, some in parts.items() if some.size}}
            if not split and "test" not in found and "validation" in found:
                return found["validation"], "validation (held out by the run)"
    if split:
        if split not in found:
            raise UserError(f"{data} has no {split} pictures; it has {listed(found)}: give --split one of these.")
        return found[split], split
    for name in ("test", "validation"):
        if name in found:
            return found[name], name
    return found["train"], "all pictures"


def counting(settings: Settings, model: Classifier, source: Source) -> Suite:
    """What is looked at and how it is counted: ImageNet's family as its owners do, all else by the classes' names.

    Raises UserError where model and data do not fit together.
    """
    known = benchmarks.named(settings.data)
    if known is not None and known[0] in suites.FAMILY:
        return suites.suite(*known, source, model.labels, model.config.classes, settings.labels)
    if settings.labels == "real":
        raise UserError(
            f"--labels real is for ImageNet's validation pictures, and {settings.data} says nothing of them: give --data "
            "imagenet: and their folder."
        )
    return Suite(relabel(source, model.labels or source.classes, model.config.classes, settings.data))


def relabel(source: Source, names: tuple[str, ...], classes: int, data: str) -> Relabelled:
    """Raises UserError on pictures without a label, and on classes that the model does not know."""
    labels = np.asarray(source.labels)
    if (labels < 0).any():
        first = source[int(np.flatnonzero(labels < 0)[0])].name
        raise UserError(
            f"{int((labels < 0).sum())} pictures of {data} have no label ({first}); evaluate needs one for each."
        )
    if len(names) != classes:
        raise UserError(
            f"The checkpoint names none of its {classes} classes and {data} has {len(names)}; give data "
            "with the classes that it was trained on, in that order."
        )
    place = {name: number for number, name in enumerate(names)}
    present = [source.classes[label] for label in np.unique(labels)]
    if unknown := [name for name in present if name not in place]:
        raise UserError(
            f"{data} has classes that the checkpoint does not know ({listed(unknown)}); it knows {listed(names)}: "
            "rename them, leave them out, or finetune on these data."
        )
    translation = np.array([place.get(name, -1) for name in source.classes], np.int64)
    return Relabelled(source, names, translation[labels])


def details(tally: Tally, names: tuple[str, ...], source: Source) -> dict[str, Any]:
    """All that has no place in a row, for the JSON."""
    return {
        "classes": list(names),
        "per_class": [{"class": names[c.label], **asdict(c)} for c in tally.per_class],
        "calibration": [asdict(b) for b in tally.calibration()],
        "confusion": tally.confusion.tolist() if len(names) <= MOST_CLASSES else None,
        "worst_mistakes": [
            {
                "picture": printable(source[m.index].name),
                "true": names[m.true],
                "predicted": names[m.predicted],
                "probability": m.probability,
                "probability_of_true": m.probability_of_true,
            }
            for m in tally.worst(20)
        ],
    }


def table(tally: Tally, names: tuple[str, ...]) -> Table:
    """A line a class that has pictures; of many classes, those with the lowest recall."""
    present = [c for c in tally.per_class if c.recall is not None]
    title = None
    if len(present) > MOST_CLASSES:
        title = f"the {MOST_CLASSES} classes with the lowest recall of {len(present)} (all of them with --json)"
        present = sorted(present, key=lambda c: (c.recall or 0, c.label))[:MOST_CLASSES]
    shown = Table(box=None, pad_edge=False, title=title, title_justify="left")
    shown.add_column("class", overflow="fold")
    for heading in ("pictures", "recall %", "95 %", "precision %", "F1 %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for c in present:
        shown.add_row(Text(names[c.label]), f"{c.count:,}", *line(c))
    return shown


def line(result: ClassResult) -> tuple[str, str, str, str]:
    """Recall, its interval, precision and F1 in per cent; "-" for what is not defined."""

    def said(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    return said(result.recall), f"{said(result.low)}-{said(result.high)}", said(result.precision), said(result.f1)
