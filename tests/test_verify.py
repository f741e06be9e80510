"""A certificate says what a file computes; two files of the same weights are equal, and a changed one names its layer."""

import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.analysis.agreement import TOLERANCE, Difference, differences, reference_picture
from vitrail.commands import convert, verify
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.weights import native
from vitrail.weights.load import load, load_backbone

FIXTURES = Path(__file__).parent / "fixtures"
TOKEN = FIXTURES / "official_token.npz"


def answer(capsys: pytest.CaptureFixture[str], *arguments: Any, expected: int = 0, **settings: Any) -> dict[str, Any]:
    assert verify.run(verify.Settings(*map(str, arguments), json=True, **settings)) == expected
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_fixed_picture_never_changes() -> None:
    picture = reference_picture((64, 48))
    assert picture.shape == (3, 64, 48)
    assert picture.dtype == torch.uint8
    assert picture.float().std(dim=(1, 2)).min() > 30
    assert hashlib.sha256(picture.numpy().tobytes()).hexdigest() == FIXED
    for axes in ((1,), (2,), (1, 2)):
        assert not torch.equal(picture, picture.flip(axes))
    assert reference_picture((8, 8), 1).shape == (1, 8, 8)


FIXED = "3a4ac51675c80ec75cd13671f2cfb100ff4a0eaa2cfd4195902258c44949dd27"


def test_the_certificate_says_what_it_is_and_computes(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, TOKEN)
    model = load(TOKEN)
    picture = reference_picture((64, 64))
    logits = model(picture[None])[0]
    assert found["report"]["sha256"] == hashlib.sha256(TOKEN.read_bytes()).hexdigest()
    assert found["report"]["numerics"] == {"gelu": "tanh", "norm_epsilon": 1e-6, "resample": "zoom"}
    assert found["picture"] == hashlib.sha256(picture.numpy().tobytes()).hexdigest()
    assert found["first"] == pytest.approx(logits[:8].tolist(), abs=1e-5)
    assert found["top"][0][0] == f"class {int(logits.argmax())}"
    assert [name for name, _, _ in found["means"]] == ["block 1", "block 2", "block 3", "features", "logits"]
    assert found["against"] is None
    assert verify.run(verify.Settings(str(TOKEN))) == 0
    text = capsys.readouterr().out
    for words in (found["picture"], f"{logits.max():+.6f}  class {logits.argmax()}", "official code", "GELU tanh"):
        assert words in text


def test_a_backbone_has_a_certificate_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, FIXTURES / "hf_mae")
    assert found["report"]["head"] == "absent"
    assert found["top"] == []
    assert found["means"][-1][0] == "features"
    assert len(answer(capsys, FIXTURES / "bit.npz")["means"]) == 6


