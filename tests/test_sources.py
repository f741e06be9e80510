"""Folders, listings, the embedded sample, and views of them. Pictures are made here; undecoded ones need not be pictures."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source
from vitrail.data.decode import decode
from vitrail.data.folders import read_folder, read_folders, walk
from vitrail.data.sources import (
    SAMPLES,
    MemorySource,
    Packed,
    class_counts,
    key,
    limit,
    listed,
    natural,
    read_sample,
    sizes,
    subset,
)
from vitrail.data.tables import read_listing


def make(folder: Path, **classes: int) -> Path:
    """Sub-folders of so many files, each of its own content."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{name}{number}.jpg").write_bytes(f"{name} {number}".encode())
    return folder


def one_sentence(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert word in text


def test_folder_is_read_in_natural_order_and_knows_its_classes(tmp_path: Path) -> None:
    source, notes = read_folder(make(tmp_path, dog=11, Cat=2))
    assert isinstance(source, Source)
    assert source.classes == ("Cat", "dog")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0] * 2 + [1] * 11
    assert [key(source, index) for index in (2, 3, 4, 12)] == [
        "dog/dog0.jpg",
        "dog/dog1.jpg",
        "dog/dog2.jpg",
        "dog/dog10.jpg",
    ]
    assert source[12] == Sample(str(tmp_path / "dog/dog10.jpg"), tmp_path / "dog/dog10.jpg", 1)
    assert source[-1] == source[12]
    assert len(list(source)) == 13
    assert notes == ()
    assert class_counts(source) == {"Cat": 2, "dog": 11}


def test_folder_takes_nested_pictures_of_any_case_and_leaves_the_rest(tmp_path: Path) -> None:
    make(tmp_path, cat=1, dog=1, empty=0)
    (tmp_path / "cat" / "2020" / "may").mkdir(parents=True)
    (tmp_path / "cat" / "2020" / "may" / "B.JPEG").write_bytes(b"x")
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "meta.json", ".hidden.jpg"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.jpg").write_bytes(b"x")
    (tmp_path / "loose.png").write_bytes(b"x")
    os.mkfifo(tmp_path / "dog" / "pipe.jpg")
    source, notes = read_folder(tmp_path)
    assert [key(source, index) for index in range(len(source))] == [
        "cat/2020/may/B.JPEG",
        "cat/cat0.jpg",
        "dog/dog0.jpg",
    ]
    assert source.classes == ("cat", "dog")
    said = "\n".join(notes)
    for words in ("no pictures: empty", "1 pictures outside", "3 files that are no pictures"):
        assert words in said


def test_links_are_followed_once_and_dead_ones_are_kept_to_be_named(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", cat=2)
    (tmp_path / "data" / "dog").mkdir(parents=True)
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere" / "cat", target_is_directory=True)
    (tmp_path / "elsewhere" / "cat" / "round").symlink_to(tmp_path / "elsewhere" / "cat", target_is_directory=True)
    (tmp_path / "data" / "dog" / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "data" / "dog" / "itself.png").symlink_to(tmp_path / "data" / "dog" / "itself.png")
    source, _ = read_folder(tmp_path / "data")
    assert [key(source, index) for index in range(len(source))] == [
        *("cat/cat0.jpg", "cat/cat1.jpg"),
        *("dog/dead.png", "dog/itself.png"),
    ]
    assert source.sizes.tolist() == [5, 5, -1, -1]


def test_folder_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path, cat=1, dog=1)
    (tmp_path / "dog" / "inside.jpg").mkdir()
    (tmp_path / "dog" / "inside.jpg" / "a.png").write_bytes(b"x")
    source, _ = read_folder(tmp_path)
    assert key(source, 2) == "dog/inside.jpg/a.png"


def test_name_that_is_no_utf8_can_be_opened_and_written_down(tmp_path: Path) -> None:
    make(tmp_path, cat=1, dog=1)
    (Path(os.fsdecode(os.fsencode(tmp_path / "cat") + b"/\xff.jpg"))).write_bytes(b"odd")
    source, _ = read_folder(tmp_path)
    odd = next(sample for sample in source if sample.name.endswith("\\xff.jpg"))
    assert isinstance(odd.picture, Path)
    assert odd.picture.read_bytes() == b"odd"
    odd.name.encode()


def test_class_that_is_no_utf8_can_be_opened_and_written_down(tmp_path: Path) -> None:
    make(tmp_path, cat=1)
    odd, empty = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/caf\xe9", b"/\xff"))
    for folder in (odd, empty):
        folder.mkdir()
        (folder / os.fsdecode(b"\xfe")).write_bytes(b"no picture")
    (odd / "1.jpg").write_bytes(b"odd")
    source, notes = read_folder(tmp_path)
    assert source.classes == ("caf\\xe9", "cat")
    assert isinstance(source[0].picture, Path)
    assert source[0].picture.read_bytes() == b"odd"
    assert read_folder(tmp_path, source.classes)[0].labels.tolist() == source.labels.tolist() == [0, 1]
    for text in (*source.classes, source[0].name, *notes):
        text.encode()
    # One class alone that holds folders is looked into, whatever its name is.
    (tmp_path / "cat" / "cat0.jpg").unlink()
    for inner in ("a", "b"):
        (odd / inner).mkdir()
    with pytest.raises(UserError, match="has only one class"):
        read_folders(tmp_path)


