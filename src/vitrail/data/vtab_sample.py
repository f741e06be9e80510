"""The 1,000 training pictures of each of VTAB-1k's tasks, and its test pictures.

Unusual: which 1,000 pictures train is part of the benchmark. They are train[:800] and val[:200] in the order of TFDS's
records, and a draw of any other pictures is *not VTAB-1k's sample*; every draw says which it is. Three kinds of files give
the sample itself: what TFDS has prepared; lists of files made from that (below); and the owners' own files, for the tasks
whose order in TFDS follows from the files' names (data/vtab_owners.py).

Lists: a folder with train800val200.txt (800 lines of train, then 200 of val) and test.txt. A line is a picture's path from
that folder, a space, and its label, counted from 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source
from vitrail.data import tfds, vtab_owners
from vitrail.data.published import files
from vitrail.data.sources import Read, key, listed, place, subset
from vitrail.data.vtab import TASKS, Task, label
from vitrail.data.vtab_owners import Ordered

TRAIN, VALIDATION = 800, 200
NOT_THE_SAMPLE = "not VTAB-1k's sample"


@dataclass(frozen=True)
class Draw:
    """The pictures of a task. train, validation: 800 and 200; test: all. origin: the files they are from.

    sample: "VTAB-1k's sample" or why these are not it.
    """

    train: Source
    validation: Source
    test: Source
    origin: str
    sample: str

    @property
    def both(self) -> Source:
        """The 1,000 that train."""
        return Joined(self.train, self.validation)


@dataclass(frozen=True)
class Joined:
    """Two sources of the same classes, one after the other."""

    first: Source
    second: Source

    @property
    def classes(self) -> tuple[str, ...]:
        return self.first.classes

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([self.first.labels, self.second.labels])

    @property
    def fingerprint(self) -> str:
        return f"{self.first.fingerprint}{self.second.fingerprint}"

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def key(self, index: int) -> str:
        source, within = self._find(index)
        return key(source, within)

    def __getitem__(self, index: int) -> Sample:
        source, within = self._find(index)
        return source[within]

    def _find(self, index: int) -> tuple[Source, int]:
        index = place(index, len(self))
        return (self.first, index) if index < len(self.first) else (self.second, index - len(self.first))


def find(task: Task, path: Path) -> Draw | None:
    """The task's pictures below `path`, or in it: lists, then TFDS's, then its owners' files. None where there are none.

    Raises UserError where there are some that are damaged.
    """
    for folder in (path, *(path / name for name in (task.name, *task.names, task.folder))):
        if (folder / "train800val200.txt").is_file() and (folder / "test.txt").is_file():
            return _listed(task, folder)
    if (prepared := tfds.find(path, task.folder, task.config, task.majors)) is not None:
        right = prepared.major in task.majors
        doubt = "" if right else f"TFDS's version {prepared.version} is not {task.major}.*"
        return _draw(task, _prepared(task, prepared), f"TFDS, {prepared.folder}", doubt, whole=False)
    if (owned := vtab_owners.find(task, path)) is not None:
        return _draw(task, *owned)
    return None


def read(name: str, path: Path) -> Read:
    """The 1,000 pictures of a task as "train", and "test", with a note on which sample it is. Raises UserError."""
    task = TASKS[name]
    found = find(task, path)
    if found is None:
        raise UserError(
            f"{path} has no files of {task.title}: prepare TFDS's {'/'.join(filter(None, (task.folder, task.config)))} "
            f"there, or unpack what {task.where} publishes."
        )
    return {"train": found.both, "test": found.test}, (f"{task.title}: {found.origin}; {found.sample}.",)


def _prepared(task: Task, prepared: tfds.Prepared) -> Ordered:
    names = prepared.names("label", task.classes) if task.rule is label else tuple(map(str, range(task.classes)))
    change = vtab_owners.whiten if task.folder == "dsprites" else None

    def ordered(split: str) -> tuple[int, Callable[[range], Source]]:
        records = prepared.records(split)
        return len(records), lambda span: tfds.source(prepared, records, span, task.rule, task.features, names, change)

    needed = {"train", task.validation[0], task.test[0]}
    if missing := needed - set(prepared.splits):
        raise UserError(f"{prepared.folder} has no split {listed(sorted(missing))}; prepare it again.")
    return {split: ordered(split) for split in sorted(needed)}


def _draw(task: Task, splits: Ordered, origin: str, doubt: str = "", whole: bool = True) -> Draw:
    """Cuts the pictures out, and says whether they are VTAB-1k's. whole: a split that only tests must be complete too."""

    def first(taken: tuple[str, tuple[int, ...]]) -> int:
        return sum(share * splits[taken[0]][0] // 100 for share in taken[1])

    def cut(taken: tuple[str, tuple[int, ...]], most: int | None, *after: tuple[str, tuple[int, ...]]) -> Source:
        """At most so many, and none that come after: sets smaller than the real ones must not overlap either."""
        count, source = splits[taken[0]]
        start = first(taken)
        ends = [count, *(first(other) for other in after if other[0] == taken[0])]
        return source(range(start, min(ends) if most is None else min(*ends, start + most)))

    for split, (count, _) in splits.items():
        if not doubt and (whole or split in ("train", task.validation[0])) and count != task.counts[split]:
            doubt = f"{split} has {count:,} pictures in place of {task.counts[split]:,}"
    sample = f"{NOT_THE_SAMPLE} ({doubt})" if doubt else "VTAB-1k's sample"
    train = cut(("train", ()), TRAIN, task.validation, task.test)
    return Draw(train, cut(task.validation, VALIDATION, task.test), cut(task.test, None), origin, sample)


def _listed(task: Task, folder: Path) -> Draw:
    def source(file: Path) -> Source:
        names, labels = [], []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            name, _, word = line.strip().rpartition(" ")
            if not name or not word.isdigit() or int(word) >= task.classes:
                raise UserError(
                    f"{file}, line {number}, is {line!r}: it must be a path, a space, and a label from 0 to "
                    f"{task.classes - 1}."
                )
            names.append(name)
            labels.append(int(word))
        return files(folder, names, labels, tuple(map(str, range(task.classes))))

    both, test = source(folder / "train800val200.txt"), source(folder / "test.txt")
    count = len(both)
    whole = count == TRAIN + VALIDATION
    first = TRAIN if whole else count * TRAIN // (TRAIN + VALIDATION)
    sample = "VTAB-1k's sample, as its lists have it"
    if not whole:
        sample = f"{NOT_THE_SAMPLE} (train800val200.txt has {count} lines)"
    return Draw(subset(both, range(first)), subset(both, range(first, count)), test, f"lists, {folder}", sample)
