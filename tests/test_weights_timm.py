"""timm's files: read against its own outputs, written back, refused where they must be.

timm cannot be installed beside a torch without torchvision, so all of its outputs are recorded, by timm 1.0.31: for whole
files in fixtures/timm_*.safetensors, and in fixtures/timm_drawn.json for models whose weights are drawn from a seed here.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FIXTURES, agree, pictures, random_model
from safetensors.torch import load_file, save_file

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import ResNetConfig, TrunkConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights import timm
from vitrail.weights.load import load, load_backbone
from vitrail.weights.source import open_checkpoint
from vitrail.weights.timm_names import TRUNK_EPSILON, TRUNK_STANDARDIZATION
from vitrail.weights.zoo import VARIANTS

CASES = ("plain", "avg", "rect", "qknorm", "map", "swiglu", "dinov2like", "distilled")
DRAWN: dict[str, dict[str, Any]] = json.loads((FIXTURES / "timm_drawn.json").read_text())
SMALL = ViTConfig(24, 2, 3, 40, (8, 8), (32, 32), numerics=Numerics("erf", 1e-6, "bicubic-antialias"))
NANO = (*(getattr(VARIANTS["Nano"], name) for name in ("width", "depth", "mlp", "heads")), "ViT-Nano")
TIMMS_TRUNK = TrunkConfig((), 64, TRUNK_EPSILON, TRUNK_STANDARDIZATION)


def state_of(case: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"timm_{case}.safetensors")


def told(case: str) -> dict[str, Any]:
    """What the bare file cannot say."""
    return {"heads": 3} | ({"grid": (6, 10)} if case == "rect" else {})


def draw(case: str) -> dict[str, torch.Tensor]:
    """The weights that the recorded output is of."""
    rng, tensors = np.random.default_rng(DRAWN[case]["seed"]), {}
    for name, shape in DRAWN[case]["names"]:
        numbers = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("weight") and len(shape) == 1:
            numbers = 1 + 0.3 * numbers
        elif len(shape) > 1 and "pos_embed" not in name and "token" not in name:
            numbers = numbers * (2.0 / np.prod(shape[1:])) ** 0.5
        else:
            numbers = 0.3 * numbers
        tensors[name] = torch.from_numpy(np.asarray(numbers, np.float32))
    return tensors


def drawn_folder(case: str, folder: Path) -> Path:
    save_file(draw(case), folder / "model.safetensors")
    if DRAWN[case]["config"] is not None:
        (folder / "config.json").write_text(json.dumps(DRAWN[case]["config"]))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_bare_files_give_what_timm_gave(case: str) -> None:
    io = np.load(FIXTURES / f"timm_{case}_io.npz")
    images = torch.from_numpy(io["images_nchw"])
    backbone = load_backbone(FIXTURES / f"timm_{case}.safetensors", **told(case))
    features = backbone.features(images)
    agree(torch.cat([features.prefix, features.tokens], dim=1), io["features"])
    assert backbone.config.numerics == SMALL.numerics
    if case == "dinov2like":
        agree(features.prefix[:, 0], io["logits"])
        with pytest.raises(UserError, match="no head"):
            load(FIXTURES / f"timm_{case}.safetensors", **told(case))
    else:
        agree(load(FIXTURES / f"timm_{case}.safetensors", **told(case))(images), io["logits"])


@pytest.mark.parametrize("case", DRAWN)
def test_drawn_models_give_what_timm_gave(case: str, tmp_path: Path) -> None:
    said = DRAWN[case]["config"] is not None
    size = tuple(DRAWN[case]["size"])
    model = load(
        drawn_folder(case, tmp_path),
        heads=None if said else 3,
        image=size if case == "resized" else None,
    )
    images = np.random.default_rng(100 + DRAWN[case]["seed"]).standard_normal((2, 3, *size)).astype(np.float32)
    agree(model(torch.from_numpy(images)), np.array(DRAWN[case]["output"]))


def test_a_folder_says_its_preprocessing_labels_and_numerics(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    clip = load(drawn_folder("clip", tmp_path / "clip"))
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert clip.preprocess == Preprocess((32, 32), 35, "bicubic", mean, deviation)
    assert clip.report.preprocess_source == "stated in config.json"
    assert (clip.config.backbone.numerics.gelu, clip.config.backbone.numerics.norm_epsilon) == ("quick", 1e-5)
    (tmp_path / "labelled").mkdir()
    labelled = load(drawn_folder("labelled", tmp_path / "labelled"))
    assert labelled.labels == ("tench", "goldfish", "shark", "ray", "cock")
    assert labelled.config.backbone.grid == (2, 5)


def test_a_folder_of_before_2023_says_its_preprocessing_at_the_root(tmp_path: Path) -> None:
    save_file(state_of("plain"), tmp_path / "model.safetensors")
    looks = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64], "crop_pct": 1.0}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "interpolation": "bilinear", **looks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path, heads=3)
    assert model.preprocess == Preprocess((64, 64), 64, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_bare_files_say_aloud_what_was_assumed() -> None:
    plain = load(FIXTURES / "timm_plain.safetensors", heads=3).report
    assert plain.preprocess_source.startswith("assumed")
    assert plain.preprocess == Preprocess((64, 64), 71, "bicubic")
    assert any("square grid of 8 x 8" in note for note in plain.notes)
    assert any("class token" in note for note in plain.notes)
    distilled = load(FIXTURES / "timm_distilled.safetensors", heads=3).report
    assert distilled.preprocess.mean == (0.485, 0.456, 0.406)
    assert any("halves" in sentence for sentence in distilled.folded)


def test_patches_that_do_not_fill_the_picture(tmp_path: Path) -> None:
    """As SigLIP's 384 pixels in patches of 14: timm looks at the first pixels that patches fill, here the middle ones."""
    save_file(draw("gap"), tmp_path / "model.safetensors")
    config = json.loads(json.dumps(DRAWN["gap"]["config"]))
    config["model_args"]["img_size"] = config["pretrained_cfg"]["input_size"][1:] = [37, 37]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert (model.preprocess.size, model.preprocess.resize) == ((32, 32), 38)
    assert model.config.backbone.image == (32, 32)
    assert any("patches do not fill pictures of 37 x 37" in note for note in model.report.notes)


