"""`vitrail vtab W --root DIR`: which of VTAB-1k's 19 tasks can be measured here, and how a model does on them."""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.commands.reading import Checkpoint
from vitrail.core.errors import UserError
from vitrail.data.sources import listed
from vitrail.data.vtab import TASKS, Task
from vitrail.data.vtab_sample import NOT_THE_SAMPLE, Draw, find
from vitrail.evaluation.metrics import spoken
from vitrail.experiments.paper import SIDE
from vitrail.experiments.run import exit_code
from vitrail.experiments.vtab import (
    PUBLISHED,
    Benchmark,
    Measured,
    Method,
    Protocol,
    check,
    published,
    published_means,
    rows,
    size_for,
)
from vitrail.inference.features import default_cache
from vitrail.training.pace import Outcome


@dataclass(frozen=True)
class Settings:
    """VTAB-1k: for each task whether its files are there, what is missing and who publishes it; then those that are.

    DIR holds a folder a task: what TFDS has prepared (NAME/VERSION, as in its own data folder), lists (train800val200.txt
    and test.txt), or what the owners' archives unpack to, in a folder called after the task or TFDS's name of the set.
    """

    root: Path
    """The folder with the tasks' files."""
    weights: tyro.conf.Positional[Path | None] = None
    """A run's folder, a checkpoint of any known library, or an id; not needed with --list."""
    list: bool = False
    """Only say what is there."""
    method: Method = "finetune"
    """finetune: the paper's, hours a task on a GPU; linear: logistic regression on frozen features, minutes a task."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ()
    """Only these; none: all that are there."""
    seeds: int = 0
    """Runs of each task; 0: three of finetune, one of linear, where nothing is drawn at random."""
    steps: int = 2_500
    """Of finetune; the paper's, as all that follows."""
    batch: int = 512
    """Pictures a step."""
    size: int = 0
    """Pixels; 0: 384, or the most below it that the model's patches fill, as 378 for patches of 14."""
    rate: float = 0.01
    """Learning rate."""
    out: Path | None = None
    """Where results are kept, and looked for first; none: results in --root."""
    cache: Path | None = None
    """Where features are kept; none: $VITRAIL_CACHE or ~/.cache/vitrail, /features."""
    workers: int = -1
    """Processes that decode pictures; -1: one a core."""
    json: bool = False
    """Print everything as one JSON object."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


Look = Draw | str | None
"""A task's pictures; what is wrong with them; or None, for they are not there."""


def run(settings: Settings) -> int:
    """0; 2 where nothing could be measured; 130 or 143 where it was stopped."""
    chosen = tasks(settings.tasks)
    if not settings.root.is_dir():
        raise UserError(f"--root {settings.root} does not exist; give the folder with the tasks' files.")
    if not settings.list and settings.weights is None:
        raise UserError("vtab needs weights; give a checkpoint, or --list to see which files are there.")
    looks = {task.name: look(task, settings.root) for task in chosen}
    console = Console(stderr=settings.json, highlight=False)
    for task in chosen:
        console.print(overview(task, looks[task.name]), soft_wrap=True)
    if settings.list or settings.weights is None:
        if settings.json:
            print(json.dumps({"tasks": [described(task, looks[task.name]) for task in chosen]}, indent=1))
        return 0
    draws = {name: found for name, found in looks.items() if isinstance(found, Draw)}
    if not draws:
        raise UserError(f"{settings.root} has files of none of these tasks ({listed(looks)}); see the list above.")
    protocol = Protocol("linear")
    if settings.method == "finetune":
        protocol = Protocol("finetune", settings.steps, settings.batch, settings.size or SIDE, settings.rate)
    protocol = replace(protocol, precision=settings.checkpoint.eager("vtab"))
    seeds = settings.seeds or (3 if settings.method == "finetune" else 1)
    check(protocol, seeds)
    model = settings.checkpoint.model(settings.weights)
    if settings.method == "finetune":
        protocol = replace(protocol, size=size_for(model, settings.size))
    benchmark = Benchmark(
        model,
        settings.weights,
        protocol,
        settings.out or settings.root / "results",
        settings.checkpoint.on(),
        settings.cache or default_cache(),
        settings.workers,
        ("vitrail", *sys.argv[1:]),
    )
    console.print(f"\n{benchmark.said}; results are kept in {benchmark.out}", markup=False, soft_wrap=True)
    measured: list[Measured] = []
    for name, draw in draws.items():
        for seed in range(seeds):
            found = benchmark.measure(TASKS[name], draw, seed)
            if isinstance(found, Outcome):
                return exit_code(found) or 130
            measured.append(found)
            note = f" ({found.sample})" if found.sample.startswith(NOT_THE_SAMPLE) else ""
            said = f"{TASKS[name].title}, seed {seed}: {100 * found.accuracy:.2f} %{note}"
            console.print(said, markup=False, soft_wrap=True)
    console.print(results(measured))
    if settings.json:
        print(json.dumps(report(settings, benchmark, chosen, looks, measured), indent=1, ensure_ascii=False))
    return 0


