"""ResNets with GroupNorm and standardised weights: the hybrids' trunk, and BiT, the paper's baselines.

They are two networks. The trunk is version 1: a norm after each convolution, a ReLU after the sum. BiT is version 2: norm
and ReLU before each convolution, a bare sum, and one more norm at the end. Both halve the picture twice at the root and
once at each stage but the first; a unit is 1 x 1, 3 x 3, 1 x 1, and gives out four times what it works in.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.core.errors import UserError
from vitrail.core.types import Features, Numerics, Preprocess
from vitrail.layers.convolutions import BIT, HYBRID, Standardization, StandardizedConvolution, max_pool
from vitrail.layers.patches import check_pictures

GROUPS = 32


class Place(NamedTuple):
    """A unit in its network: channels that come in, and that its 3 x 3 convolution works in; its stride."""

    stage: int
    inputs: int
    middle: int
    stride: int

    @property
    def projects(self) -> bool:
        return self.stride != 1 or self.inputs != 4 * self.middle


def places(layers: tuple[int, ...], width: int) -> Iterator[Place]:
    """All units in order. layers: units of each stage; width: the root's channels, doubled at each further stage."""
    inputs = width
    for stage, count in enumerate(layers):
        for unit in range(count):
            yield Place(stage, inputs, width * 2**stage, 2 if stage and not unit else 1)
            inputs = 4 * width * 2**stage


def check_layers(layers: tuple[int, ...], width: int) -> None:
    if any(count < 1 for count in layers):
        raise UserError(f"each stage of a ResNet needs at least 1 unit, not {layers}")
    if width < 1 or width % GROUPS:
        raise UserError(
            f"a ResNet's root needs a multiple of {GROUPS} channels, which are normed in groups, not {width}"
        )


