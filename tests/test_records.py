"""TFRecord files and TFDS folders. fixtures/tfds was written by tensorflow-datasets 4.9.10 with TensorFlow 2.21 (make.py
beside it), and truth.json is what TFDS itself reads from it."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.core.checksums import crc32c, crc32c_of_file
from vitrail.core.errors import UserError
from vitrail.data import tfds
from vitrail.data.decode import UnreadablePicture
from vitrail.data.records import open_records, read_example, write_example, write_records

FIXTURE = Path(__file__).parent / "fixtures/tfds"
TINY = FIXTURE / "tiny/3.1.0"


def test_crc_is_castagnolis(tmp_path: Path) -> None:
    """RFC 3720, appendix B.4; and the other implementation of the house, around the ends of blocks."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0
    for length in (1, 3, 4, 5, 4095, 4096, 4097, 4099, 4100, 20_000):
        data = np.random.default_rng(length).bytes(length)
        (tmp_path / "file").write_bytes(data)
        assert crc32c(data) == int.from_bytes(crc32c_of_file(tmp_path / "file"), "big")


def test_reads_what_tfds_reads() -> None:
    """Every feature of every record, in TFDS's order, over three shards."""
    names = ("file_name", "label", "neg", "objects/size", "objects/pixel_coords", "image")
    truth = json.loads((FIXTURE / "truth.json").read_text())
    prepared = tfds.find(FIXTURE, "tiny")
    assert prepared is not None
    assert prepared.counts == {"train": 60, "test": 7}
    assert prepared.names("label", 3) == ("a", "b", "c")
    for split in ("train", "test"):
        records, expected = prepared.records(split), [row for row in truth if row[0] == split]
        assert len(records) == len(expected)
        for index, (_, name, label, negative, sizes, coordinates, total) in enumerate(expected):
            found = read_example(records.read(index), names)
            assert found["file_name"] == [name.encode()]
            assert (int(found["label"][0]), int(found["neg"][0])) == (label, negative)
            assert list(found["objects/size"]) == sizes
            assert np.array_equal(
                np.array(found["objects/pixel_coords"], np.float32).reshape(-1, 3).tolist(), coordinates
            )
            assert np.asarray(Image.open(BytesIO(found["image"][0]))).astype(int).sum() == total
        keys = [f"f{number}.png" for number in range(len(expected))]
        assert [keys[place] for place in tfds.order(split, keys)] == [row[1] for row in expected]


def test_writes_what_tensorflow_writes(tmp_path: Path) -> None:
    """Records and both checksums, byte for byte; an Example survives writing and reading."""
    for file in TINY.glob("*.tfrecord*"):
        records = open_records([file])
        write_records(tmp_path / "again", [records.read(index) for index in range(len(records))])
        assert (tmp_path / "again").read_bytes() == file.read_bytes()
    features = {"image": [b"ab", b""], "label": np.array([3, -1]), "depth": np.array([0.5, 8.0], np.float32)}
    found = read_example(write_example(features), tuple(features))
    assert found["image"] == [b"ab", b""]
    assert found["label"].tolist() == [3, -1]
    assert found["depth"].tolist() == [0.5, 8.0]


@pytest.mark.parametrize("form", ["/", "/tiny", "/tiny/3.1.0"])
def test_source_labels_and_finds_the_folder(form: str) -> None:
    prepared = tfds.find(Path(f"{FIXTURE}{form}"), "tiny")
    assert prepared is not None
    records = prepared.records("train")
    source = tfds.source(prepared, records, range(18, 43), lambda x: int(x["label"][0]), ("label",), ("a", "b", "c"))
    truth = [row for row in json.loads((FIXTURE / "truth.json").read_text()) if row[0] == "train"]
    assert source.labels.tolist() == [row[2] for row in truth[18:43]]
    assert source.key(1) == "tiny-train.tfrecord-00000-of-00003, record 19"
    assert source.key(2) == "tiny-train.tfrecord-00001-of-00003, record 0"
    for index in (0, 1, 2, 24):
        picture = source[index].picture
        assert isinstance(picture, bytes)
        assert np.asarray(Image.open(BytesIO(picture))).astype(int).sum() == truth[18 + index][6]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "tiny/3.1.0"
    shutil.copytree(TINY, folder)
    shard = folder / "tiny-train.tfrecord-00001-of-00003"
    whole = bytearray(shard.read_bytes())
    prepared = tfds.find(tmp_path, "tiny")
    assert prepared is not None
    whole[40] ^= 1  # in the first record's own bytes
    shard.write_bytes(whole)
    with pytest.raises(UnreadablePicture, match=r"00001-of-00003, record 0 is damaged"):
        prepared.records("train").read(20)
    assert prepared.records("train").read(21)
    shard.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="ends inside a record"):
        prepared.records("train")
    whole[1] ^= 1  # a length
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=r"ends inside a record|checksum"):
        prepared.records("train")
    shard.write_bytes(b"")
    with pytest.raises(UserError, match=r"has 40 records of train where dataset_info\.json counts 60"):
        prepared.records("train")
    shard.unlink()
    with pytest.raises(UserError, match="00001-of-00003 is missing"):
        prepared.records("train")
    described = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**described, "fileFormat": "array_record"}))
    with pytest.raises(UserError, match="prepare it as tfrecord"):
        tfds.find(tmp_path, "tiny")
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="no description of a prepared TFDS set"):
        tfds.find(tmp_path, "tiny")


def test_newest_of_the_right_version(tmp_path: Path) -> None:
    for version in ("3.0.9", "3.0.10", "4.0.0"):
        shutil.copytree(TINY, tmp_path / "tiny" / version)
        file = tmp_path / "tiny" / version / "dataset_info.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": version}))
    for majors, version in (((3,), "3.0.10"), ((), "4.0.0"), ((7,), "4.0.0")):
        prepared = tfds.find(tmp_path, "tiny", "", majors)
        assert prepared is not None
        assert prepared.version == version
    assert tfds.find(tmp_path, "tiny", "rgb") is None
    assert tfds.find(tmp_path, "other") is None
