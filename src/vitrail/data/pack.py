"""Pictures made as small as training needs them, once, into a folder that is read without decoding (data/shards.py).

Unusual: a picture whose shorter side is at most the asked one is stored as it is, pixel for pixel. A larger one is
resized once, bicubic, and its own size is written beside it: crops are drawn as of the whole picture, so that the same
(seed, epoch, picture) gives the same crop from the files and from the pack, to the nearest pixel of what is stored.

Measured on 80 photographs (median 500 x 375) packed at 256, in levels of 255, mean over the pictures with the worst in
brackets: training crops to 224 differ from those of the files by 4.1 (15), whatever the filter (Lanczos 4.1, bilinear
4.4, box 4.6), for a crop of a tenth of the picture has fewer pixels to be enlarged from; evaluation crops to 224 after a
bilinear resize to 256 by 1.5 (4.0), squeezed to 224 x 224 by 0.9 (3.2). A larger size comes nearer.

Each file of a thousand pictures is one process's work, written to the side and renamed. What is whole is kept when the
same command is given again, whatever ended the one before.
"""

import concurrent.futures
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.core.errors import UserError
from vitrail.core.runs import RunFolder, write_json, write_whole
from vitrail.core.types import Picture, Sample, Source
from vitrail.data.decode import UnreadablePicture, opened
from vitrail.data.likeness import equal_pictures
from vitrail.data.shards import FORMAT, HEIGHT, SHARD, description, holds_pack, rows_of, shard
from vitrail.data.sources import Packed, Read, key, sizes

KEPT = 1 << 20
"""Bytes of an unreadable file that are kept, for its complaint."""
LOOKED_AT = 64
Tick = Callable[[], None]


