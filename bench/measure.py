"""What the measurements of this folder share: fair alternation, an interval without assumptions, a dated record."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.core.device import cores, memory

ROOT = Path(__file__).parents[1]


def alternate(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, a round a pair, the order turned round each time: what drifts or disturbs hits both alike."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        pair = ((0, first), (1, second))
        for place, function in pair if number % 2 == 0 else reversed(pair):
            begun = time.perf_counter()
            function()
            seconds[place].append(time.perf_counter() - begun)
    return seconds


def median_ratio(first: list[float], second: list[float], draws: int = 10_000, seed: int = 0) -> dict[str, float]:
    """The median over the rounds of second / first, with its 95 % bootstrap interval."""
    ratios = np.array(second) / np.array(first)
    random = np.random.default_rng(seed)
    medians = np.median(random.choice(ratios, (draws, len(ratios))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def machine() -> dict[str, Any]:
    found = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    return {
        "processor": found or platform.processor(),
        "cores": cores(),
        "memory_gib": round(memory() / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(name: str, found: dict[str, Any], folder: Path) -> Path:
    """folder/NAME-DATE.json: what was found, on which machine, at which commit."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    date = datetime.date.today().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{date}.json"
    record = {"name": name, "date": date, "commit": commit.stdout.strip() or None, "machine": machine(), **found}
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written: {path}")
    return path


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
