"""`vitrail fit`: the first answer, the better one, what is kept of both, and every way in which photos can disappoint."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import folder, picture
from processes import Nursery

from vitrail.commands import predict as prediction
from vitrail.commands.fit import run
from vitrail.commands.sorting import copy
from vitrail.core.errors import UserError
from vitrail.core.runs import read_json
from vitrail.data.splits import open_data
from vitrail.experiments import at_hand
from vitrail.experiments.photos import Settings
from vitrail.experiments.photos_folder import Comparison
from vitrail.models.vit import ViTConfig
from vitrail.weights.load import load
from vitrail.weights.native import save


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("tiny")
    save(ViTConfig(16, 1, 2, 32, (5, 5), (20, 20)).build(seed=0), place)
    return str(place)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features of tests stay out of the person's own cache, and training is short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.experiments.photos_recipe.MOST_EPOCHS", 3.0)
        patch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_folder(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a fit on one folder of classes, with what there is to find in it."""
    root = tmp_path_factory.mktemp("one")
    photos = folder(root / "photos", each=30)
    shutil.copy(photos / "class0/1.png", photos / "class1/copy.png")
    (photos / "class0/broken.jpg").write_bytes(b"no picture")
    (photos / "<few>").mkdir()
    for number in range(3):
        picture(np.random.default_rng(50 + number), 4).save(photos / f"<few>/{number}.png")
    assert run(Settings(str(photos), minutes=1.0, weights=tiny, out=root / "run")) == 0
    return root / "run"


def test_the_run_folder_is_as_train_has_it(one_folder: Path) -> None:
    for name in ("config.json", "results.json", "model.safetensors", "metrics.jsonl", "curves.png", "report.html"):
        assert (one_folder / name).stat().st_size, name
    found = read_json(one_folder / "results.json")
    rows = {row["name"]: row for row in found["rows"]}
    assert "held out top-1" in rows
    assert found["first_answer"][0]["name"] == "cross-validated top-1"
    assert found["first_answer"][0]["count"] == 75  # of 94, less 19 held out
    assert found["comparison"]["count"] == 19
    assert [item["class"] for item in found["too_small"]] == ["<few>"]
    assert len(found["duplicates"]) == 1
    assert len(found["unreadable"]) == 1
    config = read_json(one_folder / "config.json")
    assert config["data"]["counts"] == {"train": 94}
    assert config["data"]["classes"] == ["<few>", "class0", "class1", "class2"]


def test_it_never_ends_worse_than_it_began_on_held_out_pictures(one_folder: Path) -> None:
    found = read_json(one_folder / "results.json")
    comparison = found["comparison"]
    better = comparison["second"] > comparison["first"]
    assert found["kept"] == ("fine-tuned" if better else "first answer")
    kept = max(comparison["first"], comparison["second"])
    row = next(row for row in found["rows"] if row["name"] == "held out top-1")
    assert row["value"] == pytest.approx(100 * kept / comparison["count"])
    # The pictures that were held out are `evaluate`'s own choice for this run, and say the same.
    splits = open_data(str(one_folder.parent / "photos"), validation=0.2, record=one_folder / "split.json")
    assert splits.validation is not None
    assert len(splits.validation) == comparison["count"]


def test_the_model_says_what_was_measured(one_folder: Path) -> None:
    """The head went back into the model whole: its answers are those that the confidences were taken of."""
    model = load(one_folder)
    splits = open_data(str(one_folder.parent / "photos"), validation=0.2, record=one_folder / "split.json")
    assert splits.validation is not None
    from vitrail.data.transforms import Transform

    transform = Transform(model.preprocess)
    samples = [splits.validation[index] for index in range(len(splits.validation))]
    pixels = torch.stack([torch.from_numpy(transform(sample.picture, None)) for sample in samples])
    with torch.inference_mode():
        best = torch.softmax(model(pixels).double(), 1).amax(1)
    kept = np.array(read_json(one_folder / "confidences.json")["confidence"])
    assert all(np.abs(kept - value).min() < 0.02 for value in best.tolist())  # bf16 against fp32


def test_the_report_shows_what_was_found(one_folder: Path) -> None:
    page = (one_folder / "report.html").read_text()
    assert "Likely mislabelled" in page
    assert "Equal byte for byte" in page
    assert "&lt;few&gt;" in page
    assert "<few>" not in page
    assert f"vitrail predict {one_folder}" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


@pytest.fixture(scope="module")
def two_folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    folder(root / "photos/train", each=15)
    folder(root / "photos/val", each=10, seed=1)
    assert run(Settings(str(root / "photos"), minutes=1.0, weights=tiny, out=root / "run", validation=0.3)) == 0
    return root / "run"


