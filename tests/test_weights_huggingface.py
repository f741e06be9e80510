"""Hugging Face folders: read against recorded outputs, and against transformers itself on tiny random models of each
class; written, and read back by transformers; refused where they must be."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import FIXTURES, agree, random_model, scramble, tokens
from PIL import Image
from safetensors.torch import load_file, save_file

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Positions, Preprocess, Tokens
from vitrail.data.transforms import Transform
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.masked import MAEDecoderConfig
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights import huggingface
from vitrail.weights.load import load, load_backbone, read

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

CASES = {
    "vit": "logits",
    "dinov2": "logits",
    "dinov2_reg": None,
    "dinov3": None,
    "clip_vision": "embeds",
    "siglip_vision": "pooled",
}
SMALL = ViTConfig(24, 2, 3, 48, (8, 8), (32, 32), numerics=Numerics("erf", 1e-6, "bicubic"))


@pytest.mark.parametrize("case", CASES)
def test_folders_give_what_transformers_gave(case: str) -> None:
    io = np.load(FIXTURES / f"hf_{case}_io.npz")
    images = torch.from_numpy(io["images_nchw"])
    agree(tokens(load_backbone(FIXTURES / f"hf_{case}"), images), io["features"])
    if (output := CASES[case]) is not None:
        agree(load(FIXTURES / f"hf_{case}")(images), io[output])
    else:
        with pytest.raises(UserError, match="no head"):
            load(FIXTURES / f"hf_{case}")


def test_mae_encoder_and_decoder_give_what_transformers_gave() -> None:
    io = np.load(FIXTURES / "hf_mae_io.npz")
    encoder, given = load_backbone(FIXTURES / "hf_mae"), read(FIXTURES / "hf_mae")
    decoder = MAEDecoderConfig(encoder.config, width=16, depth=1, heads=2, mlp=32).build(device="meta")
    decoder.load_state_dict(given.converted.extra, assign=True)
    order = torch.from_numpy(io["noise"]).argsort(dim=1)
    kept, restore = order[:, : int((io["mask"][0] == 0).sum())], order.argsort(dim=1)
    whole = encoder.tokenize(torch.from_numpy(io["images_nchw"]))
    stem = encoder.positions(whole).stem
    assert stem is not None
    left = (whole.x + stem[:, 1:]).gather(1, kept[..., None].expand(-1, -1, 24))
    positions = Positions(torch.cat([stem[:, :1], torch.zeros(1, left.shape[1], 24)], dim=1))
    features = encoder.encode(Tokens(left, whole.coords[:, : left.shape[1]], None), positions)
    agree(decoder(features, restore), io["prediction"])


COMMON = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 40}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
ROTARY = COMMON | {"hidden_size": 32, "num_attention_heads": 2, "num_register_tokens": 3}
NAMES = {number: f"name {number}" for number in range(5)}
LABELS = {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}


def made(kind: str, head: str = "Model", **settings: Any) -> Callable[[], Any]:
    """A model of transformers' class, when it is asked for."""
    return lambda: getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**settings))


CLASSES = "ForImageClassification"
LIVE: dict[str, tuple[Callable[[], Any], str]] = {
    "vit": (made("ViT", CLASSES, **COMMON, **MLP, **LABELS), "logits"),
    "vit, other numerics": (
        made("ViT", CLASSES, **COMMON, **MLP, num_labels=4, hidden_act="gelu_new", qkv_bias=False, layer_norm_eps=1e-3),
        "logits",
    ),
    "vit, not square": (
        made("ViT", CLASSES, **COMMON | {"image_size": (16, 32), "patch_size": (8, 16)}, **MLP, num_labels=4),
        "logits",
    ),
    "vit with a pooler": (made("ViT", **COMMON, **MLP), "last_hidden_state"),
    "deit": (made("DeiT", CLASSES, **COMMON, **MLP, num_labels=4), "logits"),
    "deit with a teacher": (made("DeiT", CLASSES + "WithTeacher", **COMMON, **MLP, num_labels=4), "logits"),
    "mae": (made("ViTMAE", **COMMON, **MLP, mask_ratio=0.0), "last_hidden_state"),
    "dinov2": (made("Dinov2", CLASSES, **COMMON, mlp_ratio=2, num_labels=4), "logits"),
    "dinov2, SwiGLU": (made("Dinov2", **COMMON, mlp_ratio=4, use_swiglu_ffn=True), "last_hidden_state"),
    "dinov2 with registers": (
        made("Dinov2WithRegisters", CLASSES, **COMMON, mlp_ratio=2, num_labels=4, num_register_tokens=2),
        "logits",
    ),
    "dinov3": (made("DINOv3ViT", **ROTARY, **MLP), "last_hidden_state"),
    "dinov3, gated": (
        made("DINOv3ViT", **ROTARY, **MLP, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False),
        "last_hidden_state",
    ),
    "clip tower": (made("CLIPVision", "ModelWithProjection", **COMMON, **MLP, projection_dim=12), "image_embeds"),
    "clip tower, pooled": (made("CLIPVision", **COMMON, **MLP), "pooler_output"),
    "clip whole": (made("CLIP", vision_config=COMMON | MLP, text_config=TEXT, projection_dim=12), "image features"),
    "clip with classes": (made("CLIP", CLASSES, vision_config=COMMON | MLP, text_config=TEXT, num_labels=4), "logits"),
    "siglip tower": (made("SiglipVision", **COMMON, **MLP), "pooler_output"),
    "siglip without a head": (made("SiglipVision", **COMMON, **MLP, vision_use_head=False), "last_hidden_state"),
    "siglip whole": (
        made("Siglip", vision_config=COMMON | MLP, text_config=TEXT | {"projection_size": 24}),
        "image features",
    ),
    "siglip with classes": (
        made("Siglip", CLASSES, vision_config=COMMON | MLP, text_config=TEXT, num_labels=4),
        "logits",
    ),
}
WRITTEN = (
    *(case for case in LIVE if case.startswith(("vit", "dinov2"))),
    "mae",
)
RESIZED = ("vit", "deit", "dinov2", "dinov2 with registers", "dinov3", "clip tower", "siglip tower")


