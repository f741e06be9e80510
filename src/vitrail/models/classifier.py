"""A backbone with a pool and a head: pictures in, logits out."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.layers.heads import AttentionPool, ClassTokenPool, LinearHead, MeanPool, PoolKind
from vitrail.models.vit import ViT, ViTConfig, resize_backbone

Pool = ClassTokenPool | MeanPool | AttentionPool


@dataclass(frozen=True)
class ClassifierConfig:
    """A ViT and what stands on it. Raises UserError where they do not fit together.

    pool: "class", the class token; "mean", of the patch tokens (GAP); "attention", a learned probe (MAP).
    hidden: width of the pre-training head's tanh layer; None for the plain linear head.
    head_bias: the logits that training starts from.
    """

    backbone: ViTConfig
    classes: int
    pool: PoolKind = "class"
    hidden: int | None = None
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise UserError(f"a classifier needs at least 1 class, not {self.classes}")
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"the head's hidden layer must be at least 1 wide, not {self.hidden}")
        if self.pool == "class" and not self.backbone.class_token:
            raise UserError("the model has no class token to pool by: pool by mean or attention")

    def parameters(self) -> int:
        """The closed formula: exactly what `build().parameters()` count, without building."""
        d, m = self.backbone.width, self.backbone.mlp
        pool = d + (4 * d * d + 4 * d) + 2 * d + (2 * d * m + m + d) if self.pool == "attention" else 0
        hidden = 0 if self.hidden is None else (d + 1) * self.hidden
        return self.backbone.parameters() + pool + hidden + ((self.hidden or d) + 1) * self.classes

    def build(self, seed: int = 0, device: str | torch.device = "cpu") -> "Classifier":
        """With the official initialisation, the same numbers for a seed on any device; on "meta", without any."""
        with torch.device("meta"):
            model = Classifier(self, ViT(self.backbone), build_pool(self), build_head(self))
        if torch.device(device).type == "meta":
            return model
        model.to_empty(device="cpu")
        model.initialize(torch.Generator().manual_seed(seed))
        return model.to(device)


class Classifier(nn.Module):
    """Made by `vitrail.create`, or by `vitrail.load`.

    labels: the classes' names, in the logits' order; empty where they have none.
    """

    def __init__(
        self, config: ClassifierConfig, backbone: ViT, pool: Pool, head: LinearHead, labels: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        if labels and len(labels) != config.classes:
            raise UserError(f"{len(labels)} labels were given for {config.classes} classes")
        self.config = config
        self.labels = labels
        self.backbone = backbone
        self.pool = pool
        self.head = head

    def initialize(self, generator: torch.Generator) -> None:
        """The official initialisation, in place; the generator must be on the parameters' device."""
        self.backbone.initialize(generator)
        self.pool.initialize(generator)
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
        return self.head(self.pool(self.backbone.features(images)))

    def layer_of(self, parameter: str) -> int:
        """As the backbone's; pool and head come after the last block."""
        if parameter.startswith("backbone."):
            return self.backbone.layer_of(parameter.removeprefix("backbone."))
        return self.backbone.depth + 1


def build_pool(config: ClassifierConfig) -> Pool:
    if config.pool == "attention":
        backbone = config.backbone
        return AttentionPool(backbone.width, backbone.heads, backbone.mlp, backbone.numerics)
    return ClassTokenPool() if config.pool == "class" else MeanPool()


def build_head(config: ClassifierConfig) -> LinearHead:
    return LinearHead(config.backbone.width, config.classes, config.hidden, config.head_bias)


def replace_head(
    model: Classifier | ViT,
    classes: int,
    labels: tuple[str, ...] = (),
    *,
    pool: PoolKind | None = None,
    hidden: int | None = None,
    head_bias: float = 0.0,
    seed: int = 0,
) -> Classifier:
    """A classifier for other classes on the same backbone (shared, not copied): the whole head new, as in B.1.1.

    pool: None keeps the classifier's own, with its weights; of a bare ViT, the class token where there is one.
    """
    if isinstance(model, Classifier):
        backbone, old = model.backbone, model.config.pool
    else:
        backbone, old = model, None
    pool = pool or old or ("class" if backbone.config.class_token else "mean")
    config = ClassifierConfig(backbone.config, classes, pool, hidden, head_bias)
    generator = torch.Generator().manual_seed(seed)
    weight = backbone.patch_embedding.weight
    with torch.device("meta"):
        head, fresh_pool = build_head(config), build_pool(config)
    for module in (fresh_pool, head):
        module.to_empty(device="cpu")
        module.initialize(generator)
        module.to(weight.device, weight.dtype)
    kept_pool = model.pool if isinstance(model, Classifier) and pool == old else fresh_pool
    return Classifier(config, backbone, kept_pool, head, labels)


def resize_classifier(model: Classifier, image: tuple[int, int]) -> None:
    """`resize_backbone`, with the classifier's config kept true."""
    resize_backbone(model.backbone, image)
    model.config = replace(model.config, backbone=model.backbone.config)