def test_ones_own_validation_pictures_measure_and_choose_nothing(two_folders: Path) -> None:
    found = read_json(two_folders / "results.json")
    assert found["rows"][0]["name"] == "validation top-1"
    assert found["rows"][0]["count"] == 30
    assert found["comparison"]["pictures"] == "held out"
    assert found["comparison"]["count"] == 12  # 30 % of the 15 of each class
    # The first answer may learn from what was held out, since the person's own pictures measure it; what fine-tuning
    # starts from may not.
    assert found["first_answer"][0]["count"] == 45
    first = read_json(two_folders / "fine-tuned/config.json")
    assert first["data"]["counts"] == {"train": 33, "validation": 12}
    assert first["settings"]["head"] == "keep"
    start, kept = load(two_folders / "first-answer"), load(two_folders)
    assert not torch.equal(start.head.output.weight, kept.head.output.weight)


def test_the_better_one_is_kept_and_equal_ones_change_nothing() -> None:
    def compared(first: int, second: int) -> Comparison:
        return Comparison("held out", 20, first, second, max(second - first, 0), max(first - second, 0), 0.5)

    assert compared(18, 19).better
    assert not compared(18, 18).better
    assert not compared(19, 18).better
    assert "+5.00 points" in compared(18, 19).said()
    assert "no more than chance" in compared(18, 19).said()


def test_ctrl_c_keeps_the_best_so_far_and_resume_goes_on(tiny: str, tmp_path: Path) -> None:
    folder(tmp_path / "photos", each=20)
    slow = """
import time
from vitrail.training.log import Metrics
quick = Metrics.__call__
def slower(self, line):
    quick(self, line)
    time.sleep(0.3)
Metrics.__call__ = slower
import vitrail.cli
vitrail.cli.VERBS["fit"] = ("vitrail.commands.fit:run", "")
import vitrail.experiments.photos_recipe as photos_recipe
photos_recipe.MOST_EPOCHS = 4.0
"""
    words = ["fit", "photos", "--weights", tiny, "--out", "run", "--minutes", "1"]
    child = Nursery(tmp_path).start(*words, first=slow)
    written = tmp_path / "run/fine-tuned/metrics.jsonl"
    child.until(lambda: written.exists() and written.stat().st_size > 0).signal(signal.SIGINT)
    assert child.code() == 130, child.err.read_text()
    found = read_json(tmp_path / "run/results.json")
    assert found["comparison"]["count"] == 12
    assert load(tmp_path / "run").labels == ("class0", "class1", "class2")
    assert "--resume" in child.out.read_text()
    step = torch.load(tmp_path / "run/fine-tuned/state.pt", weights_only=True)["step"]
    child = Nursery(tmp_path).start(*words, "--resume", first=slow.replace("0.3", "0"))
    assert child.code() == 0, child.err.read_text()
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == sorted({line["step"] for line in lines})
    assert lines[-1]["step"] > step
    assert read_json(tmp_path / "run/results.json")["comparison"]["count"] == 12


def test_ctrl_c_before_the_first_answer_leaves_no_run_behind(tiny: str, tmp_path: Path) -> None:
    folder(tmp_path / "photos", each=20)
    early = """
import os, signal, time
import vitrail.experiments.first_answer as first
import vitrail.cli
vitrail.cli.VERBS["fit"] = ("vitrail.commands.fit:run", "")
first.cross_validated = lambda *_, **__: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))
"""
    words = ["fit", "photos", "--weights", tiny, "--out", "run", "--minutes", "1"]
    child = Nursery(tmp_path).start(*words, first=early)
    assert child.code() == 130
    assert "stopped before there was an answer" in child.out.read_text()
    assert not (tmp_path / "run/config.json").exists()  # so that the same command may begin there again


