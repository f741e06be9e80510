"""From a source to batches, in an order that is a pure function of (seed, step).

Training reads one endless stream: a permutation of the source for epoch 0, another for epoch 1, and so on, cut into full
batches that may cross from one epoch into the next. So each epoch holds every sample exactly once whatever the batch size
and the number of processes, and a run can begin at any step. Rows past the end of the stream are marked as not valid.

Processes take every count-th row of each global batch; the union of their rows is what one process would have read.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch.utils.data import DataLoader

from vitrail.core import ranks
from vitrail.core.device import memory, mix
from vitrail.core.errors import UserError
from vitrail.core.types import Batch, Labels, Source
from vitrail.data.ring import Ring
from vitrail.data.transforms import Transform

Key = tuple[int, int]
"""(epoch, index into the source); index -1 is a row that only fills the batch up."""

FILL: Key = (0, -1)


@dataclass(frozen=True)
class Order:
    """Which samples make up each global batch.

    count: samples in the source. batch: rows of a global batch. samples: length of the stream (epochs x count).
    shuffle: a new permutation each epoch, else the source's own order.
    weights: (count,) probabilities to draw with, with replacement, in place of a permutation (`--balance`).
    """

    count: int
    batch: int
    samples: int
    seed: int = 0
    shuffle: bool = True
    # Not hashed: a million numbers for each batch.
    weights: tuple[float, ...] | None = field(default=None, hash=False)

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch)

    def keys(self, step: int) -> list[Key]:
        """The rows of the global batch of one step; `batch` of them."""
        place, end = step * self.batch, min((step + 1) * self.batch, self.samples)
        keys: list[Key] = []
        while place < end:
            epoch, first = divmod(place, self.count)
            some = _indices(self, epoch)[first : first + end - place].tolist()
            keys += [(epoch, index) for index in some]
            place += len(some)
        return keys + [FILL] * (self.batch - len(keys))


@lru_cache(maxsize=4)
def _indices(order: Order, epoch: int) -> np.ndarray:
    if not order.shuffle:
        return np.arange(order.count)
    random = np.random.default_rng(mix("order", order.seed, epoch))
    if order.weights is not None:
        return random.choice(order.count, order.count, p=np.asarray(order.weights))
    return random.permutation(order.count)


def balanced(labels: np.ndarray) -> tuple[float, ...]:
    """Probabilities under which every class is drawn equally often."""
    counts = np.bincount(labels)
    weights = 1 / counts[labels]
    return tuple((weights / weights.sum()).tolist())


@dataclass(frozen=True)
class _Prepared:
    """A batch on its way from a worker, and why which picture is missing in it.

    pixels: None where they lie in the ring at `place`. The rest are arrays: each tensor would travel in a file of its own.
    """

    pixels: UInt8[torch.Tensor, "b c h w"] | None
    place: int | None
    labels: Int[np.ndarray, "b"]
    valid: Bool[np.ndarray, "b"]
    index: Int[np.ndarray, "b"]
    problems: dict[int, str]


@dataclass
class _Pictures:
    """What a data worker holds: the source, how to prepare its pictures for a batch, and the ring that batches go into."""

    source: Source
    transform: Transform
    seed: int
    ring: Ring | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, asked: list[Any]) -> _Prepared:
        """asked: a place of the ring, or None, and the keys of the pictures that are to go there. Each is copied into its
        row as long as the processor's cache holds it."""
        place, keys = asked
        pixels, problems = self.pixels(place, len(keys)), {}
        labels, valid = np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        for row, (epoch, index) in enumerate(keys):
            try:
                if index >= 0:
                    pixels[row], labels[row] = self._picture(epoch, index)
                    valid[row] = True
            except UserError as error:
                # Left out of this batch and counted; one bad picture must not end a night's training.
                problems[index] = str(error)
        pixels[~valid] = 0
        sent = torch.from_numpy(pixels) if place is None else None
        return _Prepared(sent, place, labels, valid, np.array([index for _, index in keys]), problems)

    def pixels(self, place: int | None, rows: int) -> UInt8[np.ndarray, "b c h w"]:
        return self.transform.room(rows, self.ring.at(place) if self.ring is not None and place is not None else None)

    def batch(self, prepared: _Prepared) -> Batch:
        """In the process that trains, of what a worker prepared."""
        view, place = prepared.pixels, prepared.place
        if view is None:
            assert self.ring is not None
            assert place is not None
            pixels = self.pixels(place, len(prepared.labels))
            self.ring.freed_with(pixels, place)
            view = torch.from_numpy(pixels)
        return Batch(
            views=(view,),
            targets=Labels(torch.from_numpy(prepared.labels)) if (prepared.labels >= 0).all() else None,
            valid=torch.from_numpy(prepared.valid),
            index=torch.from_numpy(prepared.index),
        )

    def _picture(self, epoch: int, index: int) -> tuple[np.ndarray, int]:
        sample = self.source[index]
        random = np.random.default_rng(mix("picture", self.seed, epoch, index)) if self.transform.random else None
        return self.transform(sample.picture, random, sample.name), sample.label


def _as_it_is(prepared: Any) -> Any:
    return prepared


StartMethod = Literal["fork", "spawn", "forkserver"]


def _stand_apart(_worker: int, niceness: int = 0) -> None:
    """A worker leaves the training's process group: a Ctrl-C or SIGTERM to the group is for the training to act on, which
    still needs its workers until the step is done. And what it was started with is not searched for garbage any more,
    which takes time, and memory of its own for each page that is looked at."""
    gc.freeze()
    if hasattr(os, "setpgrp"):
        os.setpgrp()
        os.nice(niceness)


