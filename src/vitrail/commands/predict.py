"""`vitrail predict W PICTURE...`: what the model sees in pictures.

Nothing is lost to a bad picture: it is named on standard error, the others are answered, and the exit code is 2. With
--out, nothing is lost to the end of the process either: the same command goes on from what is in the file.
"""

import csv
import glob
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, overload

import numpy as np
import tyro

from vitrail.commands.reading import Checkpoint
from vitrail.core.errors import UserError
from vitrail.core.types import Sample
from vitrail.core.values import to_json
from vitrail.data.folders import walk
from vitrail.data.sources import Packed, digest, place
from vitrail.inference.answers import Answer, Answers, entry, kind_of, printable, recorded
from vitrail.inference.engines import Engine, EngineName
from vitrail.inference.openvino import EnginePrecision
from vitrail.inference.stream import stream
from vitrail.models.classifier import Classifier


@dataclass(frozen=True)
class Settings:
    """The most likely classes of each picture, with their probabilities."""

    weights: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint of any known library, or an id (hf:OWNER/NAME, official:NAME, timm:NAME)."""
    pictures: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (with all below them), patterns such as 'cats/*.jpg', or - for a picture on standard input."""
    top: int = 5
    """Classes to show for each picture."""
    json: bool = False
    """Print one JSON array, a picture an entry."""
    csv: bool = False
    """Print CSV: picture, rank, class, probability."""
    out: Path | None = None
    """Write the answers to this file as they come: .jsonl, .csv or .parquet. The same command goes on with it after
    whatever ended it. For many pictures: printed answers are all held until the end."""
    sort_into: Path | None = None
    """Copy each picture into a folder of its class in this one, or into "unsure"; needs a run of `vitrail fit`."""
    promise: float = 0.95
    """With --sort-into: the share of pictures that must be in the right folder, as proven on held-out pictures."""
    batch: int = 64
    """Pictures looked at together."""
    workers: int = -1
    """Processes that decode pictures; -1: one a core, or none where there is a single batch."""
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(engine=""))


class Files(Sequence[Sample]):
    """Picture files, made into samples when they are asked for: the names of ten thousand take a megabyte.

    files: in order, as the system has them; read one by one, and not kept. given: pictures from standard input, by place.
    """

    def __init__(self, files: Iterable[bytes], given: Mapping[int, bytes]) -> None:
        self.names, self.given = Packed.of(files), given

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = place(index, len(self))
        if number in self.given:
            return Sample("standard input", self.given[number])
        file = Path(os.fsdecode(self.names[number]))
        return Sample(str(file), file)


