"""Which pictures train and which are held out. Files here need not be pictures: a split opens none but equal ones."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from vitrail.core.errors import UserError
from vitrail.data.sources import class_counts, key, subset
from vitrail.data.splits import Splits, hold_out, open_data, read


def make(folder: Path, **classes: int) -> Path:
    """Sub-folders of so many files, each of its own content."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{name}{number}.jpg").write_bytes(f"{folder.name} {name} {number}".encode())
    return folder


def names(splits: Splits) -> tuple[set[str], set[str]]:
    train = {key(splits.train, index) for index in range(len(splits.train))}
    held = splits.validation
    return train, set() if held is None else {key(held, index) for index in range(len(held))}


def refused(spec: object, **options: object) -> str:
    with pytest.raises(UserError) as error:
        open_data(str(spec), **options)  # type: ignore[arg-type]
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_every_class_is_split_by_the_share(tmp_path: Path) -> None:
    make(tmp_path, a=2, b=10, c=100)
    splits = open_data(str(tmp_path), validation=0.2)
    train, held = names(splits)
    assert splits.made
    assert splits.test is None
    assert splits.origin == str(tmp_path)
    assert splits.validation is not None
    assert class_counts(splits.validation) == {"a": 1, "b": 2, "c": 20}
    assert class_counts(splits.train) == {"a": 1, "b": 8, "c": 80}
    assert not train & held
    assert len(train | held) == 112


def test_split_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "one", a=50, b=50)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    held = names(open_data(str(tmp_path / "one")))[1]
    assert names(open_data(str(tmp_path / "two")))[1] == held
    assert names(open_data(str(tmp_path / "one"), seed=1))[1] != held
    # A new picture moves none of the others but one that gives its place up.
    (tmp_path / "two" / "a" / "new.jpg").write_bytes(b"new")
    assert len(names(open_data(str(tmp_path / "two")))[1] - held) <= 1


def test_class_with_one_picture_stays_in_training_and_is_said(tmp_path: Path) -> None:
    splits = open_data(str(make(tmp_path, lonely=1, many=10)))
    assert class_counts(splits.train)["lonely"] == 1
    assert any("'lonely' has one picture" in note for note in splits.notes)


def test_nothing_is_held_out_of_classes_of_one(tmp_path: Path) -> None:
    splits = open_data(str(make(tmp_path, a=1, b=1)))
    assert splits.validation is None
    assert not splits.made
    assert len(splits.notes) == 2


