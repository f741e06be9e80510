"""What `vitrail fit` knows at any moment, and the run folder that says it: whole from the first answer on."""

import dataclasses
import shlex
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.analysis.figures import curves
from vitrail.core.errors import UserError
from vitrail.core.runs import FORMAT, RunFolder, read_json, write_json
from vitrail.core.types import Row, Sample
from vitrail.core.values import to_json
from vitrail.evaluation.chance import SURE, Threshold, mcnemar, threshold
from vitrail.evaluation.metrics import spoken
from vitrail.evaluation.suspects import Suspect, suspects
from vitrail.experiments.costs import commit, versions
from vitrail.experiments.first_answer import FirstAnswer, Judged
from vitrail.experiments.photos_data import Photos
from vitrail.models.classifier import Classifier
from vitrail.training.pace import Outcome
from vitrail.weights import native

CONFIDENCES = "confidences.json"
PROMISE = 0.95
MOST_LISTED = 200
"""Suspects that results.json names beyond those that are counted as wrong."""


@dataclass(frozen=True)
class Comparison:
    """The first answer and what was fine-tuned from it, on pictures that neither has learnt from.

    first, second: how many each gets right, of `count`. gained, lost: that one alone gets right. chance: McNemar's.
    """

    pictures: str
    count: int
    first: int
    second: int
    gained: int
    lost: int
    chance: float

    @classmethod
    def of(cls, first: Judged, second: Judged) -> "Comparison":
        _, here, there = np.intersect1d(first.index, second.index, return_indices=True)
        a, b = first.right[here], second.right[there]
        gained, lost = int((b & ~a).sum()), int((a & ~b).sum())
        return cls(first.name, len(a), int(a.sum()), int(b.sum()), gained, lost, mcnemar(a, b))

    @property
    def better(self) -> bool:
        return self.second > self.first

    def said(self) -> str:
        first, second = 100 * self.first / self.count, 100 * self.second / self.count
        much = "more than chance" if self.chance < SURE else "no more than chance may bring"
        return (
            f"on the {self.count} {self.pictures} pictures that choose: first answer {first:.2f} %, fine-tuned "
            f"{second:.2f} %, {second - first:+.2f} points ({self.gained} gained, {self.lost} lost; {much}, exact "
            f"McNemar p = {self.chance:.2g}); {'the fine-tuned model' if self.better else 'the first answer'} is kept"
        )


@dataclass(frozen=True)
class Named:
    """A suspect with its picture. pictures: what those it is among are called."""

    pictures: str
    sample: Sample
    suspect: Suspect


