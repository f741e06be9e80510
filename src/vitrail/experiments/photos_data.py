"""The photos of `vitrail fit`: which teach, which choose between two models, and which only measure.

Unusual: what is reported as the accuracy on the user's own val or test folder must not have chosen anything. So where there
is only one such folder, pictures to choose by are held out of train, and the first answer may still learn from those,
since they do not measure it. Where there is none, the held-out pictures choose and measure, and this is said.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from vitrail.core.errors import UserError
from vitrail.core.types import Source
from vitrail.data import splits
from vitrail.data.likeness import equal_pictures
from vitrail.data.sources import class_counts, digest, listed, sizes, subset
from vitrail.data.splits import Splits
from vitrail.data.survey import Survey, refuse_if_unreadable, survey

FEW = 10
"""Pictures below which a class cannot be judged: of ten that are all right, the 95 % interval still begins at 72 %."""
SURVEY_SECONDS = 8.0


@dataclass(frozen=True)
class Photos:
    """train: all pictures of the training folder that can be read. held: which of them were held out by us, to choose by.

    own: the user's own validation and test pictures, by split. seen: the survey. fingerprint: of the data as they came.
    """

    origin: str
    train: Source
    held: Bool[np.ndarray, "n"]
    own: dict[str, Source]
    seen: Survey
    fingerprint: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def chooser(self) -> str:
        """What the pictures that choose between two models are called."""
        return "validation" if len(self.own) == 2 else "held out"

    @property
    def measurer(self) -> str:
        """What the pictures that only measure are called; "" where there are none."""
        return "test" if "test" in self.own else "validation" if self.own else ""

    @property
    def teaches_all(self) -> bool:
        """Whether the first answer learns from what was held out, too."""
        return bool(self.own)

    @property
    def learn(self) -> Source:
        """What is fine-tuned on."""
        return subset(self.train, np.flatnonzero(~self.held))

    @property
    def choose(self) -> Source | None:
        if len(self.own) == 2:
            return self.own["validation"]
        return subset(self.train, np.flatnonzero(self.held)) if self.held.any() else None

    @property
    def measured(self) -> Source | None:
        return self.own.get(self.measurer)

    @property
    def count(self) -> int:
        return len(self.train) + sum(map(len, self.own.values()))

    @cached_property
    def groups(self) -> Int[np.ndarray, "n"]:
        """A number for each training picture; pictures that are equal byte for byte share it."""
        number = np.arange(len(self.train))
        for group in equal_pictures(sizes(self.train), lambda place: self.train[place].picture) or ():
            number[group] = group[0]
        return number

    def too_small(self) -> list[tuple[str, int]]:
        """Classes of which too few pictures are there, all splits together, to say how well they are recognised."""
        counts = [class_counts(source) for source in (self.train, *self.own.values())]
        totals = {name: sum(count[name] for count in counts) for name in self.classes}
        return [(name, total) for name, total in totals.items() if total < FEW]


def read_photos(spec: str, share: float, seed: int, record: Path | None, say: Callable[[str], None]) -> Photos:
    """The pictures that `spec` names, surveyed; what cannot be read, or has no label, is left out and said.

    share: of the training pictures to hold out. record: where the split is written, or taken from. Raises UserError on
    whatever a person has to mend.
    """
    if not 0 < share < 1:
        raise UserError(f"--validation is {share:g}; give a share of the training pictures above 0 and below 1.")
    found, notes = splits.read(spec)
    if "train" not in found:
        raise UserError(f"{spec} has no training pictures, only {listed(found)}: give it to vitrail evaluate.")
    train = found["train"]
    own = {name: found[name] for name in ("validation", "test") if name in found}
    present = np.unique(np.asarray(train.labels)[np.asarray(train.labels) >= 0])
    if len(present) < 2:
        only = f" ({train.classes[int(present[0])]})" if len(present) else ""
        raise UserError(f"{spec} has only one class{only}: give pictures of at least two.")
    held = np.zeros(len(train), bool)
    if len(own) < 2:
        known = record is not None and record.exists()
        held, more = splits.recall(record, train, share) if known and record else splits.hold_out(train, share, seed)
        notes = (*notes, *more)
        if record is not None and not known:
            splits.write(record, train, held, share, seed)
    for note in notes:
        say(f"note: {note}")
    made = not own and bool(held.any())
    looked_at = Splits(
        subset(train, np.flatnonzero(~held)) if made else train,
        subset(train, np.flatnonzero(held)) if made else own.get("validation"),
        own.get("test"),
        spec,
        made,
    )
    seen = survey(looked_at, seconds=SURVEY_SECONDS)
    refuse_if_unreadable(seen, strict=False)
    for line in seen.lines():
        say(line.partition("; --balance")[0])  # which `fit` has not
    bad = {item.name for item in seen.unreadable}
    kept = usable(train, bad)
    fingerprint = digest([source.fingerprint for source in (train, *own.values())])
    photos = Photos(spec, subset(train, kept), held[kept], {}, seen, fingerprint)
    own = {name: subset(source, usable(source, bad)) for name, source in own.items()}
    photos = replace(photos, own={name: source for name, source in own.items() if len(source)})
    if len(np.unique(photos.learn.labels)) < 2:
        raise UserError(
            f"{spec} leaves fewer than two classes to learn from; add pictures, or give a smaller --validation."
        )
    if photos.choose is None and not photos.own:
        raise UserError(f"{spec}: no picture could be held out to judge by, for each class has but one; add pictures.")
    if small := photos.too_small():
        named = listed(f"{name} ({count})" for name, count in small)
        say(f"warning: classes with fewer than {FEW} pictures, too few to judge: {named}.")
    return photos


def usable(source: Source, bad: set[str]) -> Int[np.ndarray, "n"]:
    """Places of the pictures that can be read and have a label."""
    labels = np.asarray(source.labels)
    return np.array(
        [i for i in range(len(source)) if labels[i] >= 0 and (not bad or source[i].name not in bad)], np.int64
    )


def without(photos: Photos, problems: dict[str, dict[int, str]]) -> Photos:
    """Less the pictures that turned out unreadable when they were used: by split, place -> why."""
    kept = np.array([i for i in range(len(photos.train)) if i not in problems.get("train", {})], np.int64)
    own: dict[str, Source] = {
        name: subset(source, [i for i in range(len(source)) if i not in problems.get(name, {})])
        for name, source in photos.own.items()
    }
    return replace(photos, train=subset(photos.train, kept), held=photos.held[kept], own=own)
