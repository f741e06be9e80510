"""How far each layer reads: the pixels that its middle cell depends on, and how near its attention stays.

Unusual: the field is measured and not derived, because it is for convolutions alone that kernels tell it, and not even for
them: each GroupNorm here takes its mean over all of the picture, and so a little of everything arrives everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vitrail.analysis.attention import patch_distances
from vitrail.analysis.internals import Model, Trace, evaluating, normalized
from vitrail.core.types import Features
from vitrail.models.classifier import Classifier


@dataclass(frozen=True)
class Fields:
    """What one cell in the middle depends on, layer by layer, mean over the pictures.

    values: squared gradients at each pixel, over channels, as shares: each layer's sum to 1.
    radii: the mean distance in pixels from the middle of the cell, weighted by `values`.
    even: that distance if all pixels weighed alike: as global as can be.
    """

    values: Float[np.ndarray, "layers h w"]
    radii: Float[np.ndarray, "layers"]
    even: float


def receptive_fields(model: Model, images: Shaped[Tensor, "b c h w"], seed: int = 0, draws: int = 2) -> Fields:
    """The effective receptive field (Luo et al., arXiv 1701.04128) of each block, or stage, and last of the output.

    Of the middle cell's features a random direction is taken, `draws` times, whose squared gradient at the pixels is in
    expectation the squared norm of the Jacobian. The middle is the cell below and right of it where sides are even.
    """
    backbone = model.backbone if isinstance(model, Classifier) else model
    generator = torch.Generator().manual_seed(seed)
    pixels = normalized(model, images).detach().clone().requires_grad_()
    kinds = [parameter.requires_grad for parameter in backbone.parameters()]
    backbone.requires_grad_(False)
    try:
        with torch.enable_grad(), evaluating(backbone):
            found = backbone.features(pixels, keep=tuple(range(backbone.depth)))
            layers = [*found.layers, found]
            shares = [_shares(layer, pixels, draws, generator) for layer in layers]
    finally:
        for parameter, kind in zip(backbone.parameters(), kinds, strict=True):
            parameter.requires_grad_(kind)
    distances = [_from_middle(layer, pixels.shape[2:]) for layer in layers]
    radii = [float((share * distance).sum()) for share, distance in zip(shares, distances, strict=True)]
    return Fields(np.stack(shares), np.array(radii), float(distances[-1].mean()))


def _shares(layer: Features, pixels: Tensor, draws: int, generator: torch.Generator) -> Float[np.ndarray, "h w"]:
    assert layer.grid is not None
    middle = (layer.grid[0] // 2) * layer.grid[1] + layer.grid[1] // 2
    total = torch.zeros(pixels.shape[0], *pixels.shape[2:], device=pixels.device)
    for _ in range(draws):
        direction = torch.randn(layer.tokens.shape[-1], generator=generator).to(layer.tokens)
        (gradient,) = torch.autograd.grad((layer.tokens[:, middle] @ direction).sum(), pixels, retain_graph=True)
        total += gradient.square().sum(1)
    # Each picture counts alike, however steep the model is at it.
    shares = total / total.sum((1, 2), keepdim=True)
    return shares.mean(0).double().cpu().numpy()


def _from_middle(layer: Features, size: Sequence[int]) -> Float[np.ndarray, "h w"]:
    """Pixels from the middle of the middle cell to the middle of each pixel."""
    assert layer.grid is not None
    y, x = (
        np.arange(length) + 0.5 - (cells // 2 + 0.5) * stride
        for length, cells, stride in zip(size, layer.grid, layer.stride, strict=True)
    )
    return np.hypot(y[:, None], x[None])


def attention_within(of: Trace, distances: Sequence[float]) -> Float[np.ndarray, "b layers heads distances"]:
    """The share of each head's attention that stays within so many pixels of the query patch, mean over query patches.

    Between patches alone, as in `attention_distances`: prefix tokens lie nowhere, and what they take is left out of the
    whole. A distance of 0 is what patches give themselves; the picture's diagonal gives 1.
    """
    apart = patch_distances(of.grid, of.stride)
    near = torch.stack([apart <= distance + 1e-9 for distance in distances]).to(of.entered)
    found = []
    for layer in range(of.depth):
        weights = of.weights(layer)[..., of.prefixes :, of.prefixes :]
        # A picture at a time: the products are as large as the map itself.
        sums = torch.stack([torch.einsum("hqk,nqk->hqn", part, near) for part in weights])
        found.append((sums / weights.sum(-1, keepdim=True)).mean(2).float().cpu().numpy())
    return np.stack(found, axis=1)


def even_within(of: Trace, distances: Sequence[float]) -> Float[np.ndarray, "distances"]:
    """What `attention_within` is for a head that looks at all patches alike."""
    apart = patch_distances(of.grid, of.stride).cpu().numpy()
    return np.array([(apart <= distance + 1e-9).mean() for distance in distances])