def _workers_started(loader: "DataLoader[Any]") -> Iterator[Any]:
    """iter(loader), without the handler of SIGCHLD that it installs.

    That one raises in whatever line the training is at, a save among them, once a worker has died. The loader also looks
    after its workers while it waits for them, every five seconds, where an error can be dealt with.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _has_room(size: int) -> bool:
    """Whether each process may keep so many bytes: a quarter of what is free, shared among them."""
    return size <= memory() // 4 // ranks.count()


@dataclass
class PictureLoader:
    """This process's share of an `Order`, as batches of uint8 pixels.

    workers: processes that decode beside the training; 0 decodes in this one.
    ahead: batches that each worker prepares before they are asked for; what waits in memory is bounded by them.
    niceness: by how much the workers give way to other processes, the model's among them; 0 to 19 as of `nice`.
    hold: keep all prepared pixels in memory, where the transform draws nothing at random and they take at most a quarter
        of what is free. Small pictures then cost nothing after the first pass.
    strict: the first unreadable picture is an error.
    problems: index -> why it could not be read, filled as pictures are met.
    said: the reasons that were already printed; loaders of the same pictures share it, so that each is named once.
    """

    source: Source
    transform: Transform
    order: Order
    workers: int = 0
    hold: bool = False
    strict: bool = False
    start_method: StartMethod | None = None
    ahead: int = 4
    niceness: int = 0
    problems: dict[int, str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    _held: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.order.batch % ranks.count():
            raise UserError(
                f"--batch {self.order.batch} cannot be shared by {ranks.count()} processes; give a multiple of that."
            )
        preprocess = self.transform.preprocess
        size = len(self.source) * preprocess.channels * preprocess.size[0] * preprocess.size[1]
        self.hold = self.hold and not self.transform.random and _has_room(size)

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches of steps `start`, `start` + 1, ... to the end of the stream."""
        keys = (self._share(step) for step in range(start, self.order.steps))
        if not self.hold:
            yield from self._read(keys, self._rows, self.workers)
            return
        if self._held is None:
            self._fill()
        for rows in keys:
            yield self._recall(rows)

    def at(self, step: int) -> Batch:
        """The batch of one step, made again."""
        return next(self._read(iter([self._share(step)]), self._rows, workers=0))

    @property
    def _rows(self) -> int:
        return self.order.batch // ranks.count()

    def _share(self, step: int) -> list[Key]:
        return self.order.keys(step)[ranks.rank() :: ranks.count()]

    def _read(self, keys: Iterator[list[Key]], rows: int, workers: int) -> Iterator[Batch]:
        method = self.start_method or ("fork" if sys.platform == "linux" else "spawn")
        ring = self._ring(rows, workers) if workers and method == "fork" else None
        pictures = _Pictures(self.source, self.transform, self.order.seed, ring)
        loader: DataLoader[Any] = DataLoader(
            pictures,  # type: ignore[arg-type]
            batch_sampler=([ring.taken() if ring is not None else None, each] for each in keys),
            num_workers=workers,
            collate_fn=_as_it_is,
            multiprocessing_context=multiprocessing.get_context(method) if workers else None,
            prefetch_factor=self.ahead if workers else None,
            worker_init_fn=partial(_stand_apart, niceness=self.niceness) if workers else None,
            generator=torch.Generator(),  # else the loader takes its base seed from the global generator
        )
        batches = _workers_started(loader) if workers else iter(loader)
        while True:
            try:
                prepared = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                raise UserError(
                    "A data worker died (most often because the machine, or its shared memory, ran out of memory); give "
                    "a smaller --workers and continue."
                ) from error
            self._note(prepared.problems)
            yield pictures.batch(prepared)

    def _ring(self, rows: int, workers: int) -> Ring | None:
        """With places for what waits, for what has just come, and for the two batches that a training may hold. Who holds
        more is sent the next ones in files; so is everybody where the ring would take over a quarter of the free memory,
        for it keeps what it once took."""
        channels, (height, width) = self.transform.preprocess.channels, self.transform.preprocess.size
        places, size = workers * self.ahead + 3, rows * channels * height * width
        if not _has_room(places * size):
            return None
        try:
            return Ring(places, size)
        except (OSError, ValueError, OverflowError):
            return None

    def _note(self, problems: dict[int, str]) -> None:
        new = {index: problem for index, problem in problems.items() if index not in self.problems}
        if new and self.strict:
            raise UserError(f"--strict: {next(iter(new.values()))}")
        for problem in new.values():
            if problem not in self.said:
                print(f"left out: {problem}", file=sys.stderr, flush=True)
        self.problems.update(new)
        self.said.update(new.values())

    def _fill(self) -> None:
        """Reads every picture once, in the source's order."""
        count, size = len(self.source), 256
        everything = Order(count, size, count, shuffle=False)
        preprocess = self.transform.preprocess
        held = torch.zeros((count, preprocess.channels, *preprocess.size), dtype=torch.uint8)
        for batch in self._read((everything.keys(step) for step in range(everything.steps)), size, self.workers):
            held[batch.index[batch.valid]] = batch.views[0][batch.valid]
        self._held = held

    def _recall(self, keys: list[Key]) -> Batch:
        assert self._held is not None
        index = torch.tensor([index for _, index in keys])
        readable = [key >= 0 and key not in self.problems for key in index.tolist()]
        labels = torch.from_numpy(np.where(index >= 0, self.source.labels[index], 0))
        pixels = self._held[index]
        pixels[index < 0] = 0  # as when they are read
        return Batch(
            views=(pixels,),
            targets=Labels(labels) if bool((labels >= 0).all()) else None,
            valid=torch.tensor(readable),
            index=index,
        )
