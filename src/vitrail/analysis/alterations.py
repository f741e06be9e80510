"""What is taken from pictures: patches dropped at random or by attention, and patches in another order.

From "Intriguing Properties of Vision Transformers" (arXiv 2105.10497, sections 3.1 and 3.4) and its authors' code. Unusual:
a picture's randomness is a function of the seed and its place in the source, so that every model sees the same altered
pictures, at any batch size, and what was dropped at 20 % is also dropped at 30 % (the authors draw once a batch).

Cells: a grid of (y, x) cells covers every pixel; where it does not divide the picture, borders are rounded to whole
pixels, and cells differ in size by one.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from vitrail.analysis.internals import Model, answer_reads, trace
from vitrail.core.device import mix
from vitrail.core.types import Preprocess

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""The paper's grid of information loss."""
GRIDS = (2, 4, 7, 8, 14)
"""Cells a side for shuffling; each divides 224."""


def random_cells(index: Sequence[int], grid: tuple[int, int], share: float, seed: int) -> Bool[Tensor, "b y x"]:
    """True for the cells to drop: of each picture's own random order of cells the first `share` of [0, 1], rounded."""
    cells = grid[0] * grid[1]
    chosen = torch.zeros(len(index), cells, dtype=torch.bool)
    for row, place in enumerate(index):
        order = np.random.default_rng(mix("drop", seed, place)).permutation(cells)
        chosen[row, torch.from_numpy(order[: round(share * cells)])] = True
    return chosen.view(-1, *grid)


def salient_cells(attention: Float[Tensor, "b y x"], share: float) -> Bool[Tensor, "b y x"]:
    """True for the fewest cells that together hold `share` of [0, 1] of the attention: the paper's salient patches."""
    if share <= 0:
        return torch.zeros_like(attention, dtype=torch.bool)
    flat = attention.flatten(1).double()
    values, order = flat.sort(dim=1, descending=True, stable=True)
    # What the cells before this one hold does not reach the share yet.
    wanted = values.cumsum(1) - values < share * flat.sum(1, keepdim=True) - 1e-12
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, wanted).view_as(attention)


def non_salient_cells(attention: Float[Tensor, "b y x"], share: float) -> Bool[Tensor, "b y x"]:
    """True for the least attended cells that together hold no more than `share` of the attention: all others hold the
    salient 1 - share, as in the authors' code."""
    if share <= 0:
        return torch.zeros_like(attention, dtype=torch.bool)
    return ~salient_cells(attention, 1 - share)


def attention_of_answer(
    model: Model, pixels: UInt8[Tensor, "b c h w"], grid: tuple[int, int]
) -> Float[Tensor, "b y x"]:
    """What the answer looks at in the last block, on a grid of the picture, summing to 1; on the CPU.

    The paper takes DINO's class token in the last block and one of its heads; here it is the mean of all heads of the
    model given, prefix tokens left out, and without a class token the mean over all patches. Another size of the model's
    input is made by antialiased bilinear resizing, another grid by spreading each patch evenly over its area.
    """
    device = next(model.parameters()).device
    of = trace(model, sized(pixels, model.preprocess.size).to(device))
    with torch.no_grad():
        looked = torch.einsum("bq,bhqk->bk", answer_reads(of), of.weights(of.depth - 1))[:, of.prefixes :]
        found = looked.float().cpu().view(-1, 1, *of.grid)
        if of.grid != grid:
            fine = F.interpolate(found, (of.grid[0] * grid[0], of.grid[1] * grid[1]), mode="nearest")
            found = F.avg_pool2d(fine, of.grid)
    return found[:, 0] / found.sum((1, 2, 3))[:, None, None]


def drop(
    pixels: UInt8[Tensor, "b c h w"], cells: Bool[Tensor, "b y x"], colour: Sequence[int]
) -> UInt8[Tensor, "b c h w"]:
    """The pixels of the chosen cells in one colour, a number 0..255 a channel."""
    rows = _cell_of(pixels.shape[2], cells.shape[1])
    columns = _cell_of(pixels.shape[3], cells.shape[2])
    mask = cells[:, rows][:, :, columns]
    return torch.where(mask[:, None], torch.tensor(colour, dtype=torch.uint8).view(1, -1, 1, 1), pixels)


def zero_colour(preprocess: Preprocess) -> tuple[int, ...]:
    """The pixels that are 0 after normalisation (to half a step), which is what the authors' code sets dropped ones to."""
    return tuple(round(255 * mean) for mean in preprocess.mean)


def shuffle(
    pixels: UInt8[Tensor, "b c h w"], index: Sequence[int], grid: tuple[int, int], seed: int
) -> UInt8[Tensor, "b c h w"]:
    """Each picture's cells in an order of its own. A cell that comes to a place one pixel larger or smaller than its own
    repeats or loses its pixels nearest to where they lie."""
    height, width = pixels.shape[2:]
    cells = grid[0] * grid[1]
    rows, columns = _cell_of(height, grid[0]), _cell_of(width, grid[1])
    tops, lefts = _borders(height, grid[0]), _borders(width, grid[1])
    orders = np.stack([np.random.default_rng(mix("shuffle", seed, *grid, place)).permutation(cells) for place in index])
    # Which cell each pixel takes its colour from, and how far into that cell, in parts of its size.
    source = torch.from_numpy(orders)[:, (rows[:, None] * grid[1] + columns[None])]
    y, x = source // grid[1], source % grid[1]
    down = torch.arange(height) - tops[rows]
    across = torch.arange(width) - lefts[columns]
    high, wide = tops.diff(), lefts.diff()
    y = tops[y] + down[None, :, None] * high[y] // high[rows][None, :, None]
    x = lefts[x] + across[None, None, :] * wide[x] // wide[columns][None, None, :]
    flat = (y * width + x).flatten(1)[:, None].expand(-1, pixels.shape[1], -1)
    return pixels.flatten(2).gather(2, flat).view_as(pixels)


def sized(pixels: Shaped[Tensor, "b c h w"], size: tuple[int, int]) -> Shaped[Tensor, "b c high wide"]:
    """Another size by antialiased bilinear resizing; as they are where they have it."""
    if tuple(pixels.shape[2:]) == size:
        return pixels
    small = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).to(torch.uint8)


def _borders(length: int, cells: int) -> Int[Tensor, "borders"]:
    return (torch.arange(cells + 1) * length + cells // 2) // cells


def _cell_of(length: int, cells: int) -> Int[Tensor, "pixels"]:
    return torch.bucketize(torch.arange(length), _borders(length, cells)[1:], right=True)
