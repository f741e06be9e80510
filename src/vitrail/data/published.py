"""CIFAR-10 and -100, Oxford-IIIT Pets and Flowers-102, in the files that their owners publish, unpacked.

Unusual: CIFAR's "python version" is a pickle, which could run any program on being opened. Ours is read by an unpickler
that knows the three things such a file holds, and knows them as inert stand-ins: not even NumPy is handed anything but the
pixels' raw bytes. Whatever else a file asks for is refused by name.

Every reader gives, by split, the pictures and TFDS's key for each, by which VTAB's sample can be found (data/tfds.py).
"""

import io
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source
from vitrail.data.sources import FileSource, Packed, digest, place, size

Keyed = Mapping[str, tuple[Source, Sequence[str | int]]]
"""Sources by split, each with TFDS's key of every sample."""

SIDE = 32
FILES = {
    10: (tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)),
    100: (("train",), ("test",)),
}
"""CIFAR's files of training and test pictures; with .bin behind them in the binary version."""


@dataclass(frozen=True)
class PixelSource:
    """Pictures held as decoded pixels; `origin` is what they are called in messages ("origin, row 17")."""

    origin: str
    pixels: UInt8[np.ndarray, "n h w"] | UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]
    classes: tuple[str, ...]

    @cached_property
    def sizes(self) -> Int[np.ndarray, "n"]:
        return np.full(len(self), self.pixels[0].nbytes if len(self) else 0)

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.classes, self.pixels, self.labels)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def key(self, index: int) -> str:
        return f"row {place(index, len(self))}"

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{self.origin}, {self.key(index)}", self.pixels[index], int(self.labels[index]))


def files(root: Path, names: Sequence[str], labels: Iterable[int], classes: Sequence[str]) -> FileSource:
    """Picture files by their names below `root`."""
    return FileSource(
        root,
        Packed.of(os.fsencode(name) for name in names),
        np.array([size(root / name) for name in names], np.int64).reshape(-1),
        np.fromiter(labels, np.int64),
        tuple(classes),
    )


def within(path: Path, *wanted: str, inside: Sequence[str] = ()) -> Path | None:
    """`path`, or one of the folders usually found in it, whichever holds everything that is wanted."""
    folders = (path, *(path / name for name in inside))
    return next((folder for folder in folders if all((folder / name).exists() for name in wanted)), None)


def cifar(path: Path, classes: int) -> Keyed | None:
    """CIFAR-10 or -100, binary or python version; None where it is not there. Raises UserError on damaged files."""
    inside = (f"cifar-{classes}-batches-bin", f"cifar-{classes}-binary", f"cifar-{classes}-batches-py")
    train, test = FILES[classes]
    for suffix in (".bin", ""):
        every = [f"{name}{suffix}" for name in (*train, *test)]
        folder = within(path, *every, inside=(*inside, f"cifar-{classes}-python"))
        if folder is None or any((folder / name).is_dir() for name in every):
            continue
        names = _cifar_names(folder, classes, bool(suffix))
        found: dict[str, tuple[Source, Sequence[str | int]]] = {}
        for split, parts in (("train", train), ("test", test)):
            read = _cifar_binary if suffix else _cifar_python
            both = [read(folder / f"{name}{suffix}", classes) for name in parts]
            pixels, labels = (np.concatenate(column) for column in zip(*both, strict=True))
            if ((labels < 0) | (labels >= classes)).any():
                raise UserError(f"{folder} has a label outside of 0 to {classes - 1}: fetch CIFAR-{classes} anew.")
            found[split] = PixelSource(f"{folder} {split}", pixels, labels, names), range(len(labels))
        return found
    return None


