"""A training step of Vitrail and of its peers, on the same pictures: normalise, forward, loss, backward, AdamW, zero.

Ours is the training loop's own step, with all that it does beside (seeds, the look whether the loss is finite); theirs is
what one would write by hand with each library's model. Same size, same optimiser (fused), same precision.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
    fresh: bool = False,
) -> Side:
    """One step of the training loop on `model`, which it changes. The batch lies on the device, or comes from the host
    anew each time (fresh), as the loop has it."""
    classes, preprocess = model.config.classes, model.preprocess
    batch = batch if fresh else batch.to(device)
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
        run._update(batch.to(device) if fresh else batch)
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
    fresh: bool = False,
) -> Side:
    """A step of "vitrail" or of a peer on a batch of noise; on a GPU it may still run when it returns."""
    given = batch_of(model.preprocess, batch, model.config.classes)
    if library == "vitrail":
        return vitrail_step(model, given, device, precision, compile=compile, accumulate=accumulate, fresh=fresh)
    return peer_step(library, model, given, device, precision, compile=compile)


def flops(model: Classifier, batch: int) -> float:
    """Of a step, by the usual count: the backward pass is twice the forward pass, an addition counts as one."""
    return 6.0 * model.config.backbone.macs() * batch


def done(model: Classifier) -> float:
    """The share of that count that our model does: its last block computes only what is pooled."""
    twin = copy.deepcopy(model).to("meta").eval()
    images = torch.empty(1, twin.preprocess.channels, *twin.preprocess.size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin.pooled(images)
    return counter.get_total_flops() / (2.0 * model.config.backbone.macs())


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