def test_equal_pictures_stay_on_one_side(tmp_path: Path) -> None:
    make(tmp_path, a=40, b=40)
    long = b"x" * 5000
    for number in range(20):
        (tmp_path / "a" / f"twin{number}.jpg").write_bytes(b"the same bytes %d" % (number // 2))
        # Alike in size and in their first 4096 bytes, and yet not equal.
        (tmp_path / "b" / f"near{number}.jpg").write_bytes(long + b"%02d" % number)
    shutil.copy(tmp_path / "a" / "twin0.jpg", tmp_path / "b" / "twin0.jpg")
    apart = set()
    for seed in range(10):
        train, held = names(open_data(str(tmp_path), validation=0.3, seed=seed))
        for number in range(0, 20, 2):
            twins = {f"a/twin{number}.jpg", f"a/twin{number + 1}.jpg"} | ({"b/twin0.jpg"} if number == 0 else set())
            assert twins <= train or twins <= held
        apart |= {f"b/near{number}.jpg" in held for number in range(20)}
    assert apart == {True, False}


def test_class_of_equal_pictures_is_not_emptied(tmp_path: Path) -> None:
    make(tmp_path, a=10, same=0)
    for number in range(5):
        (tmp_path / "same" / f"{number}.jpg").write_bytes(b"equal")
    (tmp_path / "same" / "4.jpg").write_bytes(b"other")
    splits = open_data(str(tmp_path))
    assert class_counts(splits.train)["same"] >= 1
    assert splits.validation is not None
    assert class_counts(splits.validation)["same"] == 1
    (tmp_path / "same" / "4.jpg").write_bytes(b"equal")
    splits = open_data(str(tmp_path))
    assert class_counts(splits.train)["same"] == 5
    assert any("all equal" in note for note in splits.notes)


@pytest.mark.parametrize(("val", "test"), [("val", "test"), ("Valid", "TEST"), ("validation", "testing")])
def test_own_split_folders_are_used(tmp_path: Path, val: str, test: str) -> None:
    make(tmp_path / "Train", a=3, b=3, c=3)
    make(tmp_path / val, a=2, b=1)
    make(tmp_path / test, c=2)
    (tmp_path / "annotations").mkdir()
    splits = open_data(str(tmp_path), record=tmp_path / "split.json")
    assert not splits.made
    assert splits.validation is not None
    assert splits.test is not None
    assert splits.validation.classes == splits.test.classes == ("a", "b", "c")
    assert splits.validation.labels.tolist() == [0, 0, 1]
    assert splits.test.labels.tolist() == [2, 2]
    assert not (tmp_path / "split.json").exists()
    assert any("annotations" in note for note in splits.notes)


def test_validation_is_taken_out_of_train_and_never_out_of_test(tmp_path: Path) -> None:
    make(tmp_path / "train", a=10, b=10)
    make(tmp_path / "test", a=5, b=5)
    splits = open_data(str(tmp_path))
    assert splits.made
    assert (len(splits.train), len(splits.validation or ()), len(splits.test or ())) == (18, 2, 10)
    whole = open_data(str(tmp_path), validation=0.0)
    assert (len(whole.train), whole.validation, whole.made) == (20, None, False)


def test_test_folder_without_classes_is_left_out_and_said(tmp_path: Path) -> None:
    make(tmp_path / "train", a=3, b=3)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.jpg").write_bytes(b"x")
    splits = open_data(str(tmp_path))
    assert splits.test is None
    assert any("no class folders" in note for note in splits.notes)


def test_train_can_be_a_class_of_vehicles(tmp_path: Path) -> None:
    make(tmp_path, car=4, bus=4, train=4)
    assert open_data(str(tmp_path)).train.classes == ("bus", "car", "train")
    (tmp_path / "train" / "steam").mkdir()
    (tmp_path / "train" / "steam" / "s.jpg").write_bytes(b"x")
    assert open_data(str(tmp_path)).train.classes == ("bus", "car", "train")


def test_class_that_only_validation_has_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "train", a=3, b=3)
    make(tmp_path / "val", a=1, wolf=1)
    assert "'wolf'" in refused(tmp_path)


def test_record_is_written_and_used_again(tmp_path: Path) -> None:
    data, record = make(tmp_path / "data", a=20, b=20), tmp_path / "run" / "split.json"
    first = open_data(str(data), seed=3, record=record)
    written = json.loads(record.read_text())
    assert sorted(written["held_out"]) == sorted(names(first)[1])
    assert (written["seed"], written["validation"], written["classes"]) == (3, 0.1, {"a": 20, "b": 20})
    moved = shutil.move(data, tmp_path / "moved")
    again = open_data(str(moved), seed=4, record=record)
    assert names(again) == names(first)
    assert again.train.fingerprint == first.train.fingerprint
    assert json.loads(record.read_text()) == written
    assert any("used again" in note for note in again.notes)


def test_record_of_other_data_is_refused_with_what_changed(tmp_path: Path) -> None:
    data, record = make(tmp_path / "data", a=20, b=20), tmp_path / "split.json"
    open_data(str(data), record=record)
    assert "--validation 0.2" in refused(data, record=record, validation=0.2)
    (data / "a" / "a0.jpg").rename(data / "a" / "z.jpg")
    assert "names, sizes or order" in refused(data, record=record)
    (data / "a" / "z.jpg").unlink()
    said = refused(data, record=record)
    assert "'a' had 20 pictures and now has 19" in said
    assert "another --out" in said


NEWER = '{"format": 9, "validation": 0.1, "fingerprint": "", "classes": {}, "held_out": []}'


@pytest.mark.parametrize(
    ("text", "words"), [("{", "damaged"), ("[]", "no record"), ("{}", "no record"), (NEWER, "format 9")]
)
def test_damaged_record_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "split.json").write_text(text)
    said = refused(make(tmp_path / "data", a=5, b=5), record=tmp_path / "split.json")
    assert "split.json" in said
    assert words in said


