"""`vitrail bench data`: how many training pictures a core prepares, beside the pipelines of torchvision's and timm's users.

Unusual: all sides take crops of the same pictures in turns, and are timed by the processor time that they use, so that other
programs disturb the ratios little; once in this process, where the crops are the same too, and once through a data worker,
as trainings have it (benchmark/crops.py). Theirs are their own steps, done with Pillow and torch (benchmark/pipelines.py),
and with --against their own transforms too:

- torchvision: open, RGB, crop and resize (bilinear, its RandomResizedCrop's default), flip, ToTensor, Normalize, and a
  float batch by default_collate.
- timm: the same with bicubic, to uint8 and its fast_collate, as its `create_loader` has it; it normalises on the device.

Ours ends, with the filter of the side it is compared with, at a uint8 batch, flipped, to be normalised on the device.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.core.device import Precision


@dataclass(frozen=True)
class Settings:
    data: str
    """Pictures: a folder, CSV, parquet or anything else that --data of train takes."""

    packed: str = ""
    """What vitrail pack made of the same pictures, to be measured beside them."""

    model: str = ""
    """A model by name, such as ViT-S/16: measure its training step too, and say whether input holds it up."""

    size: int = 224
    """Side of the square that the model is given, in pixels."""

    seconds: float = 10.0
    """How long to measure each part."""

    against: str = ""
    """Libraries whose own transforms are measured too, beside what is rebuilt of them: torchvision,timm or one of these."""

    pictures: int = 256
    """How many pictures to take, at random; they are read once before the clock starts, so the disk is not measured."""

    batch: int = 32
    """Pictures in a batch of data workers and, with --model, of a training step."""

    workers: int | None = None
    """Processes that prepare pictures beside the training, with --model; one a core when not given."""

    precision: Precision = "bf16"
    """Of the training step, with --model."""

    device: str | None = None
    """Where the model trains, with --model; the fastest there is when not given."""

    threads: int = 0
    """Processor cores that are used, with --model; 0: all there are. Without it one core is."""

    json: Path | None = None
    """Write everything into this file."""

    plot: Path | None = None
    """Draw the sides into this PNG or SVG file."""


def run(settings: Settings) -> int:
    """Measures pictures per core-second of these pipelines and prints them with their ratios; returns the exit code."""
    from importlib.metadata import version

    from vitrail.benchmark import crops, record
    from vitrail.benchmark.machine import Others, pinned
    from vitrail.benchmark.peers import wanted
    from vitrail.benchmark.pipelines import LIBRARIES
    from vitrail.core.errors import UserError
    from vitrail.data.sources import subset
    from vitrail.data.splits import open_data
    from vitrail.weights import zoo

    if min(settings.size, settings.pictures, settings.batch) < 1 or settings.seconds <= 0:
        raise UserError("--size, --pictures, --batch and --seconds must be above 0.")
    if settings.workers is not None and settings.workers < 0:
        raise UserError(f"--workers is {settings.workers}: give 0 for none, or more.")
    if settings.model:
        zoo.config(settings.model)  # which says so now, and not after the crops were measured, where it knows none
    against = wanted(settings.against, tuple(LIBRARIES))
    source = open_data(settings.data, validation=0.0).train
    packed = open_data(settings.packed, validation=0.0).train if settings.packed else None
    chosen, unreadable = readable(source, packed, settings)
    if not len(chosen):
        raise UserError(f"--data {settings.data}: none of the {unreadable} pictures tried can be read.")
    kept = (subset(source, chosen), None if packed is None else subset(packed, chosen))
    measured = crops.Measured(*kept, settings.size, against, settings.batch)
    with pinned(settings.threads) as threads:
        others = Others()
        with pinned(1):  # as in a data worker
            times = measure(measured.here(), settings.seconds)
            forks = sys.platform == "linux"
            sent = measure(measured.through_a_worker(), settings.seconds) if forks else None
        result: dict[str, Any] = {
            **{"data": record.called(settings.data), "size": settings.size, "threads": threads},
            **{"pictures": len(chosen), "unreadable": unreadable},
            **({"libraries": {library: version(library) for library in against}} if against else {}),
            **summary(times, crops.BLOCK),
        }
        if sent is not None:
            result["through a worker"] = summary(sent, measured.turn * settings.batch)
        if settings.model:
            result["training"] = training(source, settings, "vitrail bilinear", result["rates"])
            if packed is not None:
                result["training, packed"] = training(packed, settings, "packed bilinear", result["rates"])
        result["machine_use"] = others.result()
    print("\n".join(sentences(result)))
    if settings.json is not None:
        spoken = record.spoken("bench data", settings)
        record.write(settings.json, record.stamped("bench_data", {"command": spoken, "runs": [result]}))
    if settings.plot is not None:
        from vitrail.analysis.figures import save
        from vitrail.analysis.figures_speed import speeds

        save(speeds([drawn(times, settings.size)]), settings.plot)
    return 0


def readable(source: Any, packed: Any, settings: Settings) -> tuple[np.ndarray, int]:
    """Places of pictures to measure, each read once; and how many could not be. Raises UserError where the packed
    pictures are others."""
    from vitrail.core.errors import UserError
    from vitrail.data.decode import UnreadablePicture, decode
    from vitrail.data.sources import key

    chosen = np.random.default_rng(0).permutation(len(source))[: settings.pictures]
    if packed is not None and (
        len(packed) != len(source) or any(key(packed, int(at)) != key(source, int(at)) for at in chosen)
    ):
        raise UserError(
            f"--packed {settings.packed} holds other pictures than --data {settings.data}: give what vitrail pack made of "
            "these."
        )
    kept = []
    for at in chosen.tolist():
        try:
            for each in (source, packed):
                if each is not None:
                    decode(each[at].picture, 3)
            kept.append(at)
        except UnreadablePicture:
            continue
    return np.array(kept, np.int64), len(chosen) - len(kept)


def measure(found: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, np.ndarray]:
    """Processor seconds for each turn of each side, its data worker's among them; the order turns round every time."""
    from vitrail.benchmark.crops import Worker

    times: dict[str, list[float]] = {name: [] for name in found}
    for side in found.values():
        side(0)  # what is imported on first use is not measured
    workers = {name: side for name, side in found.items() if isinstance(side, Worker)}
    used = {name: worker.rested() for name, worker in workers.items()}
    gc.freeze()  # as a data worker does
    try:
        names, number, end = list(found), 0, time.monotonic() + seconds
        while time.monotonic() < end or number < 2:
            for name in names:
                begun = time.process_time()
                found[name](number)
                taken = time.process_time() - begun
                if name in workers:
                    before, used[name] = used[name], workers[name].rested()
                    taken += used[name] - before
                times[name].append(max(taken, 1e-9))
            names, number = names[::-1], number + 1
    finally:
        gc.unfreeze()
    return {name: np.array(taken) for name, taken in times.items()}


