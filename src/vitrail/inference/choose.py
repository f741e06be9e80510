"""`--engine auto`: the engines that are there, measured once for this model, batch and machine, and remembered.

Unusual: on a CPU torch.compile is no candidate, and ONNX Runtime only where OpenVINO is not installed. Each takes longer to
set up than all measurements together; ask for them by name. docs/speed.md has what they reach.
"""

import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from rich.console import Console
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.runs import write_json
from vitrail.core.values import from_json, to_json
from vitrail.inference.agreement import compare, sample_pictures
from vitrail.inference.engines import COMPARED, PACKAGES, Engine, build, installed
from vitrail.inference.features import Model, merging
from vitrail.inference.graphs import Asked, asked, openvino_core
from vitrail.inference.openvino import FORMAT, EnginePrecision, Setup, package_version

ROUNDS = 7
SECONDS = 2.0
"""The most that is spent on a candidate's rounds, and no fewer than 3 of them."""
SAVED = 0.25
"""Of eager PyTorch's time, what the fastest engine saves at least (docs/speed.md: in fp32 it is 1.3 times as fast)."""
SETTING_UP, COMPILING = 8.0, 60.0
"""Seconds until the candidates are ready: OpenVINO's on a CPU, torch.compile's elsewhere."""
MEASURED = 10
"""Batches that the candidates look at altogether, where a batch takes a second or more."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    speeds: pictures a second of each candidate, by what it is called; the fastest was chosen. rejected: candidates that
    could not be set up, or gave other answers, with the reason. remembered: whether it was measured earlier.
    """

    engine: Engine
    setup: Setup
    speeds: dict[str, float]
    rejected: dict[str, str]
    remembered: bool

    @property
    def said(self) -> str:
        """One sentence for people."""
        others = ", ".join(f"{name} {speed:.3g}" for name, speed in self.speeds.items() if name != self.setup.said)
        when = "measured earlier" if self.remembered else "just measured"
        beside = f" (pictures/s, {when}; {others})" if others else f" (pictures/s, {when})"
        return f"Engine: {self.setup.said}, {self.speeds[self.setup.said]:.3g}{beside}."


def choose(
    model: Model | Asked,
    precision: EnginePrecision,
    *,
    batch: int,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    threads: int = 0,
    quantised: Any = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Choice:
    """The fastest engine whose answers are the model's. Arguments as of `engine`; cache: None remembers nothing.

    Raises UserError where no engine has the precision.
    """
    whole, device = asked(model), torch.device(device)
    size = size or whole.preprocess.size
    number = threads or torch.get_num_threads()
    pixels = sample_pictures(whole.preprocess, max(1, min(batch, 8)), size)
    tried = Trial(whole, pixels, batch, size, device, number, quantised, cache, progress)
    record = record_of(whole, precision, batch, size, device, number, cache)
    known = recall(record)
    if known is not None:
        made, reason = tried.made(known[0])
        if made is not None:
            return Choice(made, *known, {}, True)
        print(f"The remembered engine is measured anew: {reason}", file=sys.stderr, flush=True)
    setups = candidates(precision, batch, number, device)
    if not setups:
        raise UserError(
            f'{precision} is OpenVINO\'s, on the CPU: give --device cpu, and pip install "vitrail[export]" where it is '
            "missing; or give another precision."
        )
    speeds, rejected, engines = tried.measure(setups)
    if not speeds:
        raise UserError(f"no engine has {precision} here ({'; '.join(rejected.values())}); give another precision.")
    setup = max(speeds, key=speeds.__getitem__)
    said = {one.said: speed for one, speed in speeds.items()}
    if record is not None:
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, {"setup": to_json(setup), "speeds": said})
        except (OSError, UserError) as error:
            print(f"The choice of an engine is not remembered: {error}", file=sys.stderr, flush=True)
    return Choice(engines[setup], setup, said, rejected, False)


def pays(
    model: Model | Asked,
    precision: EnginePrecision,
    *,
    pictures: int | None,
    batch: int,
    device: torch.device,
    cache: Path,
) -> bool:
    """Whether so many pictures are worth a choice that nobody asked for: it is remembered, or saves more than it takes.

    pictures: None where nobody knows, as if they were many. A few are timed eagerly to tell, and only where there are
    enough of them that it can pay at all.
    """
    whole, threads = asked(model), torch.get_num_threads()
    size = whole.preprocess.size
    if pictures is None or recall(record_of(whole, precision, batch, size, device, threads, cache)) is not None:
        return True
    saved = SAVED * pictures - MEASURED * batch
    if saved <= 0 or len(candidates(precision, batch, threads, device)) < 2:
        return False
    count = min(batch, 8) if device.type == "cpu" else batch  # a GPU takes as long for a few
    pixels = sample_pictures(whole.preprocess, min(count, 8))[torch.arange(count) % min(count, 8)]
    eager = build(whole, Setup("eager", precision), batch=batch, size=None, device=device, threads=0)
    eager(pixels[:1])  # what is set up on first use is not timed
    begun = time.perf_counter()
    eager(pixels)
    each = (time.perf_counter() - begun) / count
    return saved * each > (SETTING_UP if device.type == "cpu" else COMPILING)


