"""`vitrail probe W --data D`: how much a frozen model already knows of these pictures.

Features are computed once and kept, so a second method, or another number of shots, costs seconds.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.text import Text

from vitrail.commands.predict import printable
from vitrail.commands.reading import Checkpoint
from vitrail.core.errors import UserError
from vitrail.core.types import Row, Source
from vitrail.data import splits
from vitrail.data.sources import listed
from vitrail.evaluation import probes
from vitrail.evaluation.linear import check_classes
from vitrail.evaluation.means import mean_interval
from vitrail.evaluation.metrics import spoken, wilson
from vitrail.inference import features
from vitrail.inference.features import FeatureTable, Reading, default_cache, extract
from vitrail.weights.report import described_preprocess

Split = Literal["", "train", "validation", "test"]
Method = Literal["few-shot", "linear", "knn", "sgd"]
MAE_BATCH = 16384
"""MAE's batch; of fewer pictures its schedule makes far fewer steps than its authors' did."""


@dataclass(frozen=True)
class Settings:
    """Frozen features with a simple head on top: few-shot, linear, nearest neighbours."""

    weights: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint of any known library, with or without a head, or an id (hf:OWNER/NAME, ...)."""
    data: str
    """A folder, a CSV, JSON or parquet file, hub:NAME, sample:NAME or a published set NAME:PATH, as for evaluate."""
    method: Method = "few-shot"
    """few-shot: the paper's least squares (big_vision's, exactly); linear: logistic regression, its penalty chosen on a
    fifth of the training pictures; knn: DINO's weighted vote; sgd: MAE's LARS schedule, on features without augmentation."""
    shots: tuple[int, ...] = probes.SHOTS
    """few-shot: pictures of each class to learn from."""
    seeds: int = len(probes.SEEDS)
    """few-shot: draws of them, seeds 0, 1, ..., whose mean and 95 % t interval are shown."""
    rate: float = 0.1
    """sgd: the base rate, for a batch of 256."""
    reading: Reading = "planned"
    """What is taken as features. planned: what the model's own head stands on, else the class token, else the mean."""
    train_split: Literal["train", "validation", "test"] = "train"
    """Which part of the data is learnt from."""
    split: Split = ""
    """Which part is measured on; none: test, else validation."""
    no_cache: bool = False
    """Keep no features; else they are kept in $VITRAIL_CACHE/features (none: ~/.cache/vitrail/features)."""
    json: bool = False
    """Print everything as one JSON object."""
    batch: int = 64
    """Pictures looked at together; no result depends on it."""
    workers: int = -1
    """Processes that decode pictures; -1: one a core."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


def run(settings: Settings) -> int:
    """The paper preprocesses for few-shot with --preprocess half,bilinear,resize=256x256,size=224; the model's own is taken
    where none is given."""
    check(settings)
    given = settings.checkpoint
    device = given.on()
    model = given.model(settings.weights)
    features.check(model, settings.reading)
    found, said = splits.read(settings.data)
    train_name, test_name = choose(settings, found)
    for name in (train_name, test_name):
        check_labelled(found[name], name, settings.data)
    check_classes(torch.tensor(np.asarray(found[train_name].labels)))
    notes = list(said)
    cache = None if settings.no_cache else default_cache()
    count = sum(len(found[name]) for name in {train_name, test_name})
    of = given.asking(
        model, batch=settings.batch, pictures=count, reading=settings.reading, preprocess=model.preprocess
    )
    tables = {
        name: extract(
            model,
            found[name],
            model.preprocess,
            reading=settings.reading,
            device=device,
            precision="fp32" if of else given.autocast,
            batch=settings.batch,
            workers=settings.workers,
            cache=cache,
            progress=True,
            of=of,
            mark=f"{of.name} {of.precision}" if of else "",
        )
        for name in dict.fromkeys((train_name, test_name))
    }
    train, test = tables[train_name], tables[test_name]
    if train_name == test_name:
        notes.append(
            f"Learnt from and measured on the same pictures ({train_name}): this says nothing of other pictures."
        )
    check_classes(train.labels)
    rows, extra = measure(settings, train, test, len(found[train_name].classes), notes, device)
    console = Console(stderr=True, soft_wrap=True)
    for note in notes:
        console.print(Text(note))
    lost = [(found[name][place].name, why) for name, one in tables.items() for place, why in one.problems.items()]
    said_of = {
        "features": f"{features.spoken(model, settings.reading)}, {train.features.shape[1]} numbers",
        "preprocessing": described_preprocess(model.preprocess)
        + (" (given by hand)" if given.preprocess else " (the model's own)"),
        "kept in": "nowhere" if cache is None else printable(str(cache)),
        "learnt from": f"{train.index.shape[0]:,} pictures of {train_name}",
        "measured on": f"{test.index.shape[0]:,} pictures of {test_name}",
        "unreadable": f"{len(lost):,}",
    }
    if settings.json:
        result = {
            "weights": str(settings.weights),
            "data": settings.data,
            "engine": of.name if of else "eager",
            "precision": of.precision if of else given.autocast,
            "merge": given.merging.said,
            "method": settings.method,
            **{name.replace(" ", "_"): value for name, value in said_of.items()},
            "reading": features.resolved(model, settings.reading),
            "width": train.features.shape[1],
            "train": {"split": train_name, "count": train.index.shape[0]},
            "test": {"split": test_name, "count": test.index.shape[0]},
            "fingerprints": {name: found[name].fingerprint for name in tables},
            "unreadable": [{"name": printable(name), "reason": printable(why)} for name, why in lost],
            "notes": [printable(note) for note in notes],
            "rows": [asdict(row) for row in rows],
            **extra,
        }
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return 0
    out = Console(highlight=False)
    out.print(Text(f"{settings.weights} on {settings.data}: {settings.method}", "bold"), soft_wrap=True)
    for name, value in (*said_of.items(), *((row.name, spoken(row)) for row in rows)):
        out.print(f"  {name:<24}{value}", markup=False, soft_wrap=True)
    return 0


def check(settings: Settings) -> None:
    """Raises UserError on numbers that mean nothing."""
    shots = min(settings.shots, default=0)
    for flag, value in (("--batch", settings.batch), ("--seeds", settings.seeds), ("--shots", shots)):
        if value < 1:
            raise UserError(f"{flag} is {value}; give at least 1.")
    if not settings.rate > 0:
        raise UserError(f"--rate is {settings.rate:g}; give more than 0.")


def choose(settings: Settings, found: dict[str, Source]) -> tuple[str, str]:
    """The splits to learn from and to measure on. Raises UserError where the data lack one."""
    data, wanted = settings.data, settings.split or next((name for name in ("test", "validation") if name in found), "")
    if not wanted:
        raise UserError(
            f"{data} has no test or validation pictures to measure on; give data with a test folder beside train."
        )
    for flag, name in (("--train-split", settings.train_split), ("--split", wanted)):
        if name not in found:
            raise UserError(f"{data} has no {name} pictures; it has {listed(found)}: give {flag} one of these.")
    return settings.train_split, wanted


def check_labelled(source: Source, name: str, data: str) -> None:
    """Raises UserError on pictures without a label."""
    labels = np.asarray(source.labels)
    if (labels < 0).any():
        first = source[int(np.flatnonzero(labels < 0)[0])].name
        raise UserError(
            f"{int((labels < 0).sum())} of the {name} pictures of {data} have no label ({first}); probe needs one for each."
        )


def measure(
    settings: Settings,
    train: FeatureTable,
    test: FeatureTable,
    classes: int,
    notes: list[str],
    device: torch.device,
) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and what the JSON has beside them; adds to the notes."""
    known, labels = train.features.to(device), train.labels.to(device)
    asked, truth = test.features.to(device), test.labels.to(device)
    if missing := int((~torch.isin(test.labels, train.labels)).sum()):
        notes.append(
            f"{missing} of the measured pictures are of classes that are not learnt from: they count as wrong."
        )
    match settings.method:
        case "few-shot":
            notes += list(shortages(train.labels, settings.shots))
            runs = {
                shots: [probes.few_shot(known, labels, asked, truth, shots, seed) for seed in range(settings.seeds)]
                for shots in settings.shots
            }
            over = f"{settings.seeds} seed" + ("s" if settings.seeds > 1 else "")
            rows = [average(f"{shots}-shot, {over}", values, truth.shape[0]) for shots, values in runs.items()]
            return rows, {"seeds": {str(shots): values for shots, values in runs.items()}}
        case "linear":
            chosen = probes.linear(known, labels, classes)
            row = share("linear probe", chosen.head(asked).argmax(1), truth)
            notes.append(
                f"Penalty {chosen.head.penalty:.2g} of mean cross-entropy + penalty / 2 |W|^2 on standardised features, "
                f"chosen on a fifth of the learning pictures from {len(chosen.tried)}, then solved on all."
            )
            if chosen.head.penalty in (chosen.tried[0][0], chosen.tried[-1][0]):
                notes.append("That penalty is at the end of its grid: a better one may lie beyond.")
            return [row], {"penalty": chosen.head.penalty, "tried": chosen.tried}
        case "knn":
            found = probes.nearest_neighbours(known, labels, asked, classes)
            if len(found) < len(probes.NEIGHBOURS):
                notes.append(
                    f"With {labels.shape[0]} pictures to learn from, larger numbers of neighbours are left out."
                )
            if not found:
                least = probes.NEIGHBOURS[0]
                raise UserError(
                    f"{settings.data} has {labels.shape[0]} pictures to learn from, and --method knn asks {least} "
                    "neighbours: give more pictures or another method."
                )
            return [share(f"{count} neighbours", one, truth) for count, one in found.items()], {}
        case "sgd":
            head = probes.sgd(known, labels, classes, rate=settings.rate)
            notes.append("MAE trains its head on random crops and flips; here it sees each picture's one kept feature.")
            if labels.shape[0] < MAE_BATCH:
                notes.append(
                    f"MAE's schedule has batches of {MAE_BATCH:,}; {labels.shape[0]:,} pictures make one step an epoch at a "
                    "rate in proportion, which may leave the head hardly trained: --rate 10 goes further."
                )
            return [share("SGD probe", head(asked).argmax(1), truth)], {"rate": settings.rate}


def shortages(labels: torch.Tensor, shots: tuple[int, ...]) -> Iterator[str]:
    """A sentence for each number of shots that some class cannot give."""
    counts = labels.unique(return_counts=True)[1]
    for number in shots:
        most, short = int(counts.max()), probes.short_classes(labels, number)
        if number > most:
            yield f"{number}-shot: no class has so many pictures (the largest has {most}), so all of them are used."
        elif short:
            yield f"{number}-shot: {short} of {counts.shape[0]} classes have fewer pictures and give what they have."


def average(name: str, values: list[float], count: int) -> Row:
    """Accuracies in [0, 1] of several seeds as one row, in per cent; an interval ends where accuracies do."""
    mean, low, high = mean_interval([100 * value for value in values])
    return Row(
        name, mean, None if low is None else max(low, 0.0), None if high is None else min(high, 100.0), count=count
    )


def share(name: str, predicted: torch.Tensor, truth: torch.Tensor) -> Row:
    """How many are right, in per cent, with the interval of a proportion (Wilson)."""
    hits, count = int((predicted == truth).sum()), truth.shape[0]
    low, high = wilson(hits, count)
    return Row(name, 100 * hits / count, 100 * low, 100 * high, count)
