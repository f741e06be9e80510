"""Pictures without labels: any folder, tables without a column of labels, and the same held-out rule."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import folder, picture

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess, Source
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import key, limit, sizes
from vitrail.data.splits import Splits, open_data, turn
from vitrail.data.survey import survey
from vitrail.data.transforms import Transform
from vitrail.data.unlabelled import open_pictures
from vitrail.experiments.photos_data import read_photos


def flat(root: Path, count: int = 12, seed: int = 0) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        picture(random, number).save(root / f"{number}.png")
    return root


def names(source: Source | None) -> list[str]:
    return [] if source is None else [key(source, index) for index in range(len(source))]


def counts(found: Splits) -> tuple[int, int, int]:
    return len(found.train), len(found.validation or ()), len(found.test or ())


def unknown(found: Splits) -> None:
    for source in (found.train, found.validation, found.test):
        if source is not None:
            assert isinstance(source, Source)
            assert source.classes == ()
            assert (source.labels == -1).all()
            assert source.labels.shape == sizes(source).shape == (len(source),)
            assert source[len(source) - 1].label == -1


def test_a_flat_folder(tmp_path: Path) -> None:
    (flat(tmp_path / "all", 20) / "notes.txt").write_text("no picture")
    found = open_pictures(str(tmp_path / "all"))
    unknown(found)
    assert counts(found) == (18, 2, 0)
    assert found.made
    assert any("1 files that are no pictures were left alone" in note for note in found.notes)
    # The pictures whose turn comes first by the hash of seed and name, as for labelled ones.
    first = sorted((f"{number}.png" for number in range(20)), key=lambda name: turn(0, name))[:2]
    assert sorted(names(found.validation)) == sorted(first)
    assert names(open_pictures(str(tmp_path / "all"), seed=1).validation) != names(found.validation)


def test_nested_folders_and_classes(tmp_path: Path) -> None:
    folder(tmp_path / "data", classes=3, each=4)
    flat(tmp_path / "data" / "class0" / "deep" / "deeper", 3, seed=1)
    flat(tmp_path / "data", 2, seed=2)
    found = open_pictures(str(tmp_path / "data"), validation=0.0)
    unknown(found)
    assert counts(found) == (17, 0, 0)
    assert {"class0/deep/deeper/0.png", "class2/3.png", "1.png"} <= set(names(found.train))


def test_train_and_test_folders_are_splits(tmp_path: Path) -> None:
    flat(tmp_path / "data" / "train", 10)
    flat(tmp_path / "data" / "val" / "a", 3, seed=1)
    flat(tmp_path / "data" / "test", 2, seed=2)
    flat(tmp_path / "data" / "other", 2, seed=3)
    found = open_pictures(str(tmp_path / "data"))
    unknown(found)
    assert counts(found) == (10, 3, 2)
    assert not found.made
    assert any("left alone, beside its train folder: other" in note for note in found.notes)


def test_trains_among_other_vehicles_are_no_split(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "car", "ship")):
        flat(tmp_path / "data" / name, 4, seed=number)
    assert counts(open_pictures(str(tmp_path / "data"), validation=0.0)) == (12, 0, 0)


def test_tables_need_no_labels(tmp_path: Path) -> None:
    flat(tmp_path / "all", 10)
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in sorted((tmp_path / "all").iterdir())]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    with (tmp_path / "all.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "split"])
        writer.writeheader()
        for number in range(10):
            writer.writerow({"path": f"all/{number}.png", "split": "test" if number == 3 else "train"})
    for name, expected in (("all.parquet", (9, 1, 0)), ("all.csv", (8, 1, 1))):
        found = open_pictures(str(tmp_path / name))
        unknown(found)
        assert counts(found) == expected
    # Labels that nobody could read are not in the way either.
    labels = pa.array([None] * 10, pa.string())
    pq.write_table(pa.Table.from_pylist(rows).append_column("label", labels), tmp_path / "all.parquet")
    unknown(open_pictures(str(tmp_path / "all.parquet")))


def test_samples_lose_their_labels() -> None:
    found = open_pictures("sample:fashion", validation=0.0)
    unknown(found)
    assert counts(found) == (10_000, 0, 2000)


def test_a_split_is_recorded_and_recalled(tmp_path: Path) -> None:
    record, spec = tmp_path / "split.json", str(flat(tmp_path / "all", 20))
    before = names(open_pictures(spec, record=record).validation)
    found = open_pictures(spec, seed=5, record=record)
    assert names(found.validation) == before
    flat(tmp_path / "all", 21)
    with pytest.raises(UserError, match="is the split of other data"):
        open_pictures(spec, record=record)


def test_what_follows_takes_them(tmp_path: Path) -> None:
    found = open_pictures(str(flat(tmp_path / "all", 12)))
    assert len(limit(found.train, 5, seed=0)) == 5
    seen = survey(found)
    assert seen.counts["train"] == {}
    assert not seen.pairs
    for hold in (False, True):
        loader = PictureLoader(found.train, Transform(Preprocess((8, 8))), Order(len(found.train), 4, 8), hold=hold)
        for batch in loader:
            assert batch.targets is None
            assert batch.valid.all()


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for spec, said in (
        (str(tmp_path / "none"), "holds no pictures: give a folder of pictures"),
        (str(tmp_path / "missing"), "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            open_pictures(spec)
    with pytest.raises(UserError, match=r"--validation is 1\.5"):
        open_pictures(str(tmp_path / "none"), validation=1.5)
    flat(tmp_path / "all", 1)
    (tmp_path / "all.csv").write_text("path,split\nall/0.png,test\n")
    with pytest.raises(UserError, match="has no training pictures"):
        open_pictures(str(tmp_path / "all.csv"))


def test_a_set_that_only_measures_trains_nothing(tmp_path: Path) -> None:
    """The same sentence whatever was to be trained: by labels, without them, by `fit`."""
    for label in range(2):
        flat(tmp_path / "v2" / str(label), 2, seed=label)
    spec = f"imagenet-v2:{tmp_path / 'v2'}"
    said = []
    for opened in (open_data, open_pictures, lambda spec: read_photos(spec, 0.2, 0, None, lambda line: None)):
        with pytest.raises(UserError) as error:
            opened(spec)
        said.append(str(error.value))
    assert said == [f"{spec} has no training pictures, only test: give it to vitrail evaluate."] * 3
