"""The weights that come with the package, and the demo that shows them."""

import hashlib
from pathlib import Path

import pytest
import torch

import vitrail
from vitrail.commands.demo import Settings, run
from vitrail.core.errors import UserError
from vitrail.data.sources import FASHION, read_sample
from vitrail.data.transforms import Transform
from vitrail.experiments.at_hand import own_weights
from vitrail.weights import own


@pytest.mark.parametrize("name", own.OWN)
def test_each_is_what_its_card_says_and_small(name: str) -> None:
    file = own.place(name)
    card = file.with_suffix(".md").read_text(encoding="utf-8")
    model = vitrail.load(name)
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in card
    assert file.stat().st_size <= 8 * 2**20
    assert model.report.dtypes == ("bfloat16 -> float32",)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert own_weights() == name


def test_it_knows_clothes_that_it_has_not_seen() -> None:
    model, test = vitrail.load("vitrail:vit-micro7").eval(), read_sample("fashion", "test")
    transform, places = Transform(model.preprocess), range(0, 2000, 10)
    pixels = torch.stack([torch.from_numpy(transform(test[i].picture, None, test[i].name)) for i in places])
    with torch.inference_mode():
        found = model(pixels).argmax(1)
    right = [model.labels[label] == FASHION[test[i].label] for label, i in zip(found.tolist(), places, strict=True)]
    assert sum(right) / len(right) > 0.8  # 89 % of all; a tenth by chance, and less among 20 classes


def test_other_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"vitrail:ViT-B/16 is none of the weights that come with Vitrail"):
        vitrail.load("vitrail:ViT-B/16")


def test_the_demo_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--minutes is 0; give more than 0"):
        run(Settings(minutes=0.0))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a demo; give another folder"):
        run(Settings(steps=1, out=tmp_path))