def candidates(precision: EnginePrecision, batch: int, threads: int, device: torch.device) -> list[Setup]:
    """What is worth measuring, the likely winner first: the others are given up early beside it."""
    if device.type != "cpu":
        return [Setup(name, precision) for name in ("compile", "eager")] if precision != "int8" else []
    found = []
    if installed("openvino"):
        # With as many streams as threads none waits for another; fewer pictures than threads leave some idle.
        streams = [min(batch, threads)] + [1] * (threads > 1 and batch < 2 * threads)
        precisions = [precision, *(["bf16"] if precision == "int8" else [])]
        if precision == "bf16" and not has_bf16():
            precisions.append("fp32")  # more exact, and faster where bf16 is imitated
        for one in precisions:
            found += [Setup("openvino", one, count) for count in dict.fromkeys(streams)]  # type: ignore[arg-type]
    elif precision != "int8":
        found += [Setup("onnx", "fp32")] if installed("onnx") else []
    return found + ([Setup("eager", precision)] if precision != "int8" else [])


def has_bf16() -> bool:
    """Whether the processor multiplies matrices in bf16."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@dataclass(frozen=True)
class Trial:
    """What all candidates are set up and measured with. pixels: real ones, to compare on."""

    model: Asked
    pixels: UInt8[Tensor, "b c h w"]
    batch: int
    size: tuple[int, int]
    device: torch.device
    threads: int
    quantised: Any
    cache: Path | None
    progress: bool

    def made(self, setup: Setup) -> tuple[Engine | None, str]:
        """The engine, if it can be had and its answers are the model's; else why not, in one sentence."""
        try:
            engine = build(
                self.model,
                setup,
                batch=self.batch,
                size=self.size,
                device=self.device,
                threads=self.threads,
                quantised=self.quantised,
                cache=self.cache,
            )
            found = compare(self.model, engine, self.pixels[:COMPARED], setup.precision, str(self.device))
        except UserError as error:
            return None, str(error)
        except Exception as error:  # any runtime's own kinds: a candidate that cannot be had is none, and it is said
            # OpenVINO gives the place in its sources first and the reason in the last line.
            said = " ".join(str(error).split())
            return None, f"{setup.said} cannot be set up ({type(error).__name__}: {said[:500]})."
        return (
            (engine, "") if found.passed else (None, f"{setup.said} gives other answers than the model ({found.said}).")
        )

    def measure(self, setups: Sequence[Setup]) -> tuple[dict[Setup, float], dict[str, str], dict[Setup, Engine]]:
        """Pictures a second of each; those rejected, and why; the engines. In turns, so that all see the same machine."""
        images = self.pixels[torch.arange(self.batch) % self.pixels.shape[0]]
        engines: dict[Setup, Engine] = {}
        rejected: dict[str, str] = {}
        console = Console(stderr=True, quiet=not self.progress)
        with console.status("choosing an engine") as status:
            for setup in setups:
                status.update(f"choosing an engine: setting up {setup.said}")
                engine, reason = self.made(setup)
                if engine is None:
                    rejected[setup.said] = reason
                    print(f"left out: {reason}", file=sys.stderr, flush=True)
                    continue
                engines[setup] = engine
                engine(images)
            times: dict[Setup, list[float]] = {setup: [] for setup in engines}
            for turn in range(ROUNDS):
                for setup, engine in engines.items():
                    spent = times[setup]
                    best = min((min(other) for other in times.values() if other), default=0)
                    if turn and (min(spent) > 2 * best or (turn >= 3 and sum(spent) > SECONDS)):
                        continue
                    status.update(f"choosing an engine: measuring {setup.said}")
                    start = time.perf_counter()
                    engine(images)
                    spent.append(time.perf_counter() - start)
        return {setup: self.batch / statistics.median(spent) for setup, spent in times.items()}, rejected, engines


def record_of(
    model: Asked,
    precision: str,
    batch: int,
    size: tuple[int, int],
    device: torch.device,
    threads: int,
    cache: Path | None,
) -> Path | None:
    """The file of a choice that is remembered; None where nothing is."""
    return None if cache is None else cache / "choices" / f"{key(model, precision, batch, size, device, threads)}.json"


def key(model: Asked, precision: str, batch: int, size: tuple[int, int], device: torch.device, threads: int) -> str:
    """What a choice is remembered under: the model's shape, not its weights; hex digits."""
    versions = [torch.__version__, *(package_version(PACKAGES[name]) for name in ("openvino", "onnx"))]
    shape = [type(model.model).__name__, to_json(model.model.config), merging(model.model), model.reading]
    place = [str(device), processor(device), threads]
    parts = [FORMAT, shape, precision, batch, list(size), place, versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "; ".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    except OSError:
        return platform.processor() or platform.machine()


def recall(record: Path | None) -> tuple[Setup, dict[str, float]] | None:
    """What was remembered; None where there is nothing that can be read."""
    try:
        known = {} if record is None else json.loads(record.read_text(encoding="utf-8"))
        setup, speeds = from_json(Setup, known["setup"]), from_json(dict[str, float], known["speeds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (setup, speeds) if setup.said in speeds else None
