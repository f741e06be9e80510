"""`predict --sort-into` beside `--out`, and the flags under which its promise would not hold."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.commands.predict import Settings, run
from vitrail.commands.reading import Checkpoint
from vitrail.core.errors import UserError
from vitrail.core.runs import write_json
from vitrail.core.types import Preprocess
from vitrail.inference import answers_parquet
from vitrail.inference.answers import Answer, kind_of
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.native import save

LABELS = ("a, b", 'c"\n', "d")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with what `fit` knows of its confidence: sure from 0.5 on."""
    place = tmp_path_factory.mktemp("fitted")
    model = ClassifierConfig(ViTConfig(16, 1, 2, 32, (8, 8), (16, 16)), 3).build(seed=3)
    with torch.no_grad():
        model.head.output.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    model.labels, model.preprocess = LABELS, Preprocess((16, 16))
    save(model.eval(), place)
    confidence = [0.5] * 200 + [0.1] * 50
    write_json(
        place / "confidences.json",
        {"format": 1, "of": [], "confidence": confidence, "right": [value == 0.5 for value in confidence]},
    )
    return place


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "new").mkdir()
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"new/{number}.png")
    (tmp_path / "new/5.png").write_text("no picture")
    return tmp_path / "new"


def placed(into: Path) -> dict[str, str]:
    return {file.name: file.parent.name for file in into.rglob("*.png")}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_answers_that_are_there_are_sorted_too(
    suffix: str, fitted: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = (str(pictures), "nowhere.png"), tmp_path / f"answers.{suffix}"
    assert run(Settings(fitted, given, sort_into=tmp_path / "plain", workers=0)) == 2
    expected = placed(tmp_path / "plain")
    assert len(expected) == 11
    assert len(set(expected.values())) > 1
    assert run(Settings(fitted, given, out=out, workers=0)) == 2
    before = out.read_bytes()
    capsys.readouterr()
    assert run(Settings(fitted, given, out=out, sort_into=tmp_path / "sorted", workers=0)) == 2
    assert "copied 11 pictures" in capsys.readouterr().out
    assert placed(tmp_path / "sorted") == expected
    assert out.read_bytes() == before


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_run_that_was_broken_off_sorts_all(suffix: str, fitted: Path, pictures: Path, tmp_path: Path) -> None:
    out, names = tmp_path / f"answers.{suffix}", tuple(str(pictures / f"{number}.png") for number in range(12))
    run(Settings(fitted, names[:7], out=out, batch=4, workers=0))
    run(Settings(fitted, names, out=out, batch=4, workers=0, sort_into=tmp_path / "sorted"))
    assert set(placed(tmp_path / "sorted")) == {f"{number}.png" for number in range(12) if number != 5}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_best_of_answers(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_parquet, "PART_ROWS", 1)
    path, names = tmp_path / f"a.{suffix}", ["0", "1", "2"]
    given = [
        Answer("0", ((LABELS[1], 0.75), ("d", 0.25))),
        Answer("1", problem="none"),
        Answer("2", (("d", 1.0), ("x", 0.0))),
    ]
    out = kind_of(path)(path, {"top": 2}, names)
    assert list(out.best()) == []
    for answer in given[:2]:
        out.add([answer])
    out.close()
    with kind_of(path)(path, {"top": 2}, names) as out:
        assert list(out.best()) == [(LABELS[1], 0.75), None]
        out.add(given[2:])
    with kind_of(path)(path, {"top": 2}, names) as out:
        assert list(out.best()) == [(LABELS[1], 0.75), None, ("d", 1.0)]


def test_a_class_that_somebody_wrote_into_the_answers(fitted: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    run(Settings(fitted, (str(pictures),), out=out, workers=0))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    lines[0]["predictions"][0]["class"] = "other"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"answers\.jsonl names a class 'other', which the model has not"):
        run(Settings(fitted, (str(pictures),), out=out, sort_into=tmp_path / "sorted", workers=0))


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (Checkpoint(merge="3"), "--merge 3"),
        (Checkpoint(engine="auto", precision="int8", calibrate="photos"), "--precision int8"),
        (Checkpoint(preprocess="imagenet,size=16"), "--preprocess imagenet,size=16"),
    ],
)
def test_what_changes_the_answers_ends_the_promise(
    given: Checkpoint, flag: str, fitted: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(f"{flag} changes its answers")):
        run(Settings(fitted, (str(pictures),), sort_into=tmp_path / "sorted", checkpoint=given))
    assert not (tmp_path / "sorted").exists()


def test_a_promise_is_of_sorting(fitted: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"--promise 0\.9 is of --sort-into"):
        run(Settings(fitted, (str(pictures),), promise=0.9))
