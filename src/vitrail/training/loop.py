"""The one training loop. It knows batches, a loss and time; never which task it runs.

Nothing random is kept between steps: dropout and augmentation draw from (seed, step, rank), the order of the data from
(seed, epoch). A run that was killed therefore goes on bit for bit from weights, optimiser state and a step number alone.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitrail.core import ranks
from vitrail.core.device import Precision, autocast, mix, own_randomness
from vitrail.core.errors import UserError
from vitrail.core.runs import RunFolder, write_whole
from vitrail.core.types import Batch, Labels, Objective, Progress, Row
from vitrail.training.log import Log, Screen, duration
from vitrail.training.optim import Average, Optimiser, Schedule, set_rate


class Steps(Protocol):
    """A loader that can begin at any step and make any batch again."""

    def __len__(self) -> int: ...

    def batches(self, start: int = 0) -> Iterator[Batch]: ...

    def at(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Pace:
    """How the loop runs, apart from what it computes."""

    precision: Precision = "fp32"
    """Of matrix products; weights, norms and losses stay fp32."""
    accumulate: int = 1
    """Parts that each batch is cut into, to save memory."""
    compile: bool = False
    """Compile the model with torch.compile."""
    evaluate_every: int = 1000
    """Steps between evaluations."""
    log_every: int = 50
    """Steps between lines of metrics."""
    save_minutes: float = 5.0
    """The most minutes of work that a kill can lose."""
    checks: int = 1
    """Steps between looks at whether the loss is finite: 1, or at each line; on a GPU each look makes it wait."""


@dataclass(frozen=True)
class Outcome:
    """step: where the run stopped, of `total`. best: the best evaluation's first row and its step. interrupted: the signal
    that ended it early, if one did."""

    step: int
    total: int
    best: float | None
    best_step: int
    seconds: float
    interrupted: int | None = None


Evaluate = Callable[[nn.Module], Sequence[Row]]
"""Its first row's value, the higher the better, chooses the best weights."""


