"""`vitrail figures W [PICTURES] --out DIR`: the paper's pictures of a model's inside, for any checkpoint.

Without `--which`, all that the model and the pictures allow are drawn, and what they do not allow is said; a figure that was
asked for by name and cannot be drawn is an error.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from vitrail.commands.predict import Pictures, find
from vitrail.commands.reading import called
from vitrail.core.device import pick_device
from vitrail.core.errors import UserError
from vitrail.core.runs import write_json
from vitrail.core.types import Sample, Source
from vitrail.data.decode import UnreadablePicture
from vitrail.data.sources import limit
from vitrail.data.transforms import read
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet
from vitrail.weights.load import load_any

Which = Literal["filters", "positions", "distance", "attention", "rollout", "gradient", "similarity", "colours", "map"]


@dataclass(frozen=True)
class Settings:
    """Filters, positions, attention, tokens: PNG and SVG of each, and their numbers in figures.json."""

    weights: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint of any known library, or an id (hf:OWNER/NAME, official:NAME, timm:NAME)."""
    pictures: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders (with all below them), patterns such as 'cats/*.jpg', or - for a picture on standard input."""
    out: Path = Path("figures")
    """The folder that the figures go to."""
    which: tuple[Which, ...] = ()
    """The figures to draw; none: all that can be."""
    data: str = ""
    """Pictures from a data set instead, as for training; the map of the data set needs it."""
    limit: int = 128
    """Most pictures that distances are averaged over; the paper took 128."""
    points: int = 1000
    """Most pictures on the map of the data set."""
    show: int = 4
    """Pictures that are drawn."""
    layers: tuple[int, ...] = ()
    """Blocks to look into, from 1, or from the last, -1; none: some, evenly spread."""
    draw_heads: tuple[int, ...] = ()
    """Heads to look at, from 1; none: some, evenly spread."""
    query: tuple[int, int] | None = None
    """Row and column, from 1, of the patch whose attention is drawn; none: the class token."""
    classes: tuple[str, ...] = ()
    """Classes, by name or number, to ask for evidence of; none: the likeliest three."""
    size: tuple[int, ...] = ()
    """Height and width (or one number for both) in pixels to work at; none: the model's own."""
    seed: int = 0
    """Of the map, and of the choice of pictures from --data."""
    device: str = ""
    """cpu, cuda, cuda:1, mps; none: the fastest there is."""
    heads: int | None = None
    """Attention heads of the model, for checkpoints of other libraries that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, likewise."""
    preprocess: str = ""
    """Preprocessing, where the checkpoint does not state it: as imagenet,bicubic,resize=256,size=224."""


def run(settings: Settings) -> int:
    """0, or 2 if a picture could not be read. Raises UserError where nothing could be done at all."""
    for flag, value in (("--limit", settings.limit), ("--points", settings.points), ("--show", settings.show)):
        if value < 1:
            raise UserError(f"{flag} is {value}; give at least 1.")
    if settings.data and settings.pictures:
        raise UserError("pictures were named and --data was given; give one of the two.")
    if "map" in settings.which and not settings.data:
        raise UserError("the map of a data set needs one; give --data.")
    model = load_any(
        str(settings.weights),
        heads=settings.heads,
        grid=settings.grid,
        image=pair(settings.size),
        preprocess=settings.preprocess or None,
    ).to(pick_device(settings.device or None))
    ready(settings.out, settings.out)
    from vitrail.analysis.figures_inside import save_both
    from vitrail.analysis.gallery import FIGURES, Subject

    source, labels = _source(settings)
    pixels, lost = _pixels(source, model, settings.limit)
    backbone = model.backbone if isinstance(model, Classifier) else model
    heads = (
        ()
        if isinstance(backbone, ResNet)
        else counted(settings.draw_heads, backbone.config.heads, "--draw-heads", "head")
    )
    subject = Subject(
        model,
        called(settings.weights),
        pixels,
        settings.show,
        counted(settings.layers, backbone.depth, "--layers", "block"),
        heads,
        None if settings.query is None else (settings.query[0] - 1, settings.query[1] - 1),
        class_numbers(settings.classes, model),
    )
    table, numbers = Table(box=None, pad_edge=False), {}
    table.add_column("figure", no_wrap=True)
    table.add_column("what it shows", overflow="fold")
    names: tuple[str, ...] = settings.which or (*FIGURES, *(("map",) if settings.data else ()))
    for name in names:
        try:
            if name == "map":
                caption, found = _map(settings, model, source, labels)
            else:
                drawn = FIGURES[name](subject)
                save_both(drawn.figure, settings.out / name)
                caption, found = drawn.caption, drawn.numbers
        except UserError as error:
            if settings.which:
                raise UserError(f"{name}: {error}") from error
            print(f"left out: {name}: {error}", file=sys.stderr, flush=True)
            continue
        numbers[name] = {"caption": caption, **found}
        table.add_row(name, caption)
    if not numbers:
        raise UserError("no figure can be drawn of this model and these pictures; what is missing was said above.")
    write_json(settings.out / "figures.json", {"weights": str(settings.weights), "figures": numbers})
    Console().print(table)
    print(f"written: {settings.out}")
    return 2 if lost else 0


