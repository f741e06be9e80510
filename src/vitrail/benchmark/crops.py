"""The sides of `vitrail bench data`: ours and others' ways from pictures to a batch of training crops, as work to be timed.

Unusual: each is measured twice. In this process, where nothing but the crops is made, all sides take the same crops of the
same pictures. Through a data worker, as trainings have it, what is sent from process to process costs time too, and the
processor time of both counts.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from vitrail.benchmark.pipelines import DEVIATION, LIBRARIES, MEAN, Crops, Pipeline
from vitrail.core.types import Preprocess, Source
from vitrail.data.augment import flip
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.transforms import Transform

BLOCK = 16
"""Pictures that a side prepares in its turn in this process."""

Sides = dict[str, Callable[[int], Any]]
"""Of each side its work in the turn of a number."""


class Worker:
    """A side whose pictures come from a data worker: `turn` batches at a call, of which each is handed to `then`."""

    def __init__(self, loader: Iterable[Any], turn: int, then: Callable[[Any], Any] = lambda batch: None) -> None:
        before = {child.pid for child in multiprocessing.active_children()}
        self.batches, self.turn, self.then = iter(loader), turn, then
        next(self.batches)
        (self.process,) = (child for child in multiprocessing.active_children() if child.pid not in before)

    def __call__(self, number: int) -> None:
        for batch in islice(self.batches, self.turn):
            self.then(batch)

    def rested(self) -> float:
        """`seconds`, once the worker waits for its next turn: what it prepares ahead would disturb the others in theirs."""
        before = -1.0
        while (used := self.seconds()) > before:
            before = used
            time.sleep(0.02)
        return used

    def seconds(self) -> float:
        """That the worker has used of a processor, to the nanosecond. Linux alone has a clock for another process."""
        assert self.process.pid is not None
        return time.clock_gettime(~self.process.pid << 3 | 2)  # clock_getcpuclockid(3)


@dataclass(frozen=True)
class Measured:
    """source, packed: the same pictures, as files and as vitrail pack made them, or None. size: of a crop, in pixels.
    against: of LIBRARIES, those that are measured themselves too. batch, turn: through a worker, pictures in a batch and
    batches that a side takes in its turn."""

    source: Source
    packed: Source | None
    size: int
    against: tuple[str, ...] = ()
    batch: int = 32
    turn: int = 8

    def here(self) -> Sides:
        """Each makes a batch of BLOCK pictures, in each turn of other pictures and crops."""

        def places(number: int) -> list[tuple[int, int]]:
            return [(place, place % len(self.source)) for place in range(number * BLOCK, (number + 1) * BLOCK)]

        def ours(origin: Source, interpolation: Any) -> Callable[[int], Any]:
            transform = self._transform(interpolation)
            pixels = transform.room(BLOCK)  # again and again, as the loader's ring

            def batch(number: int) -> Any:
                for row, (place, at) in enumerate(places(number)):
                    sample = origin[at]
                    pixels[row] = transform(sample.picture, np.random.default_rng(place), sample.name)
                return flip(torch.from_numpy(pixels), np.random.default_rng(number))

            return batch

        def theirs(pipeline: Pipeline) -> Callable[[int], Any]:
            crops = Crops(self.source, pipeline)
            return lambda number: pipeline.collate([crops[each] for each in places(number)])

        return self._sides(ours, theirs)

    def through_a_worker(self) -> Sides:
        """Each takes `turn` batches out of a worker that goes on from turn to turn."""

        def ours(origin: Source, interpolation: Any) -> Callable[[int], Any]:
            stream = PictureLoader(origin, self._transform(interpolation), self._endless(), 1)
            return Worker(stream, self.turn, lambda batch: flip(batch.views[0], np.random.default_rng(0)))

        def theirs(pipeline: Pipeline) -> Callable[[int], Any]:
            order = self._endless()

            def keys(step: int) -> list[tuple[int, int]]:
                return [(step * self.batch + row, at) for row, (_, at) in enumerate(order.keys(step))]

            loader: Any = DataLoader(
                Crops(self.source, pipeline),  # type: ignore[arg-type]
                batch_sampler=map(keys, range(order.steps)),
                num_workers=1,
                collate_fn=pipeline.collate,
            )
            return Worker(loader, self.turn)

        return self._sides(ours, theirs)

    def _endless(self) -> Order:
        return Order(len(self.source), self.batch, 10**9 * self.batch)

    def _transform(self, interpolation: Any) -> Transform:
        return Transform(Preprocess((self.size, self.size), None, interpolation, MEAN, DEVIATION), "inception")

    def _sides(
        self,
        ours: Callable[[Source, Any], Callable[[int], Any]],
        theirs: Callable[[Pipeline], Callable[[int], Any]],
    ) -> Sides:
        found = {library: theirs(Pipeline.of(library, self.size, own=False)) for library in LIBRARIES}
        found |= {f"{library} itself": theirs(Pipeline.of(library, self.size, own=True)) for library in self.against}
        for interpolation in LIBRARIES.values():
            found[f"vitrail {interpolation}"] = ours(self.source, interpolation)
            if self.packed is not None:
                found[f"packed {interpolation}"] = ours(self.packed, interpolation)
        return found
