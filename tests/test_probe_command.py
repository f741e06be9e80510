"""`vitrail probe`, from flags to rows; its numbers are checked against the functions behind it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import folder

from vitrail.commands.flags import parse
from vitrail.commands.probe import Settings, run
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data import splits
from vitrail.evaluation.means import mean_interval
from vitrail.evaluation.probes import few_shot
from vitrail.inference.features import extract
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights.native import save

CONFIG = ViTConfig(32, 1, 2, 64, (8, 8), (16, 16))


def backbone() -> ViT:
    model = CONFIG.build(seed=3)
    model.preprocess = Preprocess((16, 16))
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save(backbone(), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes told apart by colour: 12 pictures of each to learn from, 8 to measure."""
    path = tmp_path_factory.mktemp("data")
    folder(path / "train", each=12)
    folder(path / "test", each=8, seed=1)
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))


def ask(capsys: pytest.CaptureFixture[str], weights: Path, data: Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    arguments = [str(weights), "--data", str(data), "--workers", "0", "--json", *flags]
    assert run(parse(Settings, arguments, "probe")) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_few_shot_rows_are_means_over_seeds(weights: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, weights, data, "--shots", "1", "5")
    sources, _ = splits.read(str(data))
    train, test = (
        extract(backbone(), sources[name], backbone().preprocess, workers=0, reading="class")
        for name in ("train", "test")
    )
    for row, shots in zip(found["rows"], (1, 5), strict=True):
        values = [few_shot(train.features, train.labels, test.features, test.labels, shots, seed) for seed in range(3)]
        assert row["name"] == f"{shots}-shot, 3 seeds"
        assert row["count"] == 24
        assert found["seeds"][str(shots)] == pytest.approx(values)
        mean, low, high = mean_interval([100 * value for value in values])
        assert (row["value"], row["low"], row["high"]) == pytest.approx((mean, max(low, 0), min(high, 100)))  # type: ignore[type-var]
    assert (found["train"], found["test"]) == ({"split": "train", "count": 36}, {"split": "test", "count": 24})
    assert found["features"] == "class token, 32 numbers"
    assert "the model's own" in found["preprocessing"]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("linear", ["linear probe"]),
        ("knn", ["10 neighbours", "20 neighbours"]),
        ("sgd", ["SGD probe"]),
    ],
)
def test_other_methods(
    weights: Path, data: Path, method: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = ask(capsys, weights, data, "--method", method)
    assert [row["name"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert row["low"] <= row["value"] <= row["high"]
        assert row["count"] == 24
        hits = row["value"] * 24 / 100
        assert hits == pytest.approx(round(hits))
    if method == "linear":
        assert found["rows"][0]["value"] > 60
        assert found["penalty"] in [penalty for penalty, _ in found["tried"]]


def test_it_says_what_it_did(weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(weights), "--data", str(data), "--workers", "0", "--shots", "1", "--reading", "mean"]
    assert run(parse(Settings, [*arguments, "--preprocess", "size=24"], "probe")) == 0
    out = capsys.readouterr().out
    for words in (
        "mean of the patch tokens, 32 numbers",
        "resized to 24 x 24",
        "given by hand",
        str(tmp_path / "cache" / "features"),
        "36 pictures of train",
        "24 pictures of test",
    ):
        assert words in out
    assert re.search(r"1-shot, 3 seeds +[\d.]+ % \[[\d.]+, [\d.]+\] of 24", out)
    assert list((tmp_path / "cache" / "features").rglob("*.safetensors"))
    shutil.rmtree(tmp_path / "cache")
    assert run(parse(Settings, [*arguments, "--no-cache"], "probe")) == 0
    assert re.search(r"kept in +nowhere", capsys.readouterr().out)
    assert not (tmp_path / "cache").exists()


def test_the_batch_size_changes_nothing(weights: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ask(capsys, weights, data, "--no-cache", "--batch", batch)["rows"] for batch in ("1", "7", "64")]
    assert rows[0] == rows[1] == rows[2]


def test_a_classifier_is_read_as_its_head_reads_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its head all zeros, as it is before training."""
    model = ClassifierConfig(CONFIG, 3, hidden=8).build(seed=1)
    model.preprocess = Preprocess((16, 16))
    save(model, tmp_path / "model")
    found = ask(capsys, tmp_path / "model", data, "--method", "knn")
    assert found["features"] == "tanh layer before the logits, 8 numbers"
    assert found["reading"] == "pre-logits"


def test_classes_with_fewer_pictures_are_said(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    for number in range(3, 12):
        (tmp_path / "data" / "train" / "class1" / f"{number}.png").unlink()
    notes = ask(capsys, weights, tmp_path / "data", "--shots", "2", "5", "25")["notes"]
    assert notes == [
        "5-shot: 1 of 3 classes have fewer pictures and give what they have.",
        "25-shot: no class has so many pictures (the largest has 12), so all of them are used.",
    ]


def test_classes_that_are_not_learnt_from(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    for file in (tmp_path / "data" / "train" / "class2").iterdir():
        file.write_text("no picture")
    found = ask(capsys, weights, tmp_path / "data", "--method", "linear")
    assert "8 of the measured pictures are of classes that are not learnt from: they count as wrong." in found["notes"]
    assert len(found["unreadable"]) == 12
    assert found["rows"][0]["value"] <= 100 * 16 / 24


def test_validation_where_there_is_no_test(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "train", tmp_path / "data" / "train")
    shutil.copytree(data / "test", tmp_path / "data" / "val")
    assert ask(capsys, weights, tmp_path / "data")["test"]["split"] == "validation"
    same = ask(capsys, weights, tmp_path / "data", "--split", "train", "--method", "knn")
    assert "Learnt from and measured on the same pictures (train)" in same["notes"][0]
    with pytest.raises(UserError, match="has no test pictures; it has train, validation: give --split one of these"):
        ask(capsys, weights, tmp_path / "data", "--split", "test")


class TestBadInput:
    def test_no_test_pictures(self, weights: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(UserError, match="has no test or validation pictures to measure on"):
            ask(capsys, weights, data / "train")

    def test_one_class(self, weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(data, tmp_path / "data")
        for split in ("train", "test"):
            for label in (1, 2):
                shutil.rmtree(tmp_path / "data" / split / f"class{label}")
        with pytest.raises(UserError, match=r"all of one class|only one class"):
            ask(capsys, weights, tmp_path / "data")

    def test_no_labels(
        self, weights: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, notes = splits.read(str(data))
        unknown = np.full(24, -1)
        object.__setattr__(found["test"], "labels", unknown)
        monkeypatch.setattr(splits, "read", lambda _: (found, notes))
        with pytest.raises(UserError, match=r"24 of the test pictures of .* have no label \(.*0\.png\)"):
            ask(capsys, weights, data)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--batch", "0"], "--batch is 0; give at least 1"),
            (["--seeds", "0"], "--seeds is 0; give at least 1"),
            (["--shots", "5", "0"], "--shots is 0; give at least 1"),
            (["--rate", "0"], "--rate is 0; give more than 0"),
            (["--method", "svm"], "svm"),
            (["--preprocess", "size=15"], "15"),
            (["--reading", "pre-logits"], "tanh layer, which this model lacks: give --reading planned"),
        ],
    )
    def test_flags(
        self, weights: Path, data: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(UserError, match=message):
            ask(capsys, weights, data, *flags)

    def test_a_resnet_has_no_class_token(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save(ResNetConfig((1, 1, 1, 1), image=(32, 32)).build(seed=0), tmp_path / "resnet")
        with pytest.raises(UserError, match="this ResNet has none: give --reading mean"):
            ask(capsys, tmp_path / "resnet", data, "--reading", "class")

    def test_too_few_pictures_for_neighbours(
        self, weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder(tmp_path / "data" / "train", each=3)
        shutil.copytree(data / "test", tmp_path / "data" / "test")
        with pytest.raises(UserError, match="has 9 pictures to learn from, and --method knn asks 10 neighbours"):
            ask(capsys, weights, tmp_path / "data", "--method", "knn")

    def test_features_that_are_not_finite(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Finite weights, that overflow."""
        model = backbone()
        with torch.no_grad():
            model.encoder.blocks[0].mlp.output.weight.fill_(3e38)
        save(model, tmp_path / "model")
        with pytest.raises(UserError, match=r"0\.png: the model's answer is not finite"):
            ask(capsys, tmp_path / "model", data)
