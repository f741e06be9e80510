"""Which format a checkpoint has; and what it is, where it is one that is known and not read."""

import importlib
import re
from typing import Any

from vitrail.core.errors import UserError
from vitrail.weights.conversion import Format, Writer
from vitrail.weights.source import Checkpoint

FORMATS = {
    "npz": ("big_vision", "official", "bit"),
    "safetensors": ("native", "huggingface", "timm", "torchvision", "torch_hub"),
    "torch": ("huggingface", "timm", "torchvision", "torch_hub"),
}
"""Modules of this room by what they come in, each imported when it is asked for; those that a config names come first."""

WRITABLE = {
    "vitrail": "native",
    "official": "official",
    "big-vision": "big_vision",
    "timm": "timm",
    "hf": "huggingface",
    "torchvision": "torchvision",
}
"""What `vitrail convert --to` may name."""

FAMILIES = {
    r"(^|\.)layers\.\d+\.(blocks|residual_group)\..*relative_position_bias_table|(^|\.)swin(v2)?\.": "a Swin Transformer",
    r"relative_position_bias_table|attn\.q_bias$|(^|\.)beit3?\.": "a BEiT",
    r"mlp_tokens|token_mixing|MixerBlock_": "an MLP-Mixer",
    r"inner_attn_ln|blocks\.\d+\.mlp\.ffn_ln|(^|\.)rope\.freqs|(^|\.)eva\.": "an EVA",
    r"stages\.\d+\..*(dwconv|conv_dw)|(^|\.)convnext(v2)?\.": "a ConvNeXt",
    r"^(module\.)?(encoder_q\.|backbone\.)?layer1\.0\.conv1\.weight": "a ResNet of torchvision's kind",
    r"blocks_token_only": "a CaiT",
    r"visual\.transformer\.resblocks": "a CLIP in OpenAI's names",
    r"image_encoder\.blocks\.\d+\.attn\.rel_pos_h": "a Segment Anything model",
    r"bbox_embed|class_labels_classifier": "a detector (DETR, YOLOS)",
    r"to_patch_embedding": "a ViT of lucidrains/vit-pytorch",
    r"lora_[AB]\.": "a LoRA adapter without its model",
    r"text_model\.encoder\.layers": "a text tower",
    r"(^|\.)(self_attn\.q_proj|h\.\d+\.attn\.c_attn)\.|(^|\.)bert\.": "a language model",
    r"(down|up)_blocks\.\d+\.": "a diffusion model",
    r"conv_stem|features\.\d+\.0\.(weight|conv)": "a convolutional network",
}
"""Searched for in the tensors' names, the more particular first."""


def writer(name: str) -> Writer:
    """Raises UserError where `name` is none of WRITABLE."""
    if name not in WRITABLE:
        raise UserError(f"--to {name} is no format that can be written: give one of {', '.join(WRITABLE)}")
    module: Any = importlib.import_module(f"vitrail.weights.{WRITABLE[name]}")
    return module


def identify(checkpoint: Checkpoint) -> Format:
    """Raises UserError, naming the family where it is a known one, for what no format recognises."""
    for name in FORMATS[checkpoint.container]:
        format: Any = importlib.import_module(f"vitrail.weights.{name}")
        if format.recognises(checkpoint):
            found: Format = format
            return found
    config = checkpoint.config or {}
    stated = config.get("model_type") or config.get("architecture")
    what, why = f"a {stated!r} model", "its config.json says so"
    for pattern, family in FAMILIES.items():
        seen = next((name for name in checkpoint.names if re.search(pattern, name)), None)
        if seen is not None:
            what = family + (f" ({stated!r})" if stated else "")
            why = f"its tensor {seen} shows it"
            break
    else:
        if not stated:
            some = ", ".join(checkpoint.names[:3])
            raise UserError(
                f"{checkpoint.path} holds no model that is known here (first tensors: {some}): give a ViT of "
                f"{', '.join(FORMATS[checkpoint.container])}"
            )
    raise UserError(
        f"{checkpoint.path} is {what}, which is not read ({why}): give a plain ViT, a hybrid or a BiT ResNet"
    )
