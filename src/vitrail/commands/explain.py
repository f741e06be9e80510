"""`vitrail explain W PICTURE`: one picture's way through a model, every step with its shape, its cost and its equation."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.analysis.walk import Step
from vitrail.commands.figures import counted, pair, ready
from vitrail.commands.predict import find, printable
from vitrail.commands.reading import called
from vitrail.core.device import pick_device
from vitrail.core.errors import UserError
from vitrail.data.decode import decode
from vitrail.data.transforms import read
from vitrail.models.classifier import Classifier
from vitrail.models.vit import ViT
from vitrail.weights.load import described, load_any

LONGEST = 640
"""Pixels of the longer side of the picture on the page."""


@dataclass(frozen=True)
class Settings:
    """One picture through the model, step by step: shapes, parameters, MACs, time, equations; and a page with pictures."""

    weights: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint of any known library, or an id (hf:OWNER/NAME, official:NAME, timm:NAME)."""
    picture: tyro.conf.Positional[str]
    """A picture file, or - for standard input."""
    out: Path = Path("explained.html")
    """The page, in one file."""
    top: int = 5
    """Classes to name."""
    layers: tuple[int, ...] = ()
    """Blocks (a ResNet's stages) to list step by step in the terminal, from 1, or from the last, -1; none: the first."""
    size: tuple[int, ...] = ()
    """Height and width (or one number for both) in pixels to work at; none: the model's own."""
    json: bool = False
    """Print every step as one JSON object in place of the table."""
    device: str = ""
    """cpu, cuda, cuda:1, mps; none: the fastest there is."""
    heads: int | None = None
    """Attention heads, for checkpoints of other libraries that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, likewise."""
    preprocess: str = ""
    """Preprocessing, where the checkpoint does not state it: as imagenet,bicubic,resize=256,size=224."""


def run(settings: Settings) -> int:
    if settings.top < 1:
        raise UserError(f"--top is {settings.top}; give at least 1.")
    if settings.out.is_dir():
        raise UserError(f"--out {settings.out} is a folder; give a file, as {settings.out / 'explained.html'}.")
    samples, problems = find((settings.picture,))
    if problems:
        raise UserError(str(problems[0].problem))
    if len(samples) != 1:
        raise UserError(f"{settings.picture} names {len(samples)} pictures; explain takes one.")
    sample = samples[0]
    model = load_any(
        str(settings.weights),
        heads=settings.heads,
        grid=settings.grid,
        image=pair(settings.size),
        preprocess=settings.preprocess or None,
    ).to(pick_device(settings.device or None))
    ready(settings.out.parent, settings.out)
    backbone = model.backbone if isinstance(model, Classifier) else model
    open_layers = counted(
        settings.layers, backbone.depth, "--layers", "block" if isinstance(backbone, ViT) else "stage"
    )
    from vitrail.analysis.figures_inside import display
    from vitrail.analysis.pixels_as_words import pixel_costs
    from vitrail.analysis.walk import walk
    from vitrail.experiments.explained import Explained, write_explanation

    begun = time.perf_counter()
    whole = decode(sample.picture, 3, None, sample.name)
    decoded = time.perf_counter()
    pixels = read([sample.picture], model.preprocess)
    resized = time.perf_counter()
    preprocess = model.preprocess
    how = f"by {preprocess.interpolation} resampling"
    how += "" if preprocess.resize is None else f", the middle of a resize to {preprocess.resize}"
    first = (
        Step(
            "picture",
            "picture",
            "the file as it is: height, width, colours",
            "",
            (*whole.size[::-1], 3),
            0,
            0,
            decoded - begun,
        ),
        Step("picture", "resize, crop", how, "", tuple(pixels.shape[1:]), 0, 0, resized - decoded),
    )
    pixels = pixels.to(next(model.parameters()).device)
    taken = walk(model, pixels)
    steps = (*first, *taken.steps)
    answers: tuple[tuple[str, float], ...] = ()
    if isinstance(model, Classifier) and model.config.output == "logits" and taken.output.ndim == 1:
        names = model.labels or tuple(f"class {number}" for number in range(model.config.classes))
        top = taken.output.float().cpu().topk(min(settings.top, len(names)))
        answers = tuple(
            (names[label], share) for label, share in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        )
    costs = pixel_costs(backbone, (pixels.shape[2], pixels.shape[3])) if isinstance(backbone, ViT) else ()
    whole.thumbnail((LONGEST, LONGEST))
    explained = Explained(
        model=called(settings.weights),
        described=described(model.config),
        picture=printable(Path(sample.name).name),
        original=np.array(whole.convert("RGB")),
        prepared=display(pixels[0]),
        steps=steps,
        answers=answers,
        costs=costs,
        **_seen(model, pixels),
    )
    write_explanation(settings.out, explained)
    if settings.json:
        found = {
            "model": explained.described,
            "picture": explained.picture,
            "steps": [asdict(step) for step in steps],
            "predictions": [{"class": name, "probability": share} for name, share in answers],
            "pixels as words": [asdict(cost) for cost in costs],
            "page": str(settings.out),
        }
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    kind = "block" if isinstance(backbone, ViT) else "stage"
    unfolded = {f"{kind} {layer + 1}" for layer in open_layers} or {"block 1", "stage 1"}
    _print(steps, unfolded, answers, explained.costs)
    print(f"written: {settings.out}")
    return 0


