"""timm's names for the parts of a ViT, and what its architectures' names say that no tensor does.

The same names stand in DINO's, DINOv2's, DeiT's, MAE's and MoCo v3's own files, because all of those grew out of timm.
Read in timm 1.0.31: models/vision_transformer.py, vision_transformer_hybrid.py, deit.py.
"""

import re

from vitrail.core.types import Gelu
from vitrail.layers.convolutions import Standardization
from vitrail.weights.parts import Dialect

DIALECT = Dialect(
    block="blocks.{}.",
    # DINOv2's training files keep blocks in chunks: "blocks.1.10." is block 10.
    blocks=r"blocks\.(?:\d+\.)?(\d{1,4})\.",
    parts={
        "attention_norm": (("norm1",),),
        "attention.qkv": (("attn.qkv",),),
        "attention.query_norm": (("attn.q_norm",),),
        "attention.key_norm": (("attn.k_norm",),),
        "attention.output": (("attn.proj",),),
        "attention_scale": (("ls1.gamma",), ("gamma_1",)),
        "mlp_norm": (("norm2",),),
        # SwiGLU: timm's packed and split ones, and DINOv2's own.
        "mlp.hidden": (("mlp.fc1",), ("mlp.fc1_g", "mlp.fc1_x"), ("mlp.w12",)),
        "mlp.output": (("mlp.fc2",), ("mlp.w3",)),
        "mlp_scale": (("ls2.gamma",), ("gamma_2",)),
    },
    patch=(("patch_embed.proj",),),
    class_token=(("cls_token",),),
    distillation_token=(("dist_token",),),
    registers=(("reg_token",), ("register_tokens",)),
    positions=(("pos_embed",),),
    pre_norm=(("norm_pre",),),
    norm=(("norm",),),
)

HEADER = "timm"
"""Where a bare .safetensors file that Vitrail wrote keeps what a folder keeps in config.json."""

POOL = {
    "pool.query": "attn_pool.q",
    "pool.key_value": "attn_pool.kv",
    "pool.output": "attn_pool.proj",
    "pool.norm": "attn_pool.norm",
    "pool.mlp.hidden": "attn_pool.mlp.fc1",
    "pool.mlp.output": "attn_pool.mlp.fc2",
}

# timm standardises with a batch norm, whose epsilon stands under the root; its GroupNormAct has 1e-5, Flax's has 1e-6.
TRUNK_EPSILON = 1e-5
TRUNK_STANDARDIZATION = Standardization(1e-8, inside=True, same=True)

TRUNK_UNIT = {
    "conv1": "conv1",
    "conv2": "conv2",
    "conv3": "conv3",
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
    "project": "downsample.conv",
    "project_norm": "downsample.norm",
}

GELUS: dict[str, Gelu] = {"gelu": "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}

TANH = re.compile(r"base_patch32_siglip|large_patch16_siglip(_gap)?_512|so400m_patch16_siglip|giantopt_patch16_siglip")
"""The architectures whose act_layer is "gelu_tanh"; all other SigLIP towers have the erf GELU in timm."""

HEADS = {"vit_base_patch16_gap_224": 16, "test_vit": 2, "test_vit2": 2} | {
    f"vit_giantopt_patch16_siglip{gap}_{size}": 16 for gap in ("", "_gap") for size in (256, 384)
}
"""Those whose heads are neither 64 wide nor a published ViT's."""

NO_NORM = re.compile(r"_radio_v\d|_intern300m_")
"""Those without a norm after the blocks."""

NO_QKV_BIAS = re.compile(r"_miil|_(medium|betwixt)_patch16_gap_|_so150m2_|_xp_|_rpn_")
"""Those whose queries, keys and values have no bias."""

WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}

REGISTERS = {r"_reg(\d+)_": None, r"_radio_v3": 7, r"_radio_v4": 9, r"test_vit[24]": 1}
"""How many register tokens there are by the architecture's name; None: the number in it."""

ATTENTION_POOL = re.compile(r"_siglip_\d|_map_")

REFUSED = {
    re.compile(r"_rpn_"): "norms after each branch",
    re.compile(r"test_vit3"): "a pool that looks at the registers too",
}
"""What the tensors alone do not betray, by architecture."""

FOREIGN = re.compile(
    r"attn\.q_bias$|relative_position_bias_table|attn\.rel_pos_|\.rope\.|inner_attn_ln|ffn_ln|attn\.(inner_)?norm\.|"
    r"blocks_token_only|mlp_tokens|attns\.0|lambda_q1|norm1\.norm"
)
"""Tensors of other networks that have timm's names beside them: BEiT, EVA, CaiT, Mixer and more."""


def registers_of(architecture: str) -> int | None:
    """None where the name does not say."""
    for expression, count in REGISTERS.items():
        if match := re.search(expression, architecture):
            return int(match[1]) if count is None else count
    return None


def width_of(architecture: str) -> int | None:
    """None where the name does not say."""
    match = re.match(rf"(?:vit|deit3?|flexivit)_({'|'.join(WIDTHS)})(?!.*_plus_)", architecture)
    return WIDTHS[match[1]] if match else None


def gelu_of(architecture: str) -> Gelu:
    if "quickgelu" in architecture:
        return "quick"
    return "tanh" if TANH.search(architecture) else "erf"
