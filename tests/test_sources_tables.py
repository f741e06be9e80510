"""Parquet and hub data sets, through the real `datasets`, in a cache of the test's own and without a network."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitrail.core.errors import UserError
from vitrail.core.types import Source
from vitrail.data.decode import decode
from vitrail.data.sources import class_counts, sizes
from vitrail.data.splits import open_data
from vitrail.data.tables import read_parquet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), grey).save(file, "PNG")
    return file.getvalue()


def write(file: Path, labels: list[Any], pictures: list[Any], feature: dict[str, Any] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    described = {"image": {"_type": "Image"}, **({"label": feature} if feature else {})}
    marked = {"huggingface": json.dumps({"info": {"features": described}})} if feature else None
    table = pa.table({"image": pictures, "label": labels})
    pq.write_table(table.replace_schema_metadata(marked), file)
    return file


def cells(count: int) -> list[dict[str, Any]]:
    return [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)]


def test_parquet_with_class_names(tmp_path: Path) -> None:
    names = {"_type": "ClassLabel", "names": ["zebra", "ape", "unseen"]}
    file = write(tmp_path / "pictures.parquet", [0, 1] * 5, cells(10), names)
    found, notes = read_parquet(file)
    source = found["train"]
    assert isinstance(source, Source)
    assert notes == ()
    assert source.classes == ("zebra", "ape", "unseen")
    assert source.labels.tolist() == [0, 1] * 5
    assert source[3].name == "pictures.parquet train, row 3"
    assert source[3].picture == png(3)
    assert sizes(source).tolist() == [len(png(number)) for number in range(10)]
    again = pickle.loads(pickle.dumps(source))
    assert again[9] == source[9]
    assert again.fingerprint == source.fingerprint


def test_parquet_without_types_and_with_words_for_labels(tmp_path: Path) -> None:
    write(tmp_path / "plain.parquet", ["dog", "cat", "dog", "cat"], [png(number) for number in range(4)])
    source = read_parquet(tmp_path / "plain.parquet")[0]["train"]
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [1, 0, 1, 0]
    assert [decode(sample.picture, 1).getpixel((0, 0)) for sample in source] == [0, 1, 2, 3]


def test_parquet_that_only_names_files(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "a.png")
    names = {"_type": "ClassLabel", "names": ["a", "b"]}
    rows = [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": png(1), "path": None}, None]
    source = read_parquet(write(tmp_path / "p.parquet", [0, 1, 1], rows, names))[0]["train"]
    assert source[0].picture == tmp_path / "a.png"
    assert source[1].picture == png(1)
    assert source[2].picture == b""
    assert sizes(source).tolist() == [-1, len(png(1)), -1]


def test_parquet_folder_with_splits_in_the_names(tmp_path: Path) -> None:
    names = {"_type": "ClassLabel", "names": ["a", "b"]}
    for number in range(2):
        write(tmp_path / "set" / "data" / f"train-0000{number}-of-00002.parquet", [0, 1] * 4, cells(8), names)
    write(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", [0, 1], cells(2), names)
    write(tmp_path / "set" / "test" / "0.parquet", [-1, -1], cells(2), names)
    splits = open_data(str(tmp_path / "set"))
    assert (len(splits.train), len(splits.validation or ()), splits.test, splits.made) == (16, 2, None, False)
    assert any("2 pictures of test have no label" in note for note in splits.notes)


def test_pictures_without_a_label_are_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path / "p.parquet", ["a", None, "b", "a"], cells(4))
    found, notes = read_parquet(tmp_path / "p.parquet")
    assert class_counts(found["train"]) == {"a": 2, "b": 1}
    assert "1 pictures of train have no label" in notes[0]


def test_fingerprint_of_a_table_follows_its_content(tmp_path: Path) -> None:
    one = read_parquet(write(tmp_path / "1" / "p.parquet", ["a", "b"], cells(2)))[0]["train"]
    moved = read_parquet(write(tmp_path / "2" / "q.parquet", ["a", "b"], cells(2)))[0]["train"]
    other = read_parquet(write(tmp_path / "3" / "p.parquet", ["b", "a"], cells(2)))[0]["train"]
    assert one.fingerprint == moved.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [1, 2], "text": ["a", "b"]}, ("no column of pictures", "label, text")),
        ({"image": [b"a", b"b"], "colour": [1, 2]}, ("no column of labels", "image, colour")),
    ],
)
def test_table_without_a_needed_column(tmp_path: Path, columns: dict[str, Any], words: tuple[str, str]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(UserError) as error:
        open_data(str(tmp_path / "p.parquet"))
    assert all(word in str(error.value) for word in ("p.parquet", *words))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "p.parquet", ["a", "b"], cells(2)).read_bytes()
    for damaged in (b"", b"no parquet at all", good[:-20]):
        (tmp_path / "p.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"p\.parquet cannot be read as parquet"):
            open_data(str(tmp_path / "p.parquet"))
    middle = bytearray(good)
    middle[4:60] = bytes(56)
    (tmp_path / "p.parquet").write_bytes(middle)
    with pytest.raises(UserError, match=r"p\.parquet cannot be read as parquet"):
        open_data(str(tmp_path / "p.parquet"))


def test_hub_set_without_a_network_is_one_sentence(tmp_path: Path) -> None:
    # A process of its own, because the hub's client reads HF_HUB_OFFLINE once, when it is imported.
    code = (
        "from vitrail.core.errors import UserError\nfrom vitrail.data.splits import open_data\n"
        "try:\n    open_data('hub:nobody/nothing')\nexcept UserError as error:\n    print(error)\n"
    )
    setting = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=setting, check=True)
    (line,) = run.stdout.splitlines()
    assert "hub:nobody/nothing cannot be fetched (" in line
    assert "network" in line


def test_hub_set_of_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the hub serves is a folder of parquet; `datasets` reads a local one under the same name, splits and all.
    names = {"_type": "ClassLabel", "names": ["a", "b"]}
    write(tmp_path / "owner" / "name" / "data" / "train-0.parquet", [0, 1] * 10, cells(20), names)
    write(tmp_path / "owner" / "name" / "data" / "test-0.parquet", [0, 1], cells(2), names)
    monkeypatch.chdir(tmp_path)
    splits = open_data("hub:owner/name", validation=0.2)
    assert (len(splits.train), len(splits.validation or ()), len(splits.test or ())) == (16, 4, 2)
    assert splits.train[0].name.startswith("hub:owner/name train, row ")
    assert isinstance(splits.train.labels, np.ndarray)
