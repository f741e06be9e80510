"""The Vision Transformer, headless. Its joints tokenize, positions and encode are open, because masked modelling drops
or replaces tokens between them; `features` is the three in a row, and the one contract that every family keeps.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Features, Numerics, Positions, Preprocess, Tokens
from vitrail.layers.patches import PatchEmbedding, check_size
from vitrail.layers.positions import LearnedPositions, PositionKind, SinCosPositions, resample_grid
from vitrail.layers.transformer import Encoder


@dataclass(frozen=True)
class ViTConfig:
    """What a ViT is made of. Raises UserError where its numbers do not fit together.

    width, depth, heads, mlp: D, number of blocks, attention heads and MLP width of Table 1.
    patch: (height, width) in pixels.
    image: (height, width) that the position grid is made for; other sizes are resampled at run time.
    class_token: the paper's; without one, pool by mean or attention.
    dropout, drop_path: chances in [0, 1), in training only; the second is the last block's (stochastic depth).
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: tuple[int, int]
    image: tuple[int, int] = (224, 224)
    channels: int = 3
    class_token: bool = True
    positions: PositionKind = "learned"
    dropout: float = 0.0
    drop_path: float = 0.0
    numerics: Numerics = field(default_factory=Numerics)

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp", "channels"):
            if getattr(self, name) < 1:
                raise UserError(f"a ViT's {name} must be at least 1, not {getattr(self, name)}")
        if min(self.patch) < 1:
            raise UserError(f"a ViT's patch must be at least 1 pixel each way, not {self.patch[0]} x {self.patch[1]}")
        if self.width % self.heads:
            raise UserError(f"a ViT's width must be a multiple of its heads, but {self.width} is none of {self.heads}")
        if self.positions == "sincos2d" and (self.width % 4 or self.width < 8):
            raise UserError(f"sin-cos positions need a width that is a multiple of 4, at least 8, not {self.width}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"a ViT's {name} must lie in [0, 1), not {getattr(self, name)}")
        check_size(self.image, self.patch)

    @property
    def prefixes(self) -> int:
        return 1 if self.class_token else 0

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    def tokens(self, size: tuple[int, int] | None = None) -> int:
        """Tokens, prefix included, that a picture of `size` pixels (the config's own, if None) becomes."""
        size = size or self.image
        check_size(size, self.patch)
        return (size[0] // self.patch[0]) * (size[1] // self.patch[1]) + self.prefixes

    def parameters(self) -> int:
        """The closed formula: exactly what `build().parameters()` count, without building."""
        d, m = self.width, self.mlp
        y, x = self.grid
        embedding = self.channels * self.patch[0] * self.patch[1] * d + d + self.prefixes * d
        positions = (y * x + self.prefixes) * d if self.positions == "learned" else 0
        block = (4 * d * d + 4 * d) + (2 * d * m + m + d) + 4 * d
        return embedding + positions + self.depth * block + 2 * d

    def macs(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one picture's forward pass: dense layers and attention's two products."""
        t, d, m = self.tokens(size), self.width, self.mlp
        embedding = (t - self.prefixes) * self.channels * self.patch[0] * self.patch[1] * d
        return embedding + self.depth * (4 * t * d * d + 2 * t * t * d + 2 * t * d * m)

    def build(self, seed: int = 0, device: str | torch.device = "cpu") -> "ViT":
        """With the official initialisation, the same numbers for a seed on any device; on "meta", without any."""
        with torch.device("meta"):
            model = ViT(self)
        if torch.device(device).type == "meta":
            return model
        model.to_empty(device="cpu")
        model.initialize(torch.Generator().manual_seed(seed))
        return model.to(device)


class ViT(nn.Module):
    """A ViT backbone. Made by `ViTConfig.build`, or by `vitrail.load_backbone`.

    checkpointing: set it to True to trade time for memory in training.
    preprocess: how pictures become this model's input.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess = Preprocess(
            size=config.image, mean=(0.5,) * config.channels, deviation=(0.5,) * config.channels
        )
        self.width = config.width
        self.depth = config.depth
        self.patch_embedding = PatchEmbedding(config.patch, config.channels, config.width)
        self.prefix = nn.Parameter(torch.empty(config.prefixes, config.width)) if config.prefixes else None
        self.position_embedding: LearnedPositions | SinCosPositions | None = None
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(
                config.prefixes, config.grid, config.width, config.numerics.resample
            )
        elif config.positions == "sincos2d":
            self.position_embedding = SinCosPositions(config.prefixes, config.width)
        self.encoder = Encoder(
            config.width, config.depth, config.heads, config.mlp, config.numerics, config.dropout, config.drop_path
        )

    def initialize(self, generator: torch.Generator) -> None:
        """The official initialisation, in place; the generator must be on the parameters' device."""
        self.patch_embedding.initialize(generator)
        if self.prefix is not None:
            nn.init.zeros_(self.prefix)
        if self.position_embedding is not None:
            self.position_embedding.initialize(generator)
        self.encoder.initialize(generator)

    @property
    def checkpointing(self) -> bool:
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        self.encoder.checkpointing = wanted

    def tokenize(self, images: Float[Tensor, "b c h w"]) -> Tokens:
        """Normalised pictures, of any size that the patch divides, to patch tokens without positions."""
        return self.patch_embedding(images)

    def positions(self, tokens: Tokens) -> Positions:
        """For prefix and patch tokens; resampled where `tokens.grid` is not the model's own."""
        if self.position_embedding is None:
            return Positions()
        positions: Positions = self.position_embedding(tokens)
        assert positions.stem is not None
        return replace(positions, stem=positions.stem.to(self.patch_embedding.weight.dtype))

    def encode(self, tokens: Tokens, positions: Positions, keep: tuple[int, ...] = ()) -> Features:
        """Prefix tokens set before the patch tokens, positions added, through all blocks and the final norm.

        keep: blocks whose raw outputs, before any final norm, are wanted; negative ones count from the last.
        """
        x, valid = tokens.x, tokens.valid
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
            if valid is not None:
                valid = torch.cat([valid.new_ones(x.shape[0], self.config.prefixes), valid], dim=1)
        x, kept = self.encoder(x, positions, valid, keep)
        return self._split(x, tokens.grid, tuple(self._split(layer, tokens.grid) for layer in kept))

    def features(self, images: Float[Tensor, "b c h w"], keep: tuple[int, ...] = ()) -> Features:
        """Normalised pictures to tokens after the final norm; `keep` as in `encode`."""
        tokens = self.tokenize(images)
        return self.encode(tokens, self.positions(tokens), keep)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        return self.features(images)

    def layer_of(self, parameter: str) -> int:
        """0 for what comes before the first block, 1 + i for block i, depth + 1 for the final norm."""
        if parameter.startswith("encoder.blocks."):
            return 1 + int(parameter.split(".")[2])
        if parameter.startswith("encoder.norm."):
            return self.depth + 1
        if parameter.split(".")[0] in ("patch_embedding", "prefix", "position_embedding"):
            return 0
        raise ValueError(f"a ViT has no parameter {parameter!r}")

    def _split(self, x: Tensor, grid: tuple[int, ...] | None, layers: tuple[Features, ...] = ()) -> Features:
        prefixes = self.config.prefixes
        return Features(x[:, :prefixes], x[:, prefixes:], grid, self.config.patch, layers)


def resize_backbone(vit: ViT, image: tuple[int, int]) -> None:
    """Makes `image` (height, width) the model's own size, in place.

    A learned position grid becomes a new, trainable parameter, resampled by the model's own rule: make the optimiser
    afterwards. The preprocessing follows: its size, and its resizing by the same factor.
    """
    config = replace(vit.config, image=image)
    table = vit.position_embedding
    if isinstance(table, LearnedPositions):
        resampled = resample_grid(table.grid.detach(), config.grid, table.rule)
        table.grid = nn.Parameter(resampled.clone(), requires_grad=table.grid.requires_grad)
    vit.config = config
    vit.preprocess = resize_preprocess(vit.preprocess, image)


def resize_preprocess(preprocess: Preprocess, size: tuple[int, int]) -> Preprocess:
    """The same way of looking at another size (height, width): what a crop leaves away stays the same share."""
    old, resize = preprocess.size, preprocess.resize
    if isinstance(resize, int):
        resize = round(resize * min(size) / min(old))
    elif resize is not None:
        resize = (round(resize[0] * size[0] / old[0]), round(resize[1] * size[1] / old[1]))
    return replace(preprocess, size=size, resize=resize)
