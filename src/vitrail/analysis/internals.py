"""One forward pass kept open: what each block was given, from which any attention map can be written down later.

Unusual: no map is stored and no hook is set. A Trace holds the tokens between the blocks, (layers x t x d), which is small;
a map, (heads x t x t), is computed again from them when it is asked for, a layer at a time, in any order. So whatever
goes over all layers holds one map at once, at 1024 pixels too. The pass itself is the model's own, fused attention and all.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Features, Positions
from vitrail.inference.predict import evaluating
from vitrail.layers.attention import attention_map
from vitrail.layers.heads import AttentionPool
from vitrail.layers.transformer import Block
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet
from vitrail.models.vit import ViT

Model = Classifier | ViT | ResNet


@dataclass(frozen=True)
class Trace:
    """A forward pass of a ViT over b pictures. Made by `trace`.

    entered: what the encoder was given, stem positions added and any first norm applied.
    features: what came out after the final norm; its `layers` are the raw outputs of all blocks.
    """

    model: Classifier | ViT
    entered: Float[Tensor, "b t d"]
    positions: Positions
    features: Features

    @property
    def backbone(self) -> ViT:
        return vit_of(self.model)

    @property
    def depth(self) -> int:
        return self.backbone.depth

    @property
    def prefixes(self) -> int:
        return self.backbone.config.prefixes

    @property
    def grid(self) -> tuple[int, int]:
        assert self.features.grid is not None
        return self.features.grid[0], self.features.grid[1]

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels a patch, (height, width)."""
        return self.backbone.config.stride

    def block(self, layer: int) -> Block:
        block = self.backbone.encoder.blocks[layer]
        assert isinstance(block, Block)
        return block

    def given(self, layer: int) -> Float[Tensor, "b t d"]:
        """All tokens as block `layer` (from 0) was given them, with the positions that stand before it."""
        x = self.entered if layer == 0 else joined(self.features.layers[layer - 1])
        return x if self.positions.per_layer is None else x + self.positions.per_layer[layer]

    @torch.no_grad()
    def weights(self, layer: int) -> Float[Tensor, "b heads t t"]:
        """The attention map of block `layer` (from 0), computed anew: softmax(q k / sqrt(e) + bias), rows sum to 1."""
        block = self.block(layer)
        return block.attention.weights(block.attention_norm(self.given(layer)), self.positions)

    def on_grid(self, x: Float[np.ndarray, "*any t"]) -> Float[np.ndarray, "*any y x"]:
        """A number a token to a number a patch, where the patches lie; prefix tokens are left out."""
        return x[..., self.prefixes :].reshape(*x.shape[:-1], *self.grid)


@torch.no_grad()
def trace(model: Model, images: Shaped[Tensor, "b c h w"]) -> Trace:
    """The model's own forward pass, in evaluation mode. images: uint8 pixels, or normalised floating numbers.

    Raises UserError for a ResNet, which has no attention, and while tokens are merged.
    """
    backbone = vit_of(model)
    assert not isinstance(model, ResNet)
    if backbone.merge:
        raise UserError("attention is written down for whole rows of tokens; leave out --merge to look at it.")
    with evaluating(model):
        tokens = backbone.tokenize(normalized(model, images))
        positions = backbone.positions(tokens)
        entered = backbone.encoder.enter(backbone.prepend(tokens.x), positions)
        features = backbone.encode(tokens, positions, keep=tuple(range(backbone.depth)))
    return Trace(model, entered, positions, features)


@torch.no_grad()
def answer_reads(of: Trace) -> Float[Tensor, "b t"]:
    """How much of each last token the answer is read from, summing to 1: where a walk back through the layers starts.

    The class token; for a mean pool all patches alike; for "class-mean" and "prefix" both parts by half; for an attention
    pool the mean over its heads of the probe's map. A bare backbone is read as if by its class token, or by the mean.
    """
    reads = of.entered.new_zeros(of.entered.shape[:2])
    pool = of.model.config.pool if isinstance(of.model, Classifier) else None
    if pool is None:
        pool = "class" if of.backbone.config.class_token else "mean"
    if pool == "attention":
        assert isinstance(of.model, Classifier)
        reads[:, of.prefixes :] = _probe_map(of.model.pool, of.features.tokens).mean(1)
    if pool in ("class", "class-mean", "prefix"):
        reads[:, 0] = 1
    if pool == "prefix":
        reads[:, 1] = 1
    if pool in ("mean", "class-mean"):
        reads[:, of.prefixes :] = 1 / (reads.shape[1] - of.prefixes)
    return reads / reads.sum(1, keepdim=True)


def one_token(of: Trace, token: int) -> Float[Tensor, "b t"]:
    """All weight on one token, counted with the prefix tokens first: as `answer_reads`, for any other start."""
    indices = torch.full((of.entered.shape[0],), token, device=of.entered.device)
    return F.one_hot(indices, of.entered.shape[1]).to(of.entered.dtype)


def vit_of(model: Model) -> ViT:
    """Raises UserError for a ResNet."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    if isinstance(backbone, ResNet):
        raise UserError("a ResNet has no attention and no positions to look at: give a ViT or a hybrid.")
    return backbone


def normalized(model: Model, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return model.preprocess.normalize(images) if images.dtype == torch.uint8 else images


def joined(features: Features) -> Float[Tensor, "b t d"]:
    """Prefix and patch tokens in one row, as the blocks have them."""
    return torch.cat([features.prefix, features.tokens], dim=1)


def _probe_map(pool: nn.Module, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n"]:
    assert isinstance(pool, AttentionPool)
    query = pool.query(pool.probe).expand(tokens.shape[0], -1, -1).unflatten(-1, (pool.heads, -1)).transpose(1, 2)
    key = pool.key_value(tokens).chunk(2, dim=-1)[0].unflatten(-1, (pool.heads, -1)).transpose(1, 2)
    return attention_map(query, key)[:, :, 0]
