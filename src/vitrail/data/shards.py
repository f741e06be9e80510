"""Packed pictures: pixels in large files, mapped into memory and never decoded again. `vitrail pack` writes them.

Unusual: what could not be read is packed too, as the bytes it was, so that every picture keeps its place, its name and
its label, the held-out ones are the same, and the complaint about it too.

Pixels are stored as they are. Of 80 photographs at 256 pixels a training crop took 0.28 ms of a core from 261 kB of
pixels, 1.03 ms from 55 kB of JPEG (quality 95, full colour) and 0.77 ms from 30 kB (quality 90), against 1.59 ms from the
104 kB of the files: as JPEG it would be no faster than twice the files, and lossy.

A folder holds pack.json (what was packed, how), for each split SPLIT.npz (names, labels, sizes), and for each thousand
pictures SPLIT-NUMBER.pixels (end to end) and SPLIT-NUMBER.npz (where each lies in it), which is written last.
"""

import functools
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source
from vitrail.data.decode import Shrunk
from vitrail.data.sources import Packed, Read, digest, place

FORMAT = 1
SHARD = 1024
"""Pictures a file: 270 MB of them at 256 pixels. A kill costs no more than the files being written."""
START, LENGTH, HEIGHT, WIDTH, CHANNELS, TALL, WIDE = range(7)
"""The columns of a row: bytes in the file; the pixels' shape, 0 where it could not be read; the picture's own size."""


@dataclass(frozen=True)
class ShardSource:
    """One split of a packed folder.

    rows: (n, 7), see START. sizes: bytes of a picture's file as it was, but -1 where no other file is equal to it: then
    whoever looks for equal pictures finds those that were equal files, and opens no others. fingerprint: of the data as
    they were, and of what was made of them.
    """

    folder: Path
    split: str
    rows: Int[np.ndarray, "n 7"]
    names: Packed
    sizes: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    classes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return self.labels.shape[0]

    def key(self, index: int) -> str:
        """What it was called before it was packed."""
        return self.names[place(index, len(self))].decode()

    def __getitem__(self, index: int) -> Sample:
        index = place(index, len(self))
        start, length, height, width, channels, tall, wide = self.rows[index].tolist()
        raw = _mapped(shard(self.folder, self.split, index // SHARD))[start : start + length]
        name, label = f"{self.folder}, {self.key(index)}", int(self.labels[index])
        if not height:
            return Sample(name, raw.tobytes(), label)
        pixels = raw.reshape((height, width, channels) if channels > 1 else (height, width))
        shrunk = (height, width) != (tall, wide)
        return Sample(name, Shrunk.of(pixels, (tall, wide)) if shrunk else pixels, label)


def shard(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05}.pixels"


@functools.lru_cache(maxsize=4096)
def _mapped(file: Path) -> UInt8[np.ndarray, "n"]:
    # "c": what writes to a picture changes its own copy; torch warns of pixels that cannot be written to.
    return np.asarray(np.memmap(file, np.uint8, "c")) if file.stat().st_size else np.zeros(0, np.uint8)


def holds_pack(folder: Path) -> bool:
    return (folder / "pack.json").exists()


def read_pack(folder: Path) -> Read:
    """The splits of a packed folder. Raises UserError where it is not whole."""
    described = description(folder)
    if not described["complete"]:
        raise UserError(
            f"{folder} is not packed to its end: run the same vitrail pack again, which goes on from there."
        )
    found: dict[str, Source] = {}
    for split, said in described["splits"].items():
        try:
            with np.load(folder / f"{split}.npz") as table:
                names = Packed(table["names"].tobytes(), table["ends"])
                labels, sizes = table["labels"], table["sizes"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise _broken(folder / f"{split}.npz", "is missing or damaged") from error
        parts = [rows_of(folder, split, number) for number in range(-(-len(labels) // SHARD))]
        for number, part in enumerate(parts):
            if part is None:
                raise _broken(shard(folder, split, number), "is missing or cut short")
        rows = np.concatenate([np.zeros((0, 7), np.int64), *(part for part in parts if part is not None)])
        if not len(rows) == len(labels) == len(names) == said["count"]:
            raise _broken(folder / f"{split}.npz", "does not fit its pictures")
        fingerprint = digest((said["fingerprint"], *said["classes"]), rows, sizes, labels)
        classes = tuple(said["classes"])
        found[split] = ShardSource(folder, split, rows, names, sizes, labels, classes, fingerprint)
    return found, tuple(described["notes"])


def rows_of(folder: Path, split: str, number: int) -> Int[np.ndarray, "n 7"] | None:
    """Where the pictures of one file lie in it; None where it is not there as it was written."""
    pixels = shard(folder, split, number)
    try:
        with np.load(pixels.with_suffix(".npz")) as table:
            rows: np.ndarray = table["rows"]
        whole = pixels.stat().st_size == (rows[-1, START] + rows[-1, LENGTH])
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        return None
    return rows if whole else None


def description(folder: Path) -> dict[str, Any]:
    """pack.json. Raises UserError where it is none, or of another version."""
    file = folder / "pack.json"
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        form = described["format"]
        if form == FORMAT:
            described["complete"], described["splits"], described["notes"], described["size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}): pack the pictures again into a new folder."
        ) from error
    if form != FORMAT:
        raise UserError(
            f"{folder} was packed in format {form}, this version of vitrail reads {FORMAT}: pack the pictures again into "
            "a new folder."
        )
    return described


def _broken(file: Path, found: str) -> UserError:
    return UserError(f"{file} {found}: run the same vitrail pack again, which makes it anew and keeps the rest.")
