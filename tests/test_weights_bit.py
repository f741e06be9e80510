"""BiT's .npz, under its original names, against outputs of big_vision's bit_paper."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FIXTURES, agree, arrays, saved

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.models.resnet import ResNetConfig
from vitrail.weights import bit
from vitrail.weights.load import load, load_backbone
from vitrail.weights.source import open_checkpoint

FILE = FIXTURES / "bit.npz"


def test_logits_and_features_are_big_visions() -> None:
    io = arrays(FILE.with_name("bit_io.npz"))
    images = torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2)
    model = load(FILE)
    agree(model(images), io["logits"])
    agree(model.backbone.features(images).tokens.mean(1), io["pre_logits"])
    assert model.config.backbone == ResNetConfig((1, 2, 1, 1), root_width=32)
    assert model.preprocess == Preprocess(size=(224, 224))
    assert model.report.format == "bit"
    assert model.report.loaded == len(arrays(FILE))
    assert "480" in model.report.preprocess_source


def test_numbered_convolutions_are_the_same_model(tmp_path: Path) -> None:
    there = {
        name.replace("/standardized_conv2d/", f"/standardized_conv2d_{number}/"): array
        for number, (name, array) in enumerate(arrays(FILE).items())
    }
    path = saved(tmp_path, there)
    assert bit.recognises(open_checkpoint(path))
    one, other = load(path).state_dict(), load(FILE).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_width_factor_is_read_from_the_root(tmp_path: Path) -> None:
    config = ResNetConfig((1,), 2)
    shapes = {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 128)}
    unit = "resnet/block1/unit01/"
    for letter, side, before, after in (("a", 1, 128, 128), ("b", 3, 128, 128), ("c", 1, 128, 512)):
        shapes[f"{unit}{letter}/standardized_conv2d/kernel"] = (side, side, before, after)
        shapes |= {f"{unit}{letter}/group_norm/{name}": (before,) for name in ("gamma", "beta")}
    shapes[f"{unit}a/proj/standardized_conv2d/kernel"] = (1, 1, 128, 512)
    shapes |= {f"resnet/group_norm/{name}": (512,) for name in ("gamma", "beta")}
    path = saved(tmp_path, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    assert load_backbone(path).config == config
    with pytest.raises(UserError, match="no head"):
        load(path)


def test_a_head_of_zeros_is_no_head(tmp_path: Path) -> None:
    there = arrays(FILE)
    there["resnet/head/conv2d/kernel"] = np.zeros_like(there["resnet/head/conv2d/kernel"])
    path = saved(tmp_path, there)
    with pytest.raises(UserError, match="load_backbone"):
        load(path)
    assert load_backbone(path).report.head == "all zeros"


@pytest.mark.parametrize(
    "name",
    [
        "resnet/head/conv2d/bias",
        "resnet/group_norm/beta",
        "resnet/block2/unit01/a/proj/standardized_conv2d/kernel",
        "resnet/block2/unit02/a/group_norm/gamma",
        "resnet/block3/unit01/b/standardized_conv2d/kernel",
    ],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    there = arrays(FILE)
    del there[name]
    with pytest.raises(UserError, match=f"lacks the tensor {name}"):
        load(saved(tmp_path, there))


@pytest.mark.parametrize("gone", ["resnet/block2/", "resnet/block2/unit01/"])
def test_a_missing_unit_is_named(gone: str, tmp_path: Path) -> None:
    there = {name: array for name, array in arrays(FILE).items() if not name.startswith(gone)}
    with pytest.raises(UserError, match=f"lacks the tensor {gone}"):
        load(saved(tmp_path, there))


def test_an_unexpected_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    name = "resnet/block1/unit01/d/group_norm/gamma"
    with pytest.raises(UserError, match=name):
        load(saved(tmp_path, {**arrays(FILE), name: np.ones(32, np.float32)}))
    name = "resnet/block4/unit01/b/standardized_conv2d/kernel"
    with pytest.raises(UserError, match=name):
        load(saved(tmp_path, {**arrays(FILE), name: np.ones((1, 1, 256, 256), np.float32)}))
