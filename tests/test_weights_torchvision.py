"""torchvision's state dicts: read against its own recorded output, written back, refused where they must be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import FIXTURES, agree, random_model, recorded
from safetensors.torch import load_file, save_file

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights import torchvision
from vitrail.weights.load import load, load_backbone
from vitrail.weights.source import open_checkpoint

FILE = FIXTURES / "torchvision_vit.safetensors"
IMAGES, IO = recorded("torchvision_vit")
SMALL = ViTConfig(24, 2, 3, 40, (8, 8), (32, 32), numerics=Numerics("erf", 1e-6, "bicubic-aligned"))


def test_it_gives_what_torchvision_gave() -> None:
    model = load(FILE, heads=4)
    agree(model(IMAGES), IO["logits"])
    assert model.preprocess == Preprocess((64, 64), 73, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert model.report.preprocess_source.startswith("assumed")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_what_is_read_is_written_back_to_the_bit(name: str, tmp_path: Path) -> None:
    model = load(FILE, heads=4)
    (note,) = torchvision.write(model, tmp_path / name)
    assert "VisionTransformer(image_size=64, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48" in note
    written = torch.load(tmp_path / name) if name.endswith(".pth") else load_file(tmp_path / name)
    theirs = load_file(FILE)
    assert written.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(written[key], tensor), key
    again = load(tmp_path / name, heads=4 if name.endswith(".pth") else None)
    assert again.config == model.config
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_positions_are_resized_as_torchvision_does() -> None:
    """Its interpolate_embeddings: bicubic with the corners aligned."""
    table = load_file(FILE)["encoder.pos_embedding"][:, 1:].reshape(1, 8, 8, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(12, 12), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    model = load_backbone(FILE, heads=4, image=(96, 96))
    torch.testing.assert_close(model.position_embedding.grid.data, expected, rtol=0, atol=2e-5)


def test_a_pre_logits_layer_and_the_names_before_0_14(tmp_path: Path) -> None:
    state = {}
    for name, tensor in load_file(FILE).items():
        state[name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2")] = tensor
    generator = torch.Generator().manual_seed(0)
    state["heads.pre_logits.weight"] = torch.randn(12, 32, generator=generator)
    state["heads.pre_logits.bias"] = torch.randn(12, generator=generator)
    state["heads.head.weight"] = torch.randn(5, 12, generator=generator)
    torch.save({"model": state}, tmp_path / "old.pth")
    model = load(tmp_path / "old.pth", heads=4)
    pooled = model.backbone.features(IMAGES).prefix[:, 0]
    hidden = (pooled @ state["heads.pre_logits.weight"].T + state["heads.pre_logits.bias"]).tanh()
    expected = hidden @ state["heads.head.weight"].T + state["heads.head.bias"]
    torch.testing.assert_close(model(IMAGES), expected, rtol=0, atol=1e-5)
    torchvision.write(model, tmp_path / "new.safetensors")
    again = load(tmp_path / "new.safetensors")
    assert again.config == model.config
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_what_torchvision_must_be_told_is_kept_in_the_header(tmp_path: Path) -> None:
    model = random_model(replace(SMALL, numerics=replace(SMALL.numerics, norm_epsilon=1e-12)))
    model.preprocess = Preprocess((32, 32), 40, "lanczos")
    notes = torchvision.write(model, tmp_path / "model.safetensors")
    assert "norm_layer=partial(torch.nn.LayerNorm, eps=1e-12)" in notes[-1]
    again = load(tmp_path / "model.safetensors")
    assert (again.config, again.preprocess) == (model.config, model.preprocess)
    with pytest.raises(UserError, match="norm epsilon of 1e-12"):
        torchvision.write(model, tmp_path / "model.pth")
    save_file(load_file(FILE), tmp_path / "damaged.safetensors", {"torchvision": "{"})
    with pytest.raises(UserError, match="damaged header"):
        load(tmp_path / "damaged.safetensors")


@pytest.mark.parametrize(
    "config", [replace(SMALL, positions="sincos2d"), replace(SMALL, patch_bias=False, prefix_positions=False)]
)
def test_what_is_folded_is_the_same_function(config: ViTConfig, tmp_path: Path) -> None:
    model = random_model(config)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert any("zeros" in note for note in torchvision.write(model, tmp_path / "model.safetensors"))
    torch.testing.assert_close(load(tmp_path / "model.safetensors")(images), model(images), rtol=0, atol=1e-5)


def test_a_backbone_alone(tmp_path: Path) -> None:
    backbone = random_model(SMALL).backbone
    notes = torchvision.write(backbone, tmp_path / "model.safetensors")
    assert any("no head" in note for note in notes)
    with pytest.raises(UserError, match="no head"):
        load(tmp_path / "model.safetensors")
    assert torch.equal(load_backbone(tmp_path / "model.safetensors").prefix, backbone.prefix)


@pytest.mark.parametrize(
    ("config", "head", "said"),
    [
        (replace(SMALL, numerics=Numerics("tanh", 1e-6)), {}, "the tanh GELU"),
        (replace(SMALL, feed_forward="swiglu"), {}, "SwiGLU"),
        (replace(SMALL, positions="none"), {}, "no positions"),
        (replace(SMALL, registers=1), {}, "other prefix tokens"),
        (replace(SMALL, image=(32, 64)), {}, "not square"),
        (replace(SMALL, channels=1), {}, "1 channels"),
        (SMALL, {"pool": "mean"}, "the pool 'mean'"),
        (SMALL, {"head_has_bias": False}, "without classes"),
    ],
)
def test_what_torchvision_cannot_hold_is_not_written(
    config: ViTConfig, head: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        torchvision.write(random_model(config, **head), tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()


def test_a_resnet_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ResNet"):
        torchvision.write(ClassifierConfig(ResNetConfig((1,), root_width=32), 3, "mean").build(), tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder.ln.bias": None}, "lacks the tensor encoder.ln.bias"),
        ({"encoder.layers.encoder_layer_1.self_attention.in_proj_weight": None}, "self_attention.in_proj_weight"),
        ({"heads.head.bias": None}, "lacks the tensor heads.head.bias"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight"),
        ({"conv_proj.conv_bn_relu_0.0.weight": torch.zeros(1)}, "stem of convolutions"),
        ({"encoder.ln.weight": torch.zeros(31)}, "encoder.ln.weight of shape"),
        ({"encoder.pos_embedding": torch.zeros(1, 64, 32)}, "64 positions, which fill no square"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(
    change: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    state = load_file(FILE) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "x.safetensors", heads=4)


def test_only_torchvisions_files_are_recognised() -> None:
    assert torchvision.recognises(open_checkpoint(FILE))
    for other in ("timm_plain.safetensors", "official_token.npz", "hf_vit"):
        assert not torchvision.recognises(open_checkpoint(FIXTURES / other))
