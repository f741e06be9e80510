"""What later ViTs changed, against outputs of timm and Hugging Face's transformers on their own random weights.

Each tiny model was made so that a wrong epsilon, order or GELU moves the output by 7e-4 or more. The names are mapped here
by hand, by a table of words that both libraries' names are made of.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitrail.core.types import Features, Numerics
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-5
"""Of the largest value of the output."""

WORDS = (
    (r"^(vision_model|vit|dinov2)\.", ""),
    (r"^(encoder\.)?(layers?|blocks)\.", "encoder.blocks."),
    (r"\.(attn|attention\.attention|self_attn)\.", ".attention."),
    (r"\.attention\.(proj|out_proj|output\.dense|o_proj)\.", ".attention.output."),
    (r"\.attention\.([qkv])_proj\.", r".attention.\1."),
    (r"\.attention\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}."),
    (r"\.q_norm\.", ".query_norm."),
    (r"\.k_norm\.", ".key_norm."),
    (r"\.(norm1|layernorm_before|layer_norm1)\.", ".attention_norm."),
    (r"\.(norm2|layernorm_after|layer_norm2)\.", ".mlp_norm."),
    (r"\.(mlp\.fc1|intermediate\.dense|mlp\.up_proj)\.", ".mlp.hidden."),
    (r"\.(mlp\.fc2|output\.dense|mlp\.down_proj)\.", ".mlp.output."),
    (r"\.(ls1\.gamma|layer_scale1\.lambda1)$", ".attention_scale"),
    (r"\.(ls2\.gamma|layer_scale2\.lambda1)$", ".mlp_scale"),
    (r"^(norm|layernorm|post_layernorm)\.", "encoder.norm."),
    (r"^pre_layrnorm\.", "encoder.pre_norm."),
    (r"^(embeddings\.)?(patch_embed\.proj|patch_embeddings?(\.projection)?)\.", "patch_embedding."),
    (r"^(embeddings\.)?(cls_token|class_embedding)$", "prefix.0"),
    (r"^dist_token$", "prefix.1"),
    (r"^(embeddings\.)?(reg_token|register_tokens)$", "prefix.2"),
    (r"^(embeddings\.)?(pos_embed|position_embeddings?(\.weight)?)$", "positions"),
    (r"^fc_norm\.", "pool_norm."),
    (r"^(head|classifier|visual_projection)\.(weight|bias)$", r"head.output.\2"),
    (r"^(attn_pool|head)\.(attention\.output|proj)\.", "pool.output."),
    (r"^(attn_pool|head)\.(layernorm|norm)\.", "pool.norm."),
    (r"^(attn_pool|head)\.(latent|probe)$", "pool.probe"),
    (r"^(attn_pool|head)\.mlp\.", "pool.mlp."),
    (r"^attn_pool\.q\.", "pool.query."),
    (r"^attn_pool\.kv\.", "pool.key_value."),
)


def ours(there: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Their tensors by our names, for a backbone and what stands on it."""
    found: dict[str, Tensor] = {}
    for name, tensor in there.items():
        for pattern, new in WORDS:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    found.pop("embeddings.mask_token", None)
    prefix = [found.pop(name).reshape(-1, config.width) for name in sorted(found) if name.startswith("prefix.")]
    if prefix:
        found["prefix"] = torch.cat(prefix)
    if "positions" in found:
        rows = found.pop("positions").reshape(-1, config.width)
        count = config.placed_prefixes
        found["position_embedding.grid"] = rows[count:].reshape(*config.grid, -1)
        found |= {"position_embedding.prefix": rows[:count]} if count else {}
    for name in [name for name in found if ".attention.q.weight" in name]:
        stem = name.removesuffix("q.weight")
        for kind in ("weight", "bias"):
            # DINOv3's keys have no bias.
            parts = [found.pop(f"{stem}{word}.{kind}", torch.zeros(config.width)) for word in "qkv"]
            found[f"{stem}qkv.{kind}"] = torch.cat(parts)
    if "head.attention.in_proj_weight" in found:
        for kind in ("weight", "bias"):
            query, key, value = found.pop(f"head.attention.in_proj_{kind}").chunk(3)
            found |= {f"pool.query.{kind}": query, f"pool.key_value.{kind}": torch.cat([key, value])}
    if "pool.probe" in found:
        found["pool.probe"] = found["pool.probe"][0]
    if "head_dist.weight" in found:
        for kind in ("weight", "bias"):
            one, other = found[f"head.output.{kind}"], found.pop(f"head_dist.{kind}")
            found[f"head.output.{kind}"] = torch.cat([one, other], dim=1) / 2 if kind == "weight" else (one + other) / 2
    above = ("head.", "pool.", "pool_norm.")
    return {name if name.startswith(above) else f"backbone.{name}": tensor for name, tensor in found.items()}


