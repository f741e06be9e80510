"""VTAB's rules against plain re-derivations, and its draws from lists, TFDS's folders and the owners' files.

That the owners' files of 15 tasks give what TFDS's own readers give is bench/vtab_oracle.py's to show, where TFDS is.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import benchmark_files as made
import numpy as np
import pytest
from PIL import Image

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source
from vitrail.data import splits, vtab, vtab_sample
from vitrail.data.decode import decode
from vitrail.data.records import Feature, write_example, write_records
from vitrail.experiments.paper_results import TABLE_9, VTAB_TASKS


def test_the_nineteen() -> None:
    """Counts, groups, classes and order of the paper's Table 9 (facts of task_adaptation)."""
    assert tuple(f"vtab/{name}" for name in vtab.TASKS) == VTAB_TASKS
    groups = [task.group for task in vtab.TASKS.values()]
    assert [groups.count(name) for name in ("natural", "specialized", "structured")] == [7, 4, 8]
    classes = [102, 100, 47, 102, 37, 397, 10, 2, 10, 45, 5, 8, 6, 6, 16, 16, 4, 18, 9]
    assert [task.classes for task in vtab.TASKS.values()] == classes
    assert all(len(row) == 19 for row in TABLE_9.values())


def test_clevr_rules() -> None:
    """Any number of objects and any depth, thresholds themselves among them: strictly below counts."""
    random = np.random.default_rng(0)
    thresholds = [0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0]
    for _ in range(500):
        count = int(random.integers(3, 11))
        depths = random.choice([8.0, 8.5, 9.0, 9.5, 10.0, random.uniform(5, 14)], count)
        coordinates = np.stack([random.uniform(0, 480, count), random.uniform(0, 320, count), depths], axis=1)
        x = {"objects/size": np.zeros(count, int), "objects/pixel_coords": coordinates.astype(np.float32).ravel()}
        assert vtab.clevr_count(x) == count - 3
        nearest = np.float32(min(depths))
        expected = max(place for place, threshold in enumerate(thresholds) if np.float32(threshold) < nearest)
        assert vtab.clevr_distance(x) == expected
        assert 0 <= expected < 6


def test_kitti_rule() -> None:
    """Cars, vans and trucks alone; none is the fourth class; behind the camera counts too."""
    random, seen = np.random.default_rng(1), set()
    for _ in range(500):
        count = int(random.integers(0, 5))
        kinds = random.integers(0, 8, count)
        depths = random.choice([8.0, 20.0, -3.0, random.uniform(0, 80)], count).astype(np.float32)
        places = np.stack([random.normal(size=count), random.normal(size=count), depths], axis=1).astype(np.float32)
        found = vtab.kitti_distance({"objects/type": kinds, "objects/location": places.ravel()})
        vehicles = [depth for kind, depth in zip(kinds, depths, strict=True) if kind in (0, 1, 2)]
        expected = 3 if not vehicles else 0 if min(vehicles) <= 8 else 1 if min(vehicles) <= 20 else 2
        assert found == expected
        seen.add(found)
    assert seen == {0, 1, 2, 3}
    assert vtab.kitti_distance({"objects/type": [], "objects/location": []}) == 3


def test_dsprites_and_norb_rules() -> None:
    """Floor division by 40 / 16 = 2.5 in fp32, as TensorFlow does it; and by 2."""
    for value in range(40):
        expected = int(np.floor_divide(np.float32(value), np.float32(2.5)))
        assert vtab.dsprites_orientation({"label_orientation": [value]}) == expected
    found = [vtab.dsprites_orientation({"label_orientation": [value]}) for value in range(40)]
    assert np.bincount(found).tolist() == [3, 2] * 8
    for value in range(32):
        assert vtab.dsprites_location({"label_x_position": [value]}) == value // 2
    assert [vtab.norb_azimuth({"label_azimuth": [value]}) for value in range(18)] == list(range(18))
    assert [vtab.norb_elevation({"label_elevation": [value]}) for value in range(9)] == list(range(9))


def pixels(source: Source, index: int) -> np.ndarray:
    return np.asarray(decode(source[index].picture))