@dataclass(frozen=True)
class Pictures:
    """A source of pictures of which nothing is known."""

    samples: Sequence[Sample]
    classes: tuple[str, ...] = ()

    @property
    def labels(self) -> np.ndarray:
        return np.full(len(self.samples), -1, np.int64)

    @property
    def fingerprint(self) -> str:
        return digest([sample.name for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class Names(Sequence[str]):
    """What the answers are called: the pictures, then what was named in vain."""

    def __init__(self, samples: Files, problems: Sequence[Answer]) -> None:
        self.samples, self.problems = samples, problems

    def __len__(self) -> int:
        return len(self.samples) + len(self.problems)

    def __getitem__(self, index: Any) -> Any:
        known = len(self.samples)
        return self.samples[index].name if index < known else self.problems[index - known].picture


class Printed:
    """Answers that are held for standard output, and printed at the end."""

    done, note = 0, ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.answers: list[Answer] = []

    @property
    def lost(self) -> int:
        return sum(answer.problem is not None for answer in self.answers)

    def add(self, answers: Iterable[Answer]) -> None:
        self.answers += answers

    def best(self) -> Iterator[tuple[str, float] | None]:
        return iter(())

    def __enter__(self) -> "Printed":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        good = [answer for answer in self.answers if answer.problem is None]
        if kind is not None:
            return
        if self.settings.json:
            print(json.dumps([entry(answer) for answer in self.answers], indent=1, ensure_ascii=False))
        elif self.settings.csv:
            write_csv(good)
        elif self.settings.sort_into is None:
            write_table(good)


def run(settings: Settings) -> int:
    """0, or 2 if a picture could not be read. Raises UserError where nothing could be done at all."""
    if settings.json + settings.csv + (settings.out is not None) > 1:
        raise UserError("--json, --csv and --out exclude each other; give one of them.")
    for flag, value in (("--top", settings.top), ("--batch", settings.batch)):
        if value < 1:
            raise UserError(f"{flag} is {value}; give at least 1.")
    if settings.promise != Settings.promise and settings.sort_into is None:
        raise UserError(f"--promise {settings.promise:g} is of --sort-into; give that too, or leave it out.")
    if settings.out is not None:
        kind_of(settings.out)
    model = settings.checkpoint.classifier(settings.weights)
    labels = model.labels or tuple(str(number) for number in range(model.config.classes))
    order = None
    if settings.sort_into is not None:
        from vitrail.commands.sorting import sorter  # only here is anything of a fit's run needed

        given = settings.checkpoint
        order = sorter(settings.sort_into, settings.weights, settings.pictures, labels, settings.promise, given)
    samples, problems = find(settings.pictures)
    for problem in problems:
        complain(f"left out: {problem.problem}")
    count = len(samples)
    given = settings.checkpoint
    if settings.out is not None and not given.engine:
        given = as_begun(given, settings.out)
    engine = given.asking(model, batch=max(1, min(settings.batch, count)), pictures=count, weights=settings.weights)
    placed: Counter[tuple[str, bool]] = Counter()
    with target(settings, given, model, engine, Names(samples, problems)) as out:
        before, begun = out.done, time.monotonic()
        if out.note:
            complain(out.note)
        try:
            if order is not None:
                # Whatever ended the last run may have come before its pictures were copied, or they are sorted only now.
                for number, best in zip(range(min(before, count)), out.best(), strict=False):
                    if best is not None and best[0] not in labels:
                        raise UserError(
                            f"--out {settings.out} names a class {best[0]!r}, which the model has not; mend it there, or "
                            "delete that file."
                        )
                    if best is not None:
                        placed[order.place(Path(samples[number].name), *best)] += 1
            for answers in stream(
                *(model, Pictures(samples), model.preprocess, labels),
                device=given.on(),
                precision="fp32" if engine else given.autocast,
                of=engine,
                top=settings.top,
                batch=settings.batch,
                workers=settings.workers,
                start=min(before, count),
                lost=lambda why: complain(f"left out: {why}"),
                progress=True,
            ):
                if order is not None:
                    placed.update(order.place(Path(a.picture), *a.classes[0]) for a in answers if a.problem is None)
                out.add(answers)
            out.add(problems[max(0, before - count) :])
        except KeyboardInterrupt:
            if settings.out is not None:
                complain(
                    f"{out.done:,} of {count:,} pictures are in {settings.out}; the same command goes on from there."
                )
            raise
    everything = count + len(problems)
    if order is not None:
        for line in order.said(placed):
            print(printable(line), file=sys.stderr if settings.json or settings.csv else sys.stdout)
    if settings.out is not None:
        complain(summary(settings.out, before, everything, time.monotonic() - begun))
    if out.lost:
        complain(f"{out.lost:,} of {everything:,} could not be read.")
    return 2 if out.lost else 0


def as_begun(given: Checkpoint, out: Path) -> Checkpoint:
    """With the engine whose answers a file holds already, and its precision, which may be another than was asked for;
    unchanged where there are none, or where another precision was asked for then."""
    before = recorded(out)
    engine = next((known for known in get_args(EngineName) if known == before.get("engine")), None)
    precision = next((known for known in get_args(EnginePrecision) if known == before.get("precision")), None)
    asked = before.get("asked", precision)  # earlier versions do not say
    if engine is None or precision is None or asked != given.precision:
        return given
    return replace(given, engine=engine, precision=precision)


def target(
    settings: Settings, given: Checkpoint, model: Classifier, engine: Engine | None, names: Sequence[str]
) -> Answers | Printed:
    """Where the answers go. given: how the model is run, settings' own or as a file was begun."""
    if settings.out is None:
        return Printed(settings)
    from vitrail.inference.features import weights_hash

    asked = settings.checkpoint
    made = {
        "model": digest([weights_hash(model), *model.labels, json.dumps(to_json(model.preprocess))]),
        "top": min(settings.top, model.config.classes),
        "batch": settings.batch,
        "engine": engine.name if engine else "eager",
        "precision": engine.precision if engine else given.autocast,
        "asked": asked.precision,
        "merge": given.merging.said,
        "calibrate": asked.calibrate if asked.precision == "int8" else "",
        "device": given.on().type,
    }
    return kind_of(settings.out)(settings.out, made, names)


def summary(out: Path, before: int, everything: int, seconds: float) -> str:
    new = everything - before
    if not new:
        return f"{out} has all {everything:,} answers already."
    old = f"; {before:,} were there already" if before else ""
    return f"{out}: {new:,} pictures in {seconds:,.1f} s ({new / max(seconds, 1e-9):,.1f} a second){old}."


def complain(sentence: str) -> None:
    print(printable(sentence), file=sys.stderr, flush=True)


def find(names: Iterable[str]) -> tuple[Files, list[Answer]]:
    """The pictures that the command line names, in its order, and what it names in vain.

    Raises UserError where it names nothing.
    """
    found: list[bytes] = []
    given: dict[int, bytes] = {}
    problems: list[Answer] = []
    names = list(names)
    if not names:
        raise UserError("no pictures were named; give files, folders, patterns, or - for standard input.")
    for name in names:
        if name == "-":
            given[len(found)] = sys.stdin.buffer.read()
            found.append(b"")
            continue
        try:
            there = Path(name).exists()
        except OSError as error:
            problems.append(Answer(name, problem=f"{name} cannot be looked at ({error.strerror}); check the path."))
            continue
        files = [Path(name)] if there else sorted(map(Path, glob.glob(name, recursive=True)))  # noqa: PTH207, a pattern may be absolute
        if not files:
            problems.append(Answer(name, problem=f"{name} does not exist; check the path or the pattern."))
        for file in files:
            try:
                # As bytes at once: paths of a hundred thousand pictures would take a hundred megabytes.
                inside = (
                    [os.fsencode(file / name) for name in walk(file, file).names]
                    if file.is_dir()
                    else [os.fsencode(file)]
                )
            except UserError as error:
                problems.append(Answer(str(file), problem=str(error)))
                continue
            if not inside:
                problems.append(Answer(str(file), problem=f"{file} holds no pictures; give a folder that does."))
            found += inside
    return Files(found, given), problems


def write_csv(answers: Iterable[Answer]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("picture", "rank", "class", "probability"))
    for answer in answers:
        for rank, (name, probability) in enumerate(answer.classes, 1):
            writer.writerow((printable(answer.picture), rank, name, f"{probability:.6f}"))


def write_table(answers: Iterable[Answer]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    # A name cut short could be another file's, so long ones run on in the next line.
    table.add_column("picture", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for answer in answers:
        for rank, (name, probability) in enumerate(answer.classes):
            picture = Text(printable(answer.picture) if rank == 0 else "")
            style = "" if rank == 0 else "dim"
            table.add_row(picture, Text(name, style), Text(f"{100 * probability:.2f} %", style))
    if table.rows:
        Console().print(table)