def summary(times: dict[str, np.ndarray], pictures: int) -> dict[str, Any]:
    """pictures: of a turn. rates: pictures per core-second of each side, from medians. ratios: how many times faster ours
    is than each library with the same filter, from the whole times, with a 95 % interval by bootstrap over the turns, in
    each of which every side had its own."""
    from vitrail.benchmark.pipelines import LIBRARIES

    ratios = {
        f"{name} against {theirs}": speedup(times[theirs], times[name])
        for library, interpolation in LIBRARIES.items()
        for theirs in (library, f"{library} itself")
        for name in (f"vitrail {interpolation}", f"packed {interpolation}")
        if name in times and theirs in times
    }
    rates = {name: float(pictures / np.median(taken)) for name, taken in times.items()}
    return {"turns": len(next(iter(times.values()))), "rates": rates, "ratios": ratios}


def speedup(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """How many times faster the second is, with its interval."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    low, high = np.quantile(theirs[drawn].sum(axis=1) / ours[drawn].sum(axis=1), [0.025, 0.975]).tolist()
    return {"value": float(theirs.sum() / ours.sum()), "low": low, "high": high}


def drawn(times: dict[str, np.ndarray], size: int) -> dict[str, Any]:
    """All sides beside the first library, as `figures_speed.speeds` takes a run."""
    from vitrail.benchmark.crops import BLOCK
    from vitrail.benchmark.pipelines import LIBRARIES

    reference = next(iter(LIBRARIES))
    lines = [
        {
            "side": f"vitrail {name}" if name.startswith("packed") else name,
            "rate": float(BLOCK / np.median(taken)),
            "speedup": speedup(times[reference], taken),
        }
        for name, taken in times.items()
    ]
    what = {"model": "Inception crops by one core", "batch": BLOCK, "size": size}
    return {"what": what, "reference": reference, "lines": lines}


def training(source: Any, settings: Settings, side: str, rates: dict[str, float]) -> dict[str, Any]:
    """The model's training step and the loader, each alone, in pictures a second; and what input costs the training.

    waits: the share of its time that a training would wait for pictures, in [0, 1). Where it trains on the processor, the
    cores that prepare pictures do not train meanwhile: there `waits` is the share of the cores' time that input takes.
    """
    from vitrail.benchmark.machine import waiting
    from vitrail.benchmark.training import batch_of, vitrail_step
    from vitrail.core.device import cores, pick_device
    from vitrail.weights import zoo

    device, batch = pick_device(settings.device), settings.batch
    model = zoo.create(settings.model, classes=max(2, len(source.classes)), image=(settings.size, settings.size)).to(
        device
    )
    made = batch_of(model.preprocess, batch, model.config.classes)
    step, finish = vitrail_step(model, made, device, settings.precision), waiting(device)
    taken: list[float] = []
    end = time.monotonic() + settings.seconds
    for _ in range(2):
        step()  # the first allocates the optimiser's state
    finish()
    while time.monotonic() < end or len(taken) < 3:
        begun = time.perf_counter()
        step()
        finish()
        taken.append(time.perf_counter() - begun)
    steps, workers = batch / float(np.median(taken)), cores() if settings.workers is None else settings.workers
    fed = loader_rate(source, settings, workers, rates[side])
    shared = device.type == "cpu"
    waits = 1 / (1 + cores() * rates[side] / steps) if shared else max(0.0, 1 - fed / steps)
    return {
        **{"model": settings.model, "device": device.type, "precision": settings.precision, "batch": batch},
        **{"step": steps, "input": fed, "workers": workers, "bound": bool(fed < steps), "waits": float(waits)},
    }


def loader_rate(source: Any, settings: Settings, workers: int, rate: float) -> float:
    """Pictures a second that the training loop's loader hands over, with nothing else to do.

    rate: about what a core prepares, for a stream that lasts as long as asked; it is read to its end.
    """
    from vitrail.core.device import cores
    from vitrail.core.types import Preprocess
    from vitrail.data.loader import Order, PictureLoader
    from vitrail.data.transforms import Transform

    first = 2 * max(1, workers)
    count = max(4, round(settings.seconds * rate * min(max(1, workers), cores()) / settings.batch))
    transform = Transform(Preprocess((settings.size, settings.size)), "inception")
    order = Order(len(source), settings.batch, (first + count) * settings.batch, 0)
    begun = 0.0
    for number, _ in enumerate(PictureLoader(source, transform, order, workers), 1):
        if number == first:  # the workers have started, and filled their queues
            begun = time.perf_counter()
    return count * settings.batch / (time.perf_counter() - begun)


def sentences(result: dict[str, Any]) -> list[str]:
    """What a person is told."""
    said = _crops(f"Inception crops to {result['size']} pixels", result)
    if "through a worker" in result:
        said += _crops("The same through a data worker, with what sending them costs", result["through a worker"])
    said += [_bound(kind, result[kind]) for kind in ("training", "training, packed") if kind in result]
    if result["unreadable"]:
        said.append(f"{result['unreadable']} pictures cannot be read and were left out.")
    from vitrail.benchmark.machine import Others

    if disturbed := Others.sentence(result["machine_use"]):
        said.append(disturbed)
    return said


def _crops(what: str, found: dict[str, Any]) -> list[str]:
    said = [f"{what}, pictures per core-second, medians of {found['turns']} turns:"]
    said += [f"  {name:18} {rate:8.1f}" for name, rate in found["rates"].items()]
    return said + [
        f"{name}: {ratio['value']:.2f} times as fast (95 % interval {ratio['low']:.2f} to {ratio['high']:.2f})"
        for name, ratio in found["ratios"].items()
    ]


def _bound(kind: str, found: dict[str, Any]) -> str:
    origin = "packed pictures" if kind.endswith("packed") else "these pictures"
    against = (
        f"{found['workers']} workers give {found['input']:.0f} pictures a second, a step takes {found['step']:.0f}"
    )
    if found["device"] == "cpu":
        verdict = "is bound by input" if found["bound"] else "is not bound by input"
        cost = f"; on the same cores, preparing them takes {found['waits']:.1%} of the time"
    elif found["bound"]:
        verdict, cost = "is bound by input", f": it would wait for {found['waits']:.0%} of its time"
    else:
        verdict, cost = (
            "is not bound by input",
            f": there are {found['input'] / found['step']:.1f} times as many as it takes",
        )
    return f"Training {found['model']} on {origin} {verdict}{cost} ({against})."
