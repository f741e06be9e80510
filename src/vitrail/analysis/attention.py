"""What a head looks at, and how far: raw attention maps, and the attention distance of Figures 7 (right) and 11."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.analysis.internals import Trace
from vitrail.layers.patches import grid_coordinates


def attention_of(of: Trace, layer: int, start: Float[Tensor, "b t"]) -> Float[np.ndarray, "b heads y x"]:
    """What block `layer` (from 0) looks at from where `start` (of `one_token` or `answer_reads`) is: a part of each row.

    Shares of the attention as they are in the map: what goes to prefix tokens is left out, so the sum may be below 1.
    """
    looked = torch.einsum("bq,bhqk->bhk", start, of.weights(layer))
    return of.on_grid(looked.float().cpu().numpy())


def attention_distances(of: Trace, layers: tuple[int, ...] | None = None) -> Float[np.ndarray, "b layers heads"]:
    """The mean attention distance in pixels of each head of `layers` (all, if None), for each picture.

    For each query patch: the Euclidean distance on the token grid to every patch, times the pixels a patch, weighted by
    the attention; then the mean over query patches (appendix D.7, and its author in google-research/vision_transformer
    issue 162). The class token and registers are neither query nor key: they lie nowhere. What attention they take is
    taken out of the weights, which are divided by what is left, so that it is a mean and no sum that falls as they gain.
    The paper's figures are the mean of this over 128 pictures.
    """
    distance = patch_distances(of.grid, of.stride).to(of.entered)
    found = []
    for layer in range(of.depth) if layers is None else layers:
        weights = of.weights(layer)[..., of.prefixes :, of.prefixes :]
        # A picture at a time: the products are as large as the map itself.
        sums = torch.stack([(part * distance).sum(-1) for part in weights])
        found.append((sums / weights.sum(-1)).mean(-1).float().cpu().numpy())
        del weights
    return np.stack(found, axis=1)


def uniform_distance(grid: tuple[int, int], stride: tuple[int, int]) -> float:
    """The attention distance in pixels of a head that looks at all patches alike, be they near or far."""
    return float(patch_distances(grid, stride).mean())


def patch_distances(grid: tuple[int, int], stride: tuple[int, int]) -> Float[Tensor, "n n"]:
    """Pixels from the centre of each patch to that of each other."""
    places = grid_coordinates(grid)[0].double() * torch.tensor(stride, dtype=torch.float64)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
