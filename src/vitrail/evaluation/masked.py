"""How well hidden patches are predicted, beside what one could guess without a model.

Unusual: every picture's corruption here is a function of its place in its source, so that all numbers are the same in any
batch, on any device and on any number of processes. The loss is over all corrupted patches, as it is in training; colours
are counted on those alone that are hidden, since a kept one can be seen.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitrail.core.device import Precision, autocast
from vitrail.core.errors import UserError
from vitrail.core.ranks import gather_objects
from vitrail.core.types import Batch, Row
from vitrail.evaluation.metrics import NORMAL_95, CountMismatch, wilson
from vitrail.models.masked import LEVELS, MaskedPatchPredictor
from vitrail.objectives.masked import (
    Corruption,
    classes_of,
    corrupt,
    fixed,
    levels,
    painted,
    patch_loss,
    patches_at,
)


@dataclass(frozen=True)
class Guessed:
    """A line a picture. index: its place in the source. loss: its mean. hidden: how many patches were hidden; right, near:
    of these, whose colour's class the model, and the mean of the visible neighbours, had. often: hidden patches by class."""

    index: Int[np.ndarray, "n"]
    loss: Float[np.ndarray, "n"]
    hidden: Int[np.ndarray, "n"]
    right: Int[np.ndarray, "n"]
    near: Int[np.ndarray, "n"]
    often: Int[np.ndarray, "k"]

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return float(self.right.sum() / max(self.hidden.sum(), 1))

    @property
    def mean_loss(self) -> float:
        return float(self.loss.mean())

    def rows(self, unit: str, expected_count: int | None = None) -> list[Row]:
        """The model's share of right colours first, then what two guesses reach on the same patches, then the loss.

        unit: the loss's. Raises CountMismatch if the pictures counted are not `expected_count`.
        """
        count = self.index.shape[0]
        if expected_count not in (None, count):
            raise CountMismatch(f"{count} pictures were looked at where the data has {expected_count}")
        half = NORMAL_95 * float(self.loss.std(ddof=1)) / count**0.5 if count > 1 else None
        low, high = (None, None) if half is None else (self.mean_loss - half, self.mean_loss + half)
        often = 100 * float(self.often.max() / max(self.often.sum(), 1))
        return [
            self._share("colour of hidden patches", self.right),
            self._share("mean of the visible neighbours", self.near),
            Row("always the most frequent colour", often, count=int(self.hidden.sum())),
            Row("loss on corrupted patches", self.mean_loss, low, high, count, unit),
        ]

    def _share(self, name: str, hits: Int[np.ndarray, "n"]) -> Row:
        """With the interval of a ratio of sums over pictures: the patches of one picture are not independent."""
        total, hit = max(int(self.hidden.sum()), 1), int(hits.sum())
        share = hit / total
        half = NORMAL_95 * float(np.sqrt(np.square(hits - share * self.hidden).sum())) / total
        low, high = max(share - half, 0.0), min(share + half, 1.0)
        if hit in (0, total):  # nothing varies, which says little of few pictures
            low, high = wilson(hit and self.index.shape[0], self.index.shape[0])
        return Row(name, 100 * share, 100 * low, 100 * high, total)


def measure(
    model: MaskedPatchPredictor, batches: Iterable[Batch], share: float, *, device: torch.device, precision: Precision
) -> Guessed:
    """Every picture of all processes' batches once, uint8 as they come, `share` of each picture's patches corrupted.

    The model is in evaluation mode meanwhile, and as before afterwards. Raises UserError where its loss is not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            some = (batch for batch in batches if batch.valid.any())
            parts = [_look(model, batch.to(device), share, precision) for batch in some]
    finally:
        for module, training in modes:
            module.training = training
    parts = [part for each in gather_objects(parts) for part in each]
    if not parts:
        raise CountMismatch("no pictures were looked at")
    index = np.concatenate([part.index for part in parts])
    order = np.argsort(index, kind="stable")
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("index", "loss", "hidden", "right", "near")
    }
    if not np.isfinite(joined["loss"]).all():
        raise UserError("The model's prediction is not finite; its training failed, or its file is damaged.")
    return Guessed(**joined, often=np.sum([part.often for part in parts], axis=0))


def _look(model: MaskedPatchPredictor, batch: Batch, share: float, precision: Precision) -> Guessed:
    pixels, index = batch.views[0][batch.valid], batch.index[batch.valid]
    corruption, predicted = predict(model, pixels, index, share, precision)
    config = model.config
    patches = patches_at(pixels, config.backbone.stride, corruption.places)
    true = classes_of(levels(patches))[..., 0]
    near = neighbours(pixels, config.backbone.stride, corruption)
    guessed = painted(config, model.preprocess, predicted).mean((-1, -2))
    hidden = corruption.hidden
    often = torch.bincount(true[hidden], minlength=config.colours)
    found = (
        index,
        patch_loss(config, model.preprocess, predicted, patches).mean(1),
        hidden.sum(1),
        ((class_of(guessed) == true) & hidden).sum(1),
        ((class_of(near) == true) & hidden).sum(1),
        often,
    )
    return Guessed(*(column.cpu().numpy() for column in found))


def predict(
    model: MaskedPatchPredictor,
    pixels: UInt8[Tensor, "b c h w"],
    index: Int[Tensor, "b"],
    share: float,
    precision: Precision,
) -> tuple[Corruption, Float[Tensor, "b m numbers"]]:
    """The fixed corruption of pictures by their place in the source, and what the model says of the corrupted patches."""
    tall, wide = model.config.backbone.stride
    count = (pixels.shape[2] // tall) * (pixels.shape[3] // wide)
    corruption = corrupt(fixed(index, count).to(pixels.device), share)
    with autocast(pixels.device, precision):
        return corruption, model(pixels, corruption.sources, corruption.places).float()


def class_of(colours: Float[Tensor, "b m c"]) -> Int[Tensor, "b m"]:
    """Of colours in [0, 1]."""
    found = (LEVELS * colours).long().clamp(0, LEVELS - 1)
    return classes_of(found[..., None, None])[..., 0]


def neighbours(
    pixels: UInt8[Tensor, "b c h w"], patch: tuple[int, int], corruption: Corruption
) -> Float[Tensor, "b m c"]:
    """For each corrupted patch the mean colour, in [0, 1], of those uncorrupted among the 8 around it; of all that are
    uncorrupted in the picture, where there are none."""
    means = F.avg_pool2d(pixels.float() / 255, patch)
    seen = torch.ones_like(means[:, :1]).flatten(2).scatter(2, corruption.places[:, None], 0.0).view_as(means[:, :1])
    around = [F.avg_pool2d(x, 3, stride=1, padding=1, divisor_override=1) for x in (means * seen, seen)]
    whole = (means * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)
    near = torch.where(around[1] > 0.5, around[0] / around[1].clamp(min=1), whole)
    places = corruption.places[:, None].expand(-1, means.shape[1], -1)
    return near.flatten(2).gather(2, places).transpose(1, 2)