def theirs(model: Any, output: str, images: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        if output == "image features":
            found = model.get_image_features(images)
            return found if isinstance(found, torch.Tensor) else found.pooler_output
        if isinstance(model, transformers.ViTMAEModel):
            settings |= {"noise": torch.arange(16.0)[None].expand(len(images), -1)}
        return getattr(model(images, **settings), output)


def ours(path: Path, images: torch.Tensor) -> torch.Tensor:
    if read(path).converted.head == "usable":
        return load(path)(images)
    return tokens(load_backbone(path), images)


def pictures(size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", LIVE)
def test_each_class_is_read_as_transformers_computes_it(case: str, tmp_path: Path) -> None:
    make, output = LIVE[case]
    model = scramble(make())
    model.save_pretrained(tmp_path)
    images = pictures((16, 32) if "not square" in case else (32, 32))
    agree(ours(tmp_path, images), theirs(model, output, images))
    # Every key is accounted for.
    report = read(tmp_path).report
    skipped = [key for key, _ in report.left_out]
    for name in load_file(tmp_path / "model.safetensors"):
        taken = name in dict(report.renamed)
        assert taken != any(name == key or (key.endswith("*") and name.startswith(key[:-1])) for key in skipped), name


@pytest.mark.parametrize("case", RESIZED)
def test_positions_are_resized_as_transformers_does(case: str, tmp_path: Path) -> None:
    make, output = LIVE[case]
    model = scramble(make())
    model.save_pretrained(tmp_path)
    images = pictures((48, 16))
    settings = {} if case.startswith("dino") else {"interpolate_pos_encoding": True}
    agree(ours(tmp_path, images), theirs(model, output, images, **settings))


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_read_is_written_back_to_the_bit(case: str, tmp_path: Path) -> None:
    make, output = LIVE[case]
    model = scramble(make())
    model.save_pretrained(tmp_path / "theirs")
    one = (load if read(tmp_path / "theirs").converted.head == "usable" else load_backbone)(tmp_path / "theirs")
    huggingface.write(one, tmp_path / "ours")
    data = json.loads((tmp_path / "ours" / "config.json").read_text())
    kind = getattr(transformers, data["architectures"][0])
    back, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}
    assert not missing
    assert not info["unexpected_keys"]
    images = pictures((16, 32) if "not square" in case else (32, 32))
    torch.testing.assert_close(theirs(back.eval(), output, images), theirs(model, output, images), rtol=0, atol=1e-6)
    written, before = (load_file(tmp_path / part / "model.safetensors") for part in ("ours", "theirs"))
    for name, tensor in written.items():
        if name in before and not name.endswith("mask_token"):
            assert torch.equal(tensor, before[name]), name
    again = (type(one) is Classifier and load(tmp_path / "ours")) or load_backbone(tmp_path / "ours")
    assert (again.config, again.preprocess) == (one.config, one.preprocess)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in one.state_dict().items())


OURS: dict[str, tuple[ViTConfig, dict[str, Any], str]] = {
    "trained here": (replace(SMALL, numerics=Numerics()), {}, "ViTForImageClassification"),
    "computed positions": (replace(SMALL, positions="sincos2d"), {}, "ViTForImageClassification"),
    "no biases": (
        replace(SMALL, qkv_bias=False, patch_bias=False),
        {"head_has_bias": False},
        "ViTForImageClassification",
    ),
    "mean": (SMALL, {"pool": "mean"}, "Dinov2ForImageClassification"),
    "class and mean": (SMALL, {"pool": "class-mean"}, "Dinov2ForImageClassification"),
    "LayerScale": (replace(SMALL, layer_scale=True), {}, "Dinov2ForImageClassification"),
    "registers": (replace(SMALL, registers=2), {}, "Dinov2WithRegistersForImageClassification"),
    "SwiGLU": (replace(SMALL, feed_forward="swiglu", mlp=32), {}, "Dinov2ForImageClassification"),
}


