"""`vitrail pack DATA OUT`: pictures shrunk once to what training needs, in a folder that every --data takes."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Settings:
    """Shrinks pictures once, into a folder that is read without decoding: training from it is the same data in the same
    order. Give the same command again to go on after an interruption."""

    data: tyro.conf.Positional[str]
    """Pictures: a folder, CSV, parquet or anything else that --data of train takes."""

    out: tyro.conf.Positional[Path]
    """The folder to make."""

    size: int = 256
    """Length of the shorter side, in pixels; smaller pictures are stored as they are, pixel for pixel."""

    workers: int | None = None
    """Processes that decode; one a core when not given."""

    json: bool = False
    """Print what was packed as JSON."""


def run(settings: Settings) -> int:
    """Packs the pictures of --data into a folder; returns the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vitrail.core.device import cores
    from vitrail.core.errors import UserError
    from vitrail.data import splits
    from vitrail.data.pack import estimate, pack, refuse_if_full
    from vitrail.data.shards import holds_pack

    if settings.workers is not None and settings.workers < 1:
        raise UserError(f"--workers is {settings.workers}: give at least 1.")
    out, folder = settings.out.expanduser(), Path(settings.data).expanduser()
    if folder.is_dir():
        if holds_pack(folder):
            raise UserError(f"{folder} is a packed folder already: pack the pictures that it was made of.")
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{out} lies inside of {folder}, where it would be read as pictures: give another folder.")
    found = splits.read(settings.data)
    sources = found[0]
    count, needed = sum(map(len, sources.values())), estimate(sources, max(1, settings.size))
    free = refuse_if_full(out, needed)
    counts = ", ".join(f"{len(source):,} for {split}" for split, source in sources.items())
    print(
        f"Packing {count:,} pictures ({counts}) at {settings.size} pixels: about {needed / 1e9:.2f} GB; {free / 1e9:.1f} "
        "GB are free.",
        file=sys.stderr,
    )
    began = time.monotonic()
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=count)
        workers = settings.workers or cores()
        made = pack(found, settings.data, out, settings.size, workers, lambda done: bar.update(task, completed=done))
    if settings.json:
        print(json.dumps(made, indent=2, ensure_ascii=False))
        return 0
    print(f"{out}: {count:,} pictures, {made['bytes'] / 1e9:.2f} GB, in {time.monotonic() - began:.0f} s.")
    lost = [item for items in made["lost"].values() for item in items]
    for item in lost[:20]:
        print(f"  {item['reason']}")
    if lost:
        print(f"{len(lost)} of them cannot be read; they keep their places and are left out of training, as before.")
    print(f"Use it as any data: vitrail train --data {out}")
    return 0
