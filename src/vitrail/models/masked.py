"""What masked modelling adds to a ViT: the paper's masked patch prediction, and MAE's decoder.

In the paper's (appendix B.1.2) the encoder sees every place, some with another embedding than their own, and one linear
layer predicts what belongs there. In "Masked Autoencoders Are Scalable Vision Learners" (MAE) it sees only the patches
that are left; a decoder puts a learned mask token where one is missing and predicts the pixels of all. Which patches are
corrupted or left, and the loss, are an objective's affair.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Features, Preprocess, Tokens
from vitrail.layers.heads import LinearHead
from vitrail.layers.patches import grid_coordinates
from vitrail.layers.positions import LearnedPositions, sincos2d
from vitrail.layers.transformer import Encoder
from vitrail.models.vit import ViT, ViTConfig

Targets = Literal["mean-colour", "downsized", "pixels"]
LEVELS = 8
"""Of a colour, by channel: the paper's 3 bits."""
CELLS = 4
"""Sides of the downsized patch."""


@dataclass(frozen=True)
class MaskedPatchConfig:
    """Masked patch prediction, B.1.2. Raises UserError where the targets do not fit the patches.

    targets: "mean-colour", one of 8 levels a channel (512 classes of RGB); "downsized", the patch at 4 x 4, each cell
        such a colour of its own; "pixels", all numbers of the patch.
    """

    backbone: ViTConfig
    targets: Targets = "mean-colour"

    def __post_init__(self) -> None:
        channels, patch = self.backbone.channels, self.backbone.stride
        if self.targets != "pixels" and channels > 4:
            raise UserError(f"{channels} channels make {LEVELS}^{channels} colours, too many to tell: predict pixels")
        if self.targets == "downsized" and min(patch) < CELLS:
            raise UserError(
                f"a patch of {patch[0]} x {patch[1]} pixels cannot be downsized to {CELLS} x {CELLS}: predict its "
                "mean-colour or its pixels"
            )
        if self.backbone.grid == (1, 1):
            raise UserError("with a single patch nothing is left to predict it from: take smaller patches")

    @property
    def colours(self) -> int:
        return LEVELS**self.backbone.channels

    @property
    def numbers(self) -> int:
        """What is predicted of a patch: logits of its colour's classes, cell after cell, or pixel values."""
        tall, wide = self.backbone.stride
        each = {
            "mean-colour": self.colours,
            "downsized": CELLS * CELLS * self.colours,
            "pixels": self.backbone.channels * tall * wide,
        }
        return each[self.targets]

    def parameters(self) -> int:
        """The closed formula: exactly what `build().parameters()` count."""
        width = self.backbone.width
        return self.backbone.parameters() + width + (width + 1) * self.numbers

    def build(self, seed: int = 0, device: str | torch.device = "cpu") -> "MaskedPatchPredictor":
        """With random weights, the same numbers for a seed on any device; on "meta", without any.

        The backbone's are those that a classifier of the same seed has.
        """
        with torch.device("meta"):
            model = MaskedPatchPredictor(self, self.backbone.build(device="meta"))
        if torch.device(device).type == "meta":
            return model
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        model.backbone.initialize(generator)
        model.initialize(generator)
        return model.to(device)


