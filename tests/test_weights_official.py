"""The official code's .npz: read against its own outputs, written against its own files, refused where it must be."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FIXTURES, agree, arrays, changed, recorded, same, shaken_model

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import ResNetConfig, TrunkConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights import big_vision, official
from vitrail.weights.load import load, load_backbone
from vitrail.weights.source import open_checkpoint

CASES = ("official_token", "official_prelogits", "official_hybrid", "official_hybridroot")
LINEN = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1", "LayerNorm_1": "LayerNorm_2"}
LINEN["MlpBlock_0"] = "MlpBlock_3"
SMALL = ViTConfig(24, 2, 3, 40, (8, 8), (32, 32))


def old_name(name: str) -> str:
    if not name.startswith("Transformer/encoderblock"):
        return name
    for linen, old in LINEN.items():
        name = name.replace(f"/{linen}/", f"/{old}/")
    return name


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_official_codes(case: str) -> None:
    images, theirs = recorded(case)
    model = load(FIXTURES / f"{case}.npz")
    agree(model(images), theirs["logits"])
    assert model.report.format == "official"
    assert model.report.loaded == len(arrays(FIXTURES / f"{case}.npz"))
    assert model.report.left_out == ()
    assert model.report.preprocess_source.startswith("assumed")
    assert model.preprocess == Preprocess(size=(64, 64))
    assert model.backbone.config.numerics == Numerics("tanh", 1e-6, "zoom")


def test_logits_at_96_pixels_are_the_official_codes() -> None:
    images, theirs = recorded("official_token_96")
    model = load(FIXTURES / "official_token.npz", image=(96, 96))
    assert model.backbone.position_embedding.grid.shape == (12, 12, 24)
    agree(model(images), theirs["logits"])


def test_what_the_file_cannot_say_is_said_aloud() -> None:
    notes = official.convert(open_checkpoint(FIXTURES / "official_token.npz")).notes
    assert notes == ("its 64 positions are taken as a square grid of 8 x 8 patches",)


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_to_the_bit(case: str, tmp_path: Path) -> None:
    model = load(FIXTURES / f"{case}.npz")
    written = tmp_path / "deep" / "written.npz"
    assert official.write(model, written) == ()
    expected, found = arrays(FIXTURES / f"{case}.npz"), arrays(written)
    assert found.keys() == {old_name(name) for name in expected}
    for name, array in expected.items():
        assert found[old_name(name)].dtype == array.dtype
        np.testing.assert_array_equal(found[old_name(name)], array, strict=True)
    same(load(written), model)


def test_linen_names_are_the_same_model(tmp_path: Path) -> None:
    there = arrays(FIXTURES / "official_token.npz")
    for linen, old in LINEN.items():
        there = {name.replace(f"/{old}/", f"/{linen}/"): array for name, array in there.items()}
    assert any("MlpBlock_0" in name for name in there)
    np.savez(tmp_path / "linen.npz", **there)
    same(load(tmp_path / "linen.npz"), load(FIXTURES / "official_token.npz"))


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    model = shaken_model(SMALL)
    for name in ("one.npz", "two.npz"):
        official.write(model, tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_head_of_zeros_is_no_head(tmp_path: Path) -> None:
    there = arrays(FIXTURES / "official_prelogits.npz")
    path = changed(
        tmp_path, FIXTURES / "official_prelogits.npz", **{"head/kernel": np.zeros_like(there["head/kernel"])}
    )
    assert official.convert(open_checkpoint(path)).head == "all zeros"
    with pytest.raises(UserError, match="load_backbone"):
        load(path)
    images, _ = recorded("official_prelogits")
    whole = load(FIXTURES / "official_prelogits.npz")
    bare = load_backbone(path)
    assert torch.equal(bare.features(images).prefix, whole.backbone.features(images).prefix)
    assert bare.report.head == "all zeros"


def test_a_backbone_without_a_head_goes_both_ways(tmp_path: Path) -> None:
    path = changed(tmp_path, **{"head/kernel": None, "head/bias": None})
    assert official.convert(open_checkpoint(path)).head == "absent"
    with pytest.raises(UserError, match="no head"):
        load(path)
    bare = load_backbone(path)
    assert official.write(bare, tmp_path / "bare.npz") == ()
    assert arrays(tmp_path / "bare.npz").keys() == arrays(path).keys()
    same(load_backbone(tmp_path / "bare.npz"), bare)


def test_the_hidden_layer_of_a_head_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    path = changed(tmp_path, FIXTURES / "official_prelogits.npz", **{"head/kernel": None, "head/bias": None})
    converted = official.convert(open_checkpoint(path))
    assert list(converted.left_out) == ["pre_logits/*"]
    assert isinstance(converted.config, ViTConfig)


def test_gap_models_have_no_class_row(tmp_path: Path) -> None:
    model = shaken_model(replace(SMALL, class_token=False), "mean")
    assert official.write(model, tmp_path / "gap.npz") == ()
    assert arrays(tmp_path / "gap.npz")["Transformer/posembed_input/pos_embedding"].shape == (1, 16, 24)
    same(load(tmp_path / "gap.npz"), model)


def test_old_group_norms_are_squeezed(tmp_path: Path) -> None:
    there = arrays(FIXTURES / "official_hybrid.npz")
    norms = {name: array.reshape(1, 1, 1, -1) for name, array in there.items() if "/gn" in name or "gn_root" in name}
    assert len(norms) > 20
    same(load(changed(tmp_path, FIXTURES / "official_hybrid.npz", **norms)), load(FIXTURES / "official_hybrid.npz"))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("official_token", "embedding/bias"),
        ("official_token", "cls"),
        ("official_token", "head/bias"),
        ("official_token", "Transformer/encoder_norm/scale"),
        ("official_token", "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"),
        ("official_token", "Transformer/encoderblock_1/LayerNorm_0/scale"),
        ("official_token", "Transformer/encoderblock_2/MlpBlock_3/Dense_1/bias"),
        ("official_prelogits", "pre_logits/bias"),
        ("official_hybrid", "gn_root/bias"),
        ("official_hybrid", "block1/unit1/conv1/kernel"),
        ("official_hybrid", "block2/unit2/gn2/scale"),
    ],
)
def test_a_missing_tensor_is_named(case: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"lacks the tensor .*{name}"):
        load(changed(tmp_path, FIXTURES / f"{case}.npz", **{name: None}))


@pytest.mark.parametrize("gone", ["Transformer/encoderblock_1/", "block1/"])
def test_a_missing_block_is_named(gone: str, tmp_path: Path) -> None:
    case = "official_hybrid" if gone.startswith("block") else "official_token"
    names = [name for name in arrays(FIXTURES / f"{case}.npz") if name.startswith(gone)]
    with pytest.raises(UserError, match=f"lacks the tensor {gone}"):
        load(changed(tmp_path, FIXTURES / f"{case}.npz", **dict.fromkeys(names)))


@pytest.mark.parametrize("name", ["head/scale", "Transformer/encoderblock_0/LayerNorm_1/scale", "ema/cls"])
def test_an_unexpected_tensor_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        load(changed(tmp_path, **{name: np.ones(24, np.float32)}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embedding/kernel", (8, 8, 3)),
        ("embedding/bias", (25,)),
        ("cls", (1, 2, 24)),
        ("Transformer/posembed_input/pos_embedding", (1, 65, 25)),
        ("Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel", (24, 2, 12)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel", (24, 3, 8)),
        ("Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel", (48, 24)),
        ("head/kernel", (1, 1, 24, 11)),
        ("head/bias", (10,)),
        ("head/kernel", (24, 0)),
        ("embedding/kernel", (0, 8, 3, 24)),
        ("Transformer/posembed_input/pos_embedding", (1, 0, 24)),
    ],
)
def test_a_misshapen_tensor_is_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        load(changed(tmp_path, **{name: np.ones(shape, np.float32)}))


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cls of shape .* in int64"):
        load(changed(tmp_path, cls=np.ones((1, 1, 24), np.int64)))


def test_sizes_that_make_no_model_are_said_of_the_file(tmp_path: Path) -> None:
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    with pytest.raises(UserError, match=r"changed\.npz is no whole model: .* 24 is none of 5"):
        load(changed(tmp_path, **{name: np.ones((24, 5, 4), np.float32)}))


def test_heads_come_from_the_file(tmp_path: Path) -> None:
    assert load(FIXTURES / "official_token.npz", heads=3).backbone.config.heads == 3
    with pytest.raises(UserError, match="3 attention heads, not the 4"):
        load(FIXTURES / "official_token.npz", heads=4)


def test_a_grid_that_is_no_square_is_asked_for(tmp_path: Path) -> None:
    model = shaken_model(replace(SMALL, image=(48, 80)))
    assert official.write(model, tmp_path / "wide.npz") == (
        "the file does not say that the grid is 6 x 10: load it with grid=6x10",
    )
    with pytest.raises(UserError, match="60 patches, which fill no square: give their grid"):
        load(tmp_path / "wide.npz")
    with pytest.raises(UserError, match="not for the 5 x 10"):
        load(tmp_path / "wide.npz", grid=(5, 10))
    again = load(tmp_path / "wide.npz", grid=(6, 10))
    same(again, model)
    assert again.backbone.config == model.backbone.config
    assert again.report.notes == ()


def test_a_grid_that_would_be_read_as_a_square_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 x 9"):
        official.write(shaken_model(replace(SMALL, image=(32, 72))), tmp_path / "wide.npz")


@pytest.mark.parametrize(
    ("config", "pool", "what"),
    [
        (replace(SMALL, registers=2), "class", "registers = 2"),
        (replace(SMALL, distillation_token=True), "class", "distillation_token"),
        (replace(SMALL, layer_scale=True), "class", "layer_scale"),
        (replace(SMALL, feed_forward="swiglu"), "class", "swiglu"),
        (replace(SMALL, qk_norm=True), "class", "qk_norm"),
        (replace(SMALL, pre_norm=True), "class", "pre_norm"),
        (replace(SMALL, final_norm=False), "class", "final_norm"),
        (replace(SMALL, positions="rotary"), "class", "rotary positions"),
        (replace(SMALL, positions="relative"), "class", "relative positions"),
        (replace(SMALL, positions="none"), "class", "none positions"),
        (replace(SMALL, positions="sincos2d"), "class", "sincos2d positions"),
        (replace(SMALL, position_layers="every"), "class", "position_layers = every"),
        (replace(SMALL, numerics=Numerics("erf")), "class", "GELU 'erf'"),
        (replace(SMALL, numerics=Numerics(norm_epsilon=1e-12)), "class", "epsilon 1e-12"),
        (replace(SMALL, class_token=False), "attention", "attention pooling"),
        (SMALL, "mean", "mean pooling beside a class token"),
        (SMALL, "class-mean", "class-mean pooling"),
        (replace(SMALL, patch=(1, 1), trunk=TrunkConfig((1,), 32, norm_epsilon=1e-5), image=(8, 8)), "class", "trunk"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(config: ViTConfig, pool: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the official format cannot hold .*{what}"):
        official.write(shaken_model(config, pool), tmp_path / "never.npz")
    assert not any(tmp_path.iterdir())


def test_other_heads_and_families_are_refused(tmp_path: Path) -> None:
    for config in (
        ClassifierConfig(SMALL, 24, head="none"),
        ClassifierConfig(SMALL, 5, output="embedding"),
        ClassifierConfig(SMALL, 5, pool_norm=True),
        ClassifierConfig(ResNetConfig((1,), root_width=32), 5, "mean"),
    ):
        with pytest.raises(UserError, match="cannot hold"):
            official.write(config.build(), tmp_path / "never.npz")


def test_rows_and_columns_fold_into_one_table(tmp_path: Path) -> None:
    model = shaken_model(replace(SMALL, positions="learned2d"))
    assert official.write(model, tmp_path / "folded.npz") == (
        "the positions of rows and columns are folded into one table",
    )
    again = load(tmp_path / "folded.npz")
    for size in ((32, 32), (48, 40)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        agree(again(images), model(images).detach().numpy())


def test_missing_biases_and_class_positions_are_zeros(tmp_path: Path) -> None:
    config = replace(SMALL, qkv_bias=False, patch_bias=False, prefix_positions=False)
    model = shaken_model(config, head_has_bias=False)
    assert official.write(model, tmp_path / "zeros.npz") == (
        "where this model has no bias, the file has one of zeros",
        "the class token, which has no position, has one of zeros in the file",
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    agree(load(tmp_path / "zeros.npz")(images), model(images).detach().numpy())


def test_what_the_file_leaves_unsaid_is_returned(tmp_path: Path) -> None:
    model = shaken_model(replace(SMALL, numerics=Numerics(resample="bicubic")))
    model.labels = ("a", "b", "c", "d", "e")
    model.preprocess = Preprocess(size=(32, 32), interpolation="bicubic")
    names, resampling, preprocessing = official.write(model, tmp_path / "unsaid.npz")
    assert "names of the 5 classes" in names
    assert "zoom" in resampling
    assert "bicubic" in resampling
    assert "preprocessing" in preprocessing


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    model = shaken_model(SMALL).to(torch.bfloat16)
    assert official.write(model, tmp_path / "half.npz") == ("the file holds bfloat16 numbers as float32",)
    assert {array.dtype for array in arrays(tmp_path / "half.npz").values()} == {np.dtype("float32")}
    same(load(tmp_path / "half.npz"), model.float())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        official.write(shaken_model(SMALL), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        official.write(shaken_model(SMALL), tmp_path / "file" / "under.npz")


def test_only_its_own_files_are_recognised() -> None:
    for case in (*CASES, "bigvision_map", "bigvision_gap_sincos", "bigvision_scan_bf16", "bit", "timm_rect"):
        file = FIXTURES / (f"{case}.npz" if case != "timm_rect" else f"{case}.safetensors")
        checkpoint = open_checkpoint(file)
        assert official.recognises(checkpoint) == case.startswith("official")
        assert big_vision.recognises(checkpoint) == case.startswith("bigvision")
