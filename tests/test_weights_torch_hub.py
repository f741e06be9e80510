"""DINO's, DINOv2's, DeiT's, MAE's and MoCo v3's own files.

Their code is timm's, whose recorded outputs therefore hold for it: the same tensors in each of the authors' wrappers.
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import FIXTURES, agree, recorded, tokens
from safetensors.torch import load_file

from vitrail.core.errors import UserError
from vitrail.models.masked import MAEDecoderConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights import timm, torch_hub
from vitrail.weights.load import load, load_backbone, read
from vitrail.weights.source import open_checkpoint

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def state_of(case: str, head: bool = False) -> dict[str, torch.Tensor]:
    state = load_file(FIXTURES / f"timm_{case}.safetensors")
    return {name: tensor for name, tensor in state.items() if head or not name.startswith("head")}


def under(prefix: str, state: dict[str, torch.Tensor], shift: float = 0.0) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor + shift for name, tensor in state.items()}


def save(content: Any, tmp_path: Path) -> Path:
    torch.save(content, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def check_features(model: ViT, case: str) -> None:
    images, theirs = recorded(f"timm_{case}")
    agree(tokens(model, images), theirs["features"])


def check_logits(path: Path, case: str) -> None:
    images, theirs = recorded(f"timm_{case}")
    agree(load(path, heads=3)(images), theirs["logits"])


def dinov2(registers: bool = True) -> dict[str, torch.Tensor]:
    """The fixture that is like a DINOv2, as DINOv2 names it: with a row for the class token, and a mask token."""
    state = state_of("dinov2like")
    token, more = state.pop("cls_token"), state.pop("reg_token")
    row = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(0))
    state |= {"cls_token": token - row, "pos_embed": torch.cat([row, state["pos_embed"]], dim=1)}
    return state | {"mask_token": torch.zeros(1, 24)} | ({"register_tokens": more} if registers else {})


def test_dino_backbone(tmp_path: Path) -> None:
    path = save(state_of("plain"), tmp_path)
    model = load_backbone(path, heads=3)
    check_features(model, "plain")
    assert model.config.numerics.resample == "bicubic-offset"
    assert (model.preprocess.mean, model.preprocess.deviation) == IMAGENET
    assert (model.preprocess.resize, model.preprocess.interpolation) == (73, "bicubic")
    assert any("DINO" in note for note in model.report.notes)
    with pytest.raises(UserError, match="no head"):
        load(path, heads=3)


def test_dino_training_file_gives_the_teacher(tmp_path: Path) -> None:
    teacher = under("backbone.", state_of("plain")) | {"head.mlp.0.weight": torch.ones(4, 24)}
    student = under("module.backbone.", state_of("plain"), 1.0) | {"module.head.last_layer.weight_g": torch.ones(9, 1)}
    path = save(
        {
            "student": student,
            "teacher": teacher,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 9)},
            "epoch": 3,
        },
        tmp_path,
    )
    model = load_backbone(path, heads=3)
    check_features(model, "plain")
    left = dict(model.report.left_out)
    assert {"student.*", "teacher.*", "optimizer.*", "dino_loss.*"} <= left.keys()
    assert "projector" in left["teacher.*"]


def test_positions_are_resized_as_dino_does(tmp_path: Path) -> None:
    """By a scale that is a tenth of a cell too large, which moves what is read: its own code, written anew."""
    state = state_of("plain")
    model = load_backbone(save(state, tmp_path), heads=3, image=(48, 80))
    table = state["pos_embed"][:, 1:].reshape(1, 8, 8, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(table, scale_factor=(6.1 / 8, 10.1 / 8), mode="bicubic")[0].permute(1, 2, 0)
    torch.testing.assert_close(model.position_embedding.grid.data, expected, rtol=0, atol=1e-5)


def test_dinov2_with_registers(tmp_path: Path) -> None:
    model = load_backbone(save(dinov2(), tmp_path), heads=3)
    check_features(model, "dinov2like")
    assert (model.config.registers, model.config.layer_scale) == (4, True)
    assert model.config.numerics.resample == "bicubic-antialias"
    assert "mask_token" in dict(model.report.left_out)


def test_dinov2_teacher_in_chunks(tmp_path: Path) -> None:
    chunked = {name.replace("blocks.", f"blocks.{name.split('.')[1]}.", 1) if "blocks" in name else name: tensor
               for name, tensor in dinov2().items()}  # fmt: skip
    assert "blocks.1.1.norm1.weight" in chunked
    heads = {"dino_head.mlp.0.weight": torch.ones(4, 24), "ibot_head.mlp.0.weight": torch.ones(4, 24)}
    model = load_backbone(save({"teacher": under("backbone.", chunked) | heads}, tmp_path), heads=3)
    check_features(model, "dinov2like")


def test_dinov2_swiglu_and_its_offset(tmp_path: Path) -> None:
    """The giant: SwiGLU under its own names; without registers, the rule with the tenth."""
    state = {}
    for name, tensor in state_of("swiglu").items():
        state[name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")] = tensor
    model = load_backbone(save(state | {"mask_token": torch.zeros(1, 24)}, tmp_path), heads=3)
    check_features(model, "swiglu")
    assert (model.config.feed_forward, model.config.numerics.resample) == ("swiglu", "bicubic-offset")


def test_dinov2_looks_at_224_pixels(tmp_path: Path) -> None:
    """Its table is for 518, its authors evaluate at 224."""
    small = ViTConfig(64, 1, 1, 64, (14, 14), (518, 518), registers=2, layer_scale=True).build()
    timm.write(small, tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    state["register_tokens"], state["pos_embed"] = state.pop("reg_token"), torch.zeros(1, 1 + 37 * 37, 64)
    model = load_backbone(save(state | {"mask_token": torch.zeros(1, 64)}, tmp_path))
    assert model.config.image == (518, 518)
    assert (model.preprocess.size, model.preprocess.resize) == ((224, 224), 256)


@pytest.mark.parametrize("case", ["plain", "distilled"])
def test_deit(case: str, tmp_path: Path) -> None:
    path = save({"model": state_of(case, head=True)}, tmp_path)
    check_logits(path, case)
    assert any("DeiT" in note for note in load(path, heads=3).report.notes)


def test_deit_3_layer_scale(tmp_path: Path) -> None:
    state = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
             for name, tensor in state_of("swiglu", head=True).items()}  # fmt: skip
    check_logits(save({"model": state}, tmp_path), "swiglu")


def test_mae_fine_tuned_by_the_mean(tmp_path: Path) -> None:
    path = save({"model": state_of("avg", head=True), "epoch": 99}, tmp_path)
    check_logits(path, "avg")
    assert any("MAE" in note for note in load(path, heads=3).report.notes)


def test_mae_with_its_decoder(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def block(width: int, mlp: int) -> dict[str, torch.Tensor]:
        shapes = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,)}
        shapes |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
        weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return weights | {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}

    decoder = under("decoder_blocks.0.", block(16, 32)) | under("decoder_blocks.1.", block(16, 32))
    for name, shape in {"decoder_embed": (16, 24), "decoder_norm": (16,), "decoder_pred": (192, 16)}.items():
        decoder |= {f"{name}.weight": torch.ones(shape), f"{name}.bias": torch.ones(shape[0])}
    decoder |= {"mask_token": torch.ones(1, 1, 16), "decoder_pos_embed": torch.randn(1, 65, 16, generator=generator)}
    given = read(save({"model": state_of("plain") | decoder}, tmp_path), heads=3)
    model = load_backbone(tmp_path / "checkpoint.pth", heads=3)
    check_features(model, "plain")
    made = MAEDecoderConfig(model.config, width=16, depth=2, heads=2, mlp=32).build(device="meta")
    made.load_state_dict(given.converted.extra, assign=True)
    assert torch.equal(made.encoder.blocks[1].attention.qkv.weight, decoder["decoder_blocks.1.attn.qkv.weight"])
    assert torch.equal(made.position_embedding.grid.flatten(0, 1), decoder["decoder_pos_embed"][0, 1:])
    assert any("width 16, depth 2" in note for note in given.report.notes)


def test_moco_gives_the_base_encoder(tmp_path: Path) -> None:
    base = under("module.base_encoder.", state_of("plain") | {"head.0.weight": torch.ones(8, 24)})
    other = under("module.momentum_encoder.", state_of("plain") | {"head.0.weight": torch.ones(8, 24)}, 1.0)
    predictor = {"module.predictor.0.weight": torch.ones(2, 2)}
    path = save({"epoch": 300, "arch": "vit_base", "state_dict": base | other | predictor}, tmp_path)
    model = load_backbone(path, heads=3)
    check_features(model, "plain")
    left = dict(model.report.left_out)
    assert "projector" in left["state_dict.module.base_encoder.head.*"]
    assert model.preprocess.interpolation == "bilinear"


def test_mocos_small_vit_has_twelve_heads(tmp_path: Path) -> None:
    timm.write(ViTConfig(384, 1, 12, 64, (8, 8), (16, 16)).build(), tmp_path / "x.safetensors")
    state = under("module.base_encoder.", load_file(tmp_path / "x.safetensors"))
    found = load_backbone(save({"state_dict": state}, tmp_path))
    assert found.config.heads == 12
    assert any("12 heads" in note for note in found.report.notes)
    assert load_backbone(tmp_path / "checkpoint.pth", heads=6).config.heads == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.2.mlp.fc2.weight": None}, r"teacher\.backbone\.blocks\.2\.mlp\.fc2\.weight"),
        ({"norm.bias": None}, r"teacher\.backbone\.norm\.bias"),
        ({"extra.weight": torch.ones(3)}, r"teacher\.backbone\.extra\.weight"),
        ({"pos_embed": torch.ones(1, 64, 25)}, "pos_embed of shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(
    change: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    state = {name: tensor for name, tensor in (state_of("plain") | change).items() if tensor is not None}
    with pytest.raises(UserError, match=said):
        load_backbone(save({"teacher": under("backbone.", state)}, tmp_path), heads=3)


def test_only_their_files_are_recognised(tmp_path: Path) -> None:
    assert torch_hub.recognises(open_checkpoint(save(state_of("plain"), tmp_path)))
    for other in ("torchvision_vit.safetensors", "official_token.npz", "hf_vit"):
        assert not torch_hub.recognises(open_checkpoint(FIXTURES / other))
