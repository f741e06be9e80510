"""Whether two ways of running one model give the same answers: asked of every engine and export before it is used.

A wrong engine fails in silence, with plausible numbers. So real pictures are shown to both, never noise: an activation
that only pictures reach, where a lower precision overflows, would be missed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess, Source
from vitrail.data.decode import MODES
from vitrail.data.sources import read_sample
from vitrail.data.transforms import read
from vitrail.inference.features import merging
from vitrail.inference.graphs import Asked, evaluating

TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.5}
"""The largest difference that passes, as a share of the largest answer's size. fp32 engines were seen to differ by 3e-6,
bf16 by 0.02. int8's only tells apart a broken model: whether it is good enough, its gate measures."""
MERGED = 4
"""Merged tokens may be other ones in a lower precision, which is a step and no rounding: so many times more passes."""


@dataclass(frozen=True)
class Agreement:
    """difference: the largest one. scale: the largest answer's size. count: pictures that were compared."""

    difference: float
    scale: float
    count: int
    allowed: float

    @property
    def share(self) -> float:
        return self.difference / self.scale if self.scale else self.difference

    @property
    def passed(self) -> bool:
        return self.share <= self.allowed  # False for a number that is none

    @property
    def said(self) -> str:
        if self.difference == self.scale == 0:
            return (
                f"nothing to compare, the model answers 0 to each of {self.count} pictures, as an untrained head does"
            )
        return f"largest difference {self.difference:.2g} of answers up to {self.scale:.3g}, on {self.count} pictures"


def sample_pictures(
    preprocess: Preprocess, count: int, size: tuple[int, int] | None = None
) -> UInt8[Tensor, "b c h w"]:
    """Pictures of the embedded sample, enlarged to what the model takes; another number of channels repeats their grey."""
    return pictures(read_sample("fashion", "test"), preprocess, count, size)


def pictures(
    source: Source, preprocess: Preprocess, count: int, size: tuple[int, int] | None = None
) -> UInt8[Tensor, "b c h w"]:
    """`count` of a source's pictures, spread over it, as the model sees them; `size` is stretched to where it is another."""
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    given = [source[int(place)].picture for place in chosen]
    if preprocess.channels in MODES or isinstance(given[0], np.ndarray):
        pixels = read(given, preprocess)
    else:
        grey = Preprocess(preprocess.size, preprocess.resize, preprocess.interpolation, (0.5,), (0.5,))
        pixels = read(given, grey).expand(-1, preprocess.channels, -1, -1).contiguous()
    if size not in (None, preprocess.size):
        stretched = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True)
        pixels = stretched.round().clamp(0, 255).to(torch.uint8)
    return pixels


def compare(
    model: Asked, run: Callable[[Tensor], Tensor], pixels: UInt8[Tensor, "b c h w"], precision: str, device: str = "cpu"
) -> Agreement:
    """`run` against the model as it is, in fp32, on the same pixels."""
    with evaluating(model):
        wanted = model(pixels.to(device)).float().cpu()
    return agreement(wanted, run(pixels), allowed(model, precision))


def allowed(model: Asked, precision: str) -> float:
    """The share of the largest answer that may differ."""
    return TOLERANCES[precision] * (MERGED if merging(model.model) and precision != "fp32" else 1)


def agreement(wanted: Float[Tensor, "b *k"], found: Float[Tensor, "b *k"], most: float) -> Agreement:
    if found.shape != wanted.shape:
        raise UserError(f"the engine gives answers of shape {tuple(found.shape)}, the model of {tuple(wanted.shape)}.")
    difference = (found.double() - wanted.double()).abs().max().item()
    return Agreement(difference, wanted.abs().max().item(), wanted.shape[0], most)
