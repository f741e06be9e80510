"""Pictures to answers as a stream: workers decode the next batches while the model looks at this one, and nothing is kept.

Unusual: batches lie on a fixed grid, picture 0 onwards. A stream that begins in the middle of one looks at all of it again
and hands out its end, so that an answer has the same bits whether the work was broken off or not: matrix libraries sum
in another order for another number of rows.

What waits is bounded by the loader: `AHEAD` batches a worker.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from vitrail.core.device import Precision, cores
from vitrail.core.types import Batch, Preprocess, Source
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.transforms import Transform
from vitrail.inference.answers import Answer
from vitrail.inference.predict import BROKEN, broken, predict

AHEAD = 2
"""Batches that each worker prepares before the model asks for them."""
NICENESS = 10
"""Of the workers. On shared cores a model whose threads wait for each other loses twice what a worker takes from one of
them; workers that give way work when the model waits for them, and then on all cores."""


def stream(
    model: nn.Module,
    source: Source,
    preprocess: Preprocess,
    labels: Sequence[str],
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    of: Callable[[Tensor], Tensor] | None = None,
    top: int = 5,
    batch: int = 64,
    workers: int = -1,
    start: int = 0,
    lost: Callable[[str], None] = lambda sentence: None,
    progress: bool = False,
) -> Iterator[list[Answer]]:
    """The answers to pictures `start`, `start` + 1, ... in the source's order, those of one batch at a time.

    model, device, precision, of: as in `predict`. labels: of the model's classes; each answer has the `top` likeliest.
    workers: processes that decode; -1: as many as `decoders` says. lost: is told of each picture without an answer, in
    one sentence, save of those that cannot be read: the loader names these on standard error.
    progress: a bar on standard error, with pictures a second and the time that is left.
    """
    count = len(source)
    batch = max(1, min(batch, count))
    loader = PictureLoader(
        source,
        Transform(preprocess),
        Order(count, batch, count, shuffle=False),
        workers=workers if workers >= 0 else decoders(count - start, batch),
        ahead=AHEAD,
        niceness=NICENESS,
    )
    with bar(progress) as shown:
        task = shown.add_task("looking", total=count, completed=start)
        step = start // batch
        for found in predict(model, map(unfilled, loader.batches(step)), device=device, precision=precision, of=of):
            first, end = step * batch, min(step * batch + batch, count)
            problems = {index: loader.problems.pop(index) for index in range(first, end) if index in loader.problems}
            rows = {index: row for row, index in enumerate(found.index.tolist())}
            bad = set(broken(found.logits))
            likeliest = torch.softmax(found.logits.double(), 1).topk(min(top, len(labels)))
            classes, probabilities = likeliest.indices.tolist(), likeliest.values.tolist()
            answers = []
            for index in range(max(first, start), end):
                name, row = source[index].name, rows.get(index, -1)
                if row in bad:
                    problems[index] = f"{name}: {BROKEN}"
                    lost(problems[index])
                if index in problems:
                    answers.append(Answer(name, problem=problems[index]))
                    continue
                pairs = zip(classes[row], probabilities[row], strict=True)
                answers.append(Answer(name, tuple((labels[label], probability) for label, probability in pairs)))
            yield answers
            step += 1
            shown.update(task, completed=end)


def unfilled(batch: Batch) -> Batch:
    """Without the rows that only fill a batch up, which would cost the model as much as pictures."""
    real = batch.index >= 0
    if bool(real.all()):
        return batch
    return Batch(tuple(view[real] for view in batch.views), None, batch.valid[real], batch.index[real])


def decoders(pictures: int, batch: int) -> int:
    """Processes that decode so many pictures: none for a single batch, which would be there before they were."""
    return min(cores(), -(-pictures // batch)) if pictures > batch else 0


class Rate(ProgressColumn):
    def render(self, task: Task) -> str:
        speed = task.finished_speed or task.speed
        return "" if speed is None else f"{speed:,.1f} pictures/s"


def bar(visible: bool) -> Progress:
    """Nothing where standard error is neither a terminal nor a notebook."""
    console = Console(stderr=True)
    shown = visible and (console.is_terminal or console.is_jupyter)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}")),
        *(Rate(), TimeRemainingColumn()),
    )
    return Progress(*columns, console=console, transient=True, disable=not shown)
