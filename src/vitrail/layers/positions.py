"""Where a token is. Each module here turns Tokens into Positions, the value that the encoder obeys.

The position table is two parameters: one row for each prefix token and one grid (y, x, d); together they are E_pos of
Eq. 1. Only the grid is resampled for pictures of another size, and its shape is never guessed from a count.

Resampling is linear in the table and separable, so it is two small matrices. Those are what is remembered for each
size, not the resampled table: the table changes with every training step, and its gradient must flow.
"""

import functools
from collections.abc import Callable
from typing import Literal, TypeVarTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.core.types import Positions, Resampling, Tokens
from vitrail.layers.patches import grid_coordinates

PositionKind = Literal["none", "learned", "sincos2d"]
Arguments = TypeVarTuple("Arguments")


class LearnedPositions(nn.Module):
    """The paper's 1-D learned table (Table 8's best, at the stem), kept as prefix rows and a grid."""

    def __init__(self, prefixes: int, grid: tuple[int, int], width: int, rule: Resampling) -> None:
        super().__init__()
        self.rule: Resampling = rule
        self.prefix = nn.Parameter(torch.empty(prefixes, width)) if prefixes else None
        self.grid = nn.Parameter(torch.empty(*grid, width))

    def initialize(self, generator: torch.Generator) -> None:
        for table in self.parameters():
            nn.init.normal_(table, std=0.02, generator=generator)

    def forward(self, tokens: Tokens) -> Positions:
        """At `tokens.grid`, resampled where that is another grid; without one, the rows that `tokens.coords` names.

        Coordinates count in the table's own grid: for pictures of another size, ask before tokens are dropped.
        """
        if tokens.grid is None:
            table = self.grid[*tokens.coords.long().unbind(-1)]
        else:
            y, x = tokens.grid
            table = resample_grid(self.grid, (y, x), self.rule).flatten(0, 1)[None]
        if self.prefix is None:
            return Positions(table)
        return Positions(torch.cat([self.prefix.expand(table.shape[0], -1, -1), table], dim=1))


class SinCosPositions(nn.Module):
    """Sines and cosines of y and x: no parameters, exact at every size; prefix tokens have no position."""

    def __init__(self, prefixes: int, width: int) -> None:
        super().__init__()
        self.prefixes = prefixes
        self.width = width

    def initialize(self, generator: torch.Generator) -> None:
        pass

    def forward(self, tokens: Tokens) -> Positions:
        if tokens.grid is None:
            table = sincos2d(tokens.coords, self.width)
            return Positions(F.pad(table, (0, 0, self.prefixes, 0)))
        y, x = tokens.grid
        return Positions(_sincos_table(y, x, self.width, self.prefixes, tokens.x.device))


def sincos2d(coords: Float[Tensor, "*n 2"], width: int, temperature: float = 10_000.0) -> Float[Tensor, "*n d"]:
    """big_vision's `posemb_sincos_2d` at any (y, x): sin x, cos x, sin y, cos y, a quarter of the width each.

    width: a multiple of 4, at least 8. The frequencies run from 1 to 1 / temperature, both included.
    """
    quarter = width // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device="cpu") / (quarter - 1)
    frequencies = (temperature**-exponents).float().to(coords.device)
    y, x = (coords.float()[..., None] * frequencies).unbind(-2)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


def resample_grid(
    grid: Float[Tensor, "y x d"], size: tuple[int, int], rule: Resampling
) -> Float[Tensor, "rows columns d"]:
    """A position grid at another size (rows, columns): the same values, and the same object, at the same size.

    rule: "zoom" is the official code's `scipy.ndimage.zoom(order=1)`, corners aligned; the others are PyTorch's, with
    half-pixel centres. Differentiable; computed in fp32 under autocast too.
    """
    y, x, _ = grid.shape
    if (y, x) == size:
        return grid
    with torch.autocast(grid.device.type, enabled=False):
        down = _resampling_matrix(y, size[0], rule, grid.device).to(grid.dtype)
        across = _resampling_matrix(x, size[1], rule, grid.device).to(grid.dtype)
        return torch.einsum("ry,cx,yxd->rcd", down, across, grid)


def _remembered(build: Callable[[*Arguments], Tensor]) -> Callable[[*Arguments], Tensor]:
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


@_remembered
def _resampling_matrix(old: int, new: int, rule: Resampling, device: torch.device) -> Tensor:
    """(new, old): along one axis, how much of each old row a new one takes."""
    mode = "bilinear" if rule in ("zoom", "bilinear") else "bicubic"
    # As a picture of rows that are resized in width alone: torch 2.13 gives wrong numbers, antialiased, for width 1.
    rows = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]
    resized = F.interpolate(
        rows, size=(old, new), mode=mode, align_corners=rule == "zoom", antialias=rule == "bicubic-antialias"
    )
    return resized[0, 0].T.float().to(device)


@_remembered
def _sincos_table(y: int, x: int, width: int, prefixes: int, device: torch.device) -> Tensor:
    return F.pad(sincos2d(grid_coordinates((y, x), device), width), (0, 0, prefixes, 0))