TIMM = ViTConfig(24, 2, 3, 96, (8, 8), (64, 64), numerics=Numerics("erf", 1e-6, "bicubic-antialias"))
DINO = replace(TIMM, patch=(14, 14), image=(56, 56), layer_scale=True)
HUGGING = replace(TIMM, mlp=48)
QUICK = replace(HUGGING, numerics=Numerics("quick", 1e-5), pre_norm=True, patch_bias=False)
NO_CLASS = replace(TIMM, class_token=False)
SIGLIP = replace(NO_CLASS, mlp=48, numerics=Numerics("tanh", 1e-6))
REGISTERED = replace(DINO, mlp=72, registers=4)
DINO3 = ViTConfig(
    *(32, 2, 2, 48, (8, 8), (64, 64)),
    positions="rotary",
    layer_scale=True,
    registers=4,
    numerics=Numerics("erf", 1e-5),
)

CASES: dict[str, ClassifierConfig] = {
    "timm_plain": ClassifierConfig(replace(TIMM, depth=3), 5),
    "timm_avg": ClassifierConfig(replace(TIMM, final_norm=False), 5, "mean", pool_norm=True),
    "timm_qknorm": ClassifierConfig(replace(TIMM, qk_norm=True), 5),
    "timm_map": ClassifierConfig(NO_CLASS, 5, "attention"),
    "timm_swiglu": ClassifierConfig(replace(TIMM, layer_scale=True, feed_forward="swiglu", mlp=64), 5),
    "timm_dinov2like": ClassifierConfig(replace(DINO, registers=4, prefix_positions=False), 24, head="none"),
    "timm_distilled": ClassifierConfig(replace(TIMM, distillation_token=True), 5, "prefix"),
    "hf_vit": ClassifierConfig(replace(HUGGING, numerics=Numerics("erf", 1e-12)), 6),
    "hf_dinov2": ClassifierConfig(replace(DINO, mlp=72), 6, "class-mean"),
    "hf_dinov2_reg": ClassifierConfig(REGISTERED, 24, head="none", output="embedding"),
    "hf_dinov3": ClassifierConfig(DINO3, 32, head="none", output="embedding"),
    "hf_clip_vision": ClassifierConfig(QUICK, 20, head_has_bias=False, output="embedding"),
    "hf_siglip_vision": ClassifierConfig(SIGLIP, 24, "attention", head="none", output="embedding"),
}


def model_of(case: str) -> Classifier:
    config = CASES[case]
    assert isinstance(config.backbone, ViTConfig)
    file = FIXTURES / f"{case}.safetensors" if case.startswith("timm") else FIXTURES / case / "model.safetensors"
    model = config.build(device="meta")
    model.load_state_dict(ours(load_file(file), config.backbone), assign=True)
    return model.eval()


def agree(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def all_tokens(features: Features) -> Tensor:
    return torch.cat([features.prefix, features.tokens], dim=1)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_librarys(case: str) -> None:
    model = model_of(case)
    with np.load(FIXTURES / f"{case}_io.npz") as io:
        images = torch.from_numpy(io["images_nchw"])
        checked = 0
        for name in ("logits", "embeds", "pooled"):
            if name in io:
                agree(model(images), io[name])
                checked += 1
        # CLIP's own tokens are not normed, and timm's with a norm after pooling are.
        if "features" in io and case not in ("hf_clip_vision", "timm_avg"):
            agree(all_tokens(model.backbone.features(images)), io["features"])
            checked += 1
    assert checked
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.parameters()


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("hf_dinov3", {"rotary_base": 10_000.0}),
        ("hf_dinov3", {"positions": "none"}),
        ("hf_vit", {"numerics": Numerics("erf", 1e-6)}),
        ("hf_clip_vision", {"numerics": Numerics("erf", 1e-5)}),
    ],
)
def test_another_reading_of_a_config_would_be_noticed(case: str, changes: dict[str, object]) -> None:
    model = model_of(case)
    other = replace(model.config, backbone=replace(model.config.backbone, **changes)).build()
    other.load_state_dict(model.state_dict())
    with np.load(FIXTURES / f"{case}_io.npz") as io:
        images = torch.from_numpy(io["images_nchw"])
    assert (other.eval()(images) - model(images)).abs().max() > 10 * TOLERANCE * model(images).abs().max()
