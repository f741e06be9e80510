"""What the same model would cost if each pixel were a word, which is why the paper cuts patches (section 1).

Attention compares every word with every other, so its products grow with the square of the words. What is too large to run
is said from the formula; smaller pictures are run through the model's own blocks, as many words as they have pixels.
"""

import time
from dataclasses import dataclass, replace

import torch

from vitrail.analysis.internals import evaluating
from vitrail.models.vit import ViT, ViTConfig

SIDES = (16, 32, 64, 128)
"""Pixels each way of the smaller pictures."""


@dataclass(frozen=True)
class Cost:
    """Of one picture's forward pass.

    macs: by the closed formula. map_bytes: of one block's attention maps in fp32, were they written down.
    seconds: measured (one block, times their number); estimated where it was not run, from the largest that was.
    """

    words: str
    size: tuple[int, int]
    tokens: int
    macs: int
    map_bytes: int
    seconds: float
    measured: bool


def pixel_costs(model: ViT, size: tuple[int, int], budget: float = 3.0) -> tuple[Cost, ...]:
    """The model as it is at `size`; with pixels as words at small sizes; and at `size`.

    budget: seconds of the largest measurement, of one block.
    """
    own = _cost(model.config, "patches", size)
    found, speed = [], 0.0
    for side in (None, *sorted({side for side in SIDES if side < min(size)}), 0):
        config = model.config if side is None else _pixels(model.config)
        where = size if not side else (side, side)
        cost = own if side is None else _cost(config, "pixels", where)
        if not speed or cost.macs / speed / config.depth < budget:
            seconds = _block_seconds(model, cost.tokens) * config.depth
            speed = cost.macs / seconds
            found.append(replace(cost, seconds=seconds, measured=True))
        elif side == 0:
            found.append(replace(cost, seconds=cost.macs / speed))
    return tuple(found)


def _pixels(config: ViTConfig) -> ViTConfig:
    return replace(config, patch=(1, 1), trunk=None)


def _cost(config: ViTConfig, words: str, size: tuple[int, int]) -> Cost:
    tokens = config.tokens(size)
    return Cost(words, size, tokens, config.macs(size), 4 * config.heads * tokens**2, 0.0, False)


@torch.no_grad()
def _block_seconds(model: ViT, tokens: int) -> float:
    """Of the first block on so many words; the better of two runs, where the first took less than a second."""
    weight = model.patch_embedding.weight
    x = torch.randn(1, tokens, model.width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    best = float("inf")
    with evaluating(model):
        for _ in range(2):
            begun = time.perf_counter()
            model.encoder.blocks[0](x)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            best = min(best, time.perf_counter() - begun)
            if best > 1:
                break
    return best
