"""The pictures of a run: opened, looked at, and those that cannot be read left out, alike on every process."""

import dataclasses
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.core import ranks
from vitrail.core.errors import UserError
from vitrail.core.runs import read_json
from vitrail.core.types import Source
from vitrail.data import unlabelled
from vitrail.data.loader import PictureLoader
from vitrail.data.sources import digest, limit, subset
from vitrail.data.splits import Splits, open_data
from vitrail.data.survey import refuse_if_unreadable, survey
from vitrail.experiments.costs import picture_sizes
from vitrail.experiments.plan import DataFacts
from vitrail.experiments.recipe import Recipe

SPLITS = ("train", "validation", "test")
Say = Callable[[str], None]


@dataclass
class Pictures:
    """splits: without what cannot be read, and no more to train on than --limit. fingerprint: of the data as they came.

    unreadable: what was left out, by split and name, and why. said: which of these reasons were printed, so that each
    picture is named once.
    """

    splits: Splits
    fingerprint: str
    unreadable: dict[tuple[str, str], str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.splits.train.classes

    def facts(self) -> DataFacts:
        """Counts, and the median size of some pictures."""
        heights, widths = zip(*picture_sizes(self.splits.train, 32), strict=True)
        return DataFacts(len(self.splits.train), len(self.classes), int(np.median(heights)), int(np.median(widths)))

    def note_problems(self, **loaders: PictureLoader | None) -> None:
        """Pictures that only failed while they were used, by their split's name, count among the unreadable ones too."""
        for split, loader in loaders.items():
            if loader is not None:
                for index, reason in loader.problems.items():
                    self.unreadable[split, loader.source[index].name] = reason

    def left_out(self) -> list[dict[str, str]]:
        return [{"split": split, "name": name, "reason": why} for (split, name), why in self.unreadable.items()]

    def described(self) -> dict[str, Any]:
        """For config.json."""
        return {
            "origin": self.splits.origin,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "counts": {split: len(source) for split, source in _sources(self.splits)},
            "unreadable": self.left_out(),
        }


def open_pictures(recipe: Recipe, say: Say) -> Pictures:
    """What --data names, surveyed; when a run is continued, what it began with, or a refusal."""
    splits = recipe.own.splits or _open(recipe)
    for note in splits.notes:
        say(f"note: {note}")
    pictures = Pictures(splits, digest([source.fingerprint for _, source in _sources(splits)]))
    if recipe.run.resume:
        pictures.unreadable = _recall(recipe, pictures)
    elif not recipe.own.surveyed:
        pictures.unreadable = ranks.by_first(lambda: _look(recipe, splits, say))
    if pictures.unreadable:
        bad = {split: {name for other, name in pictures.unreadable if other == split} for split in SPLITS}
        kept: dict[str, Any] = {split: _without(source, bad[split]) for split, source in _sources(splits)}
        pictures.splits = dataclasses.replace(splits, **kept)
    if recipe.data.limit:
        train = limit(pictures.splits.train, recipe.data.limit, recipe.run.seed)
        pictures.splits = dataclasses.replace(pictures.splits, train=train)
    return pictures


def _open(recipe: Recipe) -> Splits:
    settings = recipe.data
    if not settings.data:
        what = "of pictures" if recipe.masked else "with one folder a class"
        raise UserError(f"--data is missing; give a folder {what}, or sample:fashion to try it out.")
    opened = unlabelled.open_pictures if recipe.masked else open_data
    record = Path(str(recipe.run.out)) / "split.json"
    keep = None if recipe.run.dry_run and not recipe.run.resume else record

    def read() -> Splits:
        return opened(settings.data, validation=settings.validation, seed=recipe.run.seed, record=keep)

    found: list[Splits] = []

    def read_first() -> None:
        if keep is not None and not recipe.run.resume:
            # Of a run that was refused before it began; its data may have been mended since.
            keep.unlink(missing_ok=True)
        found.append(read())

    ranks.by_first(read_first)
    return found[0] if found else read()  # the others read the split that the first has recorded


def _look(recipe: Recipe, splits: Splits, say: Say) -> dict[tuple[str, str], str]:
    seen = survey(splits)
    refuse_if_unreadable(seen, recipe.data.strict)
    if recipe.masked:
        for split, source in _sources(splits):
            say(f"{split}: {len(source):,} pictures, whose labels are not read")
        seen = dataclasses.replace(seen, counts={})
    for line in seen.lines():
        say(line)
    return {(item.split, item.name): item.reason for item in seen.unreadable}


def _recall(recipe: Recipe, pictures: Pictures) -> dict[tuple[str, str], str]:
    path = Path(str(recipe.run.out)) / "config.json"
    data = ranks.by_first(lambda: read_json(path)["data"])
    if data.get("fingerprint") != pictures.fingerprint:
        raise UserError(
            f"--resume: {pictures.splits.origin} has changed since this run began (its fingerprint in {path} is another "
            "one); bring the data back as they were, or start a new run with another --out."
        )
    return {(item["split"], item["name"]): item["reason"] for item in data["unreadable"]}


def _sources(splits: Splits) -> list[tuple[str, Source]]:
    """The splits that there are, by name."""
    return [(name, source) for name in SPLITS if (source := getattr(splits, name)) is not None]


def _without(source: Source, names: Container[str]) -> Source | None:
    kept = [index for index in range(len(source)) if source[index].name not in names]
    return subset(source, kept) if kept else None
