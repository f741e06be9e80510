"""Files that are whole as files, and not the model that they were: each is refused in one sentence where that can be known.

What bench/fuzz_weights.py finds by chance is held here by name.
"""

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FIXTURES, TOKEN, changed, random_model, shaken_model
from safetensors.torch import load_file, save_file

import vitrail
from vitrail.core.errors import UserError
from vitrail.core.types import Numerics
from vitrail.models.vit import ViTConfig
from vitrail.weights import big_vision, native, timm, torchvision
from vitrail.weights.formats import WRITABLE, writer
from vitrail.weights.load import inspect, load_backbone

SMALL = ViTConfig(24, 2, 3, 48, (8, 8), (32, 32), numerics=Numerics("erf", 1e-6, "bicubic-antialias"))
State = dict[str, torch.Tensor]


def refused(path: Path, said: str, **told: Any) -> None:
    with pytest.raises(UserError, match=said) as raised:
        load_backbone(path, **told)
    assert "\n" not in str(raised.value)


def altered(source: Path, place: Path, change: Callable[[State], Any], **config: Any) -> Path:
    """A safetensors file, or the folder that holds one, its tensors changed and its config's entries set (None: removed)."""
    folder = source.is_dir()
    file = source / "model.safetensors" if folder else source
    state = load_file(file)
    change(state)
    place = place if folder else place / "x.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, place / "model.safetensors" if folder else place
    )
    if folder:
        data = json.loads((source / "config.json").read_text()) | config
        (place / "config.json").write_text(
            json.dumps({name: value for name, value in data.items() if value is not None})
        )
    return place


def setting(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    return lambda state: state.update({name: change(state[name]).clone()})


def without(*parts: str) -> Callable[[State], None]:
    """Removes every tensor whose name has one of these in it."""

    def remove(state: State) -> None:
        for name in [name for name in state if any(part in name for part in parts)]:
            del state[name]

    return remove


# Shapes that would compute something


def test_a_patch_that_is_not_square_must_be_vouched_for(tmp_path: Path) -> None:
    cut = setting("patch_embed.proj.weight", lambda kernel: kernel[..., :6])
    path = altered(FIXTURES / "timm_plain.safetensors", tmp_path, cut)
    refused(path, "patches of 8 x 6 pixels, which no published model has: .*grid=ROWSxCOLUMNS", heads=3)
    assert load_backbone(path, heads=3, grid=(8, 8)).config.image == (64, 48)
    state = load_file(path)
    torch.save({name: tensor for name, tensor in state.items() if "head" not in name}, tmp_path / "dino.pth")
    refused(tmp_path / "dino.pth", "patches of 8 x 6 pixels", heads=3)
    kernel = np.load(TOKEN)["embedding/kernel"]
    refused(changed(tmp_path, **{"embedding/kernel": kernel[:4]}), "patches of 4 x 8 pixels")
    model = random_model(replace(SMALL, patch=(8, 4)))
    timm.write(model, tmp_path / "stated.safetensors")
    assert load_backbone(tmp_path / "stated.safetensors").config.patch == (8, 4)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("hf_clip_vision", "vision_model.embeddings.class_embedding"),
        ("hf_clip_vision", "vision_model.embeddings.position_embedding.weight"),
        ("hf_siglip_vision", "embeddings.position_embedding.weight"),
        ("hf_siglip_vision", "head.probe"),
        ("hf_vit", "vit.embeddings.cls_token"),
    ],
)
def test_an_axis_more_or_less_is_no_token(case: str, name: str, tmp_path: Path) -> None:
    for change in (lambda tensor: tensor[None], lambda tensor: tensor.flatten()[None, None, None]):
        refused(
            altered(FIXTURES / case, tmp_path, setting(name, change)), f"holds {name} of shape .* axes were expected"
        )


