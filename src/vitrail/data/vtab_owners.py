"""VTAB's sets in their owners' files, put into the order that TFDS would write them in.

Unusual: that order is the MD5 of the split's name and a key (data/tfds.py), and the keys are file names or row numbers. So
the first 800 of TFDS are found without it, wherever TFDS keeps the pixels as they are. It does not for Sun397 (shrunk) and
Retinopathy (processed), Camelyon's owners publish HDF5, and Caltech101's 30 pictures a class hang on the order in which
one computer listed a folder: these four need TFDS's files, or lists.

Keys and splits are those of TFDS's own readers, at the versions that VTAB names.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail.core.errors import UserError
from vitrail.core.types import Picture, Source
from vitrail.data import published, tfds
from vitrail.data.published import Keyed, PixelSource, files, matlab, within
from vitrail.data.records import open_records, read_example
from vitrail.data.sources import natural, subset
from vitrail.data.vtab import Task

Ordered = Mapping[str, tuple[int, Callable[[range], Source]]]
"""By TFDS's split: how many examples there are, and a source of a span of them, in the order of TFDS."""

KITTI_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
NORB = "smallnorb-5x{}x9x18x6x2x96x96-{}-{}.mat"
NORB_TYPES: dict[int, np.dtype[Any]] = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}


def find(task: Task, path: Path) -> tuple[Ordered, str] | None:
    """The splits in TFDS's order and where they are from; None where the owners' files are not there."""
    reader = READERS.get(task.folder)
    for folder in (path, *(path / name for name in (task.name, *task.names, task.folder))):
        if reader is not None and folder.is_dir() and (found := reader(task, folder)) is not None:
            return {split: _ordered(split, *each) for split, each in found.items()}, f"its owners' files, {folder}"
    return None


def _ordered(split: str, source: Source, keys: Sequence[str | int]) -> tuple[int, Callable[[range], Source]]:
    order = tfds.order(split, keys)
    return len(order), lambda span: subset(source, order[span.start : span.stop])


def numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def whiten(picture: bytes) -> Picture:
    """dSprites' pixels are 0 and 1; VTAB makes them 0 and 255."""
    return np.asarray(Image.open(BytesIO(picture)).convert("L")) * np.uint8(255)


def dtd(task: Task, path: Path) -> Keyed | None:
    """images/ and the first of ten partitions, labels/{train,val,test}1.txt."""
    root = within(path, "images", "labels/train1.txt", "labels/val1.txt", "labels/test1.txt", inside=("dtd",))
    if root is None:
        return None
    splits = {"train": "train1", "validation": "val1", "test": "test1"}
    names = {split: (root / "labels" / f"{name}.txt").read_text().split() for split, name in splits.items()}
    classes = sorted({name.split("/")[0] for each in names.values() for name in each})
    return {
        split: (files(root / "images", each, [classes.index(name.split("/")[0]) for name in each], classes), each)
        for split, each in names.items()
    }


def class_folders(task: Task, path: Path) -> Keyed | None:
    """EuroSAT's and Resisc45's folders, one a class; all is "train"."""
    inside = ("EuroSAT", "2750", "EuroSAT/2750", "EuroSAT_RGB") if task.folder == "eurosat" else ("NWPU-RESISC45",)
    for root in (path, *(path / name for name in inside)):
        folders = sorted((entry for entry in tfds.children(root)), key=lambda entry: natural(entry.name))
        found = [(folder.name, file.name) for folder in folders for file in sorted(folder.glob("*.jpg"))]
        if len({name for name, _ in found}) == task.classes:
            classes = sorted({name for name, _ in found})
            labels = [classes.index(name) for name, _ in found]
            source = files(root, [f"{name}/{file}" for name, file in found], labels, classes)
            return {"train": (source, [f"{name}_{file}" for name, file in found])}
    return None


