"""Position tables at another size.

Resampling is linear in the table and separable, so it is two small matrices. Those are what is remembered for each
size, not the resampled table: the table changes with every training step, and its gradient must flow.
"""

import functools
from collections.abc import Callable
from typing import TypeVarTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.core.types import Resampling
from vitrail.layers.resampling_formula import resampling_formula

Arguments = TypeVarTuple("Arguments")


def remembered(build: Callable[[*Arguments], Tensor]) -> Callable[[*Arguments], Tensor]:
    """Keeps what `build` made for each argument; while a graph is traced, builds anew, inside the graph."""
    cached = functools.lru_cache(maxsize=64)(build)

    @functools.wraps(build)
    def constant(*arguments: *Arguments) -> Tensor:
        if torch.compiler.is_compiling():
            return build(*arguments)
        # A tensor made in inference mode could not be used in training afterwards.
        with torch.inference_mode(False):
            return cached(*arguments)

    return constant


def resample_grid(
    grid: Float[Tensor, "y x d"], size: tuple[int, int], rule: Resampling
) -> Float[Tensor, "rows columns d"]:
    """A position grid at another size (rows, columns): the same values, and the same object, at the same size.

    rule: "zoom" is the official code's `scipy.ndimage.zoom(order=1)`, corners aligned; the others are PyTorch's, with
    half-pixel centres, save "bicubic-aligned" (torchvision's) and "bicubic-offset", by DINO's (size + 0.1) / old size.
    Differentiable; computed in fp32 under autocast too.
    """
    y, x, _ = grid.shape
    if isinstance(size[0], torch.SymInt) or isinstance(size[1], torch.SymInt):  # a graph for any size is being traced
        down, across = (resampling_formula(old, new, rule) for old, new in zip((y, x), size, strict=True))
        return torch.einsum("ry,cx,yxd->rcd", down.to(grid), across.to(grid), grid)
    if (y, x) == size:
        return grid
    with torch.autocast(grid.device.type, enabled=False):
        down = _resampling_matrix(y, size[0], rule, grid.device).to(grid.dtype)
        across = _resampling_matrix(x, size[1], rule, grid.device).to(grid.dtype)
        return torch.einsum("ry,cx,yxd->rcd", down, across, grid)


def resample_offsets(
    offsets: Float[Tensor, "old d"], grid: tuple[int, int], size: tuple[int, int], rule: Resampling
) -> Float[Tensor, "new d"]:
    """A table of the 2 n - 1 differences of places in a (y, x) grid, counted row after row, for another grid.

    A difference stands for a way (down, across): the table is laid out by these, resampled as a grid, and read back.
    Where two ways have one difference, as one down and one back to the left, or all to the right, their mean is taken.
    """
    if grid == size:
        return offsets
    ways = offsets[_ways(*grid, offsets.device)]
    resampled = resample_grid(ways, (2 * size[0] - 1, 2 * size[1] - 1), rule).flatten(0, 1)
    one, other = _places(*size, offsets.device)
    return (resampled[one] + resampled[other]) / 2


@remembered
def _resampling_matrix(old: int, new: int, rule: Resampling, device: torch.device) -> Tensor:
    """(new, old): along one axis, how much of each old row a new one takes."""
    mode = "bilinear" if rule in ("zoom", "bilinear") else "bicubic"
    # As a picture of rows that are resized in width alone: torch 2.13 gives wrong numbers, antialiased, for width 1.
    rows = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]
    if rule == "bicubic-offset":
        resized = F.interpolate(rows, scale_factor=(1.0, (new + 0.1) / old), mode=mode)
    else:
        aligned, antialias = rule in ("zoom", "bicubic-aligned"), rule == "bicubic-antialias"
        resized = F.interpolate(rows, size=(old, new), mode=mode, align_corners=aligned, antialias=antialias)
    return resized[0, 0].T.float().to(device)


@remembered
def _ways(y: int, x: int, device: torch.device) -> Tensor:
    """(2 y - 1, 2 x - 1): the row of the table of differences for each way down and across."""
    down, across = torch.arange(1 - y, y, device=device), torch.arange(1 - x, x, device=device)
    return down[:, None] * x + across + (y * x - 1)


@remembered
def _places(y: int, x: int, device: torch.device) -> Tensor:
    """(2, 2 y x - 1): for each difference its one or two ways, counted row after row; twice the same where one."""
    difference = torch.arange(1 - y * x, y * x, device=device)
    down, across = difference.div(x, rounding_mode="floor"), difference % x
    one = (down + y - 1) * (2 * x - 1) + across + x - 1
    other = one + (2 * x - 1) - x
    return torch.stack([torch.where(down > -y, one, other), torch.where((across > 0) & (down < y - 1), other, one)])
