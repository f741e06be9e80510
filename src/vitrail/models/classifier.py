"""A backbone with a pool and a head: pictures in, logits out."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.layers.heads import (
    AttentionPool,
    ClassMeanPool,
    ClassTokenPool,
    LinearHead,
    MeanPool,
    NoHead,
    PoolKind,
    PoolNorm,
    PrefixPool,
)
from vitrail.models.resnet import ResNet, ResNetConfig
from vitrail.models.vit import ViT, ViTConfig, resize_backbone

Pool = ClassTokenPool | MeanPool | AttentionPool | ClassMeanPool | PrefixPool


@dataclass(frozen=True)
class ClassifierConfig:
    """A backbone and what stands on it. Raises UserError where they do not fit together.

    classes: numbers that come out, of which there are as many as pooled where there is no head.
    pool: "class", the class token; "mean", of the patch tokens (GAP); "attention", a learned probe (MAP); "class-mean",
        class token and mean side by side; "prefix", class and distillation token side by side.
    hidden: width of the pre-training head's tanh layer; None for the plain linear head.
    head_bias: the logits that training starts from. head_has_bias: False where the head is a product alone.
    pool_norm: a norm after pooling, for a backbone without a final one.
    output: what comes out: "logits", or an "embedding" whose numbers are no classes.
    """

    backbone: ViTConfig | ResNetConfig
    classes: int
    pool: PoolKind = "class"
    hidden: int | None = None
    head_bias: float = 0.0
    pool_norm: bool = False
    head: Literal["linear", "none"] = "linear"
    head_has_bias: bool = True
    output: Literal["logits", "embedding"] = "logits"

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise UserError(f"a classifier needs at least 1 class, not {self.classes}")
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"the head's hidden layer must be at least 1 wide, not {self.hidden}")
        if isinstance(self.backbone, ResNetConfig):
            if self.pool != "mean":
                raise UserError(f"a ResNet has one map and nothing else: pool it by mean, not by {self.pool}")
        elif self.pool in ("class", "class-mean", "prefix") and not self.backbone.class_token:
            raise UserError("the model has no class token to pool by: pool by mean or attention")
        elif self.pool == "prefix" and not self.backbone.distillation_token:
            raise UserError("the model has no distillation token to pool by: pool by class, mean or attention")
        if self.head == "none" and (self.hidden is not None or self.classes != self.pooled_width):
            raise UserError(
                f"without a head, the {self.pooled_width} pooled numbers come out, and not {self.classes} or a hidden layer"
            )

    @property
    def pooled_width(self) -> int:
        return self.backbone.width * (2 if self.pool in ("class-mean", "prefix") else 1)

    def parameters(self) -> int:
        """The closed formula: exactly what `build().parameters()` count, without building."""
        pool = 0
        if self.pool == "attention" and isinstance(self.backbone, ViTConfig):
            d, m = self.backbone.width, self.backbone.mlp
            pool = d + (4 * d * d + 4 * d) + 2 * d + (2 * d * m + m + d)
        wide = self.pooled_width
        hidden = 0 if self.hidden is None else (wide + 1) * self.hidden
        head = 0 if self.head == "none" else ((self.hidden or wide) + self.head_has_bias) * self.classes
        return self.backbone.parameters() + pool + 2 * wide * self.pool_norm + hidden + head

    def build(self, seed: int = 0, device: str | torch.device = "cpu") -> "Classifier":
        """With the official initialisation, the same numbers for a seed on any device; on "meta", without any."""
        with torch.device("meta"):
            backbone = self.backbone.build(device="meta")
            model = Classifier(self, backbone, build_pool(self), build_head(self), norm=build_norm(self))
        if torch.device(device).type == "meta":
            return model
        model.to_empty(device="cpu")
        model.initialize(torch.Generator().manual_seed(seed))
        return model.to(device)


class Classifier(nn.Module):
    """Made by `vitrail.create`, or by `vitrail.load`.

    labels: the classes' names, in the logits' order; empty where they have none.
    Where only prefix tokens are pooled, the last block computes no others: 0.8 of its work for a class token.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        backbone: ViT | ResNet,
        pool: Pool,
        head: LinearHead | NoHead,
        labels: tuple[str, ...] = (),
        norm: PoolNorm | None = None,
    ) -> None:
        super().__init__()
        if labels and len(labels) != config.classes:
            raise UserError(f"{len(labels)} labels were given for {config.classes} classes")
        self.config = config
        self.labels = labels
        self.backbone = backbone
        self.pool = pool
        self.pool_norm = norm
        self.head = head

    def initialize(self, generator: torch.Generator) -> None:
        """The official initialisation, in place; the generator must be on the parameters' device."""
        self.backbone.initialize(generator)
        self.pool.initialize(generator)
        if self.pool_norm is not None:
            self.pool_norm.initialize(generator)
        self.head.initialize(generator)

    @property
    def preprocess(self) -> Preprocess:
        """How pictures become the model's input: the backbone's."""
        return self.backbone.preprocess

    @preprocess.setter
    def preprocess(self, preprocess: Preprocess) -> None:
        self.backbone.preprocess = preprocess

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits. uint8 pictures are raw pixels and are normalised here; floating ones are taken as normalised.

        Raises UserError for any other type, and for a size that the patch does not divide.
        """
        if images.dtype == torch.uint8:
            images = self.preprocess.normalize(images)
        elif not images.is_floating_point():
            raise UserError(f"pictures must be uint8 pixels or normalised floating numbers, not {images.dtype}")
        return self.head(self.pooled(images))

    def pooled(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Normalised pictures to what the head stands on; of the backbone only what the pool reads is computed."""
        backbone = self.backbone
        if isinstance(backbone, ViT) and isinstance(self.pool, (ClassTokenPool, PrefixPool)):
            features = backbone.prefix_features(images)
        else:
            features = backbone.features(images)
        pooled = self.pool(features)
        return pooled if self.pool_norm is None else self.pool_norm(pooled)

    def layer_of(self, parameter: str) -> int:
        """As the backbone's; pool and head come after the last block."""
        if parameter.startswith("backbone."):
            return self.backbone.layer_of(parameter.removeprefix("backbone."))
        return self.backbone.depth + 1


