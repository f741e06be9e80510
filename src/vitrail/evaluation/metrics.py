"""Every number here is derived from a table with one line a picture, kept in the order of the source.

So no result can depend on the batch size or on how many processes shared the work: they change who fills in a line,
not what the table says; and a picture that was counted twice, or never, is found. A line takes 48 bytes, so that a
million pictures take 48 MB.

Fractions are in [0, 1] throughout; only `Tally.rows` speaks in per cent.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from vitrail.core.device import Precision
from vitrail.core.errors import UserError
from vitrail.core.ranks import gather_objects
from vitrail.core.types import Batch, Row, Source
from vitrail.inference.predict import BROKEN, Prediction, broken, predict

NORMAL_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


class CountMismatch(AssertionError):
    """Some picture was counted twice or never: a fault of the program, not of its user."""


@dataclass(frozen=True)
class Bin:
    """The pictures whose predicted class got a probability in (low, high]. The means are None where there are none."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Mistake:
    """A picture taken for another class: its place in the source, and the two classes with their probabilities."""

    index: int
    true: int
    predicted: int
    probability: float
    probability_of_true: float


@dataclass(frozen=True)
class ClassResult:
    """One class. `recall` is None where no picture is of it, `precision` where none was taken for it.

    low, high: the 95 % interval of the recall.
    """

    label: int
    count: int
    recall: float | None
    low: float | None
    high: float | None
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class Tally:
    """What became of n pictures, one line each, sorted by index.

    classes: how many the model tells apart (k).
    index: place in the source. true, predicted: class; equal logits go to the lowest class.
    rank: how many classes come before the true one, by logit, then by number; 0 is right.
    confidence: softmax probability of the predicted class. loss: negative log-likelihood of the true class, in nats.
    """

    classes: int
    index: Int[np.ndarray, "n"]
    true: Int[np.ndarray, "n"]
    predicted: Int[np.ndarray, "n"]
    rank: Int[np.ndarray, "n"]
    confidence: Float[np.ndarray, "n"]
    loss: Float[np.ndarray, "n"]

    @property
    def count(self) -> int:
        return self.index.size

    @property
    def accuracy(self) -> float:
        """Top-1, in [0, 1]."""
        return self.top(1)

    def top(self, places: int) -> float:
        """The share of pictures whose true class is among the first `places`; 1.0 where there are no more classes."""
        return int((self.rank < places).sum()) / self.count

    @property
    def mean_loss(self) -> float:
        """Mean negative log-likelihood, in nats."""
        return float(self.loss.mean())

    @cached_property
    def confusion(self) -> Int[np.ndarray, "k k"]:
        """Counts: a row a true class, a column a predicted one. Takes 8 k^2 bytes."""
        cells = np.bincount(self.true * self.classes + self.predicted, minlength=self.classes**2)
        return cells.reshape(self.classes, self.classes)

    @cached_property
    def per_class(self) -> tuple[ClassResult, ...]:
        """All classes, in the model's order."""
        counts = np.bincount(self.true, minlength=self.classes)
        claims = np.bincount(self.predicted, minlength=self.classes)
        hits = np.bincount(self.true[self.rank == 0], minlength=self.classes)
        return tuple(
            _class_result(label, *map(int, row)) for label, row in enumerate(zip(counts, claims, hits, strict=True))
        )

    @property
    def macro(self) -> float:
        """The mean recall of the classes that have a picture, each counting the same."""
        recalls = [c.recall for c in self.per_class if c.recall is not None]
        return sum(recalls) / len(recalls)

    def calibration(self, bins: int = 15) -> tuple[Bin, ...]:
        """The reliability diagram of Guo et al. 2017 ("On Calibration of Modern Neural Networks", section 2)."""
        place = np.clip(np.ceil(self.confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        found = []
        for number in range(bins):
            inside = place == number
            count = int(inside.sum())
            means = (
                (float(self.confidence[inside].mean()), float((self.rank[inside] == 0).mean()))
                if count
                else (None, None)
            )
            found.append(Bin(number / bins, (number + 1) / bins, count, *means))
        return tuple(found)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over 15 bins of equal width (Guo et al. 2017, Eq. 3), in [0, 1]."""
        filled = [b for b in self.calibration() if b.confidence is not None and b.accuracy is not None]
        return sum(b.count * abs(b.accuracy - b.confidence) for b in filled) / self.count  # type: ignore[operator]

    def worst(self, number: int) -> tuple[Mistake, ...]:
        """The mistakes made with the most confidence, most confident first; ties in the order of the source."""
        wrong = np.flatnonzero(self.rank)
        order = wrong[np.lexsort((self.index[wrong], -self.confidence[wrong]))][:number]
        return tuple(
            Mistake(
                int(self.index[i]),
                int(self.true[i]),
                int(self.predicted[i]),
                float(self.confidence[i]),
                float(np.exp(-self.loss[i])),
            )
            for i in order
        )

    def rows(self, expected_count: int | None = None) -> list[Row]:
        """The headline numbers with their 95 % intervals, accuracies in per cent.

        Top-5 is left out where it says nothing (five classes or fewer). The proportions' intervals are Wilson's, the
        loss's is the normal one; macro accuracy and calibration error have none.

        Raises CountMismatch if the pictures counted are not `expected_count`.
        """
        if expected_count is not None and self.count != expected_count:
            raise CountMismatch(f"{self.count} pictures were evaluated where the data has {expected_count}")
        if not self.count:
            raise CountMismatch("no pictures were evaluated")
        rows = []
        for places in (1, 5):
            if places == 1 or self.classes > places:
                low, high = wilson(int((self.rank < places).sum()), self.count)
                rows.append(Row(f"top-{places}", 100 * self.top(places), 100 * low, 100 * high, self.count))
        rows.append(Row("macro accuracy", 100 * self.macro, count=self.count))
        half = NORMAL_95 * float(self.loss.std(ddof=1)) / self.count**0.5 if self.count > 1 else math.inf
        loss = Row(
            "negative log-likelihood", self.mean_loss, self.mean_loss - half, self.mean_loss + half, self.count, ""
        )
        rows.append(loss if self.count > 1 else replace(loss, low=None, high=None))
        rows.append(Row("calibration error", 100 * self.calibration_error, count=self.count))
        return rows


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), in [0, 1]; (0, 1) where nothing was counted."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, NORMAL_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5
    # The ends are exact where nothing, or everything, was hit; rounding would leave them a bit outside.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == count else centre + half)


def spoken(row: Row) -> str:
    """A row's value for people: "85.20 % [83.58, 86.69] of 2,000"."""
    digits = 2 if row.unit == "%" else 4
    parts = [f"{row.value:.{digits}f}", row.unit]
    if row.low is not None and row.high is not None:
        parts.append(f"[{row.low:.{digits}f}, {row.high:.{digits}f}]")
    if row.count is not None:
        parts.append(f"of {row.count:,}")
    return " ".join(part for part in parts if part)


def tally(predictions: Iterable[Prediction], classes: int, source: Source | None = None) -> Tally:
    """Count predictions of `classes` classes. The source only lends its names to error messages.

    Raises UserError for a picture whose logits are not finite, or that has no label.
    """
    empty = np.zeros(0, np.int64)
    parts = [Tally(classes, empty, empty, empty, empty, np.zeros(0), np.zeros(0))]
    parts += [_count(prediction, classes, source) for prediction in predictions]
    return merge(parts)


def merge(tallies: Sequence[Tally]) -> Tally:
    """Several processes' tables (or batches') as one. Raises CountMismatch if they share a picture."""
    classes = tallies[0].classes
    if any(t.classes != classes for t in tallies):
        raise CountMismatch(f"tallies of {sorted({t.classes for t in tallies})} classes cannot be merged")
    columns = [f.name for f in fields(Tally) if f.name != "classes"]
    joined = {name: np.concatenate([getattr(t, name) for t in tallies]) for name in columns}
    order = np.argsort(joined["index"], kind="stable")
    joined = {name: column[order] for name, column in joined.items()}
    twice = joined["index"][:-1][np.diff(joined["index"]) == 0]
    if twice.size:
        raise CountMismatch(f"picture {twice[0]} was evaluated more than once ({twice.size} such lines in all)")
    return Tally(classes, **joined)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: int,
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    progress: bool = False,
    source: Source | None = None,
) -> Tally:
    """Predict this process's share of the pictures and put all processes' shares together; each gets the whole."""
    predictions = predict(model, batches, device=device, precision=precision, progress=progress)
    return merge(gather_objects(tally(predictions, classes, source)))


def _count(prediction: Prediction, classes: int, source: Source | None) -> Tally:
    logits, target, index = prediction.logits, prediction.targets, prediction.index
    if target is None or target.is_floating_point():
        raise TypeError("counting needs one class index a picture")
    if logits.shape[1] != classes:
        raise ValueError(f"logits of {logits.shape[1]} classes where {classes} were announced")
    for row in broken(logits)[:1]:
        raise UserError(f"{_name(int(index[row]), source)}: {BROKEN}")
    for row in torch.nonzero((target < 0) | (target >= classes)).flatten().tolist()[:1]:
        raise UserError(
            f"{_name(int(index[row]), source)} has the label {int(target[row])}, which is none of the model's "
            f"{classes} classes; leave it out or give it a label."
        )
    target = target.long()
    log_probability = torch.log_softmax(logits.double(), 1)
    own = logits.gather(1, target[:, None])
    before = torch.arange(classes)[None] < target[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(1)
    # torch.argmax is documented to give the first of equal maxima, as `rank` does.
    predicted = logits.argmax(1)
    confidence = log_probability.gather(1, predicted[:, None])[:, 0].exp()
    loss = -log_probability.gather(1, target[:, None])[:, 0]
    return Tally(
        classes,
        *(column.numpy() for column in (index.long(), target, predicted, rank, confidence.clamp(max=1.0), loss)),
    )


def _class_result(label: int, count: int, claims: int, hits: int) -> ClassResult:
    low, high = wilson(hits, count) if count else (None, None)
    return ClassResult(
        label,
        count,
        hits / count if count else None,
        low,
        high,
        hits / claims if claims else None,
        2 * hits / (count + claims) if count + claims else None,
    )


def _name(index: int, source: Source | None) -> str:
    return f"picture {index}" if source is None else source[index].name
