"""Where pictures come from: files, pictures held in memory, and views of either.

Unusual: a source never holds a Python list with one object a picture. Names and undecoded pictures lie end to end in
one bytes object (`Packed`), because touching a list's items from forked data workers counts references and so copies
its memory page by page, which looks like a leak. Nothing here decodes a picture.

Beside what `core.types.Source` asks, every source here has `key(index)`: a name that survives moving the folder, by
which a recorded split refers to a sample.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source

FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SAMPLES = {"fashion": FASHION}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}

Read = tuple[dict[str, Source], tuple[str, ...]]
"""What a reader found: sources by split ("train", "validation", "test"), and sentences on what was left out."""


@dataclass(frozen=True)
class Packed:
    """A sequence of byte strings as one bytes object; ends: (len,) where each stops."""

    data: bytes
    ends: Int[np.ndarray, "n"]

    @classmethod
    def of(cls, items: Iterable[bytes]) -> "Packed":
        kept = list(items)
        return cls(b"".join(kept), np.cumsum([len(item) for item in kept], dtype=np.int64))

    def __len__(self) -> int:
        return self.ends.shape[0]

    def __getitem__(self, index: int) -> bytes:
        end = int(self.ends[index])
        start = int(self.ends[index - 1]) if index % len(self) else 0
        return self.data[start:end]


def place(index: int, length: int) -> int:
    """`index` counted from the front. Raises IndexError, so that a source can be walked with `for`."""
    if not -length <= index < length:
        raise IndexError(f"sample {index} of {length}")
    return index % length


def digest(*parts: bytes | np.ndarray | Sequence[str]) -> str:
    """Hex digits of everything that makes a source what it is."""
    seen = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            raw = np.ascontiguousarray(part).tobytes()
        elif isinstance(part, bytes):
            raw = part
        else:
            raw = b"\0".join(os.fsencode(word) for word in part)
        seen.update(len(raw).to_bytes(8, "little"))
        seen.update(raw)
    return seen.hexdigest()


@dataclass(frozen=True)
class FileSource:
    """Picture files below `root`.

    names: paths relative to root, with "/" (an absolute path stays as it is); sizes: (len,) bytes, -1 where the file
    could not be looked at. The fingerprint takes names, labels and sizes and not the root or the times, so that a copy
    of the folder elsewhere is the same data.
    """

    root: Path
    names: Packed
    sizes: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.classes, self.names.data, self.names.ends, self.sizes, self.labels)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def key(self, index: int) -> str:
        return printable(self.names[place(index, len(self))])

    def __getitem__(self, index: int) -> Sample:
        index = place(index, len(self))
        path = self.root / os.fsdecode(self.names[index])
        return Sample(printable(str(path)), path, int(self.labels[index]))


@dataclass(frozen=True)
class MemorySource:
    """Undecoded pictures held in memory; `origin` is what they are called in messages ("origin, row 17")."""

    origin: str
    pictures: Packed
    labels: Int[np.ndarray, "n"]
    classes: tuple[str, ...]

    @cached_property
    def sizes(self) -> Int[np.ndarray, "n"]:
        return np.diff(self.pictures.ends, prepend=0)

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.classes, self.pictures.data, self.pictures.ends, self.labels)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def key(self, index: int) -> str:
        return f"row {place(index, len(self))}"

    def __getitem__(self, index: int) -> Sample:
        name = f"{self.origin}, {self.key(index)}"
        return Sample(name, self.pictures[index], int(self.labels[index]))


@dataclass(frozen=True)
class Subset:
    """Some samples of another source, in the order of `indices`."""

    source: Source
    indices: Int[np.ndarray, "n"]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @cached_property
    def labels(self) -> Int[np.ndarray, "n"]:
        return self.source.labels[self.indices]

    @cached_property
    def fingerprint(self) -> str:
        return digest((self.source.fingerprint,), self.indices)

    def __len__(self) -> int:
        return self.indices.shape[0]

    def key(self, index: int) -> str:
        return key(self.source, int(self.indices[place(index, len(self))]))

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.indices[place(index, len(self))])]


def key(source: Source, index: int) -> str:
    """A name for one sample that survives moving the data; of a foreign source, what the sample calls itself."""
    return source.key(index) if hasattr(source, "key") else source[index].name


def sizes(source: Source) -> Int[np.ndarray, "n"]:
    """(len,) bytes of each undecoded picture, without opening it; -1 where the source cannot tell."""
    if isinstance(source, Subset):
        return sizes(source.source)[source.indices]
    return getattr(source, "sizes", np.full(len(source), -1))


def class_counts(source: Source) -> dict[str, int]:
    """Pictures of each class, classes without any among them."""
    labels = np.asarray(source.labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(source.classes))
    return dict(zip(source.classes, counts.tolist(), strict=True))


def subset(source: Source, indices: Iterable[int] | np.ndarray) -> Subset:
    """The samples of `source` at `indices`, in that order, as a source with a fingerprint of its own."""
    indices = np.fromiter(indices, np.int64)
    if isinstance(source, Subset):
        return Subset(source.source, source.indices[indices])
    return Subset(source, indices)


def limit(source: Source, n: int, seed: int) -> Source:
    """At most `n` samples drawn without replacement, as many of each class as can be, in their original order.

    Classes that have too few give all they have, and the others make up for it. Raises UserError where n < 1.
    """
    if n < 1:
        raise UserError(f"--limit is {n}, which leaves no pictures: give at least 1.")
    if n >= len(source):
        return source
    rng = np.random.default_rng(seed)
    labels = np.asarray(source.labels)
    kept: list[Int[np.ndarray, "_"]] = []
    # Smallest classes first: what they cannot give falls to those after them.
    present, counts = np.unique(labels, return_counts=True)
    for turn, entry in enumerate(sorted(range(len(present)), key=lambda i: (counts[i], rng.random()))):
        share = min(int(counts[entry]), (n - sum(part.shape[0] for part in kept)) // (len(present) - turn))
        kept.append(rng.choice(np.flatnonzero(labels == present[entry]), share, replace=False))
    return subset(source, np.sort(np.concatenate(kept)))


def read_sample(name: str, split: str) -> MemorySource:
    """The "train" or "test" half of an embedded data set. Raises UserError on a name that is none."""
    if name not in SAMPLES:
        raise UserError(
            f"sample:{name} does not exist: the embedded data sets are {listed(f'sample:{n}' for n in SAMPLES)}."
        )
    # Arrow itself, not `datasets`: 0.15 s to import against 1 s, and no copy in its cache.
    import pyarrow.parquet as pq

    with (files("vitrail.data") / "samples" / f"{name}-{split}.parquet").open("rb") as file:
        table = pq.read_table(file)
    pictures = Packed.of(row["bytes"] for row in table["image"].to_pylist())
    return MemorySource(f"sample:{name} {split}", pictures, table["label"].to_numpy(), SAMPLES[name])


def split_named(word: str) -> str | None:
    """ "train", "validation" or "test" for any way of writing it, None for anything else."""
    return next((split for split, words in SPLITS.items() if word.strip().casefold() in words), None)


def printable(name: bytes | str) -> str:
    """A file's name as text; what is no UTF-8 in it is escaped, for it must still be printed and written down."""
    return os.fsencode(name).decode(errors="backslashreplace")


def size(file: "os.DirEntry[str] | Path") -> int:
    """Bytes of a file, -1 where it cannot be looked at."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


def natural(name: str) -> tuple[str, str]:
    """Sort key under which cat2 comes before cat10 and upper case beside lower."""
    # A number as a sign below all that a name has, how many digits, and the digits: a list of words and numbers would sort
    # alike and take several times the memory, for each of perhaps a million names.
    return re.sub("[0-9]+", lambda found: _number(found[0].lstrip("0")), name.casefold()), name


def _number(digits: str) -> str:
    return f"\0{chr(len(digits))}{digits}"


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names for a sentence, cut short after `most`."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
