"""A robustness run: planned aloud, measured test by test, each kept as soon as it is finished, and written up.

Unusual: what is kept of a test is which pictures were answered rightly, and a strip of its pictures. All numbers, figures
and pages follow from these, so that a run that was stopped goes on with the next test, and one that is finished is drawn
again in seconds. A part carries a key of all that decides it; one with another key is measured again.

The folder: robustness.json, report.html, figures/*.png and *.svg, parts/*.json with pictures/*.png.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from vitrail.analysis import equivariance, locality, robustness, robustness_tests, textures
from vitrail.analysis.alterations import sized
from vitrail.analysis.corruptions import CORRUPTIONS
from vitrail.analysis.internals import trace
from vitrail.analysis.robustness import Curve, Exam, Test
from vitrail.core.errors import UserError
from vitrail.core.runs import read_json, write_json, write_whole
from vitrail.core.types import Row
from vitrail.core.values import to_json
from vitrail.evaluation.metrics import NORMAL_95
from vitrail.inference.features import weights_hash
from vitrail.models.classifier import Classifier
from vitrail.models.vit import ViT

FORMAT = 2
SHOWN = 4
"""Pictures of a strip."""
FEW = 16
"""Pictures that equivariance and locality are measured on; a quarter of them for the permutation, token by token."""


@dataclass(frozen=True)
class Learning:
    """What local classifiers learn from: other pictures than the exam's, labelled as the data number classes."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, "n"]


@dataclass(frozen=True)
class Finished:
    """curves and strips (rows, columns, c, h, w) by test; checks: what a local classifier and the edges say of alterations;
    properties: equivariance and locality, by model."""

    clean: Mapping[str, Row]
    curves: Mapping[str, Curve]
    strips: Mapping[str, UInt8[Tensor, "rows columns c h w"]]
    checks: list[dict[str, Any]] = field(default_factory=list)
    properties: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    group: str
    tests: int
    looks: int
    seconds: float


def plan(exam: Exam, tests: Sequence[Test], groups: Sequence[str], learning: Learning | None) -> list[Planned]:
    """What will be looked at, and for how long, from two batches of each model and one picture of each corruption."""
    paces = {one.name: _pace(one.model, exam) for one in exam.contestants}
    found = []
    for group in groups:
        members = [test for test in tests if test.group == group]
        looks = sum(test.count * len(test.index or exam.pixels) for test in members)
        seconds = looks * sum(paces.values())
        for test in members:
            seconds += sum(test.optimised * pace for name, pace in paces.items() if test.name.endswith(name))
        if group == "corruptions" and members:
            seconds += len(exam.pixels) * 5 * sum(_corruption_pace(exam, test.name) for test in members)
        if group in ("texture", "shape") and learning is not None:
            seconds += 6e-6 * (len(learning.pixels) + len(exam.pixels)) * exam.pixels[0, 0].numel() * 3
        if group in ("equivariance", "locality"):
            seconds += FEW * 60 * sum(paces.values())
        found.append(Planned(group, len(members) or 1, looks * len(exam.contestants), seconds))
    return found


def measure(
    exam: Exam,
    tests: Sequence[Test],
    groups: Sequence[str],
    learning: Learning | None,
    folder: Path,
    identity: Mapping[str, Any],
    settings: Mapping[str, Any],
    console: Console,
) -> Finished:
    """Every test that `folder` does not hold yet. identity: of the pictures and the models; settings: of the tests."""
    for name in ("parts", "pictures"):
        _make(folder / name)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        whole = progress.add_task("all tests", total=len(tests) + 3)

        def kept(name: str, make: Callable[[], Any]) -> Any:
            key = hashlib.sha256(json.dumps([FORMAT, identity, settings, name], sort_keys=True).encode()).hexdigest()
            path = folder / "parts" / f"{slug(name)}.json"
            if path.exists():
                data = read_json(path)
                if isinstance(data, dict) and data.get("key") == key and "found" in data:
                    progress.advance(whole)
                    return data["found"]
            begun = time.monotonic()
            found = make()
            write_json(path, {"key": key, "seconds": round(time.monotonic() - begun, 2), "found": found})
            progress.advance(whole)
            return found

        everything = list(range(len(exam.pixels)))
        clean = robustness.from_json(
            kept("unaltered", lambda: robustness.to_json(_unaltered(exam, everything)))
        ).points[0]
        curves, strips = {}, {}
        for test in tests:
            picture = folder / "pictures" / f"{slug(test.name)}.png"

            def make(test: Test = test, picture: Path = picture) -> Any:
                curve, strip = examined(exam, test, clean.right, progress)
                _save_strip(strip, picture)
                return robustness.to_json(curve)

            if not picture.exists():
                (folder / "parts" / f"{slug(test.name)}.json").unlink(missing_ok=True)
            curves[test.name] = robustness.from_json(kept(test.name, make))
            strips[test.name] = _read_strip(picture, exam.pixels)
        checks = []
        if learning is not None and {"texture", "shape"} & set(groups):
            checks = kept("local classifier", lambda: texture_checks(exam, learning))
        properties = {}
        # Powers of two, and each model's own cell, by which its features can move without a remainder.
        cells = {_stride(one.model) for one in exam.contestants}
        shifts = sorted({1, 2, 4, 8, 16, 32} | cells)
        for one in exam.contestants:
            if {"equivariance", "locality"} & set(groups):
                properties[one.name] = kept(
                    f"properties of {one.name}", partial(properties_of, one.model, exam, shifts)
                )
    return Finished({name: clean.row(name) for name in clean.right}, curves, strips, checks, properties)