def svhn(task: Task, path: Path) -> Keyed | None:
    """train_32x32.mat and test_32x32.mat: X (32, 32, 3, n) and y, where ten is the digit 0."""
    if within(path, "train_32x32.mat", "test_32x32.mat") is None:
        return None
    found = {}
    for split in ("train", "test"):
        file = path / f"{split}_32x32.mat"
        pixels = np.ascontiguousarray(matlab(file, "X").transpose(3, 0, 1, 2))
        labels = matlab(file, "y").ravel().astype(np.int64) % 10
        found[split] = PixelSource(str(file), pixels, labels, numbers(10)), range(len(labels))
    return found


def clevr(task: Task, path: Path) -> Keyed | None:
    """CLEVR_v1.0: images/{train,val}/ and scenes/CLEVR_{train,val}_scenes.json, of which the objects are read."""
    parts = {"train": "train", "validation": "val"}
    wanted = [f"scenes/CLEVR_{name}_scenes.json" for name in parts.values()]
    root = within(path, "images/train", "images/val", *wanted, inside=("CLEVR_v1.0",))
    if root is None:
        return None
    found = {}
    for split, name in parts.items():
        file = root / f"scenes/CLEVR_{name}_scenes.json"
        try:
            scenes = json.loads(file.read_text(encoding="utf-8"))["scenes"]
            names = [scene["image_filename"] for scene in scenes]
            labels = [
                task.rule(
                    {
                        "objects/size": [thing["size"] for thing in scene["objects"]],
                        "objects/pixel_coords": [thing["pixel_coords"] for thing in scene["objects"]],
                    }
                )
                for scene in scenes
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no CLEVR scenes file ({error!r}): unpack CLEVR_v1.0 anew.") from error
        found[split] = files(root / "images" / name, names, labels, numbers(task.classes)), names
    return found


def dmlab(task: Task, path: Path) -> Keyed | None:
    """dmlab-{train,validation,test}.tfrecord*, whose examples name themselves."""
    found: dict[str, tuple[Source, Sequence[str | int]]] = {}
    for split in ("train", "validation", "test"):
        shards = sorted(path.glob(f"dmlab-{split}.tfrecord*"))
        if not shards or tfds.described(path):
            return None
        records = open_records(shards)
        prepared = tfds.Prepared(path, "", {split: tuple(shards)}, {split: len(records)})
        span, classes = range(len(records)), numbers(task.classes)
        source = tfds.source(prepared, records, span, task.rule, task.features, classes)
        keys = [read_example(records.peek(i), ("filename",)).get("filename", [b""])[0].decode() for i in span]
        found[split] = source, keys
    return found


def dsprites(task: Task, path: Path) -> Keyed | None:
    """dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz: imgs (n, 64, 64) of 0 and 1; latents_classes (n, 6)."""
    file = next(iter(sorted(path.glob("dsprites_ndarray_*.npz"))), None)
    if file is None:
        return None
    try:
        with np.load(file, allow_pickle=False) as held:
            pixels, latents = held["imgs"], held["latents_classes"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read as dSprites ({error}): fetch it anew.") from error
    # Columns: colour, shape, scale, orientation, x, y.
    labels = [task.rule({"label_orientation": [row[3]], "label_x_position": [row[4]]}) for row in latents.tolist()]
    pixels *= np.uint8(255)
    source = PixelSource(str(file), pixels, np.array(labels, np.int64), numbers(task.classes))
    return {"train": (source, range(len(labels)))}


def kitti(task: Task, path: Path) -> Keyed | None:
    """training/image_2, training/label_2, and the devkit's mapping/, by whose videos TFDS splits."""
    root = within(path, "training/image_2", "training/label_2")
    devkit = within(path, "mapping/train_rand.txt", "mapping/train_mapping.txt", inside=("devkit", "devkit_object"))
    if root is None or devkit is None:
        return None
    chosen = [int(word) - 1 for word in (devkit / "mapping/train_rand.txt").read_text().split(",") if word.strip()]
    lines = (devkit / "mapping/train_mapping.txt").read_text().splitlines()
    videos: dict[str, list[int]] = defaultdict(list)
    for picture, line in enumerate(chosen):
        videos[lines[line].split(" ")[1]].append(picture)
    tenth = max(1, 10 * len(videos) // 100)
    # NumPy's old generator and this seed are TFDS's; its stream is frozen.
    random = np.random.RandomState(123)
    test = set(random.choice(sorted(videos), tenth, replace=False).tolist())
    validation = set(random.choice(sorted(set(videos) - test), tenth, replace=False).tolist())
    found = {}
    for split in ("train", "validation", "test"):
        mine = [
            number
            for video, each in videos.items()
            for number in each
            if split == ("test" if video in test else "validation" if video in validation else "train")
        ]
        names = [f"{number:06}.png" for number in sorted(mine)]
        labels = [task.rule(kitti_objects(root / "training/label_2" / f"{name[:6]}.txt")) for name in names]
        found[split] = files(root / "training/image_2", names, labels, numbers(task.classes)), names
    return found


def kitti_objects(file: Path) -> Mapping[str, Any]:
    """A label file: an object a line, its type first and its place (x, y, z) in metres 12th to 14th; DontCare is none."""
    try:
        rows = [line.split(" ") for line in file.read_text().splitlines() if not line.startswith("DontCare")]
        return {
            "objects/type": [KITTI_TYPES.index(row[0]) for row in rows],
            "objects/location": [float(word) for row in rows for word in row[11:14]],
        }
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read as a KITTI label file ({error}): unpack data_object_label_2 anew."
        ) from error


def norb(task: Task, path: Path) -> Keyed | None:
    """The smallnorb-*.mat files, gzipped or not: pictures (n, 2, 96, 96), whose left ones are used, and what they show."""
    found: dict[str, tuple[Source, Sequence[str | int]]] = {}
    for split, instances, word in (("train", "46789", "training"), ("test", "01235", "testing")):
        held = []
        for part in ("dat", "info"):
            plain = path / NORB.format(instances, word, part)
            file = plain if plain.exists() else plain.with_name(f"{plain.name}.gz")
            if not file.exists():
                return None
            held.append(norb_matrix(file))
        pixels, info = held
        # Columns: instance, elevation 0 to 8, azimuth 0 to 34 in twos, lighting.
        labels = [task.rule({"label_elevation": [row[1]], "label_azimuth": [row[2] // 2]}) for row in info.tolist()]
        source = PixelSource(
            f"smallnorb {word}", np.ascontiguousarray(pixels[:, 0]), np.array(labels), numbers(task.classes)
        )
        found[split] = source, range(len(labels))
    return found


def norb_matrix(file: Path) -> np.ndarray:
    """NORB's binary matrices: a number for the type, the number of dimensions, at least three sizes, and the numbers."""
    raw = gzip.open(file).read() if file.suffix == ".gz" else file.read_bytes()  # noqa: SIM115, closed with the object
    head = np.frombuffer(raw[:8], "<i4")
    kind = NORB_TYPES.get(int(head[0])) if head.size == 2 else None
    if kind is None or not 1 <= head[1] <= 4:
        raise UserError(f"{file} is no matrix of smallNORB: fetch it anew.")
    dimensions = int(head[1])
    shape = np.frombuffer(raw, "<i4", dimensions, 8)
    start = 8 + 4 * max(3, dimensions)
    if len(raw) != start + int(np.prod(shape)) * kind.itemsize:
        raise UserError(
            f"{file} has {len(raw):,} bytes, which its sizes {shape.tolist()} do not ask for: fetch it anew."
        )
    return np.frombuffer(raw, kind, offset=start).reshape(shape)


READERS: dict[str, Callable[[Task, Path], Keyed | None]] = {
    "cifar100": lambda task, path: published.cifar(path, 100),
    "oxford_flowers102": lambda task, path: published.flowers(path),
    "oxford_iiit_pet": lambda task, path: published.pets(path),
    **{"dtd": dtd, "eurosat": class_folders, "resisc45": class_folders, "svhn_cropped": svhn, "clevr": clevr},
    **{"dmlab": dmlab, "dsprites": dsprites, "kitti": kitti, "smallnorb": norb},
}
"""By TFDS's name of the set."""