@pytest.mark.parametrize("case", OURS)
def test_models_made_here_are_the_same_function_in_transformers(case: str, tmp_path: Path) -> None:
    config, head, kind = OURS[case]
    model = random_model(config, **head)
    model.labels = ("a", "b", "c", "d", "e")
    huggingface.write(model, tmp_path / "folder")
    back, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert type(back).__name__ == kind
    assert not any(info.values())
    images = pictures()
    agree(theirs(back.eval(), "logits", images), model(images))
    assert back.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    again = load(tmp_path / "folder")
    agree(again(images), model(images))
    assert again.labels == model.labels


def test_what_was_folded_is_said(tmp_path: Path) -> None:
    notes = huggingface.write(random_model(SMALL, pool="mean"), tmp_path)
    assert any("scales are ones" in note for note in notes)
    assert any("zeros for what is not the mean" in note for note in notes)
    notes = huggingface.write(random_model(replace(SMALL, numerics=Numerics())), tmp_path)
    assert any("by bicubic, not by zoom" in note for note in notes)


@pytest.mark.parametrize(
    ("preprocess", "processor"),
    [
        (Preprocess((32, 32), None, "bilinear"), "ViTImageProcessorPil"),
        (Preprocess((24, 32), (40, 48), "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "DeiTImageProcessorPil"),
        (Preprocess((32, 32), 40, "lanczos"), "BitImageProcessorPil"),
    ],
)
def test_preprocessing_is_what_transformers_does_with_it(
    preprocess: Preprocess, processor: str, tmp_path: Path
) -> None:
    model = random_model(SMALL)
    model.preprocess = preprocess
    huggingface.write(model, tmp_path)
    assert load(tmp_path).preprocess == preprocess
    assert load(tmp_path).report.preprocess_source == "stated in preprocessor_config.json"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 75, 3), dtype=np.uint8))
    data = json.loads((tmp_path / "preprocessor_config.json").read_text())
    kind = getattr(transformers, processor, None)
    if kind is None:
        pytest.skip(f"this transformers has no {processor}")
    found = kind(**{name: value for name, value in data.items() if name != "image_processor_type"})(picture)
    expected = preprocess.normalize(torch.as_tensor(Transform(preprocess)(np.asarray(picture), None))[None])[0]
    np.testing.assert_allclose(np.asarray(found["pixel_values"][0]), expected.numpy(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"size": 32}, Preprocess((32, 32), None, "bilinear")),
        ({"size": {"height": 24, "width": 32}, "resample": 3}, Preprocess((24, 32), None, "bicubic")),
        (
            {"size": 40, "crop_size": 32, "do_center_crop": True, "resample": 1},
            Preprocess((32, 32), (40, 40), "lanczos"),
        ),
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24}, "image_mean": [0.1, 0.2, 0.3]},
            Preprocess((32, 24), 40, "bilinear", (0.1, 0.2, 0.3)),
        ),
        ({"size": 32, "do_normalize": False}, Preprocess((32, 32), None, "bilinear", (0.0,) * 3, (1.0,) * 3)),
        (
            {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 0.5},
            Preprocess((32, 32), None, "bilinear", (0.5,) * 3, (0.25,) * 3),
        ),
        ({"size": 37}, Preprocess((32, 32), (37, 37), "bilinear")),
    ],
)
def test_preprocessing_as_files_state_it(data: dict[str, Any], expected: Preprocess, tmp_path: Path) -> None:
    huggingface.write(random_model(SMALL), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data))
    found = load(tmp_path).preprocess
    assert (found.size, found.resize, found.interpolation) == (expected.size, expected.resize, expected.interpolation)
    assert found.mean + found.deviation == pytest.approx(expected.mean + expected.deviation)


