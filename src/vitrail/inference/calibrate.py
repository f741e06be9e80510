"""int8 from a person's pictures to a verdict: calibrated on one part, measured on the other, and remembered."""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vitrail.core.device import cores
from vitrail.core.errors import UserError
from vitrail.core.runs import write_json
from vitrail.core.types import Source
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import subset
from vitrail.data.transforms import Transform
from vitrail.inference.engines import Setup, build
from vitrail.inference.features import changes
from vitrail.inference.graphs import Asked
from vitrail.inference.predict import predict
from vitrail.inference.quantise import PICTURES, Gate, Quantised, gate, quantise, quantised_key
from vitrail.models.classifier import Classifier

MOST_HELD_OUT = 2000
"""Pictures that the gate looks at; so many tell half a point from none where few answers change."""
FEWEST = 10
BATCH = 32


def calibrated(
    model: Asked, source: Source, *, limit: float, cache: Path | None = None, workers: int = -1, progress: bool = False
) -> tuple[Quantised, Gate]:
    """The int8 model, and what it costs on pictures that it was not calibrated on.

    model: on the CPU, asked for a classifier's logits. source: pictures of its kind; their labels are used where all have
        one and the model knows all of their classes by name. Up to 300 calibrate, and up to 2000 others measure.

    Raises UserError where there are fewer than 10 pictures, the model is not on the CPU, or openvino or nncf is missing.
    """
    if (device := next(model.parameters()).device).type != "cpu":
        raise UserError(
            f"int8 is calibrated and run on the CPU, and the model is on {device}; give --device cpu, or --precision bf16."
        )
    count = len(source)
    if count < FEWEST:
        raise UserError(
            f"--calibrate has {count} pictures (of a run's own data, those that it held out); give at least {FEWEST}: some "
            "calibrate int8, others test it."
        )
    order = np.random.default_rng(0).permutation(count)
    first = min(PICTURES, count // 2)
    learnt, held = subset(source, np.sort(order[:first])), subset(source, np.sort(order[first : first + MOST_HELD_OUT]))
    pixels = torch.cat([batch.views[0][batch.valid] for batch in loader(model, learnt, workers)])
    made = quantise(model, [pixels], cache=cache, progress=progress)
    record = None
    if cache is not None:
        # The verdict hangs on more than the int8 model: on what the classes are called, and on the pictures that measure.
        seen = hashlib.sha256(json.dumps([source.fingerprint, getattr(model.model, "labels", ())]).encode())
        seen.update(changes(held))
        record = cache / "gates" / f"{quantised_key(model, pixels, model.preprocess.size)}-{seen.hexdigest()}.json"
    if (known := recall(record, limit)) is not None:
        return made, known
    found = measured(model, made, held, limit, cache, workers, progress)
    if record is not None:
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, asdict(found))
        except (OSError, UserError) as error:
            print(f"What int8 costs is not remembered: {error}", file=sys.stderr, flush=True)
    return made, found


def measured(
    model: Asked, made: Quantised, held: Source, limit: float, cache: Path | None, workers: int, progress: bool
) -> Gate:
    """The gate on held-out pictures, both models run by OpenVINO on the same decoded pictures."""
    engines = [
        build(model, Setup("openvino", precision, torch.get_num_threads()), batch=BATCH, size=None, device="cpu",
              threads=0, quantised=made if precision == "int8" else None, cache=cache)
        for precision in ("fp32", "int8")
    ]  # fmt: skip

    def both(images: UInt8[Tensor, "b c h w"]) -> Tensor:
        return torch.cat([run(images) for run in engines], 1)

    seen = list(predict(model, loader(model, held, workers), device="cpu", progress=progress, of=both))
    before, after = torch.cat([one.logits for one in seen]).chunk(2, 1)
    labels = truth(model.model, held)
    index = torch.cat([one.index for one in seen])
    return gate(before, after, None if labels is None else labels[index], limit)


def truth(model: object, source: Source) -> Tensor | None:
    """Each picture's class as the model counts them; None where that is not known of all."""
    labels = np.asarray(source.labels)
    if not isinstance(model, Classifier) or not labels.size or (labels < 0).any():
        return None
    names = model.labels or (source.classes if len(source.classes) == model.config.classes else ())
    place = {name: number for number, name in enumerate(names)}
    columns = np.array([place.get(name, -1) for name in source.classes], np.int64)[labels]
    return None if (columns < 0).any() else torch.from_numpy(columns)


def loader(model: Asked, source: Source, workers: int) -> PictureLoader:
    many = (cores() if len(source) > BATCH else 0) if workers < 0 else workers
    order = Order(len(source), min(BATCH, len(source)), len(source), shuffle=False)
    return PictureLoader(source, Transform(model.preprocess), order, workers=many)


def recall(record: Path | None, limit: float) -> Gate | None:
    """What was measured earlier, held against this limit."""
    try:
        known = {} if record is None else json.loads(record.read_text(encoding="utf-8"))
        return Gate(**{**known, "limit": limit})
    except (OSError, ValueError, TypeError):
        return None
