"""`vitrail predict W PICTURE...`: what the model sees in pictures.

Nothing is lost to a bad picture: it is named on standard error, the others are answered, and the exit code is 2.
"""

import csv
import glob
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.core.device import Precision, cores, pick_device
from vitrail.core.errors import UserError
from vitrail.core.types import Sample
from vitrail.data.folders import walk
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import digest
from vitrail.data.transforms import Transform
from vitrail.inference.predict import BROKEN, broken, predict
from vitrail.weights.load import load


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
    sort_into: Path | None = None
    """Copy each picture into a folder of its class in this one, or into "unsure"; needs a run of `vitrail fit`."""
    promise: float = 0.95
    """With --sort-into: the share of pictures that must be in the right folder, as proven on held-out pictures."""
    batch: int = 64
    """Pictures looked at together."""
    workers: int = -1
    """Processes that decode pictures; -1: one a core, or none where there is a single batch."""
    device: str = ""
    """cpu, cuda, cuda:1, mps; none: the fastest there is."""
    precision: Precision = "fp32"
    """Of matrix products; bf16 is faster on most GPUs and changes probabilities in the third digit."""
    heads: int | None = None
    """Attention heads, for checkpoints of other libraries that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, likewise."""
    preprocess: str = ""
    """Preprocessing, where the checkpoint does not state it: as imagenet,bicubic,resize=256,size=224."""


@dataclass(frozen=True)
class Pictures:
    """A source of pictures of which nothing is known."""

    samples: tuple[Sample, ...]
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


@dataclass(frozen=True)
class Answer:
    """The likeliest classes of a picture and their probabilities, the likeliest first; or why there are none."""

    picture: str
    classes: tuple[tuple[str, float], ...] = ()
    problem: str | None = None


def run(settings: Settings) -> int:
    """0, or 2 if a picture could not be read. Raises UserError where nothing could be done at all."""
    if settings.json and settings.csv:
        raise UserError("--json and --csv exclude each other; give one of them.")
    for flag, value in (("--top", settings.top), ("--batch", settings.batch)):
        if value < 1:
            raise UserError(f"{flag} is {value}; give at least 1.")
    device = pick_device(settings.device or None)
    model = load(
        str(settings.weights), heads=settings.heads, grid=settings.grid, preprocess=settings.preprocess or None
    ).to(device)
    labels = model.labels or tuple(str(number) for number in range(model.config.classes))
    order = None
    if settings.sort_into is not None:
        from vitrail.commands.sorting import sorter  # only here is anything of a fit's run needed

        order = sorter(settings.sort_into, settings.weights, settings.pictures, labels, settings.promise)
    samples, problems = find(settings.pictures)
    for problem in problems:
        print(f"left out: {problem.problem}", file=sys.stderr, flush=True)
    source = Pictures(tuple(samples))
    workers = settings.workers if settings.workers >= 0 else cores() if len(source) > settings.batch else 0
    loader = PictureLoader(
        source,
        Transform(model.preprocess),
        Order(len(source), min(settings.batch, max(len(source), 1)), len(source), shuffle=False),
        workers=workers,
    )
    answers: dict[int, Answer] = {}
    for found in predict(model, loader, device=device, precision=settings.precision, progress=True):
        lost = broken(found.logits)
        top = torch.softmax(found.logits.double(), 1).topk(min(settings.top, len(labels)))
        for row, index in enumerate(found.index.tolist()):
            name = source[index].name
            if row in lost:
                print(f"left out: {name}: {BROKEN}", file=sys.stderr, flush=True)
                answers[index] = Answer(name, problem=f"{name}: {BROKEN}")
                continue
            likeliest = zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True)
            answers[index] = Answer(name, tuple((labels[label], probability) for label, probability in likeliest))
    for index, why in loader.problems.items():
        answers[index] = Answer(source[index].name, problem=why)
    everything = [answers[index] for index in sorted(answers)] + problems
    good = [answer for answer in everything if answer.problem is None]
    if order is not None:
        placed = [order.place(Path(answer.picture), *answer.classes[0]) for answer in good]
        stream = sys.stderr if settings.json or settings.csv else sys.stdout
        for line in order.said(placed):
            print(printable(line), file=stream)
    if settings.json:
        print(json.dumps([entry(answer) for answer in everything], indent=1, ensure_ascii=False))
    elif settings.csv:
        write_csv(good)
    elif order is None:
        write_table(good)
    if len(good) < len(everything):
        print(f"{len(everything) - len(good)} of {len(everything)} could not be read.", file=sys.stderr)
    return 0 if len(good) == len(everything) else 2


def find(names: Iterable[str]) -> tuple[list[Sample], list[Answer]]:
    """The pictures that the command line names, in its order, and what it names in vain.

    Raises UserError where it names nothing.
    """
    samples: list[Sample] = []
    problems: list[Answer] = []
    names = list(names)
    if not names:
        raise UserError("no pictures were named; give files, folders, patterns, or - for standard input.")
    for name in names:
        if name == "-":
            samples.append(Sample("standard input", sys.stdin.buffer.read()))
            continue
        files = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))  # noqa: PTH207, a pattern may be absolute
        if not files:
            problems.append(Answer(name, problem=f"{name} does not exist; check the path or the pattern."))
        for file in files:
            try:
                inside = [file / inner for inner in walk(file, file).names] if file.is_dir() else [file]
            except UserError as error:
                problems.append(Answer(str(file), problem=str(error)))
                continue
            if not inside:
                problems.append(Answer(str(file), problem=f"{file} holds no pictures; give a folder that does."))
            samples += [Sample(str(path), path) for path in inside]
    return samples, problems


def entry(answer: Answer) -> dict[str, Any]:
    if answer.problem is not None:
        return {"picture": printable(answer.picture), "reason": printable(answer.problem)}
    predictions = [{"class": name, "probability": probability} for name, probability in answer.classes]
    return {"picture": printable(answer.picture), "predictions": predictions}


def write_csv(answers: Iterable[Answer]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("picture", "rank", "class", "probability"))
    for answer in answers:
        for rank, (name, probability) in enumerate(answer.classes, 1):
            writer.writerow((printable(answer.picture), rank, name, f"{probability:.6f}"))


def write_table(answers: Iterable[Answer]) -> None:
    table = Table(box=None, pad_edge=False)
    # A name cut short could be another file's, so long ones run on in the next line.
    table.add_column("picture", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for answer in answers:
        for place, (name, probability) in enumerate(answer.classes):
            picture = Text(printable(answer.picture) if place == 0 else "")
            style = "" if place == 0 else "dim"
            table.add_row(picture, Text(name, style), Text(f"{100 * probability:.2f} %", style))
    if table.rows:
        Console().print(table)


def printable(name: str) -> str:
    """File names need not be valid UTF-8; what is printed must be."""
    return name.encode("utf-8", "backslashreplace").decode()
