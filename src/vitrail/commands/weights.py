"""`vitrail weights SRC`: what a checkpoint is and what would be done to it; no model is built."""

import json
from dataclasses import dataclass

import tyro

from vitrail.weights.load import inspect
from vitrail.weights.report import page, terminal_width


@dataclass(frozen=True)
class Settings:
    """What a checkpoint is: its format, architecture, numerics, preprocessing, head, and what was renamed or left out."""

    source: tyro.conf.Positional[str]
    """A file or folder, or an id: hf:OWNER/NAME, official:FOLDER/NAME, timm:NAME."""
    heads: int | None = None
    """Attention heads, for a file that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, for a file that cannot say."""
    keys: bool = False
    """List every tensor with the name that it gets."""
    json: bool = False
    """Print JSON."""


def run(settings: Settings) -> int:
    """0; raises UserError for what cannot be read."""
    report = inspect(settings.source, heads=settings.heads, grid=settings.grid)
    if settings.json:
        print(json.dumps(report.as_json(), indent=1, ensure_ascii=False))
        return 0
    print(page(report.lines(), terminal_width()))
    if settings.keys:
        print()
        for theirs, ours in report.renamed:
            print(f"{theirs} -> {ours}")
    return 0
