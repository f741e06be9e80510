"""big_vision's .npz: read against its own outputs, written against its own files, in all the shapes they come in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FIXTURES, agree, arrays, same, saved, shaken_model

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess
from vitrail.models.vit import ViTConfig
from vitrail.weights import big_vision
from vitrail.weights.load import load, load_backbone
from vitrail.weights.source import open_checkpoint

CASES = ("bigvision_map", "bigvision_gap_sincos", "bigvision_scan_bf16")
SMALL = ViTConfig(24, 2, 3, 40, (8, 8), (32, 32))


def pictures(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_big_visions(case: str) -> None:
    io = arrays(FIXTURES / f"{case}_io.npz")
    model = load(FIXTURES / f"{case}.npz")
    agree(model(torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2)), io["logits"])
    assert model.report.format == "big_vision"
    assert model.report.loaded == len(arrays(FIXTURES / f"{case}.npz"))
    assert model.report.preprocess_source.startswith("assumed")
    assert model.backbone.config.numerics == Numerics("tanh", 1e-6, "zoom")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_a_file_without_a_table_has_computed_positions_and_says_so() -> None:
    converted = big_vision.convert(open_checkpoint(FIXTURES / "bigvision_gap_sincos.npz"))
    assert converted.config.backbone.positions == "sincos2d"
    assert converted.config.backbone.image == converted.preprocess.size == (224, 224)
    (note,) = converted.notes
    assert "sin-cos" in note
    assert "224 x 224" in note
    given = big_vision.convert(open_checkpoint(FIXTURES / "bigvision_gap_sincos.npz"), grid=(8, 6))
    assert given.config.backbone.image == given.preprocess.size == (64, 48)
    assert given.notes == ()


@pytest.mark.parametrize("case", ["bigvision_map", "bigvision_gap_sincos"])
def test_what_was_read_is_written_to_the_bit(case: str, tmp_path: Path) -> None:
    model = load(FIXTURES / f"{case}.npz", grid=(8, 8))
    notes = big_vision.write(model, tmp_path / "written.npz")
    assert notes == (() if case == "bigvision_map" else (notes[0],))
    expected, found = arrays(FIXTURES / f"{case}.npz"), arrays(tmp_path / "written.npz")
    assert found.keys() == {f"params/{name}" for name in expected}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[f"params/{name}"], array, strict=True)
    same(load(tmp_path / "written.npz"), model)


def test_stacked_bfloat16_is_kept_to_the_bit(tmp_path: Path) -> None:
    converted = big_vision.convert(open_checkpoint(FIXTURES / "bigvision_scan_bf16.npz"))
    assert {tensor.dtype for tensor in converted.tensors.values()} == {torch.bfloat16}
    model = converted.config.build(device="meta")
    model.load_state_dict(converted.tensors, assign=True)
    assert big_vision.write(model, tmp_path / "half.npz") == ()
    expected, found = arrays(FIXTURES / "bigvision_scan_bf16.npz"), arrays(tmp_path / "half.npz")
    for name, array in expected.items():
        if "/encoderblock/" not in name:
            assert found.pop(name).tobytes() == array.tobytes(), name
            continue
        for block, part in enumerate(array):
            there = found.pop(name.replace("/encoderblock/", f"/encoderblock_{block}/"))
            assert there.dtype == part.dtype
            assert there.tobytes() == part.tobytes(), name
    assert found == {}
    same(load(tmp_path / "half.npz"), load(FIXTURES / "bigvision_scan_bf16.npz"))


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_training_states_keep_the_model_under_a_prefix(prefix: str, tmp_path: Path) -> None:
    there = arrays(FIXTURES / "bigvision_map.npz")
    state = {f"{prefix}{name}": array for name, array in there.items()}
    state |= {"opt/state/step": np.array(7), "extra/seconds": np.array(1.0)}
    model = load(saved(tmp_path, state))
    same(model, load(FIXTURES / "bigvision_map.npz"))
    assert {name for name, _ in model.report.left_out} == {"opt/state/step", "extra/seconds"}


def test_the_table_of_before_2022_has_a_row_for_the_class_token(tmp_path: Path) -> None:
    model = shaken_model(SMALL)
    big_vision.write(model, tmp_path / "now.npz")
    table = model.backbone.position_embedding
    rows = torch.cat([table.prefix, table.grid.flatten(0, 1)]).detach().numpy()[None]
    now = {name.removeprefix("params/"): array for name, array in arrays(tmp_path / "now.npz").items()}
    old = {**now, "cls": model.backbone.prefix.detach().numpy()[None]}
    del old["pos_embedding"]
    for place in ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding"):
        state = {f"opt/target/{name}": array for name, array in {**old, place: rows}.items()}
        same(load(saved(tmp_path, state)), model)


def test_the_class_tokens_position_is_folded_and_said(tmp_path: Path) -> None:
    model = shaken_model(SMALL)
    assert big_vision.write(model, tmp_path / "folded.npz") == (
        "the class token's position is folded into the class token",
    )
    again = load(tmp_path / "folded.npz")
    assert not again.backbone.config.prefix_positions
    assert torch.equal(again(pictures()), model(pictures()))
    assert torch.equal(again(pictures(48, 48)), model(pictures(48, 48)))


def test_an_inlined_attention_pool_is_found(tmp_path: Path) -> None:
    there = {name.replace("MAPHead_0/", ""): array for name, array in arrays(FIXTURES / "bigvision_map.npz").items()}
    same(load(saved(tmp_path, there)), load(FIXTURES / "bigvision_map.npz"))


def test_of_two_towers_the_one_for_pictures_is_taken(tmp_path: Path) -> None:
    there = arrays(FIXTURES / "bigvision_map.npz")
    pair = {f"params/img/{name}": array for name, array in there.items() if not name.startswith("head/")}
    pair |= {"params/txt/head/kernel": np.ones((3, 4), np.float32), "params/t": np.ones(1), "params/b": np.ones(1)}
    tower = load(saved(tmp_path, pair))
    whole = load(FIXTURES / "bigvision_map.npz")
    assert (tower.config.head, tower.config.output, tower.config.classes) == ("none", "embedding", 24)
    images = pictures(64, 64)
    assert torch.equal(tower(images), whole.pool(whole.backbone.features(images)))
    assert {name for name, _ in tower.report.left_out} == {"params/txt/head/kernel", "params/t", "params/b"}
    assert big_vision.write(tower, tmp_path / "tower.npz") == ()
    assert arrays(tmp_path / "tower.npz").keys() == {name for name in pair if name.startswith("params/img/")}
    same(load(tmp_path / "tower.npz"), tower)


def test_an_attention_pool_without_a_head_is_an_embedding(tmp_path: Path) -> None:
    there = arrays(FIXTURES / "bigvision_map.npz")
    bare = load(saved(tmp_path, {name: array for name, array in there.items() if not name.startswith("head/")}))
    assert (bare.config.head, bare.config.output, bare.config.classes) == ("none", "embedding", 24)


def test_a_towers_projection_is_its_embedding(tmp_path: Path) -> None:
    there = {f"params/img/{name}": array for name, array in arrays(FIXTURES / "bigvision_map.npz").items()}
    tower = load(saved(tmp_path, there))
    assert (tower.config.head, tower.config.output, tower.config.classes) == ("linear", "embedding", 7)
    assert big_vision.write(tower, tmp_path / "tower.npz") == ()
    assert load(tmp_path / "tower.npz").config == tower.config


def test_a_language_models_tower_is_a_backbone(tmp_path: Path) -> None:
    kept = {name: array for name, array in arrays(FIXTURES / "bigvision_map.npz").items() if "MAPHead" not in name}
    there = {f"params/img/{name}": array for name, array in kept.items()}
    path = saved(tmp_path, {**there, "params/llm/embedder/input_embedding": np.ones((3, 4), np.float32)})
    converted = big_vision.convert(open_checkpoint(path))
    assert isinstance(converted.config, ViTConfig)
    assert converted.head == "absent"
    assert "language model" in converted.left_out["params/img/head/*"]
    same(load_backbone(path), load(FIXTURES / "bigvision_map.npz").backbone)


def test_a_head_of_zeros_is_no_head(tmp_path: Path) -> None:
    there = arrays(FIXTURES / "bigvision_map.npz")
    path = saved(tmp_path, {**there, "head/kernel": np.zeros_like(there["head/kernel"])})
    with pytest.raises(UserError, match="load_backbone"):
        load(path)


@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_a_backbone_without_a_head_goes_both_ways(positions: str, tmp_path: Path) -> None:
    bare = shaken_model(replace(SMALL, positions=positions, prefix_positions=False, image=(224, 224))).backbone
    assert big_vision.write(bare, tmp_path / "bare.npz") == ()
    again = load_backbone(tmp_path / "bare.npz")
    same(again, bare)
    assert torch.equal(again.features(pictures()).prefix, bare.features(pictures()).prefix)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("bigvision_map", "MAPHead_0/LayerNorm_0/bias"),
        ("bigvision_map", "MAPHead_0/MultiHeadDotProductAttention_0/key/bias"),
        ("bigvision_map", "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/out/kernel"),
        ("bigvision_scan_bf16", "params/Transformer/encoderblock/MlpBlock_0/Dense_1/bias"),
        ("bigvision_scan_bf16", "params/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"),
        ("bigvision_gap_sincos", "pre_logits/bias"),
    ],
)
def test_a_missing_tensor_is_named(case: str, name: str, tmp_path: Path) -> None:
    there = arrays(FIXTURES / f"{case}.npz")
    del there[name]
    with pytest.raises(UserError, match=f"lacks the tensor {name}"):
        load(saved(tmp_path, there))


@pytest.mark.parametrize("name", ["params/txt_embedding", "params/Transformer/encoderblock/LayerNorm_2/scale"])
def test_an_unexpected_tensor_is_named(name: str, tmp_path: Path) -> None:
    there = {**arrays(FIXTURES / "bigvision_scan_bf16.npz"), name: np.ones(24, np.float32)}
    with pytest.raises(UserError, match=name):
        load(saved(tmp_path, there))


@pytest.mark.parametrize(
    ("case", "name", "shape"),
    [
        ("bigvision_scan_bf16", "params/Transformer/encoderblock/LayerNorm_1/scale", (2, 24)),
        ("bigvision_scan_bf16", "params/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel", (3, 40, 24)),
        ("bigvision_map", "MAPHead_0/probe", (1, 24)),
        ("bigvision_map", "MAPHead_0/MlpBlock_0/Dense_0/kernel", (24, 40)),
        ("bigvision_map", "embedding/kernel", (192, 24)),
    ],
)
def test_a_misshapen_tensor_is_named(case: str, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    there = {**arrays(FIXTURES / f"{case}.npz"), name: np.ones(shape, np.float32)}
    with pytest.raises(UserError, match=name):
        load(saved(tmp_path, there))


def test_an_attention_pool_beside_a_class_token_is_refused(tmp_path: Path) -> None:
    there = {**arrays(FIXTURES / "bigvision_map.npz"), "cls": np.ones((1, 1, 24), np.float32)}
    with pytest.raises(UserError, match="attention pool and a class token"):
        load(saved(tmp_path, there))


def test_a_grid_that_is_no_square_is_asked_for(tmp_path: Path) -> None:
    model = shaken_model(replace(SMALL, class_token=False, image=(48, 80)), "mean")
    (note,) = big_vision.write(model, tmp_path / "wide.npz")
    assert "grid=6x10" in note
    with pytest.raises(UserError, match="60 patches, which fill no square"):
        load(tmp_path / "wide.npz")
    same(load(tmp_path / "wide.npz", grid=(6, 10)), model)


def test_rows_that_would_be_read_as_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 x 8"):
        big_vision.write(shaken_model(replace(SMALL, class_token=False, image=(16, 64)), "mean"), tmp_path / "wide.npz")
    with pytest.raises(UserError, match="10 patches, which would be read as the class token and 9"):
        big_vision.write(shaken_model(replace(SMALL, image=(16, 40))), tmp_path / "wide.npz")


@pytest.mark.parametrize(
    ("config", "pool", "more", "what"),
    [
        (replace(SMALL, registers=2), "class", {}, "registers = 2"),
        (replace(SMALL, layer_scale=True), "class", {}, "layer_scale"),
        (replace(SMALL, feed_forward="swiglu"), "class", {}, "swiglu"),
        (replace(SMALL, positions="rotary"), "class", {}, "rotary positions"),
        (replace(SMALL, positions="none"), "class", {}, "none positions"),
        (replace(SMALL, numerics=Numerics("erf")), "class", {}, "GELU 'erf'"),
        (SMALL, "attention", {}, "attention pooling beside a class token"),
        (SMALL, "class", {"head": "none", "classes": 24}, "class pooling without a head"),
        (replace(SMALL, class_token=False), "mean", {"pool_norm": True}, "pool_norm"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    config: ViTConfig, pool: str, more: dict[str, object], what: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"big_vision's format cannot hold .*{what}"):
        big_vision.write(shaken_model(config, pool, **more), tmp_path / "never.npz")
    assert not any(tmp_path.iterdir())


def test_what_the_file_leaves_unsaid_is_returned(tmp_path: Path) -> None:
    model = shaken_model(replace(SMALL, class_token=False, positions="sincos2d"), "mean")
    model.preprocess = Preprocess(size=(32, 32), mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225))
    size, preprocessing = big_vision.write(model, tmp_path / "unsaid.npz")
    assert "32 x 32 pixels: load it with grid=4x4" in size
    assert "preprocessing" in preprocessing
    assert load(tmp_path / "unsaid.npz", grid=(4, 4)).config == model.config