@dataclass(frozen=True)
class State:
    """The best so far.

    kept: the model, with `judged`, what it says of pictures that it was not trained on; None before there is any. first: the
    first answer; None where there was nothing pre-trained. trained: how the training ended; None before there was any.
    seconds: after which each was there. stopped: before the end.
    """

    photos: Photos
    settings: dict[str, Any]
    command: str
    first: FirstAnswer | None = None
    kept: Classifier | None = None
    judged: tuple[Judged, ...] = ()
    comparison: Comparison | None = None
    trained: Outcome | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    stopped: bool = False

    @property
    def what(self) -> str:
        if self.first is None:
            return "trained from random weights"
        return "fine-tuned" if self.kept is not self.first.model else "first answer"

    @property
    def late(self) -> str:
        """What to say of a training that had no time for all of its steps; "" of any other."""
        trained = self.trained
        if trained is None or not trained.late:
            return ""
        return (
            f"the minutes were over after {trained.step:,} of {trained.total:,} planned steps, for the machine was slower "
            "than expected; --resume goes on from there"
        )

    @cached_property
    def headline(self) -> Judged:
        """What only measures, where there is such a thing; else what rests on the most pictures."""
        own = [judged for judged in self.judged if judged.name == self.photos.measurer]
        return own[0] if own else max(self.judged, key=lambda judged: len(judged.index))

    @cached_property
    def rows(self) -> list[Row]:
        """The headline first, each name beginning with that of its pictures."""
        parts = [self.headline, *(judged for judged in self.judged if judged is not self.headline)]
        rows = [_named(row, part) for part in parts[:1] for row in part.tally.rows()]
        return rows + [_named(part.tally.rows()[0], part) for part in parts[1:]]

    @cached_property
    def suspects(self) -> list[Named]:
        """All pictures that were judged by a model which did not know them, the most suspect first."""
        parts = self.first.judged if self.first is not None else self.judged
        where = [(part, int(index)) for part in parts for index in part.index]
        ranked = suspects(np.concatenate([p.probabilities for p in parts]), np.concatenate([p.labels for p in parts]))
        likely = sum(suspect.likely for suspect in ranked)
        found = []
        for suspect in ranked[: max(likely, MOST_LISTED)]:
            part, index = where[suspect.index]
            found.append(Named(part.name, part.source[index], suspect))
        return found

    @property
    def likely(self) -> list[Named]:
        """Those that confident learning counts as labelled wrongly."""
        return [named for named in self.suspects if named.suspect.likely]

    @cached_property
    def confidences(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every judged picture: the probability of the kept model's answer, and whether it is right."""
        confidence = np.concatenate([part.probabilities.max(1) for part in self.judged])
        return confidence, np.concatenate([part.right for part in self.judged])

    @property
    def trusted(self) -> Threshold:
        return threshold(*self.confidences, PROMISE)

    def confusions(self, most: int) -> list[tuple[str, str, int]]:
        """(is, taken for, times) of the headline's pictures, the most frequent first."""
        counts = self.headline.tally.confusion.copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:most]
        places = [divmod(int(place), counts.shape[1]) for place in order]
        names = self.photos.classes
        return [(names[i], names[j], int(counts[i, j])) for i, j in places if counts[i, j]]


def _named(row: Row, part: Judged) -> Row:
    return dataclasses.replace(row, name=f"{part.name} {row.name}")


def accuracies(state: State) -> list[str]:
    """Top-1 on each kind of pictures, the headline first, with what they did besides measuring."""
    said = []
    for row in state.rows:
        name = row.name.removesuffix(" top-1")
        if name == row.name:
            continue
        role = "measured, chose nothing" if name == state.photos.measurer else ""
        if name == "held out":
            role = "they chose between the two models" if state.comparison else "they teach nothing"
        said.append(f"{name}: {spoken(row)} pictures" + (f" ({role})" if role else ""))
    return said


def lines(state: State) -> list[str]:
    """What was found, for the person who waits."""
    said = []
    if confused := state.confusions(3):
        said.append("most often confused: " + "; ".join(f"{a} taken for {b} ({n})" for a, b, n in confused) + ".")
    if likely := state.likely:
        shown = "; ".join(
            f"{named.sample.name} (labelled {state.photos.classes[named.suspect.given]}, looks like "
            f"{state.photos.classes[named.suspect.other]})"
            for named in likely[:3]
        )
        said.append(f"likely mislabelled: {len(likely)}, first {shown}.")
    if pairs := state.photos.seen.pairs:
        said.append(f"the same picture in two classes or splits: {len(pairs)}.")
    trusted = state.trusted
    share = f"{100 * PROMISE:g} %"
    said.append(
        f"answers with a confidence of {trusted.confidence:.2f} or more are right at least {share} of the time: of "
        f"{trusted.of} held-out pictures {trusted.of - trusted.trusted} would be left unsure."
        if trusted.trusted
        else f"the {trusted.of} held-out pictures are too few, or too often mistaken, to promise {share} for any answer."
    )
    return said


def next_commands(state: State, folder: RunFolder) -> list[str]:
    place, photos = str(folder.path), state.photos.origin
    commands = [
        ["predict", place, "NEW_PICTURES"],
        ["predict", place, "NEW_PICTURES", "--sort-into", "SORTED"],
        ["evaluate", place, "--data", photos],
        *([["fit", photos, "--out", place, "--resume"]] if state.stopped or state.late else []),
    ]
    return [shlex.join(["vitrail", *words]) for words in commands]


