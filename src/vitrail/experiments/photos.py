"""`vitrail fit`: an answer within a minute for anyone's photos, and a better one by the minute.

Unusual: the run folder is whole from the first answer on. Whatever ends the rest (Ctrl-C, a full disk, a loss that is not
finite), what was best by then is there to be used.
"""

import dataclasses
import io
import shlex
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from vitrail.core.device import Precision, own_randomness, pick_device
from vitrail.core.errors import UserError
from vitrail.core.runs import RunFolder, read_json
from vitrail.core.types import Row
from vitrail.core.values import to_json
from vitrail.data.splits import Splits
from vitrail.experiments import build
from vitrail.experiments.at_hand import best_at_hand
from vitrail.experiments.costs import this_machine
from vitrail.experiments.first_answer import Judged, first_answer, judge
from vitrail.experiments.photos_data import read_photos
from vitrail.experiments.photos_folder import Comparison, State, accuracies, lines, next_commands, write
from vitrail.experiments.photos_recipe import STEP, batch_size, epoch_seconds, gentle
from vitrail.experiments.recipe import LengthSettings, Own, Recipe, RunSettings
from vitrail.experiments.run import run
from vitrail.inference.engines import EngineName
from vitrail.inference.features import default_cache, weights_hash
from vitrail.models.classifier import Classifier
from vitrail.training.log import duration
from vitrail.training.pace import ending_by
from vitrail.training.signals import stopping
from vitrail.weights import native
from vitrail.weights.load import load

LEAST = 1.0
"""Minutes; the first answer alone takes about one."""
SCRATCH_LEAST = 20.0
"""Seconds of training from random weights, whatever the looking took."""
LEAST_EPOCHS = 0.5
REST = 8.0
"""Seconds for what is neither looking nor training: loading, saving, drawing, the report."""
SLOWER = 1.5
"""Times the measured one that the last looks may take, where the machine has become slower by then."""
SCRATCH_SHARE = 0.9
"""Of the time for training from random weights, what is planned. Of the rest, half is for a slower machine, half for the
last evaluation, of which nothing is known yet."""
FIXED = ("weights", "validation", "seed")
"""Settings that a run keeps when it goes on. Of the others, those that are not given are as they were."""


@dataclass(frozen=True)
class Settings:
    """A model of your photos, and what to mend in them: a first answer within a minute, then fine-tuning."""

    photos: tyro.conf.Positional[str]
    """A folder with one folder a class (or train and val folders of those), or whatever else --data takes."""
    minutes: float = 10.0
    """All the time there is, the first answer's minute among it."""
    weights: str = ""
    """What to start from: a checkpoint of any known library, or an id; none: the best that is at hand, said aloud."""
    out: Path | None = None
    """The run folder; none: a new one under runs/."""
    resume: bool = False
    """Go on with the run in --out (or, without it, in the newest of these photos); what is not given is as it was."""
    validation: float = 0.2
    """Share of the training pictures held out to choose between the models."""
    seed: int = 0
    """Of what is held out, of the folds and of the training."""
    device: str = ""
    """cpu, cuda, cuda:1, mps; none: the fastest there is."""
    engine: EngineName = "eager"
    """What reads the first answer's features: eager, PyTorch; auto: the fastest here, measured once and remembered;
    compile, openvino, onnx: that one."""
    cache: bool = True
    """Keep features in $VITRAIL_CACHE/features (none: ~/.cache/vitrail/features), so that asking again is quick."""