def test_fingerprint_stays_when_the_folder_moves_and_changes_with_the_data(tmp_path: Path) -> None:
    first = read_folder(make(tmp_path / "a", cat=3, dog=2))[0]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "cat" / "cat0.jpg", (1, 1))
    assert read_folder(tmp_path / "b")[0].fingerprint == first.fingerprint
    seen = {first.fingerprint}
    (tmp_path / "b" / "cat" / "cat0.jpg").write_bytes(b"of another length")
    seen.add(read_folder(tmp_path / "b")[0].fingerprint)
    (tmp_path / "b" / "cat" / "cat0.jpg").rename(tmp_path / "b" / "dog" / "cat0.jpg")
    seen.add(read_folder(tmp_path / "b")[0].fingerprint)
    (tmp_path / "b" / "dog" / "cat0.jpg").unlink()
    seen.add(read_folder(tmp_path / "b")[0].fingerprint)
    (tmp_path / "b" / "dog").rename(tmp_path / "b" / "hound")
    seen.add(read_folder(tmp_path / "b")[0].fingerprint)
    seen.add(subset(first, [0, 1]).fingerprint)
    seen.add(subset(first, [1, 0]).fingerprint)
    assert len(seen) == 7


def test_sources_survive_pickling(tmp_path: Path) -> None:
    folder = read_folder(make(tmp_path, cat=3, dog=2))[0]
    for source in (folder, subset(folder, [4, 0]), read_sample("fashion", "test")):
        again = pickle.loads(pickle.dumps(source))
        assert again.fingerprint == source.fingerprint
        assert again[1] == source[1]


def test_sources_hold_no_object_for_each_picture(tmp_path: Path) -> None:
    # Memory of forked workers grows where a list's items are counted; one bytes object and three arrays are not.
    import gc

    source = read_folder(make(tmp_path, cat=500, dog=500))[0]
    held, inside = [source], set()
    while held:
        item = held.pop()
        if id(item) not in inside and not isinstance(item, type):
            inside.add(id(item))
            held += gc.get_referents(item) if not isinstance(item, Path) else []
    assert len(inside) < 100


def test_folder_without_pictures_or_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    one_sentence(error, str(tmp_path), "no pictures")
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    one_sentence(error, "a.jpg", "no class folders")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder whose parents anyone may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
def test_folder_without_permission(open_to_all: Path) -> None:
    make(open_to_all, cat=1, dog=1)
    (open_to_all / "dog").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything; nobody may not
    try:
        with pytest.raises(UserError) as error:
            read_folder(open_to_all)
    finally:
        os.seteuid(user)
        (open_to_all / "dog").chmod(0o755)
    one_sentence(error, str(open_to_all / "dog"), "Permission denied")


def test_unknown_class_is_refused(tmp_path: Path) -> None:
    make(tmp_path, cat=1, wolf=1)
    with pytest.raises(UserError) as error:
        read_folder(tmp_path, ("cat", "dog"))
    one_sentence(error, "'wolf'", "cat, dog")


def test_natural_order() -> None:
    assert sorted(["b10", "B2", "b1", "a"], key=natural) == ["a", "b1", "B2", "b10"]
    assert listed("abc", 2) == "a, b and 1 more"


def test_packed_is_a_sequence() -> None:
    items = [b"", b"one", b"", b"three"]
    packed = Packed.of(items)
    assert [packed[index] for index in range(4)] == items
    assert [packed[index] for index in range(-4, 0)] == items
    assert len(Packed.of([])) == 0


def test_limit_takes_every_class_alike_and_keeps_order(tmp_path: Path) -> None:
    source = read_folder(make(tmp_path, a=2, b=50, c=50))[0]
    few = limit(source, 30, seed=1)
    assert class_counts(few) == {"a": 2, "b": 14, "c": 14}
    names = [sample.name for sample in few]
    assert names == sorted(names, key=natural)
    assert [s.name for s in limit(source, 30, seed=1)] == names
    assert [s.name for s in limit(source, 30, seed=2)] != names
    assert sorted(class_counts(limit(source, 4, seed=0)).values()) == [1, 1, 2]
    assert limit(source, 500, seed=0) is source
    with pytest.raises(UserError, match="--limit is 0"):
        limit(source, 0, seed=0)


def test_subset_of_a_subset(tmp_path: Path) -> None:
    source = read_folder(make(tmp_path, a=3, b=3))[0]
    inner = subset(subset(source, [5, 3, 1]), np.array([2, 0]))
    assert inner.labels.tolist() == [0, 1]
    assert [sample.name for sample in inner] == [source[1].name, source[5].name]
    assert sizes(inner).tolist() == [source.sizes[1], source.sizes[5]]


