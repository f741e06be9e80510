"""What a run says while it goes: a progress bar or plain lines, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vitrail.core import ranks
from vitrail.core.errors import UserError
from vitrail.core.types import Batch


@runtime_checkable
class Log(Protocol):
    """Told of each interval of training and of each evaluation: a flat line of numbers that holds "step"."""

    def __call__(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Interval:
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
        """loss: this process's part of the step's mean."""
        self.loss += loss.detach()
        self.steps += 1
        self.pictures += batch.valid.shape[0] * ranks.count()
        self.idle += waited
        now = time.monotonic()
        self.busy, self.mark = self.busy + now - self.mark, now

    def line(self) -> dict[str, float]:
        """To be asked for by all processes: the loss is the mean over all of them."""
        return {
            "loss": float(ranks.reduce_sum(self.loss)) / max(self.steps, 1),
            "images_per_second": round(self.pictures / max(self.busy, 1e-9), 2),
            "input_bound_percent": round(100 * self.idle / max(self.busy, 1e-9), 2),
        }


class Metrics:
    """metrics.jsonl: one JSON object a line, on the disk as soon as it is said."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, folder: Path, start: int | None) -> None:
        """start: the step that a continued run goes on from; what was said of later ones is hidden."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and most commands never need it

        self._writer = SummaryWriter(str(folder), purge_step=start)

    def __call__(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        self._writer.close()


def import_wandb() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "--wandb needs a package that is not installed: pip install 'vitrail[track]', or give --no-wandb."
        ) from error
    return wandb


class WeightsAndBiases:
    """Only when asked for; needs `pip install vitrail[track]`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._run = import_wandb().init(project="vitrail", dir=str(folder), config=dict(settings), resume="allow")

    def __call__(self, line: Mapping[str, Any]) -> None:
        self._run.log(dict(line), step=int(line["step"]))

    def close(self) -> None:
        self._run.finish()


class Screen:
    """A bar with loss, rate, pictures a second and time left on a terminal; elsewhere one line an interval."""

    def __init__(self, total: int, start: int = 0) -> None:
        self._console = Console(stderr=True)
        self._total, self._loss, self._speed = total, "", ""
        self._begun, self._start = time.monotonic(), start
        self._bar: Progress | None = None
        if self._console.is_terminal or self._console.is_jupyter:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("train", total=total, completed=start, line="")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Cheap enough for every step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def __call__(self, line: Mapping[str, Any]) -> None:
        step = int(line["step"])
        if "loss" in line:
            self._loss = f"loss {line['loss']:.3f}  rate {line['rate']:.1e}"
            self._speed = f"{line['images_per_second']:,.0f} pictures/s"
            if self._bar is not None:
                self._bar.update(self._task, completed=step, line=f"{self._loss}  {self._speed}")
            else:
                left = (time.monotonic() - self._begun) / max(step - self._start, 1) * (self._total - step)
                said = f"step {step}/{self._total}  {self._loss}  {self._speed}  {duration(left)} left"
                print(said, file=sys.stderr, flush=True)
        elif "validation/accuracy" in line:
            said = f"epoch {line['epoch']:.1f}  validation accuracy {line['validation/accuracy']:.2f} %"
            self._console.print(said, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """'2 h 05 min', '3 min 20 s' or '12 s'."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
