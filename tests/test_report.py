import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.core.types import Row, Sample
from vitrail.evaluation.metrics import Tally, tally
from vitrail.experiments.report import write_report
from vitrail.inference.predict import Prediction

CLASSES = ("<b>cat</b>", "dog & co", "@body", "empty")


class Colours:
    """Flat pictures whose colour says which they are; every other one is large."""

    classes = CLASSES
    labels = np.arange(40) % 3
    fingerprint = "feed" * 16

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Sample:
        side = 300 if index % 2 else 16
        pixels = np.full((side, side, 3), (index, 100, 200), np.uint8)
        return Sample(f'folder/"{index}".png', pixels, int(self.labels[index]))


def counted() -> Tally:
    random = np.random.default_rng(0)
    logits = random.normal(size=(40, 4)).astype(np.float32)
    logits[:, 3] = -9
    return tally([Prediction(torch.tensor(logits), torch.tensor(Colours.labels), torch.arange(40))], 4)


def config() -> dict[str, Any]:
    return {
        "format": 1,
        "command": "vitrail train --data 'my <data>'",
        "settings": {"rate": 0.003, "size": [28, 28], "nested": {"deep": None}},
        "versions": {"torch": "2.13.0"},
        "commit": "0123abc",
        "data": {
            "origin": "my <data>",
            "fingerprint": "feed" * 16,
            "classes": list(CLASSES),
            "counts": {"train": 9000, "test": 40},
            "unreadable": [{"name": "x.jpg", "reason": "x.jpg is empty; replace <it>."}],
        },
        "model": {},
    }


def written(folder: Path, found: Tally | None = None) -> str:
    found = found or counted()
    rows = [replace(row, name=f"test {row.name}") for row in found.rows()]
    metrics = [
        {"step": 1, "epoch": 0.5, "loss": 2.0, "rate": 0.1},
        {"step": 2, "epoch": 1.0, "validation/accuracy": 33.0},
    ]
    path = write_report(
        folder, config=config(), metrics=metrics, tally=found, rows=rows, source=Colours(), classes=CLASSES
    )
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Finds tags that are left open or closed in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_one_whole_file_that_asks_for_nothing(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert "prefers-color-scheme: dark" in page
    # Names of XML vocabularies are never fetched.
    asked = re.findall(r'(?:src|href|url\(|@import)[="\s(]+([^"\s)]+)', page)
    assert all(target.startswith(("#", "data:")) for target in asked)
    assert "<script" not in page


def test_words_from_outside_are_escaped(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert "<b>cat</b>" not in page
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "dog &amp; co" in page
    assert "my &lt;data&gt;" in page
    assert "replace &lt;it&gt;." in page
    assert "folder/&quot;" in page
    assert page.count("<main>") == 1


def test_it_says_the_headline_exactly(tmp_path: Path) -> None:
    found = counted()
    top = found.rows()[0]
    page = written(tmp_path)
    assert f"<h1>{top.value:.2f}" in page
    assert (
        f"of 40 test pictures are recognised, with 95 % confidence between {top.low:.2f} and {top.high:.2f} %." in page
    )
    assert f"{found.calibration_error * 100:.2f} %" in page
    for expected in (
        "vitrail train --data &#x27;my &lt;data&gt;&#x27;",
        "0.003",
        "28, 28",
        "nested.deep",
        "2.13.0",
        "9,000",
    ):
        assert expected in page, expected


def test_the_worst_mistakes_are_the_right_pictures(tmp_path: Path) -> None:
    page = written(tmp_path)
    found = re.findall(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)\" alt", page)
    worst = counted().worst(24)
    assert len(found) == len(worst)
    for (kind, text), mistake in zip(found, worst, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
        assert kind == ("jpeg" if mistake.index % 2 else "png")
        assert max(image.size) <= 224
        red = image.getpixel((0, 0))[0]
        assert abs(red - mistake.index) <= (2 if kind == "jpeg" else 0)


def test_a_perfect_model_and_a_single_picture(tmp_path: Path) -> None:
    right = tally([Prediction(torch.eye(4)[:1] * 9, torch.tensor([0]), torch.tensor([0]))], 4)
    page = written(tmp_path, right)
    assert "<h1>100.00" in page
    assert "There are none." in page


def test_names_that_are_no_text_do_not_stop_it(tmp_path: Path) -> None:
    settings = config()
    settings["data"]["origin"] = "bad \udcff name"
    found = counted()
    write_report(
        tmp_path, config=settings, metrics=[], tally=found, rows=found.rows(), source=Colours(), classes=CLASSES
    )
    assert "bad \\udcff name" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_many_classes_are_folded_and_not_drawn(tmp_path: Path) -> None:
    many = 300
    labels = torch.arange(40) % many
    found = tally(
        [Prediction(torch.randn(40, many, generator=torch.Generator().manual_seed(0)), labels, torch.arange(40))], many
    )
    names = tuple(f"class {number}" for number in range(many))
    path = write_report(
        tmp_path,
        config=json.loads("{}"),
        metrics=[],
        tally=found,
        rows=[Row("top-1", 1.0, count=40)],
        source=Colours(),
        classes=names,
    )
    page = path.read_text()
    assert "Confusion matrix" not in page
    assert "of 40 evaluated pictures are recognised." in page


@pytest.mark.parametrize("expected", [None, 85.0])
def test_what_was_expected_is_said(tmp_path: Path, expected: float | None) -> None:
    found = counted()
    rows = [replace(found.rows()[0], expected=expected), *found.rows()[1:]]
    path = write_report(tmp_path, config={}, metrics=[], tally=found, rows=rows, source=Colours(), classes=CLASSES)
    assert ("expected were 85.00 %" in path.read_text()) == (expected is not None)
