"""The order of the training data, and the loader that follows it."""

import ctypes
import gc
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import folder
from torch import Tensor

from vitrail.core import ranks
from vitrail.core.errors import UserError
from vitrail.core.types import Batch, Labels, Preprocess, Sample, Source
from vitrail.data import loader as loader_module
from vitrail.data import ring as ring_module
from vitrail.data.folders import read_folder
from vitrail.data.loader import Order, PictureLoader, balanced
from vitrail.data.ring import Ring
from vitrail.data.transforms import Transform

SIZES = [(count, batch) for count in (1, 2, 3, 7, 16, 23, 50) for batch in (1, 2, 3, 8, 16, 64)]
PREPROCESS = Preprocess(size=(16, 16))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read_folder(folder(tmp_path_factory.mktemp("data"), each=9))[0]


def same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.views[0], second.views[0])
    assert torch.equal(first.valid, second.valid)
    assert torch.equal(first.index, second.index)
    assert first.targets is not None
    assert second.targets is not None
    assert torch.equal(first.targets.values[first.valid], second.targets.values[second.valid])


@pytest.mark.parametrize(("count", "batch"), SIZES)
def test_each_epoch_holds_each_sample_once(count: int, batch: int) -> None:
    epochs = 3
    order = Order(count, batch, epochs * count, seed=4)
    rows = [key for step in range(order.steps) for key in order.keys(step)]
    assert len(rows) == order.steps * batch
    assert rows[epochs * count :] == [(0, -1)] * (order.steps * batch - epochs * count)
    for epoch in range(epochs):
        stream = rows[epoch * count : (epoch + 1) * count]
        assert {place for place, _ in stream} == {epoch}
        assert sorted(index for _, index in stream) == list(range(count))


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize(("count", "batch"), [(count, batch) for count, batch in SIZES if batch >= 8])
def test_processes_share_each_batch(count: int, batch: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch *= processes
    source = Numbers(count)
    order = Order(count, batch, 2 * count, seed=4)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "count", lambda: processes)
        shares.append(list(PictureLoader(source, Transform(PREPROCESS), order).batches()))
    seen: list[int] = []
    for step, parts in enumerate(zip(*shares, strict=True)):
        assert len({part.index.shape[0] for part in parts}) == 1
        rows = torch.stack([part.index for part in parts], 1).flatten().tolist()
        assert rows == [index for _, index in order.keys(step)]
        seen += [index for part in parts for index in part.index[part.valid].tolist()]
    assert sorted(seen) == sorted(2 * list(range(count)))


def test_a_batch_that_cannot_be_shared_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UserError, match="--batch 7 cannot be shared by 2 processes"):
        PictureLoader(source, Transform(PREPROCESS), Order(27, 7, 27))


def test_epochs_and_seeds_differ() -> None:
    order = Order(50, 50, 100, seed=1)
    first, second = ([index for _, index in order.keys(step)] for step in range(2))
    assert first != second != list(range(50))
    assert [index for _, index in replace(order, seed=2).keys(0)] != first
    assert [index for _, index in Order(50, 50, 100, seed=1).keys(0)] == first
    assert [index for _, index in replace(order, shuffle=False).keys(1)] == list(range(50))


def test_balanced_draws() -> None:
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    order = Order(1000, 100, 20_000, weights=balanced(labels))
    drawn = labels[[index for step in range(order.steps) for _, index in order.keys(step)]]
    # 20,000 draws: the standard deviation of each share is 0.33 %.
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, 1 / 3, atol=0.015)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["none", "inception"])
def test_any_step_can_be_the_first(source: Source, workers: int, crop: str) -> None:
    order = Order(len(source), 8, 70, seed=3)
    loader = PictureLoader(source, Transform(PREPROCESS, crop), order, workers)  # type: ignore[arg-type]
    whole = list(loader)
    assert len(whole) == len(loader) == 9
    assert whole[-1].valid.tolist() == [True] * 6 + [False] * 2
    assert whole[-1].index[6:].tolist() == [-1, -1]
    for start in (0, 4, 8, 9):
        rest = list(loader.batches(start))
        assert len(rest) == 9 - start
        for found, expected in zip(rest, whole[start:], strict=True):
            same(found, expected)
    same(loader.at(5), whole[5])
    lies = torch.contiguous_format if crop == "none" else torch.channels_last
    assert all(batch.views[0].is_contiguous(memory_format=lies) for batch in whole)


