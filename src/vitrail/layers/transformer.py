"""The encoder: Eq. 2 and 3, pre-norm, and the norm of Eq. 4.

Dropout stands after every dense layer save the one for queries, keys and values, and after the positions are added
(appendix B.1); the attention map itself is never dropped. Whatever knows positions arrives in a Positions value, and
nothing here knows how it was made. What later ViTs changed in the block is a Variant; the default one is the paper's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.core.errors import UserError
from vitrail.core.types import Gelu, Numerics, Positions

NO_POSITIONS = Positions()
FeedForward = Literal["mlp", "swiglu"]


@dataclass(frozen=True)
class Variant:
    """In what a block differs from the paper's.

    qkv_bias: whether queries, keys and values have a bias.
    qk_norm: a LayerNorm over each head's queries and keys ("Scaling Vision Transformers to 22 Billion Parameters", 2).
    layer_scale: a learned factor a channel on each residual branch ("Going deeper with Image Transformers", 2).
    feed_forward: "swiglu" is silu(x W) * (x V) in place of gelu(x W) ("GLU Variants Improve Transformer", 2).
    """

    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    feed_forward: FeedForward = "mlp"


PLAIN = Variant()
# DINOv2's, ssl_default_config.yaml: each block begins as nearly nothing.
FIRST_LAYER_SCALE = 1e-5


def gelu(x: Tensor, kind: Gelu) -> Tensor:
    if kind == "quick":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(e) + mask), written out: (b, heads, queries, keys)."""
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    return (logits if mask is None else logits + mask).softmax(-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Fused attention over (b, heads, t, e)."""
    # Trained in bf16 on a CPU, the map written out is faster than the fused kernel, whose backward is slow there:
    # forward and backward of 50 tokens, 3 heads of 32, 9 ms for 53; of 197, 12 heads of 64, 29 for 70; of 1025, 76 for
    # 132 (one AVX512-BF16 core, torch 2.13). In fp32, and without gradients, the fused kernel is no slower.
    if query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return attention_map(query, key, mask).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, mask)


class Attention(nn.Module):
    """Multi-head self-attention. One matrix makes queries, keys and values, in that order, each head by head.

    norm_epsilon: of the norm of queries and keys; None for no such norm.
    """

    def __init__(
        self, width: int, heads: int, dropout: float = 0.0, bias: bool = True, norm_epsilon: float | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.query_norm = None if norm_epsilon is None else nn.LayerNorm(width // heads, eps=norm_epsilon)
        self.key_norm = None if norm_epsilon is None else nn.LayerNorm(width // heads, eps=norm_epsilon)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def initialize(self, generator: torch.Generator) -> None:
        # Each of the three by its own fans: fused, the fan-out would be 3 d and every bound smaller by 1 / sqrt(2).
        for matrix in (*self.qkv.weight.detach().chunk(3), self.output.weight):
            nn.init.xavier_uniform_(matrix, generator=generator)
        for bias in (self.qkv.bias, self.output.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        positions: Positions = NO_POSITIONS,
        valid: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """positions: their rotary and bias are obeyed. valid: tokens that may be looked at; None for all."""
        query, key, value = self.project(x, positions)
        return self.merge(attend(query, key, value, self.mask(query, positions, valid)))

    def weights(
        self,
        x: Float[Tensor, "b t d"],
        positions: Positions = NO_POSITIONS,
        valid: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b heads t t"]:
        """The attention map that `forward` never writes down: each row, a query's, sums to 1."""
        query, key, _ = self.project(x, positions)
        return attention_map(query, key, self.mask(query, positions, valid))

    def project(
        self, x: Float[Tensor, "b t d"], positions: Positions = NO_POSITIONS
    ) -> tuple[Float[Tensor, "b heads t e"], Float[Tensor, "b heads t e"], Float[Tensor, "b heads t e"]]:
        """Queries, keys and values, normed and rotated where this model does so."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        if positions.rotary is not None:
            query, key = rotate(query, *positions.rotary), rotate(key, *positions.rotary)
        return query, key, value

    def merge(self, mixed: Float[Tensor, "b heads t e"]) -> Float[Tensor, "b t d"]:
        """The heads' outputs side by side, through the last dense layer."""
        return self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))

    def mask(self, query: Tensor, positions: Positions, valid: Tensor | None = None) -> Tensor | None:
        """What is added to the logits: the positions' bias of the queries, and minus infinity where not valid."""
        mask = None
        if positions.bias is not None:
            mask = positions.bias(query).to(query.dtype)
        if valid is not None:
            mask = query.new_zeros(()) if mask is None else mask
            mask = mask.masked_fill(~valid[:, None, None, :], float("-inf"))
        return mask


