"""CIFAR, Pets and Flowers in the layouts of their owners, and the unpickler that trusts nothing."""

import os
import pickle
from pathlib import Path

import benchmark_files as made
import numpy as np
import pytest
from PIL import Image

from vitrail.core.errors import UserError
from vitrail.data import published, splits


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["binary", "python", "python of Python 3"])
def test_cifar(tmp_path: Path, classes: int, version: str) -> None:
    """Against the rows that were written, for both versions; the "python" one as Python 2 and as Python 3 pickle it."""
    inside = {
        "binary": {10: "cifar-10-batches-bin", 100: "cifar-100-binary"},
        "python": {10: "cifar-10-batches-py", 100: "cifar-100-python"},
    }
    folder = tmp_path / inside[version.split()[0]][classes]
    if version == "binary":
        made.cifar_binary(folder, classes)
    else:
        made.cifar_python(folder, classes, 6, made.Python2Pickle if version == "python" else pickle._Pickler)
    found, notes = splits.read(f"cifar{classes}:{tmp_path}")
    assert notes == ()
    assert found["train"].classes == found["test"].classes == tuple(f"thing{number}" for number in range(classes))
    for split, seeds in (("train", range(5)), ("test", [5])) if classes == 10 else (("train", [0]), ("test", [1])):
        rows = [made.cifar_rows(6, classes, seed) for seed in seeds]
        pixels, labels = np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])
        source = found[split]
        assert source.labels.tolist() == labels.tolist()
        for index in (0, len(source) - 1):
            sample = source[index]
            assert isinstance(sample.picture, np.ndarray)
            assert sample.label == labels[index]
            for y, x, channel in ((0, 0, 0), (3, 30, 1), (31, 31, 2)):
                assert sample.picture[y, x, channel] == pixels[index, channel * 1024 + y * 32 + x]
    opened = splits.open_data(f"cifar{classes}:{tmp_path}", validation=0.0)
    assert (len(opened.train), opened.validation) == (len(found["train"]), None)


class Run:
    """What a malicious file would do: run a program on being opened."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.plan = function, arguments

    def __reduce__(self) -> object:
        return self.plan


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch MARK",), "system"),
        (eval, ("__import__('os').system('touch MARK')",), r"(builtins|__builtin__)\.eval"),
        (np.load, ("MARK",), "load"),
        (getattr, (os, "system"), "getattr"),
        (__import__, ("os",), "__import__"),
    ],
)
def test_malicious_pickle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: object, arguments: tuple[object, ...], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = made.cifar_python(tmp_path / "cifar", 10)
    plain = tuple(word for word in arguments if isinstance(word, str))
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Run(function, *plain), "labels": [1]}, protocol=2))
    with pytest.raises(UserError, match=rf"data_batch_3 asks for \S*{named}, which no CIFAR file does"):
        published.cifar(folder, 10)
    assert not (tmp_path / "MARK").exists()


def test_only_bytes_become_arrays(tmp_path: Path) -> None:
    """Arrays of objects, and numbers that claim a shape they do not have, are damaged files; nothing is allocated."""
    folder = made.cifar_python(tmp_path / "cifar", 10)
    for held in (np.array([object], dtype=object), np.zeros(3072), b"no dictionary", {"data": np.zeros(9, np.uint8)}):
        data = held if isinstance(held, (bytes, dict)) else {"data": held, "labels": [0]}
        (folder / "test_batch").write_bytes(pickle.dumps(data, protocol=2))
        with pytest.raises(UserError, match=r"test_batch (asks for|cannot be read|is no file of CIFAR-10)"):
            published.cifar(folder, 10)
    whole = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}, protocol=2)
    (folder / "test_batch").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="test_batch cannot be read"):
        published.cifar(folder, 10)
    (folder / "test_batch").write_bytes(whole.replace(b"M\x00\x0c", b"M\xff\xff", 1))  # a shape of (1, 65535)
    with pytest.raises(UserError, match="test_batch cannot be read"):
        published.cifar(folder, 10)


def test_pets(tmp_path: Path) -> None:
    found, _ = splits.read(f"pets:{made.pets(tmp_path / 'pets')}")
    train, test = found["train"], found["test"]
    assert train.classes == ("Abyssinian", "american_bulldog", "Bengal")
    assert train.labels.tolist() == [0, 1, 2] * 3
    assert test.labels.tolist() == [0, 1, 2, 0]
    picture = train[4].picture
    assert isinstance(picture, Path)
    assert picture.name == "american_bulldog_4.jpg"
    assert Image.open(picture).size == (10, 12)


def test_flowers(tmp_path: Path) -> None:
    """setid.mat's numbers say which pictures a split has, imagelabels.mat's what they show, both counting from 1."""
    from scipy.io import loadmat

    root = made.flowers(tmp_path / "flowers")
    found, _ = splits.read(f"flowers:{root}")
    labels, sets = loadmat(root / "imagelabels.mat")["labels"][0], loadmat(root / "setid.mat")
    for split, name in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        source = found[split]
        assert source.labels.tolist() == [int(labels[number - 1]) - 1 for number in sets[name][0]]
        assert source[0].name.endswith(f"image_{sets[name][0][0]:05}.jpg")
        assert len(source.classes) == 102
    (root / "setid.mat").write_bytes(b"no MATLAB")
    with pytest.raises(UserError, match=r"setid\.mat cannot be read as a MATLAB file"):
        splits.read(f"flowers:{root}")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for name, said in (
        ("cifar10", "binary or the python version"),
        ("pets", "images/ and annotations/"),
        ("flowers", "jpg/"),
    ):
        with pytest.raises(UserError, match=f"{said}.*it holds nothing"):
            splits.read(f"{name}:{tmp_path}")
    with pytest.raises(UserError, match="does not exist"):
        splits.read(f"cifar100:{tmp_path / 'nowhere'}")
    (tmp_path / "cifar-10-batches-bin").mkdir()
    made.cifar_binary(tmp_path / "ten", 10)
    (tmp_path / "ten/data_batch_2.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"data_batch_2\.bin is 5 bytes"):
        splits.read(f"cifar10:{tmp_path / 'ten'}")
    made.pets(tmp_path / "pets")
    (tmp_path / "pets/annotations/test.txt").write_text("Bengal one\n")
    with pytest.raises(UserError, match="has the line 'Bengal one'"):
        splits.read(f"pets:{tmp_path / 'pets'}")
