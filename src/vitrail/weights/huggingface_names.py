"""Hugging Face's names for the parts of a ViT: those of all its families at once, since none stands for two things.

Files hold the names of transformers 4; version 5 computes under others, and a few files have those. Both are read, the
old ones are written. Read in transformers 5.23: models/*/modeling_*.py, conversion_mapping.py.
"""

from dataclasses import dataclass, replace

from vitrail.core.types import Gelu, Interpolation, Resampling
from vitrail.weights.looks import CLIP, HALF, IMAGENET
from vitrail.weights.modules import Choice
from vitrail.weights.parts import Dialect


def _projections(at: str, names: tuple[str, str, str]) -> tuple[str, ...]:
    return tuple(f"{at}.{name}" for name in names)


DIALECT = Dialect(
    block="encoder.layer.{}.",
    blocks=r"(?:encoder\.|model\.)?layers?\.(\d{1,4})\.",
    parts={
        "attention_norm": (("layernorm_before",), ("norm1",), ("layer_norm1",)),
        "attention.qkv": (
            _projections("attention.attention", ("query", "key", "value")),
            _projections("attention", ("q_proj", "k_proj", "v_proj")),
            _projections("self_attn", ("q_proj", "k_proj", "v_proj")),
        ),
        "attention.output": (("attention.output.dense",), ("attention.o_proj",), ("self_attn.out_proj",)),
        "attention_scale": (("layer_scale1.lambda1",),),
        "mlp_norm": (("layernorm_after",), ("norm2",), ("layer_norm2",)),
        "mlp.hidden": (
            ("intermediate.dense",),
            ("mlp.fc1",),
            ("mlp.weights_in",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.up_proj",),
        ),
        "mlp.output": (("output.dense",), ("mlp.fc2",), ("mlp.weights_out",), ("mlp.down_proj",)),
        "mlp_scale": (("layer_scale2.lambda1",),),
    },
    patch=(
        ("embeddings.patch_embeddings.projection",),
        ("embeddings.patch_embeddings",),
        ("embeddings.patch_embedding",),
    ),
    class_token=(("embeddings.cls_token",), ("embeddings.class_embedding",)),
    distillation_token=(("embeddings.distillation_token",),),
    registers=(("embeddings.register_tokens",),),
    positions=(("embeddings.position_embeddings",), ("embeddings.position_embedding.weight",)),
    pre_norm=(("pre_layrnorm",),),
    norm=(("layernorm",), ("norm",), ("post_layernorm",)),
)

MAE_BLOCKS = replace(
    DIALECT,
    block="decoder_layers.{}.",
    blocks=r"(?:decoder_layers|decoder_encoder\.layers?)\.(\d{1,4})\.",
)


def preferring(block: str, *names: str) -> Dialect:
    """The same, with these names first of their kind: they are written, and missed where none is there."""

    def sort(choice: Choice) -> Choice:
        return tuple(sorted(choice, key=lambda entry: entry[0] not in names))

    return replace(
        DIALECT,
        block=block,
        parts={part: sort(choice) for part, choice in DIALECT.parts.items()},
        patch=sort(DIALECT.patch),
        class_token=sort(DIALECT.class_token),
        positions=sort(DIALECT.positions),
        norm=sort(DIALECT.norm),
    )


DINOV2 = preferring("encoder.layer.{}.", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
DINOV2_SWIGLU = preferring("encoder.layer.{}.", "norm1", "norm2", "mlp.weights_in", "mlp.weights_out")
DINOV3_PARTS = (
    "embeddings.patch_embeddings",
    "norm1",
    "attention.q_proj",
    "attention.o_proj",
    "norm2",
    "mlp.down_proj",
)
DINOV3 = preferring("layer.{}.", *DINOV3_PARTS, "mlp.up_proj", "norm")
DINOV3_GATED = preferring("layer.{}.", *DINOV3_PARTS, "mlp.gate_proj", "norm")
CLIPS = preferring(
    "encoder.layers.{}.",
    *("embeddings.patch_embedding", "embeddings.class_embedding", "embeddings.position_embedding.weight"),
    *("layer_norm1", "self_attn.q_proj", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2", "post_layernorm"),
)


@dataclass(frozen=True)
class Family:
    """What transformers takes where a config.json does not say it, and how the family's models look at pictures.

    under: what its names may begin with. enlarged: None for a resize to the size itself; else as in parts.assumed.
    square: whether a picture is resized to a square before the crop, its aspect given up.
    resample: of its position table, which only Dinov2WithRegisters antialiases.
    """

    under: tuple[str, ...]
    epsilon: float
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    interpolation: Interpolation
    enlarged: float | None = None
    square: bool = True
    heads: int = 12
    activation: str = "gelu"
    resample: Resampling = "bicubic"
    dialect: Dialect = DIALECT


FAMILIES = {
    "vit": Family(("vit.", ""), 1e-12, HALF, "bilinear"),
    "deit": Family(("deit.", ""), 1e-12, IMAGENET, "bicubic", 256 / 224),
    "vit_mae": Family(("vit.", ""), 1e-12, IMAGENET, "bilinear"),
    "dinov2": Family(("dinov2.", ""), 1e-6, IMAGENET, "bicubic", 256 / 224, square=False, dialect=DINOV2),
    "dinov2_with_registers": Family(
        under=("dinov2_with_registers.", ""),
        epsilon=1e-6,
        normalisation=IMAGENET,
        interpolation="bicubic",
        enlarged=256 / 224,
        square=False,
        resample="bicubic-antialias",
        dialect=DINOV2,
    ),
    "dinov3_vit": Family(("", "dinov3_vit."), 1e-5, IMAGENET, "bilinear", heads=6, dialect=DINOV3),
    "clip": Family(
        ("vision_model.", ""), 1e-5, CLIP, "bicubic", 1.0, square=False, activation="quick_gelu", dialect=CLIPS
    ),
    "siglip": Family(("vision_model.", ""), 1e-6, HALF, "bicubic", activation="gelu_pytorch_tanh", dialect=CLIPS),
}
FAMILIES["clip_vision_model"] = FAMILIES["clip"]
FAMILIES["siglip_vision_model"] = FAMILIES["siglip"]

ACTIVATIONS: dict[str, Gelu] = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
    "quick_gelu": "quick",
}
"""transformers' activations.py; of several that are one, the first is written."""
