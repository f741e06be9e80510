"""`vitrail bench inference`: a model by each engine and beside its peers, in one alternating run."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vitrail.benchmark.alternation import alternate
from vitrail.core.errors import UserError


@dataclass(frozen=True)
class Settings:
    model: str
    """A name of vitrail models, a checkpoint's path or an id."""

    batch: tuple[int, ...] = (8,)
    """Pictures at a time; several are measured one after the other."""

    size: tuple[int, ...] = (0,)
    """Side of the pictures in pixels; 0 is the model's own. Several are measured one after the other."""

    engines: str = "auto,eager"
    """auto, eager, compile, openvino, onnx; several with commas."""

    precision: str = "fp32,bf16"
    """fp32, bf16, int8; several with commas."""

    against: str = ""
    """Peers, where they are installed: timm, transformers or both with a comma."""

    compiled: bool = False
    """Measure the peers under torch.compile too."""

    merge: str = "0"
    """Tokens merged away in each block of ours, or how, as for predict."""

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
    """Prints a table for each batch and size: pictures a second, and the ratio to the reference with its interval."""
    from vitrail.benchmark import inference, peers
    from vitrail.core.compiling import compiling
    from vitrail.core.device import pick_device

    check(settings.batch, settings.seconds, settings.size)
    device = str(pick_device(settings.device or None))
    against = peers.wanted(settings.against)
    sides = inference.names(
        words(settings.engines), words(settings.precision), against, compiled=settings.compiled, device=device
    )

    def measured(batch: int, size: int, threads: int) -> tuple[Any, ...]:
        work = inference.Work(settings.model, batch, size, threads, device, settings.merge)
        model = work.build()
        made: dict[str, Any] = {}
        chosen = {}
        for name in sides:
            made[name], chosen[name] = inference.side(name, work, model, against)
        what = {"kind": "inference", **asdict(work), "against": list(against)}
        return made, chosen, 2.0 * model.config.backbone.macs() * batch, what, model.preprocess.size[0]

    with compiling("--compiled"):
        return carry_out("inference", settings, sides, measured, device)


def check(batch: tuple[int, ...], seconds: float, size: tuple[int, ...] = (0,)) -> None:
    """Raises UserError on numbers that cannot be."""
    for flag, values, least in (("batch", batch, 1), ("size", size, 0), ("seconds", (seconds,), 0)):
        if not values or min(values) < least:
            given = " ".join(f"{value:g}" for value in values) or "empty"
            raise UserError(f"--{flag} is {given}; give {'one or more numbers ' if least or flag == 'size' else ''}"
                            f"from {least}.")  # fmt: skip


def words(flag: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in flag.split(",") if word.strip()))


def carry_out(verb: str, settings: Any, sides: list[str], build: Callable[[int, int, int], tuple], device: str) -> int:
    """Measures all batches and sizes, and shows, writes and draws what came out. Returns the exit code.

    build: from (batch, size, threads) to the sides by name, what each chose, the FLOPs of one piece of work, what
        `alone.peak` has to know, and the side of the pictures.
    """
    import torch

    from vitrail.benchmark import alone, record
    from vitrail.benchmark.machine import Others, matrix_products, pinned, waiting

    err, out = Console(stderr=True, soft_wrap=True), Console(highlight=False)
    precisions = {side: side.split()[-1] for side in sides}
    found = []
    with pinned(settings.threads) as threads:
        for batch in settings.batch:
            for size in settings.size:
                err.print(f"Setting up {len(sides)} sides for batch {batch} ...")
                made, chosen, flops, what, pixels = build(batch, size, threads)
                kinds = tuple(dict.fromkeys(precisions.values()))
                products = matrix_products(torch.device(device), kinds)
                others = Others()
                seconds = turns({**made, **products.sides}, settings.seconds, err, waiting(torch.device(device)))
                quiet = others.result()
                rates = products.rates(seconds)
                del made
                peaks = {}
                if settings.peaks:
                    for side in sides:
                        told = alone.peak({**what, "side": side})
                        peaks[side] = None if told is None else told["peak"] - told["base"]
                shown = record.called(settings.model)
                result = {"model": shown, "batch": batch, "size": pixels, "threads": threads, "device": device}
                lines = record.lines(seconds, precisions, sides[0], batch, flops, rates, peaks, chosen)
                measured = record.Measured({**result, "rounds": len(seconds[sides[0]])}, sides[0], rates, lines)
                out.print(record.title(measured.what), style="bold", soft_wrap=True)
                out.print(record.table(measured))
                out.print("matrix products: " + ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in rates.items()))
                if sentence := Others.sentence(quiet):
                    err.print(sentence, style="yellow")
                found.append({**asdict(measured), "machine_use": quiet})
    spoken = record.spoken(f"bench {verb}", settings)
    whole = record.stamped(f"bench_{verb}", {"command": spoken, "runs": found})
    if settings.json is not None:
        record.write(settings.json, whole)
    if settings.plot is not None:
        from vitrail.analysis.figures import save
        from vitrail.analysis.figures_speed import speeds

        save(speeds(json.loads(json.dumps(found))), settings.plot)
    return 0


def turns(
    sides: dict[str, Any], seconds: float, console: Console, finish: Callable[[], None]
) -> dict[str, list[float]]:
    """`alternate` with the number of rounds on a terminal."""
    with console.status("warming up") as status:
        return alternate(sides, seconds=seconds, finish=finish, each=lambda done: status.update(f"round {done}"))
