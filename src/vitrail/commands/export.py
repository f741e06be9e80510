"""`vitrail export W --to TARGET --out F`: a model as a file for another runtime, compared on pictures before it stays."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

from vitrail.commands.reading import pictures_for_int8
from vitrail.core.errors import UserError
from vitrail.data.decode import UnreadablePicture
from vitrail.inference.engines import EnginePrecision, engine_cache
from vitrail.inference.export import SUFFIXES, Target, export, sizes_from
from vitrail.inference.features import Reading
from vitrail.inference.graphs import Asked
from vitrail.models.classifier import Classifier
from vitrail.models.vit import merge_tokens
from vitrail.weights.load import load_any


@dataclass(frozen=True)
class Settings:
    """A model as a file for OpenVINO, ONNX Runtime or torch.export; any number of pictures at a time.

    Labels and preprocessing lie in it as JSON: in OpenVINO's rt_info and ONNX's metadata_props under "vitrail", in
    torch.export's extra file "vitrail.json". Of a checkpoint without a head, features come out.
    """

    weights: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint of any known library, with or without a head, or an id (hf:OWNER/NAME, ...)."""
    to: Target
    """Whom the file is for."""
    out: Path
    """The file: .xml for openvino (with a .bin beside it), .onnx, or .pt2 for torch-export."""
    sizes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SIZE ...")] = ()
    """224, 384x256 (height x width), several of them, or any; none: the model's own. Several, or any: every multiple of
    the patch from two patches each way (which costs a little speed)."""
    uint8: bool = False
    """The file takes raw pixels, 0 to 255, and normalises them itself."""
    precision: EnginePrecision = "fp32"
    """bf16: torch-export alone; int8: openvino alone, with --calibrate."""
    merge: str = "0"
    """Patch tokens to merge in each block (arXiv 2210.09461); 0: none. Or how, as for predict."""
    reading: Reading | None = None
    """Features instead of answers: planned, class, mean, class-mean or pre-logits, as of probe."""
    data: str = ""
    """Pictures to compare on, as for evaluate; none: those of the embedded sample, enlarged."""
    tolerance: float | None = None
    """The largest difference that passes, as a share of the largest answer; none: 0.001 (bf16 0.1, int8 0.5)."""
    calibrate: str = ""
    """For int8: your own pictures, with or without labels."""
    int8_drop: float = 0.5
    """Points of top-1 that int8 may cost on part of those pictures; above, nothing is written."""
    overwrite: bool = False
    """Replace what is there."""
    heads: int | None = None
    """Attention heads, for checkpoints of other libraries that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, likewise."""
    preprocess: str = ""
    """Preprocessing, where the checkpoint does not state it: as imagenet,bicubic,resize=256,size=224."""
    json: bool = False
    """Print JSON."""


def run(settings: Settings) -> int:
    """0. Raises UserError where the file cannot be made, or would give other answers."""
    if settings.out.exists() and not settings.overwrite:
        raise UserError(f"{settings.out} is there already; give another --out, or --overwrite.")
    if settings.out.suffix != SUFFIXES[settings.to]:
        raise UserError(
            f"--out {settings.out} is no name for {settings.to}; give one that ends in {SUFFIXES[settings.to]}."
        )
    model = load_any(
        str(settings.weights), heads=settings.heads, grid=settings.grid, preprocess=settings.preprocess or None
    )
    merge_tokens(model.backbone if isinstance(model, Classifier) else model, settings.merge)
    asked, console = Asked(model, settings.reading), Console(stderr=True, soft_wrap=True)
    quantised: Any = None
    notes: list[str] = []
    sizes = sizes_from(settings.sizes)
    if settings.precision == "int8" and settings.to == "openvino":
        quantised, notes = int8(settings, asked)
    try:
        made = export(
            asked,
            settings.to,
            settings.out,
            sizes=sizes,
            pixels=settings.uint8,
            precision=settings.precision,
            source=pictures_for_int8(settings.data, settings.weights) if settings.data else None,
            quantised=quantised,
            tolerance=settings.tolerance,
        )
    except UnreadablePicture as error:
        raise UserError(f"--data {settings.data} cannot be compared on: {error}") from error
    for note in notes:
        console.print(Text(note))
    on = settings.data or "pictures of sample:fashion, enlarged"
    if settings.json:
        compared = [
            {"size": list(size), "difference": one.difference, "largest": one.scale, "pictures": one.count}
            for size, one in made.agreements.items()
        ]
        print(json.dumps({"out": str(made.path), "compared": compared, "on": on, **made.metadata}, indent=1))
        return 0
    print(f"{made.path}: {made.metadata['input']} to {made.metadata['output']}, in {settings.precision}")
    for size, one in made.agreements.items():
        print(f"  against the model at {size[0]} x {size[1]}: {one.said} ({on})")
    return 0


def int8(settings: Settings, asked: Asked) -> tuple[Any, list[str]]:
    """The quantised model and what it costs. Raises UserError where that is too much, or cannot be said."""
    if not isinstance(asked.model, Classifier) or asked.reading is not None:
        raise UserError("int8 is measured by a classifier's answers, and features are none; give --precision fp32.")
    if not settings.calibrate:
        raise UserError("--precision int8 has to be calibrated; give --calibrate with pictures of your own.")
    if settings.sizes and sizes_from(settings.sizes) != (asked.preprocess.size,):
        raise UserError(
            "int8 is calibrated at the model's own size; leave out --sizes, or give --preprocess with another."
        )
    from vitrail.inference.calibrate import calibrated

    source = pictures_for_int8(settings.calibrate, settings.weights)
    made, gate = calibrated(asked, source, limit=settings.int8_drop, cache=engine_cache())
    if not gate.passed:
        raise UserError(f"{gate.said} Nothing was written; raise --int8-drop, or give --precision fp32.")
    return made, [gate.said]