def build_pool(config: ClassifierConfig) -> Pool:
    backbone = config.backbone
    if config.pool == "attention" and isinstance(backbone, ViTConfig):
        return AttentionPool(backbone.width, backbone.heads, backbone.mlp, backbone.numerics)
    match config.pool:
        case "class":
            return ClassTokenPool()
        case "class-mean":
            return ClassMeanPool()
        case "prefix":
            return PrefixPool()
    return MeanPool()


def build_norm(config: ClassifierConfig) -> PoolNorm | None:
    return PoolNorm(config.pooled_width, config.backbone.numerics.norm_epsilon) if config.pool_norm else None


def build_head(config: ClassifierConfig) -> LinearHead | NoHead:
    if config.head == "none":
        return NoHead()
    bias = config.head_bias if config.head_has_bias else None
    return LinearHead(config.pooled_width, config.classes, config.hidden, bias)


def replace_head(
    model: Classifier | ViT | ResNet,
    classes: int,
    labels: tuple[str, ...] = (),
    *,
    pool: PoolKind | None = None,
    hidden: int | None = None,
    head_bias: float = 0.0,
    seed: int = 0,
) -> Classifier:
    """A classifier for other classes on the same backbone (shared, not copied): the whole head new, as in B.1.1.

    pool: None keeps the classifier's own, with its weights and its norm; of a bare backbone, the class token where
        there is one.
    """
    backbone = model.backbone if isinstance(model, Classifier) else model
    if pool is None and isinstance(model, Classifier):
        pool = model.config.pool
    elif pool is None:
        pool = "class" if isinstance(backbone, ViT) and backbone.config.class_token else "mean"
    kept = model if isinstance(model, Classifier) and model.config.pool == pool else None
    # With a new pool, a backbone without a final norm needs one somewhere.
    normless = isinstance(backbone, ViT) and not backbone.config.final_norm
    normed = normless if kept is None else kept.config.pool_norm
    config = ClassifierConfig(backbone.config, classes, pool, hidden, head_bias, normed)
    with torch.device("meta"):
        fresh = Classifier(config, backbone, build_pool(config), build_head(config), labels, build_norm(config))
    generator, example = torch.Generator().manual_seed(seed), next(backbone.parameters())
    for part in (fresh.pool, fresh.pool_norm, fresh.head):
        if part is not None:
            part.to_empty(device="cpu").initialize(generator)
            part.to(example.device, example.dtype)
    if kept is not None:
        fresh.pool, fresh.pool_norm = kept.pool, kept.pool_norm
    return fresh


def resize_classifier(model: Classifier, image: tuple[int, int]) -> None:
    """`resize_backbone`, with the classifier's config kept true."""
    resize_backbone(model.backbone, image)
    model.config = replace(model.config, backbone=model.backbone.config)
