"""Which pictures train, which choose the best checkpoint, and which only measure: `open_data` turns --data into that.

Unusual: a split that we make is no shuffle. Each picture's turn is a hash of the seed and its name, so the same
pictures are held out on every machine and NumPy version, and adding a picture moves few others. Pictures that are equal
byte for byte go to the same side.
"""

import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitrail.core.errors import UserError
from vitrail.core.runs import read_json, write_json
from vitrail.core.types import Source
from vitrail.data import benchmarks
from vitrail.data.folders import read_folders
from vitrail.data.likeness import equal_pictures
from vitrail.data.shards import holds_pack, read_pack
from vitrail.data.sources import Read, class_counts, key, listed, read_sample, sizes, subset
from vitrail.data.tables import LISTINGS, holds_parquet, read_hub, read_listing, read_parquet

FORMAT = 1


@dataclass(frozen=True)
class Splits:
    """The data of a run.

    train, validation, test: sources with the same classes; validation and test None where there are none.
    origin: what the data are called; made: whether validation was taken out of train by us; notes: sentences on what
    was left out, to be shown.
    """

    train: Source
    validation: Source | None
    test: Source | None
    origin: str
    made: bool
    notes: tuple[str, ...] = ()


def open_data(spec: str, *, validation: float = 0.1, seed: int = 0, record: Path | None = None) -> Splits:
    """The data that --data names: a folder, a packed one (data/shards.py), a CSV or JSON, parquet, `hub:owner/name`,
    `sample:NAME`, or a published set in its owners' files, `NAME:PATH` (data/benchmarks.py).

    validation: the share of the training pictures to hold out, in [0, 1), where the data bring no validation split of
        their own; 0 holds none out.
    seed: which ones. record: a JSON file that a split made here is written to, or, where it exists, taken from.

    Raises UserError on anything that a person has to mend, a record made of other data among them.
    """
    if not 0 <= validation < 1:
        raise UserError(f"--validation is {validation}: give a share of the training pictures from 0 up to below 1.")
    found, notes = read(spec)
    if "train" not in found:
        raise UserError(f"{spec} has no training pictures, only {listed(found)}: give it to vitrail evaluate.")
    train, own, test = found["train"], found.get("validation"), found.get("test")
    present = np.unique(np.asarray(train.labels))
    if len(present) < 2:
        raise UserError(f"{spec} has only one class ({train.classes[int(present[0])]}): give pictures of at least two.")
    if own is not None or validation == 0:
        return Splits(train, own, test, spec, False, notes)
    held, more = (
        hold_out(train, validation, seed)
        if record is None or not record.exists()
        else recall(record, train, validation)
    )
    if record is not None and not record.exists():
        write(record, train, held, validation, seed)
    if not held.any():
        return Splits(train, None, test, spec, False, (*notes, *more))
    kept, out = subset(train, np.flatnonzero(~held)), subset(train, np.flatnonzero(held))
    return Splits(kept, out, test, spec, True, (*notes, *more))


def read(spec: str) -> Read:
    """The sources that a spec names, by split; "train" always among them, but for published sets that only measure."""
    if (known := benchmarks.named(spec)) is not None:
        return benchmarks.read(*known)
    if spec.startswith("sample:"):
        name = spec.removeprefix("sample:")
        return {split: read_sample(name, split) for split in ("train", "test")}, ()
    if spec.startswith("hub:"):
        return read_hub(spec.removeprefix("hub:"))
    path = Path(spec).expanduser()
    if path.is_dir():
        if holds_pack(path):
            return read_pack(path)
        return read_parquet(path) if holds_parquet(path) else read_folders(path)
    if path.suffix.lower() in LISTINGS and path.exists():
        found, notes = read_listing(path)
    elif path.suffix.lower() == ".parquet" and path.exists():
        found, notes = read_parquet(path)
    elif path.exists():
        raise UserError(
            f"{spec} is no folder, CSV, JSON or parquet file: give --data one of these, or unpack it first."
        )
    else:
        # A folder that was mistyped must not be looked for on the network.
        name = spec if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.@:-]*", spec) else "OWNER/NAME"
        raise UserError(
            f"{spec} does not exist: give --data a folder, a CSV, JSON or parquet file, sample:NAME, or hub:{name} for a "
            "data set of the Hugging Face hub."
        )
    if "train" not in found:
        raise UserError(f"{spec} has no training pictures: it has {listed(found)}.")
    return found, notes


