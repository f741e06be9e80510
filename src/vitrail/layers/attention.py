"""Attention: Eq. 2's first half, appendix A, fused where PyTorch's kernel is the fastest and written out where it is not.

Whatever knows positions arrives in a Positions value, and nothing here knows how it was made.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitrail.core.types import Positions

NO_POSITIONS = Positions()
LONGEST = 2048
"""Tokens up to which a map is written down. Beyond, that is hardly faster (forward and backward of 2305 tokens, 6 heads
of 64, 294 ms for 322; of 4097, 1153 for 1080) and the maps of all blocks, kept for the backward pass, fill the memory."""


def bf16_on_cpu(x: Tensor) -> bool:
    """There, PyTorch's own kernels are not always the fastest."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def bf16_training_on_cpu(x: Tensor) -> bool:
    """Whether a gradient of bf16 numbers will be wanted on a CPU."""
    return bf16_on_cpu(x) and x.requires_grad


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(e) + mask), written out: (b, heads, queries, keys)."""
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    return (logits if mask is None else logits + mask).softmax(-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Fused attention over (b, heads, t, e)."""
    # Trained in bf16 on a CPU, the map written out is faster than the fused kernel, whose backward is slow there:
    # forward and backward of 50 tokens, 3 heads of 32, 9 ms for 53; of 197, 12 heads of 64, 29 for 70; of 1025, 76 for
    # 132 (one AVX512-BF16 core, torch 2.13). In fp32, and without gradients, the fused kernel is no slower.
    if bf16_training_on_cpu(query) and key.shape[2] <= LONGEST:
        return attention_map(query, key, mask).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, mask)


class WrittenAttention(torch.autograd.Function):
    """softmax(q k / sqrt(e)) v with the map written down, from queries, keys and values (b, t, 3, heads, e) to (b, t, d).

    What autograd makes of the plain formula copies the three apart and their gradients together again, and scales in
    passes of its own: forward and backward of 8 x 6 heads of 197 tokens, 18.8 ms for 15.1 (one AVX512-BF16 core, torch
    2.13). The scale is applied before the logits are rounded, which a scaled query's would be twice.
    """

    @staticmethod
    def forward(ctx: Any, made: Tensor) -> Tensor:
        batch, tokens, _, heads, width = made.shape
        query, key, value = packed = made.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, tokens, width)
        logits = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=width**-0.5)
        weights = logits.softmax(-1)
        ctx.save_for_backward(packed, weights)
        return (weights @ value).view(batch, heads, tokens, width).transpose(1, 2).reshape(batch, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        packed, weights = ctx.saved_tensors
        query, key, value = packed
        batch, tokens, _ = gradient.shape
        heads, width = len(query) // batch, query.shape[-1]
        gradient = gradient.view(batch, tokens, heads, width).transpose(1, 2).reshape(query.shape)
        given = torch.empty_like(packed)
        torch.bmm(weights.mT, gradient, out=given[2])
        logits = torch._softmax_backward_data(gradient @ value.mT, weights, -1, weights.dtype)
        for place, factor, other in ((0, logits, key), (1, logits.mT, query)):
            torch.baddbmm(given[place], factor, other, beta=0, alpha=width**-0.5, out=given[place])
        return given.view(3, batch, heads, tokens, width).permute(1, 3, 0, 2, 4)


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
        first: int | None = None,
    ) -> Float[Tensor, "b some d"]:
        """positions: their rotary and bias are obeyed. valid: tokens that may be looked at; None for all.

        first: how many of the tokens look, and come out; None for all.
        """
        plain = self.query_norm is None and positions.rotary is None and positions.bias is None
        if plain and self._parts(first):
            query, key, value = self._apart(x, first)
            return self.merge(attend(query, key, value, self.mask(query, positions, valid)))
        made = self.qkv(x)
        written = bf16_training_on_cpu(made) and made.shape[1] <= LONGEST and not torch.compiler.is_compiling()
        if plain and valid is None and first is None and written:
            return self.dropout(self.output(WrittenAttention.apply(made.unflatten(-1, (3, self.heads, -1)))))
        query, key, value = self.split(made, positions)
        mask = self.mask(query, positions, valid)
        if first is not None:
            query, mask = query[:, :, :first], None if mask is None else mask[:, :, :first]
        return self.merge(attend(query, key, value, mask))

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
        self, x: Float[Tensor, "b t d"], positions: Positions = NO_POSITIONS, first: int | None = None
    ) -> tuple[Float[Tensor, "b heads some e"], Float[Tensor, "b heads t e"], Float[Tensor, "b heads t e"]]:
        """Queries of the first tokens (None: of all), keys and values, normed and rotated where this model does so."""
        if self.query_norm is None and positions.rotary is None and self._parts(first):
            return self._apart(x, first)
        query, key, value = self.split(self.qkv(x), positions)
        return query if first is None else query[:, :, :first], key, value

    def _parts(self, first: int | None) -> bool:
        """Whether `_apart` pays. Not where another module stands in the place of qkv (an adapter, say) or a hook looks at
        it: past those it would go unseen. Nor where its weight is made of other tensors, as quantised ones are: those
        cannot be cut."""
        if first is None and not torch.compiler.is_exporting():
            return False
        qkv = self.qkv
        plain = type(qkv) is nn.Linear and not hasattr(qkv.weight, "__tensor_flatten__")
        return plain and not qkv._forward_hooks and not qkv._forward_pre_hooks

    def _apart(
        self, x: Float[Tensor, "b t d"], first: int | None
    ) -> tuple[Float[Tensor, "b heads some e"], Float[Tensor, "b heads t e"], Float[Tensor, "b heads t e"]]:
        """In three products: other tokens' queries are never made, and a graph's runtime need not copy the three apart."""
        biases = (None, None, None) if self.qkv.bias is None else self.qkv.bias.chunk(3)
        given = zip((x if first is None else x[:, :first], x, x), self.qkv.weight.chunk(3), biases, strict=True)
        query, key, value = (F.linear(*each).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in given)
        return query, key, value

    def split(
        self, made: Float[Tensor, "b t threefold"], positions: Positions
    ) -> tuple[Float[Tensor, "b heads t e"], Float[Tensor, "b heads t e"], Float[Tensor, "b heads t e"]]:
        """The latter half of `project`: from what the one matrix made."""
        query, key, value = made.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
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
