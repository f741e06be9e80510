"""Where numbers are computed, how precisely, and from which seeds.

Randomness here is a function of where it is used: a seed is mixed from the run's seed and the step (or epoch and sample)
that needs it. A run that is continued therefore needs no saved generator states to draw the same numbers.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from vitrail.core import ranks
from vitrail.core.errors import UserError

Precision = Literal["fp32", "bf16"]


def pick_device(name: str | None = None) -> torch.device:
    """`name` ("cpu", "cuda", "cuda:1", "mps"), or the fastest there is. Raises UserError where it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", ranks.local_rank())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used on this machine ({str(error).splitlines()[0]}); leave the flag out to take "
            "the fastest device there is."
        ) from error
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 matrix products with fp32 weights, norms and losses; nothing at all for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def mix(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words; the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def own_randomness() -> Iterator[None]:
    """Whatever is seeded inside, the caller's global generators come out as they went in."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of main memory that are free for use now; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
