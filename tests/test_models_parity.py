"""The model against outputs of the official JAX code, big_vision and timm, on their own random weights.

Each tiny model was made so that a wrong GELU, norm epsilon, order or resampling moves the output by 7e-4 or more.
The names are mapped here by hand.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from vitrail.core.types import Numerics
from vitrail.layers.convolutions import Standardization
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import TrunkConfig
from vitrail.models.vit import ViTConfig

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-5
"""Of the largest value of the output."""


def agree(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def attention_names(there: dict[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    """Flax's (d, heads, e) kernels, transposed to (out, in)."""
    out: dict[str, np.ndarray] = {}
    for name in ("query", "key", "value"):
        kernel = there[f"{path}/{name}/kernel"]
        out[f"{name}.weight"] = kernel.reshape(kernel.shape[0], -1).T
        out[f"{name}.bias"] = there[f"{path}/{name}/bias"].reshape(-1)
    kernel = there[f"{path}/out/kernel"]
    out["output.weight"], out["output.bias"] = kernel.reshape(-1, kernel.shape[-1]).T, there[f"{path}/out/bias"]
    return out


def from_flax(there: dict[str, np.ndarray], config: ViTConfig) -> dict[str, np.ndarray]:
    """The official code's old names, or its new ones, which are big_vision's too, to ours."""
    old = any("MlpBlock_3" in name for name in there)
    attention = "MultiHeadDotProductAttention_1" if old else "MultiHeadDotProductAttention_0"
    mlp_norm, mlp = ("LayerNorm_2", "MlpBlock_3") if old else ("LayerNorm_1", "MlpBlock_0")
    grid = config.grid
    ours = {
        "backbone.patch_embedding.weight": there["embedding/kernel"].transpose(3, 2, 0, 1),
        "backbone.patch_embedding.bias": there["embedding/bias"],
    }

    def norm(our: str, their: str) -> None:
        ours[f"{our}.weight"], ours[f"{our}.bias"] = there[f"{their}/scale"], there[f"{their}/bias"]

    def dense(our: str, their: str) -> None:
        ours[f"{our}.weight"], ours[f"{our}.bias"] = there[f"{their}/kernel"].T, there[f"{their}/bias"]

    if "cls" in there:
        ours["backbone.prefix"] = there["cls"][0]
    position = there.get("Transformer/posembed_input/pos_embedding", there.get("pos_embedding"))
    if position is not None:
        prefixes = position.shape[1] - grid[0] * grid[1]
        if prefixes:
            ours["backbone.position_embedding.prefix"] = position[0, :prefixes]
        ours["backbone.position_embedding.grid"] = position[0, prefixes:].reshape(*grid, -1)
    for layer in range(config.depth):
        our, their = f"backbone.encoder.blocks.{layer}", f"Transformer/encoderblock_{layer}"
        norm(f"{our}.attention_norm", f"{their}/LayerNorm_0")
        norm(f"{our}.mlp_norm", f"{their}/{mlp_norm}")
        parts = attention_names(there, f"{their}/{attention}")
        for kind in ("weight", "bias"):
            ours[f"{our}.attention.qkv.{kind}"] = np.concatenate(
                [parts[f"{n}.{kind}"] for n in ("query", "key", "value")]
            )
            ours[f"{our}.attention.output.{kind}"] = parts[f"output.{kind}"]
        dense(f"{our}.mlp.hidden", f"{their}/{mlp}/Dense_0")
        dense(f"{our}.mlp.output", f"{their}/{mlp}/Dense_1")
    norm("backbone.encoder.norm", "Transformer/encoder_norm")
    if config.trunk is not None:
        ours["backbone.trunk.root.weight"] = there["conv_root/kernel"].transpose(3, 2, 0, 1)
        norm("backbone.trunk.root_norm", "gn_root")
        for name in [name for name in there if name.startswith("block") and name.endswith("/kernel")]:
            stage, unit, part = re.fullmatch(r"block(\d+)/unit(\d+)/conv_?(\w+)/kernel", name).groups()  # type: ignore[union-attr]
            our, their = f"backbone.trunk.stages.{int(stage) - 1}.{int(unit) - 1}", f"block{stage}/unit{unit}"
            conv, last = ("project", "project_norm") if part == "proj" else (f"conv{part}", f"norm{part}")
            ours[f"{our}.{conv}.weight"] = there[name].transpose(3, 2, 0, 1)
            norm(f"{our}.{last}", f"{their}/gn_proj" if part == "proj" else f"{their}/gn{part}")
    if "MAPHead_0/probe" in there:
        ours["pool.probe"] = there["MAPHead_0/probe"][0]
        parts = attention_names(there, "MAPHead_0/MultiHeadDotProductAttention_0")
        for kind in ("weight", "bias"):
            ours[f"pool.query.{kind}"] = parts[f"query.{kind}"]
            ours[f"pool.key_value.{kind}"] = np.concatenate([parts[f"{n}.{kind}"] for n in ("key", "value")])
            ours[f"pool.output.{kind}"] = parts[f"output.{kind}"]
        norm("pool.norm", "MAPHead_0/LayerNorm_0")
        dense("pool.mlp.hidden", "MAPHead_0/MlpBlock_0/Dense_0")
        dense("pool.mlp.output", "MAPHead_0/MlpBlock_0/Dense_1")
    if "pre_logits/kernel" in there:
        dense("head.hidden", "pre_logits")
    dense("head.output", "head")
    return ours


