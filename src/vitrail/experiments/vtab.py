"""VTAB-1k (arXiv 1910.04867) of one model: 19 tasks of 1,000 pictures, by the paper's fine-tuning or on frozen features.

Unusual: each finished task is a file of its own that says what it was made with, so that a benchmark of days goes on
where it was stopped, and never mixes numbers of different weights, settings or pictures.

`finetune` is the ViT paper's (B.1.1): one setting for all tasks, 2,500 steps of 512 pictures at a rate of 0.01 and 384 px,
or the most below it that the model's patches fill.
`linear` is ours, and fast: logistic regression on frozen features, its penalty chosen on the 200 of the 1,000 pictures.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vitrail.core.device import Precision
from vitrail.core.errors import UserError
from vitrail.core.runs import read_json, write_json
from vitrail.core.types import Row
from vitrail.data.splits import Splits
from vitrail.data.vtab import TASKS, Group, Task
from vitrail.data.vtab_sample import Draw
from vitrail.evaluation.linear import Design, path
from vitrail.evaluation.means import mean_interval
from vitrail.evaluation.metrics import wilson
from vitrail.experiments.paper import SIDE, finetuning, side
from vitrail.experiments.paper_results import H14_JFT, L16_I21K, L16_JFT, TABLE_9, VTAB_TASKS
from vitrail.experiments.recipe import LengthSettings, Own, Recipe, RunSettings
from vitrail.experiments.run import run
from vitrail.inference.features import Model, Reading, extract, weights_hash
from vitrail.models.classifier import Classifier
from vitrail.training.pace import Outcome

FORMAT = 1
GROUPS: tuple[Group, ...] = ("natural", "specialized", "structured")
PUBLISHED = {"H/14 JFT": TABLE_9[H14_JFT], "L/16 JFT": TABLE_9[L16_JFT], "L/16 I21k": TABLE_9[L16_I21K]}
"""Table 9, in the order of its tasks."""
Method = Literal["finetune", "linear"]


@dataclass(frozen=True)
class Protocol:
    """How a task is measured. The defaults of steps, batch, size and rate are the paper's; `linear` needs none of them."""

    method: Method = "finetune"
    steps: int = 2_500
    batch: int = 512
    size: int = SIDE
    rate: float = 0.01
    reading: Reading = "planned"
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Measured:
    """One run on one task. accuracy: top-1 on the test pictures, in [0, 1]. sample: whose 1,000 pictures trained."""

    task: str
    seed: int
    accuracy: float
    count: int
    sample: str


@dataclass(frozen=True)
class Benchmark:
    """A model, and where its results are kept: `out` / TASK-seedN.json, beside it the run's folder where it was trained."""

    model: Model
    weights: Path
    protocol: Protocol
    out: Path
    device: torch.device
    cache: Path | None = None
    workers: int = -1
    command: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """How a task is measured, and whether it is the paper's way: at `SIDE` pixels, or what this model takes for them."""
        own = self.protocol
        if own.method == "linear":
            return "logistic regression on frozen features (not the paper's fine-tuning)"
        said = f"fine-tuning, {own.steps:,} steps of {own.batch} at {own.rate:g} and {own.size} px"
        if (own.steps, own.batch, own.size, own.rate) != (2_500, 512, size_for(self.model), 0.01):
            return f"{said} (not the paper's setting)"
        return f"{said}{'' if own.size == SIDE else f', for patches that do not fill {SIDE}'}, as in the paper"

    def measure(self, task: Task, draw: Draw, seed: int) -> Measured | Outcome:
        """What is kept of this task and seed, else measured now; the outcome of a training that was stopped.

        Raises UserError where files cannot be read or written.
        """
        file = self.out / f"{task.name}-seed{seed}.json"
        key = self._key(draw, seed)
        if file.is_file():
            kept = read_json(file)
            if kept.get("format") == FORMAT and kept.get("key") == key:
                return Measured(**kept["measured"])
        self.out.mkdir(parents=True, exist_ok=True)
        if self.protocol.method == "linear":
            accuracy, count = self._linear(task, draw)
        else:
            found = self._finetuned(task, draw, seed, key)
            if isinstance(found, Outcome):
                return found
            accuracy, count = found
        measured = Measured(task.name, seed, accuracy, count, draw.sample)
        described = {"format": FORMAT, "key": key, "measured": dataclasses.asdict(measured)}
        described |= {
            "protocol": dataclasses.asdict(self.protocol),
            "origin": draw.origin,
            "weights": str(self.weights),
        }
        write_json(file, described)
        return measured

    def _key(self, draw: Draw, seed: int) -> str:
        """Of all that the number depends on."""
        seen = [weights_hash(self.model), dataclasses.asdict(self.protocol), seed, str(self.model.preprocess)]
        seen += [source.fingerprint for source in (draw.train, draw.validation, draw.test)]
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    def _linear(self, task: Task, draw: Draw) -> tuple[float, int]:
        tables = [
            extract(
                self.model,
                source,
                self.model.preprocess,
                reading=self.protocol.reading,
                device=self.device,
                precision=self.protocol.precision,
                workers=self.workers,
                cache=self.cache,
                progress=True,
            )
            for source in (draw.train, draw.validation, draw.test)
        ]
        train, held, test = tables
        heads = path(Design(train.features), train.labels, task.classes, "logistic")
        right = [float((head(held.features).argmax(1) == held.labels).double().mean()) for head in heads]
        penalty = heads[int(np.argmax(right))].penalty  # of equally good ones the strongest, which comes first
        features, labels = torch.cat([train.features, held.features]), torch.cat([train.labels, held.labels])
        head = Design(features).logistic(labels, task.classes, penalty)
        hits = int((head(test.features).argmax(1) == test.labels).sum())
        return hits / len(test.labels), len(test.labels)

    def _finetuned(self, task: Task, draw: Draw, seed: int, key: str) -> tuple[float, int] | Outcome:
        folder = self.out / f"{task.name}-seed{seed}-{key[:8]}"
        recipe = recipe_for(task, self.protocol, self.weights)
        settings = RunSettings(
            out=folder,
            resume=(folder / "config.json").exists(),
            seed=seed,
            device=str(self.device),
            precision=self.protocol.precision,
            evaluate_every=1e6,
        )
        splits = Splits(draw.both, None, draw.test, f"vtab/{task.name}: {draw.origin}", False)
        recipe = dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, workers=self.workers),
            run=settings,
            own=Own(splits=splits, surveyed=True),
        )
        result = run(recipe, self.command)
        if not result.rows:
            assert result.outcome is not None
            return result.outcome
        headline = result.rows[0]
        assert headline.count is not None
        return headline.value / 100, headline.count


