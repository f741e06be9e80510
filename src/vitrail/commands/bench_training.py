"""`vitrail bench training`: a step of training beside the peers', in one alternating run; or, with --plan, what memory a
run will need and what makes it fit."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitrail.commands.bench_inference import carry_out, check
from vitrail.core.device import Precision
from vitrail.core.errors import UserError


@dataclass(frozen=True)
class Settings:
    model: str
    """A name of vitrail models, a checkpoint's path or an id."""

    batch: tuple[int, ...] = (8,)
    """Pictures in a step; several are measured one after the other."""

    size: tuple[int, ...] = (0,)
    """Side of the pictures in pixels; 0 is the model's own. Several are measured one after the other."""

    precision: Precision = "bf16"
    """Of matrix products."""

    against: str = ""
    """Peers, where they are installed: timm, transformers or both with a comma."""

    compiled: bool = False
    """All sides under torch.compile."""

    plan: bool = False
    """Say what memory a run needs, without running it."""

    memory: str = ""
    """With --plan: what there is, as 8GiB or 500MB; none: what is free now."""

    checkpointing: bool = False
    """With --plan: blocks are computed again in the backward pass."""

    accumulate: int = 1
    """With --plan: parts that each batch is cut into."""

    classes: int = 1000
    """With --plan: classes of the head."""

    seconds: float = 60.0
    """How long each batch and size is measured, at least five rounds."""

    threads: int = 0
    """Processor cores that are used; 0: all there are."""

    device: str = ""
    """cpu, cuda, cuda:1; none: the fastest there is."""

    peaks: bool = True
    """Measure each side's peak memory too, in a process of its own."""

    json: Path | None = None
    """Write everything into this file."""

    plot: Path | None = None
    """Draw the sides into this PNG or SVG file."""


def run(settings: Settings) -> int:
    """Prints a table for each batch and size, or the plan; returns the exit code: 1 where a plan does not fit at all."""
    from vitrail.core.compiling import compiling
    from vitrail.core.device import pick_device

    check(settings.batch, settings.seconds, settings.size)
    if settings.accumulate < 1 or settings.classes < 1:
        raise UserError("--accumulate and --classes must be at least 1.")
    if settings.plan:
        return _plan(settings)
    for flag, used in (
        ("memory", settings.memory),
        ("checkpointing", settings.checkpointing),
        ("accumulate", settings.accumulate > 1),
    ):
        if used:
            raise UserError(f"--{flag} is for --plan; add that, or leave it out.")
    device = pick_device(settings.device or None)
    import torch

    from vitrail.benchmark import peers, training
    from vitrail.benchmark.subject import subject

    against = peers.wanted(settings.against)
    # On a CPU, timm in bf16 is fastest without its fused attention: its best setting is measured too.
    best = ("timm-written",) if "timm" in against and device.type == "cpu" and settings.precision == "bf16" else ()
    sides = [f"{library} {settings.precision}" for library in (*against, *best, "vitrail")]

    def measured(batch: int, size: int, threads: int) -> tuple[Any, ...]:
        made = {}
        for name in sides:
            # Each on a copy of its own: a step changes the model.
            model = subject(settings.model, size)
            made[name] = training.side(
                name.split()[0], model, batch, torch.device(device), settings.precision, compile=settings.compiled
            )
        what = {
            "kind": "training",
            **{"model": settings.model, "batch": batch, "size": size, "threads": threads, "device": str(device)},
            **{"precision": settings.precision, "compile": settings.compiled, "checkpointing": False, "accumulate": 1},
        }
        return made, {}, training.flops(model, batch), what, model.preprocess.size[0]

    with compiling("--compiled"):
        return carry_out("training", settings, sides, measured, str(device))


def _plan(settings: Settings) -> int:
    from rich.console import Console
    from rich.table import Table

    from vitrail.benchmark import planning, record
    from vitrail.core.device import memory

    limit = in_bytes(settings.memory) if settings.memory else memory()
    if not limit:
        raise UserError("This system does not say how much memory is free; give --memory, as 8GiB.")
    out, found = Console(highlight=False), []
    for batch in settings.batch:
        for size in settings.size:
            plan = planning.plan(
                settings.model,
                batch,
                size,
                precision=settings.precision,
                limit=limit,
                classes=settings.classes,
                checkpointing=settings.checkpointing,
                accumulate=settings.accumulate,
            )
            found.append(asdict(plan))
            shown = Table(box=None, pad_edge=False)
            shown.add_column("what")
            shown.add_column("MiB", justify="right")
            for name, value in plan.parts.items():
                shown.add_row(name, f"{value / 2**20:,.0f}")
            out.print(plan.title, style="bold", soft_wrap=True)
            out.print(shown)
            out.print(plan.said, soft_wrap=True)
            for option in plan.options:
                out.print(f"  {option.said}", soft_wrap=True, markup=False)
    if settings.json is not None:
        spoken = record.spoken("bench training", settings)
        record.write(settings.json, record.stamped("bench_plan", {"command": spoken, "plans": found}))
    return 0 if all(plan["fits"] or plan["options"] for plan in found) else 1


def in_bytes(words: str) -> int:
    """ "8GiB", "8G", "500 MB", "1.5GiB" to bytes. Raises UserError on anything else."""
    match = re.fullmatch(r"([\d.]+)\s*([kmgt]?)(i?)b?", words.strip().lower())
    try:
        if match is None:
            raise ValueError
        number, prefix, binary = float(match[1]), match[2], match[3] or not words.strip().lower().endswith("b")
        size = int(number * (1024 if binary else 1000) ** ("kmgt".index(prefix) + 1 if prefix else 0))
        if size < 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--memory {words} is not an amount of memory; write it as 8GiB or 500MB.") from None
    return size
