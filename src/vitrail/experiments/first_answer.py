"""The first answer of `vitrail fit`: a linear head on frozen features, within a minute of two cores.

Unusual: the head goes back into the model, so that what `vitrail predict` loads computes the very numbers that
cross-validation judged; and every picture is judged by a head that has not seen it.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.core.device import Precision, autocast, cores
from vitrail.core.types import Source
from vitrail.data.decode import UnreadablePicture
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import subset
from vitrail.data.transforms import Transform
from vitrail.evaluation import metrics
from vitrail.evaluation.linear import Linear, cross_validated
from vitrail.evaluation.metrics import Tally
from vitrail.experiments.photos_data import Photos, without
from vitrail.inference import engines
from vitrail.inference.engines import EngineName
from vitrail.inference.features import extract
from vitrail.inference.graphs import Asked
from vitrail.inference.predict import Prediction, predict
from vitrail.models.classifier import Classifier, replace_head
from vitrail.models.vit import ViTConfig
from vitrail.training.log import duration
from vitrail.weights.load import load_any

Say = Callable[[str], None]

FIRST_SECONDS = 40.0
"""For features: what a first minute leaves beside importing, surveying, and fitting heads."""
PATIENCE = 0.4
"""The most of all the time that features may take, where they cannot be had within the first minute."""
SHARES = (1.0, 0.875, 0.75, 0.5)
"""Sides that are tried, of the model's own."""
TIMED = 16
FOLDS = 5
BATCH = 64
"""Pictures at a time that an engine is made for."""


@dataclass(frozen=True)
class Judged:
    """What a model says of pictures that it was not trained on.

    index: places in `source`, ascending. probabilities: of each class.
    """

    name: str
    source: Source
    index: Int[np.ndarray, "n"]
    probabilities: Float[np.ndarray, "n k"]

    @cached_property
    def labels(self) -> Int[np.ndarray, "n"]:
        return np.asarray(self.source.labels)[self.index]

    @cached_property
    def right(self) -> Bool[np.ndarray, "n"]:
        return self.probabilities.argmax(1) == self.labels

    @cached_property
    def tally(self) -> Tally:
        logits = torch.from_numpy(self.probabilities).float().clamp_min(1e-30).log()
        labels, index = torch.from_numpy(self.labels), torch.from_numpy(self.index)
        return metrics.tally([Prediction(logits, labels, index)], self.probabilities.shape[1], self.source)


@dataclass(frozen=True)
class Speed:
    """Seconds a picture: seen by the model (forward), and read from its file by one core."""

    seeing: float
    reading: float

    @property
    def each(self) -> float:
        """One after the other, at worst."""
        return self.seeing + self.reading


@dataclass(frozen=True)
class FirstAnswer:
    """model: backbone and head. start: the same with a head that knows none of the pictures that choose; what fine-tuning
    starts from and is compared with. judged: by name of the pictures. chosen: the judgement of `start` on those that
    choose; None where there are none. photos: without what turned out unreadable.
    """

    model: Classifier
    start: Classifier
    photos: Photos
    judged: tuple[Judged, ...]
    chosen: Judged | None
    head: str
    speed: Speed


def first_answer(
    photos: Photos,
    weights: str,
    *,
    seconds: float,
    size: tuple[int, ...] = (),
    device: torch.device,
    precision: Precision,
    engine: EngineName = "eager",
    cache: Path | None,
    seed: int,
    say: Say,
) -> FirstAnswer:
    """Features of all pictures, then the best head by cross-validation.

    seconds: that the whole fit has. size: (height, width) to look at the pictures in; none: chosen by a measured step,
    which is eager. engine: what reads the features.
    """
    model, speed, side = _sized(photos, weights, seconds, size, device, precision, say)
    estimate = photos.count * speed.each
    say(
        f"first answer: features of {photos.count:,} pictures at {side} px in {precision}, about {duration(estimate)}; "
        f"then a linear head by {FOLDS}-fold cross-validation"
    )
    sources: Mapping[str, Source] = {"train": photos.train, **photos.own}
    many = workers(speed, device)
    settings: dict[str, Any] = {"device": device, "precision": precision, "workers": many, "cache": cache}
    if engine != "eager":
        of = engines.engine(Asked(model, "planned"), engine, precision, batch=BATCH, device=device, progress=True)
        say(f"engine: {of.name}, {of.precision}")
        settings |= {"precision": "fp32", "of": of, "mark": f"{of.name} {of.precision}", "batch": BATCH}
    with _beside(many if device.type == "cpu" else 0):
        tables = {
            name: extract(model, source, model.preprocess, progress=True, **settings)
            for name, source in sources.items()
        }
    photos = without(photos, {name: table.problems for name, table in tables.items()})
    features, labels = tables["train"].features, tables["train"].labels
    kept, classes = torch.from_numpy(~photos.held), len(photos.classes)
    taught = torch.ones_like(kept) if photos.teaches_all else kept
    groups = torch.from_numpy(photos.groups)
    found = cross_validated(
        features[taught], labels[taught], classes, folds=FOLDS, seed=seed, groups=groups[taught], progress=False
    )
    head = found.head
    own = head
    if not bool(taught.eq(kept).all()):
        own = cross_validated(
            features[kept], labels[kept], classes, folds=FOLDS, seed=seed, groups=groups[kept], kinds=(head.kind,)
        ).head
    places = np.flatnonzero(taught.numpy())
    judged = [Judged("cross-validated", photos.train, places, found.probabilities.double().numpy())]
    if not photos.teaches_all and photos.held.any():
        judged.append(_by(head, "held out", subset(photos.train, np.flatnonzero(photos.held)), features[~kept]))
    judged += [_by(head, name, source, tables[name].features) for name, source in photos.own.items()]
    chosen = None
    if photos.choose is not None:
        chooser = tables["validation"].features if photos.chooser == "validation" else features[~kept]
        chosen = _by(own, photos.chooser, photos.choose, chooser)
    return FirstAnswer(
        _with_head(model, head),
        _with_head(model, own),
        photos,
        tuple(judged),
        chosen,
        f"{head.kind}, penalty {head.penalty:g}",
        speed,
    )