@pytest.mark.parametrize("case", ["hf_dinov2", "hf_dinov3"])
@pytest.mark.parametrize("shape", [(24,), (1, 23), (2, 24), (1, 1, 1, 24), ()])
def test_a_mask_token_that_is_not_used_has_its_shape(case: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    (name,) = (name for name in load_file(FIXTURES / case / "model.safetensors") if name.endswith("mask_token"))
    path = altered(FIXTURES / case, tmp_path, setting(name, lambda _: torch.zeros(shape)))
    refused(path, rf"holds {name} of shape .* where a row of \d+ numbers was expected")


@pytest.mark.parametrize("kind", [torch.int32, torch.bool])
def test_weights_are_floating_numbers(kind: torch.dtype, tmp_path: Path) -> None:
    """One among queries, keys and values would be joined with the others and pass for floating."""
    for name in ("vit.encoder.layer.1.attention.attention.key.bias", "classifier.weight"):
        path = altered(FIXTURES / "hf_vit", tmp_path, setting(name, lambda tensor: tensor.to(kind)))
        with pytest.raises(UserError, match=rf"holds {name} in {str(kind)[6:]}, where weights are floating"):
            vitrail.load(path)
    native.save(random_model(SMALL), tmp_path / "own.safetensors")
    content = (
        (tmp_path / "own.safetensors").read_bytes().replace(b'"dtype":"F32","shape":[5]', b'"dtype":"I32","shape":[5]')
    )
    (tmp_path / "own.safetensors").write_bytes(content)
    refused(tmp_path / "own.safetensors", "head.output.bias in int32")


# What the rest of the file says should be there


def folder(tmp_path: Path, config: ViTConfig = SMALL, **head: Any) -> Path:
    timm.write(random_model(config, **head), tmp_path / "whole")
    (tmp_path / "damaged").mkdir()
    return tmp_path / "whole"


@pytest.mark.parametrize(
    ("config", "head", "change", "said"),
    [
        ({}, {}, without("head.weight"), "says num_classes 5 in config.json, but its tensors have 0"),
        ({}, {}, without("head.weight", "head.bias"), "num_classes 5"),
        ({"class_token": False}, {"pool": "attention"}, without("attn_pool"), "'map'"),
        ({"registers": 4, "prefix_positions": False}, {}, without("reg_token"), "says reg_tokens 4"),
        ({}, {}, without("qkv.bias"), "says qkv_bias True"),
        ({"layer_scale": True}, {}, without("gamma"), "says init_values True"),
        ({"qk_norm": True}, {}, without("_norm."), "says qk_norm True"),
        ({}, {}, without("blocks.1."), "says depth 2"),
        ({"prefix_positions": False}, {}, without("cls_token"), "says class_token True"),
        ({}, {}, setting("pos_embed", lambda table: table[:, 1:]), "says no_embed_class False"),
        ({}, {}, setting("patch_embed.proj.weight", lambda kernel: kernel[..., :4, :4]), "do not fit the 8 x 8 patches"),
        ({}, {}, setting("patch_embed.proj.weight", lambda kernel: kernel[:, :2]), "says in_chans 3"),
    ],
)  # fmt: skip
def test_what_timms_config_states_must_be_there(
    config: dict[str, Any], head: dict[str, Any], change: Callable[[State], Any], said: str, tmp_path: Path
) -> None:
    whole = folder(tmp_path, replace(SMALL, **config), **head)
    assert load_backbone(altered(whole, tmp_path / "damaged", lambda state: None)).depth == 2
    refused(altered(whole, tmp_path / "damaged", change), said)
    # A bare file of Vitrail's says the same in its header.
    timm.write(random_model(replace(SMALL, **config), **head), tmp_path / "bare.safetensors")
    assert "its header" in load_backbone(tmp_path / "bare.safetensors").report.preprocess_source


def test_what_timms_architectures_are_by_name(tmp_path: Path) -> None:
    """Hub folders state no arguments where the name says them."""
    published = replace(SMALL, width=192, registers=4, prefix_positions=False)
    whole = folder(tmp_path, published)
    looks = json.loads((whole / "config.json").read_text())["pretrained_cfg"]
    name = {"architecture": "vit_tiny_patch8_reg4_x", "model_args": None, "pretrained_cfg": looks}
    damaged = tmp_path / "damaged"
    assert load_backbone(altered(whole, damaged, lambda state: None, **name), heads=3).config.registers == 4
    refused(altered(whole, damaged, without("reg_token"), **name), "says reg_tokens 4 in config.json")
    refused(altered(whole, damaged, without("qkv.bias"), **name), "says qkv_bias True in config.json")
    wrong = name | {"architecture": "vit_base_patch8_reg4_x"}
    refused(altered(whole, damaged, lambda state: None, **wrong), "of width 768 .* its tensors have 192, .*heads=")
    miil = name | {"architecture": "vit_tiny_patch16_224_miil_reg4_x"}
    assert not load_backbone(altered(whole, damaged, without("qkv.bias"), **miil)).config.qkv_bias
    refused(altered(whole, damaged, lambda state: None, architecture=None), "is timm's but names no architecture")
    map = name | {"architecture": "vit_tiny_patch16_siglip_256", "num_classes": 0, "global_pool": None}
    refused(altered(whole, damaged, without("reg_token"), **map), "pools by 'map'")


@pytest.mark.parametrize("registers", [False, True])
def test_what_every_dinov2_has_must_be_there(registers: bool, tmp_path: Path) -> None:
    config = replace(SMALL, layer_scale=True, registers=2 * registers)
    timm.write(random_model(config), tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    whole = {name: tensor for name, tensor in state.items() if not name.startswith(("head", "reg", "pos"))}
    whole |= {"mask_token": torch.zeros(1, 24), "pos_embed": torch.zeros(1, 17, 24)}
    whole |= {"register_tokens": state["reg_token"]} if registers else {}
    for ending, said in (
        ("", ""),
        ("qkv.bias", "lacks the tensor blocks.0.attn.qkv.bias"),
        ("ls1.gamma", "lacks the tensor blocks.0.ls1.gamma"),
        ("cls_token", "lacks the tensor cls_token"),
    ):
        kept = dict(whole)
        if ending:
            without(ending)(kept)
        torch.save(kept, tmp_path / "d.pth")
        if said:
            refused(tmp_path / "d.pth", said, heads=3)
        else:
            assert load_backbone(tmp_path / "d.pth", heads=3).config.registers == config.registers


def test_what_torchvision_and_the_official_code_always_have(tmp_path: Path) -> None:
    torchvision.write(
        random_model(replace(SMALL, numerics=Numerics("erf", 1e-6, "bicubic-aligned"))), tmp_path / "w.pth"
    )
    whole = torch.load(tmp_path / "w.pth")
    for change, said in (
        (without("in_proj_bias"), "lacks the tensor .*in_proj_bias"),
        (setting("conv_proj.weight", lambda kernel: kernel[:, :2]), "and 2 channels"),
    ):
        state = dict(whole)
        change(state)
        torch.save(state, tmp_path / "x.pth")
        refused(tmp_path / "x.pth", said, heads=3)
    old = {"Transformer/posembed_input/pos_embedding": None}
    refused(changed(tmp_path, **old), "lacks the tensor Transformer/posembed_input/pos_embedding")
    config = replace(SMALL, numerics=Numerics(), class_token=False, positions="sincos2d")
    big_vision.write(shaken_model(config, "mean"), tmp_path / "b.npz")
    assert load_backbone(tmp_path / "b.npz").config.positions == "sincos2d"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": 7}, "architectures 7"),
        ({"model_type": {}}, "without its config.json"),
        ({"num_attention_heads": True}, "True in place of a whole number"),
        ({"layer_norm_eps": 7}, "layer_norm_eps of 7"),
        ({"image_size": 64.5}, "64.5 in place of a whole number"),
    ],
)
def test_a_config_json_of_other_types_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    refused(altered(FIXTURES / "hf_vit", tmp_path, lambda state: None, **config), said)


