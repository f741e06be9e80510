"""From a recipe to results: look at the data, plan, train, measure, report. `train`, `finetune` and `run` all end here."""

import copy
import dataclasses
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitrail.analysis.figures import curves
from vitrail.core import ranks
from vitrail.core.device import own_randomness, pick_device
from vitrail.core.errors import UserError
from vitrail.core.runs import FORMAT, RunFolder, read_json, write_json
from vitrail.core.types import Preprocess, Row, Source
from vitrail.core.values import to_json
from vitrail.data.loader import PictureLoader
from vitrail.data.sources import digest, limit, subset
from vitrail.data.splits import Splits, open_data
from vitrail.data.survey import refuse_if_unreadable, survey
from vitrail.evaluation.metrics import Tally, evaluate
from vitrail.experiments import build
from vitrail.experiments.costs import commit, measure_step, peak_memory, picture_sizes, this_machine, versions
from vitrail.experiments.place import open_folder
from vitrail.experiments.plan import DataFacts, Machine, plan, plan_length, samples, steps
from vitrail.experiments.recipe import Recipe, flat, with_settings
from vitrail.experiments.report import write_report
from vitrail.models.classifier import Classifier
from vitrail.training import loop
from vitrail.training.log import Log, Metrics, Screen, TensorBoard, WeightsAndBiases, duration
from vitrail.training.loop import Outcome, Pace
from vitrail.weights import native


@dataclass(frozen=True)
class Result:
    """What a run came to.

    folder: the run folder. rows: the final measurements, the headline first. outcome: how training ended; None after a
    dry run.
    """

    folder: Path
    rows: tuple[Row, ...] = ()
    outcome: Outcome | None = None


def run(recipe: Recipe, command: Sequence[str] = ()) -> Result:
    """Carries a recipe out, on this process or, under torchrun, on all of them.

    command: what was typed, for the record. Raises UserError on whatever a person has to mend.
    """
    device = pick_device(recipe.run.device or None)
    with ranks.together(device), own_randomness():
        folder, recipe = open_folder(recipe)
        try:
            return _Experiment(recipe, device, folder, command).carry_out()
        finally:
            if folder is not None:
                folder.close()


