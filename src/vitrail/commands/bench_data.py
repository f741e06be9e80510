"""`vitrail bench data`: how many training pictures one core prepares, beside the pipeline most people write.

Unusual: both sides take the same crops of the same pictures in turns, block by block, and are timed by the processor
time they use, so that other programs on the machine disturb the ratio little. Ours ends at uint8 pixels, because
normalising is the device's work here (`Preprocess.normalize`); the plain pipeline ends at normalised floats, because
that is what it hands on.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 16


@dataclass(frozen=True)
class Settings:
    data: str
    """Pictures: a folder, CSV, parquet or anything else that --data of train takes."""

    size: int = 224
    """Side of the square that the model is given, in pixels."""

    seconds: float = 10.0
    """How long to measure."""

    pictures: int = 256
    """How many pictures to take, at random; they are read once before the clock starts, so the disk is not measured."""

    json: bool = False
    """Print JSON instead of sentences."""


def run(settings: Settings) -> int:
    """Measures pictures per core-second of both pipelines and prints them with their ratio; returns the exit code."""
    import torch

    from vitrail.core.errors import UserError
    from vitrail.core.types import Preprocess
    from vitrail.data.decode import UnreadablePicture
    from vitrail.data.splits import open_data
    from vitrail.data.transforms import Transform

    if min(settings.size, settings.pictures) < 1 or settings.seconds <= 0:
        raise UserError("--size, --pictures and --seconds must be above 0.")
    source = open_data(settings.data, validation=0.0).train
    transform = Transform(Preprocess((settings.size, settings.size)), "inception")
    chosen = np.random.default_rng(0).permutation(len(source))[: settings.pictures]
    samples, unreadable = [], 0
    for sample in (source[int(index)] for index in chosen):
        try:
            transform(sample.picture, np.random.default_rng(0), sample.name)
            samples.append(sample)
        except UnreadablePicture:
            unreadable += 1
    if not samples:
        raise UserError(f"--data {settings.data}: none of the {len(chosen)} pictures tried can be read.")

    def ours(number: int) -> Any:
        sample = samples[number % len(samples)]
        return transform(sample.picture, np.random.default_rng(number), sample.name)

    def plain(number: int) -> Any:
        return plain_pipeline(samples[number % len(samples)].picture, transform, np.random.default_rng(number))

    plain(0)  # what is imported on first use is not measured
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data worker
    times: list[tuple[float, float]] = []
    end = time.monotonic() + settings.seconds
    while time.monotonic() < end or len(times) < 2:
        first = len(times) * BLOCK
        if len(times) % 2:
            slow = block(plain, first)
            times.append((block(ours, first), slow))
        else:
            times.append((block(ours, first), block(plain, first)))
    torch.set_num_threads(threads)
    result = summary(np.array(times))
    shown = {"data": settings.data, "size": settings.size, "pictures": len(samples), "unreadable": unreadable, **result}
    if settings.json:
        print(json.dumps(shown, indent=2))
        return 0
    print(
        f"Inception crops to {settings.size} pixels, pictures per core-second, medians of {result['blocks']} blocks of "
        f"{BLOCK}:\n  Vitrail       {result['ours']:8.1f}   (uint8, normalised later on the device)\n"
        f"  plain Pillow  {result['plain']:8.1f}   (open, convert, crop, resize, normalise)\n"
        f"  ratio         {result['ratio']:8.2f}   (95 % interval {result['low']:.2f} to {result['high']:.2f})"
    )
    if unreadable:
        print(f"{unreadable} of {len(chosen)} pictures cannot be read and were left out.")
    return 0


def plain_pipeline(picture: Any, transform: Any, rng: np.random.Generator) -> Any:
    """Open, convert, crop, resize, scale, normalise: the calls of Pillow and torch that torchvision's loader,
    RandomResizedCrop, ToTensor and Normalize come down to. The crop is the one that `transform` would draw."""
    import torch
    from PIL import Image

    if isinstance(picture, np.ndarray):
        image: Image.Image = Image.fromarray(picture)
    else:
        image = Image.open(picture if isinstance(picture, Path) else BytesIO(picture))
    image = image.convert("RGB")
    box = transform._inception_crop((image.height, image.width), rng)
    height, width = transform.preprocess.size
    small = image.crop(box).resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous().float().div(255)
    mean, deviation = (torch.tensor(each).view(-1, 1, 1) for each in ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    return pixels.sub_(mean).div_(deviation)


def block(pipeline: Callable[[int], Any], first: int) -> float:
    """Processor seconds of this process for the next `BLOCK` pictures."""
    start = time.process_time()
    for number in range(first, first + BLOCK):
        pipeline(number)
    return max(time.process_time() - start, 1e-9)


def summary(times: np.ndarray) -> dict[str, float | int]:
    """times: (blocks, 2) seconds, ours and plain. Medians, and the ratio of the pipelines' whole times with its 95 %
    interval by bootstrap over blocks, whose two halves saw the same pictures."""
    ours, plain = BLOCK / np.median(times, axis=0)
    drawn = np.random.default_rng(0).integers(len(times), size=(2000, len(times)))
    again = times[drawn].sum(axis=1)
    low, high = np.quantile(again[:, 1] / again[:, 0], [0.025, 0.975])
    ratio = times[:, 1].sum() / times[:, 0].sum()
    rates = {"ours": float(ours), "plain": float(plain), "ratio": float(ratio), "low": float(low), "high": float(high)}
    return {"blocks": len(times), **rates}
