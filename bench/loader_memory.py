"""Whether a loader's memory grows: `python bench/loader_memory.py` reads a folder of JPEGs for 20 epochs, 2 workers.

Counted is what the process and its workers take together, pages that they share counted once (anonymous and shared
memory of Linux's smaps_rollup; pages of library files count for all programs that run, and move with them). The claim is
that the last five epochs take at most 1 % more than epochs 3 to 7; exit code 1 if they do.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np
from PIL import Image

from vitrail.core.types import Preprocess
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.splits import open_data
from vitrail.data.transforms import Transform

MOST = 1.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), settings.pictures)
        source = open_data(folder, validation=0).train
        order = Order(len(source), 50, settings.epochs * len(source))
        loader = PictureLoader(source, Transform(Preprocess((64, 64)), "inception"), order, settings.workers)
        taken: list[float] = []
        for step, _ in enumerate(loader.batches(), 1):
            if step * order.batch >= (len(taken) + 1) * len(source):
                taken.append(proportional_memory() / 2**20)
                print(f"epoch {len(taken):2}: {taken[-1]:.1f} MiB", flush=True)
    early, late = np.mean(taken[2:7]), np.mean(taken[-5:])
    growth = float(late / early)
    print(f"last five epochs / epochs 3 to 7: {growth:.4f}; at most {MOST}")
    found = {"growth": growth, "at_most": MOST, "mib_after_each_epoch": taken}
    measure.write(
        "loader_memory",
        {**found, "settings": {k: str(v) for k, v in vars(settings).items() if k != "out"}},
        settings.out,
    )
    return int(growth > MOST)


def draw(folder: Path, count: int) -> None:
    """Pictures of smooth noise, 160 x 120, half of them in each of two classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / ("one", "two")[number % 2] / f"{number:05d}.jpg"
        place.parent.mkdir(exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(place, quality=85)


def proportional_memory(process: int = 0) -> int:
    """Bytes of a process (0: of this one) and all its descendants; of those that end meanwhile, none."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended since it was listed
        children.setdefault(parent, []).append(int(stat.parent.name))
    total, waiting = 0, [process or os.getpid()]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


if __name__ == "__main__":
    sys.exit(main())