@dataclass
class _Experiment:
    recipe: Recipe
    device: torch.device
    folder: RunFolder | None
    command: Sequence[str]
    unreadable: list[dict[str, str]] = field(default_factory=list)

    def carry_out(self) -> Result:
        requested = flat(self.recipe)
        self.splits = self._open_data()
        self.fingerprint = fingerprint(self.splits)
        if not self.recipe.run.resume:
            self._look()
        else:
            self._look_again()
        if self.recipe.data.limit:
            self.splits = dataclasses.replace(
                self.splits, train=limit(self.splits.train, self.recipe.data.limit, self.recipe.run.seed)
            )
        facts, machine = self._facts(), this_machine(self.device)
        self._plan(facts, machine)
        model, preprocess = build.model(self.recipe, self.classes)
        if self.recipe.model.weights is not None:
            self.say(f"weights: {self.recipe.model.weights}, whole but for a new head of {len(self.classes)} classes")
        self._length(model, preprocess, facts, machine)
        if self.recipe.run.dry_run:
            self.say("--dry-run: nothing was trained.")
            return Result(Path(str(self.recipe.run.out)))
        if not self.recipe.run.resume:
            self._write_config(requested, model, preprocess, facts)
        outcome = self._train(model, preprocess, facts)
        return self._finish(model, preprocess, outcome)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.splits.train.classes

    def say(self, line: str = "") -> None:
        if ranks.first():
            print(line, flush=True)

    def _open_data(self) -> Splits:
        own = self.recipe.own.splits
        if own is not None:
            return own
        settings = self.recipe.data
        if not settings.data:
            raise UserError(
                "--data is missing; give a folder with one folder a class, or sample:fashion to try it out."
            )
        record = Path(str(self.recipe.run.out)) / "split.json"
        keep = record if not self.recipe.run.dry_run else None
        if ranks.first():
            splits = open_data(settings.data, validation=settings.validation, seed=self.recipe.run.seed, record=keep)
        ranks.from_first(None)  # the others read the split that the first has recorded
        if not ranks.first():
            splits = open_data(settings.data, validation=settings.validation, seed=self.recipe.run.seed, record=keep)
        for note in splits.notes:
            self.say(f"note: {note}")
        return splits

    def _look(self) -> None:
        """The survey, by the first process for all."""
        found: tuple[list[str], list[tuple[str, str]], str] = ([], [], "")
        if ranks.first():
            seen = survey(self.splits)
            try:
                refuse_if_unreadable(seen, self.recipe.data.strict)
            except UserError as error:
                found = (seen.lines(), [], str(error))
            else:
                found = (seen.lines(), [(item.name, item.reason) for item in seen.unreadable], "")
        lines, unreadable, refusal = ranks.from_first(found)
        for line in lines:
            self.say(line)
        if refusal:
            raise UserError(refusal)
        self.unreadable = [{"name": name, "reason": reason} for name, reason in unreadable]
        self._leave_out({name for name, _ in unreadable})

    def _look_again(self) -> None:
        """The same data as the run began with, or a refusal."""
        path = Path(str(self.recipe.run.out)) / "config.json"
        data = read_json(path)["data"]
        if data["fingerprint"] != self.fingerprint:
            raise UserError(
                f"--resume: {self.splits.origin} has changed since this run began (its fingerprint in {path} is another "
                "one); bring the data back as they were, or start a new run with another --out."
            )
        self.unreadable = data["unreadable"]
        self._leave_out({item["name"] for item in self.unreadable})

    def _leave_out(self, names: set[str]) -> None:
        if names:
            kept: dict[str, Any] = {split: _without(source, names) for split, source in sources(self.splits)}
            self.splits = dataclasses.replace(self.splits, **kept)

    def _facts(self) -> DataFacts:
        train = self.splits.train
        heights, widths = zip(*picture_sizes(train, 32), strict=True)
        return DataFacts(len(train), len(train.classes), int(np.median(heights)), int(np.median(widths)))

    def _plan(self, facts: DataFacts, machine: Machine) -> None:
        start = None
        if self.recipe.model.weights is not None:
            described = native.describe(self.recipe.model.weights)
            start = described.backbone, described.preprocess
        elif self.recipe.own.preprocess is not None:
            size = self.recipe.own.preprocess.size
            settings: dict[str, Any] = {"size": size, "model": self.recipe.model.model or "ViT-Ti/16"}
            self.recipe = with_settings(self.recipe, settings, "the recipe")
        self.recipe, said = plan(self.recipe, facts, machine, start)
        for line in said:
            self.say(f"planned: {line}")

    def _length(self, model: nn.Module, preprocess: Preprocess, facts: DataFacts, machine: Machine) -> None:
        """Measures a step on a copy of the model, plans the length from it, and says what the run will cost."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.say(
            f"model: {self.recipe.model.model}, {parameters:,} parameters, {preprocess.size[0]} x {preprocess.size[1]} px"
        )
        some = build.training_loader(self.recipe, self.splits.train, preprocess, some_steps=3)
        step_seconds = measure_step(
            copy.deepcopy(model), build.task(self.recipe, self.classes, preprocess), some, self.recipe, self.device
        )
        held_out = len(self.splits.validation or ())
        # A forward pass is about a third of a step.
        epoch_seconds = held_out / self.recipe.data.batch * step_seconds / 3
        step_seconds, epoch_seconds = ranks.from_first((step_seconds, epoch_seconds))
        self.recipe, said = plan_length(self.recipe, facts, machine, step_seconds, epoch_seconds)
        for line in said:
            self.say(f"planned: {line}")
        total = steps(self.recipe, facts)
        epochs = samples(self.recipe, facts) / facts.pictures
        seconds = total * step_seconds + epochs / self.recipe.run.evaluate_every * epoch_seconds
        disk = parameters * 4 * (5 + 2 * bool(self.recipe.optimiser.polyak))
        self.say(
            f"estimate: {total:,} steps of {self.recipe.data.batch} pictures ({epochs:.1f} epochs), {duration(seconds)}, "
            f"{peak_memory(self.device) / 2**30:.1f} GiB of memory, {disk / 2**20:.0f} MiB on disk"
        )

    def _measure(self, model: nn.Module, loader: PictureLoader) -> Tally:
        classes = len(self.classes)
        precision = self.recipe.run.precision
        assert precision != "planned"
        return evaluate(model, loader, classes, device=self.device, precision=precision, source=loader.source)

    def _write_config(
        self, requested: dict[str, Any], model: nn.Module, preprocess: Preprocess, facts: DataFacts
    ) -> None:
        if self.folder is None:
            return
        described = to_json(model.config) if isinstance(model, Classifier) else {"class": type(model).__qualname__}
        write_json(
            self.folder.file("config.json"),
            {
                "format": FORMAT,
                "command": shlex.join(self.command),
                "settings": flat(self.recipe),
                "requested": requested,
                "versions": versions(),
                "commit": commit(),
                "data": {
                    "origin": self.splits.origin,
                    "fingerprint": self.fingerprint,
                    "classes": list(self.classes),
                    "counts": {split: len(source) for split, source in sources(self.splits)},
                    "unreadable": self.unreadable,
                },
                "model": {"config": described, "preprocess": to_json(preprocess)},
            },
        )

    def _train(self, model: nn.Module, preprocess: Preprocess, facts: DataFacts) -> Outcome:
        recipe = self.recipe
        loader = build.training_loader(recipe, self.splits.train, preprocess)
        per_epoch = max(1, round(recipe.run.evaluate_every * facts.pictures / recipe.data.batch))
        assert recipe.run.precision != "planned"
        pace = Pace(
            precision=recipe.run.precision,
            accumulate=recipe.run.accumulate,
            compile=recipe.run.compile,
            evaluate_every=per_epoch,
            log_every=recipe.run.log_every,
            save_minutes=recipe.run.save_minutes,
            checks=1 if self.device.type == "cpu" else recipe.run.log_every,
        )
        start = 0
        if recipe.run.resume and self.folder is not None and self.folder.resumable:
            start = int(self.folder.load_state()["step"])
            self.folder.cut_metrics(start)
        resume = ranks.from_first(start > 0)
        held_out = (
            build.evaluation_loader(self.recipe, self.splits.validation, preprocess, True)
            if self.splits.validation
            else None
        )

        def validate(model: nn.Module) -> list[Row]:
            assert held_out is not None
            found = self._measure(model, held_out)
            return [Row("validation/accuracy", 100 * found.accuracy), Row("validation/loss", found.mean_loss, unit="")]

        evaluator = recipe.own.evaluate
        if evaluator is None and held_out is not None and recipe.own.objective is None:
            evaluator = validate
        screen = Screen(len(loader), start) if ranks.first() else None
        logs = self._logs(start)
        try:
            return loop.fit(
                model,
                build.task(recipe, self.classes, preprocess),
                loader,
                optimiser=recipe.optimiser,
                schedule=recipe.schedule,
                pace=pace,
                device=self.device,
                seed=recipe.run.seed,
                evaluate=evaluator,
                folder=self.folder,
                save_model=build.save_model,
                resume=resume,
                logs=logs,
                screen=screen,
                layer_of=getattr(model, "layer_of", None),
            )
        finally:
            for log in (*logs, *([screen] if screen else [])):
                log.close()
            self._note_problems(loader, held_out)

    def _logs(self, start: int) -> list[Log]:
        if self.folder is None:
            return []
        logs: list[Log] = [Metrics(self.folder.file("metrics.jsonl")), TensorBoard(self.folder.path, start)]
        if self.recipe.run.wandb:
            logs.append(WeightsAndBiases(self.folder.path, flat(self.recipe)))
        return logs

    def _note_problems(self, *loaders: PictureLoader | None) -> None:
        """Pictures that only failed while training count among the unreadable ones too."""
        for loader in loaders:
            if loader is not None:
                problems = loader.problems.items()
                self.unreadable += [{"name": loader.source[i].name, "reason": reason} for i, reason in problems]

    def _finish(self, model: nn.Module, preprocess: Preprocess, outcome: Outcome) -> Result:
        """Measures the best weights on the pictures that chose nothing, where there are such, and writes the report."""
        place = Path(str(self.recipe.run.out))
        if outcome.interrupted is not None:
            self.say(
                f"stopped at step {outcome.step} of {outcome.total}; all is saved in {place}; go on with the same "
                f"command and --resume."
            )
            return Result(place, (), outcome)
        if self.recipe.own.objective is not None:
            self.say(f"done: {outcome.total:,} steps in {duration(outcome.seconds)}; the run folder is {place}.")
            return Result(place, (), outcome)
        best = place / "model.safetensors"
        ranks.from_first(None)  # until the first process has written it
        model.load_state_dict(build.weights(best))
        split, source = next(
            (name, source)
            for name, source in (
                ("test", self.splits.test),
                ("validation", self.splits.validation),
                ("training", self.splits.train),
            )
            if source is not None
        )
        loader = build.evaluation_loader(self.recipe, source, preprocess, False)
        tally = self._measure(model, loader)
        self._note_problems(loader)
        counted = len(source) - sum(map(len, ranks.gather_objects(loader.problems)))
        rows = [dataclasses.replace(row, name=f"{split} {row.name}") for row in tally.rows(counted)]
        self._report(tally, rows, source, outcome)
        headline = rows[0]
        self.say()
        self.say(
            f"{headline.name}: {headline.value:.2f} % [{headline.low:.2f}, {headline.high:.2f}] of {tally.count:,} pictures"
            f" after {duration(outcome.seconds)} of training (best weights: step {outcome.best_step:,})"
        )
        if self.unreadable:
            self.say(
                f"left out: {len(self.unreadable)} pictures that could not be read (named in {place}/results.json)"
            )
        self.say(f"run folder: {place} (report.html shows it all)")
        self.say(f"next: vitrail predict {place} PICTURE")
        return Result(place, tuple(rows), outcome)

    def _report(self, tally: Tally, rows: list[Row], source: Source, outcome: Outcome) -> None:
        if self.folder is None:
            return
        config, metrics = read_json(self.folder.file("config.json")), self.folder.metrics()
        results = {
            "rows": [to_json(row) for row in rows],
            "best_step": outcome.best_step,
            "steps": outcome.total,
            "seconds": round(outcome.seconds, 1),
            "unreadable": self.unreadable,
        }
        write_json(self.folder.file("results.json"), results)
        curves(metrics, self.folder.file("curves.png"))
        write_report(
            self.folder.path,
            config=config,
            metrics=metrics,
            tally=tally,
            rows=rows,
            source=source,
            classes=self.classes,
        )


def sources(splits: Splits) -> list[tuple[str, Source]]:
    """The splits that there are, by name."""
    named = (("train", splits.train), ("validation", splits.validation), ("test", splits.test))
    return [(name, source) for name, source in named if source is not None]


def fingerprint(splits: Splits) -> str:
    """Of all splits together."""
    return digest([source.fingerprint for _, source in sources(splits)])


def _without(source: Source, names: set[str]) -> Source:
    return subset(source, [index for index in range(len(source)) if source[index].name not in names])


def fit(data: str | Path | Splits, **settings: Any) -> Result:
    """Trains on `data` as `vitrail train --data` does, or, given `weights`, as `vitrail finetune`.

    data: what --data takes, or Splits of your own. settings: any setting of `Recipe` by its flag's name, with underscores
    (`model="ViT-S/16"`, `minutes=10`, `out="runs/mine"`). Raises UserError on whatever a person has to mend.
    """
    recipe = FINETUNE if settings.get("weights") else Recipe()
    if isinstance(data, Splits):
        recipe = dataclasses.replace(recipe, own=Own(splits=data))
    else:
        settings["data"] = str(data)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    said = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return run(with_settings(recipe, plain, "vitrail.fit"), (f"vitrail.fit({said})",))


def exit_code(outcome: Outcome | None) -> int:
    """0 for a finished run; 130 after Ctrl-C, 143 after SIGTERM."""
    if outcome is None or outcome.interrupted is None:
        return 0
    return 128 + (outcome.interrupted or signal.SIGINT)
