"""Models examined on altered pictures: what each answers, as curves with intervals.

A test is altered pictures in rising strength; all models see the same ones, made from the first model's input (another size
by antialiased resizing). What is counted is which picture each model gets right: rows and intervals follow from that, and
so does the mean over corruptions, whose interval is over pictures, because the corruptions share them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from rich.progress import Progress
from torch import Tensor

from vitrail.analysis import alterations
from vitrail.core.device import Precision
from vitrail.core.errors import UserError
from vitrail.core.types import Batch, Labels, Row
from vitrail.evaluation.metrics import NORMAL_95, tally, wilson
from vitrail.inference.predict import predict
from vitrail.models.classifier import Classifier
from vitrail.models.vit import ViT

Pixels = UInt8[Tensor, "b c h w"]
Alteration = Callable[[Pixels, list[int]], Pixels]
"""Pictures and their places to altered pictures of that size; the places decide what is drawn at random."""
GROUPS = ("drop", "shuffle", "texture", "shape", "patch", "corruptions", "equivariance", "locality")
PART = 64
"""Pictures that are altered together."""


@dataclass(frozen=True)
class Contestant:
    """labels: of each picture, in the model's own classes."""

    name: str
    model: Classifier
    labels: Int[Tensor, "n"]


@dataclass(frozen=True)
class Exam:
    """n pictures as the first contestant is given them, and who is examined.

    truth: classes as the data number them. reference: whose attention says what is salient; None where nobody has any.
    grid: the cells of patch drop. colour: of dropped patches. index is a picture's number here, 0 to n - 1.
    """

    pixels: UInt8[Tensor, "n c h w"]
    truth: Int[Tensor, "n"]
    contestants: tuple[Contestant, ...]
    reference: Classifier | ViT | None
    grid: tuple[int, int]
    colour: tuple[int, ...]
    seed: int = 0
    batch: int = 64
    precision: Precision = "fp32"

    @cached_property
    def attention(self) -> Float[Tensor, "n y x"]:
        if self.reference is None:
            raise UserError("salient patches are found by attention, and no model here has any: give --salience a ViT.")
        parts = self.pixels.split(self.batch)
        return torch.cat([alterations.attention_of_answer(self.reference, part, self.grid) for part in parts])

    def altered(self, change: Alteration, index: Sequence[int]) -> UInt8[Tensor, "some c h w"]:
        parts = [list(index[start : start + PART]) for start in range(0, len(index), PART)]
        return torch.cat([change(self.pixels[part], part) for part in parts])

    def right(self, pixels: UInt8[Tensor, "some c h w"], index: Sequence[int]) -> dict[str, Bool[np.ndarray, "some"]]:
        """Which of these pictures each contestant gets right."""
        found = {}
        for one in self.contestants:
            labels = one.labels[list(index)]
            batches = _batches(alterations.sized(pixels, one.model.preprocess.size), labels, self.batch)
            said = predict(one.model, batches, device=next(one.model.parameters()).device, precision=self.precision)
            found[one.name] = tally(said, one.model.config.classes).rank == 0
        return found


@dataclass(frozen=True)
class Step:
    """One strength of a test. share: of the picture's area that is gone, mean over pictures, where not `strength`."""

    strength: float
    label: str
    change: Alteration
    share: float | None = None


@dataclass(frozen=True)
class Test:
    """steps: made when the test's turn has come, for some have to be optimised first. index: its pictures; None: all.

    count: how many steps there will be. optimised: steps of gradient descent before, in forward passes of one picture.
    """

    __test__ = False  # for pytest, which looks for names like this

    name: str
    group: str
    axis: str
    steps: Callable[[Progress | None], Sequence[Step]]
    count: int
    index: tuple[int, ...] | None = None
    optimised: int = 0


@dataclass(frozen=True)
class Point:
    strength: float
    label: str
    share: float | None
    right: Mapping[str, Bool[np.ndarray, "n"]]

    def row(self, name: str) -> Row:
        return row(name, self.right[name])


@dataclass(frozen=True)
class Curve:
    """A finished test. Its first point is the unaltered pictures."""

    name: str
    group: str
    axis: str
    points: tuple[Point, ...]


def run(
    exam: Exam, test: Test, steps: Sequence[Step], clean: Mapping[str, np.ndarray], progress: Progress | None = None
) -> Curve:
    """steps: the test's, made. clean: which of all unaltered pictures each contestant gets right."""
    index = list(range(len(exam.pixels))) if test.index is None else list(test.index)
    points = [Point(0.0, "unaltered", 0.0, {name: right[index] for name, right in clean.items()})]
    task = None if progress is None else progress.add_task(test.name, total=len(steps))
    for step in steps:
        if step.strength > 0:
            right = exam.right(exam.altered(step.change, index), index)
            points.append(Point(step.strength, step.label, step.share, right))
        if progress is not None and task is not None:
            progress.advance(task)
    if progress is not None and task is not None:
        progress.remove_task(task)
    return Curve(test.name, test.group, test.axis, tuple(points))


def row(name: str, right: Bool[np.ndarray, "n"]) -> Row:
    """Accuracy in per cent with Wilson's interval."""
    low, high = wilson(int(right.sum()), right.size)
    return Row(name, 100 * float(right.mean()), 100 * low, 100 * high, right.size)


def mean_of_curves(curves: Sequence[Curve], name: str) -> list[Row]:
    """For each strength the mean accuracy over the curves, with its normal interval over pictures."""
    columns = zip(*(curve.points for curve in curves), strict=True)
    return [_mean_of([point.right[name] for point in points], name) for points in columns]


def mean_of_points(curve: Curve, name: str) -> Row:
    """The mean accuracy over a test's altered points, with its normal interval over pictures."""
    return _mean_of([point.right[name] for point in curve.points[1:]], name)


def _mean_of(right: Sequence[np.ndarray], name: str) -> Row:
    shares = 100 * np.mean(right, axis=0)
    half = NORMAL_95 * float(shares.std(ddof=1)) / len(shares) ** 0.5 if len(shares) > 1 else 100.0
    mean = float(shares.mean())
    return Row(name, mean, max(0.0, mean - half), min(100.0, mean + half), len(shares))


def to_json(curve: Curve) -> dict[str, Any]:
    """With the answers as hexadecimal digits, a bit a picture, so that `from_json` gives the same curve."""
    points = [
        {
            "strength": point.strength,
            "label": point.label,
            "share": point.share,
            "rows": {name: asdict(point.row(name)) for name in point.right},
            "right": {name: np.packbits(right).tobytes().hex() for name, right in point.right.items()},
        }
        for point in curve.points
    ]
    return {"name": curve.name, "group": curve.group, "axis": curve.axis, "points": points}


def from_json(data: Mapping[str, Any]) -> Curve:
    points = []
    for point in data["points"]:
        right = {}
        for name, digits in point["right"].items():
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
            right[name] = bits[: point["rows"][name]["count"]].astype(bool)
        points.append(Point(point["strength"], point["label"], point["share"], right))
    return Curve(data["name"], data["group"], data["axis"], tuple(points))


def _batches(pixels: UInt8[Tensor, "n c h w"], labels: Int[Tensor, "n"], size: int) -> Iterator[Batch]:
    for start in range(0, len(pixels), size):
        part = pixels[start : start + size]
        index = torch.arange(start, start + len(part))
        valid = torch.ones(len(part), dtype=torch.bool)
        yield Batch((part,), Labels(labels[index]), valid, index)