def _seen(model: Any, pixels: torch.Tensor) -> dict[str, Any]:
    """The pictures of the page: attention of a ViT, and of any model what its tokens are like."""
    from vitrail.analysis.attention import attention_of
    from vitrail.analysis.internals import answer_reads, evaluating, trace
    from vitrail.analysis.rollout import rollout
    from vitrail.analysis.tokens import token_colours, token_similarity

    backbone = model.backbone if isinstance(model, Classifier) else model
    found: dict[str, Any] = {}
    if isinstance(backbone, ViT):
        traced = trace(model, pixels)
        features = traced.features
        reads = answer_reads(traced)
        found["cut"] = traced.grid
        if backbone.config.trunk is not None:
            (y, x), (tall, wide) = traced.grid, backbone.config.patch
            found["mapped"] = y * tall, x * wide, backbone.config.trunk.channels
        found["looked"] = np.stack([attention_of(traced, layer, reads)[0] for layer in range(traced.depth)])
        found["rolled"] = traced.on_grid(rollout(traced))[0]
        kind = "block"
    else:
        with torch.no_grad(), evaluating(backbone):
            features = backbone.features(model.preprocess.normalize(pixels), keep=tuple(range(backbone.depth)))
        kind = "stage"
    assert features.grid is not None
    y, x = features.grid
    asked = tuple(dict.fromkeys(((y // 2, x // 2), (y // 4, x // 4), (3 * y // 4, 3 * x // 4))))
    alike = token_similarity(features.tokens, tuple(row * x + column for row, column in asked))[0]
    found["alike"] = tuple((place, values.reshape(y, x)) for place, values in zip(asked, alike, strict=True))
    places = [(f"after {kind} {number}", part) for number, part in enumerate(features.layers, 1)]
    found["colours"] = tuple(
        (name, token_colours(part.tokens)[0][0].reshape(*(part.grid or ()), 3))
        for name, part in (*places, ("after the last norm", features))
    )
    return found


def _print(
    steps: Sequence[Step], unfolded: set[str], answers: Sequence[tuple[str, float]], costs: Sequence[Any]
) -> None:
    from vitrail.experiments.explained import spoken_bytes, spoken_macs, spoken_seconds, spoken_shape

    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("step", overflow="fold", min_width=12)
    for name in ("comes out", "parameters", "MACs", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    wide = console.width >= 110
    table.add_column("in the paper" if wide else "", overflow="fold", style="dim")
    if wide:
        table.add_column("in words", overflow="fold")

    def numbers(part: Sequence[Step]) -> list[str]:
        parameters, macs = sum(step.parameters for step in part), sum(step.macs for step in part)
        milliseconds = f"{1000 * sum(step.seconds for step in part):.2f}"
        return [f"{parameters:,}" if parameters else "", spoken_macs(macs) if macs else "", milliseconds]

    for group, members in groupby(steps, key=lambda step: step.group):
        part = list(members)
        folds = group.startswith(("block", "stage")) and group not in unfolded
        if folds:
            table.add_row(group, spoken_shape(part[-1].shape), *numbers(part), "folded", *[""] * wide)
            continue
        table.add_row(Text(group, "bold"))
        for step in part:
            paper = step.equation if wide else step.equation.split(":")[0]
            row = [f"  {step.name}", spoken_shape(step.shape), *numbers([step]), paper, *[step.words] * wide]
            table.add_row(*(Text(cell) for cell in row))
    table.add_row(Text("all", "bold"), "", *numbers(steps))
    console.print(table)
    if answers:
        console.print()
        for name, share in answers:
            console.print(Text(f"{100 * share:6.2f} %  {printable(name)}"))
    if len(costs) > 1:
        own, pixels = costs[0], costs[-1]
        console.print(
            Text(
                f"\nWith pixels as words: {pixels.tokens:,} tokens in place of {own.tokens:,}, {spoken_macs(pixels.macs)} "
                f"MACs ({pixels.macs / own.macs:,.0f} times), {spoken_bytes(pixels.map_bytes)} for one block's attention "
                f"maps, {spoken_seconds(pixels.seconds)}{'' if pixels.measured else ' (estimated)'} in place of "
                f"{spoken_seconds(own.seconds)}."
            )
        )
