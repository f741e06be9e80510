"""A measurement as a value, as JSON for a file and as a table for a person."""

import datetime
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from vitrail.benchmark.alternation import Ratio, ratio
from vitrail.benchmark.machine import machine
from vitrail.benchmark.subject import called
from vitrail.core.errors import UserError
from vitrail.experiments.costs import commit

QUIET = ("json", "plot")
"""Flags that say where to write, and nothing of what is measured."""


@dataclass(frozen=True)
class Line:
    """One side. seconds: of one piece of work, by round. rate: pictures a second. speedup: beside the reference.

    precision: of its matrix products. share: of the matrix rate in that precision, None where that is not known.
    peak: bytes beyond Python and its libraries. chosen: what it settled on, of an engine that chooses.
    """

    side: str
    precision: str
    seconds: list[float]
    rate: float
    low: float
    high: float
    speedup: Ratio
    flops: float
    share: float | None
    peak: int | None = None
    chosen: str = ""


@dataclass(frozen=True)
class Measured:
    """All sides of one alternating run. what: its model, batch, size; reference: the side that is 1.00."""

    what: dict[str, Any]
    reference: str
    matrix: dict[str, float]
    lines: list[Line] = field(default_factory=list)


def lines(
    seconds: Mapping[str, list[float]],
    precisions: Mapping[str, str],
    reference: str,
    pictures: int,
    flops: float,
    matrix: Mapping[str, float],
    peaks: Mapping[str, int | None],
    chosen: Mapping[str, str],
) -> list[Line]:
    """What `alternate` gave, in words and ratios. flops: of one piece of work."""
    found = []
    for side, precision in precisions.items():
        times = seconds[side]
        middle = median(times)
        low, high = _interval(times)
        share = flops / middle / matrix[precision] if precision in matrix else None
        found.append(
            Line(
                side,
                precision,
                [round(time, 6) for time in times],
                pictures / middle,
                pictures / high,
                pictures / low,
                ratio(seconds[reference], times),
                flops / middle,
                share,
                peaks.get(side),
                chosen.get(side, ""),
            )
        )
    return found


def table(measured: Measured, unit: str = "pictures/s") -> Table:
    """For a terminal; "share" is of the matrix rate, "=" marks the reference."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("side", overflow="fold")
    for heading, width in ((unit, 10), ("ratio", 6), ("95 %", 9), ("GFLOP/s", 7), ("share", 5), ("peak MiB", 8)):
        shown.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for line in measured.lines:
        speedup = line.speedup
        shown.add_row(
            line.side + (f" ({line.chosen})" if line.chosen else ""),
            f"{line.rate:.3g}",
            f"{speedup.value:.2f}" + (" =" if line.side == measured.reference else ""),
            f"{speedup.low:.2f}-{speedup.high:.2f}",
            f"{line.flops / 1e9:.0f}",
            "-" if line.share is None else f"{line.share:.0%}",
            "-" if line.peak is None else f"{line.peak / 2**20:,.0f}",
        )
    return shown


def title(what: Mapping[str, Any]) -> str:
    return f"{what['model']}, batch {what['batch']}, {what['size']} px, {what['threads']} threads"


def spoken(verb: str, settings: Any) -> str:
    """The command that says the same: every flag that differs from its default, without paths of this machine."""
    words = ["vitrail", *verb.split()]
    for each in fields(settings):
        value, default = getattr(settings, each.name), each.default
        if value == default or each.name in QUIET or is_dataclass(value):
            continue
        flag = f"--{each.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            parts = value if isinstance(value, tuple) else (value,)
            words += [flag, *(called(part) if isinstance(part, str) else str(part) for part in parts)]
    return shlex.join(words)


def stamped(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, with when, where and at which commit."""
    return {"name": name, "date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine(), **found}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another place.") from error


def _interval(times: list[float], draws: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    drawn = np.random.default_rng(0).choice(np.array(times), (draws, len(times)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)
