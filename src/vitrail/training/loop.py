"""The one training loop. It knows batches, a loss and time; never which task it runs.

Nothing random is kept between steps: dropout and augmentation draw from (seed, step, rank), the order of the data from
(seed, epoch). A run that was killed therefore goes on bit for bit from weights, optimiser state and a step number alone.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.core import ranks
from vitrail.core.device import autocast, mix, own_randomness
from vitrail.core.errors import UserError
from vitrail.core.runs import RunFolder, save_tensors, write_whole
from vitrail.core.types import Batch, Objective, Progress
from vitrail.training.log import Interval, Log, Screen
from vitrail.training.memory import out_of_memory, split, what_fits
from vitrail.training.optim import Average, Optimiser, Schedule, set_rate
from vitrail.training.pace import Evaluate, Outcome, Pace, Steps
from vitrail.training.signals import stopping


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
    state: Mapping[str, Any] | None = None,
    logs: Sequence[Log] = (),
    screen: Screen | None = None,
) -> Outcome:
    """Trains `model` in place over all of the loader's steps; leaves the last weights in it (the average, where kept).

    task: makes the objective around the model that the loop hands it (compiled, shared between processes).
    folder, save_model: where checkpoints go and how a model is written; only the first process writes.
    state: what `RunFolder.load_state` gave, on every process, to go on from there.
    After its deadline, a run that has steps left takes none of them: it is evaluated and saved as at its end.
    Raises UserError on a loss that is not finite, on too little memory, on a full disk, on data that fail; the last good
    checkpoint stands.
    """
    tasks = (evaluate, folder, save_model, list(logs), screen)
    run = _Run(model, task, loader, optimiser, schedule, pace, device, seed, *tasks)
    with own_randomness(), stopping() as received:
        if state is not None:
            run.restore(state)
        return run.train(received)


@dataclass
class _Run:
    model: nn.Module
    task: Callable[[nn.Module], Objective]
    loader: Steps
    settings: Optimiser
    schedule: Schedule
    pace: Pace
    device: torch.device
    seed: int
    evaluator: Evaluate | None
    folder: RunFolder | None
    save_model: Callable[[nn.Module, Path], None] | None
    logs: list[Log]
    screen: Screen | None

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.optimiser = self.settings.build(self.model)
        compiled: Any = torch.compile(self.model) if self.pace.compile else self.model
        self.shared = ranks.share(compiled, self.device)
        self.objective = self.task(self.shared)
        self.average = Average(self.model, self.settings.polyak) if self.settings.polyak else None
        self.total = len(self.loader)
        self.step = 0
        self.best: float | None = None
        self.best_step = 0
        self.earlier = 0.0  # seconds trained before this process
        self.bad = torch.tensor(-1, device=self.device)  # the first step whose loss was not finite

    def train(self, received: list[int]) -> Outcome:
        self.begun = self.saved = time.monotonic()
        interval = Interval(self.device)
        self.model.train()
        for batch in self._batches():
            waited = interval.waited()
            loss = self._update(batch)
            interval.add(loss, batch, waited)
            self.step += 1
            if self.screen is not None:
                self.screen.advance(self.step)
            if self.step % self.pace.log_every == 0 or self.step == self.total:
                self._check()
                self._say({**interval.line(), "rate": self._rate(self.step - 1)})
                interval = Interval(self.device)
            if self.evaluator is not None and (self.step % self.pace.evaluate_every == 0 or self.step == self.total):
                self._check()
                self._evaluate()
                interval.begin()
            save, stop, late = self._asked(received)
            if stop and self.step < self.total:
                self._check()
                self._finish()
                return self._outcome(received[0] if received else signal.SIGINT)
            if late and self.step < self.total:
                self._conclude(interval)
                break
            if save and self.step < self.total:
                self._check()
                self._save()
                interval.begin()
            interval.wait()
        self._finish()
        return self._outcome(None)

    def _batches(self) -> Iterator[Batch]:
        """The loader's, from this step on. Should they end in an error, what was learned up to there is kept."""
        try:
            yield from self.loader.batches(self.step)
        except UserError:
            self._save()
            raise

    def _conclude(self, interval: Interval) -> None:
        """What the last step brings with it, after an earlier one, which may have brought some of it."""
        self._check()
        if self.step % self.pace.log_every:
            self._say({**interval.line(), "rate": self._rate(self.step - 1)})
        if self.evaluator is not None and self.step % self.pace.evaluate_every:
            self._evaluate()

    def _finish(self) -> None:
        self._save()
        if self.average is not None:
            self.model.load_state_dict(self.average.weights)
        self._write_model("last.safetensors")
        if self.best is None:
            self._write_model("model.safetensors")

    def _update(self, batch: Batch) -> Tensor:
        """One optimiser step; this process's part of the global batch's mean loss, on the device."""
        try:
            return self._step(batch.to(self.device))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # Out of the handler, so that the failed step's tensors are gone before anything is tried.
        raise UserError(what_fits(batch, self.pace.accumulate, self._probe, self.device, self.optimiser.zero_grad))

    def _step(self, batch: Batch) -> Tensor:
        loss, norm = self._gradients(batch)
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
        """Fills the gradients with those of the mean over the global batch's valid rows.

        Gives this process's part of that mean (the parts of all processes add up to it), and the gradient's norm where
        it is clipped.
        """
        parts = split(batch, self.pace.accumulate)
        valid = ranks.reduce_sum(batch.valid.sum()).clamp(min=1)
        loss = torch.zeros((), device=self.device)
        for place, part in enumerate(parts):
            seed = mix(self.seed, self.step, ranks.rank(), place)
            torch.manual_seed(seed)
            share = part.valid.sum() / valid
            last = place == len(parts) - 1
            # Sharing averages over the processes where the sum is wanted, so times their number.
            with nullcontext() if last else ranks.quiet(self.shared):
                with autocast(self.device, self.pace.precision):
                    total = self.objective(part, seed).total
                (total * share * ranks.count()).backward()
            loss += total.detach() * share
        self.objective.after_backward(Progress(self.step, self.total))
        norm = torch.zeros((), device=self.device)
        if self.settings.clip:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        return loss, norm

    def _probe(self, part: Batch) -> None:
        """The most memory that a part of a batch ever needs: beside gradients, optimiser state and the part itself."""
        for _ in range(2):
            with ranks.quiet(self.shared):
                with autocast(self.device, self.pace.precision):
                    total = self.objective(part, 0).total
                total.backward()
            # These weights are never used again.
            self.optimiser.step()

    def _rate(self, step: int) -> float:
        return self.settings.rate * self.schedule.factor(step, self.total)

    def _evaluate(self) -> None:
        assert self.evaluator is not None
        self._check_weights()
        own = None
        if self.average is not None:
            own = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.average.weights)
        try:
            rows = self.evaluator(self.model)
            self._say({row.name: float(row.value) for row in rows})
            if self.best is None or rows[0].value > self.best:
                self.best, self.best_step = float(rows[0].value), self.step
                self._write_model("model.safetensors")
        finally:
            self.model.train()
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
        """Ends the run if a loss was not finite since the last look."""
        if not self.pace.checks:
            return
        bad = int(ranks.reduce_max(self.bad).item())
        if bad >= 0:
            raise self._divergence(bad)

    def _check_weights(self) -> None:
        """Ends the run if its weights are no longer finite, which without clipping a finite loss can bring about."""
        if self.pace.checks and not self._finite():
            raise self._divergence(self.step - 1)

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters())

    def _divergence(self, bad: int) -> UserError:
        """What to tell, once that is kept which explains it: the whole batch of that step, from all processes."""
        shares = [] if self.folder is None and ranks.count() == 1 else ranks.gather_objects(self.loader.at(bad))
        kept = ""
        if self.folder is not None:
            path = self.folder.file("divergence.pt")
            targets = [share.targets.values for share in shares if share.targets is not None]
            record = {
                "step": bad,
                "seed": self.seed,
                "views": [torch.cat(views) for views in zip(*(share.views for share in shares), strict=True)],
                "targets": torch.cat(targets) if targets else None,
                "index": torch.cat([share.index for share in shares]),
            }
            write_whole(path, lambda part: save_tensors(record, part))
            kept = f" its batch is in {path};"
            if bad == self.step and self._finite():
                self._save()  # the weights that met this batch are still good
            if self.folder.resumable:
                kept = f" its batch is in {path}, the last good checkpoint beside it;"
        return UserError(
            f"The loss was not finite at step {bad} of {self.total};{kept} start anew with a lower --rate, a longer "
            "--warmup, --clip 1 or --precision fp32."
        )

    def _save(self) -> None:
        self._check_weights()
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

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if the state belongs to another model or a run of another length."""
        try:
            if state["total"] != self.total:
                raise UserError(
                    f"--resume: the checkpoint is of a run of {state['total']} steps and these settings make "
                    f"{self.total}; give the settings that the run began with."
                )
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            if self.average is not None:
                self.average.steps, weights = state["average"]
                self.average.weights = {name: value.to(self.device) for name, value in weights.items()}
            self.step, (self.best, self.best_step), self.earlier = state["step"], state["best"], state["seconds"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                "--resume: the checkpoint holds another model than these settings make "
                f"({' '.join(str(error).split())[:160]}); give the settings that the run began with."
            ) from error

    def _write_model(self, name: str) -> None:
        if self.folder is not None and self.save_model is not None and ranks.first():
            self.save_model(self.model, self.folder.file(name))

    def _asked(self, received: list[int]) -> tuple[bool, bool, bool]:
        """Whether to save, whether to stop, and whether the deadline has passed: after the same step on all processes, or
        they would wait for each other for ever."""
        now = time.monotonic()
        save = now - self.saved > self.pace.save_minutes * 60
        # A run that only measures steps keeps nothing, so it has no end to come to. Of several processes the first alone
        # has a folder: one clock decides.
        late = self.folder is not None and now >= self.pace.deadline
        if ranks.count() == 1:
            return save, bool(received), late
        if self.device.type != "cpu" and self.step % 10:  # asking makes a GPU wait
            return False, False, False
        asked = ranks.reduce_max(torch.tensor([save, bool(received), late], dtype=torch.int64, device=self.device))
        save, stop, late = map(bool, asked.tolist())
        return save, stop, late

    def _outcome(self, interrupted: int | None) -> Outcome:
        seconds = self.earlier + time.monotonic() - self.begun
        return Outcome(self.step, self.total, self.best, self.best_step, seconds, interrupted)
