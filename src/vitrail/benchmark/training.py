"""A training step of Vitrail and of its peers, on the same pictures: normalise, forward, loss, backward, AdamW, zero.

Ours is the training loop's own step, with all that it does beside (seeds, the look whether the loss is finite); theirs is
what one would write by hand with each library's model. Same size, same optimiser (fused), same precision.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.benchmark import peers
from vitrail.benchmark.alternation import Side
from vitrail.core.device import Precision, autocast
from vitrail.core.types import Batch, Labels, Preprocess
from vitrail.data.augment import Augmentation
from vitrail.models.classifier import Classifier
from vitrail.objectives.supervised import Supervised
from vitrail.training.loop import _Run
from vitrail.training.optim import Optimiser, Schedule, decays
from vitrail.training.pace import Pace

OPTIMISER = Optimiser(rate=1e-4, weight_decay=0.05, clip=0.0)


def batch_of(preprocess: Preprocess, count: int, classes: int) -> Batch:
    """Pictures of noise with labels, as a loader gives them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, preprocess.channels, *preprocess.size), generator=generator).to(torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Batch((pixels,), Labels(labels), torch.ones(count, dtype=torch.bool), torch.arange(count))


def vitrail_step(
    model: Classifier,
    batch: Batch,
    device: torch.device,
    precision: Precision,
    *,
    compile: bool = False,
    accumulate: int = 1,
    optimiser: Optimiser = OPTIMISER,
) -> Side:
    """One step of the training loop on `model`, which it changes, with the batch already on the device."""
    classes, preprocess = model.config.classes, model.preprocess
    batch = batch.to(device)
    run = _Run(
        model,
        lambda shared: Supervised(shared, classes, preprocess, Augmentation()),
        _Again(batch),
        optimiser,
        Schedule(warmup=0, schedule="constant"),
        Pace(precision, accumulate, compile, checks=1 if device.type == "cpu" else 50),
        device,
        0,
        *(None, None, None, [], None),
    )
    run.model.train()

    def step() -> None:
        run._update(batch)
        run.step += 1

    return step


def peer_step(
    library: str,
    like: Classifier,
    batch: Batch,
    device: torch.device,
    precision: Precision,
    *,
    compile: bool = False,
) -> Side:
    """The same of another library's model, of the size of `like`."""
    model = peers.build(library, like.config.backbone, like.config.classes).to(device).train()
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays(n, p)], "weight_decay": OPTIMISER.weight_decay},
        {"params": [p for n, p in model.named_parameters() if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(
        groups, lr=OPTIMISER.rate, betas=OPTIMISER.betas, fused=device.type in ("cpu", "cuda")
    )
    ask: Callable[[Tensor], Tensor] = torch.compile(model) if compile else model
    batch, preprocess = batch.to(device), like.preprocess
    pixels, targets = batch.views[0], batch.targets
    assert targets is not None

    def step() -> None:
        with autocast(device, precision):
            logits = ask(preprocess.normalize(pixels))
        F.cross_entropy(logits.float(), targets.values).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def side(
    library: str,
    model: Classifier,
    batch: int,
    device: torch.device,
    precision: Precision,
    *,
    compile: bool = False,
    accumulate: int = 1,
) -> Side:
    """A step of "vitrail" or of a peer on a batch of noise, waiting for the device at its end."""
    given = batch_of(model.preprocess, batch, model.config.classes)
    if library == "vitrail":
        made = vitrail_step(model, given, device, precision, compile=compile, accumulate=accumulate)
    else:
        made = peer_step(library, model, given, device, precision, compile=compile)
    return finished(made, device)


def finished(step: Side, device: torch.device) -> Side:
    """`step`, waiting for the device at its end."""
    if device.type != "cuda":
        return step

    def waiting() -> None:
        step()
        torch.cuda.synchronize(device)

    return waiting


def flops(model: Classifier, batch: int) -> float:
    """Of a step, by the usual count: the backward pass is twice the forward pass, an addition counts as one."""
    return 6.0 * model.config.backbone.macs() * batch


class _Again:
    """A loader of one batch for ever, as far as the loop's step looks at it."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1 << 40

    def at(self, step: int) -> Batch:
        return self.batch

    def batches(self, start: int = 0):  # type: ignore[no-untyped-def]
        while True:
            yield self.batch
