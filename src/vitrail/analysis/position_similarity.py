"""How alike a model takes two places to be: the position pictures of Fig. 7 (centre) and 10, for every kind of positions.

What is compared is the code that the encoder is given, whatever made it, so tables of any grid, 2-D tables and sines are
one case. Rotary positions turn queries and keys, so their code is the cosines and sines. Relative positions have no code
of a place, only a bias of a pair, so theirs is the mean bias.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.analysis.attention import patch_distances
from vitrail.analysis.internals import Model, Trace, vit_of
from vitrail.core.errors import UserError
from vitrail.core.types import Positions, Tokens
from vitrail.layers.patches import grid_coordinates


@dataclass(frozen=True)
class PlacesAlike:
    """Entry [i, j, y, x] compares the patch in row i, column j with the patch in row y, column x.

    unit: "cosine similarity", in [-1, 1]; or "mean bias (logits)", whose rows are queries.
    """

    values: Float[np.ndarray, "y x y x"]
    unit: str


@torch.no_grad()
def position_similarity(model: Model, layer: int = 0, of: Trace | None = None) -> PlacesAlike:
    """On the model's own grid.

    Learned (1-D, 2-D) and sin-cos: the cosine similarity of the rows that are added, prefix rows left out (Fig. 7); where
        a table stands before each block, that of block `layer` (from 0).
    Rotary: the cosine similarity of (cos, sin) of all angles. It is the factor by which a query's product with an equal key
        changes from one place to the other, averaged over pairs of numbers.
    Relative: what is added to the logits, averaged over heads, layers and the pictures of `of`, without which it cannot
        be known: it depends on the queries.
    Raises UserError for a model without positions, or without patches.
    """
    backbone = vit_of(model)
    config = backbone.config
    if config.positions == "none":
        raise UserError("the model has no positions: its patches are a set, and no place is like or unlike another.")
    y, x = config.grid
    if config.positions == "relative":
        if of is None:
            raise ValueError("relative positions are a bias of queries, and no trace was given")
        return PlacesAlike(_mean_bias(of).reshape(y, x, y, x), "mean bias (logits)")
    weight = backbone.patch_embedding.weight
    tokens = Tokens(weight.new_zeros(1, y * x, config.width), grid_coordinates((y, x), weight.device), (y, x))
    code = _code(backbone.positions(tokens), layer)[-y * x :].double()
    code = code / code.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return PlacesAlike((code @ code.T).cpu().numpy().reshape(y, x, y, x), "cosine similarity")


def _code(positions: Positions, layer: int) -> Float[Tensor, "t code"]:
    if positions.rotary is not None:
        return torch.cat(positions.rotary, dim=-1)[0]
    table = positions.stem if positions.per_layer is None else positions.per_layer[layer]
    assert table is not None
    return table[0]


def _mean_bias(of: Trace) -> Float[np.ndarray, "n n"]:
    assert of.positions.bias is not None
    total = torch.zeros(())
    for layer in range(of.depth):
        block = of.block(layer)
        query, _, _ = block.attention.project(block.attention_norm(of.given(layer)), of.positions)
        total = total + of.positions.bias(query)[..., of.prefixes :, of.prefixes :].mean((0, 1)).double().cpu()
    return (total / of.depth).numpy()


@dataclass(frozen=True)
class Structure:
    """What a table knows of the plane; the two findings of the paper's section 4.5.

    nearness: the correlation of likeness with minus the distance: 1 where nearer always is more alike, 0 for chance.
    lines, elsewhere: mean likeness of two patches of one row or column, and of two that share neither, at the same
        distances; the first is higher where there is a row-column structure.
    """

    nearness: float
    lines: float
    elsewhere: float


def structure(alike: Float[np.ndarray, "y x y x"]) -> Structure:
    """Over all pairs of two patches; a grid of one row or column has no "elsewhere", which then is nan."""
    y, x = alike.shape[:2]
    values = alike.reshape(y * x, y * x)
    distance = patch_distances((y, x), (1, 1)).numpy()
    row, column = np.divmod(np.arange(y * x), x)
    line = (row[:, None] == row) | (column[:, None] == column)
    pairs = distance > 0
    nearness = -float(np.corrcoef(values[pairs], distance[pairs])[0, 1]) if values[pairs].std() > 0 else 0.0
    lines, elsewhere = [], []
    bins = np.round(distance).astype(int)
    for step in range(2, bins.max() + 1):
        on, off = pairs & line & (bins == step), pairs & ~line & (bins == step)
        if on.any() and off.any():
            lines.append(values[on].mean())
            elsewhere.append(values[off].mean())
    both = (float(np.mean(found)) if found else float("nan") for found in (lines, elsewhere))
    return Structure(nearness, *both)