def ready(folder: Path, out: Path) -> None:
    """Makes the folder that --out is or lies in, before any work. Raises UserError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another place.") from error


def pair(size: tuple[int, ...]) -> tuple[int, int] | None:
    """--size as (height, width). Raises UserError for any other count of numbers."""
    if not size:
        return None
    if len(size) > 2 or min(size) < 1:
        raise UserError(
            f"--size {' '.join(map(str, size))} is no size; give a height and a width in pixels, or one of both."
        )
    return (size[0], size[-1])


def counted(numbers: tuple[int, ...], count: int, flag: str, what: str) -> tuple[int, ...]:
    """Numbers from 1, or from the last, -1, to numbers from 0. Raises UserError for one that is not there."""
    for number in numbers:
        if number == 0 or not -count <= number <= count:
            raise UserError(f"{flag} {number}: there is no such {what}; the model's are 1 to {count}.")
    return tuple(dict.fromkeys(number - 1 if number > 0 else count + number for number in numbers))


def class_numbers(classes: tuple[str, ...], model: Any) -> tuple[int, ...]:
    """Names or numbers to numbers. Raises UserError for one that the model does not know."""
    if not classes:
        return ()
    if not isinstance(model, Classifier):
        raise UserError("--classes needs a classifier, and this checkpoint has no head.")
    found = []
    for name in classes:
        if name in model.labels:
            found.append(model.labels.index(name))
        elif name.isdigit() and int(name) < model.config.classes:
            found.append(int(name))
        else:
            import difflib

            near = difflib.get_close_matches(name, model.labels, n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]!r}" if near else f"they are 0 to {model.config.classes - 1}"
            raise UserError(f"--classes {name}: the model has no such class; {hint}.")
    return tuple(dict.fromkeys(found))


def _source(settings: Settings) -> tuple[Source, tuple[str, ...]]:
    """The pictures, and the names of their classes: the test pictures of a data set, where it has some."""
    if not settings.data:
        samples, problems = find(settings.pictures) if settings.pictures else ([], [])
        for problem in problems:
            print(f"left out: {problem.problem}", file=sys.stderr, flush=True)
        if problems and not samples:
            raise UserError("none of the pictures could be found; give files, folders or patterns.")
        return Pictures(tuple(samples)), ()
    from vitrail.data.splits import open_data

    # Nothing is trained here, so nothing is held out that the data do not hold out themselves.
    splits = open_data(settings.data, validation=0.0, seed=settings.seed)
    source = splits.test or splits.validation or splits.train
    return limit(source, max(settings.points, settings.limit), settings.seed), source.classes


def _pixels(source: Source, model: Any, most: int) -> tuple[torch.Tensor, int]:
    """The first `most` pictures that can be read, and how many could not."""
    found: list[torch.Tensor] = []
    lost = asked = 0
    for index in range(len(source)):
        if len(found) == most:
            break
        sample: Sample = source[index]
        asked += 1
        try:
            found.append(read([sample.picture], model.preprocess))
        except UnreadablePicture as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
            lost += 1
    if asked and not found:
        raise UserError("none of the pictures could be read; what was found is said above.")
    return (torch.cat(found) if found else read([], model.preprocess)), lost


def _map(settings: Settings, model: Any, source: Source, classes: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    from vitrail.analysis.data_map import neighbours_alike, plane
    from vitrail.analysis.figures_inside import data_plane, save_both
    from vitrail.experiments.data_map_page import write_map
    from vitrail.inference.features import extract, spoken

    chosen = limit(source, settings.points, settings.seed)
    device = next(model.parameters()).device
    table = extract(model, chosen, model.preprocess, device=device, progress=True)
    where, labels = plane(table.features.numpy(), settings.seed), table.labels.numpy()
    known = bool((labels >= 0).all()) and len(classes) > 1
    alike = neighbours_alike(where, labels) if known else None
    caption = (
        f"{len(where):,} pictures of {settings.data} by the {spoken(model, 'planned')} of {called(settings.weights)}, by "
        "t-SNE: near is alike; sizes of groups and distances between them mean nothing."
    )
    if alike is not None:
        caption += f" Of a picture's 10 nearest, {100 * alike:.0f} % are of its class."
    save_both(data_plane(where, labels, classes, caption), settings.out / "map")
    samples = [chosen[int(index)] for index in table.index]
    write_map(settings.out / "map.html", where, np.asarray(labels), classes, samples, settings.data, caption)
    return caption, {"pictures": len(where), "of its class": None if alike is None else round(alike, 4)}