def test_batches_that_are_held_are_written_over_by_no_other(source: Source) -> None:
    """Workers write into the same memory again and again; whoever keeps more batches than it has places for, or part of
    one, keeps what it was."""
    order, transform = Order(len(source), 4, 120, seed=3), Transform(PREPROCESS, "inception")
    loader = PictureLoader(source, transform, order, 1, ahead=1)
    expected = list(PictureLoader(source, transform, order))
    held = list(loader)  # 30 batches, and 4 places
    for found, wanted in zip(held, expected, strict=True):
        same(found, wanted)
    parts = [batch.views[0][2:3, 1].flatten()[5:] for batch in loader]
    arrays = [batch.views[0].numpy()[3] for batch in loader]
    for part, array, wanted in zip(parts, arrays, expected, strict=True):
        assert torch.equal(part, wanted.views[0][2:3, 1].flatten()[5:])
        assert np.array_equal(array, wanted.views[0][3].numpy())


def test_a_place_is_free_when_nothing_looks_at_it() -> None:
    ring = Ring(2, 12)
    assert [ring.taken(), ring.taken(), ring.taken()] == [0, 1, None]
    ring.at(1)[:] = 7
    array = ring.at(1).reshape(3, 4)
    ring.freed_with(array, 1)
    tensor = torch.from_numpy(array)
    del array
    part = tensor[1]
    del tensor
    assert ring.taken() is None
    assert part.tolist() == [7] * 4
    del part
    assert ring.taken() == 1
    ring.at(0)[:] = 5
    assert ring.at(1).tolist() == [7] * 12


