"""What masked modelling adds to a ViT: the decoder of "Masked Autoencoders Are Scalable Vision Learners" (MAE).

The encoder sees only the patches that are left; the decoder puts a learned mask token where one is missing and predicts
the pixels of all. Which patches are left, and the loss, are an objective's affair.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Features, Tokens
from vitrail.layers.patches import grid_coordinates
from vitrail.layers.positions import LearnedPositions, sincos2d
from vitrail.layers.transformer import Encoder
from vitrail.models.vit import ViTConfig


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