def write(state: State, folder: RunFolder) -> None:
    """Every file of the run folder, as of now; the model first, what speaks of it afterwards."""
    from vitrail.experiments.photos_report import write_report

    assert state.kept is not None
    photos, model = state.photos, state.kept
    native.save(model.cpu(), folder.file("model.safetensors"))
    confidence, right = state.confidences
    order = np.argsort(-confidence, kind="stable")
    described = {
        "format": FORMAT,
        "of": [part.name for part in state.judged],
        "confidence": [round(float(value), 6) for value in confidence[order]],
        "right": [bool(value) for value in right[order]],
    }
    write_json(folder.file(CONFIDENCES), described)
    config = {
        "format": FORMAT,
        "command": state.command,
        "settings": state.settings,
        "versions": versions(),
        "commit": commit(),
        "data": {
            "origin": photos.origin,
            "fingerprint": photos.fingerprint,
            "classes": list(photos.classes),
            "counts": {"train": len(photos.train), **{name: len(source) for name, source in photos.own.items()}},
            "held_out": int(photos.held.sum()),
            "unreadable": [to_json(item) for item in photos.seen.unreadable],
        },
        "model": {"config": to_json(model.config), "preprocess": to_json(model.preprocess)},
    }
    fine_tuned = folder.file("fine-tuned")
    for name in ("metrics.jsonl", "curves.png"):
        if (fine_tuned / name).exists():
            shutil.copyfile(fine_tuned / name, folder.file(name))
    metrics = folder.metrics()
    if not folder.file("curves.png").exists() and metrics:
        curves(metrics, folder.file("curves.png"))
    write_json(folder.file("results.json"), results(state))
    write_report(state, config, metrics, folder, next_commands(state, folder))
    write_json(folder.file("config.json"), config)


def results(state: State) -> dict[str, Any]:
    photos, trained = state.photos, state.trained
    return {
        "rows": [to_json(row) for row in state.rows],
        "kept": state.what,
        "head": state.first.head if state.first is not None else None,
        "first_answer": [to_json(_named(part.tally.rows()[0], part)) for part in state.first.judged]
        if state.first is not None
        else [],
        "comparison": to_json(state.comparison) if state.comparison is not None else None,
        "training": trained
        and {"steps": trained.step, "planned_steps": trained.total, "ended_by_deadline": trained.late},
        "trusted": to_json(state.trusted) if state.trusted.trusted else None,
        "seconds": {name: round(value, 1) for name, value in state.seconds.items()},
        "unreadable": [to_json(item) for item in photos.seen.unreadable],
        "suspects": [
            {
                "name": named.sample.name,
                "pictures": named.pictures,
                "given": photos.classes[named.suspect.given],
                "other": photos.classes[named.suspect.other],
                "probability": round(named.suspect.probability, 6),
                "probability_of_given": round(named.suspect.probability_of_given, 6),
                "likely": named.suspect.likely,
            }
            for named in state.suspects
        ],
        "duplicates": [to_json(pair) for pair in photos.seen.pairs],
        "too_small": [{"class": name, "pictures": count} for name, count in photos.too_small()],
    }


def read_confidences(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What `write` kept. Raises UserError where a run has none."""
    path = folder / CONFIDENCES
    if not path.exists():
        raise UserError(
            f"--sort-into needs a run of `vitrail fit`, which knows how sure it must be: {folder} has no {CONFIDENCES}."
        )
    data = read_json(path)
    try:
        confidence, right = np.array(data["confidence"], float), np.array(data["right"], bool)
        if confidence.shape != right.shape or confidence.ndim != 1:
            raise ValueError("its two lists differ in length")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); run `vitrail fit` again.") from error
    return confidence, right
