"""What the same model would cost if each pixel were a word, which is why the paper cuts patches (section 1).

Attention compares every word with every other, so its products grow with the square of the words. What is too large to run
is said from the formula; smaller pictures are run through the model's own blocks, as many words as they have pixels.
"""

import time
from dataclasses import dataclass, replace

import torch

from vitrail.analysis.internals import evaluating
from vitrail.core.types import Tokens
from vitrail.layers.patches import grid_coordinates
from vitrail.models.vit import ViT, ViTConfig

SIDES = (16, 32, 64, 128)
"""Pixels each way of the smaller pictures."""
MOST_BIAS = 2**31
"""Bytes of a block's logits of relative positions beyond which it is not run: each word has one for every difference."""


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
        grid = where if side is not None else _grid(model.config, where)
        if not speed or (cost.macs / speed / config.depth < budget and _bias_bytes(config, grid) <= MOST_BIAS):
            seconds = _block_seconds(model, grid) * config.depth
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


def _grid(config: ViTConfig, size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // config.stride[0], size[1] // config.stride[1]


def _bias_bytes(config: ViTConfig, grid: tuple[int, int]) -> int:
    if config.positions != "relative":
        return 0
    return 4 * config.heads * grid[0] * grid[1] * (2 * grid[0] - 1) * (2 * grid[1] - 1)


@torch.no_grad()
def _block_seconds(model: ViT, grid: tuple[int, int]) -> float:
    """Of the first block on words in a grid; the better of two runs, where the first took less than a second.

    With what positions add to it in attention, relative and rotary ones; those of the stem are none of the block's work.
    """
    weight, count = model.patch_embedding.weight, grid[0] * grid[1]
    random = torch.Generator().manual_seed(0)
    words = torch.randn(1, count, model.width, generator=random).to(weight.device, weight.dtype)
    best = float("inf")
    with evaluating(model):
        positions = model.positions(Tokens(words, grid_coordinates(grid, weight.device), grid))
        x = model.prepend(words)
        for _ in range(2):
            begun = time.perf_counter()
            model.encoder.blocks[0](x, positions)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            best = min(best, time.perf_counter() - begun)
            if best > 1:
                break
    return best
