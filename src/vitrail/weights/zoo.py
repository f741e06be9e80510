"""Names to configs. A ViT's name is a row of a table and a patch size, so any patch has a name; a hybrid's has its ResNet in
front (R50+ViT-B/16), a BiT ResNet's its depth and width factor (BiT-R50x1).
"""

import difflib
import re
from typing import Any, NamedTuple

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.layers.heads import PoolKind
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNetConfig, TrunkConfig
from vitrail.models.vit import ViTConfig


class Variant(NamedTuple):
    width: int
    depth: int
    mlp: int
    heads: int


VARIANTS = {
    # Ours, for pictures of about 28 pixels and minutes of a processor (docs/log.md).
    "Nano": Variant(96, 4, 192, 3),
    "Micro": Variant(192, 6, 384, 3),
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

VITS = (
    "ViT-Nano/7",
    "ViT-Micro/7",
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
    "R+ViT-Ti/16",
    "R26+ViT-S/32",
    "R26+ViT-B/32",
    "R50+ViT-B/16",
    "R50+ViT-L/32",
)
"""The sizes people use; any other patch size has a name too."""

TRUNKS = {
    # vit_jax/configs/models.py: units of each stage, and the patch on the map. "/16" is what the file is called: a root
    # alone halves twice, so that patches of 8 make 32 pixels a token.
    ("", 16): ((), 8),
    ("26", 32): ((2, 2, 2, 2), 1),
    ("50", 16): ((3, 4, 9), 1),
    ("50", 32): ((3, 4, 6, 3), 1),
}

UNITS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
"""A ResNet's units of each stage by its depth: arXiv 1512.03385, Table 1; 200: arXiv 1603.05027."""

# The paper's Table 6, and the released BiT-S and BiT-M.
RESNETS = (
    "BiT-R50x1",
    "BiT-R50x2",
    "BiT-R50x3",
    "BiT-R101x1",
    "BiT-R101x3",
    "BiT-R152x1",
    "BiT-R152x2",
    "BiT-R152x4",
    "BiT-R200x3",
)

NAMES = VITS + RESNETS

_RESNET = re.compile(rf"(?:bit[-_])?(?:[sml][-_])?r({'|'.join(map(str, UNITS))})x([1-4])", re.IGNORECASE)
_HYBRID = re.compile(r"r(\d*)\+(.+)", re.IGNORECASE)
_NAME = re.compile(
    rf"(?:vit[-_/ ]?)?({'|'.join(sorted(VARIANTS, key=len, reverse=True))})[-_/]?(\d+)(?:x(\d+))?", re.IGNORECASE
)


def parse(name: str) -> tuple[str, tuple[int, int]]:
    """ "ViT-B/16", "ViT-B_16", "vit-b16" to ("B", (16, 16)); "ViT-B/16x8" is 16 high, 8 wide.

    Only g and G differ by case. Raises UserError with the nearest name where there is none such.
    """
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise _unknown(name)
    letters, height, width = match.groups()
    variant = letters if letters in VARIANTS else next(v for v in VARIANTS if v.lower() == letters.lower())
    return variant, (int(height), int(width or height))


def config(name: str, image: tuple[int, int] | None = None, **overrides: Any) -> ViTConfig | ResNetConfig:
    """The named model for pictures of `image` (height, width) pixels; by default about 224, a multiple of the patch.

    overrides: any field of its config.
    """
    resnet, hybrid = _RESNET.fullmatch(name.strip()), _HYBRID.fullmatch(name.strip())
    if resnet is not None:
        sizes: dict[str, Any] = {"layers": UNITS[int(resnet[1])], "width_factor": int(resnet[2])}
        return ResNetConfig(**{**sizes, "image": image or (224, 224), **overrides})
    variant, patch = parse(hybrid[2] if hybrid else name)
    if min(patch) < 1:
        raise UserError(f"the model name {name!r} asks for patches of no pixels")
    fields: dict[str, Any] = VARIANTS[variant]._asdict()
    stride = patch
    if hybrid is not None:
        if patch[0] != patch[1] or (hybrid[1], patch[0]) not in TRUNKS:
            raise _unknown(name)
        layers, side = TRUNKS[hybrid[1], patch[0]]
        trunk = TrunkConfig(layers)
        fields["trunk"] = trunk
        patch, stride = (side, side), (side * trunk.stride, side * trunk.stride)
    if image is None:
        image = (max(round(224 / stride[0]), 1) * stride[0], max(round(224 / stride[1]), 1) * stride[1])
    return ViTConfig(**{**fields, "patch": patch, "image": image, **overrides})


def _unknown(name: str) -> UserError:
    plain = {re.sub(r"[-_/ ]", "", known).lower(): known for known in reversed(NAMES)}
    near = difflib.get_close_matches(re.sub(r"[-_/ ]", "", name).lower(), plain, n=1, cutoff=0.0)[0]
    return UserError(f"there is no model named {name!r}: the nearest is {plain[near]} (vitrail models lists all)")


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
    hidden, head_bias: see ClassifierConfig. overrides: any field of the backbone's config, as dropout=0.1.
    """
    if classes is None:
        if not labels:
            raise UserError("a classifier needs its number of classes or their labels")
        classes = len(labels)
    if preprocess is not None:
        image, channels = image or preprocess.size, channels or preprocess.channels
    if not _RESNET.fullmatch(name.strip()):
        overrides.setdefault("class_token", pool in (None, "class"))
    backbone = config(name, image, channels=channels or 3, **overrides)
    if preprocess is not None and (preprocess.size, preprocess.channels) != (backbone.image, backbone.channels):
        raise UserError(
            f"the preprocessing gives {preprocess.channels} channels of {preprocess.size[0]} x {preprocess.size[1]}, "
            f"but the model was asked for {backbone.channels} of {backbone.image[0]} x {backbone.image[1]}"
        )
    pool = pool or ("class" if isinstance(backbone, ViTConfig) and backbone.class_token else "mean")
    model = ClassifierConfig(backbone, classes, pool, hidden, head_bias).build(seed)
    if labels and len(labels) != classes:
        raise UserError(f"{len(labels)} labels were given for {classes} classes")
    model.labels = labels
    if preprocess is not None:
        model.preprocess = preprocess
    return model
