"""From a recipe to results: look at the data, plan, train, measure, report. `train`, `finetune` and `run` all end here."""

import copy
import dataclasses
import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrail.core import ranks
from vitrail.core.compiling import cannot_compile, uncompiled
from vitrail.core.device import own_randomness, pick_device
from vitrail.core.errors import UserError
from vitrail.core.runs import FORMAT, FULL, RunFolder, write_json
from vitrail.core.types import Preprocess, Row
from vitrail.core.values import to_json
from vitrail.data.splits import Splits
from vitrail.experiments import build, pretraining
from vitrail.experiments.costs import (
    commit,
    measure_step,
    peak_memory,
    this_machine,
    try_to_compile,
    versions,
)
from vitrail.experiments.pictures import open_pictures
from vitrail.experiments.place import open_folder
from vitrail.experiments.plan import DataFacts, Machine, pair, plan, plan_length, samples, steps
from vitrail.experiments.recipe import FINETUNE, Own, Recipe, check, flat, with_settings
from vitrail.experiments.results import Result, Results, measure
from vitrail.models.classifier import Classifier
from vitrail.models.masked import MaskedPatchPredictor
from vitrail.training import loop
from vitrail.training.log import Log, Metrics, Screen, TensorBoard, WeightsAndBiases, duration, import_wandb
from vitrail.training.memory import out_of_memory
from vitrail.training.pace import Outcome, Pace
from vitrail.weights import zoo
from vitrail.weights.conversion import Model

MEASURED_SECONDS, MOST_MEASURED = 3.0, 50
"""A processor's clock wanders, so a length in minutes rests on as many steps as these seconds hold, three to fifty."""


def run(recipe: Recipe, command: Sequence[str] = (), expected: float | None = None) -> Result:
    """Carries a recipe out, on this process or, under torchrun, on all of them.

    command: what was typed, for the record. expected: what the headline is known to come to, as published, in its unit;
    it is said and kept beside what came out. Raises UserError on whatever a person has to mend.
    """
    check(recipe)
    device = pick_device(recipe.run.device or None)
    threads = torch.get_num_threads()
    with ranks.together(device), own_randomness():
        folder, recipe = open_folder(recipe)
        try:
            return _Experiment(recipe, device, folder, command, expected).carry_out()
        except OSError as error:
            if error.errno not in FULL:
                raise
            what = error.filename or recipe.run.out
            raise UserError(
                f"{what} could not be written: no space is left on the disk; free some and continue."
            ) from error
        except (MemoryError, RuntimeError) as error:
            anew = ", in a new run (another --out)" if folder is not None and folder.started else ""
            if out_of_memory(error):
                raise UserError(
                    "The memory is not enough for this run; give fewer --workers, or a smaller --batch, --size or --model"
                    f"{anew}."
                ) from error
            if cannot_compile(error):
                raise uncompiled(error, "--compile", anew) from error
            raise
        finally:
            torch.set_num_threads(threads)
            if folder is not None:
                folder.close()


