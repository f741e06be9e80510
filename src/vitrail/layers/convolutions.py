"""Convolutions with standardised weights ("Weight Standardization", arXiv 1903.10520), as in hybrids and BiT ResNets.

Two codes that look alike differ in two ways, each of which moves the output: how far the picture is padded on which
side, and where the epsilon stands. Both are a Standardization, a value that the model hands down. The kernel is stored
raw and standardised in each forward pass, in fp32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.patches import lecun_normal_


@dataclass(frozen=True)
class Standardization:
    """The arithmetic of a family of convolutions.

    epsilon: added to the deviation, or to the variance if `inside` the root.
    same: TensorFlow's "SAME" padding, whose odd pixel comes after; else (size - 1) / 2 on both sides.
    """

    epsilon: float
    inside: bool
    same: bool


# Official code: vision_transformer, models_resnet.py.
HYBRID = Standardization(1e-5, inside=False, same=True)
# big_vision, models/bit_paper.py.
BIT = Standardization(1e-10, inside=True, same=False)


class StandardizedConvolution(nn.Module):
    """A square kernel without bias, whose weights have mean 0 and variance 1 for each output channel."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, rule: Standardization) -> None:
        super().__init__()
        self.stride = stride
        self.rule = rule
        self.weight = nn.Parameter(torch.empty(outputs, inputs, size, size))

    def initialize(self, generator: torch.Generator) -> None:
        lecun_normal_(self.weight, generator)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b wide y x"]:
        weight, epsilon = self.weight.float(), self.rule.epsilon
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        spread = (variance + epsilon).sqrt() if self.rule.inside else variance.sqrt() + epsilon
        weight = ((weight - mean) / spread).to(self.weight.dtype)
        x, padding = _padded(x, weight.shape[-1], self.stride, self.rule.same, 0.0)
        return F.conv2d(x, weight, stride=self.stride, padding=padding)


def max_pool(x: Float[Tensor, "b c h w"], rule: Standardization) -> Float[Tensor, "b c y x"]:
    """Of 3 x 3 cells, at every second one; what is padded is never the largest."""
    x, padding = _padded(x, 3, 2, rule.same, float("-inf"))
    return F.max_pool2d(x, 3, 2, padding)


def _padded(x: Tensor, size: int, stride: int, same: bool, value: float) -> tuple[Tensor, tuple[int, int]]:
    """What is left to pad evenly, (down, across), after padding `x` itself where the two sides differ.

    Either way there are ceil(length / stride) outputs.
    """
    if not same:
        return x, (size // 2, size // 2)
    down, across = (max((-(-length // stride) - 1) * stride + size - length, 0) for length in x.shape[2:])
    if down % 2 == 0 and across % 2 == 0:
        return x, (down // 2, across // 2)
    sides = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(x, sides, value=value), (0, 0)