def test_embedded_sample_is_the_one_that_the_script_chose() -> None:
    # The digests stand in fashion.md; they are of pixels and labels, whatever library wrote or reads the file.
    expected = {
        "train": "e917654f9d838f8218b4f4ec79c3bb03eb70606f5f08022297528cde380881db",
        "test": "dae0feeae6b3df9f913d9854382ce94e925a5aba6eb16e636a9b5b071a6c3864",
    }
    for split, each in (("train", 1000), ("test", 200)):
        source = read_sample("fashion", split)
        assert isinstance(source, MemorySource)
        assert class_counts(source) == dict.fromkeys(SAMPLES["fashion"], each)
        pixels = b"".join(decode(sample.picture, 1).tobytes() for sample in source)
        assert hashlib.sha256(pixels + source.labels.astype(np.uint8).tobytes()).hexdigest() == expected[split]
    assert source[7].name == "sample:fashion test, row 7"
    with pytest.raises(UserError) as error:
        read_sample("cats", "train")
    one_sentence(error, "sample:cats", "sample:fashion")


def test_sample_script_is_reproducible_and_balanced(tmp_path: Path) -> None:
    # The real script on a small made-up original with the same four files.
    rng = np.random.default_rng(0)
    for name, each in (("train", 1010), ("t10k", 210)):
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), each))
        images = rng.integers(0, 256, (len(labels), 2, 2), dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
    script = Path(__file__).parents[1] / "scripts" / "make_fashion_sample.py"
    said = []
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
        run = [sys.executable, str(script), str(tmp_path), "--out", str(tmp_path / out)]
        said.append(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert said[0] == said[1]
    assert said[0].count("sha256") == 4
    import pyarrow.parquet as pq

    labels = pq.read_table(tmp_path / "one" / "fashion-train.parquet")["label"].to_numpy()
    assert np.bincount(labels).tolist() == [1000] * 10


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(12):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
    return tmp_path


ROWS = [(f"{number}.png", 10 if number % 2 else 9, "train" if number < 8 else "val") for number in range(12)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolon.csv", "json", "jsonl"])
def test_listing(pictures: Path, kind: str) -> None:
    file = pictures / f"list.{kind}"
    if kind.endswith("json"):
        file.write_text(json.dumps([{"File": a, "Target": b, "Split": c} for a, b, c in ROWS]))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"picture": a, "class": b, "split": c}) + "\n" for a, b, c in ROWS))
    else:
        mark = {"csv": ",", "tsv": "\t", "semicolon.csv": ";"}[kind]
        lines = [mark.join(("Image", "Label", "Split")), *(mark.join(map(str, row)) for row in ROWS)]
        file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found, notes = read_listing(file)
    assert notes == ()
    assert set(found) == {"train", "validation"}
    assert found["train"].classes == ("9", "10")
    assert found["train"].labels.tolist() == [0, 1] * 4
    sample = found["validation"][1]
    assert sample == Sample(str(pictures / "9.png"), pictures / "9.png", 1)
    assert decode(sample.picture, 1).getpixel((0, 0)) == 9


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", ("lists no pictures",)),
        ("a.csv", "image,label\n", ("lists no pictures",)),
        ("a.csv", "picture_id,colour\n0.png,red\n", ("no column of paths", "picture_id, colour")),
        ("a.csv", "path,colour\n0.png,red\n", ("no column of labels", "path, colour")),
        ("a.csv", "path,label\n0.png,\n", ("line 2", "label")),
        ("a.csv", "path,label\n0.png,a\n,b\n", ("line 3", "no path")),
        ("a.csv", "path,label,split\n0.png,a,learn\n", ("line 2", "'learn'")),
        ("a.csv", "path,label,split\n0.png,a,train\n1.png,b,test\n", ("'b'", "test")),
        ("a.csv", "path,label\nno.png,a\nnope.png,b\n", ("none exists", "no.png")),
        ("a.json", "{", ("cannot be read as JSON",)),
        ("a.json", '{"0.png": "cat"}', ("not a list of objects",)),
        ("a.json", '[{"path": "0.png", "label": ["a", "b"]}]', ("entry 1", "['a', 'b']")),
        ("a.jsonl", '{"path": "0.png", "label": 1}\n[2]\n', ("not a list of objects",)),
    ],
)
def test_bad_listing(pictures: Path, name: str, text: str, words: tuple[str, ...]) -> None:
    (pictures / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_listing(pictures / name)
    one_sentence(error, str(pictures / name), *words)


def test_listing_that_is_no_text(pictures: Path) -> None:
    (pictures / "a.csv").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_listing(pictures / "a.csv")


def test_listing_keeps_a_few_missing_files_to_be_named(pictures: Path) -> None:
    (pictures / "a.csv").write_text("path,label\n0.png,a\n1.png,b\nmissing.png,b\n")
    found, _ = read_listing(pictures / "a.csv")
    assert sizes(found["train"])[2] == -1
    assert walk(pictures, pictures).names[:3] == ["0.png", "1.png", "2.png"]