def vit(depth: int, heads: int, mlp: int, class_token: bool, positions: str = "learned") -> ViTConfig:
    return ViTConfig(24, depth, heads, mlp, (8, 8), (64, 64), 3, class_token, positions)  # type: ignore[arg-type]


HYBRID = replace(vit(2, 2, 40, True), patch=(1, 1), trunk=TrunkConfig((1, 2), width=32))


CASES = {
    "official_token": ClassifierConfig(vit(3, 3, 48, True), 11),
    "official_prelogits": ClassifierConfig(vit(2, 2, 64, True), 7, hidden=24),
    "bigvision_map": ClassifierConfig(vit(2, 3, 48, False), 7, "attention"),
    "bigvision_gap_sincos": ClassifierConfig(vit(2, 3, 40, False, "sincos2d"), 5, "mean", hidden=24),
    "official_hybrid": ClassifierConfig(HYBRID, 9),
    "official_hybridroot": ClassifierConfig(replace(HYBRID, patch=(8, 8), trunk=TrunkConfig((), width=32)), 9),
}


def model_of(case: str, **changes: object) -> Classifier:
    """changes: other fields of the backbone's config than the case has."""
    backbone = CASES[case].backbone
    assert isinstance(backbone, ViTConfig)
    config = replace(CASES[case], backbone=replace(backbone, **changes))  # type: ignore[arg-type]
    with np.load(FIXTURES / f"{case}.npz") as there:
        ours = from_flax(dict(there), backbone)
    model = config.build(device="meta")
    # A copy, because PyTorch reads an array's memory in row order alone.
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in ours.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_jax_codes(case: str) -> None:
    with np.load(FIXTURES / f"{case}_io.npz") as io:
        agree(model_of(case)(torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2)), io["logits"])


def test_logits_at_96_pixels_are_the_official_codes_with_the_table_zoomed() -> None:
    model = model_of("official_token")
    with np.load(FIXTURES / "official_token_96_io.npz") as io:
        images, logits = torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2), io["logits"]
    agree(model(images), logits)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("official_token", {"numerics": Numerics("erf")}),
        ("official_token", {"numerics": Numerics("quick")}),
        ("official_hybrid", {"trunk": replace(HYBRID.trunk, standardization=Standardization(1e-5, False, same=False))}),
        ("official_hybrid", {"trunk": replace(HYBRID.trunk, standardization=Standardization(1e-5, True, same=True))}),
    ],
)
def test_another_arithmetic_would_be_noticed(case: str, changes: dict[str, object]) -> None:
    model = model_of(case, **changes)
    with np.load(FIXTURES / f"{case}_io.npz") as io, pytest.raises(AssertionError):
        agree(model(torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2)), io["logits"])


def test_tokens_are_timms_on_a_picture_that_is_not_square() -> None:
    config = ViTConfig(24, 2, 3, 96, (8, 8), (48, 80), numerics=Numerics("erf", 1e-6, "bilinear"))
    there = load_file(FIXTURES / "timm_rect.safetensors")
    names = {"norm1": "attention_norm", "attn.qkv": "attention.qkv", "attn.proj": "attention.output"}
    names |= {"norm2": "mlp_norm", "mlp.fc1": "mlp.hidden", "mlp.fc2": "mlp.output"}
    ours = {"prefix": there["cls_token"][0], "position_embedding.prefix": there["pos_embed"][0, :1]}
    ours["position_embedding.grid"] = there["pos_embed"][0, 1:].reshape(6, 10, 24)
    for kind in ("weight", "bias"):
        ours[f"patch_embedding.{kind}"] = there[f"patch_embed.proj.{kind}"]
        ours[f"encoder.norm.{kind}"] = there[f"norm.{kind}"]
        for layer in range(2):
            for their, our in names.items():
                ours[f"encoder.blocks.{layer}.{our}.{kind}"] = there[f"blocks.{layer}.{their}.{kind}"]
    model = config.build(device="meta")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in ours.items()}, assign=True)
    with np.load(FIXTURES / "timm_rect_io.npz") as io:
        features = model.eval().features(torch.from_numpy(io["images_nchw"]))
        agree(torch.cat([features.prefix, features.tokens], dim=1), io["features"])