def judge(
    model: Classifier, name: str, source: Source, device: torch.device, precision: Precision, speed: Speed | None
) -> Judged:
    """What a model says of pictures, those that cannot be read left out."""
    loader = PictureLoader(
        source,
        Transform(model.preprocess),
        Order(len(source), min(64, len(source)), len(source), shuffle=False),
        workers=workers(speed, device) if len(source) > 64 and speed is not None else 0,
    )
    seen = list(predict(model.to(device), loader, device=device, precision=precision, progress=True))
    index = torch.cat([part.index for part in seen])
    probabilities = torch.softmax(torch.cat([part.logits for part in seen]).double(), 1)
    return Judged(name, source, index.numpy(), probabilities.numpy())


def _by(head: Linear, name: str, source: Source, features: Float[Tensor, "n d"]) -> Judged:
    logits = features @ head.weight.T + head.bias
    return Judged(name, source, np.arange(len(source)), torch.softmax(logits.double(), 1).numpy())


def _with_head(model: Classifier, head: Linear) -> Classifier:
    """The same backbone, shared, under another head."""
    made = replace_head(model, head.weight.shape[0], model.labels)
    made.head.load_state_dict({"output.weight": head.weight, "output.bias": head.bias})
    return made.eval()


def _sized(
    photos: Photos,
    weights: str,
    seconds: float,
    asked: tuple[int, ...],
    device: torch.device,
    precision: Precision,
    say: Say,
) -> tuple[Classifier, Speed, str]:
    """The model at the largest size whose features are there within the first minute; where none is, at the largest for
    which they take a small part of all the time; the smallest otherwise."""
    tried: list[tuple[Classifier, Speed, float]] = []
    start = load_any(weights)
    config = start.backbone.config if isinstance(start, Classifier) else start.config
    patch = config.stride if isinstance(config, ViTConfig) else (32, 32)
    sizes = [(asked[0], asked[1])] if asked else [_smaller(start.preprocess.size, patch, share) for share in SHARES]
    for size in sizes:
        model = replace_head(load_any(weights, image=size), len(photos.classes), photos.classes).to(device).eval()
        speed = _speed(model, photos.train, device, precision)
        tried.append((model, speed, photos.count * speed.each))
        if tried[-1][2] <= FIRST_SECONDS:
            break
    best = next((entry for entry in tried if entry[2] <= FIRST_SECONDS), None)
    best = best or next((entry for entry in tried if entry[2] <= PATIENCE * seconds), tried[-1])
    model, speed, estimate = best
    side = " x ".join(map(str, model.preprocess.size))
    if best is not tried[0]:
        say(f"size {side}: at the model's own the pictures would take {duration(tried[0][2])} on this machine")
    if estimate > FIRST_SECONDS:
        say(
            f"note: {photos.count:,} pictures are more than a minute holds; the first answer takes {duration(estimate)}."
        )
    return model, speed, side


def _smaller(size: tuple[int, int], patch: tuple[int, int], share: float) -> tuple[int, int]:
    """A share of each side, whole patches, one at least."""
    height, width = (max(round(share * side / step), 1) * step for side, step in zip(size, patch, strict=True))
    return (height, width) if share < 1 else size


def workers(speed: Speed, device: torch.device) -> int:
    """Processes that decode beside the model; on a processor they would take from it the cores that it computes on."""
    if device.type != "cpu":
        return cores()
    return max(1, cores() // 2) if speed.reading > 0.3 * speed.seeing else 0


@contextmanager
def _beside(workers: int) -> Iterator[None]:
    """Threads that share their cores with data workers wait for each other by spinning (docs/log.md), so they are fewer."""
    before = torch.get_num_threads()
    if workers and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() - workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _speed(model: Classifier, source: Source, device: torch.device, precision: Precision) -> Speed:
    """Measured on a few pictures, after one to warm up."""
    transform, pixels, spent = Transform(model.preprocess), [], []
    for place in np.linspace(0, len(source) - 1, min(TIMED // 2, len(source)), dtype=int).tolist():
        sample, began = source[place], time.perf_counter()
        try:
            pixels.append(torch.from_numpy(transform(sample.picture, None, sample.name)))
        except UnreadablePicture:
            continue  # extraction names it
        spent.append(time.perf_counter() - began)
    some = torch.stack(pixels) if pixels else torch.zeros(1, 3, *model.preprocess.size, dtype=torch.uint8)
    batch = some.repeat(math.ceil(TIMED / some.shape[0]), 1, 1, 1)[:TIMED].to(device)
    times = []
    with torch.inference_mode(), autocast(device, precision):
        for images in (batch[:2], batch):
            began = time.perf_counter()
            model(images).float().cpu()
            times.append(time.perf_counter() - began)
    return Speed(times[1] / TIMED, float(np.median(spent)) if spent else 0.0)
