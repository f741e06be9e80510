"""The end of a run: its best weights measured on the pictures that chose nothing, and the report."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from vitrail.analysis.figures import curves
from vitrail.core import ranks
from vitrail.core.device import Precision
from vitrail.core.runs import RunFolder, read_json, write_json
from vitrail.core.types import Preprocess, Row, Source
from vitrail.core.values import to_json
from vitrail.data.decode import UnreadablePicture
from vitrail.data.loader import PictureLoader
from vitrail.data.sources import limit
from vitrail.data.transforms import Transform
from vitrail.evaluation.baselines import pixel_baselines
from vitrail.evaluation.metrics import Tally, evaluate, spoken
from vitrail.experiments import build, pretraining
from vitrail.experiments.pictures import Pictures
from vitrail.experiments.recipe import Recipe
from vitrail.experiments.report import write_report, write_task_report
from vitrail.training.log import duration
from vitrail.training.pace import Outcome

MOST_COMPARED = 20_000
"""Training pictures that the pixel baselines look at, at most."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    folder: the run folder. rows: the final measurements, the headline first. outcome: how training ended; None after a
    dry run.
    """

    folder: Path
    rows: tuple[Row, ...] = ()
    outcome: Outcome | None = None


def measure(
    recipe: Recipe, device: torch.device, model: nn.Module, loader: PictureLoader, precision: Precision | None = None
) -> Tally:
    """Every picture of the loader once, over all processes; in the recipe's precision, if no other is given."""
    if precision is None:
        assert recipe.run.precision != "planned"
        precision = recipe.run.precision
    return evaluate(model, loader, len(loader.source.classes), device=device, precision=precision, source=loader.source)


