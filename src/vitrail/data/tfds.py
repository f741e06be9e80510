"""Folders that TensorFlow Datasets has prepared, read without it and without TensorFlow.

Unusual: a split is opened without reading a picture, and only the examples asked for are parsed for their labels, since
the label of some tasks has to be worked out of what is in the picture; what was parsed is checked when the picture is read.
The order of the records is the order of the
shards, which is the order that TFDS's slices (`train[:800]`) count in.

A prepared folder is NAME/[CONFIG/]VERSION/ with dataset_info.json, features.json, FEATURE.labels.txt where classes have
names, and NAME-SPLIT.tfrecord-00000-of-000NN.

The order itself is no secret: TFDS sorts a split by the MD5 of the split's name and each example's key. `order` does the
same, so that the owners' own files give the same first 800 examples.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vitrail.core.errors import UserError
from vitrail.core.types import Picture, Sample
from vitrail.data.records import Feature, Records, open_records, read_example
from vitrail.data.sources import digest, natural, place

Rule = Callable[[Mapping[str, Any]], int]
"""From an example's features, by TFDS's names, to its label."""


@dataclass(frozen=True)
class Prepared:
    """A prepared folder. splits: the shards of each, in order. counts: the examples of each, as TFDS wrote them down."""

    folder: Path
    version: str
    splits: Mapping[str, tuple[Path, ...]]
    counts: Mapping[str, int]

    @property
    def major(self) -> int:
        head = self.version.split(".")[0]
        return int(head) if head.isdigit() else -1

    def records(self, split: str) -> Records:
        """Raises UserError where a shard is missing or damaged, or holds another number of records than it should."""
        for file in self.splits[split]:
            if not file.exists():
                raise UserError(f"{file} is missing; prepare {self.folder} again, or copy the whole folder.")
        found = open_records(self.splits[split])
        if len(found) != self.counts[split]:
            raise UserError(
                f"{self.folder} has {len(found)} records of {split} where dataset_info.json counts "
                f"{self.counts[split]}; prepare it again."
            )
        return found

    def names(self, feature: str, classes: int) -> tuple[str, ...]:
        """The classes' names, or their numbers where TFDS knows none."""
        file = self.folder / f"{feature}.labels.txt"
        names = tuple(file.read_text(encoding="utf-8").split("\n")[:classes]) if file.exists() else ()
        named = len(names) == classes and len(set(names)) == classes and all(names)
        return names if named else tuple(map(str, range(classes)))


def find(root: Path, name: str, config: str = "", majors: Sequence[int] = ()) -> Prepared | None:
    """The newest version prepared of a set below `root`, or `root` itself, of these major versions.

    Where there are only others, or none are asked for, the newest of them. Raises UserError on a folder whose description
    cannot be read.
    """
    bases = [root / name / config, root / config, root]
    folders = {folder.resolve() for base in bases for folder in (base, *children(base)) if described(folder)}
    found = [prepared for folder in folders if (prepared := _open(folder, name, config)) is not None]
    if not found:
        return None
    return max(found, key=lambda p: (p.major in majors, natural(p.version)))


def children(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []


def described(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file()


def _open(folder: Path, name: str, config: str) -> Prepared | None:
    file = folder / "dataset_info.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        called, version, form = str(info["name"]), str(info["version"]), str(info.get("fileFormat", "tfrecord"))
        if (called, str(info.get("configName", "") or "")) != (name, config):
            return None
        counts = {split["name"]: [int(length) for length in split["shardLengths"]] for split in info["splits"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no description of a prepared TFDS set ({error!r}); prepare it again.") from error
    if form != "tfrecord":
        raise UserError(f"{folder} is prepared as {form}; prepare it as tfrecord, TFDS's default.")
    shards = {
        split: tuple(folder / f"{called}-{split}.tfrecord-{i:05}-of-{len(each):05}" for i in range(len(each)))
        for split, each in counts.items()
    }
    return Prepared(folder, version, shards, {split: sum(each) for split, each in counts.items()})


@dataclass(frozen=True)
class RecordSource:
    """Some records in a row, first .. first + len, as pictures with labels.

    change: what is done to a picture's bytes, where they are not simply a picture file; a function of a module, so that
    data workers can be sent it.
    """

    records: Records
    first: int
    labels: Int[np.ndarray, "n"]
    classes: tuple[str, ...]
    change: Callable[[bytes], Picture] | None = None

    @cached_property
    def sizes(self) -> Int[np.ndarray, "n"]:
        """(len,) bytes of each whole record: what tells that two pictures are not equal."""
        return self.records.length[self.first : self.first + len(self)]

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.classes, [file.name for file in self.records.files], self.labels, self.sizes)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def key(self, index: int) -> str:
        number = self.first + place(index, len(self))
        return f"{self.records.files[int(self.records.file[number])].name}, record {self.records.within(number)}"

    def __getitem__(self, index: int) -> Sample:
        number = self.first + place(index, len(self))
        picture = _picture(read_example(self.records.read(number), ("image",)).get("image"))
        return Sample(
            self.records.name(number), self.change(picture) if self.change else picture, int(self.labels[index])
        )


def source(
    prepared: Prepared,
    records: Records,
    span: range,
    rule: Rule,
    features: Sequence[str],
    classes: tuple[str, ...],
    change: Callable[[bytes], Picture] | None = None,
) -> RecordSource:
    """The records of a span, labelled by a rule over these features. Raises UserError where one lacks them."""
    labels = np.zeros(len(span), np.int64)
    for row, number in enumerate(span):
        try:
            labels[row] = rule(read_example(records.peek(number), features))
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"{records.name(number)} has no {' and '.join(features)} ({error!r}); prepare {prepared.folder} again."
            ) from error
        if not 0 <= labels[row] < len(classes):
            raise UserError(f"{records.name(number)} has the label {labels[row]}, of {len(classes)} classes.")
    return RecordSource(records, span.start, labels, classes, change)


def order(split: str, keys: Sequence[str | int]) -> Int[np.ndarray, "n"]:
    """The places of examples with these keys in the order in which TFDS writes them: by the MD5 of split and key."""
    return np.array(
        sorted(range(len(keys)), key=lambda i: hashlib.md5(f"{split}{keys[i]}".encode()).digest()), np.int64
    )


def _picture(found: Feature | None) -> bytes:
    # A record without a picture becomes an empty file: unreadable, and named as such.
    return found[0] if isinstance(found, list) and found else b""