def fit_photos(asked: Settings, command: Sequence[str] = (), given: Collection[str] = ()) -> int:
    """0, or 130 after Ctrl-C. Raises UserError on whatever a person has to mend.

    given: names of settings that were asked for, be it for the default, which matters to a run that goes on.
    """
    if not LEAST <= asked.minutes < 10_000:
        raise UserError(
            f"--minutes is {asked.minutes:g}; give at least {LEAST:g}, for the first answer alone takes that."
        )
    place = asked.out or _place(asked)
    if asked.resume and not (place / "config.json").exists():
        raise UserError(f"--resume: {place} holds no run to go on with; leave --resume out to start one there.")
    if not asked.resume and (place / "config.json").exists():
        raise UserError(f"--out {place} already holds a run; add --resume to go on with it, or give another folder.")
    threads = torch.get_num_threads()
    folder = RunFolder(place)
    try:
        known: dict[str, Any] = {}
        if asked.resume:
            asked, known = _recalled(asked, given, folder.file("config.json"))
        with own_randomness():
            return _Fit(asked, shlex.join(command), pick_device(asked.device or None), folder, known).carry_out()
    finally:
        torch.set_num_threads(threads)
        folder.close()


def _place(asked: Settings) -> Path:
    """runs/PHOTOS-fit, numbered where that is taken; the newest of them when resuming."""
    name = "".join(c if c.isalnum() else "-" for c in Path(asked.photos).name).strip("-").lower() or "photos"
    places = [Path("runs") / (f"{name}-fit" if number == 1 else f"{name}-fit-{number}") for number in range(1, 10_000)]
    taken = [place for place in places if (place / "config.json").exists()]
    if asked.resume and taken:
        return taken[-1]
    return next(place for place in places if place not in taken)