def tasks(names: tuple[str, ...]) -> list[Task]:
    """Raises UserError on a name that is no task."""
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"--tasks {unknown[0]} is no task of VTAB-1k; they are {listed(TASKS, 19)}.")
    return [task for task in TASKS.values() if not names or task.name in names]


def look(task: Task, root: Path) -> Look:
    """One damaged set must not keep the others from being measured."""
    try:
        return find(task, root)
    except UserError as error:
        return str(error)


def overview(task: Task, found: Look) -> Text:
    """One line, which is not broken: it may end in an address."""
    start = f"{task.name:<12}{task.group:<13}"
    if isinstance(found, Draw):
        return Text(f"{start}{found.origin}; {found.sample}; {len(found.test):,} test pictures")
    if found is not None:
        return Text(f"{start}cannot be used: {found}", "red")
    return Text(f"{start}missing: {missing(task)}", "dim")


def missing(task: Task) -> str:
    """What would do, where it is published, and under which licence."""
    prepared = "/".join(filter(None, (task.folder, task.config)))
    return f"TFDS's {prepared}:{task.major}.*, or lists; published at {task.where} (licence: {task.licence})"


def described(task: Task, found: Look) -> dict[str, object]:
    there = isinstance(found, Draw)
    return {
        "task": task.name,
        "group": task.group,
        "there": there,
        "problem": found if isinstance(found, str) else None,
        "origin": found.origin if isinstance(found, Draw) else None,
        "sample": found.sample if isinstance(found, Draw) else None,
        "where": task.where,
        "licence": task.licence,
    }


def results(measured: list[Measured]) -> Table:
    """Ours beside Table 9 of the ViT paper. A star marks what was not trained on VTAB-1k's sample."""
    other = {TASKS[m.task].title for m in measured if m.sample.startswith(NOT_THE_SAMPLE)}
    caption = "beside: Table 9 of the ViT paper" + (f"; *: {NOT_THE_SAMPLE}" if other else "")
    shown = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    shown.add_column("task")
    shown.add_column("accuracy and its 95 % interval")
    for name in PUBLISHED:
        shown.add_column(name, justify="right")
    theirs = {task.title: published(task) for task in TASKS.values()}
    theirs |= {f"{name} mean": means for name, means in published_means().items()}
    for row in rows(measured):
        beside = theirs.get(row.name, {})
        star = " *" if row.name in other or (other and " mean" in row.name) else ""
        shown.add_row(
            f"{row.name}{star}", spoken(row), *(f"{beside[name]:.1f}" if beside else "" for name in PUBLISHED)
        )
    return shown


def report(
    settings: Settings, benchmark: Benchmark, chosen: list[Task], looks: dict[str, Look], measured: list[Measured]
) -> dict[str, object]:
    return {
        "weights": str(settings.weights),
        "protocol": {**asdict(benchmark.protocol), "said": benchmark.said},
        "tasks": [described(task, looks[task.name]) for task in chosen],
        "measured": [asdict(m) for m in measured],
        "rows": [asdict(row) for row in rows(measured)],
        "published": {task.name: published(task) for task in chosen},
        "published_means": published_means(),
    }