def test_batches_come_out_of_the_ring(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of no other memory, while they are let go one by one; where there is no such memory, out of files."""
    lent: list[int] = []
    freed_with = Ring.freed_with
    monkeypatch.setattr(
        Ring, "freed_with", lambda ring, array, place: (lent.append(place), freed_with(ring, array, place))[1]
    )
    order, transform = Order(len(source), 4, 120, seed=3), Transform(PREPROCESS, "inception")
    expected = list(PictureLoader(source, transform, order))

    def none(*_: object) -> None:
        raise OSError("no memory")

    with monkeypatch.context() as full:
        full.setattr(torch.UntypedStorage, "_share_fd_cpu_", none)  # as where /dev/shm has no room for one batch
        for found, wanted in zip(PictureLoader(source, transform, order, 2), expected, strict=True):
            same(found, wanted)
    assert len(lent) == 30
    assert set(lent) <= set(range(11))

    for module, name, lacks in ((ring_module.mmap, "mmap", none), (loader_module, "memory", lambda: 4 * 11 * 3071)):
        with monkeypatch.context() as lacking:
            lacking.setattr(module, name, lacks)  # 3,072 bytes a batch
            for found, wanted in zip(PictureLoader(source, transform, order, 2), expected, strict=True):
                same(found, wanted)
    assert len(lent) == 30


def test_held_pixels_are_those_that_are_streamed(source: Source) -> None:
    order = Order(len(source), 8, 70, seed=3)
    streamed, held = (PictureLoader(source, Transform(PREPROCESS), order, hold=hold) for hold in (False, True))
    for _ in range(2):
        for found, expected in zip(held, streamed, strict=True):
            same(found, expected)
    assert held.hold
    assert not PictureLoader(source, Transform(PREPROCESS, "inception"), order, hold=True).hold


def test_workers_can_be_spawned(source: Source) -> None:
    order = Order(len(source), 8, len(source), seed=3)
    spawned = PictureLoader(source, Transform(PREPROCESS, "inception"), order, 1, start_method="spawn")
    for found, expected in zip(spawned, PictureLoader(source, Transform(PREPROCESS, "inception"), order), strict=True):
        same(found, expected)


def test_nothing_global_is_drawn_from_or_kept(source: Source) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    handler = signal.getsignal(signal.SIGCHLD)
    state = torch.get_rng_state()
    list(PictureLoader(source, Transform(PREPROCESS, "inception"), Order(len(source), 8, 27), 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.randint(2**31) == np.random.RandomState(5).randint(2**31)
    assert signal.getsignal(signal.SIGCHLD) is handler


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_left_out_and_named_once(
    hold: bool, workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = read_folder(folder(tmp_path, each=5))[0]
    for name in ("class0/1.png", "class2/3.png"):
        (tmp_path / name).write_bytes(b"no picture")
    said: set[str] = set()
    loader = PictureLoader(source, Transform(PREPROCESS), Order(15, 4, 45, seed=1), workers, hold=hold, said=said)
    valid = [index for batch in loader for index in batch.index[batch.valid].tolist()]
    counts = np.bincount(valid, minlength=15)
    assert counts.tolist() == [0 if index in (1, 13) else 3 for index in range(15)]
    assert sorted(loader.problems) == [1, 13]
    error = capfd.readouterr().err
    assert error.count("left out: ") == 2
    assert "class0/1.png" in error
    assert "class2/3.png" in error
    # Another loader of the same pictures keeps silent about them, and still leaves them out.
    again = PictureLoader(source, Transform(PREPROCESS), Order(15, 15, 15, shuffle=False), said=said)
    assert next(iter(again)).valid.tolist() == [index not in (1, 13) for index in range(15)]
    assert capfd.readouterr().err == ""


def test_a_picture_that_is_spoilt_while_training_goes_on(tmp_path: Path) -> None:
    source = read_folder(folder(tmp_path, each=5))[0]
    loader = PictureLoader(source, Transform(PREPROCESS), Order(15, 15, 30, shuffle=False))
    batches = iter(loader)
    assert next(batches).valid.all()
    (tmp_path / "class1" / "2.png").unlink()
    assert next(batches).valid.tolist() == [index != 7 for index in range(15)]
    assert "class1/2.png" in loader.problems[7]


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_ends_at_the_first(workers: int, tmp_path: Path) -> None:
    source = read_folder(folder(tmp_path, each=5))[0]
    (tmp_path / "class0" / "1.png").write_bytes(b"no picture")
    loader = PictureLoader(source, Transform(PREPROCESS), Order(15, 4, 15), workers, strict=True)
    with pytest.raises(UserError, match=r"--strict: .*class0/1\.png is no picture"):
        list(loader)


@dataclass(frozen=True)
class Numbers:
    """Pictures from nowhere. `deadly`: fetching that one ends the process."""

    count: int
    deadly: int = -1
    broken: int = -1
    classes: tuple[str, ...] = ("a", "b")
    fingerprint: str = "0"

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.count) % 2

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.broken:
            raise RuntimeError("the source's own mistake")
        return Sample(str(index), np.full((16, 16, 3), index % 256, np.uint8), index % 2)


def test_a_worker_that_dies_ends_the_loading_in_one_sentence() -> None:
    loader = PictureLoader(Numbers(40, deadly=0), Transform(PREPROCESS), Order(40, 4, 40, shuffle=False), 2)
    with pytest.raises(UserError, match="A data worker died"):
        list(loader)


class Whereabouts(Numbers):
    """Pictures that are white where whoever fetches them leads a process group of its own."""

    def __getitem__(self, index: int) -> Sample:
        alone = os.getpgrp() == os.getpid() != PARENT
        return Sample(str(index), np.full((16, 16, 3), 255 * alone, np.uint8), 0)


PARENT = os.getpid()


def test_workers_are_out_of_reach_of_a_ctrl_c() -> None:
    """A terminal sends it to the whole group; a run still needs its workers for the step that it is at."""
    loader = PictureLoader(Whereabouts(8), Transform(PREPROCESS), Order(8, 4, 8), 2)
    assert all((batch.views[0] == 255).all() for batch in loader)


def test_a_source_that_fails_by_itself_is_not_taken_for_a_dead_worker() -> None:
    loader = PictureLoader(Numbers(40, broken=39), Transform(PREPROCESS), Order(40, 4, 40, shuffle=False), 1)
    with pytest.raises(RuntimeError, match="the source's own mistake"):
        list(loader)


def resident() -> int:
    """Bytes of this process that are in memory now, without what malloc merely keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("hold", [False, True])
def test_memory_does_not_grow_over_twenty_epochs(hold: bool) -> None:
    count, transform = 100, Transform(Preprocess(size=(64, 64)))
    loader = PictureLoader(Numbers(count), transform, Order(count, 25, 22 * count), hold=hold)
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    before = resident()
    assert sum(1 for _ in batches) == 80
    # 20 epochs of pixels are 24 MB; Python's own pools move by less than one.
    assert resident() - before < 2 << 20


def test_a_batch_goes_to_a_gpu_from_pinned_memory_and_to_a_cpu_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batch = Batch(
        (pixels,), Labels(torch.zeros(2, dtype=torch.int64)), torch.ones(2, dtype=torch.bool), torch.arange(2)
    )
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: (pinned.append(tuple(self.shape)), self)[1])
    assert batch.to(torch.device("cpu")).views[0] is pixels
    assert pinned == []
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: self if non_blocking else None)
    assert batch.to(torch.device("cuda")).views[0] is pixels
    assert pinned == [(2, 3, 4, 4), (2,), (2,), (2,)]
