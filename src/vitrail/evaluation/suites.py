"""ImageNet's family, measured as each set's owners do: ReaL, V2, A, R, Sketch and ObjectNet.

Unusual: where several classes of a picture are right (ReaL's labels, an ObjectNet object), the picture counts as one of the
class among them that the model places first. So top-1 asks whether the model's first class is right, top-5 whether a right
one is among its first five, and both follow from the table of evaluation/metrics.py, exact at any batch size and number of
processes.

- ReaL (arXiv 2006.07159): all 1,000 classes; pictures without a right class do not count.
- V2 (1902.10811), Sketch (1905.13549): as ImageNet itself.
- A (1907.07174), R (2006.16241): the 200 classes of the set alone are compared.
- ObjectNet (Barbu et al. 2019): all 1,000 classes, on the 113 objects that ImageNet has; a class counts if the mapping
  files that come with ObjectNet say it is the object.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from vitrail.core.device import Precision
from vitrail.core.errors import UserError
from vitrail.core.ranks import gather_objects
from vitrail.core.types import Row, Sample, Source
from vitrail.data import imagenet
from vitrail.data.loader import PictureLoader
from vitrail.data.sources import key, listed, subset
from vitrail.evaluation.metrics import Tally, merge, tally
from vitrail.inference.predict import Prediction, predict
from vitrail.weights import labels

FAMILY = ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "objectnet")
RESTRICTED = {"imagenet-a": 200, "imagenet-r": 200}
"""The sets whose owners compare their own classes alone, and how many those are."""
ALIKE = 0.9
"""The share of its names that must be ImageNet's before a head of 1,000 classes is taken for one."""

Truth = Literal["original", "real"]


@dataclass(frozen=True)
class Relabelled:
    """A source under the names that a model uses; labels: into `classes`, one that is right, for each sample."""

    source: Source
    classes: tuple[str, ...]
    labels: np.ndarray

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.source[index], label=int(self.labels[index]))


@dataclass(frozen=True)
class Suite:
    """What to look at, and how to count.

    source: its classes are those that are compared, in the order of `kept`. kept: the model's classes that are compared;
    None: all. right: (n, m) for each picture all classes that are right, -1 where there are fewer; None: its label alone.
    notes: to be shown.
    """

    source: Relabelled
    kept: Int[np.ndarray, "k"] | None = None
    right: Int[np.ndarray, "n m"] | None = None
    notes: tuple[str, ...] = ()

    def measure(
        self,
        model: nn.Module,
        loader: PictureLoader,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        of: Callable[[Tensor], Tensor] | None = None,
    ) -> Tally:
        """The pictures of a loader of this source, all processes' shares together; each gets the whole. `of` as of
        `predict`."""
        predictions = predict(model, loader, device=device, precision=precision, progress=True, of=of)
        own = tally(self._counted(predictions), len(self.source.classes), self.source)
        return merge(gather_objects(own))

    def rows(self, counted: Tally, expected_count: int) -> list[Row]:
        """The headline numbers; where several classes are right, those that then still mean something."""
        rows = counted.rows(expected_count)
        return rows if self.right is None else [row for row in rows if row.name.startswith("top-")]

    def _counted(self, predictions: Iterator[Prediction]) -> Iterator[Prediction]:
        for prediction in predictions:
            logits = prediction.logits
            if self.kept is not None:
                logits = logits[:, torch.from_numpy(self.kept)]
            targets = prediction.targets
            if self.right is not None:
                right = torch.from_numpy(self.right)[prediction.index]
                placed = logits.gather(1, right.clamp(min=0)).masked_fill(right < 0, -torch.inf)
                # Right classes are in ascending order, so that of equal ones the first is meant, as everywhere.
                targets = right.gather(1, placed.argmax(1, keepdim=True))[:, 0]
            yield Prediction(logits, targets, prediction.index)


