"""The one inference loop. It yields while a model waits in eval mode, so no mode of torch may stay on across a yield.

What `predict` hands out is exact in number: rows that only fill a batch up are dropped here, and nowhere else.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from vitrail.core.device import Precision, autocast
from vitrail.core.types import Batch

BROKEN = "the model's answer is not finite; check this picture, and that the checkpoint is whole."


@dataclass(frozen=True)
class Prediction:
    """What a model says of the valid rows of one batch. All on the CPU.

    logits: fp32, in whatever precision they were computed.
    targets: class indices, or weights of classes, as the batch had them; None where nothing is known.
    index: each row's place in its source.
    """

    logits: Float[Tensor, "b k"]
    targets: Int[Tensor, "b"] | Float[Tensor, "b k"] | None
    index: Int[Tensor, "b"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside; each module comes out in the mode that it went in with."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    progress: bool = False,
    of: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Prediction]:
    """The model's logits for the first view of each batch, in the batches' order.

    model: already on `device`. It is in eval mode from the first batch to the last (or until the iterator is closed);
        then each of its modules is back in the mode it was found in.
    precision: "bf16" computes under autocast.
    progress: show a bar on standard error, if that is a terminal or a notebook.
    of: what to ask of the images (b c h w) instead of `model` itself, giving (b k): a compiled copy, a feature.
    """
    device = torch.device(device)
    ask = model if of is None else of
    console = Console(stderr=True)
    if progress and (console.is_terminal or console.is_jupyter):
        total = len(batches) if isinstance(batches, Sized) else None
        batches = track(batches, "looking", total=total, console=console, transient=True)
    with evaluating(model):
        for batch in batches:
            with torch.inference_mode(), autocast(device, precision):
                logits = ask(batch.views[0].to(device, non_blocking=True)).float().cpu()
            valid = batch.valid.cpu()
            targets = None if batch.targets is None else batch.targets.values.cpu()[valid]
            yield Prediction(logits[valid], targets, batch.index.cpu()[valid])


def broken(logits: Float[Tensor, "b k"]) -> list[int]:
    """The rows that hold a number which is not finite; what is wrong with them is `BROKEN`."""
    return torch.nonzero(~torch.isfinite(logits).all(1)).flatten().tolist()
