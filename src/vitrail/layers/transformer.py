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
from vitrail.layers.attention import NO_POSITIONS, Attention, attend, bf16_on_cpu
from vitrail.layers.merging import Groups, Merging, match, merge, spread

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
    # In bf16 the two kinds are the same up to rounding (against the exact tanh one, on normal numbers: relative error
    # 0.00175 by erf, 0.00173 by tanh; of the gradient 0.00172 and 0.00166), and on a CPU erf takes a third of the time:
    # forward and backward of 2.4 million numbers 3.5 ms for 9.9 (one AVX512-BF16 core, torch 2.13), forward alone on two
    # such cores 0.6 ms for 3.1.
    if kind == "erf" or bf16_on_cpu(x):
        return F.gelu(x)
    return F.gelu(x, approximate="tanh")


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
        first: int | None = None,
    ) -> Float[Tensor, "b some d"]:
        """first: how many of the tokens come out, having looked at all; None for all."""
        attended = self.attention(self.attention_norm(x), positions, valid, first)
        x = self.add_attended(x if first is None else x[:, :first], attended)
        return self.add_transformed(x, self.mlp(self.mlp_norm(x)))

    def merging(
        self,
        x: Float[Tensor, "b t d"],
        groups: Groups,
        prefixes: int,
        how: Merging,
        count: int,
        first: int | None = None,
    ) -> tuple[Float[Tensor, "b less d"], Groups]:
        """As `forward`, with token merging between attention and MLP: `count` patch tokens fewer.

        first: how many tokens come out, at most the prefix, where none are merged.
        """
        query, key, value = self.attention.project(self.attention_norm(x), first=first)
        x = x if first is None else x[:, :first]
        mask = groups.mask(query) if how.proportional else None
        x = self.add_attended(x, self.attention.merge(attend(query, key, value, mask)))
        if count:
            x, groups = merge(x, groups, match(key.mean(1) if how.by == "keys" else x, prefixes, count), how.keep)
        return self.add_transformed(x, self.mlp(self.mlp_norm(x))), groups

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
    merge: how tokens are merged (layers.merging). prefixes: those that never are.
    fillers: copies of the last tokens set behind the others, at which none looks, for a runtime that multiplies some numbers
        of rows faster than others (inference.graphs); only where positions enter at the stem, and without merging.
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
        self.merge = Merging()
        self.prefixes = 0
        self.fillers = 0
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
        first: int | None = None,
    ) -> tuple[Float[Tensor, "b some d"], tuple[Float[Tensor, "b _ d"], ...]]:
        """All tokens after the final norm, and the raw outputs of the blocks that `keep` names, in its order.

        first: how many of the tokens are wanted of the last block, which then computes no more; None
        for all. While merging, at most the prefix.
        Raises UserError where `keep` names a block that is not there.
        """
        depth = len(self.blocks)
        if missing := [layer for layer in keep if not -depth <= layer < depth]:
            raise UserError(f"keep names block {missing[0]}, but the model's {depth} blocks are 0 to {depth - 1}")
        x, count = self.enter(x, positions), x.shape[1]
        if self.fillers:
            x = torch.cat([x, x[:, -self.fillers :]], dim=1)
            valid = (torch.arange(x.shape[1], device=x.device) < count).expand(x.shape[0], -1)
        kept: dict[int, Tensor] = {}
        groups = Groups()
        for layer, block in enumerate(self.blocks):
            if positions.per_layer is not None:
                x = x + positions.per_layer[layer]
            wanted = first if layer == depth - 1 else None
            merged = 0 if wanted is not None else self.merge.at(layer, x.shape[1] - self.prefixes)
            if merged or (self.merge.proportional and groups.size is not None):
                x, groups = block.merging(x, groups, self.prefixes, self.merge, merged, wanted)  # type: ignore[operator]
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, positions, valid, wanted, use_reentrant=False)
            else:
                x = block(x, positions, valid, wanted)
            if layer in keep or layer - depth in keep:
                kept[layer] = spread(x, groups)[:, :count]
        if first is None:
            x = spread(x, groups)[:, :count]
        return self.norm(x), tuple(kept[layer % depth] for layer in keep)

    def enter(self, x: Float[Tensor, "b t d"], positions: Positions = NO_POSITIONS) -> Float[Tensor, "b t d"]:
        """Positions added at the stem, and the norm before the first block where there is one."""
        if positions.stem is not None:
            x = x + positions.stem
        return self.pre_norm(self.dropout(x))