def fit(
    model: nn.Module,
    task: Callable[[nn.Module], Objective],
    loader: Steps,
    *,
    optimiser: Optimiser,
    schedule: Schedule,
    pace: Pace,
    device: torch.device,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    folder: RunFolder | None = None,
    save_model: Callable[[nn.Module, Path], None] | None = None,
    resume: bool = False,
    logs: Sequence[Log] = (),
    screen: Screen | None = None,
    layer_of: Callable[[str], int] | None = None,
) -> Outcome:
    """Trains `model` in place over all of the loader's steps; leaves the last weights in it (the average, where kept).

    task: makes the objective around the model that the loop hands it (compiled, shared between processes).
    folder, save_model: where checkpoints go and how a model is written; only the first process writes.
    Raises UserError on a loss that is not finite, on too little memory, on a full disk; the last checkpoint stands.
    """
    run = _Run(model, task, loader, optimiser, schedule, pace, device, seed, evaluate, folder, save_model, layer_of)
    run.logs, run.screen = list(logs), screen
    with own_randomness(), _signals() as received:
        if resume and folder is not None:
            run.restore(folder.load_state())
        return run.train(received)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        task: Callable[[nn.Module], Objective],
        loader: Steps,
        optimiser: Optimiser,
        schedule: Schedule,
        pace: Pace,
        device: torch.device,
        seed: int,
        evaluate: Evaluate | None,
        folder: RunFolder | None,
        save_model: Callable[[nn.Module, Path], None] | None,
        layer_of: Callable[[str], int] | None,
    ) -> None:
        self.model = model.to(device)
        self.loader, self.schedule, self.pace, self.device, self.seed = loader, schedule, pace, device, seed
        self.evaluator, self.folder, self.save_model = evaluate, folder, save_model
        self.settings = optimiser
        self.optimiser = optimiser.build(model, layer_of)
        self.shared = ranks.share(torch.compile(model) if pace.compile else model, device)  # type: ignore[arg-type]
        self.objective = task(self.shared)
        self.average = Average(model, optimiser.polyak) if optimiser.polyak else None
        self.logs: list[Log] = []
        self.screen: Screen | None = None
        self.total = len(loader)
        self.step = 0
        self.best: float | None = None
        self.best_step = 0
        self.earlier = 0.0  # seconds trained before this process
        self.bad = torch.tensor(-1, device=device)  # the first step whose loss was not finite

    def train(self, received: list[int]) -> Outcome:
        self.begun = self.saved = time.monotonic()
        interval = _Interval(self.device)
        self.model.train()
        for batch in self.loader.batches(self.step):
            waited = interval.waited()
            loss = self._update(batch)
            interval.add(loss, batch, waited)
            self.step += 1
            if self.screen is not None:
                self.screen.advance(self.step)
            if self.step % self.pace.log_every == 0 or self.step == self.total:
                self._check()
                self._say({**interval.line(), "rate": self._rate(self.step - 1)})
                interval = _Interval(self.device)
            if self.evaluator is not None and (self.step % self.pace.evaluate_every == 0 or self.step == self.total):
                self._check()
                self._evaluate()
                interval.begin()
            if time.monotonic() - self.saved > self.pace.save_minutes * 60 and self.step < self.total:
                self._check()
                self._save()
                interval.begin()
            if self._stopped(received) and self.step < self.total:
                self._check()
                self._finish()
                return self._outcome(received[0] if received else signal.SIGINT)
            interval.wait()
        self._finish()
        return self._outcome(None)

    def _finish(self) -> None:
        self._save()
        if self.average is not None:
            self.model.load_state_dict(self.average.weights)
        self._write_model("last.safetensors")
        if self.best is None:
            self._write_model("model.safetensors")

    def _update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the batch's mean loss over this process's rows, on the device."""
        try:
            loss, norm = self._gradients(batch.to(self.device))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(self._what_fits(batch)) from error
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        self.bad = torch.where((self.bad < 0) & ~finite, self.step, self.bad)
        if self.pace.checks == 1:
            self._check()
        set_rate(self.optimiser, self._rate(self.step))
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.average is not None:
            self.average.update(self.model)
        self.objective.after_step(Progress(self.step + 1, self.total))
        return loss

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Fills the gradients with those of the mean over the global batch's valid rows; (local loss, gradient norm)."""
        parts = split(batch, self.pace.accumulate)
        valid = ranks.reduce_sum(batch.valid.sum())
        loss = torch.zeros((), device=self.device)
        for place, part in enumerate(parts):
            seed = mix(self.seed, self.step, ranks.rank(), place)
            torch.manual_seed(seed)
            share = part.valid.sum() / valid.clamp(min=1)
            last = place == len(parts) - 1
            # Each process's loss is scaled to its share of the sum; sharing averages, so times the number of processes.
            with _nothing() if last else ranks.quiet(self.shared):
                with autocast(self.device, self.pace.precision):
                    total = self.objective(part, seed).total
                (total * share * ranks.count()).backward()
            loss += total.detach() * part.valid.sum() / batch.valid.sum().clamp(min=1)
        self.objective.after_backward(Progress(self.step, self.total))
        norm = torch.zeros((), device=self.device)
        if self.settings.clip:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        return loss, norm

    def _rate(self, step: int) -> float:
        return self.settings.rate * self.schedule.factor(step, self.total)

    def _evaluate(self) -> None:
        assert self.evaluator is not None
        own = None
        if self.average is not None:
            own = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.average.weights)
        rows = self.evaluator(self.model)
        self.model.train()
        self._say({row.name: row.value for row in rows})
        if self.best is None or rows[0].value > self.best:
            self.best, self.best_step = rows[0].value, self.step
            self._write_model("model.safetensors")
        if own is not None:
            self.model.load_state_dict(own)

    def _say(self, line: Mapping[str, Any]) -> None:
        seconds = round(self.earlier + time.monotonic() - self.begun, 2)
        for log in [*self.logs, *([self.screen] if self.screen is not None else [])]:
            log({"step": self.step, "epoch": round(self._epoch(), 4), "seconds": seconds, **line})

    def _epoch(self) -> float:
        order = getattr(self.loader, "order", None)
        return self.step if order is None else min(self.step * order.batch, order.samples) / order.count

    def _check(self) -> None:
        """Ends the run, keeping what is needed to understand it, if a loss was not finite since the last look."""
        bad = int(ranks.reduce_max(self.bad).item())
        if bad < 0:
            return
        where = ""
        if self.folder is not None:
            path = self.folder.file(f"divergence-{ranks.rank()}.pt")
            batch = self.loader.at(bad)
            targets = None if batch.targets is None else batch.targets.values
            record = {"step": bad, "views": list(batch.views), "targets": targets, "index": batch.index}
            write_whole(path, lambda part: torch.save(record, part))
            if self.pace.checks == 1 and bad == self.step:
                self._save()  # the weights that met this batch are still good
            where = f" the batch and its step are in {path}, the last good checkpoint beside it;"
        raise UserError(
            f"The loss was not finite at step {bad} of {self.total};{where} try a lower --rate, a longer --warmup, "
            "--clip 1 or --precision fp32."
        )

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.folder is None or not ranks.first():
            return
        self.folder.save_state(
            {
                "step": self.step,
                "total": self.total,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "average": None if self.average is None else [self.average.steps, self.average.weights],
                "best": [self.best, self.best_step],
                "seconds": self.earlier + time.monotonic() - self.begun,
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Raises UserError if the state belongs to another model or a run of another length."""
        if state["total"] != self.total:
            raise UserError(
                f"--resume: the checkpoint is of a run of {state['total']} steps and these settings make {self.total}; "
                "give the settings that the run began with."
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                "--resume: the checkpoint holds another model than these settings make "
                f"({' '.join(str(error).split())[:160]}); give the settings that the run began with."
            ) from error
        if self.average is not None:
            self.average.steps, weights = state["average"]
            self.average.weights = {name: value.to(self.device) for name, value in weights.items()}
        self.step, (self.best, self.best_step), self.earlier = state["step"], state["best"], state["seconds"]

    def _write_model(self, name: str) -> None:
        if self.folder is not None and self.save_model is not None and ranks.first():
            self.save_model(self.model, self.folder.file(name))

    def _stopped(self, received: list[int]) -> bool:
        """All processes must leave after the same step, or they would wait for each other for ever."""
        if ranks.count() == 1:
            return bool(received)
        return self.step % 10 == 0 and bool(ranks.reduce_sum(torch.tensor(len(received), device=self.device)))

    def _what_fits(self, batch: Batch) -> str:
        """Finds by trying which part of the batch leaves room for its gradients."""
        rows = batch.valid.shape[0]
        parts = self.pace.accumulate
        self.optimiser.zero_grad()
        while parts < rows:
            parts *= 2
            try:
                _release(self.device)
                piece = split(batch, parts)[0].to(self.device)
                with autocast(self.device, self.pace.precision):
                    self.objective(piece, 0).total.backward()
                break
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self.optimiser.zero_grad()
        else:
            return (
                f"Even one picture of this size does not fit into {self.device.type} memory with this model; give a "
                "smaller --model or --size."
            )
        size = -(-rows // parts) * ranks.count()
        return (
            f"A batch of {rows * ranks.count()} pictures does not fit into {self.device.type} memory; {size} at a time "
            f"do: add --accumulate {parts} (the same numbers, in parts) or give --batch {size}."
        )

    def _outcome(self, interrupted: int | None) -> Outcome:
        seconds = self.earlier + time.monotonic() - self.begun
        return Outcome(self.step, self.total, self.best, self.best_step, seconds, interrupted)


class _Interval:
    """Sums over the steps since something was last said, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.steps, self.pictures, self.idle, self.busy = 0, 0, 0.0, 0.0
        self.begin()

    def begin(self) -> None:
        """Starts the clock; time spent on evaluating and saving is not training time."""
        self.mark = self.asked = time.monotonic()

    def wait(self) -> None:
        self.asked = time.monotonic()

    def waited(self) -> float:
        return time.monotonic() - self.asked

    def add(self, loss: Tensor, batch: Batch, waited: float) -> None:
        self.loss += loss.detach()
        self.steps += 1
        self.pictures += batch.valid.shape[0] * ranks.count()
        self.idle += waited
        now = time.monotonic()
        self.busy, self.mark = self.busy + now - self.mark, now

    def line(self) -> dict[str, float]:
        return {
            "loss": float(self.loss) / max(self.steps, 1),
            "images_per_second": round(self.pictures / max(self.busy, 1e-9), 2),
            "input_bound_percent": round(100 * self.idle / max(self.busy, 1e-9), 2),
        }


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch's rows in `parts` equal parts (fewer, where there are fewer rows)."""
    if parts == 1:
        return [batch]
    size = -(-batch.valid.shape[0] // parts)
    return [
        Batch(
            tuple(view[first : first + size] for view in batch.views),
            None if batch.targets is None else Labels(batch.targets.values[first : first + size]),
            batch.valid[first : first + size],
            batch.index[first : first + size],
        )
        for first in range(0, batch.valid.shape[0], size)
    ]


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or the system ran out of memory; on the CPU torch has no error type of its own for it."""
    words = ("DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory", "could not create a memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM for the loop to act on between two steps; a second Ctrl-C acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Evaluate", "Outcome", "Pace", "Steps", "duration", "fit", "out_of_memory", "split"]
