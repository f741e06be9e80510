"""What memory a training run will need, and which of checkpointing, accumulation or a smaller batch makes it fit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from vitrail.benchmark.subject import called
from vitrail.core.device import Precision
from vitrail.core.errors import UserError
from vitrail.experiments.footprint import Footprint, footprint
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.training.optim import Optimiser
from vitrail.weights import zoo

PROCESS = 330 << 20
"""Bytes of a process that has imported torch and Vitrail and has run a step of a tiny model."""
BESIDE = 32 << 20
"""Bytes that a step on a CPU takes beyond its tensors: the matrix library's room for reordered weights."""
HOLES = 1.108
"""Memory over tensors: what the allocator cannot give back between tensors of other sizes."""
AGAIN: dict[Precision, float] = {"bf16": 2.7, "fp32": 5.0}
"""With checkpointing, more of such holes: each block's tensors, made anew, no longer fit where gradients have been laid
meanwhile. As a factor of what one block keeps for its backward pass. All are fits to bench/growth.py's points."""
DEEP = 8
"""Blocks from which on that is so; of fewer, in proportion: in fp32 2.6 were measured of 4 blocks, and 3.9 of 6."""

OPTIMISER = Optimiser(rate=1e-4)
"""As a run has it: Adam and clipping, which changes no peak but the last."""

SAME = "the same numbers, but for what is drawn at random"


@dataclass(frozen=True)
class Option:
    """A way to make a run fit. peak: bytes with it. cost: what it costs, in words."""

    flags: str
    peak: int
    cost: str

    @property
    def said(self) -> str:
        return f"{self.flags}: {self.peak / 2**30:.2f} GiB ({self.cost})"


@dataclass(frozen=True)
class Plan:
    """parts: bytes by name, the peak among them last. options: ways that fit, where the run as asked for does not."""

    title: str
    parts: dict[str, int]
    peak: int
    limit: int
    fits: bool
    said: str
    options: list[Option]


def plan(
    name: str,
    batch: int,
    size: int,
    *,
    precision: Precision,
    limit: int,
    classes: int = 1000,
    checkpointing: bool = False,
    accumulate: int = 1,
) -> Plan:
    """Of a run on the CPU with Adam and gradient clipping. Raises UserError on a model that is not known."""
    config = config_of(name, size, classes)

    def needs(count: int, again: bool, parts: int) -> int:
        return needed(config, count, precision, again, parts)

    found = _step(config, batch, precision, checkpointing, accumulate)
    peak = needs(batch, checkpointing, accumulate)
    parts = {
        "Python, torch, libraries, allocator": peak - found.peak,
        "weights": found.weights,
        "gradients": found.gradients,
        "optimiser state": found.optimiser,
        "kept for the backward pass": found.activations,
        "pictures": found.data,
        "at the peak": peak,
    }
    height, width = config.backbone.image
    title = f"{called(name)}, batch {batch}, {height} x {width} px, {precision}"
    fits = peak <= limit
    said = f"needs {peak / 2**30:.2f} GiB of {limit / 2**30:.2f} GiB: {'it fits' if fits else 'it does not fit'}"
    options: list[Option] = []
    if not fits and needs(1, True, 1) > limit:
        said += "; not even one picture at a time with --checkpointing does: give a smaller --model or --size."
    elif not fits:
        options = _options(batch, checkpointing, accumulate, limit, needs)
        said += "; what does:" if options else "; nor does anything but one picture at a time: give a smaller --batch."
    return Plan(title, parts, peak, limit, fits, said + "." * fits, options)


def needed(
    config: ClassifierConfig, batch: int, precision: Precision, checkpointing: bool = False, accumulate: int = 1
) -> int:
    """Bytes of main memory that a process which trains it on the CPU needs at its peak."""
    total = PROCESS + BESIDE + HOLES * _step(config, batch, precision, checkpointing, accumulate).peak
    if checkpointing:
        plain = _step(config, batch, precision, False, accumulate)
        depth = config.backbone.depth
        total += AGAIN[precision] * min(1.0, depth / DEEP) * plain.activations / depth
    return int(total)


@cache
def _step(
    config: ClassifierConfig, batch: int, precision: Precision, checkpointing: bool, accumulate: int
) -> Footprint:
    return footprint(
        config, batch, precision=precision, checkpointing=checkpointing, accumulate=accumulate, optimiser=OPTIMISER
    )


def config_of(name: str, size: int, classes: int) -> ClassifierConfig:
    """By name without building it; of a checkpoint, what it holds."""
    from vitrail.benchmark.subject import subject

    try:
        known = zoo.config(name, (size, size) if size else None)
    except UserError:
        model = subject(name, size)
        assert isinstance(model, Classifier)
        return model.config
    return ClassifierConfig(known, classes, "class" if getattr(known, "class_token", False) else "mean")


Needs = Callable[[int, bool, int], int]
"""From batch, checkpointing and parts to bytes."""


def _options(batch: int, checkpointing: bool, accumulate: int, limit: int, needs: Needs) -> list[Option]:
    """Checkpointing, accumulation and a smaller batch, each alone where that fits; else checkpointing with parts."""
    options: list[Option] = []
    if not checkpointing:
        again = needs(batch, True, accumulate)
        if again <= limit:
            options.append(Option("--checkpointing", again, "a third more time"))
    parts, peak = _accumulation(batch, checkpointing, accumulate, limit, needs)
    if parts:
        options.append(Option(f"--accumulate {parts}", peak, SAME))
    elif not checkpointing:
        parts, peak = _accumulation(batch, True, accumulate, limit, needs)
        if parts:
            options.append(Option(f"--checkpointing --accumulate {parts}", peak, f"{SAME}; a third more time"))
    smaller = _smaller(batch, limit, lambda count: needs(count, checkpointing, accumulate))
    if smaller:
        options.append(Option(f"--batch {smaller[0]}", smaller[1], "another batch size needs another rate"))
    return options


def _accumulation(batch: int, checkpointing: bool, begin: int, limit: int, needs: Needs) -> tuple[int, int]:
    """The fewest parts that fit, doubling; (0, 0) where none do."""
    parts = begin
    while parts < batch:
        parts = min(2 * parts, batch)
        peak = needs(batch, checkpointing, parts)
        if peak <= limit:
            return parts, peak
    return 0, 0


def _smaller(batch: int, limit: int, needs: Callable[[int], int]) -> tuple[int, int] | None:
    """The largest batch that fits, by secants: memory grows with the batch in nearly a straight line."""
    fits, over, guess = 0, batch, max(1, batch // 2)
    while fits < guess < over:
        peak = needs(guess)
        each = max((needs(over) - peak) / (over - guess), 1)
        fits, over = (guess, over) if peak <= limit else (fits, guess)
        guess = max(1, min(over - 1, int(guess + (limit - peak) / each)))
    return (fits, needs(fits)) if fits else None