def hold_out(source: Source, share: float, seed: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """(len,) bool, true for the pictures to hold out, and notes.

    Of each class the share, rounded, and at least one picture, but never all: a class of one keeps it in train.
    """
    labels, notes = np.asarray(source.labels), []
    held = np.zeros(len(source), bool)
    # What may still leave each class before training has none of it.
    spare = np.bincount(labels, minlength=len(source.classes)) - 1
    groups: dict[int, list[list[int]]] = defaultdict(list)
    equal = equal_pictures(sizes(source), lambda place: source[place].picture)
    if equal is None:
        notes.append("Too many pictures have the same size to look for equal ones; some may lie on both sides.")
    paired = {place for group in equal or () for place in group}
    for group in [*(equal or ()), *([place] for place in range(len(source)) if place not in paired)]:
        groups[int(labels[group[0]])].append(group)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wanted = min(max(round(share * len(members)), 1), len(members) - 1)
        if wanted == 0:
            notes.append(f"The class {source.classes[label]!r} has one picture: it stays in training, none validates.")
            continue
        taken = int(held[members].sum())
        # Large groups of equal pictures come last, for one of them may overshoot the share.
        for group in sorted(groups[int(label)], key=lambda g: (len(g) > wanted, turn(seed, key(source, g[0])))):
            if taken >= wanted:
                break
            leaving = np.bincount(labels[group], minlength=len(spare))
            if (leaving <= np.maximum(spare, 0)).all():
                held[group] = True
                spare = spare - leaving
                taken += int(leaving[label])
        if not taken:
            notes.append(f"The pictures of the class {source.classes[label]!r} are all equal: none validates.")
    return held, tuple(notes)


def turn(seed: int, name: str) -> bytes:
    return hashlib.blake2b(os.fsencode(f"{seed} {name}"), digest_size=8).digest()


def write(record: Path, source: Source, held: np.ndarray, share: float, seed: int) -> None:
    """Records a split: what it was made of and how, and the keys of the pictures that are held out."""
    described = {
        "format": FORMAT,
        "seed": seed,
        "validation": share,
        "fingerprint": source.fingerprint,
        "classes": class_counts(source),
        "held_out": [key(source, int(index)) for index in np.flatnonzero(held)],
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, described)


def recall(record: Path, source: Source, share: float) -> tuple[np.ndarray, tuple[str, ...]]:
    """The split that a record holds, whatever seed it was made with. Raises UserError where it is of other data."""
    try:
        described = read_json(record)
        form, made, fingerprint = described["format"], described["validation"], described["fingerprint"]
        before, names = dict(described["classes"]), set(described["held_out"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{record} is no record of a split ({error!r}): delete it to make the split anew.") from error
    if form != FORMAT:
        raise UserError(
            f"{record} has the format {form}, this version reads {FORMAT}: delete it to make the split anew."
        )
    if fingerprint != source.fingerprint:
        raise UserError(
            f"{record} is the split of other data ({changes(before, class_counts(source))}): bring those data back, or "
            "start a new run with another --out."
        )
    if made != share:
        raise UserError(
            f"{record} holds out {made:g} of the pictures, not --validation {share:g}: ask for that, or delete it."
        )
    held = np.array([key(source, index) in names for index in range(len(source))], bool)
    return held, (f"The split recorded in {record} is used again.",)


def changes(before: dict[str, int], now: dict[str, int]) -> str:
    """What differs between two tables of class counts, as part of a sentence."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    said = [f"{name!r} had {before.get(name, 0)} pictures and now has {now.get(name, 0)}" for name in names]
    return listed(said, 3) if said else "the counts are the same, but names, sizes or order of the files differ"
