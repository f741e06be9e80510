"""What the machine is, what the pictures are, and what a step of training costs: measured, for the plan and the estimate.

Also what goes on record so that a result can be traced: versions and the commit.
"""

import contextlib
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from vitrail.core.device import cores, memory
from vitrail.core.types import Batch, Objective, Source
from vitrail.data.decode import UnreadablePicture, opened
from vitrail.data.loader import PictureLoader
from vitrail.experiments.plan import Machine
from vitrail.experiments.recipe import Recipe
from vitrail.training.loop import fit
from vitrail.training.pace import Pace


def picture_sizes(source: Source, most: int) -> list[tuple[int, int]]:
    """(height, width) of some pictures, spread evenly over the source; those that cannot be read are passed over."""
    found = []
    for index in np.linspace(0, len(source) - 1, min(most, len(source)), dtype=int):
        sample = source[int(index)]
        if isinstance(sample.picture, np.ndarray):
            found.append((sample.picture.shape[0], sample.picture.shape[1]))
            continue
        with contextlib.suppress(UnreadablePicture), opened(sample.picture, sample.name) as file:
            found.append(file.size)
    return found


def this_machine(device: torch.device) -> Machine:
    return Machine(device.type, cores(), memory(), device.type == "cuda" or (device.type == "cpu" and _fast_bf16()))


def _fast_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices faster than fp32 ones: tried, in milliseconds, not looked up."""

    def seconds(kind: torch.dtype, edge: int = 512) -> float:
        matrix = torch.ones(edge, edge, dtype=kind)
        began = time.perf_counter()
        matrix @ matrix
        return time.perf_counter() - began

    plain = min(seconds(torch.float32) for _ in range(5))
    seconds(torch.bfloat16, 16)  # the library's own beginning
    for _ in range(5):
        half = seconds(torch.bfloat16)
        if half < plain:
            return True
        if half > 20 * plain:  # imitated, as where a product of this size takes a quarter of a second: not once more
            return False
    return False


def measure_step(
    model: nn.Module,
    task: Callable[[nn.Module], Objective],
    loader: PictureLoader,
    recipe: Recipe,
    device: torch.device,
) -> float:
    """Seconds that one step takes, measured on a copy of the model: the median after one to warm up.

    Decoding counts where it is the slower side: it runs beside the training, on as many processes as there are workers.
    """
    times: list[float] = []
    reading: list[float] = []
    precision = recipe.run.precision
    assert precision != "planned"
    pace = Pace(precision=precision, accumulate=recipe.run.accumulate, evaluate_every=10**9, log_every=10**9, checks=0)

    class Timed:
        def __len__(self) -> int:
            return len(loader)

        def at(self, step: int) -> Batch:
            return loader.at(step)

        def batches(self, start: int = 0) -> Iterator[Batch]:
            batches = loader.batches(start)
            for _ in range(len(loader)):
                asked = time.perf_counter()
                batch = next(batches)
                given = time.perf_counter()
                reading.append(given - asked)
                yield batch
                times.append(time.perf_counter() - given)

    outcome = fit(
        model,
        task,
        Timed(),
        optimiser=recipe.optimiser,
        schedule=recipe.schedule,
        pace=pace,
        device=device,
        seed=recipe.run.seed,
    )
    if outcome.interrupted is not None:
        raise KeyboardInterrupt
    held = recipe.data.crop == "none"  # decoded once, then kept
    reads, step = 0.0 if held else median(reading), median(times[1:])
    return step + reads if recipe.data.workers == 0 else max(step, reads / recipe.data.workers)


def try_to_compile(device: torch.device) -> None:
    """Compiles almost nothing, so that what torch.compile lacks is found before a run begins. Raises what it raises."""
    torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has used at most so far; after a measured step, what training needs."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resident("VmHWM")
    if most is not None:
        return most
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def resident(key: str) -> int | None:
    """Bytes of main memory of this process: "VmRSS" now, "VmHWM" at most so far; None where the system does not say.

    getrusage's would not do for a child: it begins with what its parent had.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))


def versions() -> dict[str, str]:
    packages = ("vitrail", "torch", "numpy", "pillow", "safetensors", "datasets")
    known = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **known, "system": platform.platform()}


def commit() -> str | None:
    """The commit of Vitrail's own sources, where they stand in a git checkout and git is there to ask."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    ask = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git on this machine
        return None
