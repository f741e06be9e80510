"""The Vision Transformer, headless. Its joints tokenize, positions and encode are open, because masked modelling drops
or replaces tokens between them; `features` is the three in a row, and the one contract that every family keeps.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Features, Numerics, Positions, Preprocess, Tokens
from vitrail.layers.merging import Merging
from vitrail.layers.patches import PatchEmbedding, check_pictures, check_size
from vitrail.layers.positions import (
    LearnedPositions,
    LearnedPositions2d,
    PositionKind,
    PositionLayers,
    PositionsBeforeEachBlock,
    PositionTable,
    RelativePositions,
    RotaryPositions,
    SinCosPositions,
)
from vitrail.layers.transformer import Encoder, FeedForward, Variant
from vitrail.models.resnet import ResNet, Trunk, TrunkConfig


@dataclass(frozen=True)
class ViTConfig:
    """What a ViT is made of. Raises UserError where its numbers do not fit together.

    width, depth, heads, mlp: D, number of blocks, attention heads and MLP width of Table 1.
    patch: (height, width) in pixels; with a trunk, in cells of its map.
    image: (height, width) that the position grid is made for; other sizes are resampled at run time.
    class_token: the paper's; without one, pool by mean or attention.
    dropout, drop_path: chances in [0, 1), in training only; the second is the last block's (stochastic depth).
    distillation_token: DeiT's second token. registers: DINOv2's tokens without a position, after those two.
    prefix_positions: whether class and distillation token have a row of learned positions.
    positions, position_layers: the rows and columns of the paper's Table 8, "sincos2d" and DINOv3's "rotary".
    pre_norm: a norm before the first block too (CLIP). final_norm: False where the only norm follows the pool.
    layer_scale, qk_norm, qkv_bias, feed_forward: see layers.transformer.Variant.
    trunk: the ResNet of a hybrid, on whose map the patches are cut.
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
    distillation_token: bool = False
    registers: int = 0
    prefix_positions: bool = True
    position_layers: PositionLayers = "stem"
    rotary_base: float = 100.0
    pre_norm: bool = False
    final_norm: bool = True
    layer_scale: bool = False
    qk_norm: bool = False
    qkv_bias: bool = True
    patch_bias: bool = True
    feed_forward: FeedForward = "mlp"
    trunk: TrunkConfig | None = None

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
        if self.positions == "learned2d" and self.width % 2:
            raise UserError(f"two learned tables need a width that is a multiple of 2, not {self.width}")
        if self.positions == "rotary" and self.head_width % 4:
            raise UserError(f"rotary positions need heads of a multiple of 4 numbers, not {self.head_width}")
        if self.position_layers != "stem" and self.positions not in ("learned", "learned2d"):
            raise UserError(
                f"only learned and learned2d positions can stand before each block (position_layers), not {self.positions}"
            )
        if self.rotary_base <= 0:
            raise UserError(f"the base of rotary positions must be above 0, not {self.rotary_base}")
        if self.registers < 0:
            raise UserError(f"a ViT cannot have {self.registers} registers")
        if self.distillation_token and not self.class_token:
            raise UserError("a distillation token stands beside a class token, and the model has none")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"a ViT's {name} must lie in [0, 1), not {getattr(self, name)}")
        check_size(self.image, self.stride)

    @property
    def prefixes(self) -> int:
        return self.class_token + self.distillation_token + self.registers

    @property
    def placed_prefixes(self) -> int:
        """The prefix tokens that have a row of learned positions."""
        return self.class_token + self.distillation_token if self.prefix_positions else 0

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels a token, (height, width)."""
        cell = 1 if self.trunk is None else self.trunk.stride
        return self.patch[0] * cell, self.patch[1] * cell

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.stride[0], self.image[1] // self.stride[1]

    def tokens(self, size: tuple[int, int] | None = None) -> int:
        """Tokens, prefix included, that a picture of `size` pixels (the config's own, if None) becomes."""
        size = size or self.image
        check_size(size, self.stride)
        return (size[0] // self.stride[0]) * (size[1] // self.stride[1]) + self.prefixes

    def parameters(self) -> int:
        """The closed formula: exactly what `build().parameters()` count, without building."""
        d, m = self.width, self.mlp
        trunk = 0 if self.trunk is None else self.trunk.parameters(self.channels)
        embedding = self._patch_numbers * d + d * self.patch_bias + self.prefixes * d
        attention = 4 * d * d + d + 3 * d * self.qkv_bias + 4 * self.head_width * self.qk_norm
        feed_forward = 2 * d * m + m + d if self.feed_forward == "mlp" else 3 * d * m + 2 * m + d
        block = attention + feed_forward + 4 * d + 2 * d * self.layer_scale
        norms = 2 * d * (self.pre_norm + self.final_norm)
        return trunk + embedding + self._position_parameters() + self.depth * block + norms

    def macs(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one picture's forward pass: dense layers, convolutions and attention's products."""
        t, d, m = self.tokens(size), self.width, self.mlp
        n = t - self.prefixes
        trunk = 0 if self.trunk is None else self.trunk.macs(size or self.image, self.channels)
        relative = n * (2 * n - 1) * d if self.positions == "relative" else 0
        feed_forward = (2 if self.feed_forward == "mlp" else 3) * t * d * m
        block = 4 * t * d * d + 2 * t * t * d + relative + feed_forward
        return trunk + n * self._patch_numbers * d + self.depth * block

    @property
    def _patch_numbers(self) -> int:
        return self.patch[0] * self.patch[1] * (self.channels if self.trunk is None else self.trunk.channels)

    def _position_parameters(self) -> int:
        y, x = self.grid
        if self.positions == "relative":
            return (2 * y * x - 1) * self.width
        if self.positions not in ("learned", "learned2d"):
            return 0
        grid = y * x * self.width if self.positions == "learned" else (y + x) * (self.width // 2)
        tables = self.depth if self.position_layers == "every" else 1
        return tables * (grid + self.placed_prefixes * self.width)

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
    merge: set it to the number of patch tokens to merge in each block, for speed, or to a `Merging`; 0 for none.
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
        self.trunk = None if config.trunk is None else Trunk(config.trunk, config.channels)
        channels = config.channels if config.trunk is None else config.trunk.channels
        self.patch_embedding = PatchEmbedding(config.patch, channels, config.width, config.patch_bias)
        self.prefix = nn.Parameter(torch.empty(config.prefixes, config.width)) if config.prefixes else None
        self.position_embedding = build_positions(config)
        self.encoder = Encoder(
            config.width,
            config.depth,
            config.heads,
            config.mlp,
            config.numerics,
            config.dropout,
            config.drop_path,
            Variant(config.qkv_bias, config.qk_norm, config.layer_scale, config.feed_forward),
            config.pre_norm,
            config.final_norm,
        )

    def initialize(self, generator: torch.Generator) -> None:
        """The official initialisation, in place; the generator must be on the parameters' device."""
        if self.trunk is not None:
            self.trunk.initialize(generator)
        self.patch_embedding.initialize(generator)
        if self.prefix is not None:
            nn.init.zeros_(self.prefix)
            # What has no position, and begins equal, would stay equal.
            nn.init.normal_(self.prefix.detach()[int(self.config.class_token) :], std=0.02, generator=generator)
        if self.position_embedding is not None:
            self.position_embedding.initialize(generator)
        self.encoder.initialize(generator)

    @property
    def checkpointing(self) -> bool:
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        self.encoder.checkpointing = wanted
        if self.trunk is not None:
            self.trunk.checkpointing = wanted

    @property
    def enters_at_stem(self) -> bool:
        """Whether all that is known of positions is added before the first block."""
        return self.config.positions not in ("rotary", "relative") and self.config.position_layers == "stem"

    @property
    def merge(self) -> Merging:
        return self.encoder.merge

    @merge.setter
    def merge(self, given: int | str | Merging) -> None:
        """Raises UserError for what `Merging.of` does not know, for blocks that are not there, and where positions enter
        after the stem: a mean has none of its own."""
        how = Merging.of(given)
        if missing := [block for block in how.blocks if block >= self.depth]:
            raise UserError(f"merge names block {missing[0]}, but the model's blocks are 0 to {self.depth - 1}")
        if how and not self.enters_at_stem:
            kind = self.config.positions if self.config.position_layers == "stem" else self.config.position_layers
            raise UserError(
                f"tokens can be merged only where positions enter at the stem, and this model's are {kind!r}"
            )
        self.encoder.merge, self.encoder.prefixes = how, self.config.prefixes

    def tokenize(self, images: Float[Tensor, "b c h w"]) -> Tokens:
        """Normalised pictures, of any size that the patch divides, to patch tokens without positions."""
        check_pictures(images, self.config.channels, self.config.stride)
        return self.patch_embedding(images if self.trunk is None else self.trunk(images))

    def positions(self, tokens: Tokens) -> Positions:
        """For prefix and patch tokens; resampled where `tokens.grid` is not the model's own."""
        if self.position_embedding is None:
            return Positions()
        made: Positions = self.position_embedding(tokens)
        dtype = self.patch_embedding.weight.dtype
        return replace(
            made,
            stem=None if made.stem is None else made.stem.to(dtype),
            per_layer=None if made.per_layer is None else tuple(table.to(dtype) for table in made.per_layer),
        )

    def prepend(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b t d"]:
        """Class token, distillation token and registers, as far as there are, set before the patch tokens."""
        return x if self.prefix is None else torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)

    def encode(self, tokens: Tokens, positions: Positions, keep: tuple[int, ...] = ()) -> Features:
        """Prefix tokens set before the patch tokens, positions added, through all blocks and the final norm.

        keep: blocks whose raw outputs, before any final norm, are wanted; negative ones count from the last.
        """
        valid = tokens.valid
        if valid is not None:
            if self.merge:
                raise UserError("tokens cannot be merged where some only fill up; set merge to 0")
            valid = torch.cat([valid.new_ones(valid.shape[0], self.config.prefixes), valid], dim=1)
        x, kept = self.encoder(self.prepend(tokens.x), positions, valid, keep)
        return self._split(x, tokens.grid, tuple(self._split(layer, tokens.grid) for layer in kept))

    def features(self, images: Float[Tensor, "b c h w"], keep: tuple[int, ...] = ()) -> Features:
        """Normalised pictures to tokens after the final norm; `keep` as in `encode`."""
        tokens = self.tokenize(images)
        return self.encode(tokens, self.positions(tokens), keep)

    def prefix_features(self, images: Float[Tensor, "b c h w"]) -> Features:
        """As `features`, for who wants the prefix tokens alone: the last block computes nothing else from its attention
        map on, and `tokens` is empty. The prefix differs by rounding only."""
        tokens = self.tokenize(images)
        x, _ = self.encoder(self.prepend(tokens.x), self.positions(tokens), first=self.config.prefixes)
        return self._split(x, None)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        return self.features(images)

    def layer_of(self, parameter: str) -> int:
        """0 for what comes before the first block, 1 + i for block i, depth + 1 for the final norm."""
        words = parameter.split(".")
        if words[:2] == ["encoder", "blocks"]:
            return 1 + int(words[2])
        if words[:2] == ["encoder", "norm"]:
            return self.depth + 1
        if words[0] == "position_embedding" and self.config.position_layers == "every":
            return 1 + int(words[1])
        before = ("patch_embedding", "prefix", "position_embedding", *(("trunk",) if self.trunk is not None else ()))
        if words[0] in before or words[:2] == ["encoder", "pre_norm"]:
            return 0
        raise ValueError(f"a ViT has no parameter {parameter!r}")

    def _split(self, x: Tensor, grid: tuple[int, ...] | None, layers: tuple[Features, ...] = ()) -> Features:
        prefixes = self.config.prefixes
        return Features(x[:, :prefixes], x[:, prefixes:], grid, self.config.stride, layers)


def build_positions(config: ViTConfig) -> PositionTable | PositionsBeforeEachBlock | None:
    """The module that makes this config's positions; None where it has none."""
    rule, placed = config.numerics.resample, config.placed_prefixes
    match config.positions:
        case "none":
            return None
        case "sincos2d":
            return SinCosPositions(config.prefixes, config.width)
        case "rotary":
            return RotaryPositions(config.grid, config.head_width, config.rotary_base)
        case "relative":
            return RelativePositions(config.grid, config.width, config.heads, rule)
    kind = LearnedPositions if config.positions == "learned" else LearnedPositions2d
    count = config.depth if config.position_layers == "every" else 1
    tables = [kind(placed, config.grid, config.width, rule, config.prefixes - placed) for _ in range(count)]
    return tables[0] if config.position_layers == "stem" else PositionsBeforeEachBlock(tables, config.depth)


def merge_tokens(backbone: ViT | ResNet, given: int | str | Merging) -> None:
    """Makes patch tokens fewer, in place: so many in each block, or as the words or the value say; 0 for none.

    Raises UserError where a model cannot.
    """
    how = Merging.of(given)
    if isinstance(backbone, ViT):
        backbone.merge = how
    elif how:
        raise UserError("a ResNet has no tokens to merge; leave merge at 0")


def resize_backbone(backbone: ViT | ResNet, image: tuple[int, int]) -> None:
    """Makes `image` (height, width) the model's own size, in place.

    A learned position table becomes a new, trainable parameter, resampled by the model's own rule: make the optimiser
    afterwards. The preprocessing follows: its size, and its resizing by the same factor.
    """
    if isinstance(backbone, ResNet):
        backbone.config = replace(backbone.config, image=image)
    else:
        config = replace(backbone.config, image=image)
        if backbone.position_embedding is not None:
            backbone.position_embedding.resize(config.grid)
        backbone.config = config
    backbone.preprocess = resize_preprocess(backbone.preprocess, image)


def resize_preprocess(preprocess: Preprocess, size: tuple[int, int]) -> Preprocess:
    """The same way of looking at another size (height, width): what a crop leaves away stays the same share."""
    old, resize = preprocess.size, preprocess.resize
    if isinstance(resize, int):
        resize = round(resize * min(size) / min(old))
    elif resize is not None:
        resize = (round(resize[0] * size[0] / old[0]), round(resize[1] * size[1] / old[1]))
    return replace(preprocess, size=size, resize=resize)
