"""The machine during a measurement: what it is, which cores are used, whether others use it too, and what its matrix
products reach, which bounds every model."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitrail.benchmark.alternation import Side
from vitrail.core.device import cores, memory
from vitrail.core.errors import UserError

BUSY = 0.05
"""The share of the machine that others may use before a measurement is called disturbed."""
LONGEST = 0.4
"""Seconds that a bare matrix product takes at most, roughly."""
TICKS = 50
"""Of the system's clock, that have to pass before a share is told: it counts in whole ticks of every core, so that over a
shorter time a single one of somebody else's looks like a crowd."""


def machine() -> dict[str, Any]:
    """Names and numbers for a record: processor, cores, memory, GPU, versions."""
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


@contextmanager
def pinned(threads: int) -> Iterator[int]:
    """This process on `threads` cores (0: all that it may use), each library with as many threads; gives their number.

    Raises UserError where it has fewer cores than that.
    """
    most = cores()
    threads = threads or most
    if not 0 < threads <= most:
        raise UserError(
            f"--threads is {threads}, but this process may use {most} cores; give 1 to {most}, or 0 for all."
        )
    before = torch.get_num_threads()
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    _bind(allowed[:threads])
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
        _bind(allowed)


@dataclass
class Others:
    """What other programs use of the processor between two looks; of Linux, else nothing is known but the load.

    load: the machine's load average at the beginning.
    """

    load: float

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._begun, self._own, self._busy = time.monotonic(), _own_seconds(), _busy_seconds()

    def share(self) -> float | None:
        """Of all cores, the share that others used since this was made, 0 to 1; None where the system does not say, or too
        little time has passed to tell."""
        busy, passed = _busy_seconds(), time.monotonic() - self._begun
        if busy is None or self._busy is None or passed < TICKS / os.sysconf("SC_CLK_TCK"):
            return None
        used = busy - self._busy - (_own_seconds() - self._own)
        return min(max(0.0, used / (passed * (os.cpu_count() or 1))), 1.0)

    def result(self) -> dict[str, Any]:
        """For the record: the share, the load, and whether the machine counts as idle."""
        share = self.share()
        idle = share < BUSY if share is not None else self.load < 0.5
        return {"idle": idle, "others_share": None if share is None else round(share, 3), "load_before": self.load}

    @staticmethod
    def sentence(result: dict[str, Any]) -> str:
        """What to tell a person of a result; empty where the machine was idle."""
        if result["idle"]:
            return ""
        share = result["others_share"]
        used = f"load {result['load_before']:.1f}" if share is None else f"{share:.0%} of the processor"
        return f"The machine was not idle: others used {used} meanwhile, so take these numbers as a hint."


@dataclass(frozen=True)
class Products:
    """Bare products of two random square matrices, by "matrix PRECISION": as sides to measure, and the FLOPs of each."""

    sides: dict[str, Side]
    flops: dict[str, float]

    def rates(self, seconds: dict[str, list[float]]) -> dict[str, float]:
        """Operations a second in each precision, from the medians of these sides' turns."""
        middle = {name: sorted(seconds[name])[len(seconds[name]) // 2] for name in self.sides}
        return {name.removeprefix("matrix "): self.flops[name] / time for name, time in middle.items()}


def matrix_products(device: torch.device, precisions: tuple[str, ...], edge: int = 0) -> Products:
    """In each precision that torch has a product for on this device.

    edge: 0 is 2048 on a CPU and 8192 on a GPU, or the power of two below it at which a product takes LONGEST: where the
    processor has no such units, it is imitated at a hundredth of the speed.
    """
    most = edge or (8192 if device.type == "cuda" else 2048)
    made = Products({}, {})
    for precision in precisions:
        length = edge or 256
        side = _product(length, precision, device)
        try:
            side()
            while length < most and _seconds(side, device) < LONGEST / 8:  # twice the edge, eight times the work
                length *= 2
                side = _product(length, precision, device)
                side()
        except (RuntimeError, NotImplementedError):
            continue
        made.sides[f"matrix {precision}"], made.flops[f"matrix {precision}"] = side, 2.0 * length**3
    return made


def waiting(device: torch.device) -> Callable[[], None]:
    """What ends a turn (`alternation.alternate`): waiting for a GPU's work, of a CPU nothing."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def _seconds(side: Side, device: torch.device) -> float:
    waiting(device)()
    begun = time.perf_counter()
    side()
    waiting(device)()
    return time.perf_counter() - begun


def _product(edge: int, precision: str, device: torch.device) -> Side:
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(edge, edge, generator=generator) for _ in range(2)]
    if precision == "int8":
        first, second = ((each * 40).clamp(-127, 127).to(torch.int8).to(device) for each in pair)
    else:
        first, second = (each.to(device, torch.bfloat16 if precision == "bf16" else torch.float32) for each in pair)
    if precision == "int8" and device.type == "cuda":
        second = second.T.contiguous().T  # the layout that its integer kernels are made for
    return partial(torch._int_mm if precision == "int8" else torch.mm, first, second)


def _bind(chosen: list[int]) -> None:
    if not chosen:
        return
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), chosen)
        except ProcessLookupError:
            continue  # a thread that has just ended


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the machine began; waiting and idling do not count."""
    lines = _lines("/proc/stat")
    if not lines:
        return None
    user, nice, system, _idle, _wait, interrupts, soft, steal = map(int, lines[0].split()[1:9])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