def test_what_a_processor_leaves_open_is_said(tmp_path: Path) -> None:
    huggingface.write(random_model(SMALL), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    assert any("resizes nothing" in note for note in load(tmp_path).report.notes)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
    assert any("crops nothing" in note for note in load(tmp_path).report.notes)
    (tmp_path / "preprocessor_config.json").unlink()
    report = load(tmp_path).report
    assert report.preprocess_source.startswith("assumed: there is no preprocessor_config.json")
    assert report.preprocess == Preprocess((32, 32), None, "bilinear")


def test_labels_are_the_files_own(tmp_path: Path) -> None:
    assert load(FIXTURES / "hf_vit").labels == ()  # LABEL_0 and so on name nothing
    make, _ = LIVE["vit"]
    make().save_pretrained(tmp_path)
    assert load(tmp_path).labels == ("name 0", "name 1", "name 2", "name 3", "name 4")


def test_old_and_new_names_are_one(tmp_path: Path) -> None:
    """What transformers 5 calls its own modules; files mostly hold the names of version 4."""
    state, new = load_file(FIXTURES / "hf_vit" / "model.safetensors"), {}
    parts = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    parts |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    parts |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "vit.encoder.layer.": "vit.layers."}
    for name, tensor in state.items():
        for old, renamed in parts.items():
            name = name.replace(old, renamed)
        new[name] = tensor
    assert not new.keys() & {name for name in state if "encoder.layer" in name}
    save_file(new, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURES / "hf_vit" / "config.json").read_text())
    io = np.load(FIXTURES / "hf_vit_io.npz")
    agree(load(tmp_path)(torch.from_numpy(io["images_nchw"])), io["logits"])


def copied(tmp_path: Path, config: dict[str, Any], case: str = "vit", **state: torch.Tensor | None) -> Path:
    """A fixture with its config and tensors changed; None takes one away."""
    source = FIXTURES / f"hf_{case}"
    tensors = load_file(source / "model.safetensors") | state
    save_file({k: tensor for k, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors")
    data = json.loads((source / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps({k: value for k, value in data.items() if value is not None}))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, but its tensors have 2"),
        ({"hidden_size": 48}, "hidden_size 48, but its tensors have 24"),
        ({"patch_size": 16}, "patch_size 16, but its tensors have"),
        ({"image_size": 32}, "do not fit the 4 x 4 patches"),
        ({"image_size": "large"}, "does not have the form"),
        ({"num_attention_heads": 5}, "does not divide into 5"),
        ({"hidden_act": "relu"}, "activation relu"),
        ({"model_type": None}, "without its config.json"),
        ({"use_gated_mlp": True}, "gated by gelu"),
        ({"model_type": "clip"}, "lacks the tensor vision_model.embeddings.patch_embedding.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(copied(tmp_path, config))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"vit.layernorm.bias": None}, "lacks the tensor vit.layernorm.bias"),
        ({"vit.encoder.layer.1.attention.attention.key.weight": None}, "attention.key.weight"),
        ({"vit.extra.weight": torch.ones(2)}, "vit.extra.weight"),
        ({"classifier.weight": torch.ones(6, 23)}, "classifier.weight of shape"),
        ({"vit.embeddings.position_embeddings": torch.ones(1, 64, 24)}, "64 positions, which do not fit the 8 x 8"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(
    state: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        load(copied(tmp_path, {}, **state))


@pytest.mark.parametrize("case", ["dinov3", "clip_vision", "siglip_vision"])
def test_a_file_that_lacks_any_tensor_is_refused_by_its_key(case: str, tmp_path: Path) -> None:
    for name in load_file(FIXTURES / f"hf_{case}" / "model.safetensors"):
        if ".1." in name or name.endswith("mask_token"):
            continue
        copied(tmp_path, {}, case, **{name: None})
        with pytest.raises(UserError, match=re.escape(f"lacks the tensor {name}")):
            load_backbone(tmp_path)


def test_heads_and_preprocessing_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="says 3 attention heads, not the 4"):
        load(FIXTURES / "hf_vit", heads=4)
    copied(tmp_path, {})
    for data in (
        {"size": {"longest_edge": 3}},
        {"resample": 5},
        {"image_mean": [0.5, 0.5]},
        {"size": 64, "image_std": "x"},
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match=r"preprocessor_config\.json does not have the form"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("config", "head", "said"),
    [
        (replace(SMALL, class_token=False), {"pool": "mean"}, "no class token"),
        (replace(SMALL, distillation_token=True), {}, "a distillation token"),
        (replace(SMALL, positions="none"), {}, "no positions"),
        (replace(SMALL, qk_norm=True), {}, "norms of queries and keys"),
        (replace(SMALL, final_norm=False), {}, "none after them"),
        (SMALL, {"hidden": 8}, "hidden layer"),
        (SMALL, {"pool": "attention"}, "the pool 'attention'"),
        (replace(SMALL, registers=1, mlp=40), {}, "an MLP of 40 on a width of 24"),
        (replace(SMALL, registers=1, image=(32, 64)), {}, "not square"),
    ],
)
def test_what_transformers_cannot_hold_is_not_written(
    config: ViTConfig, head: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        huggingface.write(random_model(config, **head), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_only_folders_and_vits_are_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a folder"):
        huggingface.write(random_model(SMALL), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="ResNet"):
        huggingface.write(ClassifierConfig(ResNetConfig((1,), root_width=32), 3, "mean").build(), tmp_path / "x")
