"""What the scripts of this folder share; the measuring itself is vitrail.benchmark, which `vitrail bench` uses too."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitrail.benchmark import alternation, record
from vitrail.benchmark.machine import machine

__all__ = ["ROOT", "alternate", "machine", "median_ratio", "write"]
ROOT = Path(__file__).parents[1]


def alternate(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, a round a pair, from the first call on."""
    seconds = alternation.alternate({"first": first, "second": second}, rounds=rounds, shortest=0.0)
    return seconds["first"], seconds["second"]


def median_ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """The median of second over the median of first, with its 95 % bootstrap interval."""
    found = alternation.ratio(second, first)
    return {"median": found.value, "low": found.low, "high": found.high}


def write(name: str, found: dict[str, Any], folder: Path) -> Path:
    """folder/NAME-DATE.json: what was found, on which machine, at which commit (marked where files were changed)."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    stamped = {**record.stamped(name, {}), "commit": commit.stdout.strip() or None, **found}
    path = folder / f"{name}-{stamped['date']}.json"
    record.write(path, stamped)
    print(f"written: {path}")
    return path