class MaskedPatchPredictor(nn.Module):
    """A headless ViT, the `[mask]` embedding, and the layer that predicts. Made by `MaskedPatchConfig.build` or `around`."""

    def __init__(self, config: MaskedPatchConfig, backbone: ViT) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.mask = nn.Parameter(torch.empty(config.backbone.width))
        self.head = LinearHead(config.backbone.width, config.numbers)

    @classmethod
    def around(cls, backbone: ViT, targets: Targets, seed: int = 0) -> "MaskedPatchPredictor":
        """On a backbone that knows something already (shared, not copied), with mask and head new."""
        model = cls(MaskedPatchConfig(backbone.config, targets), backbone)
        model.initialize(torch.Generator().manual_seed(seed))
        return model

    def initialize(self, generator: torch.Generator) -> None:
        """Of what stands around the backbone, in place. The mask's deviation is BERT's, 0.02."""
        nn.init.normal_(self.mask, std=0.02, generator=generator)
        self.head.initialize(generator)

    @property
    def preprocess(self) -> Preprocess:
        return self.backbone.preprocess

    def forward(
        self, images: Shaped[Tensor, "b c h w"], sources: Int[Tensor, "b n"], places: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b m numbers"]:
        """What is predicted of the patches at `places`, from their output representations alone.

        images: uint8 pixels, which are normalised here, or normalised ones. sources: whose embedding stands at each place,
        that of which patch (its own, most often), or, for -1, the mask's. Positions are added afterwards, so every
        place keeps its own.
        """
        if images.dtype == torch.uint8:
            images = self.preprocess.normalize(images)
        tokens = self.backbone.tokenize(images)
        moved = tokens.x.gather(1, sources.clamp(min=0)[..., None].expand(-1, -1, tokens.x.shape[2]))
        x = torch.where(sources[..., None] < 0, self.mask.to(moved.dtype), moved)
        seen = self.backbone.encode(replace(tokens, x=x), self.backbone.positions(tokens)).tokens
        return self.head(seen.gather(1, places[..., None].expand(-1, -1, seen.shape[2])).flatten(0, 1)).unflatten(
            0, places.shape
        )

    def layer_of(self, parameter: str) -> int:
        """As the backbone's; the mask stands beside the patch embeddings, the head after the last block."""
        if parameter.startswith("backbone."):
            return self.backbone.layer_of(parameter.removeprefix("backbone."))
        return 0 if parameter == "mask" else self.backbone.depth + 1


@dataclass(frozen=True)
class MAEDecoderConfig:
    """A second, smaller transformer. Raises UserError where its numbers do not fit together.

    backbone: the encoder's config; patch, grid, channels and numerics are the same.
    width, depth, heads, mlp: the paper's, 3 ("MAE decoder") and Table 1: 8 blocks of 512.
    """

    backbone: ViTConfig
    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp: int = 2048

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.mlp) < 1 or self.width % self.heads or self.width % 4:
            raise UserError(
                f"a decoder's width must be a multiple of 4 and of its heads, and its numbers at least 1, but it has "
                f"{self.width} numbers, {self.depth} blocks, {self.heads} heads and {self.mlp} MLP units"
            )

    @property
    def numbers(self) -> int:
        """Pixel values of a patch, which is what is predicted of it."""
        return self.backbone.stride[0] * self.backbone.stride[1] * self.backbone.channels

    def parameters(self) -> int:
        """The closed formula: exactly what `build().parameters()` count, the fixed position table included."""
        d, m = self.width, self.mlp
        y, x = self.backbone.grid
        ends = (self.backbone.width + 1) * d + (d + 1) * self.numbers
        block = (4 * d * d + 4 * d) + (2 * d * m + m + d) + 4 * d
        return ends + d + (y * x + self.backbone.prefixes) * d + self.depth * block + 2 * d

    def build(self, seed: int = 0, device: str | torch.device = "cpu") -> "MAEDecoder":
        """With random weights, the same numbers for a seed on any device; on "meta", without any."""
        with torch.device("meta"):
            model = MAEDecoder(self)
        if torch.device(device).type == "meta":
            return model
        model.to_empty(device="cpu")
        model.initialize(torch.Generator().manual_seed(seed))
        return model.to(device)


class MAEDecoder(nn.Module):
    """Made by `MAEDecoderConfig.build`. Its position table is a parameter that is not trained, as every file has it."""

    def __init__(self, config: MAEDecoderConfig) -> None:
        super().__init__()
        self.config = config
        backbone, width = config.backbone, config.width
        self.embedding = nn.Linear(backbone.width, width)
        self.mask = nn.Parameter(torch.empty(1, width))
        self.position_embedding = LearnedPositions(
            backbone.prefixes, backbone.grid, width, backbone.numerics.resample
        ).requires_grad_(False)
        self.encoder = Encoder(width, config.depth, config.heads, config.mlp, backbone.numerics, 0.0, 0.0)
        self.output = nn.Linear(width, config.numbers)

    def initialize(self, generator: torch.Generator) -> None:
        """MAE's, in place, but for the table: its frequencies end at 1 / 10,000, where MAE's last is one step higher."""
        for layer in (self.embedding, self.output):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mask, std=0.02, generator=generator)
        table = sincos2d(grid_coordinates(self.config.backbone.grid), self.config.width)[0]
        self.position_embedding.grid.copy_(table.unflatten(0, self.config.backbone.grid))
        if self.position_embedding.prefix is not None:
            nn.init.zeros_(self.position_embedding.prefix)
        self.encoder.initialize(generator)

    def forward(
        self, features: Features, restore: Int[Tensor, "b n"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n numbers"]:
        """All patches' pixels, row by row, each with its channels: normalised as the objective's targets were.

        features: of the patches that were left, in any order.
        restore: where each patch of the picture stands, in row order, when those left, as in `features`, come first and
            those missing follow.
        grid: (y, x) of the whole picture; None for the model's own.
        """
        prefixes, width = features.prefix.shape[1], self.config.width
        x = self.embedding(torch.cat([features.prefix, features.tokens], dim=1))
        prefix, left = x[:, :prefixes], x[:, prefixes:]
        missing = self.mask.to(x.dtype).expand(x.shape[0], restore.shape[1] - left.shape[1], -1)
        patches = torch.cat([left, missing], dim=1).gather(1, restore[..., None].expand(-1, -1, width))
        grid = grid or self.config.backbone.grid
        coords = grid_coordinates(grid, x.device).expand(x.shape[0], -1, -1)
        positions = self.position_embedding(Tokens(patches, coords, grid))
        x, _ = self.encoder(torch.cat([prefix, patches], dim=1), positions)
        return self.output(x[:, prefixes:])