def png(array: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def prepare(root: Path, name: str, version: str, rows: dict[str, list[tuple[str, dict[str, Feature]]]]) -> Path:
    """A folder as TFDS prepares it: examples by key, in the order of the MD5 of split and key, in two shards."""
    folder = root / name / version
    folder.mkdir(parents=True)
    described = []
    for split, examples in rows.items():
        ordered = sorted(examples, key=lambda pair: hashlib.md5(f"{split}{pair[0]}".encode()).hexdigest())
        shards = [ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]]
        for number, shard in enumerate(shards):
            file = folder / f"{name.split('/')[0]}-{split}.tfrecord-{number:05}-of-00002"
            write_records(file, [write_example(features) for _, features in shard])
        described.append({"name": split, "shardLengths": [str(len(shard)) for shard in shards]})
    info = {"name": name.split("/")[0], "version": version, "splits": described, "fileFormat": "tfrecord"}
    if "/" in name:
        info["configName"] = name.split("/")[1]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def same(first: Source, second: Source) -> bool:
    equal = len(first) == len(second) > 0 and first.labels.tolist() == second.labels.tolist()
    return equal and all(np.array_equal(pixels(first, i), pixels(second, i)) for i in range(0, len(first), 7))


@pytest.mark.parametrize("task", ["snorb-azim", "snorb-elev"])
def test_owners_files_give_tfds_order(tmp_path: Path, task: str) -> None:
    """sNORB: all of train, the first half of test, and its second half."""
    owned = made.norb(tmp_path / "files/smallnorb", 60, 40)
    ours = vtab_sample.find(vtab.TASKS[task], tmp_path / "files")
    assert ours is not None
    assert (len(ours.train), len(ours.validation), len(ours.test)) == (60, 20, 20)
    assert ours.sample == "not VTAB-1k's sample (train has 60 pictures in place of 24,300)"
    from vitrail.data.vtab_owners import NORB, norb_matrix

    rows = {}
    for split, instances, word in (("train", "46789", "training"), ("test", "01235", "testing")):
        left = norb_matrix(owned / f"{NORB.format(instances, word, 'dat')}.gz")[:, 0]
        info = norb_matrix(owned / f"{NORB.format(instances, word, 'info')}.gz")
        rows[split] = [
            (
                str(number),
                {
                    "image": [png(left[number])],
                    "label_elevation": np.array([info[number, 1]]),
                    "label_azimuth": np.array([info[number, 2] // 2]),
                },
            )
            for number in range(len(left))
        ]
    prepare(tmp_path / "tfds", "smallnorb", "2.0.0", rows)
    theirs = vtab_sample.find(vtab.TASKS[task], tmp_path / "tfds")
    assert theirs is not None
    assert theirs.origin.startswith("TFDS, ")
    for split in ("train", "validation", "test"):
        assert same(getattr(ours, split), getattr(theirs, split))
    column, divisor = (2, 2) if task == "snorb-azim" else (1, 1)
    training = norb_matrix(owned / f"{NORB.format('46789', 'training', 'info')}.gz")[:, column] // divisor
    order = sorted(range(60), key=lambda number: hashlib.md5(f"train{number}".encode()).hexdigest())
    assert ours.train.labels.tolist() == [int(training[number]) for number in order]


def test_dsprites_both_ways(tmp_path: Path) -> None:
    """80/10/10 of one split; 0 and 1 become 0 and 255."""
    owned = made.dsprites(tmp_path / "dsprites", 100)
    with np.load(next(owned.glob("*.npz"))) as held:
        images, latents = held["imgs"], held["latents_classes"]
    rows = [
        (str(i), {"image": [png(images[i])], "label_orientation": latents[i, 3:4], "label_x_position": latents[i, 4:5]})
        for i in range(100)
    ]
    prepare(tmp_path / "tfds", "dsprites", "2.0.0", {"train": rows})
    for task in ("dspr-loc", "dspr-ori"):
        ours, theirs = (vtab_sample.find(vtab.TASKS[task], root) for root in (tmp_path, tmp_path / "tfds"))
        assert ours is not None
        assert theirs is not None
        assert (len(ours.train), len(ours.validation), len(ours.test)) == (80, 10, 10)
        assert all(same(getattr(ours, part), getattr(theirs, part)) for part in ("train", "validation", "test"))
        assert set(np.unique(pixels(theirs.train, 0))) == {0, 255}


SLICES = {
    # Of each set with its true counts: TFDS's slices of the 200 and of the test pictures.
    "caltech101": ("train", 2754, "test", 0),
    "cifar100": ("train", 45_000, "test", 0),
    "pets": ("train", 2944, "test", 0),
    "svhn": ("train", 65_931, "test", 0),
    **dict.fromkeys(("dtd", "flowers", "sun397", "camelyon"), ("validation", 0, "test", 0)),
    **dict.fromkeys(("retinopathy", "dmlab", "kitti-dist"), ("validation", 0, "test", 0)),
    "eurosat": ("train", 16_200, "train", 21_600),
    "resisc45": ("train", 18_900, "train", 25_200),
    **dict.fromkeys(("clevr-count", "clevr-dist"), ("train", 63_000, "validation", 0)),
    **dict.fromkeys(("dspr-loc", "dspr-ori"), ("train", 589_824, "train", 663_552)),
    **dict.fromkeys(("snorb-azim", "snorb-elev"), ("test", 0, "test", 12_150)),
}


@pytest.mark.parametrize("name", vtab.TASKS)
def test_the_sample_is_cut_and_recognised(name: str) -> None:
    """At the true counts: train[:800] + val[:200], and the whole test split; with a picture less it is another sample."""
    task = vtab.TASKS[name]

    def ordered(counts: dict[str, int]) -> dict[str, tuple[int, Callable[[range], Source]]]:
        return {split: (count, lambda span, split=split: Span(split, span)) for split, count in counts.items()}

    draw = vtab_sample._draw(task, ordered(dict(task.counts)), "here")
    assert draw.sample == "VTAB-1k's sample"
    validation, start, test, first = SLICES[name]
    assert draw.train == Span("train", range(800))
    assert draw.validation == Span(validation, range(start, start + 200))
    assert draw.test == Span(test, range(first, task.counts[test]))
    less = vtab_sample._draw(task, ordered({**task.counts, "train": task.counts["train"] - 1}), "here")
    assert less.sample.startswith("not VTAB-1k's sample (train has ")


@dataclass(frozen=True)
class Span:
    """In place of a source: what was asked for."""

    split: str
    span: range
    classes: tuple[str, ...] = ()
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False)
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int) -> Sample:
        raise IndexError(index)