def pack(
    found: Read, origin: str, out: Path, size: int, workers: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Packs all splits of a source; what pack.json then says, with "lost": the unreadable, by split.

    size: the shorter side to keep at least, in pixels. workers: processes; 0 or 1 is this one. progress: is given the
    number of pictures done, the ones that were there already among them. Raises UserError.
    """
    if size < 1:
        raise UserError(f"--size is {size}: give the shorter side to keep, in pixels, such as 256.")
    sources, notes = found
    job = {
        "format": FORMAT,
        "size": size,
        "splits": {
            split: {"count": len(source), "fingerprint": source.fingerprint, "classes": list(source.classes)}
            for split, source in sources.items()
        },
    }
    _refuse_other(out, job)
    lock = RunFolder(out)
    try:
        whole: dict[str, Any] = {**job, "origin": origin, "notes": list(notes), "complete": False, "lost": {}}
        write_json(out / "pack.json", whole)
        _write_tables(sources, out)
        missing = [
            (split, number)
            for split, source in sources.items()
            for number in range(-(-len(source) // SHARD))
            if rows_of(out, split, number) is None
        ]
        done = sum(map(len, sources.values())) - sum(_count(sources[split], number) for split, number in missing)
        progress(done)
        _work(sources, out, size, missing, workers, lambda more: progress(done + more))
        whole["lost"] = {split: lost for split, source in sources.items() if (lost := _lost(source, out, split))}
        count = sum(map(len, sources.values()))
        if sum(map(len, whole["lost"].values())) == count:
            raise UserError(f"{origin}: none of its {count} pictures can be read, so there is nothing to pack.")
        write_json(out / "pack.json", {**whole, "complete": True})
    finally:
        lock.close()
    return {**whole, "complete": True, "bytes": sum(file.stat().st_size for file in out.glob("*.pixels"))}


def estimate(sources: dict[str, Source], size: int) -> int:
    """Bytes that packing will take, from the headers of some pictures."""
    counts = np.cumsum([len(source) for source in sources.values()])
    taken, seen = 0.0, 0
    for drawn in np.random.default_rng(0).permutation(counts[-1])[:LOOKED_AT].tolist():
        number = int(np.searchsorted(counts, drawn, "right"))
        sample = list(sources.values())[number][drawn - (int(counts[number - 1]) if number else 0)]
        try:
            with opened(sample.picture, sample.name) as file:
                height, width = target(file.size, size)
                taken, seen = taken + 3 * height * width, seen + 1
        except UnreadablePicture:
            continue
    return round(taken / max(seen, 1) * int(counts[-1]))


def refuse_if_full(out: Path, needed: int) -> int:
    """Bytes that are free where `out` is to be. Raises UserError where they are fewer than what is still `needed`."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    needed -= sum(file.stat().st_size for file in out.glob("*.pixels")) if out.is_dir() else 0
    if needed > free:
        raise UserError(
            f"{out} would need about {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free there: free some space, "
            "or give a smaller --size or another folder."
        )
    return free


def target(whole: tuple[int, int], size: int) -> tuple[int, int]:
    """The (height, width) that a picture is stored at."""
    short = min(whole)
    if short <= size:
        return whole
    return max(1, round(whole[0] * size / short)), max(1, round(whole[1] * size / short))


def pixels_of(
    picture: Picture, name: str, size: int
) -> tuple[UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"], Any]:
    """What is stored of a picture, grey where it is grey, and its own (height, width). Raises UnreadablePicture."""
    with opened(picture, name) as file:
        wanted = target(file.size, size)
        image, filled = file.pixels(3, wanted if wanted != file.size else None)
        if wanted != file.size:
            image = image.resize(wanted[::-1], Image.Resampling.BICUBIC, box=filled)
    pixels = np.asarray(image)
    first = pixels[..., :1]
    return np.ascontiguousarray(first[..., 0] if (pixels == first).all() else pixels), file.size


def _refuse_other(out: Path, job: dict[str, Any]) -> None:
    if holds_pack(out):
        there = description(out)
        if any(there[part] != job[part] for part in job):
            other = "another --size" if there["splits"] == job["splits"] else "other data, or the data have changed"
            raise UserError(f"{out} holds a pack of {other}: give another folder, or delete it first.")
    elif out.exists() and (not out.is_dir() or any(entry.name != ".lock" for entry in out.iterdir())):
        raise UserError(f"{out} is not empty, and no packed folder: give a folder that does not exist yet.")


def _write_tables(sources: dict[str, Source], out: Path) -> None:
    """Names, labels and sizes of every split; sizes only of what has an equal file, in whichever split."""
    bytes_of = [np.asarray(sizes(source), np.int64) for source in sources.values()]
    places = [(source, index) for source in sources.values() for index in range(len(source))]
    together = np.concatenate(bytes_of)
    equal = equal_pictures(together, lambda at: places[at][0][places[at][1]].picture)
    if equal is not None:
        kept = [at for group in equal for at in group]
        alone = np.ones(len(together), bool)
        alone[kept] = False
        together = np.where(alone, -1, together)
    ends = np.cumsum([len(part) for part in bytes_of])[:-1]
    for (split, source), part in zip(sources.items(), np.split(together, ends), strict=True):
        names = Packed.of(key(source, index).encode(errors="backslashreplace") for index in range(len(source)))
        columns = {
            "names": np.frombuffer(names.data, np.uint8),
            "ends": names.ends,
            "labels": np.asarray(source.labels, np.int64),
            "sizes": part,
        }
        _write_npz(out / f"{split}.npz", **columns)


def _write_npz(path: Path, **columns: np.ndarray) -> None:
    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]

    write_whole(path, write)


def _count(source: Source, number: int) -> int:
    return min(SHARD, len(source) - number * SHARD)


def _work(
    sources: dict[str, Source],
    out: Path,
    size: int,
    missing: list[tuple[str, int]],
    workers: int,
    progress: Callable[[int], None],
) -> None:
    if workers <= 1 or len(missing) <= 1:
        done = iter(range(1, 1 << 62))
        for split, number in missing:
            _write_shard(sources[split], out, split, number, size, lambda: progress(next(done)))
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(missing)), context, initializer=_begin, initargs=(sources, out, size, counter)
    )
    try:
        going = {pool.submit(_continue, split, number) for split, number in missing}
        while going:
            over, going = concurrent.futures.wait(going, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in over:
                future.result()
            progress(counter.value)
    except BrokenProcessPool as error:
        raise UserError(
            f"A process that packed into {out} died (most often because memory ran out): give a smaller --workers and "
            "run the same vitrail pack again, which goes on from there."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_HELD: list[Any] = []
"""What a worker works on: handed over once, not with every file."""


def _begin(*held: Any) -> None:
    _HELD[:] = held


def _continue(split: str, number: int) -> None:
    sources, out, size, counter = _HELD

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1

    _write_shard(sources[split], out, split, number, size, tick)


def _write_shard(source: Source, out: Path, split: str, number: int, size: int, tick: Tick) -> None:
    rows: list[tuple[int, ...]] = []
    reasons: dict[str, str] = {}
    first = number * SHARD

    def write(part: Path) -> None:
        start = 0
        with part.open("wb") as file:
            for index in range(first, first + _count(source, number)):
                sample = source[index]
                try:
                    pixels, whole = pixels_of(sample.picture, sample.name, size)
                    raw: Any = pixels
                    shape = (*pixels.shape[:2], 3 if pixels.ndim == 3 else 1, *whole)
                except UnreadablePicture as error:
                    raw, shape = np.frombuffer(_bytes(sample), np.uint8), (0, 0, 0, 0, 0)
                    reasons[key(source, index)] = str(error)
                file.write(raw.data)
                rows.append((start, raw.nbytes, *shape))
                start += raw.nbytes
                tick()

    path = shard(out, split, number)
    write_whole(path, write)
    said = np.frombuffer(json.dumps(reasons).encode(), np.uint8)
    _write_npz(path.with_suffix(".npz"), rows=np.array(rows, np.int64), lost=said)


def _bytes(sample: Sample) -> bytes:
    try:
        if isinstance(sample.picture, Path):
            with sample.picture.open("rb") as file:
                return file.read(KEPT)
    except OSError:
        return b""
    return sample.picture[:KEPT] if isinstance(sample.picture, bytes) else b""


def _lost(source: Source, out: Path, split: str) -> list[dict[str, str]]:
    """Names and reasons of what could not be read."""
    lost: list[dict[str, str]] = []
    for number in range(-(-len(source) // SHARD)):
        with np.load(shard(out, split, number).with_suffix(".npz")) as table:
            if (table["rows"][:, HEIGHT] == 0).any():
                said = json.loads(table["lost"].tobytes())
                lost += [{"name": name, "reason": reason} for name, reason in said.items()]
    return lost
