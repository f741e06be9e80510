"""`vitrail robustness W --data D [--against W2]`: arXiv 2105.10497 for one model, or two on the same pictures."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.analysis import adversarial, alterations
from vitrail.analysis.corruptions import SMALLEST
from vitrail.analysis.robustness import GROUPS, Contestant, Exam
from vitrail.analysis.robustness_tests import every_test
from vitrail.commands.evaluate import Split, choose, relabel
from vitrail.commands.predict import printable
from vitrail.commands.reading import Checkpoint
from vitrail.core.device import cores
from vitrail.core.errors import UserError
from vitrail.core.types import Source
from vitrail.data import splits
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import Subset, limit, listed, subset
from vitrail.data.transforms import Transform
from vitrail.evaluation.metrics import spoken
from vitrail.experiments import robustness_report
from vitrail.experiments.robustness import Learning, Planned, identity_of, measure, plan
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet
from vitrail.models.vit import ViT
from vitrail.weights.load import load, load_any

LEAST_LEARNT = 20
"""Pictures with which a classifier of local windows can be chosen at all."""


@dataclass(frozen=True)
class Settings:
    """Patches dropped and shuffled, texture or shape removed, adversarial patches, corruptions, shifts: JSON and a page."""

    weights: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint of any known library, or an id (hf:OWNER/NAME, official:NAME, timm:NAME)."""
    data: str
    """Labelled pictures, as for evaluate."""
    against: Path | None = None
    """Another classifier of the same classes, to be shown the same altered pictures."""
    out: Path = Path("robustness")
    """The folder of the results; tests that it holds already are not measured again."""
    only: tuple[str, ...] = ()
    """Of drop, shuffle, texture, shape, patch, corruptions, equivariance and locality, with commas or spaces; none: all."""
    limit: int = 1000
    """Most pictures, of each class as many; 0: all."""
    split: Split = ""
    """Which part of the data; none: test, else validation, else all."""
    salience: Path | None = None
    """The ViT whose attention says which patches are salient; none: the first of the two models that is one."""
    cells: int = 0
    """Cells a side of patch drop; 0: the patches of the model whose attention is taken, else 8 below 64 pixels and 14."""
    black: bool = False
    """Dropped pixels are black; else 0 after the first model's normalisation, as in the authors' code."""
    shares: tuple[float, ...] = alterations.SHARES
    """Of patches, or of attention, that are dropped."""
    grids: tuple[int, ...] = alterations.GRIDS
    """Cells a side of shuffled pictures."""
    areas: tuple[float, ...] = adversarial.AREAS
    """Shares of the picture that adversarial patches cover."""
    patch_steps: int = 150
    """Steps of gradient descent for each adversarial patch."""
    target: str = ""
    """The class that adversarial patches are to be taken for; none: any wrong one."""
    extra: bool = False
    """Speckle noise, Gaussian blur, spatter and saturation too, which their authors keep apart."""
    learn: int = 3000
    """Pictures that the classifier of local windows learns from: of the training split, else of what is not measured on."""
    seed: int = 0
    """Of all that is drawn."""
    batch: int = 64
    """Pictures looked at together; no result depends on it."""
    workers: int = -1
    """Processes that decode pictures; -1: one a core."""
    dry_run: bool = False
    """Only say what would be done and how long it would take."""
    json: bool = False
    """Print everything as one JSON object."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


def run(settings: Settings) -> int:
    """Everything that is not asked for by --only and cannot be done is left out aloud."""
    check(settings)
    groups = chosen_groups(settings.only)
    model = settings.checkpoint.classifier(settings.weights)
    rival = None if settings.against is None else load(str(settings.against)).to(settings.checkpoint.on())
    if rival is not None and rival.preprocess.channels != model.preprocess.channels:
        raise UserError(
            f"{settings.against} takes pictures of {rival.preprocess.channels} channels and {settings.weights} of "
            f"{model.preprocess.channels}; give two models of the same kind of pictures."
        )
    console = Console(stderr=True, soft_wrap=True)
    source, what, notes = choose(settings.data, settings.split, settings.weights)
    for note in notes:
        console.print(Text(note))
    source = limit(source, settings.limit, settings.seed) if settings.limit else source
    exam, unreadable = examine(settings, model, rival, source)
    exam, groups = fitting(exam, groups, settings, console)
    tests = every_test(
        exam,
        groups,
        shares=settings.shares,
        grids=settings.grids,
        areas=settings.areas,
        extra=settings.extra,
        patch_steps=settings.patch_steps,
        target=source.classes.index(settings.target) if settings.target else None,
    )
    learning = lessons(settings, exam, source) if {"texture", "shape"} & set(groups) else None
    planned = plan(exam, tests, groups, learning)
    console.print(Text(f"{len(exam.pixels):,} pictures of {settings.data}, {what}; results go to {settings.out}"))
    console.print(plan_table(planned))
    if settings.dry_run:
        return 0
    found = measure(
        exam, tests, groups, learning, settings.out, identity_of(exam, source.fingerprint), asked(settings), console
    )
    names = tuple(one.name for one in exam.contestants)
    chance = 100 * float(torch.bincount(exam.truth).max()) / len(exam.truth)
    facts = described(settings, exam, what, len(unreadable), chance)
    subject = robustness_report.Subject(
        " and ".join(names), settings.data, names, len(exam.pixels), chance, facts, " ".join(("vitrail", *sys.argv[1:]))
    )
    record = {
        "weights": str(settings.weights),
        "against": None if settings.against is None else str(settings.against),
        "data": settings.data,
        "split": what,
        "fingerprint": source.fingerprint,
        "count": len(exam.pixels),
        "unreadable": [{"name": printable(name), "reason": printable(why)} for name, why in unreadable],
        "chance": chance,
        "facts": facts,
    }
    robustness_report.write(settings.out, subject, found, record)
    if settings.json:
        print(json.dumps({**record, **robustness_report.as_json(found)}, indent=1, ensure_ascii=False))
        return 0
    out = Console(highlight=False)
    for name, row in found.clean.items():
        out.print(f"  {name:<24}{spoken(row)} unaltered", markup=False, soft_wrap=True)
    out.print(Text(f"written: {settings.out / 'report.html'}"), soft_wrap=True)
    return 0


def check(settings: Settings) -> None:
    settings.checkpoint.eager("robustness")
    if settings.checkpoint.merging:
        raise UserError(
            f"robustness examines models as they are, and --merge {settings.checkpoint.merge} changes one of them; leave it "
            "out."
        )
    for flag, value, least in (
        ("--batch", settings.batch, 1),
        ("--patch-steps", settings.patch_steps, 1),
        ("--learn", settings.learn, LEAST_LEARNT),
        ("--cells", settings.cells, 0),
        ("--limit", settings.limit, 0),
    ):
        if value < least:
            raise UserError(f"{flag} is {value}; give at least {least}.")
    for flag, values, low, high in (
        ("--shares", settings.shares, 0, 1),
        ("--areas", settings.areas, 0, 1),
    ):
        if not values or any(not low <= value <= high for value in values):
            raise UserError(f"{flag} {' '.join(map(str, values))} must be numbers from {low} to {high}.")
    if not settings.grids or any(cells < 2 for cells in settings.grids):
        raise UserError(f"--grids {' '.join(map(str, settings.grids))} must be whole numbers from 2 on.")


def chosen_groups(only: tuple[str, ...]) -> tuple[str, ...]:
    """Raises UserError for a test that there is not."""
    named = [name.strip() for part in only for name in part.split(",") if name.strip()]
    for name in named:
        if name not in GROUPS:
            import difflib

            near = difflib.get_close_matches(name, GROUPS, n=1, cutoff=0.0)[0]
            raise UserError(f"--only {name} is none of the tests; the nearest is {near} (of {listed(GROUPS)}).")
    return tuple(group for group in GROUPS if not named or group in named)


def examine(
    settings: Settings, model: Classifier, rival: Classifier | None, source: Source
) -> tuple[Exam, list[tuple[str, str]]]:
    """The exam, and the pictures that could not be read."""
    labels = [relabel(source, one.labels or source.classes, one.config.classes, settings.data).labels
              for one in (model, rival) if one is not None]  # fmt: skip
    if settings.target and settings.target not in source.classes:
        raise UserError(f"--target {settings.target} is none of the classes; they are {listed(source.classes)}.")
    pixels, kept, unreadable = pictures(source, model, settings)
    if len(kept) < 4:
        raise UserError(f"{settings.data} gives {len(kept)} readable pictures; robustness needs at least 4.")
    names = names_of(settings)
    contestants = tuple(
        Contestant(name, one, torch.from_numpy(np.asarray(own)[kept]).long())
        for name, one, own in zip(names, (model, rival), labels, strict=False)
        if one is not None
    )
    reference = referee(settings, model, rival)
    grid = (settings.cells, settings.cells)
    if not settings.cells:
        size = model.preprocess.size
        grid = (8, 8) if min(size) < 64 else (14, 14)
        if reference is not None:
            backbone = reference.backbone if isinstance(reference, Classifier) else reference
            grid = backbone.config.grid
    if max(grid) > min(model.preprocess.size):
        raise UserError(
            f"--cells {settings.cells} is more than the pictures' {min(model.preprocess.size)} pixels a side."
        )
    colour = (0,) * len(model.preprocess.mean) if settings.black else alterations.zero_colour(model.preprocess)
    truth = torch.from_numpy(np.asarray(source.labels)[kept]).long()
    precision = settings.checkpoint.eager("robustness")
    return Exam(
        pixels, truth, contestants, reference, grid, colour, settings.seed, settings.batch, precision
    ), unreadable  # fmt: skip


def names_of(settings: Settings) -> tuple[str, ...]:
    """Of the models: what their paths end in, as far as that tells them apart."""
    first = named(settings.weights)
    if settings.against is None:
        return (first,)
    second = named(settings.against)
    if first != second:
        return first, second
    pair = str(settings.weights), str(settings.against)
    return pair if pair[0] != pair[1] else (pair[0], f"{pair[1]} again")


def named(weights: Path) -> str:
    """Of a file or a folder its name, of an id all of it."""
    return weights.name if weights.exists() else str(weights).partition(":")[2] or str(weights)


def referee(settings: Settings, model: Classifier, rival: Classifier | None) -> Classifier | ViT | None:
    """Whose attention says what is salient."""
    if settings.salience is not None:
        found = load_any(str(settings.salience)).to(settings.checkpoint.on())
        backbone = found.backbone if isinstance(found, Classifier) else found
        if isinstance(found, ResNet) or isinstance(backbone, ResNet):
            raise UserError(f"--salience {settings.salience} is a ResNet, which has no attention; give a ViT.")
        if found.preprocess.channels != model.preprocess.channels:
            raise UserError(
                f"--salience {settings.salience} takes pictures of {found.preprocess.channels} channels and the model of "
                f"{model.preprocess.channels}; give a ViT of the same kind of pictures."
            )
        return found
    return next((one for one in (model, rival) if one is not None and isinstance(one.backbone, ViT)), None)


def pictures(
    source: Source, model: Classifier, settings: Settings
) -> tuple[torch.Tensor, list[int], list[tuple[str, str]]]:
    """Pixels as the model is given them, their places in the source, and what could not be read."""
    loader = PictureLoader(
        source,
        Transform(model.preprocess),
        Order(len(source), min(256, len(source)), len(source), shuffle=False),
        workers=settings.workers if settings.workers >= 0 else cores(),
    )
    parts = [(batch.views[0][batch.valid], batch.index[batch.valid]) for batch in loader]
    pixels, kept = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return pixels, kept.tolist(), [(source[index].name, why) for index, why in sorted(loader.problems.items())]


def fitting(exam: Exam, groups: tuple[str, ...], settings: Settings, console: Console) -> tuple[Exam, tuple[str, ...]]:
    """The tests that these pictures and models allow. Raises UserError for one that was asked for and cannot be."""
    channels, *size = exam.pixels.shape[1:]
    if "corruptions" in groups and (channels != 3 or min(size) < SMALLEST):
        why = (
            f"corruptions are for pictures of 3 channels and at least {SMALLEST} pixels a side, and the model's have "
            f"{channels} and {size[0]} x {size[1]}"
        )
        if settings.only:
            raise UserError(f"{why}; leave them out of --only.")
        console.print(Text(f"left out: {why}."))
        groups = tuple(group for group in groups if group != "corruptions")
    if "drop" in groups and exam.reference is None:
        console.print(Text("left out: salient patches, for no model here has attention; give --salience a ViT."))
    return exam, groups


def lessons(settings: Settings, exam: Exam, source: Source) -> Learning | None:
    """Training pictures, as the first model is given them; where the data have none but those measured on, none."""
    found, _ = splits.read(settings.data)
    train, whole = found.get("train"), source.source if isinstance(source, Subset) else source
    if train is None or train.fingerprint in (source.fingerprint, whole.fingerprint):
        used = set(source.indices.tolist()) if isinstance(source, Subset) else set(range(len(whole)))
        train = subset(whole, [place for place in range(len(whole)) if place not in used])
    if len(train) < LEAST_LEARNT:
        return None
    train = limit(train, settings.learn, settings.seed)
    pixels, kept, _ = pictures(train, exam.contestants[0].model, settings)
    return Learning(pixels, torch.from_numpy(np.asarray(train.labels)[kept]).long())


def asked(settings: Settings) -> dict[str, Any]:
    """The settings that decide a result."""
    kept = ("shares", "grids", "areas", "patch_steps", "target", "learn")
    return {name: value for name, value in asdict(settings).items() if name in kept}


def described(settings: Settings, exam: Exam, what: str, unreadable: int, chance: float) -> dict[str, str]:
    size = exam.contestants[0].model.preprocess.size
    reference = "none" if exam.reference is None else (
        str(settings.salience) if settings.salience is not None else
        next(one.name for one in exam.contestants if one.model is exam.reference)
    )  # fmt: skip
    return {
        "pictures": f"{len(exam.pixels):,} ({what})",
        "unreadable, left out": str(unreadable),
        "size": f"{size[0]} x {size[1]} pixels",
        "always one class would give": f"{chance:.1f} %",
        "cells of patch drop": f"{exam.grid[0]} x {exam.grid[1]}",
        "dropped pixels": "black" if settings.black else f"0 after normalisation, {exam.colour}",
        "salient by": f"attention in the last block of {reference}, mean of its heads",
        "patches made": f"on every other picture, {settings.patch_steps} steps, "
        + (f"to be taken for {settings.target}" if settings.target else "untargeted"),
        "seed": str(settings.seed),
    }


def plan_table(planned: list[Planned]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tests")
    for heading in ("how many", "pictures looked at", "about"):
        table.add_column(heading, justify="right")
    for one in planned:
        table.add_row(one.group, str(one.tests), f"{one.looks:,}", duration(one.seconds))
    total = sum(one.seconds for one in planned)
    table.add_row("all", str(sum(o.tests for o in planned)), f"{sum(o.looks for o in planned):,}", duration(total))
    return table


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