def _recalled(asked: Settings, given: Collection[str], path: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings that a run began with, and what is asked for now; and its config.json."""
    config, default = read_json(path), to_json(Settings(asked.photos))
    before = config.get("settings") if isinstance(config, dict) else None
    free = default.keys() - {"photos", "out", "resume"}
    if not (isinstance(before, dict) and isinstance(config.get("data"), dict) and {"minutes", *FIXED} <= before.keys()):
        raise UserError(f"{path} is not of a run of `vitrail fit`; give the folder of one with --out.")
    before = {**default, **before}
    now = {name: value for name, value in to_json(asked).items() if name in given or value != default[name]}
    for name in FIXED:
        same = now.get(name) == before[name]
        if name in now and name == "weights":
            same = Path(now[name]).resolve() == Path(before[name]).resolve()
        if name in now and not same:
            began = f"--{name} {before[name]}" if before[name] != "" else "random weights"
            raise UserError(
                f"--resume: this run began with {began}, not --{name} {now[name]}; give what it began with, or start a new "
                "run with another --out."
            )
    return dataclasses.replace(asked, **{name: before[name] for name in free if name not in now}), config


@dataclass
class _Fit:
    """known: the config.json of the run that goes on; empty in a new one."""

    asked: Settings
    command: str
    device: torch.device
    folder: RunFolder
    known: dict[str, Any]
    state: State | None = None
    """The best so far, as the run folder has it."""
    chosen: tuple[str, Judged] | None = None
    """What a fine-tuned model, by its hash, says of the pictures that choose."""

    def carry_out(self) -> int:
        self.began, stopped = time.monotonic(), 0
        self.before = self.known.get("settings", {})
        # Measured, so it could come out otherwise when a run is continued.
        fast = self.before.get("precision") or ("bf16" if this_machine(self.device).fast_bf16 else "fp32")
        self.precision: Precision = "bf16" if fast == "bf16" else "fp32"
        try:
            weights = self._weights()
            then = (
                "a first answer from frozen features within about a minute, then fine-tuning in the time left, and the "
                "better of the two"
                if weights
                else "then training from random weights in all the time there is, and a model"
            )
            say(
                f"what happens now, in {duration(60 * self.asked.minutes)}: a look at the pictures (seconds), {then}, with "
                f"a report, in {self.folder.path}. Ctrl-C at any time keeps the best so far."
            )
            record = self.folder.file("split.json")
            if not self.asked.resume:
                record.unlink(
                    missing_ok=True
                )  # of a run that was refused before it began, as in experiments/pictures.py
            photos = read_photos(self.asked.photos, self.asked.validation, self.asked.seed, record, say)
            if self.asked.resume and self.known["data"].get("fingerprint") != photos.fingerprint:
                raise UserError(
                    f"--resume: {self.asked.photos} has changed since this run began; bring the pictures back as they were, "
                    "or start a new run with another --out."
                )
            settings = {**to_json(self.asked), "weights": weights or "", "precision": self.precision}
            state = State(photos, settings, self.command)
            state = state if weights is None else self._answer_first(state, weights)
            stopped = self._improve(state)
        except KeyboardInterrupt:
            stopped = signal.SIGINT
        return self._end(stopped)

    def _weights(self) -> str | None:
        if self.asked.weights or self.asked.resume:
            return self.asked.weights or None
        found = best_at_hand(self.device.type == "cuda")
        say(f"planned: --weights {found.said}")
        return found.weights

    def _answer_first(self, state: State, weights: str) -> State:
        first = first_answer(
            state.photos,
            weights,
            seconds=60 * self.asked.minutes,
            size=tuple(self.before.get("size", ())),
            device=self.device,
            precision=self.precision,
            engine=self.asked.engine,
            cache=default_cache() if self.asked.cache else None,
            seed=self.asked.seed,
            say=say,
        )
        native.save(first.start.cpu(), self.folder.file("first-answer") / "model.safetensors")
        settings = {**state.settings, "size": list(first.model.preprocess.size)}
        state = dataclasses.replace(
            state, settings=settings, photos=first.photos, first=first, kept=first.model, judged=first.judged
        )
        state = self._keep(state, "first answer")
        say(f"\nfirst answer after {duration(state.seconds['first answer'])}, {first.head}:")
        for line in (*accuracies(state), *lines(state)):
            say(f"  {line}")
        say(f"it is in {self.folder.path} already, with report.html")
        return state

    def _keep(self, state: State, moment: str) -> State:
        """Writes the run folder; a Ctrl-C meanwhile waits until it is whole."""
        seconds = {**state.seconds, moment: time.monotonic() - self.began}
        state = dataclasses.replace(state, seconds=seconds)
        with stopping() as received:
            write(state, self.folder)
            self.state = state
        if received:
            raise KeyboardInterrupt
        return state

    def _improve(self, state: State) -> int:
        """Fine-tuning (or training, without a first answer), and the better of both; the signal that ended it, or 0."""
        place = self.folder.file("fine-tuned")
        try:
            left = self._time_left(state)
            if left is None:
                return 0
            planned, most = left
            say(f"\n{'training' if state.first is None else 'fine-tuning'} for {duration(max(most, 0))} at most ...")
            with ending_by(time.monotonic() + most), _indented():
                outcome = run(self._recipe(state, place, planned), (self.command,)).outcome
            assert outcome is not None
            state, stopped = dataclasses.replace(state, trained=outcome), outcome.interrupted or 0
            if state.late:
                say(f"\n{state.late}.")
            self._keep(self._better(state, place / ("last.safetensors" if stopped else "model.safetensors")), "all")
            return stopped
        except UserError as error:
            if state.first is None:
                raise
            say(f"fine-tuning ended early; the first answer is kept: {error}")
            return 0

    def _end(self, stopped: int) -> int:
        state = self.state
        if state is None:
            kept = "; features stay in the cache, so the same command goes on from there" if self.asked.cache else ""
            say(f"\nstopped before there was an answer{kept}.")
            return 128 + stopped
        if stopped:
            state = dataclasses.replace(state, stopped=True)
            state = self._keep(state, "all")
        say(f"\n{'stopped' if stopped else 'done'} after {duration(time.monotonic() - self.began)}; kept: {state.what}")
        for line in accuracies(state):
            say(f"  {line}")
        say(f"run folder: {self.folder.path} (report.html shows it all)\nnext:")
        for line in next_commands(state, self.folder):
            say(f"  {line}")
        return 128 + stopped if stopped else 0

    def _time_left(self, state: State) -> tuple[float, float] | None:
        """Seconds of training to plan, and seconds from now after which it must end; None, said, where they are too few."""
        left = 60 * self.asked.minutes - (time.monotonic() - self.began) - REST
        if state.first is None:
            most = max(left, SCRATCH_LEAST)
            return SCRATCH_SHARE * most, (1 + SCRATCH_SHARE) / 2 * most
        photos, speed = state.photos, state.first.speed
        if photos.choose is None:
            say(
                "no picture could be held out to compare by, so there is no fine-tuning; each class needs two at least."
            )
            return None
        most = left - SLOWER * (len(photos.choose) + len(photos.measured or ())) * speed.each
        room = most - 3 * STEP * batch_size(photos, self.device) * speed.seeing  # a step is measured before
        epoch = epoch_seconds(state.first, photos)
        if room < LEAST_EPOCHS * epoch and not self.folder.file("fine-tuned/state.pt").exists():
            minutes = self.asked.minutes + (epoch - room) / 60
            say(f"no time is left to fine-tune; --minutes {minutes + 0.1:.1f} would hold an epoch.")
            return None
        return room, most

    def _recipe(self, state: State, place: Path, seconds: float) -> Recipe:
        photos, first, resume = state.photos, state.first, (place / "config.json").exists()
        settings = RunSettings(out=place, device=self.asked.device, seed=self.asked.seed)
        own = Own(splits=Splits(photos.learn, photos.choose, None, photos.origin, False), surveyed=True)
        if first is None:
            recipe = Recipe(run=settings, length=LengthSettings(minutes=seconds / 60))
        else:
            start = self.folder.file("first-answer") / "model.safetensors"
            recipe = gentle(settings, photos, first, start, seconds, self.device, self.precision)
            # The same objective, but evaluated here, where each picture's answer is kept for the comparison.
            objective = build.task(recipe, photos.classes, first.start.preprocess)
            own = dataclasses.replace(own, objective=objective, evaluate=lambda model: self._evaluate(state, model))
        if resume:  # its own settings are those that it began with
            recipe = Recipe(run=RunSettings(out=place, device=self.asked.device, resume=True))
        return dataclasses.replace(recipe, own=own)

    def _evaluate(self, state: State, model: nn.Module) -> list[Row]:
        tally = self._choosing(state, model).tally
        return [
            Row("validation/accuracy", 100 * tally.accuracy),
            Row("validation/loss", tally.mean_loss, unit=""),
        ]

    def _choosing(self, state: State, model: nn.Module) -> Judged:
        """What a model says of the pictures that choose; asked at the end of training, and again of the weights it kept."""
        assert isinstance(model, Classifier)
        mark = weights_hash(model)
        if self.chosen is None or self.chosen[0] != mark:
            self.chosen = mark, self._judge(state, model, state.photos.chooser)
        return self.chosen[1]

    def _judge(self, state: State, model: Classifier, pictures: str) -> Judged:
        source = state.photos.choose if pictures == state.photos.chooser else state.photos.measured
        assert source is not None
        speed = state.first.speed if state.first is not None else None
        return judge(model, pictures, source, self.device, self.precision, speed)

    def _better(self, state: State, weights: Path) -> State:
        """The first answer or the new weights, whichever gets more of the held-out pictures right; the first, if equal."""
        photos, first = state.photos, state.first
        made = load(weights).to(self.device)
        chosen = self._choosing(state, made)
        if first is not None and first.chosen is not None:
            comparison = Comparison.of(first.chosen, chosen)
            say(f"\n{comparison.said()}")
            state = dataclasses.replace(state, comparison=comparison)
            if not comparison.better:
                return state
        judged = [chosen, *([self._judge(state, made, photos.measurer)] if photos.measured is not None else [])]
        return dataclasses.replace(state, kept=made, judged=tuple(judged))


def say(line: str) -> None:
    print(line, flush=True)


class _Indented(io.TextIOBase):
    """What the training says, a step to the right; where its own folder is, is of no concern here."""

    def __init__(self, out: Any) -> None:
        self.out = out

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line and not line.startswith(("run folder:", "next:", "stopped at")):
                self.out.write(f"  {line}\n")
        return len(text)

    def flush(self) -> None:
        self.out.flush()


@contextmanager
def _indented() -> Iterator[None]:
    with redirect_stdout(_Indented(sys.stdout)):
        yield
