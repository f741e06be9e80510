"""From a backbone's features to logits: how tokens become one vector, and the linear head on it.

A head, its hidden layer and a pool's norm may each be absent: SigLIP's output is the pooled vector itself.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.core.types import Features, Numerics
from vitrail.layers.attention import attend
from vitrail.layers.patches import lecun_normal_
from vitrail.layers.transformer import MLP

PoolKind = Literal["class", "mean", "attention", "class-mean", "prefix"]


class ClassTokenPool(nn.Module):
    """The paper's: the class token after the final norm (Eq. 4)."""

    def initialize(self, generator: torch.Generator) -> None:
        pass

    def forward(self, features: Features) -> Float[Tensor, "b d"]:
        return features.prefix[:, 0]


class MeanPool(nn.Module):
    """The paper's GAP (appendix D.3): the mean of the patch tokens after the final norm; prefix tokens do not count."""

    def initialize(self, generator: torch.Generator) -> None:
        pass

    def forward(self, features: Features) -> Float[Tensor, "b d"]:
        return features.tokens.mean(dim=1)


class ClassMeanPool(nn.Module):
    """DINOv2's, as Hugging Face's classifier has it: the class token, then the mean of the patch tokens."""

    def initialize(self, generator: torch.Generator) -> None:
        pass

    def forward(self, features: Features) -> Float[Tensor, "b wide"]:
        return torch.cat([features.prefix[:, 0], features.tokens.mean(dim=1)], dim=1)


class PrefixPool(nn.Module):
    """DeiT's: the class token, then the distillation token; the mean of its two heads is one linear layer on both."""

    def initialize(self, generator: torch.Generator) -> None:
        pass

    def forward(self, features: Features) -> Float[Tensor, "b wide"]:
        return features.prefix[:, :2].flatten(1)


class AttentionPool(nn.Module):
    """big_vision's `MAPHead`: a learned probe looks at the patch tokens, then an MLP with a residual."""

    def __init__(self, width: int, heads: int, mlp: int, numerics: Numerics) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=numerics.norm_epsilon)
        self.mlp = MLP(width, mlp, numerics.gelu)

    def initialize(self, generator: torch.Generator) -> None:
        key, value = self.key_value.weight.detach().chunk(2)
        for matrix in (self.probe, self.query.weight, key, value, self.output.weight):
            nn.init.xavier_uniform_(matrix, generator=generator)
        for layer in (self.query, self.key_value, self.output):
            nn.init.zeros_(layer.bias)
        self.norm.reset_parameters()
        self.mlp.initialize(generator)

    def forward(self, features: Features) -> Float[Tensor, "b d"]:
        tokens = features.tokens
        query = self.query(self.probe).expand(tokens.shape[0], -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(query, key, value)
        seen = self.output(mixed.transpose(1, 2).flatten(2))[:, 0]
        return seen + self.mlp(self.norm(seen))


class PoolNorm(nn.LayerNorm):
    """The norm of models that have theirs after the pool."""

    def initialize(self, generator: torch.Generator) -> None:
        self.reset_parameters()


class LinearHead(nn.Module):
    """Zero-initialised logits (appendix B.1.1), after one hidden tanh layer of `hidden` units in pre-training (3.1).

    bias: the logits that training starts from; the official code takes -10 for sigmoid losses on many classes. None for
        a layer without a bias, as CLIP's projection is.
    """

    def __init__(self, width: int, classes: int, hidden: int | None = None, bias: float | None = 0.0) -> None:
        super().__init__()
        self.starting_bias = bias
        self.hidden = None if hidden is None else nn.Linear(width, hidden)
        self.output = nn.Linear(width if hidden is None else hidden, classes, bias=bias is not None)

    def initialize(self, generator: torch.Generator) -> None:
        if self.hidden is not None:
            lecun_normal_(self.hidden.weight, generator)
            nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.output.weight)
        if self.starting_bias is not None:
            nn.init.constant_(self.output.bias, self.starting_bias)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return self.output(x if self.hidden is None else self.hidden(x).tanh())


class NoHead(nn.Module):
    """The pooled vector is the output."""

    def initialize(self, generator: torch.Generator) -> None:
        pass

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return x
