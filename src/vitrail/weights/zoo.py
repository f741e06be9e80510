"""Names to configs. A variant is a row of a table; a name is a variant and a patch size, so any patch has a name."""

import difflib
import re
from typing import Any, NamedTuple

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.layers.heads import PoolKind
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig


class Variant(NamedTuple):
    width: int
    depth: int
    mlp: int
    heads: int


VARIANTS = {
    # Ours, for pictures of about 28 pixels.
    "Nano": Variant(96, 6, 192, 3),
    # google-research/vision_transformer, vit_jax/configs/models.py
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    # The paper's Table 1
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "H": Variant(1280, 32, 5120, 16),
    # google-research/big_vision, models/vit.py; g, G: "Scaling Vision Transformers", Table 2; e: PaLI; So400m: SoViT
    "M": Variant(512, 12, 2048, 8),
    "So400m": Variant(1152, 27, 4304, 16),
    "g": Variant(1408, 40, 6144, 16),
    "G": Variant(1664, 48, 8192, 16),
    "e": Variant(1792, 56, 15360, 16),
}

NAMES = (
    "ViT-Nano/4",
    "ViT-Ti/16",
    "ViT-S/32",
    "ViT-S/16",
    "ViT-B/32",
    "ViT-B/16",
    "ViT-B/8",
    "ViT-L/32",
    "ViT-L/16",
    "ViT-So400m/14",
    "ViT-H/14",
    "ViT-g/14",
    "ViT-G/14",
    "ViT-e/14",
)
"""The sizes people use; any other patch size has a name too."""

_NAME = re.compile(
    rf"(?:vit[-_/ ]?)?({'|'.join(sorted(VARIANTS, key=len, reverse=True))})[-_/]?(\d+)(?:x(\d+))?", re.IGNORECASE
)


def parse(name: str) -> tuple[str, tuple[int, int]]:
    """ "ViT-B/16", "ViT-B_16", "vit-b16" to ("B", (16, 16)); "ViT-B/16x8" is 16 high, 8 wide.

    Only g and G differ by case. Raises UserError with the nearest name where there is none such.
    """
    match = _NAME.fullmatch(name.strip())
    if match is None:
        plain = {re.sub(r"[-_/ ]", "", known).lower(): known for known in reversed(NAMES)}
        near = difflib.get_close_matches(re.sub(r"[-_/ ]", "", name).lower(), plain, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no model named {name!r}: the nearest is {plain[near]} (vitrail models lists all)")
    letters, height, width = match.groups()
    variant = letters if letters in VARIANTS else next(v for v in VARIANTS if v.lower() == letters.lower())
    return variant, (int(height), int(width or height))


def config(name: str, image: tuple[int, int] | None = None, **overrides: Any) -> ViTConfig:
    """The named model for pictures of `image` (height, width) pixels; by default about 224, a multiple of the patch.

    overrides: any field of ViTConfig.
    """
    variant, patch = parse(name)
    if min(patch) < 1:
        raise UserError(f"the model name {name!r} asks for patches of no pixels")
    if image is None:
        image = (max(round(224 / patch[0]), 1) * patch[0], max(round(224 / patch[1]), 1) * patch[1])
    return ViTConfig(**{**VARIANTS[variant]._asdict(), "patch": patch, "image": image, **overrides})


def create(
    name: str,
    *,
    classes: int | None = None,
    labels: tuple[str, ...] = (),
    pool: PoolKind | None = None,
    image: tuple[int, int] | None = None,
    channels: int | None = None,
    preprocess: Preprocess | None = None,
    hidden: int | None = None,
    head_bias: float = 0.0,
    seed: int = 0,
    **overrides: Any,
) -> Classifier:
    """A classifier with random weights; what is not given follows from what is.

    classes: needed unless `labels`, the classes' names, are given.
    pool: "class" (the default), "mean" or "attention"; the latter two leave the class token out, as the paper's GAP
        does, unless class_token=True.
    image, channels: of the pictures; by default what `preprocess` says, else 224 x 224 and 3.
    hidden, head_bias: see ClassifierConfig. overrides: any field of ViTConfig, as dropout=0.1.
    """
    if classes is None:
        if not labels:
            raise UserError("a classifier needs its number of classes or their labels")
        classes = len(labels)
    if preprocess is not None:
        image, channels = image or preprocess.size, channels or preprocess.channels
    class_token = overrides.pop("class_token", pool in (None, "class"))
    backbone = config(name, image, channels=channels or 3, class_token=class_token, **overrides)
    if preprocess is not None and (preprocess.size, preprocess.channels) != (backbone.image, backbone.channels):
        raise UserError(
            f"the preprocessing gives {preprocess.channels} channels of {preprocess.size[0]} x {preprocess.size[1]}, "
            f"but the model was asked for {backbone.channels} of {backbone.image[0]} x {backbone.image[1]}"
        )
    pool = pool or ("class" if class_token else "mean")
    model = ClassifierConfig(backbone, classes, pool, hidden, head_bias).build(seed)
    if labels and len(labels) != classes:
        raise UserError(f"{len(labels)} labels were given for {classes} classes")
    model.labels = labels
    if preprocess is not None:
        model.preprocess = preprocess
    return model