@dataclass
class _Experiment:
    recipe: Recipe
    device: torch.device
    folder: RunFolder | None
    command: Sequence[str]
    expected: float | None = None

    def carry_out(self) -> Result:
        requested = flat(self.recipe)
        start = build.start(self.recipe)  # before the pictures: a file that is missing is soon said
        if self.recipe.run.wandb:
            import_wandb()
        if self.recipe.run.compile:
            try_to_compile(self.device)
        self.pictures = open_pictures(self.recipe, self.say)
        facts, machine = self.pictures.facts(), this_machine(self.device)
        self._plan(facts, machine, start)
        if self.device.type == "cpu" and self.recipe.data.workers and "OMP_NUM_THREADS" not in os.environ:
            # Threads that share their cores with the data workers wait for each other by spinning (docs/log.md).
            torch.set_num_threads(max(1, machine.cores - self.recipe.data.workers))
        model, preprocess = build.model(self.recipe, self.pictures.classes, start)
        if self.recipe.model.weights is not None:
            fate = "its head kept" if self.recipe.model.head == "keep" else "its backbone whole, a new head of zeros"
            what = "the patches' prediction" if self.recipe.masked else f"{len(self.pictures.classes)} classes"
            self.say(f"weights: {self.recipe.model.weights}, {fate}, for {what}")
        self._length(model, preprocess, facts, machine)
        if self.recipe.run.dry_run:
            self.say("--dry-run: nothing was trained.")
            return Result(Path(str(self.recipe.run.out)))
        if not self.recipe.run.resume:
            self._write_config(requested, model, preprocess)
        outcome = self._train(model, preprocess, facts)
        results = Results(self.recipe, self.device, self.folder, self.pictures, outcome, self.say, self.expected)
        return results.finish(model, preprocess)

    def say(self, line: str = "") -> None:
        if ranks.first():
            print(line, flush=True)

    def _plan(self, facts: DataFacts, machine: Machine, start: Model | None) -> None:
        known = config = None
        if start is not None:
            for note in getattr(start, "report").notes:  # noqa: B009, models know nothing of reports
                self.say(f"weights: {note}")
            backbone = start.backbone if isinstance(start, Classifier) else start
            known, config = (backbone.width, start.preprocess), backbone.config
        elif self.recipe.own.preprocess is not None:
            self.recipe = with_settings(self.recipe, {"size": self.recipe.own.preprocess.size}, "the recipe")
        if self.recipe.model.model and start is None and self.recipe.own.network is None:
            zoo.config(self.recipe.model.model)  # so that a name that is not known is not taken for a wrong size
        try:
            self.recipe, said = plan(self.recipe, facts, machine, known)
            if config is not None:
                dataclasses.replace(config, image=pair(self.recipe.data.size))
        except UserError as error:
            raise UserError(f"--size: {error}.") from error
        for line in said:
            self.say(f"planned: {line}")

    def _length(self, model: nn.Module, preprocess: Preprocess, facts: DataFacts, machine: Machine) -> None:
        """Measures a step on a copy of the model, plans the length from it, and says what the run will cost."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        name = self.recipe.model.model if self.recipe.own.network is None else type(model).__qualname__
        self.say(f"model: {name}, {parameters:,} parameters, {preprocess.size[0]} x {preprocess.size[1]} px")
        length = self.recipe.length
        step_seconds = ranks.from_first(self._step_seconds(model, preprocess, 3))
        more = min(MOST_MEASURED, int(MEASURED_SECONDS / step_seconds))
        if more > 3 and not length.steps and not length.epochs:
            step_seconds = ranks.from_first(self._step_seconds(model, preprocess, more))
        held_out = len(self.pictures.splits.validation or ())
        # A forward pass is about a third of a step.
        epoch_seconds = held_out / self.recipe.data.batch * step_seconds / 3
        self.recipe, said = plan_length(self.recipe, facts, machine, step_seconds, epoch_seconds)
        for line in said:
            self.say(f"planned: {line}")
        total = steps(self.recipe, facts)
        epochs = samples(self.recipe, facts) / facts.pictures
        seconds = total * step_seconds + epochs / self.recipe.run.evaluate_every * epoch_seconds
        state = 2 + (self.recipe.optimiser.optimiser == "adam") + bool(self.recipe.optimiser.polyak)
        disk = parameters * 4 * (2 + 2 * state)  # the best, the last, and the state beside the one that replaces it
        self.say(
            f"estimate: {total:,} steps of {self.recipe.data.batch} pictures ({epochs:.1f} epochs), {duration(seconds)}, "
            f"{peak_memory(self.device) / 2**30:.1f} GiB of memory, {disk / 2**20:.0f} MiB on disk"
        )

    def _step_seconds(self, model: nn.Module, preprocess: Preprocess, count: int) -> float:
        recipe, pictures = self.recipe, self.pictures
        some = build.training_loader(recipe, pictures.splits.train, preprocess, pictures.said, some_steps=count)
        task = build.task(recipe, pictures.classes, preprocess)
        return measure_step(copy.deepcopy(model), task, some, recipe, self.device)

    def _write_config(self, requested: dict[str, Any], model: nn.Module, preprocess: Preprocess) -> None:
        if self.folder is None:
            return
        ours = isinstance(model, (Classifier, MaskedPatchPredictor))
        described = to_json(model.config) if ours else {"class": type(model).__qualname__}
        write_json(
            self.folder.file("config.json"),
            {
                "format": FORMAT,
                "command": shlex.join(self.command),
                "settings": flat(self.recipe),
                "requested": requested,
                "versions": versions(),
                "commit": commit(),
                "data": self.pictures.described(),
                "model": {"config": described, "preprocess": to_json(preprocess)},
            },
        )

    def _train(self, model: nn.Module, preprocess: Preprocess, facts: DataFacts) -> Outcome:
        recipe = self.recipe
        loader = build.training_loader(recipe, self.pictures.splits.train, preprocess, self.pictures.said)
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
        state = ranks.by_first(self._state) if recipe.run.resume else None
        start = int(state["step"]) if state else 0
        validation = self.pictures.splits.validation
        held_out = None
        if validation is not None:
            held_out = build.evaluation_loader(recipe, validation, preprocess, self.pictures.said, True)

        def validate(model: nn.Module) -> list[Row]:
            assert held_out is not None
            found = measure(recipe, self.device, model, held_out)
            return [Row("validation/accuracy", 100 * found.accuracy), Row("validation/loss", found.mean_loss, unit="")]

        evaluator = recipe.own.evaluate
        if evaluator is None and held_out is not None and recipe.own.objective is None:
            evaluator = pretraining.evaluator(recipe, self.device, held_out) if recipe.masked else validate
        screen = Screen(len(loader), start) if ranks.first() else None
        logs = self._logs(start)
        try:
            return loop.fit(
                model,
                build.task(recipe, self.pictures.classes, preprocess),
                loader,
                optimiser=recipe.optimiser,
                schedule=recipe.schedule,
                pace=pace,
                device=self.device,
                seed=recipe.run.seed,
                evaluate=evaluator,
                folder=self.folder,
                save_model=build.save_model,
                state=state,
                logs=logs,
                screen=screen,
            )
        finally:
            for log in (*logs, *([screen] if screen else [])):
                log.close()
            self.pictures.note_problems(train=loader, validation=held_out)

    def _state(self) -> dict[str, Any] | None:
        """What to go on from; None where the run died before it saved anything, and so begins anew."""
        assert self.folder is not None
        state = self.folder.load_state() if self.folder.resumable else None
        self.folder.cut_metrics(int(state["step"]) if state else -1)
        return state

    def _logs(self, start: int) -> list[Log]:
        if self.folder is None:
            return []
        logs: list[Log] = [
            Metrics(self.folder.file("metrics.jsonl")),
            TensorBoard(self.folder.path, start if self.recipe.run.resume else None),
        ]
        if self.recipe.run.wandb:
            logs.append(WeightsAndBiases(self.folder.path, flat(self.recipe)))
        return logs


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
