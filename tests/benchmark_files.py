"""Small sets in the layouts that their owners publish, for the readers of data/ and for bench/vtab_oracle.py.

Nothing here imports vitrail, so that it runs where TFDS is installed.
"""

import gzip
import json
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

Random = np.random.Generator


def picture(file: Path, random: Random, size: tuple[int, int] = (12, 10), **options: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, **options)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def cifar_rows(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (count, 3072), a colour after the other, and labels."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), random.integers(0, classes, count)


def cifar_binary(root: Path, classes: int, count: int = 6) -> Path:
    root.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for seed, name in enumerate(names if classes == 10 else ["train.bin", "test.bin"]):
        pixels, labels = cifar_rows(count, classes, seed)
        columns = [labels[:, None]] if classes == 10 else [labels[:, None] // 5, labels[:, None]]
        np.concatenate([*columns, pixels], axis=1).astype(np.uint8).tofile(root / name)
    if classes == 10:
        write(root / "batches.meta.txt", "".join(f"thing{i}\n" for i in range(10)) + "\n")
    else:
        write(root / "fine_label_names.txt", "".join(f"thing{i}\n" for i in range(100)))
        write(root / "coarse_label_names.txt", "".join(f"kind{i}\n" for i in range(20)))
    return root


class Python2Pickle(pickle._Pickler):
    """Writes text as Python 2 wrote its strings, which is what CIFAR's files hold."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_str(self, text: object) -> None:
        raw = text if isinstance(text, bytes) else str(text).encode("latin1")
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(text)

    dispatch[str] = save_str
    dispatch[bytes] = save_str


def cifar_python(root: Path, classes: int, count: int = 6, pickler: type = Python2Pickle) -> Path:
    """As cs.toronto.edu has it: pickle protocol 2 of Python 2, strings as bytes, an array of uint8."""
    root.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    label = "labels" if classes == 10 else "fine_labels"
    for seed, name in enumerate(names if classes == 10 else ["train", "test"]):
        pixels, labels = cifar_rows(count, classes, seed)
        held = {"data": pixels, label: labels.tolist(), "batch_label": "a batch", "filenames": ["a.png"] * count}
        with (root / name).open("wb") as file:
            pickler(file, protocol=2).dump(held)
    with (root / ("batches.meta" if classes == 10 else "meta")).open("wb") as file:
        named = {"label_names" if classes == 10 else "fine_label_names": [f"thing{i}" for i in range(classes)]}
        pickler(file, protocol=2).dump(named)
    return root


def pets(root: Path, train: int = 9, test: int = 4) -> Path:
    random, breeds = np.random.default_rng(0), ["Abyssinian", "american_bulldog", "Bengal"]
    for name, first, count in (("trainval", 0, train), ("test", train, test)):
        lines = []
        for number in range(first, first + count):
            breed = number % 3
            lines.append(f"{breeds[breed]}_{number} {breed + 1} 1 1\n")
            picture(root / "images" / f"{breeds[breed]}_{number}.jpg", random)
        write(root / "annotations" / f"{name}.txt", "".join(lines))
    for file in (root / "images").iterdir():
        mask = root / "annotations/trimaps" / f"{file.stem}.png"
        mask.parent.mkdir(exist_ok=True)
        Image.new("L", (10, 12)).save(mask)
    return root


def flowers(root: Path, each: int = 5, classes: int = 102) -> Path:
    from scipy.io import savemat

    random, count = np.random.default_rng(0), 3 * each
    for number in range(1, count + 1):
        picture(root / "jpg" / f"image_{number:05}.jpg", random)
    labels = np.arange(count) % classes + 1
    labels[-1] = classes
    shuffled = random.permutation(count) + 1
    savemat(root / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    parts = {name: shuffled[None, i * each : (i + 1) * each] for i, name in enumerate(("trnid", "valid", "tstid"))}
    savemat(root / "setid.mat", {name: part.astype(np.uint16) for name, part in parts.items()})
    return root


def dtd(root: Path, classes: tuple[str, ...] = ("banded", "blotchy", "braided"), each: int = 3) -> Path:
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        names = [f"{name}/{name}_{split}{number}.jpg" for name in classes for number in range(each)]
        for name in names:
            picture(root / "images" / name, random)
        write(root / f"labels/{split}1.txt", "".join(f"{name}\n" for name in names))
    return root


def class_folders(root: Path, classes: tuple[str, ...], each: int = 4) -> Path:
    random = np.random.default_rng(0)
    for name in classes:
        for number in range(each):
            picture(root / name / f"{name}_{number}.jpg", random)
    return root


def svhn(root: Path, train: int = 20, test: int = 6) -> Path:
    from scipy.io import savemat

    random = np.random.default_rng(0)
    root.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        pixels = random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(root / f"{name}_32x32.mat", {"X": pixels, "y": random.integers(1, 11, (count, 1)).astype(np.uint8)})
    return root


def clevr(root: Path, train: int = 20, val: int = 6) -> Path:
    random = np.random.default_rng(0)
    for name, count in (("train", train), ("val", val), ("test", 2)):
        scenes = []
        for number in range(count):
            file = f"CLEVR_{name}_{number:06}.png"
            picture(root / "images" / name / file, random)
            objects = [
                {
                    "color": "red",
                    "material": "metal",
                    "shape": "cube",
                    "size": "large",
                    "rotation": float(random.uniform(0, 360)),
                    "3d_coords": random.normal(size=3).tolist(),
                    # Now and then on a threshold, to the digit.
                    "pixel_coords": [1, 2, float(random.choice([8.0, 8.5, 9.5, random.uniform(7, 12)]))],
                }
                for _ in range(random.integers(3, 11))
            ]
            scenes.append({"image_index": number, "image_filename": file, "split": name, "objects": objects})
        if name != "test":
            write(root / f"scenes/CLEVR_{name}_scenes.json", json.dumps({"info": {}, "scenes": scenes}))
        write(root / f"questions/CLEVR_{name}_questions.json", json.dumps({"questions": []}))
    return root


def dsprites(root: Path, count: int = 60) -> Path:
    random = np.random.default_rng(0)
    root.mkdir(parents=True)
    latents = np.stack([random.integers(0, most, count) for most in (1, 3, 6, 40, 32, 32)], axis=1)
    pixels = random.integers(0, 2, (count, 64, 64), dtype=np.uint8)
    name = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    np.savez_compressed(root / name, imgs=pixels, latents_classes=latents, latents_values=latents.astype(float))
    return root


def kitti(root: Path, count: int = 60, videos: int = 20) -> Path:
    random, kinds = np.random.default_rng(0), ["Car", "Van", "Truck", "Pedestrian", "Tram", "Misc", "DontCare"]
    for number in range(count):
        picture(root / f"training/image_2/{number:06}.png", random)
        lines = []
        for _ in range(random.integers(0, 4)):
            depth = float(random.choice([8.0, 20.0, round(random.uniform(-5, 60), 2)]))
            lines.append(
                f"{random.choice(kinds)} 0.00 0 -1.5 1.00 2.00 5.00 6.00 1.6 1.7 3.9 {-1.25:.2f} 1.70 {depth:.2f} 0.01\n"
            )
        write(root / f"training/label_2/{number:06}.txt", "".join(lines))
    lines = [f"2011_09_26 2011_09_26_drive_{number % videos:04}_sync {number:010}\n" for number in range(count)]
    write(root / "mapping/train_mapping.txt", "".join(lines))
    write(root / "mapping/train_rand.txt", ",".join(str(n + 1) for n in random.permutation(count)) + "\n")
    return root


def norb_matrix(array: np.ndarray) -> bytes:
    magic = {np.dtype("u1"): 0x1E3D4C55, np.dtype("i4"): 0x1E3D4C54}[array.dtype]
    sizes = [*array.shape, 1, 1][: max(3, array.ndim)]
    return np.array([magic, array.ndim, *sizes], "<i4").tobytes() + array.tobytes()


def norb(root: Path, train: int = 30, test: int = 21, zipped: bool = True) -> Path:
    random = np.random.default_rng(0)
    root.mkdir(parents=True)
    for instances, word, count in (("46789", "training", train), ("01235", "testing", test)):
        info = np.stack([random.integers(0, most, count) for most in (10, 9, 18, 6)], axis=1).astype(np.int32)
        info[:, 2] *= 2
        parts = {
            "dat": random.integers(0, 256, (count, 2, 96, 96), dtype=np.uint8),
            "cat": random.integers(0, 5, count).astype(np.int32),
            "info": info,
        }
        for part, array in parts.items():
            name = f"smallnorb-5x{instances}x9x18x6x2x96x96-{word}-{part}.mat"
            raw = norb_matrix(array)
            (root / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(raw, 1) if zipped else raw)
    return root