def convolution_macs(layers: tuple[int, ...], width: int, channels: int, size: tuple[int, int]) -> int:
    """Multiply-accumulates of root and units on one picture of `size` pixels."""
    y, x = (-(-length // 2) for length in size)
    total = y * x * 49 * channels * width
    y, x = -(-y // 2), -(-x // 2)
    for place in places(layers, width):
        total += y * x * place.inputs * place.middle
        y, x = -(-y // place.stride), -(-x // place.stride)
        total += y * x * place.middle * (9 * place.middle + 4 * place.middle + 4 * place.inputs * place.projects)
    return total


@dataclass(frozen=True)
class TrunkConfig:
    """A hybrid's ResNet. Raises UserError where its numbers do not fit together.

    layers: units of each stage; () for the root alone, as in R+Ti/16. width: the root's channels.
    norm_epsilon, standardization: the official code's; other libraries differ.
    """

    layers: tuple[int, ...]
    width: int = 64
    norm_epsilon: float = 1e-6
    standardization: Standardization = HYBRID

    def __post_init__(self) -> None:
        check_layers(self.layers, self.width)

    @property
    def channels(self) -> int:
        """Of the map that comes out."""
        return 4 * self.width * 2 ** (len(self.layers) - 1) if self.layers else self.width

    @property
    def stride(self) -> int:
        """Pixels a cell of the map that comes out."""
        return 4 * 2 ** max(len(self.layers) - 1, 0)

    def parameters(self, channels: int) -> int:
        """The closed formula, for pictures of so many channels."""
        total = 49 * channels * self.width + 2 * self.width
        for place in places(self.layers, self.width):
            m = place.middle
            total += place.inputs * m + 13 * m * m + 12 * m + (4 * place.inputs + 8) * m * place.projects
        return total

    def macs(self, size: tuple[int, int], channels: int) -> int:
        return convolution_macs(self.layers, self.width, channels, size)


class Unit(nn.Module):
    """Version 1. Its last norm begins at zero, so that it begins as its shortcut."""

    def __init__(self, place: Place, epsilon: float, rule: Standardization) -> None:
        super().__init__()
        inputs, middle, stride = place.inputs, place.middle, place.stride
        self.conv1 = StandardizedConvolution(inputs, middle, 1, 1, rule)
        self.norm1 = nn.GroupNorm(GROUPS, middle, epsilon)
        self.conv2 = StandardizedConvolution(middle, middle, 3, stride, rule)
        self.norm2 = nn.GroupNorm(GROUPS, middle, epsilon)
        self.conv3 = StandardizedConvolution(middle, 4 * middle, 1, 1, rule)
        self.norm3 = nn.GroupNorm(GROUPS, 4 * middle, epsilon)
        self.project = StandardizedConvolution(inputs, 4 * middle, 1, stride, rule) if place.projects else None
        self.project_norm = nn.GroupNorm(GROUPS, 4 * middle, epsilon) if place.projects else None

    def initialize(self, generator: torch.Generator) -> None:
        initialize_parts(self, generator)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b wide y x"]:
        shortcut = x
        if self.project is not None and self.project_norm is not None:
            shortcut = self.project_norm(self.project(x))
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return (shortcut + self.norm3(self.conv3(x))).relu()


class PreactivationUnit(nn.Module):
    """Version 2. Its shortcut, where it is projected, starts after the first norm and ReLU."""

    def __init__(self, place: Place, epsilon: float, rule: Standardization) -> None:
        super().__init__()
        inputs, middle, stride = place.inputs, place.middle, place.stride
        self.norm1 = nn.GroupNorm(GROUPS, inputs, epsilon)
        self.conv1 = StandardizedConvolution(inputs, middle, 1, 1, rule)
        self.norm2 = nn.GroupNorm(GROUPS, middle, epsilon)
        self.conv2 = StandardizedConvolution(middle, middle, 3, stride, rule)
        self.norm3 = nn.GroupNorm(GROUPS, middle, epsilon)
        self.conv3 = StandardizedConvolution(middle, 4 * middle, 1, 1, rule)
        self.project = StandardizedConvolution(inputs, 4 * middle, 1, stride, rule) if place.projects else None

    def initialize(self, generator: torch.Generator) -> None:
        initialize_parts(self, generator)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b wide y x"]:
        active = self.norm1(x).relu()
        shortcut = x if self.project is None else self.project(active)
        x = self.conv1(active)
        x = self.conv2(self.norm2(x).relu())
        return shortcut + self.conv3(self.norm3(x).relu())


class Trunk(nn.Module):
    """Pictures to the map that a hybrid's patches are cut from. Made by `ViTConfig.build`."""

    def __init__(self, config: TrunkConfig, channels: int) -> None:
        super().__init__()
        self.checkpointing = False
        rule = config.standardization
        self.rule = rule
        self.root = StandardizedConvolution(channels, config.width, 7, 2, rule)
        self.root_norm = nn.GroupNorm(GROUPS, config.width, config.norm_epsilon)
        self.stages = build_stages(Unit, config.layers, config.width, config.norm_epsilon, rule)

    def initialize(self, generator: torch.Generator) -> None:
        initialize_parts(self, generator)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b wide y x"]:
        x = self.root_norm(self.root(images.to(self.root.weight.dtype))).relu()
        x = max_pool(x, self.rule)
        for stage in self.stages:
            x = run_stage(stage, x, self.checkpointing)
        return x


@dataclass(frozen=True)
class ResNetConfig:
    """A BiT ResNet ("Big Transfer", arXiv 1912.11370). Raises UserError where its numbers do not fit together.

    layers: units of each stage. width_factor: the paper's x1 to x4.
    image: (height, width) that pictures are made to; there is nothing in the model that depends on it.
    """

    layers: tuple[int, ...] = (3, 4, 6, 3)
    width_factor: int = 1
    image: tuple[int, int] = (224, 224)
    channels: int = 3
    numerics: Numerics = field(default_factory=lambda: Numerics(norm_epsilon=1e-5))
    standardization: Standardization = BIT
    root_width: int = 64

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("a ResNet needs at least one stage")
        if min(self.width_factor, self.channels, *self.image) < 1:
            raise UserError("a ResNet's width factor, channels and picture size must be at least 1")
        check_layers(self.layers, self.root_channels)

    @property
    def root_channels(self) -> int:
        return self.root_width * self.width_factor

    @property
    def width(self) -> int:
        return 4 * self.root_channels * 2 ** (len(self.layers) - 1)

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def stride(self) -> tuple[int, int]:
        return stage_stride(self.depth - 1)

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.image[0] // self.stride[0]), -(-self.image[1] // self.stride[1])

    def tokens(self, size: tuple[int, int] | None = None) -> int:
        """Cells of the last map for a picture of `size` pixels (the config's own, if None)."""
        height, width = size or self.image
        return -(-height // self.stride[0]) * -(-width // self.stride[1])

    def parameters(self) -> int:
        """The closed formula: exactly what `build().parameters()` count, without building."""
        total = 49 * self.channels * self.root_channels + 2 * self.width
        for place in places(self.layers, self.root_channels):
            m = place.middle
            total += place.inputs * m + 13 * m * m + 2 * place.inputs + 4 * m + 4 * place.inputs * m * place.projects
        return total

    def macs(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one picture's forward pass."""
        return convolution_macs(self.layers, self.root_channels, self.channels, size or self.image)

    def build(self, seed: int = 0, device: str | torch.device = "cpu") -> "ResNet":
        """With the official initialisation, the same numbers for a seed on any device; on "meta", without any."""
        with torch.device("meta"):
            model = ResNet(self)
        if torch.device(device).type == "meta":
            return model
        model.to_empty(device="cpu")
        model.initialize(torch.Generator().manual_seed(seed))
        return model.to(device)


class ResNet(nn.Module):
    """A BiT backbone; its blocks, for `keep` and `layer_of`, are its stages. Made by `ResNetConfig.build`.

    checkpointing: set it to True to trade time for memory in training.
    preprocess: how pictures become this model's input.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess = Preprocess(
            size=config.image, mean=(0.5,) * config.channels, deviation=(0.5,) * config.channels
        )
        self.width = config.width
        self.depth = config.depth
        self.checkpointing = False
        rule, epsilon = config.standardization, config.numerics.norm_epsilon
        self.root = StandardizedConvolution(config.channels, config.root_channels, 7, 2, rule)
        self.stages = build_stages(PreactivationUnit, config.layers, config.root_channels, epsilon, rule)
        self.norm = nn.GroupNorm(GROUPS, config.width, epsilon)

    def initialize(self, generator: torch.Generator) -> None:
        """The official initialisation, in place; the generator must be on the parameters' device."""
        initialize_parts(self, generator)

    def features(self, images: Float[Tensor, "b c h w"], keep: tuple[int, ...] = ()) -> Features:
        """Normalised pictures of any size to the last map after norm and ReLU, its cells as tokens.

        keep: stages whose raw outputs are wanted, each with its own width, grid and stride; negative ones count from
            the last. Raises UserError for a stage that is not there, and for other channels.
        """
        check_pictures(images, self.config.channels, (1, 1))
        if missing := [stage for stage in keep if not -self.depth <= stage < self.depth]:
            raise UserError(f"keep names stage {missing[0]}, but the model's {self.depth} are 0 to {self.depth - 1}")
        x = max_pool(self.root(images.to(self.root.weight.dtype)), self.config.standardization)
        maps = []
        for stage in self.stages:
            x = run_stage(stage, x, self.checkpointing)
            maps.append(x)
        kept = tuple(as_features(maps[stage], stage % self.depth) for stage in keep)
        return as_features(self.norm(x).relu(), self.depth - 1, kept)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        return self.features(images)

    def layer_of(self, parameter: str) -> int:
        """0 for the root, 1 + i for stage i, depth + 1 for the last norm."""
        words = parameter.split(".")
        if words[0] == "stages":
            return 1 + int(words[1])
        if words[0] in ("root", "norm"):
            return 0 if words[0] == "root" else self.depth + 1
        raise ValueError(f"a ResNet has no parameter {parameter!r}")


def build_stages(
    kind: type[Unit] | type[PreactivationUnit],
    layers: tuple[int, ...],
    width: int,
    epsilon: float,
    rule: Standardization,
) -> nn.ModuleList:
    stages: list[list[nn.Module]] = [[] for _ in layers]
    for place in places(layers, width):
        stages[place.stage].append(kind(place, epsilon, rule))
    return nn.ModuleList(nn.Sequential(*units) for units in stages)


def run_stage(stage: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    for unit in stage.children():
        x = checkpoint(unit, x, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else unit(x)
    return x


def initialize_parts(module: nn.Module, generator: torch.Generator) -> None:
    """Each convolution, norm and unit in it, by its own rule."""
    for part in module.children():
        if isinstance(part, nn.GroupNorm):
            part.reset_parameters()
        elif isinstance(part, StandardizedConvolution | Unit | PreactivationUnit):
            part.initialize(generator)
        else:
            initialize_parts(part, generator)


def stage_stride(stage: int) -> tuple[int, int]:
    return 4 * 2**stage, 4 * 2**stage


def as_features(x: Float[Tensor, "b d y x"], stage: int, layers: tuple[Features, ...] = ()) -> Features:
    """A map of a stage, its cells in row order."""
    tokens = x.flatten(2).mT
    return Features(tokens[:, :0], tokens, (x.shape[2], x.shape[3]), stage_stride(stage), layers)