def test_another_version_is_another_sample(tmp_path: Path) -> None:
    examples: list[tuple[str, dict[str, Feature]]] = [
        (f"{i}", {"image": [b""], "label": np.array([i])}) for i in range(4)
    ]
    rows = dict.fromkeys(("train", "validation", "test"), examples)
    prepare(tmp_path, "oxford_flowers102", "9.0.0", rows)
    other = vtab_sample.find(vtab.TASKS["flowers"], tmp_path)
    assert other is not None
    assert other.sample == "not VTAB-1k's sample (TFDS's version 9.0.0 is not 2.*)"
    names = [other.both[place].name for place in (0, 5, -1)]
    assert names == [other.train[0].name, other.validation[1].name, other.validation[3].name]


def test_sets_with_a_configuration(tmp_path: Path) -> None:
    rows = [(f"{i}", {"image": [png(np.full((4, 4, 3), i, np.uint8))], "label": np.array([i % 10])}) for i in range(50)]
    prepare(tmp_path, "eurosat/rgb", "2.0.0", {"train": rows})
    found = vtab_sample.find(vtab.TASKS["eurosat"], tmp_path)
    assert found is not None
    assert (len(found.train), len(found.validation), len(found.test)) == (30, 10, 10)
    prepare(tmp_path / "wrong", "eurosat/all", "2.0.0", {"train": rows})
    assert vtab_sample.find(vtab.TASKS["eurosat"], tmp_path / "wrong") is None


def test_owners_rules_on_owners_files(tmp_path: Path) -> None:
    """CLEVR's scenes and KITTI's label files, re-derived from their text."""
    root = made.clevr(tmp_path / "clevr/CLEVR_v1.0", 30, 10)
    scenes = {
        s["image_filename"]: s for s in json.loads((root / "scenes/CLEVR_train_scenes.json").read_text())["scenes"]
    }
    count, distance = (vtab_sample.find(vtab.TASKS[name], tmp_path) for name in ("clevr-count", "clevr-dist"))
    assert count is not None
    assert distance is not None
    for draw, rule in (
        (count, lambda depths: len(depths) - 3),
        (distance, lambda depths: sum(min(depths) > edge for edge in (8.0, 8.5, 9.0, 9.5, 10.0))),
    ):
        assert len(draw.train) == 27
        for index in range(len(draw.train)):
            sample = draw.train[index]
            objects = scenes[Path(str(sample.picture)).name]["objects"]
            assert sample.label == rule([thing["pixel_coords"][2] for thing in objects])
    made.kitti(tmp_path / "kitti", 60, 20)
    kitti = vtab_sample.find(vtab.TASKS["kitti-dist"], tmp_path)
    assert kitti is not None
    assert len(kitti.train) + len(kitti.validation) + len(kitti.test) == 60
    for index in range(len(kitti.train)):
        sample = kitti.train[index]
        lines = (tmp_path / "kitti/training/label_2" / f"{Path(str(sample.picture)).stem}.txt").read_text().splitlines()
        near = min(
            [float(line.split()[13]) for line in lines if line.split()[0] in ("Car", "Van", "Truck")], default=1000.0
        )
        assert sample.label == (near > 8) + (near > 20) + (near > 999)