def load_written(model: ViT, folder: Path) -> dict[str, torch.Tensor]:
    """A backbone's tensors in timm's names."""
    timm.write(model, folder / "written.safetensors")
    return load_file(folder / "written.safetensors")


def test_heads_are_stated_known_or_64_numbers_wide(tmp_path: Path) -> None:
    plain = FIXTURES / "timm_plain.safetensors"
    with pytest.raises(UserError, match=r"width of 24.*heads="):
        load(plain)
    with pytest.raises(UserError, match="does not divide into 5"):
        load(plain, heads=5)
    assert load(plain, heads=4).config.backbone.heads == 4
    for width, depth, mlp, heads, said in ((128, 1, 64, 2, "of 64 numbers each"), NANO):
        small = ViTConfig(width, depth, heads, mlp, (8, 8), (16, 16), numerics=SMALL.numerics).build()
        torch.save(load_written(small, tmp_path), tmp_path / "small.pth")
        found = load_backbone(tmp_path / "small.pth")
        assert found.config.heads == heads
        assert any(said in note for note in found.report.notes)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "folder"])
def test_what_is_read_is_written_back_to_the_bit(case: str, name: str, tmp_path: Path) -> None:
    headless = case == "dinov2like"
    read = load_backbone if headless else load
    model = read(FIXTURES / f"timm_{case}.safetensors", **told(case))
    notes = timm.write(model, tmp_path / name)
    images = pictures(model.config if headless else model.config.backbone)
    again = read(tmp_path / name, **(told(case) if name.endswith(".pth") else {}))
    assert again.config == model.config
    assert again.preprocess == model.preprocess or name.endswith(".pth") or case == "rect"
    if not headless:
        assert torch.equal(again(images), model(images))
    written = torch.load(tmp_path / name) if name.endswith(".pth") else None
    written = written or load_file(tmp_path / name / "model.safetensors" if name == "folder" else tmp_path / name)
    theirs = state_of(case)
    assert written.keys() == theirs.keys()
    # Two biases whose mean is the output cannot be told apart again; both become that mean.
    folded = {"head.bias", "head_dist.bias"} if case == "distilled" else set()
    assert {key for key, tensor in theirs.items() if not torch.equal(tensor, written[key])} == folded
    assert bool(folded) == any("both have its bias" in note for note in notes)