def recipe_for(task: Task, protocol: Protocol, weights: Path) -> Recipe:
    """The paper's recipe for a task of VTAB (`paper.finetuning`), at this protocol's length and size."""
    recipe = finetuning(L16_I21K, f"vtab/{task.name}")
    warmup = max(1, round(recipe.schedule.warmup * protocol.steps / 2_500))
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, size=(protocol.size,), batch=protocol.batch),
        model=dataclasses.replace(recipe.model, weights=weights),
        optimiser=dataclasses.replace(recipe.optimiser, rate=protocol.rate),
        schedule=dataclasses.replace(recipe.schedule, warmup=warmup),
        length=LengthSettings(steps=protocol.steps),
    )


def size_for(model: Model, asked: int = 0) -> int:
    """The side in pixels to fine-tune at: `asked`, or, for 0, the paper's for this model. Raises UserError where its patches
    do not fill the one that is asked for."""
    config = (model.backbone if isinstance(model, Classifier) else model).config
    if not asked:
        return side(config.stride)
    try:
        config.tokens((asked, asked))
    except UserError as error:
        raise UserError(f"--size {asked}: {error}.") from error
    return asked


def published(task: Task) -> dict[str, float]:
    """Table 9's accuracies in per cent, by its rows."""
    place = VTAB_TASKS.index(f"vtab/{task.name}")
    return {name: row[place] for name, row in PUBLISHED.items()}


def published_means() -> dict[str, dict[str, float]]:
    """Table 9's means by group and of all 19, likewise."""
    order = [TASKS[name.removeprefix("vtab/")] for name in VTAB_TASKS]
    parts = {group: [task.group == group for task in order] for group in GROUPS} | {"VTAB-1k": [True] * len(order)}
    return {
        name: {row: float(np.mean(np.array(values)[np.array(chosen)])) for row, values in PUBLISHED.items()}
        for name, chosen in parts.items()
    }


def rows(measured: Sequence[Measured]) -> list[Row]:
    """A row a task, then the means of the groups and of all 19: in per cent, with 95 % intervals.

    With several seeds an interval is Student's over the seeds; with one it is Wilson's of the test pictures (of a mean, the
    tasks' half widths added as deviations are). A group that lacks tasks is named after those that it has.
    """
    seeds = sorted({m.seed for m in measured})
    by_task = {name: [m for m in measured if m.task == name] for name in TASKS if any(m.task == name for m in measured)}
    table = [_row(TASKS[name].title, each) for name, each in by_task.items()]
    for name, group in (*((group, group) for group in GROUPS), ("VTAB-1k", None)):
        members = [task for task in TASKS.values() if group in (None, task.group)]
        there = [task.name for task in members if task.name in by_task and len(by_task[task.name]) == len(seeds)]
        if not there:
            continue
        called = (
            f"{name} mean" if len(there) == len(members) else f"{name} mean of {len(there)} of {len(members)} tasks"
        )
        each = [[m for m in measured if m.task in there and m.seed == seed] for seed in seeds]
        mean, low, high = mean_interval([float(np.mean([m.accuracy for m in run])) for run in each])
        if low is None or high is None:
            # Wilson's interval of each task, as a deviation: of a task without a hit it is not zero.
            ends = [wilson(round(m.accuracy * m.count), m.count) for m in each[0]]
            half = sum(((end - start) / 2) ** 2 for start, end in ends) ** 0.5 / len(there)
            low, high = mean - half, mean + half
        low, high = max(low, 0.0), min(high, 1.0)
        table.append(Row(called, 100 * mean, 100 * low, 100 * high, sum(m.count for m in each[0])))
    return table


def _row(title: str, runs: Sequence[Measured]) -> Row:
    mean, low, high = mean_interval([m.accuracy for m in runs])
    count = runs[0].count
    if low is None or high is None:
        low, high = wilson(round(mean * count), count)
    return Row(title, 100 * mean, 100 * low, 100 * high, count)


def check(protocol: Protocol, seeds: int) -> None:
    """Raises UserError on a number that cannot be."""
    for flag, value in (
        ("steps", protocol.steps),
        ("batch", protocol.batch),
        ("size", protocol.size),
        ("seeds", seeds),
    ):
        if value < 1:
            raise UserError(f"--{flag} is {value}; give at least 1.")