def _cifar_binary(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A record is one label (CIFAR-100: coarse, then fine) and 3072 bytes, a colour after the other, row by row."""
    labels = 1 if classes == 10 else 2
    raw = np.fromfile(file, np.uint8)
    if raw.size == 0 or raw.size % (labels + 3 * SIDE**2):
        raise UserError(f"{file} is {raw.size:,} bytes, which is no whole number of CIFAR records: fetch it anew.")
    table = raw.reshape(-1, labels + 3 * SIDE**2)
    return _upright(table[:, labels:]), table[:, labels - 1].astype(np.int64)


def _cifar_python(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    held = unpickle(file)
    pixels, labels = held.get("data"), held.get("labels" if classes == 10 else "fine_labels")
    if (
        not isinstance(pixels, np.ndarray)
        or not isinstance(labels, list)
        or pixels.shape
        != (
            len(labels),
            3 * SIDE**2,
        )
    ):
        raise UserError(f"{file} is no file of CIFAR-{classes}: it holds {', '.join(map(str, held)) or 'nothing'}.")
    return _upright(pixels), np.array(labels, np.int64)


def _upright(pixels: UInt8[np.ndarray, "n 3072"]) -> UInt8[np.ndarray, "n 32 32 3"]:
    return np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _cifar_names(folder: Path, classes: int, binary: bool) -> tuple[str, ...]:
    """The owners' names of the classes; where that file is missing or odd, their numbers."""
    names: Any = ()
    file = folder / (("batches.meta.txt" if classes == 10 else "fine_label_names.txt") if binary else "meta")
    file = folder / "batches.meta" if not binary and classes == 10 else file
    if file.exists() and binary:
        names = file.read_text(encoding="utf-8").split()
    elif file.exists():
        names = unpickle(file).get("label_names" if classes == 10 else "fine_label_names", ())
    named = len(names) == classes and all(isinstance(name, str) for name in names)
    return tuple(names) if named else tuple(map(str, range(classes)))


class _Type:
    """Stands for numpy.dtype: it is told a name and otherwise nothing."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name if isinstance(name, str) else name.decode() if isinstance(name, bytes) else ""

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for numpy.ndarray: keeps the shape and the bytes it is given."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: Any, _encoding: Any = None) -> bytes:
    return str(text).encode("latin1")


KNOWN = {
    **dict.fromkeys((f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")), _reconstruct),
    **{"numpy.ndarray": _Array, "numpy.dtype": _Type, "_codecs.encode": _encode},
}
"""All that a pickle of a dictionary with lists, words and a NumPy array names."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase, name: str) -> None:
        # Bytes, for the files are Python 2's: its strings hold pixels.
        super().__init__(file, encoding="bytes")
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in KNOWN:
            raise UserError(f"{self.name} asks for {wanted}, which no CIFAR file does: it was not opened; delete it.")
        return KNOWN[wanted]


def unpickle(file: Path) -> dict[str, Any]:
    """The dictionary in a pickle of CIFAR's, words decoded and arrays of uint8 made. Runs nothing that the file holds.

    Raises UserError on a file that asks for anything else, or is damaged.
    """
    try:
        with file.open("rb") as opened:
            held = _Unpickler(opened, str(file)).load()
        if not isinstance(held, dict):
            raise ValueError("no dictionary")
        return {str(_plain(name)): _plain(value) for name, value in held.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{file} cannot be read as CIFAR's python version ({error}): fetch it anew.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, _Array):
        _, shape, kind, fortran, raw = value.state
        if not isinstance(kind, _Type) or kind.name.lstrip("|") != "u1" or fortran:
            raise ValueError("an array of something else than bytes")
        return np.frombuffer(raw if isinstance(raw, bytes) else raw.encode("latin1"), np.uint8).reshape(shape)
    return value


def pets(path: Path) -> Keyed | None:
    """Oxford-IIIT Pets: images/ and annotations/{trainval,test}.txt; None where they are not there."""
    lists = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
    root = within(path, "images", *lists.values(), inside=("oxford-iiit-pet",))
    if root is None:
        return None
    rows: dict[str, list[list[str]]] = {}
    for split, name in lists.items():
        lines = [line.split() for line in (root / name).read_text(encoding="utf-8").splitlines()]
        rows[split] = [words for words in lines if words and not words[0].startswith("#")]
        if bad := next((words for words in rows[split] if len(words) < 2 or not words[1].isdigit()), None):
            raise UserError(f"{root / name} has the line {' '.join(bad)!r}: it must be a name and a class's number.")
    # A picture is called after its breed and a number; labels count from 1.
    named = {int(words[1]): words[0].rpartition("_")[0] for split in rows for words in rows[split]}
    classes = [named.get(number, str(number)) for number in range(1, max(named, default=0) + 1)]
    return {
        split: (
            files(root / "images", [f"{words[0]}.jpg" for words in each], [int(w[1]) - 1 for w in each], classes),
            [f"{words[0]}.jpg" for words in each],
        )
        for split, each in rows.items()
    }


def flowers(path: Path) -> Keyed | None:
    """Flowers-102: jpg/, imagelabels.mat and setid.mat; None where they are not there. Its classes have numbers only."""
    root = within(path, "jpg", "imagelabels.mat", "setid.mat", inside=("flowers-102",))
    if root is None:
        return None
    labels = matlab(root / "imagelabels.mat", "labels").ravel().astype(np.int64)
    sets = {"train": "trnid", "validation": "valid", "test": "tstid"}
    found: dict[str, tuple[Source, Sequence[str | int]]] = {}
    for split, name in sets.items():
        numbers = matlab(root / "setid.mat", name).ravel().astype(np.int64)
        if ((numbers < 1) | (numbers > len(labels))).any():
            raise UserError(f"{root / 'setid.mat'} names pictures that {root / 'imagelabels.mat'} has no label for.")
        names = [f"image_{number:05}.jpg" for number in numbers.tolist()]
        classes = [str(number) for number in range(1, int(labels.max()) + 1)]
        found[split] = files(root / "jpg", names, (labels[numbers - 1] - 1).tolist(), classes), names
    return found


def matlab(file: Path, name: str) -> Any:
    """One variable of a .mat file. Raises UserError where it is damaged, lacks the variable, or SciPy is missing."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{file} is a MATLAB file, which SciPy reads: pip install 'vitrail[benchmarks]'.") from error
    try:
        return loadmat(file, variable_names=[name], squeeze_me=False)[name]
    except KeyError as error:
        raise UserError(f"{file} has no variable {name!r}: fetch it anew.") from error
    except Exception as error:  # SciPy raises plain and own errors on damaged files alike
        raise UserError(f"{file} cannot be read as a MATLAB file ({error}): fetch it anew.") from error