WRITTEN: dict[str, tuple[ViTConfig, dict[str, Any]]] = {
    "Flax numerics": (replace(SMALL, numerics=Numerics()), {}),
    "mean, no class token": (replace(SMALL, class_token=False), {"pool": "mean"}),
    "mean beside a class token": (SMALL, {"pool": "mean"}),
    "attention": (replace(SMALL, class_token=False), {"pool": "attention"}),
    "embedding": (SMALL, {"pool": "attention", "head": "none", "output": "embedding", "classes": 24}),
    "placed registers": (replace(SMALL, registers=3), {}),
    "nothing placed": (replace(SMALL, registers=3, prefix_positions=False), {}),
    "LayerScale and qk norm": (replace(SMALL, layer_scale=True, qk_norm=True), {}),
    "SwiGLU": (replace(SMALL, feed_forward="swiglu", mlp=32), {}),
    "CLIP": (replace(SMALL, pre_norm=True, patch_bias=False, numerics=Numerics("quick", 1e-5)), {}),
    "norm after the pool": (replace(SMALL, final_norm=False), {"pool": "mean", "pool_norm": True}),
    "no norm": (replace(SMALL, final_norm=False), {}),
    "no positions": (replace(SMALL, positions="none"), {}),
    "other shapes": (replace(SMALL, image=(16, 48), patch=(8, 16), channels=2, mlp=41), {}),
    "two heads": (replace(SMALL, distillation_token=True), {"pool": "prefix"}),
    "root": (replace(SMALL, trunk=TIMMS_TRUNK, patch=(2, 2)), {}),
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_what_is_written_is_read_back_the_same(case: str, name: str, tmp_path: Path) -> None:
    config, head = WRITTEN[case]
    model = random_model(config, **head)
    timm.write(model, tmp_path / name)
    again = load(tmp_path / name)
    resampled = replace(config, numerics=replace(config.numerics, resample="bicubic-antialias"))
    assert again.config == replace(model.config, backbone=resampled)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


FOLDED: dict[str, tuple[ViTConfig, dict[str, Any], str]] = {
    "sin-cos": (replace(SMALL, positions="sincos2d"), {}, "written as a table"),
    "two tables": (replace(SMALL, positions="learned2d"), {}, "written as a table"),
    "no biases": (replace(SMALL, qkv_bias=False, patch_bias=False), {"head_has_bias": False}, "it is zeros"),
    "class head of two tokens": (replace(SMALL, distillation_token=True), {"pool": "class"}, "twice ours"),
}


@pytest.mark.parametrize("case", FOLDED)
def test_what_is_folded_is_the_same_function_and_said(case: str, tmp_path: Path) -> None:
    config, head, said = FOLDED[case]
    model = random_model(config, **head)
    assert any(said in note for note in timm.write(model, tmp_path / "folder"))
    images = pictures(config)
    agree(load(tmp_path / "folder")(images), model(images).detach().numpy())


def test_the_folder_tells_timm_what_model_it_is(tmp_path: Path) -> None:
    model = random_model(replace(SMALL, numerics=Numerics("tanh", 1e-5), layer_scale=True, registers=2))
    model.preprocess = Preprocess((32, 32), (38, 38), "lanczos", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model.labels = ("a", "b", "c", "d", "e")
    notes = timm.write(model, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    # The only architectures with that epsilon; all that else sets them apart is said.
    assert data["architecture"] == "vit_base_patch32_clip_224"
    assert data["num_classes"] == data["pretrained_cfg"]["num_classes"] == 5
    expected = {
        "img_size": [32, 32],
        "patch_size": [8, 8],
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "reg_tokens": 2,
    }
    expected |= {"act_layer": "gelu_tanh", "pre_norm": False, "init_values": 1e-5, "no_embed_class": False}
    assert data["model_args"].items() >= expected.items()
    assert int(24 * data["model_args"]["mlp_ratio"]) == 40
    assert data["label_names"] == ["a", "b", "c", "d", "e"]
    looks = data["pretrained_cfg"]
    assert (looks["crop_mode"], int(32 / looks["crop_pct"]), looks["mean"]) == ("squash", 38, [0.1, 0.2, 0.3])
    assert any("bicubic-antialias, not by zoom" in note for note in notes)
    again = load(tmp_path)
    assert (again.preprocess, again.labels) == (model.preprocess, model.labels)


def test_a_pre_logits_layer_is_kept(tmp_path: Path) -> None:
    state = state_of("plain")
    generator = torch.Generator().manual_seed(0)
    state["pre_logits.fc.weight"] = torch.randn(24, 24, generator=generator)
    state["pre_logits.fc.bias"] = torch.randn(24, generator=generator)
    torch.save(state, tmp_path / "old.pth")
    model = load(tmp_path / "old.pth", heads=3)
    images = pictures(model.config.backbone)
    pooled = model.backbone.features(images).prefix[:, 0]
    hidden = (pooled @ state["pre_logits.fc.weight"].T + state["pre_logits.fc.bias"]).tanh()
    agree(model(images), (hidden @ state["head.weight"].T + state["head.bias"]).detach().numpy())
    with pytest.raises(UserError, match="hidden layer in the head is no VisionTransformer of timm"):
        timm.write(model, tmp_path / "folder")


def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path: Path) -> None:
    state = state_of("plain")
    last = {f"module.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save({"epoch": 3, "state_dict": last, "state_dict_ema": state, "arch": "vit"}, tmp_path / "run.pth.tar")
    model = load(tmp_path / "run.pth.tar", heads=3)
    assert torch.equal(model.head.output.bias, state["head.bias"])
    assert "another copy" in dict(model.report.left_out)["state_dict.*"]


def test_a_head_of_zeros_is_no_head(tmp_path: Path) -> None:
    state = state_of("plain")
    save_file(state | {"head.weight": torch.zeros_like(state["head.weight"])}, tmp_path / "zeros.safetensors")
    with pytest.raises(UserError, match="zeros"):
        load(tmp_path / "zeros.safetensors", heads=3)
    assert load_backbone(tmp_path / "zeros.safetensors", heads=3).config.depth == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.1.norm2.weight": None}, "lacks the tensor blocks.1.norm2.weight"),
        ({"blocks.1.attn.qkv.bias": None}, "not alike"),
        ({"cls_token": None}, "65 positions, which fill no square"),
        ({"cls_token": torch.zeros(1, 1, 1, 24)}, "cls_token of shape"),
        ({"pos_embed": None}, "lacks the tensor pos_embed"),
        ({"norm.weight": None, "norm.bias": None}, "lacks the tensor norm.weight"),
        ({"head.bias": None}, "lacks the tensor head.bias"),
        ({"patch_embed.proj.bias": None}, "lacks the tensor patch_embed.proj.bias"),
        ({"head_dist.weight": torch.ones(4, 24), "head_dist.bias": torch.ones(4)}, "different classes"),
        ({"blocks.0.attn.extra": torch.zeros(8), "more": torch.zeros(1)}, "blocks.0.attn.extra, more"),
        ({"blocks.0.attn.q_bias": torch.zeros(24)}, "BEiT"),
        ({"blocks.0.attn.norm.weight": torch.zeros(24)}, "no model that is known"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(90, 24)}, "MLP of 90 numbers"),
        ({"patch_embed.proj.weight": torch.zeros(24, 192)}, "patch_embed.proj.weight of shape"),
        ({"head.weight": torch.ones(5, 23)}, "head.weight of shape"),
        ({"pos_embed": torch.zeros(1, 61, 24)}, "61 positions, which fill no square: say their grid"),
        ({"patch_embed.backbone.conv1.0.weight": torch.zeros(3)}, "another network than timm's ResNetV2"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(
    change: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    state = state_of("plain") | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "x.safetensors", heads=3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "vit_base_patch16_rpn_224"}, "norms after each branch"),
        ({"architecture": "vit_x", "model_args": {"num_heads": 4}}, "states 4 attention heads, not the 3"),
        ({"architecture": "vit_x", "model_args": {"norm_layer": "rmsnorm"}}, "asks for rmsnorm"),
        ({"architecture": "vit_x", "model_args": {"act_layer": "relu"}}, "activation relu"),
        ({"architecture": "vit_x", "model_args": {"pool_include_prefix": True}}, "prefix tokens"),
        ({"architecture": "vit_x", "global_pool": "max"}, "pools by 'max'"),
        ({"architecture": "vit_x", "global_pool": "map"}, "pools by 'map'"),
        ({"architecture": "vit_x", "model_args": {"img_size": 48}}, "do not fit the 6 x 6 patches"),
        ({"architecture": "vit_x", "model_args": ["no", "table"]}, "does not have timm's form"),
        (
            {"architecture": "vit_x", "mean": [0, 0, 0], "std": 1, "input_size": [3, 64, 64]},
            "does not have timm's form",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_file(state_of("plain"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        load(tmp_path, heads=3)


@pytest.mark.parametrize(
    ("config", "head", "said"),
    [
        (replace(SMALL, positions="rotary", width=48), {}, "rotary positions"),
        (replace(SMALL, position_layers="every"), {}, "positions before each block"),
        (SMALL, {"pool": "class-mean"}, "class-mean"),
        (SMALL, {"pool_norm": True}, "a norm before and after pooling"),
        (replace(SMALL, distillation_token=True, registers=1), {}, "registers"),
        (replace(SMALL, pre_norm=True), {}, "patch bias"),
        (replace(SMALL, trunk=TrunkConfig(()), patch=(2, 2)), {}, "official code's epsilons"),
        (replace(SMALL, trunk=replace(TIMMS_TRUNK, width=32), patch=(2, 2)), {}, "width 32"),
        (replace(SMALL, numerics=Numerics("erf", 1e-12)), {}, "norm epsilon of 1e-12"),
    ],
)
def test_what_timm_cannot_hold_is_not_written(
    config: ViTConfig, head: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        timm.write(random_model(config, **head), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_pth_file_is_not_written_where_it_would_be_read_as_another_function(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tanh GELU"):
        timm.write(random_model(replace(SMALL, numerics=Numerics())), tmp_path / "model.pth")
    with pytest.raises(UserError, match="ResNet"):
        timm.write(ClassifierConfig(ResNetConfig((1,), root_width=32), 3, "mean").build(), tmp_path / "model.pth")


def refusal(path: Path, **told: Any) -> str | None:
    try:
        load_backbone(path, **told)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", ["plain", "map", "dinov2like"])
def test_any_tensor_of_another_shape_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    state, path = state_of(case), tmp_path / "x.safetensors"
    # What no file can say: whether it had a head, a pool, a class token without a place, biases of queries and keys.
    optional = ("head.weight", "attn_pool.latent", "cls_token", "reg_token", "blocks.0.attn.qkv.bias")
    for name, tensor in state.items():
        if ".1." in name or ".2." in name:
            continue
        for other in (tensor.flatten()[0].clone(), tensor[None].clone(), tensor[:0].clone(), None):
            changed = {key: value for key, value in (state | {name: other}).items() if value is not None}
            save_file(changed, path)
            said = refusal(path, heads=3)
            assert said or (other is None and name in optional), name
            assert "\n" not in (said or "")


def test_only_timms_files_are_recognised(tmp_path: Path) -> None:
    assert timm.recognises(open_checkpoint(FIXTURES / "timm_plain.safetensors"))
    for other in ("torchvision_vit.safetensors", "official_token.npz", "hf_vit", "hf_dinov2"):
        assert not timm.recognises(open_checkpoint(FIXTURES / other))