def suite(name: str, path: Path, source: Source, names: Sequence[str], classes: int, truth: Truth) -> Suite:
    """How to measure a model with these class names (perhaps none) on a set of the family, read from `path`.

    Raises UserError where the model's classes are not ImageNet's, or lack some that the set has.
    """
    if truth == "real" and name != "imagenet":
        raise UserError(f"--labels real is for ImageNet's own validation pictures; {name} has none of them.")
    ids, notes = wordnet_ids(names, classes)
    place = {identity: column for column, identity in enumerate(ids)}
    if name == "objectnet":
        return _objectnet(path, source, ids, place)
    if truth == "real":
        chosen = _real(source, ids, place)
        return replace(chosen, notes=(*notes, *chosen.notes))
    if (without := int((np.asarray(source.labels) < 0).sum())) > 0:
        raise UserError(
            f"{without:,} pictures of {name}:{path} have no label; put the devkit's ILSVRC2012_validation_ground_truth.txt "
            "and meta.mat, or Kaggle's LOC_val_solution.csv, beside them, or give --labels real."
        )
    order = labels.imagenet1k_ids()
    own = [order[int(word)] for word in source.classes] if name == "imagenet-v2" else list(source.classes)
    if lost := [identity for identity in own if identity not in place]:
        raise UserError(
            f"{name} has classes that the checkpoint does not know ({listed(lost)}): finetune it on ImageNet."
        )
    columns = np.array([place[identity] for identity in own], np.int64)
    if name not in RESTRICTED:
        return Suite(Relabelled(source, ids, columns[source.labels]), notes=notes)
    if len(own) != RESTRICTED[name]:
        notes = (*notes, f"{path} has {len(own)} classes of the {RESTRICTED[name]} of {name}: only these are compared.")
    # In the model's order, as equal logits go to its lower class.
    kept = np.sort(columns)
    compared = tuple(ids[column] for column in kept)
    return Suite(Relabelled(source, compared, np.searchsorted(kept, columns)[source.labels]), kept, notes=notes)


def wordnet_ids(names: Sequence[str], classes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The WordNet id of each class of a model (a name of its own where it is none of ImageNet's), and notes.

    Raises UserError where a model of 1,000 classes has other names than ImageNet's, or none and another number of classes.
    """
    order, known = labels.imagenet1k_ids(), labels.imagenet1k()
    if any(imagenet.WORDNET.fullmatch(name) for name in names):
        return tuple(names), ()
    if classes == labels.IMAGENET_1K:
        alike = sum(_first(own) == _first(theirs) for own, theirs in zip(names, known, strict=True)) if names else 0
        if names and alike < ALIKE * classes:
            raise UserError(
                f"The checkpoint's 1,000 classes are not ImageNet's ({listed(names, 3)}): only {alike} have the name "
                "that ImageNet has in their place; give a checkpoint of ImageNet."
            )
        note = "The checkpoint names no classes: its 1,000 are taken for ImageNet's, in the order of every public head."
        return order, () if names else (note,)
    if classes == labels.IMAGENET_21K and (not names or tuple(names) == labels.imagenet21k()):
        return labels.imagenet21k_ids(), ()
    if not names:
        raise UserError(f"The checkpoint has {classes} classes without names: give one of ImageNet's 1,000 classes.")
    by_name = dict(zip(known, order, strict=True))
    return tuple(by_name.get(name, name) for name in names), ()


def _first(name: str) -> str:
    """The first of a class's names, as libraries spell it: "great white shark" for all that follows a comma."""
    return name.split(",")[0].split(" (n")[0].strip().replace("_", " ").casefold()


def _real(source: Source, ids: tuple[str, ...], place: Mapping[str, int]) -> Suite:
    """Raises UserError on pictures that are not called as ImageNet's validation pictures are."""
    answers, order = labels.real(), labels.imagenet1k_ids()
    if lost := [identity for identity in order if identity not in place]:
        raise UserError(
            f"ReaL has classes that the checkpoint does not know ({listed(lost)}): give a model of all 1,000."
        )
    numbers: list[int] = []
    for index in range(len(source)):
        number = imagenet.validation_number(key(source, index))
        if number is None or number >= len(answers):
            raise UserError(
                f"{source[index].name} is not called as ImageNet's validation pictures are "
                "(ILSVRC2012_val_00000001.JPEG), by whose numbers ReaL has its labels; give the owners' files."
            )
        numbers.append(number)
    counted = [index for index, number in enumerate(numbers) if answers[number]]
    if not counted:
        raise UserError("None of these pictures has a right class in ReaL; give more of them.")
    right = padded([[place[order[number]] for number in answers[numbers[index]]] for index in counted])
    left = len(numbers) - len(counted)
    note = f"ReaL: {left:,} of {len(numbers):,} pictures have no right class and do not count."
    return Suite(Relabelled(subset(source, counted), ids, right[:, 0]), right=right, notes=(note,))


def _objectnet(path: Path, source: Source, ids: tuple[str, ...], place: Mapping[str, int]) -> Suite:
    order = labels.imagenet1k_ids()
    answers = imagenet.objectnet_answers(imagenet.objectnet_root(path))
    wanted = {number for name in source.classes for number in answers[name]}
    if lost := [order[number] for number in sorted(wanted) if order[number] not in place]:
        raise UserError(f"ObjectNet has classes that the checkpoint does not know ({listed(lost)}).")
    each = padded([[place[order[number]] for number in answers[name]] for name in source.classes])
    right = each[source.labels]
    return Suite(Relabelled(source, ids, right[:, 0]), right=right)


def padded(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "n m"]:
    """Rows of different length as one table, each ascending and then filled with -1."""
    table = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = sorted(values)
    return table
