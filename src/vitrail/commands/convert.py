"""`vitrail convert SRC DST --to FORMAT`: a checkpoint for another library, read back and compared before it is trusted."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from vitrail.analysis.agreement import TOLERANCE, differences, layers_of, reference_picture
from vitrail.core.errors import UserError
from vitrail.core.values import to_json
from vitrail.models.classifier import Classifier
from vitrail.models.vit import ViT
from vitrail.weights.formats import writer
from vitrail.weights.load import Given, build, headless, read
from vitrail.weights.native import spare_runs
from vitrail.weights.preprocessing import changed
from vitrail.weights.report import page, terminal_width


@dataclass(frozen=True)
class Settings:
    """Writes a checkpoint in another library's format, then reads it back and compares every layer."""

    source: tyro.conf.Positional[str]
    """A file or folder, or an id: hf:OWNER/NAME, official:FOLDER/NAME, timm:NAME."""
    destination: tyro.conf.Positional[Path]
    """The file or folder to write, as the format has it."""
    to: Literal["official", "big-vision", "timm", "hf", "torchvision", "vitrail"]
    """The format to write."""
    heads: int | None = None
    """Attention heads, for a source that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, for a source that cannot say."""
    preprocess: str = ""
    """What the source does not state, or states wrongly, as imagenet,bicubic,resize=256,size=224."""
    overwrite: bool = False
    """Replace what is there."""
    json: bool = False
    """Print JSON."""


def run(settings: Settings) -> int:
    """0, or 1 where what was written computes something else. Raises UserError where the format cannot hold the model."""
    place = settings.destination
    if not settings.overwrite and place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{place} is there already: give another place, or --overwrite")
    spare_runs(place)
    given = read(settings.source, heads=settings.heads, grid=settings.grid)
    if settings.preprocess:
        stated = changed(given.converted.preprocess, settings.preprocess)
        given.converted = replace(given.converted, preprocess=stated)
        given.report = replace(given.report, preprocess=stated, preprocess_source="given by hand")
    model = build(given)
    notes = writer(settings.to).write(model, place)
    backbone = model.backbone if isinstance(model, Classifier) else model
    heads, grid = (backbone.config.heads, backbone.config.grid) if isinstance(backbone, ViT) else (None, None)
    back = read(place, heads=heads, grid=grid)
    images = backbone.preprocess.normalize(reference_picture(backbone.preprocess.size, backbone.config.channels)[None])
    again = build(back if isinstance(model, Classifier) else headless(back))
    found = differences(layers_of(model, images), layers_of(again, images))
    worst = max(found, key=lambda difference: difference.relative)
    bits = same_bits(given, back)
    if settings.json:
        answer = {
            "source": given.report.as_json(),
            "destination": back.report.as_json(),
            "notes": list(notes),
            "differences": to_json(found),
            "bits": bits,
            "equal": worst.equal,
        }
        print(json.dumps(answer, indent=1, ensure_ascii=False))
    else:
        lines = [*given.report.lines(), ("", ""), *(("note", note) for note in notes)]
        lines.append(("written", f"{place} ({back.report.format}, sha256 {back.report.sha256})"))
        if bits:
            lines.append(("read back", "the same bits in every tensor"))
        elif worst.difference == 0:
            lines.append(("read back", "the same bits in every layer's output"))
        else:
            words = f"differs by {worst.relative:.1e} of the largest value at most, in {worst.layer}"
            lines.append(("read back", words))
        if back.report.preprocess != given.report.preprocess:
            lines.append(("note", "this format does not state the preprocessing: whoever reads it must be told"))
        print(page(lines, terminal_width()))
    if not worst.equal:
        print(f"{place} does NOT compute the same (more than {TOLERANCE:g}): do not use it")
    return 0 if worst.equal else 1


def same_bits(ours: Given, theirs: Given) -> bool:
    """Whether both files make the same tensors, by name and to the bit."""
    one, other = ours.converted.tensors, theirs.converted.tensors
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
