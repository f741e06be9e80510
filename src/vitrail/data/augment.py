"""Augmentation of whole batches on the device that trains.

Unusual: every draw comes from one NumPy generator made from the seed that the call is given (erasing's noise from one
of the device's own), so a batch's augmentation is a function of (batch, seed), torch's global generator is never
touched, and a resumed run draws what the unbroken one would have. Flip, shift and RandAugment work on the uint8 pixels,
before they grow fourfold; every picture draws its own. Mixup and cutmix draw once a batch, as the official code does.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from vitrail.core.errors import UserError
from vitrail.core.types import Batch, Labels, Preprocess
from vitrail.data.operations import randaugment

Rng = np.random.Generator


@dataclass(frozen=True)
class Augmentation:
    """What is done to a batch, in this order."""

    flip: bool = False
    """Turn half of the pictures left to right."""
    shift: int = 0
    """Move each picture by up to this many pixels along both axes; what comes in is black, as usual on CIFAR."""
    randaugment: tuple[int, float] | None = None
    """Operations a picture and their magnitude, 10 being AutoAugment's full strength; AugReg: light1 2 0, light2 2 10,
    medium 2 15, strong 2 20."""
    erasing: float = 0.0
    """Chance that a picture loses a rectangle of 2 to 33 % of its area to noise (Zhong et al. 2020)."""
    mixup: float = 0.0
    """Mix pictures and labels in pairs, by Beta(p, p); AugReg has 0, 0.2, 0.5 and 0.8."""
    cutmix: float = 0.0
    """Paste a rectangle of another picture, its area by Beta(p, p). With mixup too, a coin decides for each batch."""

    def __call__(self, batch: Batch, classes: int, preprocess: Preprocess, generator_seed: int) -> Batch:
        """uint8 views to normalised fp32 ones, on the batch's device. With mixup or cutmix the targets become a weight
        for each class (b, classes); otherwise they are handed on. Rows that are not valid are mixed into no other."""
        rng = np.random.default_rng(generator_seed)
        views = []
        for view in batch.views:
            if self.flip:
                view = flip(view, rng)
            if self.shift:
                view = shift(view, self.shift, rng)
            if self.randaugment is not None:
                view = randaugment(view, *self.randaugment, rng)
            view = preprocess.normalize(view)
            if self.erasing:
                view = erase(view, self.erasing, rng)
            views.append(view)
        mixed = replace(batch, views=tuple(views))
        return mix(mixed, classes, self.mixup, self.cutmix, rng) if self.mixup or self.cutmix else mixed


def flip(pixels: UInt8[Tensor, "b c h w"], rng: Rng) -> UInt8[Tensor, "b c h w"]:
    flipped = rng.random(pixels.shape[0]) < 0.5
    if pixels.device.type == "cpu":
        # `where` goes number by number there: 0.13 ms a picture of 224 pixels, a tenth of its decoding, for 0.007.
        result = torch.empty_like(pixels)
        for turned, one, to in zip(flipped, pixels.split(1), result.split(1), strict=True):
            to.copy_(one.flip(-1) if turned else one)
        return result
    return torch.where(_to(flipped, pixels)[:, None, None, None], pixels.flip(-1), pixels)


def shift(pixels: UInt8[Tensor, "b c h w"], most: int, rng: Rng) -> UInt8[Tensor, "b c h w"]:
    rows, height, width = pixels.shape[0], pixels.shape[2], pixels.shape[3]
    down, across = (_to(rng.integers(0, 2 * most, rows, endpoint=True), pixels) for _ in range(2))
    places = F.pad(pixels, (most, most, most, most)).unfold(2, height, 1).unfold(3, width, 1)
    return places[torch.arange(rows, device=pixels.device), :, down, across]


def erase(images: Float[Tensor, "b c h w"], probability: float, rng: Rng) -> Float[Tensor, "b c h w"]:
    """Rectangles of normal noise, area uniform in (0.02, 1/3) of the picture, ratio log-uniform in (0.3, 1 / 0.3)."""
    rows, height, width = images.shape[0], images.shape[2], images.shape[3]
    area = rng.uniform(0.02, 1 / 3, rows) * height * width
    ratio = np.exp(rng.uniform(np.log(0.3), -np.log(0.3), rows))
    tall = np.clip(np.rint(np.sqrt(area / ratio)), 1, height) * (rng.random(rows) < probability)
    wide = np.clip(np.rint(np.sqrt(area * ratio)), 1, width)
    top, left = np.floor(rng.random(rows) * (height - tall + 1)), np.floor(rng.random(rows) * (width - wide + 1))
    y, x = np.arange(height), np.arange(width)
    inside_y = (y >= top[:, None]) & (y < (top + tall)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + wide)[:, None])
    erased = _to(inside_y, images)[:, None, :, None] & _to(inside_x, images)[:, None, None, :]
    generator = torch.Generator(images.device).manual_seed(int(rng.integers(2**63)))
    noise = torch.empty_like(images).normal_(generator=generator)
    return torch.where(erased, noise, images)


def mix(batch: Batch, classes: int, mixup: float, cutmix: float, rng: Rng) -> Batch:
    """Each valid row with the valid row before it. Mixup's weight is max(Beta(p, p), 1 - Beta(p, p)), one for the batch
    (big_vision). Cutmix's weight is the area that was in fact left over once the box is cut off at the edges."""
    if batch.targets is None:
        raise UserError("--mixup and --cutmix mix labels, and this data has none: leave them out.")
    partner = partners(batch.valid)
    if mixup and (not cutmix or rng.random() < 0.5):
        drawn = rng.beta(mixup, mixup)
        weight = max(drawn, 1 - drawn)
        views = tuple(view[partner].lerp_(view, weight) for view in batch.views)
    else:
        side, centre = np.sqrt(1 - rng.beta(cutmix, cutmix)), rng.random(2)
        height, width = batch.views[0].shape[2:]
        top, bottom = np.clip(np.rint(height * (centre[0] + side * np.array([-0.5, 0.5]))), 0, height).astype(int)
        left, right = np.clip(np.rint(width * (centre[1] + side * np.array([-0.5, 0.5]))), 0, width).astype(int)
        weight = 1 - (bottom - top) * (right - left) / (height * width)
        views = tuple(view.clone() for view in batch.views)
        for view, source in zip(views, batch.views, strict=True):
            view[:, :, top:bottom, left:right] = source[partner, :, top:bottom, left:right]
    own = class_weights(batch.targets, classes)
    return replace(batch, views=views, targets=Labels(own * weight + own[partner] * (1 - weight)))


def partners(valid: Bool[Tensor, "b"]) -> Int[Tensor, "b"]:
    """For each valid row the valid row before it, the last one for the first; for the others themselves. No device has
    to wait for it: the number of valid rows is never read."""
    order = torch.argsort((~valid).to(torch.uint8), stable=True)
    place = torch.arange(valid.shape[0], device=valid.device)
    count = valid.sum()
    before = torch.where(place < count, (place - 1) % count.clamp(min=1), place)
    return torch.empty_like(order).scatter_(0, order, order[before])


def class_weights(targets: Labels, classes: int) -> Float[Tensor, "b k"]:
    """Indices to one weight of 1; -1, no label, to none. Weights stay as they are."""
    values = targets.values
    if values.is_floating_point():
        return values
    return F.one_hot(values.clamp(min=0).long(), classes).float() * (values >= 0)[:, None]


def _to(draws: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(draws).to(like.device, non_blocking=True)