@pytest.mark.parametrize(("to", "name"), [("hf", "out"), ("timm", "out"), ("big-vision", "out.npz")])
def test_the_same_weights_in_two_formats_are_equal(
    tmp_path: Path, to: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.run(convert.Settings(str(TOKEN), tmp_path / name, to)) == 0
    capsys.readouterr()
    found = answer(capsys, TOKEN, tmp_path / name)["against"]
    assert found["equal"]
    assert found["bits"] == (to != "big-vision")
    assert found["verdict"].startswith("equal: ")
    assert [row["layer"] for row in found["differences"]] == ["block 1", "block 2", "block 3", "features", "logits"]
    assert found["sha256"] == answer(capsys, tmp_path / name)["report"]["sha256"]


def test_a_changed_weight_is_found_at_its_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(TOKEN)
    with torch.no_grad():
        model.backbone.encoder.blocks[1].mlp.output.bias[0] += 0.01
    native.save(model, tmp_path)
    found = answer(capsys, TOKEN, tmp_path, expected=1)["against"]
    assert not found["equal"]
    assert found["differences"][0]["difference"] == 0
    assert found["differences"][1]["difference"] == pytest.approx(0.01, rel=1e-3)
    assert found["verdict"].startswith("DIFFERENT, from block 2 on")
    assert "differ in name or bits" in found["verdict"]


def test_another_arithmetic_of_the_same_weights_is_different(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the GELU is, is no weight, and moves the output all the same."""
    assert convert.run(convert.Settings(str(TOKEN), tmp_path / "out", "hf")) == 0
    capsys.readouterr()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["hidden_act"] = "gelu"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    found = answer(capsys, TOKEN, tmp_path / "out", expected=1)["against"]
    assert found["bits"]
    assert found["verdict"].startswith("DIFFERENT, from block 1 on")
    assert found["verdict"].endswith("the same bits in every tensor")
    assert any(said.startswith("numerics: GELU erf") for said in found["said"])


def test_what_is_stated_differently_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(TOKEN, preprocess=Preprocess((64, 64), 72, "bicubic"))
    native.save(model, tmp_path)
    found = answer(capsys, TOKEN, tmp_path)["against"]
    assert found["equal"]
    assert found["said"] == [
        "preprocessing: shorter side to 72, central crop 64 x 64, bicubic; mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5 "
        "(stated in the file) in the second file"
    ]


def test_a_backbone_is_compared_with_the_one_under_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native.save(load_backbone(TOKEN), tmp_path)
    for pair in ((TOKEN, tmp_path), (tmp_path, TOKEN)):
        found = answer(capsys, *pair)["against"]
        assert found["equal"]
        assert found["differences"][-1]["layer"] == "features"


@pytest.mark.parametrize("case", ["official_token.npz", "bigvision_map.npz", "hf_dinov2", "hf_clip_vision", "bit.npz"])
def test_recorded_outputs_of_a_library_are_something_to_compare_with(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = FIXTURES / f"{Path(case).stem}_io.npz"
    found = answer(capsys, FIXTURES / case, recorded)["against"]
    assert found["equal"]
    assert found["bits"] is None
    assert found["differences"][-1]["difference"] > 0
    arrays = dict(np.load(recorded))
    for key in set(arrays) & set(verify.RECORDED):
        arrays[key] = arrays[key] + np.float32(1e-3)
    np.savez(tmp_path / "moved.npz", **arrays)
    assert not answer(capsys, FIXTURES / case, tmp_path / "moved.npz", expected=1)["against"]["equal"]


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path) -> None:
    for other, message in (
        (FIXTURES / "hf_dinov2", "are different models and cannot be compared"),
        (FIXTURES / "bit.npz", "are different models and cannot be compared"),
        (tmp_path / "input.npz", "holds an input and none of logits, embeds, pooled, features"),
        (tmp_path / "nothing.npz", "there is no checkpoint"),
    ):
        np.savez(tmp_path / "input.npz", images_nchw=np.zeros((1, 3, 64, 64), np.float32))
        with pytest.raises(UserError, match=message) as raised:
            verify.run(verify.Settings(str(TOKEN), str(other)))
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"logits has the shape \(1, 2\) in one and \(1, 3\) in the other"):
        differences({"logits": torch.zeros(1, 2)}, {"logits": torch.zeros(1, 3)})
    with pytest.raises(UserError, match="one gives a, and the other b"):
        differences({"a": torch.zeros(1)}, {"b": torch.zeros(1)})


def test_a_difference_is_measured_by_the_layers_largest_value() -> None:
    (one,) = differences({"x": torch.tensor([1.0, 99.0])}, {"x": torch.tensor([1.001, 100.0])})
    assert one == Difference("x", 1.0, 100.0)
    assert one.relative == 0.01
    assert not one.equal
    assert Difference("x", 100 * TOLERANCE, 100.0).equal
    assert Difference("x", 0.0, 0.0).equal
    assert not Difference("x", 1e-9, 0.0).equal


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(TOKEN)
    model.labels = ("<b>&", *model.labels[1:], *map(str, range(10)))
    native.save(model, tmp_path / "<script>")
    page = tmp_path / "page.html"
    settings = verify.Settings(str(tmp_path / "<script>"), str(TOKEN), html=page)
    assert verify.run(settings) == 0
    capsys.readouterr()
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.open == []
    assert reader.links == []
    assert "<script>" in reader.text
    assert "equal: the same numbers out; the same bits in every tensor" in reader.text
    assert hashlib.sha256(TOKEN.read_bytes()).hexdigest() in reader.text
    assert "@body" not in reader.text