def rotate(x: Float[Tensor, "b heads t e"], cosines: Tensor, sines: Tensor) -> Float[Tensor, "b heads t e"]:
    """Rotary positions on the last n of t tokens; number i of a head is paired with number i + e / 2.

    cosines, sines: (b or 1, n, e).
    """
    prefixes = x.shape[2] - cosines.shape[1]
    prefix, rest = x[:, :, :prefixes], x[:, :, prefixes:]
    first, second = rest.chunk(2, dim=-1)
    turned = rest * cosines[:, None] + torch.cat([-second, first], dim=-1) * sines[:, None]
    return torch.cat([prefix, turned.to(x.dtype)], dim=2)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, kind: Gelu, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind: Gelu = kind
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def initialize(self, generator: torch.Generator) -> None:
        for layer in (self.hidden, self.output):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.normal_(layer.bias, std=1e-6, generator=generator)

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        return self.contract(self.expand(x))

    def expand(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any m"]:
        """The hidden layer, after its nonlinearity."""
        return gelu(self.hidden(x), self.kind)

    def contract(self, hidden: Float[Tensor, "*any m"]) -> Float[Tensor, "*any d"]:
        return self.dropout(self.output(self.dropout(hidden)))


class SwiGLU(nn.Module):
    """silu(gate) * value, both made by one matrix, the gate's half first."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 2 * hidden)
        self.output = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def initialize(self, generator: torch.Generator) -> None:
        for matrix in (*self.hidden.weight.detach().chunk(2), self.output.weight):
            nn.init.xavier_uniform_(matrix, generator=generator)
        for layer in (self.hidden, self.output):
            nn.init.normal_(layer.bias, std=1e-6, generator=generator)

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        return self.contract(self.expand(x))

    def expand(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any m"]:
        """The hidden layer, after its nonlinearity."""
        gate, value = self.hidden(x).chunk(2, dim=-1)
        return F.silu(gate) * value

    def contract(self, hidden: Float[Tensor, "*any m"]) -> Float[Tensor, "*any d"]:
        return self.dropout(self.output(self.dropout(hidden)))


class Block(nn.Module):
    """Eq. 2 and 3. drop_path: the chance that a picture skips a residual branch in training (stochastic depth)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: int,
        numerics: Numerics,
        dropout: float,
        drop_path: float,
        variant: Variant = PLAIN,
    ) -> None:
        super().__init__()
        epsilon = numerics.norm_epsilon
        self.drop_path = drop_path
        self.attention_norm = nn.LayerNorm(width, eps=epsilon)
        self.attention = Attention(width, heads, dropout, variant.qkv_bias, epsilon if variant.qk_norm else None)
        self.mlp_norm = nn.LayerNorm(width, eps=epsilon)
        swiglu = variant.feed_forward == "swiglu"
        self.mlp = SwiGLU(width, mlp, dropout) if swiglu else MLP(width, mlp, numerics.gelu, dropout)
        self.attention_scale = nn.Parameter(torch.empty(width)) if variant.layer_scale else None
        self.mlp_scale = nn.Parameter(torch.empty(width)) if variant.layer_scale else None

    def initialize(self, generator: torch.Generator) -> None:
        self.attention_norm.reset_parameters()
        self.attention.initialize(generator)
        self.mlp_norm.reset_parameters()
        self.mlp.initialize(generator)
        for scale in (self.attention_scale, self.mlp_scale):
            if scale is not None:
                nn.init.constant_(scale, FIRST_LAYER_SCALE)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        positions: Positions = NO_POSITIONS,
        valid: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        x = self.add_attended(x, self.attention(self.attention_norm(x), positions, valid))
        return self.add_transformed(x, self.mlp(self.mlp_norm(x)))

    def add_attended(self, x: Float[Tensor, "b t d"], attended: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Eq. 2's sum."""
        return x + self._sometimes(attended if self.attention_scale is None else attended * self.attention_scale)

    def add_transformed(self, x: Float[Tensor, "b t d"], transformed: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Eq. 3's sum."""
        return x + self._sometimes(transformed if self.mlp_scale is None else transformed * self.mlp_scale)

    def _sometimes(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        # The official code does not divide by the chance to stay; dividing keeps the expectation, so that evaluation
        # needs no correction.
        stays = 1 - self.drop_path
        return branch * branch.new_empty(branch.shape[0], 1, 1).bernoulli_(stays).div_(stays)


class Encoder(nn.Module):
    """The blocks and the final norm.

    checkpointing: blocks are computed again in the backward pass, to save memory.
    pre_norm: a norm before the first block too (CLIP). final_norm: False where the norm stands after pooling.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        numerics: Numerics,
        dropout: float,
        drop_path: float,
        variant: Variant = PLAIN,
        pre_norm: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.checkpointing = False
        self.dropout = nn.Dropout(dropout)
        # The official rule: the chance grows with depth, from none at the first block to all of it at the last.
        chances = [drop_path * layer / max(depth - 1, 1) for layer in range(depth)]
        self.pre_norm = nn.LayerNorm(width, eps=numerics.norm_epsilon) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, mlp, numerics, dropout, chance, variant) for chance in chances)
        self.norm = nn.LayerNorm(width, eps=numerics.norm_epsilon) if final_norm else nn.Identity()

    def initialize(self, generator: torch.Generator) -> None:
        for block in self.blocks:
            block.initialize(generator)  # type: ignore[operator]
        for norm in (self.pre_norm, self.norm):
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        positions: Positions = NO_POSITIONS,
        valid: Bool[Tensor, "b t"] | None = None,
        keep: tuple[int, ...] = (),
    ) -> tuple[Float[Tensor, "b t d"], tuple[Float[Tensor, "b t d"], ...]]:
        """All tokens after the final norm, and the raw outputs of the blocks that `keep` names, in its order.

        Raises UserError where `keep` names a block that is not there.
        """
        depth = len(self.blocks)
        if missing := [layer for layer in keep if not -depth <= layer < depth]:
            raise UserError(f"keep names block {missing[0]}, but the model's {depth} blocks are 0 to {depth - 1}")
        x = self.enter(x, positions)
        kept: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            if positions.per_layer is not None:
                x = x + positions.per_layer[layer]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, positions, valid, use_reentrant=False)
            else:
                x = block(x, positions, valid)
            if layer in keep or layer - depth in keep:
                kept[layer] = x
        return self.norm(x), tuple(kept[layer % depth] for layer in keep)

    def enter(self, x: Float[Tensor, "b t d"], positions: Positions = NO_POSITIONS) -> Float[Tensor, "b t d"]:
        """Positions added at the stem, and the norm before the first block where there is one."""
        if positions.stem is not None:
            x = x + positions.stem
        return self.pre_norm(self.dropout(x))
