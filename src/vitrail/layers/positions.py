"""Where a token is. Each module here turns Tokens into Positions, the value that the encoder obeys.

The position table is two parameters: one row for each prefix token that has a position and one grid (y, x, d); together
they are E_pos of Eq. 1. Only the grid is resampled for pictures of another size, and its shape is never guessed from a
count. Tokens without a grid, because some were dropped, are placed by their coordinates, which count in the module's own
grid: for pictures of another size, ask before tokens are dropped.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.core.types import Positions, Resampling, Tokens
from vitrail.layers.patches import grid_coordinates
from vitrail.layers.resampling import remembered, resample_grid, resample_offsets

PositionKind = Literal["none", "learned", "learned2d", "sincos2d", "relative", "rotary"]
PositionLayers = Literal["stem", "every", "shared"]
Grid = tuple[int, int]


class LearnedPositions(nn.Module):
    """The paper's 1-D learned table (Table 8's best), kept as prefix rows and a grid.

    prefixes: class and distillation token, as far as they have a row; unplaced: the prefix tokens that have none.
    """

    def __init__(self, prefixes: int, grid: Grid, width: int, rule: Resampling, unplaced: int = 0) -> None:
        super().__init__()
        self.rule: Resampling = rule
        self.unplaced = unplaced
        self.prefix = nn.Parameter(torch.empty(prefixes, width)) if prefixes else None
        self.grid = nn.Parameter(torch.empty(*grid, width))

    def initialize(self, generator: torch.Generator) -> None:
        for table in self.parameters():
            nn.init.normal_(table, std=0.02, generator=generator)

    def forward(self, tokens: Tokens) -> Positions:
        if tokens.grid is None:
            table = self.grid[*tokens.coords.long().unbind(-1)]
        else:
            y, x = tokens.grid
            table = resample_grid(self.grid, (y, x), self.rule).flatten(0, 1)[None]
        return Positions(_after_prefixes(table, self.prefix, self.unplaced))

    def resize(self, grid: Grid) -> None:
        self.grid = _again(self.grid, resample_grid(self.grid, grid, self.rule))


class LearnedPositions2d(nn.Module):
    """Table 8's 2-D: a table for x and one for y, half of the width each, x first (appendix D.4)."""

    def __init__(self, prefixes: int, grid: Grid, width: int, rule: Resampling, unplaced: int = 0) -> None:
        super().__init__()
        self.rule: Resampling = rule
        self.unplaced = unplaced
        self.prefix = nn.Parameter(torch.empty(prefixes, width)) if prefixes else None
        self.rows = nn.Parameter(torch.empty(grid[0], width // 2))
        self.columns = nn.Parameter(torch.empty(grid[1], width // 2))

    def initialize(self, generator: torch.Generator) -> None:
        for table in self.parameters():
            nn.init.normal_(table, std=0.02, generator=generator)

    def forward(self, tokens: Tokens) -> Positions:
        if tokens.grid is None:
            down, across = tokens.coords.long().unbind(-1)
            table = torch.cat([self.columns[across], self.rows[down]], dim=-1)
        else:
            y, x = tokens.grid
            rows, columns = _resample_line(self.rows, y, self.rule), _resample_line(self.columns, x, self.rule)
            table = torch.cat([columns.expand(y, -1, -1), rows[:, None].expand(-1, x, -1)], dim=-1).flatten(0, 1)[None]
        return Positions(_after_prefixes(table, self.prefix, self.unplaced))

    def resize(self, grid: Grid) -> None:
        self.rows = _again(self.rows, _resample_line(self.rows, grid[0], self.rule))
        self.columns = _again(self.columns, _resample_line(self.columns, grid[1], self.rule))


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
            return Positions(_after_prefixes(sincos2d(tokens.coords, self.width), None, self.prefixes))
        y, x = tokens.grid
        return Positions(_sincos_table(y, x, self.width, self.prefixes, tokens.x.device))

    def resize(self, grid: Grid) -> None:
        pass


class RotaryPositions(nn.Module):
    """DINOv3's: turns pairs of each query and key by angles of y and x; no parameters, prefix tokens are not turned.

    A picture spans -1 to 1 each way at any size, and a patch lies at its centre. head_width: a multiple of 4.
    """

    def __init__(self, grid: Grid, head_width: int, base: float) -> None:
        super().__init__()
        self.grid = grid
        self.head_width = head_width
        self.base = base

    def initialize(self, generator: torch.Generator) -> None:
        pass

    def forward(self, tokens: Tokens) -> Positions:
        if tokens.grid is None:
            angles = rotary_angles(tokens.coords, self.grid, self.head_width, self.base)
        else:
            y, x = tokens.grid
            angles = _rotary_table(y, x, self.head_width, self.base, tokens.x.device)
        return Positions(rotary=(angles.cos(), angles.sin()))

    def resize(self, grid: Grid) -> None:
        self.grid = grid


class RelativePositions(nn.Module):
    """Table 8's relative: an embedding for each difference p_q - p_k of 1-D places, as one more key (appendix D.4).

    The original query's products with these keys, over sqrt(e) as in any attention, are added to the logits. D.4 leaves
    open what it means for the class token, which lies nowhere: here nothing is added where a prefix token is query or
    key. One table serves all blocks, and each head has its own share of it, as of the keys.
    """

    def __init__(self, grid: Grid, width: int, heads: int, rule: Resampling) -> None:
        super().__init__()
        self.grid = grid
        self.heads = heads
        self.rule: Resampling = rule
        self.offsets = nn.Parameter(torch.empty(2 * grid[0] * grid[1] - 1, width))

    def initialize(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.offsets, std=0.02, generator=generator)

    def forward(self, tokens: Tokens) -> Positions:
        if tokens.grid is None:
            keys: Tensor = self.offsets
            index = difference_index(tokens.coords, self.grid)
        else:
            y, x = tokens.grid
            keys = resample_offsets(self.offsets, self.grid, (y, x), self.rule)
            index = _difference_table(y, x, tokens.x.device)
        keys = keys.unflatten(-1, (self.heads, -1)).transpose(0, 1)

        def bias(query: Float[Tensor, "b heads t e"]) -> Float[Tensor, "b heads t t"]:
            batch, heads, t, e = query.shape
            prefixes = t - index.shape[-1]
            logits = (query[:, :, prefixes:] * e**-0.5) @ keys.to(query.dtype).mT
            chosen = logits.gather(-1, index[:, None].expand(batch, heads, -1, -1))
            return F.pad(chosen, (prefixes, 0, prefixes, 0))

        return Positions(bias=bias)

    def resize(self, grid: Grid) -> None:
        self.offsets = _again(self.offsets, resample_offsets(self.offsets, self.grid, grid, self.rule))
        self.grid = grid


PositionTable = LearnedPositions | LearnedPositions2d | SinCosPositions | RotaryPositions | RelativePositions


class PositionsBeforeEachBlock(nn.ModuleList):
    """Table 8's "every layer": one table a block; or, with a single table, "every layer, shared"."""

    def __init__(self, tables: Iterable[LearnedPositions | LearnedPositions2d], depth: int) -> None:
        super().__init__(tables)
        self.depth = depth

    def initialize(self, generator: torch.Generator) -> None:
        for table in self:
            table.initialize(generator)  # type: ignore[operator]

    def forward(self, tokens: Tokens) -> Positions:
        stems = tuple(table(tokens).stem for table in self)
        return Positions(per_layer=stems if len(stems) == self.depth else stems * self.depth)

    def resize(self, grid: Grid) -> None:
        for table in self:
            table.resize(grid)  # type: ignore[operator]


def sincos2d(coords: Float[Tensor, "*n 2"], width: int, temperature: float = 10_000.0) -> Float[Tensor, "*n d"]:
    """big_vision's `posemb_sincos_2d` at any (y, x): sin x, cos x, sin y, cos y, a quarter of the width each.

    width: a multiple of 4, at least 8. The frequencies run from 1 to 1 / temperature, both included.
    """
    quarter = width // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device="cpu") / (quarter - 1)
    frequencies = (temperature**-exponents).float().to(coords.device)
    y, x = (coords.float()[..., None] * frequencies).unbind(-2)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


def rotary_angles(
    coords: Float[Tensor, "*n 2"], grid: Grid, head_width: int, base: float
) -> Float[Tensor, "*n head_width"]:
    """DINOv3's angle of each number of a head: of y, then of x, a quarter of the head each, and all of these again.

    Frequencies run from 2 pi a half picture down by powers of `base`: 1 included, 1 / base not.
    """
    exponents = torch.arange(head_width // 4, dtype=torch.float64, device="cpu") / (head_width // 4)
    frequencies = (2 * math.pi * base**-exponents).float().to(coords.device)
    size = torch.tensor(grid, dtype=torch.float32, device=coords.device)
    centred = (2 * coords.float() + 1) / size - 1
    angles = (centred[..., None] * frequencies).flatten(-2)
    return torch.cat([angles, angles], dim=-1)


def difference_index(coords: Float[Tensor, "b n 2"], grid: Grid) -> Int[Tensor, "b n n"]:
    """p_q - p_k of places counted row after row, plus what makes the smallest difference of the grid 0."""
    place = (coords[..., 0] * grid[1] + coords[..., 1]).long()
    return place[:, :, None] - place[:, None, :] + (grid[0] * grid[1] - 1)


def _after_prefixes(table: Float[Tensor, "b n d"], prefix: Tensor | None, unplaced: int) -> Float[Tensor, "b t d"]:
    """The prefix rows before the table, and rows of zeros for prefix tokens that have no position in between."""
    if unplaced:
        table = F.pad(table, (0, 0, unplaced, 0))
    return table if prefix is None else torch.cat([prefix.expand(table.shape[0], -1, -1), table], dim=1)


def _resample_line(line: Float[Tensor, "n d"], size: int, rule: Resampling) -> Float[Tensor, "m d"]:
    return resample_grid(line[None], (1, size), rule)[0]


def _again(old: nn.Parameter, resampled: Tensor) -> nn.Parameter:
    return nn.Parameter(resampled.detach().clone(), requires_grad=old.requires_grad)


@remembered
def _sincos_table(y: int, x: int, width: int, prefixes: int, device: torch.device) -> Tensor:
    return F.pad(sincos2d(grid_coordinates((y, x), device), width), (0, 0, prefixes, 0))


@remembered
def _rotary_table(y: int, x: int, head_width: int, base: float, device: torch.device) -> Tensor:
    return rotary_angles(grid_coordinates((y, x), device), (y, x), head_width, base)


@remembered
def _difference_table(y: int, x: int, device: torch.device) -> Tensor:
    return difference_index(grid_coordinates((y, x), device), (y, x))