def test_sample_holds_validation_out_of_train_when_asked() -> None:
    splits = open_data("sample:fashion")
    assert (len(splits.train), len(splits.validation or ()), len(splits.test or ())) == (9000, 1000, 2000)
    assert splits.validation is not None
    assert set(class_counts(splits.validation).values()) == {100}
    whole = open_data("sample:fashion", validation=0.0)
    assert (len(whole.train), whole.validation, len(whole.test or ())) == (10000, None, 2000)
    assert splits.test is not None
    assert whole.test is not None
    assert splits.test.fingerprint == whole.test.fingerprint


def test_listing_with_and_without_splits(tmp_path: Path) -> None:
    make(tmp_path, a=10, b=10)
    rows = [f"{c}/{c}{n}.jpg,{c}" for c in "ab" for n in range(10)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *rows]))
    splits = open_data(str(tmp_path / "all.csv"))
    assert (len(splits.train), len(splits.validation or ()), splits.made) == (18, 2, True)
    marked = [f"{row},{'test' if '9' in row else 'train'}" for row in rows]
    (tmp_path / "marked.csv").write_text("\n".join(["path,label,split", *marked]))
    splits = open_data(str(tmp_path / "marked.csv"), validation=0.0)
    assert (len(splits.train), splits.validation, len(splits.test or ())) == (18, None, 2)
    (tmp_path / "none.csv").write_text("path,label,split\na/a0.jpg,a,train\n")
    assert "only one class (a)" in refused(tmp_path / "none.csv")


def test_bad_data_is_one_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "gone" / "away"
    assert f"{missing} does not exist" in refused(missing)
    (tmp_path / "here").mkdir()
    assert "does not exist" in refused(tmp_path / "here" / "not")
    assert "no pictures" in refused(tmp_path / "here")
    make(tmp_path / "single", cat=5)
    assert "only one class (cat)" in refused(tmp_path / "single")
    make(tmp_path / "wrapped" / "inner", a=2, b=2)
    assert str(tmp_path / "wrapped" / "inner") in refused(tmp_path / "wrapped")
    make(tmp_path / "held" / "val", a=2, b=2)
    make(tmp_path / "held" / "test", a=2, b=2)
    assert "no train folder" in refused(tmp_path / "held")
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "no folder, CSV, JSON or parquet" in refused(tmp_path / "a.zip")
    assert "no folder, CSV, JSON or parquet" in refused(tmp_path / "single" / "cat" / "cat0.jpg")
    assert "does not exist" in refused("data")
    for share in (-0.1, 1.0, 2.0, float("nan")):
        assert "--validation" in refused(tmp_path / "single", validation=share)


def test_relative_folder_that_is_missing_is_no_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("datasets.load_dataset", fetch)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for spec in ("data/cats", "phtos/train"):
        said = refused(spec)
        assert said.startswith(f"{spec} does not exist")
        assert f"hub:{spec} for a data set of the Hugging Face hub" in said
    assert "hub:OWNER/NAME" in refused("phtos/train/cats")


def test_holding_out_is_fast_on_many_pictures() -> None:
    # 3,000 pictures a class: about a second, where anything quadratic in a class's size would show.
    found, _ = read("sample:fashion")
    source = found["train"]
    many = subset(source, np.tile(np.arange(len(source)), 3))
    began = time.monotonic()
    held, notes = hold_out(many, 0.1, 0)
    assert time.monotonic() - began < 15
    assert notes == ()
    # A picture's three copies are all held out or none.
    assert set(held.reshape(3, -1).sum(axis=0).tolist()) == {0, 3}
    assert held.sum() == 3_000
