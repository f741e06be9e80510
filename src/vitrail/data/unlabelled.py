"""Pictures without labels, for what learns without: `open_pictures` is `splits.open_data` for them.

Unusual: labels that are there are neither needed nor read. A folder gives every picture below it, however it is nested;
only where it has a train folder beside a val or test folder, or nothing beside it, these are splits. What is held out
follows from the same hash of seed and name as for labelled pictures, over all of them at once.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source
from vitrail.data import splits
from vitrail.data.folders import sub_folders, walk
from vitrail.data.shards import holds_pack
from vitrail.data.sources import FileSource, Packed, Read, key, listed, sizes, split_named, subset
from vitrail.data.splits import Splits
from vitrail.data.tables import LISTINGS, holds_parquet, read_hub, read_listing, read_parquet


@dataclass(frozen=True)
class Relabelled:
    """Another source with the same label on every picture."""

    source: Source
    label: int = -1
    classes: tuple[str, ...] = ()

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        return np.full(len(self.source), self.label, np.int64)

    @property
    def sizes(self) -> Int[np.ndarray, "n"]:
        return sizes(self.source)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return key(self.source, index)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return Sample(sample.name, sample.picture, self.label)


def open_pictures(spec: str, *, validation: float = 0.1, seed: int = 0, record: Path | None = None) -> Splits:
    """What --data names, each label -1 and without classes: any folder of pictures, and all that `open_data` reads.

    validation, seed, record: as there. Raises UserError on anything that a person has to mend.
    """
    if not 0 <= validation < 1:
        raise UserError(f"--validation is {validation}: give a share of the training pictures from 0 up to below 1.")
    found, notes = read(spec)
    if "train" not in found:
        raise UserError(f"{spec} has no training pictures, only {listed(found)}: give it to vitrail evaluate.")
    train, own, test = found["train"], found.get("validation"), found.get("test")
    if own is not None or validation == 0:
        return Splits(train, own, test, spec, False, notes)
    whole = Relabelled(train, 0, ("pictures",))
    if record is not None and record.exists():
        held, more = splits.recall(record, whole, validation)
    else:
        held, more = splits.hold_out(whole, validation, seed)
        if record is not None:
            splits.write(record, whole, held, validation, seed)
    if not held.any():
        return Splits(train, None, test, spec, False, (*notes, *more))
    kept, out = subset(train, np.flatnonzero(~held)), subset(train, np.flatnonzero(held))
    return Splits(kept, out, test, spec, True, (*notes, *more))


def read(spec: str) -> Read:
    """The sources that a spec names, by split; what only measures has no "train"."""
    path = Path(spec).expanduser()
    if spec.startswith("hub:"):
        return read_hub(spec.removeprefix("hub:"), labelled=False)
    if path.is_dir() and not holds_pack(path):
        return read_parquet(path, labelled=False) if holds_parquet(path) else read_folder(path)
    if path.suffix.lower() == ".parquet" and path.exists():
        return read_parquet(path, labelled=False)
    if path.suffix.lower() in LISTINGS and path.exists():
        return read_listing(path, labelled=False)
    found, notes = splits.read(spec)
    return {split: Relabelled(source) for split, source in found.items()}, notes


def read_folder(root: Path) -> Read:
    """Every picture below a folder; below its train, val and test folders, where it has them."""
    inside = sub_folders(root)
    named = {split: folder for folder in inside if (split := split_named(folder.name))}
    beside = [folder for folder in inside if folder not in named.values() and walk(folder, root).names]
    # Alone among other folders, "train" is but one more kind of picture.
    if "train" not in named or (len(named) == 1 and beside):
        named = {"train": root}
    found, notes = {split: walk(folder, folder) for split, folder in named.items()}, []
    if not found["train"].names:
        raise UserError(f"{named['train']} holds no pictures: give a folder of pictures, nested as you like.")
    if root not in named.values() and beside:
        notes.append(f"{root}: left alone, beside its train folder: {listed(folder.name for folder in beside)}.")
    for split, seen in found.items():
        if others := sum(seen.others.values()):
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in seen.others.most_common(5))
            notes.append(f"{named[split]}: {others} files that are no pictures were left alone ({kinds}).")
    sources: dict[str, Source] = {
        split: FileSource(
            named[split],
            Packed.of(os.fsencode(name) for name in seen.names),
            np.array(seen.sizes, np.int64),
            np.full(len(seen.names), -1, np.int64),
            (),
        )
        for split, seen in found.items()
        if seen.names
    }
    return sources, tuple(notes)
