"""What is written for another library is read back to the same function; where a format cannot hold it, nothing is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitrail.analysis.agreement import differences, layers_of, reference_picture
from vitrail.commands import convert
from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights import native
from vitrail.weights.load import load, load_backbone

FIXTURES = Path(__file__).parent / "fixtures"
PLACES = {
    "official": "out.npz",
    "big-vision": "out.npz",
    "timm": "out",
    "hf": "out",
    "torchvision": "out.pth",
    "vitrail": "out",
}


def source(tmp_path: Path, gelu: str) -> Path:
    """A checkpoint of ours, random, with a head."""
    numerics = Numerics(gelu, 1e-6, "zoom" if gelu == "tanh" else "bicubic-antialias")  # type: ignore[arg-type]
    backbone = ViTConfig(24, 2, 3, 40, (8, 8), (32, 32), numerics=numerics)
    model = ClassifierConfig(backbone, 5).build(seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.labels = ("a", "b", "c", "d", "e")
    model.preprocess = Preprocess((32, 32), 40, "bicubic")
    native.save(model, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("to", PLACES)
def test_each_format_comes_back_as_the_same_function(
    tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start = source(tmp_path, "tanh" if to in ("official", "big-vision") else "erf")
    place = tmp_path / PLACES[to]
    assert convert.run(convert.Settings(str(start), place, to, json=True)) == 0  # type: ignore[arg-type]
    answer = json.loads(capsys.readouterr().out)
    assert answer["equal"]
    assert answer["bits"] == (to != "big-vision")
    assert {row["layer"] for row in answer["differences"]} == {"block 1", "block 2", "features", "logits"}
    assert all(row["difference"] <= 2e-5 * row["largest"] for row in answer["differences"])
    ours, theirs = load(start), load(place, heads=3)
    images = ours.preprocess.normalize(reference_picture((32, 32))[None])
    assert all(one.equal for one in differences(layers_of(ours, images), layers_of(theirs, images)))
    if to in ("timm", "hf", "vitrail"):
        assert theirs.preprocess.size == (32, 32)
        assert theirs.preprocess.mean == ours.preprocess.mean
    if to in ("hf", "vitrail"):
        assert theirs.labels == ours.labels


def test_a_backbone_and_a_head_of_zeros_travel_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(source(tmp_path, "tanh"))
    native.save(model.backbone, tmp_path / "backbone")
    assert convert.run(convert.Settings(str(tmp_path / "backbone"), tmp_path / "b.npz", "official")) == 0
    assert "read back     the same bits in every tensor" in capsys.readouterr().out
    assert load_backbone(tmp_path / "b.npz").report.head == "absent"
    torch.nn.init.zeros_(model.head.output.weight)
    torch.nn.init.zeros_(model.head.output.bias)
    native.save(model, tmp_path / "zeros")
    assert convert.run(convert.Settings(str(tmp_path / "zeros"), tmp_path / "z.npz", "official")) == 0
    assert load_backbone(tmp_path / "z.npz").report.head == "all zeros"


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, place = source(tmp_path, "tanh"), tmp_path / "deep" / "out.npz"
    settings = convert.Settings(str(start), place, "official")
    assert convert.run(settings) == 0
    with pytest.raises(UserError, match=r"out\.npz is there already: give another place, or --overwrite"):
        convert.run(settings)
    with pytest.raises(UserError, match="source is there already"):
        convert.run(convert.Settings(str(place), start, "vitrail"))
    assert convert.run(replace(settings, overwrite=True)) == 0
    assert str(place) in capsys.readouterr().out
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"settings": {}}')
    with pytest.raises(UserError, match="run is the folder of a training run"):
        convert.run(convert.Settings(str(start), run, "hf", overwrite=True))
    assert [file.name for file in run.iterdir()] == ["config.json"]


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tanh"):
        convert.run(convert.Settings(str(source(tmp_path, "tanh")), tmp_path / "out.pth", "torchvision"))
    assert not (tmp_path / "out.pth").exists()


def test_a_bare_file_needs_its_heads_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = convert.Settings(str(FIXTURES / "timm_plain.safetensors"), tmp_path / "out", "vitrail", heads=3)
    assert convert.run(replace(settings, preprocess="clip,lanczos")) == 0
    said = capsys.readouterr().out
    assert "the same bits in every tensor" in said
    assert "given by hand" in said
    assert load(tmp_path / "out").preprocess.interpolation == "lanczos"
    assert load(tmp_path / "out").preprocess.mean[0] == 0.48145466
    assert load(tmp_path / "out").config.backbone.heads == 3