def test_lists(tmp_path: Path) -> None:
    """The layout in which VTAB-1k is handed around: pictures, and a line a picture with its label."""
    folder = tmp_path / "dsprites_ori"
    random = np.random.default_rng(0)
    for part, size in (("train800val200", 1000), ("test", 30)):
        for number in range(3):
            made.picture(folder / f"images/{part}/{number:06}.jpg", random)
        lines = [f"images/{part}/{number % 3:06}.jpg {number % 16}\n" for number in range(size)]
        made.write(folder / f"{part}.txt", "".join(lines))
    found, notes = splits.read(f"vtab/dspr-ori:{tmp_path}")
    assert (len(found["train"]), len(found["test"])) == (1000, 30)
    assert notes == (f"dSpr-Ori: lists, {folder}; VTAB-1k's sample, as its lists have it.",)
    assert found["train"].labels[:20].tolist() == [number % 16 for number in range(20)]
    assert pixels(found["test"], 1).shape == (12, 10, 3)
    opened = splits.open_data(f"vtab/dspr-ori:{folder}", validation=0.0)
    assert len(opened.train) == 1000
    made.write(folder / "train800val200.txt", "images/train800val200/000000.jpg 1\n" * 10)
    draw = vtab_sample.find(vtab.TASKS["dspr-ori"], folder)
    assert draw is not None
    assert draw.sample == "not VTAB-1k's sample (train800val200.txt has 10 lines)"
    assert (len(draw.train), len(draw.validation)) == (8, 2)
    made.write(folder / "test.txt", "images/a.jpg 16\n")
    with pytest.raises(UserError, match=r"test\.txt, line 1, is 'images/a\.jpg 16'.*label from 0 to 15"):
        splits.read(f"vtab/dspr-ori:{folder}")


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no files of EuroSAT: prepare TFDS's eurosat/rgb there.*github\.com/phelber"
    ):
        splits.read(f"vtab/eurosat:{tmp_path}")
    with pytest.raises(UserError, match="vtab/snorb is no task of VTAB-1k; the nearest is vtab/snorb-"):
        splits.read(f"vtab/snorb:{tmp_path}")
    folder = made.norb(tmp_path / "smallnorb", 4, 4, zipped=False)
    file = next(folder.glob("*training-dat*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"which its sizes .* do not ask for"):
        vtab_sample.find(vtab.TASKS["snorb-azim"], tmp_path)
    file.write_bytes(b"12345678")
    with pytest.raises(UserError, match="is no matrix of smallNORB"):
        vtab_sample.find(vtab.TASKS["snorb-azim"], tmp_path)
    made.clevr(tmp_path / "clevr", 4, 4)
    (tmp_path / "clevr/scenes/CLEVR_val_scenes.json").write_text('{"scenes": [{}]}')
    with pytest.raises(UserError, match="is no CLEVR scenes file"):
        vtab_sample.find(vtab.TASKS["clevr-dist"], tmp_path)
    prepare(tmp_path, "patch_camelyon", "2.0.0", {"train": [("a", {"image": [b""]}), ("b", {"image": [b""]})]})
    with pytest.raises(UserError, match="has no split test, validation; prepare it again"):
        vtab_sample.find(vtab.TASKS["camelyon"], tmp_path)
    rows: list[tuple[str, dict[str, Feature]]] = [("a", {"image": [b""]}), ("b", {"image": [b""]})]
    prepare(tmp_path / "more", "patch_camelyon", "2.0.0", {"train": rows, "validation": rows, "test": rows})
    with pytest.raises(UserError, match=r"record 0 has no label \(KeyError"):
        vtab_sample.find(vtab.TASKS["camelyon"], tmp_path / "more")