def examined(
    exam: Exam, test: Test, clean: Mapping[str, np.ndarray], progress: Progress | None = None
) -> tuple[Curve, UInt8[Tensor, "rows columns c h w"]]:
    """A test and the strip of its pictures, the unaltered ones first."""
    steps = [step for step in test.steps(progress) if step.strength > 0]
    curve = robustness.run(exam, test, steps, clean, progress)
    index = list(range(len(exam.pixels))) if test.index is None else list(test.index)
    some = [index[int(place)] for place in np.linspace(0, len(index) - 1, min(SHOWN, len(index)))]
    columns = [exam.pixels[some], *(exam.altered(step.change, some) for step in steps)]
    return curve, torch.stack(columns, 1)


def texture_checks(exam: Exam, learning: Learning) -> list[dict[str, Any]]:
    """What each alteration does to a classifier of local windows and to the edges.

    For each: the accuracy of one that learned from unaltered pictures, and of one that learned from pictures altered in the
    same way, with intervals; the mean correlation of edge energies, with its interval over pictures; chance.
    """
    classes = int(max(exam.truth.max(), learning.labels.max())) + 1
    chance = 100 * float(torch.bincount(exam.truth).max()) / len(exam.truth)
    before = textures.LocalClassifier(learning.pixels, learning.labels, classes, seed=exam.seed)
    found = []
    nothing = robustness.Step(1.0, "unaltered", lambda pixels, index: pixels)
    for removes, steps in (
        ("", [nothing]),
        ("texture", robustness_tests.texture_steps(exam.seed)),
        ("shape", robustness_tests.shape_steps(exam.seed)),
    ):
        for step in steps:
            pixels = exam.altered(step.change, range(len(exam.pixels)))
            others = textures.in_parts(step.change, learning.pixels, first=len(exam.pixels))
            again = (
                before if not removes else textures.LocalClassifier(others, learning.labels, classes, seed=exam.seed)
            )
            edges = np.concatenate(
                [textures.edge_correlation(*pair) for pair in zip(exam.pixels.split(64), pixels.split(64), strict=True)]
            )
            fixed, learned = (
                robustness.row(name, one.right(pixels, exam.truth))
                for name, one in (("learned from unaltered", before), ("learned from altered", again))
            )
            found.append(
                {
                    "alteration": step.label,
                    "removes": removes,
                    "local": asdict(fixed),
                    "local, learned again": asdict(learned),
                    "edges": asdict(_mean_row("edge correlation", edges)),
                    "chance": chance,
                    "window": before.window,
                }
            )
    return found


