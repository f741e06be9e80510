"""Whether decoding and model keep each other busy: `python bench/streaming.py --photos FOLDER`, 10 minutes.

Taken in turns, on the same pictures: the decoding workers alone, the model alone on pixels in memory, and both as in
`vitrail predict --out`, from the start of the workers to the last line of the file (what starting costs else, bench/start.py
measures). Flags such as --engine and --precision are predict's. The claim is that the stream takes at most 1.1 times the
slower of the two alone. Where both compute on the same cores nothing can be below the processor time of both together,
shared out over the cores; that floor is recorded, and the share of it that is reached. --variants tries other splits.

Then its memory: the peak of `vitrail predict` with 1,000 and with 10,000 pictures, workers and all, each page counted
once. The claim is at most 2 % more. What a batch takes comes and goes, by 70 MiB, so that the longer one looks the higher
the highest sample: peaks are of as long a time on both sides, the median of the longer run's last three tenths (where what
grows has grown) beside the median of three shorter runs. Exit code 1 if a claim fails. Pictures are links to copies of the
ones in FOLDER.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch
from loader_memory import proportional_memory

import vitrail
from vitrail.benchmark.alternation import alternate, ratio
from vitrail.commands.predict import Pictures, Settings, find
from vitrail.commands.reading import Checkpoint
from vitrail.core.device import cores
from vitrail.core.types import Batch
from vitrail.data.folders import walk
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.transforms import Transform
from vitrail.inference import stream as streaming
from vitrail.inference.answers import kind_of
from vitrail.inference.predict import predict

MOST, MOST_MEMORY, SHORT_RUNS = 1.1, 1.02, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--model", default="ViT-B/16", help="by name, with random weights")
    parser.add_argument("--pictures", type=int, default=320, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--variants", nargs="*", default=[], help="as workers=1,niceness=0,batch=32 (all, or some)")
    parser.add_argument("--memory", type=int, nargs="*", default=[1_000, 10_000], help="pictures; none: not measured")
    parser.add_argument("--memory-model", default="ViT-Ti/32")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings, flags = parser.parse_known_args()
    found: dict[str, object] = {"settings": {k: v for k, v in vars(settings).items() if k not in ("photos", "out")}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = [settings.photos / picture for picture in walk(settings.photos, settings.photos).names]
        held = True
        if settings.rounds:
            found["busy"], held = busy(settings, flags, folder, photos)
        if settings.memory:
            found["memory"], flat = peaks(settings, folder, photos)
            held &= flat
    what = "streaming" if settings.rounds else "streaming_memory"
    measure.write(what, {"at_most": MOST, "at_most_memory": MOST_MEMORY, "flags": flags, **found}, settings.out)
    return int(not held)


def busy(settings: argparse.Namespace, flags: list[str], folder: Path, photos: list[Path]) -> tuple[dict, bool]:
    from vitrail.commands.flags import parse

    place = copies(folder / "pictures", photos, settings.pictures)
    vitrail.save(vitrail.create(settings.model, classes=1000, seed=0), folder / "model")
    checkpoint = parse(Checkpoint, flags, "predict")
    model = checkpoint.classifier(folder / "model")
    engine = checkpoint.asking(model, batch=settings.batch, pictures=settings.pictures)
    source, order = (
        Pictures(find([str(place)])[0]),
        Order(settings.pictures, settings.batch, settings.pictures, shuffle=False),
    )
    height, width = model.preprocess.size
    pixels = torch.randint(0, 256, (settings.batch, model.preprocess.channels, height, width), dtype=torch.uint8)
    batch = Batch((pixels,), None, torch.ones(len(pixels), dtype=torch.bool), torch.arange(len(pixels)))
    processor: dict[str, list[float]] = {}

    def counted(name: str, work: Callable[[], object]) -> Callable[[], None]:
        def side() -> None:
            before = sum(os.times()[:4])
            work()
            processor.setdefault(name, []).append(sum(os.times()[:4]) - before)

        return side

    def decoding() -> None:
        workers = streaming.decoders(settings.pictures, settings.batch)
        loader = PictureLoader(source, Transform(model.preprocess), order, workers, ahead=streaming.AHEAD)
        assert sum(int(batch.valid.sum()) for batch in loader) == settings.pictures

    def looking() -> None:
        asked = {"device": checkpoint.on(), "precision": "fp32" if engine else checkpoint.autocast, "of": engine}
        assert len(list(predict(model, [batch] * order.steps, **asked))) == order.steps

    def both(size: int = settings.batch, workers: int = -1, niceness: int = streaming.NICENESS) -> None:
        before, streaming.NICENESS = streaming.NICENESS, niceness
        target = folder / "answers.jsonl"
        target.unlink(missing_ok=True)
        with kind_of(target)(target, {"top": 5, "model": ""}, [sample.name for sample in source.samples]) as out:
            for answers in streaming.stream(
                *(model, source, model.preprocess, [str(number) for number in range(1000)]),
                device=checkpoint.on(),
                precision="fp32" if engine else checkpoint.autocast,
                of=engine,
                batch=size,
                workers=workers,
            ):
                out.add(answers)
        assert (out.done, out.lost) == (settings.pictures, 0)
        streaming.NICENESS = before

    sides = {"decoding": decoding, "model": looking, "both": both}
    for variant in settings.variants:
        given = {key: int(value) for key, value in (part.split("=") for part in variant.split(","))}
        given["size"] = given.pop("batch", settings.batch)
        sides[variant] = lambda given=given: both(**given)
    seconds = alternate({name: counted(name, side) for name, side in sides.items()}, rounds=settings.rounds, shortest=0)
    used = {name: float(np.median(of[-settings.rounds :])) for name, of in processor.items()}
    slower = max(("decoding", "model"), key=lambda name: np.median(seconds[name]))
    floor = max(float(np.median(seconds[slower])), (used["decoding"] + used["model"]) / cores())
    entry: dict[str, object] = {"seconds": seconds, "processor_seconds": used}
    entry |= {"slower_alone": slower, "floor_seconds": floor, "cores": cores()}
    for name in sides.keys() - {"decoding", "model"}:
        mine = seconds[name]
        against = ratio(mine, seconds[slower])
        entry[name] = {
            "pictures_a_second": settings.pictures / float(np.median(mine)),
            "against_the_slower": vars(against),
            "of_the_floor": floor / float(np.median(mine)),
        }
        print(f"{name}: {entry[name]}; {slower} alone is slower; at most {MOST}")
    return entry, entry["both"]["against_the_slower"]["low"] <= MOST  # type: ignore[index]


def peaks(settings: argparse.Namespace, folder: Path, photos: list[Path]) -> tuple[dict, bool]:
    vitrail.save(vitrail.create(settings.memory_model, classes=1000, seed=0), folder / "light")
    shortest, found = min(settings.memory), {}
    for count in settings.memory:
        place = copies(folder / f"pictures-{count}", photos, count)
        parts, begun = round(count / shortest), time.perf_counter()
        runs = [sampled(folder / "light", place, count) for _ in range(SHORT_RUNS if parts == 1 else 1)]
        highest = [float(part.max()) / 2**20 for run in runs for part in np.array_split(run, parts)]
        seconds = (time.perf_counter() - begun) / len(runs)
        found[str(count)] = {
            "peak_mib": float(np.median(highest[-SHORT_RUNS:])),
            "peaks_mib": highest,
            "seconds": seconds,
        }
        print(f"{count:,} pictures: {found[str(count)]}", flush=True)
        shutil.rmtree(place)
    first, last = (found[str(count)]["peak_mib"] for count in (shortest, max(settings.memory)))
    return {**found, "growth": last / first}, last / first <= MOST_MEMORY


def sampled(model: Path, pictures: Path, count: int) -> np.ndarray:
    """Bytes at each moment of one run, from the first answer on: starting takes as long for few pictures as for many."""
    out = pictures.with_suffix(".jsonl")
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "vitrail", "predict", str(model), str(pictures), "--out", str(out)]
    command += ["--engine", "eager"]  # else the longer one would measure engines first, and take another
    process, samples = subprocess.Popen(command, stderr=subprocess.DEVNULL), []
    while process.poll() is None:
        if out.exists():
            samples.append(proportional_memory(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, process.returncode
    with out.open() as lines:
        assert sum(1 for _ in lines) == count
    return np.array(samples)


def copies(folder: Path, photos: list[Path], count: int) -> Path:
    """`count` pictures: each photograph once, and as many further names of it as are needed."""
    folder.mkdir()
    for number in range(count):
        place = folder / f"{number:06d}{photos[0].suffix}"
        if number < len(photos):
            shutil.copyfile(photos[number], place)
        else:
            place.hardlink_to(folder / f"{number % len(photos):06d}{photos[0].suffix}")
    return folder


if __name__ == "__main__":
    sys.exit(main())