# What a person may get wrong beside the file


@pytest.mark.unhooked
@pytest.mark.parametrize("source", [123, None, b"bytes", ["a.npz"], 1.5, Path, ""])
def test_what_is_no_path_is_one_sentence(source: Any) -> None:
    for load in (vitrail.load, vitrail.load_backbone):
        with pytest.raises(UserError, match="is no checkpoint: give a path, or an id"):
            load(source)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"heads": "3"}, "heads must be a whole number from 1, not '3'"),
        ({"heads": True}, "heads must be"),
        ({"grid": 4}, "grid must be a pair"),
        ({"grid": (4.0, 4.0)}, "grid must be a pair"),
        ({"image": 96}, r"image must be a pair of whole numbers from 1, as in \(12, 16\), not 96"),
        ({"image": (0, 96)}, "image must be a pair"),
        ({"dropout": "a"}, "dropout must be a number"),
        ({"drop_path": True}, "drop_path must be a number"),
        ({"preprocess": 5}, "preprocess must be a Preprocess or words"),
    ],
)
def test_options_of_other_types_are_one_sentence(told: dict[str, Any], said: str) -> None:
    for load in (vitrail.load, vitrail.load_backbone):
        with pytest.raises(UserError, match=said):
            load(TOKEN, **told)


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("pipe", "is neither a file nor a folder"),
        ("link", "there is no checkpoint .*: it is a link to what is not there"),
        ("empty", "holds no checkpoint"),
        ("x" * 5000, "cannot be read .File name too long"),
    ):
        refused(tmp_path / name, said)


@pytest.mark.skipif(os.getuid() == 0, reason="everything can be read by root")
def test_what_must_not_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(TOKEN.read_bytes())
    (tmp_path / "x.npz").chmod(0)
    refused(tmp_path / "x.npz", "cannot be read .Permission denied")
    tmp_path.chmod(0o300)
    refused(tmp_path, "cannot be read .Permission denied")
    tmp_path.chmod(0o700)


def test_a_size_beyond_all_memory_is_one_sentence() -> None:
    refused(TOKEN, "cannot be taken to 1600000 x 1600000 pixels", image=(1_600_000, 1_600_000))


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("place", ["x", "x.pth", "x.safetensors"])
def test_a_full_disk_is_one_sentence_in_every_format(name: str, place: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; Python ignores its signal."""
    if name == "hf" and place != "x":
        pytest.skip("folders alone")
    rule = {"timm": "bicubic-antialias", "hf": "bicubic", "torchvision": "bicubic-aligned"}.get(name, "zoom")
    numerics = Numerics("tanh" if rule == "zoom" else "erf", 1e-12 if name == "hf" else 1e-6, rule)  # type: ignore[arg-type]
    model = random_model(replace(SMALL, numerics=numerics))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="could not be written: File too large; nothing was there before"):
            writer(name).write(model, tmp_path / place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_the_architecture_is_read_aloud() -> None:
    said = {
        "official_hybrid.npz": "on a ResNet trunk of 1, 2 units",
        "official_hybridroot.npz": "on a ResNet root",
        "timm_dinov2like.safetensors": "registers 4, no prefix positions, layer scale",
        "hf_clip_vision": "pre norm, no final norm, no patch bias",
    }
    for case, words in said.items():
        found = inspect(FIXTURES / case, heads=3 if case.startswith("timm") else None).architecture
        assert words in found
        assert "Config" not in found