def properties_of(model: Classifier, exam: Exam, shifts: Sequence[int]) -> dict[str, Any]:
    """Equivariance to shifts and to the order of patches, and how far each layer reads. Shifts are cyclic, to the right.

    "attention within", of a ViT: by block, the heads' mean share of attention that stays within so many pixels.
    """
    size = model.preprocess.size
    images = sized(exam.pixels[:FEW], size).to(next(model.parameters()).device)
    found: dict[str, Any] = {"stride": _stride(model), "shifts": [], "size": list(size)}
    for shift in shifts:
        if shift > size[1] // 2:
            break
        moved = equivariance.translation(model, images, [(0, shift)], margin=0)
        found["shifts"].append(
            {
                "pixels": shift,
                "error": asdict(_mean_row("relative error", moved.error[:, 0], "")),
                "unmoved": asdict(_mean_row("relative error", moved.unmoved[:, 0], "")),
            }
        )
    backbone = model.backbone
    if isinstance(backbone, ViT):
        order = equivariance.permutation(model, images[: FEW // 4], exam.seed)
        found["permutation"] = {name: float(np.max(value)) for name, value in asdict(order).items()}
        traced, reach = trace(model, images), [part * min(size) for part in (1 / 8, 1 / 4, 1 / 2)]
        found["attention within"] = {
            "pixels": reach,
            "shares": locality.attention_within(traced, reach).mean((0, 2)).tolist(),
            "even": locality.even_within(traced, reach).tolist(),
        }
    fields = locality.receptive_fields(model, images, exam.seed)
    found["radii"] = [float(radius) for radius in fields.radii]
    found["even"] = fields.even
    return found


def identity_of(exam: Exam, fingerprint: str) -> dict[str, Any]:
    """All of pictures and models that decides an answer."""
    return {
        "data": fingerprint,
        "pixels": hashlib.sha256(exam.pixels.numpy().tobytes()).hexdigest(),
        "models": {one.name: weights_hash(one.model) for one in exam.contestants},
        "preprocess": [to_json(one.model.preprocess) for one in exam.contestants],
        "salience": None if exam.reference is None else weights_hash(exam.reference),
        "grid": list(exam.grid),
        "colour": list(exam.colour),
        "seed": exam.seed,
        "precision": exam.precision,
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-") or "unnamed"


def _unaltered(exam: Exam, index: list[int]) -> Curve:
    right = exam.right(exam.pixels, index)
    return Curve("unaltered", "", "", (robustness.Point(0.0, "unaltered", 0.0, right),))


def _stride(model: Classifier) -> int:
    """Pixels from cell to cell of the last features, across."""
    size = model.preprocess.size
    blank = torch.zeros(1, model.preprocess.channels, *size, device=next(model.parameters()).device)
    with torch.inference_mode():
        return model.backbone.features(blank).stride[1]


def _mean_row(name: str, values: Float[np.ndarray, "n"], unit: str = "") -> Row:
    """The mean over pictures with its normal interval; values that are not numbers left out."""
    values = values[np.isfinite(values)]
    if not values.size:
        return Row(name, 0.0, count=0, unit=unit)
    half = NORMAL_95 * float(values.std(ddof=1)) / values.size**0.5 if values.size > 1 else None
    mean = float(values.mean())
    if half is None:
        return Row(name, mean, count=1, unit=unit)
    return Row(name, mean, mean - half, mean + half, int(values.size), unit)


def _pace(model: Classifier, exam: Exam) -> float:
    """Seconds a picture, the better of two batches."""
    images = sized(exam.pixels[: exam.batch], model.preprocess.size)
    took = []
    for _ in range(2):
        begun = time.monotonic()
        with torch.inference_mode():
            model(images.to(next(model.parameters()).device)).cpu()
        took.append(time.monotonic() - begun)
    return min(took) / len(images)


def _corruption_pace(exam: Exam, name: str) -> float:
    picture, begun = exam.pixels[0].permute(1, 2, 0).numpy(), time.monotonic()
    CORRUPTIONS[name.replace(" ", "_")](picture, 3, np.random.default_rng(0))
    return time.monotonic() - begun


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {folder.parent} cannot be used ({error.strerror}); give a folder that can be written."
        ) from error


def _save_strip(strip: UInt8[Tensor, "rows columns c h w"], path: Path) -> None:
    rows, columns, channels, height, width = strip.shape
    sheet = strip.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels).numpy()
    if channels not in (1, 3, 4):
        sheet = sheet.mean(2, keepdims=True).round().astype(np.uint8)
    image = Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet)
    write_whole(path, lambda part: image.save(part, "PNG"))


def _read_strip(path: Path, like: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "rows columns c h w"]:
    height, width = like.shape[2:]
    with Image.open(path) as image:
        sheet = np.atleast_3d(np.asarray(image))
    cut = torch.from_numpy(sheet.copy()).unflatten(0, (-1, height)).unflatten(2, (-1, width))
    return cut.permute(0, 2, 4, 1, 3).contiguous()
