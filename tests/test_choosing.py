"""When engines are measured unasked, what a cache that cannot be written costs, and on which pictures int8 is judged."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitrail.commands.reading import Checkpoint, pictures_for_int8
from vitrail.core.errors import UserError
from vitrail.core.types import Source
from vitrail.data import splits
from vitrail.data.sources import read_sample, subset
from vitrail.experiments.photos import Settings, fit_photos
from vitrail.inference import choose as choosing
from vitrail.inference.agreement import agreement
from vitrail.inference.calibrate import calibrated
from vitrail.inference.engines import engine, engine_cache
from vitrail.inference.graphs import Asked
from vitrail.inference.openvino import Setup
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.native import save

SMALL = ViTConfig(width=24, depth=2, heads=3, mlp=40, patch=(4, 4), image=(16, 16))
CPU = torch.device("cpu")
unhooked = pytest.mark.unhooked


@pytest.fixture
def model() -> Classifier:
    made = ClassifierConfig(SMALL, 10).build(seed=0).eval()
    with torch.no_grad():
        made.head.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


class Eager:
    """An engine that takes as long as it is told, by a clock of its own."""

    def __init__(self, each: float) -> None:
        self.each, self.now, self.seen = each, 0.0, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.now, self.seen = self.now + self.each * len(images), self.seen + len(images)
        return images

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("pictures", "each", "worth", "seen"),
    [
        (301, 1.0, False, 0),  # to measure would take longer than all of them, and so nothing is timed
        (5000, 0.05, True, 9),
        (5000, 0.001, False, 9),
        (500_000, 0.001, True, 9),
        (None, 1.0, True, 0),
    ],
)
def test_engines_are_measured_unasked_only_where_it_pays(
    pictures: int | None, each: float, worth: bool, seen: int, model: Classifier, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    eager = Eager(each)
    monkeypatch.setattr(choosing, "build", lambda *given, **named: eager)
    monkeypatch.setattr(choosing, "time", eager)
    found = choosing.pays(model, "fp32", pictures=pictures, batch=64, device=CPU, cache=tmp_path)
    assert (found, eager.seen) == (worth, seen)


@unhooked
def test_a_choice_is_used_unasked_once_it_is_remembered(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    unasked = Checkpoint(engine="")
    assert unasked.asking(model, batch=4, pictures=301) is None
    assert not engine_cache().exists()
    assert Checkpoint(engine="auto").asking(model, batch=4, pictures=301) is not None
    assert unasked.asking(model, batch=4, pictures=301) is not None
    assert "measured earlier" in capsys.readouterr().err
    assert unasked.asking(model, batch=4, pictures=64) is None


@unhooked
def test_a_cache_that_cannot_be_written_costs_a_sentence(
    model: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "engines"
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for _ in range(2):
        assert engine(model, "openvino", cache=cache)(images).shape == (2, 10)
    said = capsys.readouterr().err
    assert said.count("compiled cannot be written (Not a directory), so OpenVINO compiles anew each time") == 1
    _, gate = calibrated(
        Asked(model), subset(read_sample("fashion", "test"), range(12)), limit=100, cache=cache, workers=0
    )
    assert gate.passed
    assert "What int8 costs is not remembered" in capsys.readouterr().err


@unhooked
def test_the_verdict_on_int8_is_of_the_names_that_the_classes_have_now(model: Classifier, tmp_path: Path) -> None:
    source = subset(read_sample("fashion", "test"), range(12))
    model.labels = tuple(f"no such {number}" for number in range(10))
    given = {"limit": 100, "cache": tmp_path / "engines", "workers": 0}
    assert not calibrated(Asked(model), source, **given)[1].labelled  # type: ignore[arg-type]
    model.labels = source.classes
    assert calibrated(Asked(model), source, **given)[1].labelled  # type: ignore[arg-type]


def test_all_that_a_runtime_says_is_passed_on(model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("Exception from core.cpp:117:\nException from cache.cpp:3:\nthe disk is full\n")

    monkeypatch.setattr(choosing, "build", broken)
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    trial = choosing.Trial(Asked(model), pixels, 1, (16, 16), CPU, 1, None, None, False)
    made, reason = trial.made(Setup("openvino"))
    assert made is None
    assert reason.endswith("cache.cpp:3: the disk is full).")


def test_int8_is_refused_beside_a_gpu_before_any_work(model: Classifier) -> None:
    source = subset(read_sample("fashion", "test"), range(12))
    with pytest.raises(UserError, match="the model is on meta; give --device cpu, or --precision bf16"):
        calibrated(Asked(model.to("meta")), source, limit=0.5)
    with pytest.raises(UserError, match="int8 is OpenVINO's, on the CPU: give --device cpu"):
        choosing.choose(ClassifierConfig(SMALL, 10).build(), "int8", batch=2, device="mps")


def folder(root: Path, counts: dict[str, int]) -> Path:
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(root / name / f"{number}.png")
    return root


def test_int8_is_judged_on_pictures_that_the_run_held_out(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = folder(tmp_path / "photos", {"ant": 20, "bee": 30}), tmp_path / "run"
    run.mkdir()
    held = splits.open_data(str(data), validation=0.2, seed=7, record=run / "split.json").validation
    assert held is not None
    assert pictures_for_int8(str(data), run).fingerprint == held.fingerprint
    assert len(pictures_for_int8(str(data), tmp_path)) == 50
    assert len(pictures_for_int8(str(data))) == 50
    assert len(pictures_for_int8(str(data / "ant"), run)) == 20
    asked: list[Source] = []

    def looked(model: Asked, source: Source, **named: Any) -> Any:
        asked.append(source)
        raise UserError("enough")

    monkeypatch.setattr("vitrail.inference.calibrate.calibrated", looked)
    with pytest.raises(UserError, match="enough"):
        Checkpoint(engine="openvino", precision="int8", calibrate=str(data)).asking(model, batch=4, weights=run)
    assert asked[0].fingerprint == held.fingerprint


def test_answers_of_nothing_but_zero_are_no_comparison() -> None:
    zero = torch.zeros(4, 10)
    assert agreement(zero, zero, 1e-3).said.startswith("nothing to compare, the model answers 0 to each of 4 pictures")
    assert not agreement(zero, zero + 1, 1e-3).passed
    assert "nothing" not in agreement(zero + 1, zero + 1, 1e-3).said


@unhooked
def test_fit_reads_its_first_answer_by_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vitrail.experiments.photos_recipe.MOST_EPOCHS", 1.0)
    save(SMALL.build(seed=0), tmp_path / "weights")
    photos = folder(tmp_path / "photos", {"a": 15, "b": 15})
    rows = []
    for name in ("eager", "openvino"):
        settings = Settings(
            str(photos), minutes=1.0, weights=str(tmp_path / "weights"), out=tmp_path / name, engine=name
        )
        assert fit_photos(settings) == 0
        said = " ".join(capsys.readouterr().out.split())
        (precision,) = set(re.findall(r" px in (\w+), about", said))  # bf16 where the machine has it
        assert (f"engine: openvino, {precision}" in said) == (name == "openvino")
        rows.append(json.loads((tmp_path / name / "results.json").read_text())["first_answer"])
    assert rows[0] == rows[1]
    assert json.loads((tmp_path / "openvino" / "config.json").read_text())["settings"]["engine"] == "openvino"