def test_without_any_weights_it_trains_from_scratch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing/hub"))
    assert at_hand.own_weights() == "vitrail:ViT-Micro/7"
    monkeypatch.setattr(at_hand, "own_weights", lambda: None)
    photos = folder(tmp_path / "photos", each=10)
    monkeypatch.setattr("vitrail.experiments.photos.SCRATCH_LEAST", 1.0)
    monkeypatch.setattr("vitrail.experiments.photos.REST", 58.0)
    assert run(Settings(str(photos), minutes=1.0, out=tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert "random weights, trained from scratch" in said
    found = read_json(tmp_path / "run/results.json")
    assert found["kept"] == "trained from random weights"
    assert found["rows"][0]["name"] == "held out top-1"
    assert (tmp_path / "run/report.html").exists()


def test_it_takes_what_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    place = tmp_path / "vitrail/vit_models/augreg"
    place.mkdir(parents=True)
    (place / "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz").write_bytes(b"weights")
    found = at_hand.best_at_hand(gpu=False)
    assert found.weights is not None
    assert Path(found.weights).parent == place
    assert "official:augreg/S_16" in found.said


@pytest.mark.parametrize(
    ("make", "settings", "sentence"),
    [
        ("empty", {}, "holds no pictures"),
        ("missing", {}, "does not exist"),
        ("one class", {}, "only one class"),
        ("single", {}, "no picture could be held out"),
        ("broken", {}, "cannot be read"),
        ("good", {"minutes": 0.2}, "--minutes is 0.2"),
        ("good", {"weights": "nowhere"}, "there is no checkpoint nowhere"),
        ("good", {"validation": 1.0}, "--validation is 1"),
        ("good", {"resume": True}, "holds no run to go on with"),
    ],
)
def test_bad_input_is_one_sentence(make: str, settings: dict, sentence: str, tiny: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    if make == "empty":
        photos.mkdir()
    elif make in ("one class", "single"):
        folder(photos, classes=1 if make == "one class" else 3, each=4 if make == "one class" else 1)
    elif make != "missing":
        folder(photos, each=3)
    if make == "broken":
        for number in range(2):
            (photos / f"class0/{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(Settings(str(photos), **{"minutes": 1.0, "weights": tiny, "out": tmp_path / "run", **settings}))


def test_a_run_is_never_overwritten_nor_continued_with_other_photos(
    one_folder: Path, tiny: str, tmp_path: Path
) -> None:
    photos = folder(tmp_path / "other", each=5)
    with pytest.raises(UserError, match="already holds a run"):
        run(Settings(str(photos), minutes=1.0, weights=tiny, out=one_folder))
    with pytest.raises(UserError, match=r"has changed since this run began|is the split of other data"):
        run(Settings(str(photos), minutes=1.0, weights=tiny, out=one_folder, resume=True))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return folder(tmp_path / "new", each=4, seed=9)


def sort(run_folder: Path, new: Path, into: Path, **settings: object) -> int:
    return prediction.run(prediction.Settings(run_folder, (str(new),), sort_into=into, **settings))


def test_new_photos_are_sorted_and_never_overwritten(
    one_folder: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    into = tmp_path / "sorted"
    assert sort(one_folder, new, into, promise=0.3) == 0
    assert "copied 12 pictures" in capsys.readouterr().out
    placed = sorted(into.rglob("*.png"))
    assert len(placed) == 12
    assert len({file.read_bytes() for file in placed}) == 12
    assert {file.parent.name for file in placed} <= {"<few>", "class0", "class1", "class2", "unsure"}
    assert len(list(new.rglob("*.png"))) == 12
    assert sort(one_folder, new, into, promise=0.3) == 0
    assert "copied 0 pictures" in capsys.readouterr().out
    assert sorted(into.rglob("*.png")) == placed


def test_what_cannot_be_promised_is_left_unsure(
    one_folder: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sort(one_folder, new, tmp_path / "sorted", promise=0.9999) == 0
    assert "all are left unsure" in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / "sorted").iterdir()] == ["unsure"]


def test_a_copy_of_the_same_name_gets_a_number(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.png").write_bytes(b"%d" % number)
        assert copy(tmp_path / str(number) / "a.png", tmp_path / "to")
        assert not copy(tmp_path / str(number) / "a.png", tmp_path / "to")
    found = {file.name: file.read_bytes() for file in (tmp_path / "to").iterdir()}
    assert found == {"a.png": b"0", "a-2.png": b"1", "a-3.png": b"2"}


@pytest.mark.parametrize(
    ("into", "settings", "sentence"),
    [
        ("new", {}, "lies in"),
        ("new/below", {}, "lies in"),
        ("sorted", {"promise": 1.5}, "--promise is 1.5"),
        ("file", {}, "is a file"),
    ],
)
def test_sorting_refuses_in_one_sentence(
    into: str, settings: dict, sentence: str, one_folder: Path, new: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=re.escape(sentence)):
        sort(one_folder, new, tmp_path / into, **settings)


def test_sorting_needs_a_run_that_knows_how_sure_it_must_be(one_folder: Path, new: Path, tmp_path: Path) -> None:
    save(load(one_folder), tmp_path / "bare")
    with pytest.raises(UserError, match="needs a run of `vitrail fit`"):
        sort(tmp_path / "bare", new, tmp_path / "sorted")


def test_photos_mended_as_told_are_not_refused_again(tiny: str, tmp_path: Path) -> None:
    photos, broken = folder(tmp_path / "photos", each=12), []
    for number in range(4):
        broken.append(photos / f"class0/broken{number}.jpg")
        broken[-1].write_bytes(b"no picture")
    settings = Settings(str(photos), minutes=1.0, weights=tiny, out=tmp_path / "run")
    with pytest.raises(UserError, match="cannot be read"):
        run(settings)
    for file in broken:
        file.unlink()
    assert run(settings) == 0