@dataclass(frozen=True)
class Results:
    """A run whose training has ended. expected: what its headline is known to come to, as published."""

    recipe: Recipe
    device: torch.device
    folder: RunFolder | None
    pictures: Pictures
    outcome: Outcome
    say: Callable[[str], None]
    expected: float | None = None

    def finish(self, model: nn.Module, preprocess: Preprocess) -> Result:
        """Measures in fp32, so that `vitrail evaluate` gives the same numbers, and says what the run came to."""
        place, outcome = Path(str(self.recipe.run.out)), self.outcome
        if outcome.interrupted is not None:
            self.say(
                f"stopped at step {outcome.step} of {outcome.total}; all is saved in {place}; go on with the same "
                "command and --resume."
            )
            return Result(place, (), outcome)
        if self.recipe.own.objective is not None:
            return self._finish_own(model, place)
        if self.recipe.masked:
            return self._finish_masked(model, preprocess, place)
        self._take_best(model)
        split, source = self._measured_on()
        loader = build.evaluation_loader(self.recipe, source, preprocess, self.pictures.said, False)
        tally = measure(self.recipe, self.device, model, loader, "fp32")
        counted = self._counted(split, loader)
        rows = [dataclasses.replace(row, name=f"{split} {row.name}") for row in tally.rows(counted)]
        rows[0] = dataclasses.replace(rows[0], expected=self.expected)
        baselines = ranks.by_first(lambda: self._baselines(source, preprocess)) if self.recipe.run.baselines else []
        record = self._record([*rows, *baselines])
        if record is not None:
            config, metrics, folder = record
            classes = self.pictures.classes
            every = [*rows, *baselines]
            write_report(
                folder, config=config, metrics=metrics, tally=tally, rows=every, source=source, classes=classes
            )
        self._tell(place, [rows[0], *baselines])
        return Result(place, (*rows, *baselines), outcome)

    def _finish_own(self, model: nn.Module, place: Path) -> Result:
        """What the recipe's own evaluator says of its best weights; without one, what the loss came to."""
        rows: list[Row] = []
        if self.recipe.own.evaluate is not None:
            self._take_best(model)
            rows = list(self.recipe.own.evaluate(model))
        elif self.folder is not None:
            losses = [line["loss"] for line in self.folder.metrics() if "loss" in line]
            rows = [Row("training loss of the last steps", losses[-1], unit="")] if losses else []
        self._conclude(place, rows, {}, "")
        return Result(place, tuple(rows), self.outcome)

    def _finish_masked(self, model: nn.Module, preprocess: Preprocess, place: Path) -> Result:
        self._take_best(model)
        split, source = self._measured_on()
        loader = build.evaluation_loader(self.recipe, source, preprocess, self.pictures.said, False)
        found = pretraining.measure(self.recipe, self.device, model, loader, "fp32")
        counted = self._counted(split, loader)
        rows = found.rows(pretraining.unit(self.recipe), counted)
        rows = [dataclasses.replace(row, name=f"{split}, {row.name}") for row in rows]
        shown = ""
        if self.folder is not None:
            shown = pretraining.pictures(self.recipe, self.device, model, source, preprocess)
        self._conclude(place, rows, {"What was hidden, and what it saw there": shown}, "patches")
        self.say(f"next: vitrail finetune --weights {place} --data FOLDER, or vitrail probe {place} --data FOLDER")
        return Result(place, tuple(rows), self.outcome)

    def _take_best(self, model: nn.Module) -> None:
        ranks.from_first(None)  # until the first process has written the best weights
        name = build.PREDICTOR if self.recipe.masked else "model.safetensors"
        model.load_state_dict(build.weights(Path(str(self.recipe.run.out)) / name))

    def _counted(self, split: str, loader: PictureLoader) -> int:
        """How many pictures there were to measure on, once what could not be read is known to all processes."""
        self.pictures.note_problems(**{split: loader})
        known = ranks.gather_objects(self.pictures.unreadable)
        self.pictures.unreadable = {which: why for each in known for which, why in each.items()}
        return len(loader.source) - sum(map(len, ranks.gather_objects(loader.problems)))

    def _measured_on(self) -> tuple[str, Source]:
        splits = self.pictures.splits
        named = (("test", splits.test), ("validation", splits.validation), ("train", splits.train))
        return next((name, source) for name, source in named if source is not None)

    def _baselines(self, source: Source, preprocess: Preprocess) -> list[Row]:
        """Of the very pictures that the model was trained and measured on."""
        self.say("comparing with what the pixels alone give ...")
        train = self.pictures.splits.train
        seen = limit(train, min(MOST_COMPARED, len(train)), self.recipe.run.seed)
        known, asked = _pixels(seen, preprocess), _pixels(source, preprocess)
        return pixel_baselines(*known, *asked, len(self.pictures.classes), self.recipe.run.seed)

    def _tell(self, place: Path, rows: list[Row]) -> None:
        self.say("")
        for number, row in enumerate(rows):
            self.say(f"{row.name}: {spoken(row)} pictures{f' {self._trained()}' if number == 0 else ''}")
        self._tell_rest(place, rows)
        if self.recipe.own.network is None:
            self.say(f"next: vitrail predict {place} PICTURE")

    def _conclude(self, place: Path, rows: list[Row], sections: dict[str, str], counted: str) -> None:
        """Record, report and last words of a run that learned no classes. counted: of what the headline's count is."""
        if rows:
            rows[0] = dataclasses.replace(rows[0], expected=self.expected)
        record = self._record(rows)
        if record is not None:
            config, metrics, folder = record
            write_task_report(folder, config=config, metrics=metrics, rows=rows, sections=sections)
        self.say("")
        if not rows:
            self.say(f"done: {self._trained()}")
        for number, row in enumerate(rows):
            of = f" {counted}" if counted and row.count is not None and row.unit == "%" else ""
            self.say(f"{row.name}: {spoken(row)}{of}{f' {self._trained()}' if number == 0 else ''}")
        self._tell_rest(place, rows)

    def _trained(self) -> str:
        which = "the last weights" if self.outcome.best is None else f"best weights: step {self.outcome.best_step:,}"
        return f"after {duration(self.outcome.seconds)} of training ({which})"

    def _tell_rest(self, place: Path, rows: list[Row]) -> None:
        if rows and rows[0].expected is not None:
            known = rows[0]
            between = "" if known.low is None else f" [{known.low:.2f}, {known.high:.2f}]"
            self.say(f"expected {known.expected:.2f}, got {known.value:.2f}{between}")
        if left := len(self.pictures.unreadable):
            self.say(f"left out: {left} pictures that could not be read (named in {place}/results.json)")
        self.say(f"run folder: {place} (report.html shows it all)")

    def _record(self, rows: list[Row]) -> tuple[dict[str, Any], list[dict[str, Any]], Path] | None:
        """results.json and curves.png, by the first process; what a report is made of."""
        if self.folder is None:
            return None
        config, metrics = read_json(self.folder.file("config.json")), self.folder.metrics()
        config["data"]["unreadable"] = self.pictures.left_out()  # those met since it was written too
        results = {
            "rows": [to_json(row) for row in rows],
            "best_step": self.outcome.best_step,
            "steps": self.outcome.step,
            "planned_steps": self.outcome.total,
            "seconds": round(self.outcome.seconds, 1),
            "unreadable": self.pictures.left_out(),
        }
        write_json(self.folder.file("results.json"), results)
        curves(metrics, self.folder.file("curves.png"))
        return config, metrics, self.folder.path


def _pixels(source: Source, preprocess: Preprocess) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"]]:
    """As an evaluation sees them, with their labels; without those that cannot be read, which were named before."""
    transform, pixels, labels = Transform(preprocess), [], []
    for index in range(len(source)):
        sample = source[index]
        with suppress(UnreadablePicture):
            pixels.append(torch.from_numpy(transform(sample.picture, None, sample.name)))
            labels.append(sample.label)
    return torch.stack(pixels), torch.tensor(labels)
