"""What the .npz files of the official code, big_vision and BiT share: Flax's layouts, written down once for both ways.

Flax keeps a kernel as (in, out), attention's as (d, heads, e) and (heads, e, d), a convolution's as (height, width, in,
out). An Entry pairs one tensor of ours with those of theirs that it is made of; reading and writing walk through the
same entries, so what the one does the other undoes.
"""

import functools
import re
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.runs import write_whole
from vitrail.weights.conversion import Head, Keys
from vitrail.weights.memory import allocate
from vitrail.weights.writing import make_folder

Order = Literal["plain", "matrix", "convolution"]

READERS = 2
"""Threads that read. Each holds one tensor of theirs beside ours: more would cost memory, and the disk is shared."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, and the tensors of theirs that it is made of. In a block's names, {} is its number.

    theirs: several where their rows, one under the other, are ours (queries, keys, values).
    shape: of each of theirs.
    order: "plain", the same numbers in the same order; "matrix", (in, out) for our (out, in), whatever axes those are
        spread over; "convolution", (height, width, in, out) for our (out, in, height, width).
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    order: Order = "plain"

    def under(self, prefix: str) -> "Entry":
        return replace(self, ours=prefix + self.ours)

    def at(self, block: int) -> "Entry":
        return replace(self, ours=self.ours.format(block), theirs=tuple(name.format(block) for name in self.theirs))

    def fill(self, ours: Tensor, parts: Iterable[Tensor]) -> Tensor:
        """Theirs into ours, which has its shape."""
        for place, part in zip(ours.chunk(len(self.theirs)), parts, strict=True):
            if self.order == "matrix":
                part = part.reshape(-1, place.shape[0]).T
            elif self.order == "convolution":
                part = part.permute(3, 2, 0, 1)
            place.copy_(part.reshape(place.shape))
        return ours

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The way back."""
        parts = tensor.chunk(len(self.theirs))
        if self.order == "matrix":
            parts = tuple(part.T for part in parts)
        elif self.order == "convolution":
            parts = tuple(part.permute(2, 3, 1, 0) for part in parts)
        return [part.reshape(self.shape) for part in parts]


def dense(ours: str, theirs: str, width: int, out: int) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}.weight", (f"{theirs}/kernel",), (width, out), "matrix"),
        Entry(f"{ours}.bias", (f"{theirs}/bias",), (out,)),
    )


def norm(ours: str, theirs: str, width: int) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}.weight", (f"{theirs}/scale",), (width,)),
        Entry(f"{ours}.bias", (f"{theirs}/bias",), (width,)),
    )


def projection(ours: str, path: str, names: tuple[str, ...], width: int, heads: int) -> tuple[Entry, ...]:
    """Into heads: queries, keys and values, or some of them."""
    split = (heads, width // heads)
    return (
        Entry(f"{ours}.weight", tuple(f"{path}/{name}/kernel" for name in names), (width, *split), "matrix"),
        Entry(f"{ours}.bias", tuple(f"{path}/{name}/bias" for name in names), split),
    )


def merging(ours: str, theirs: str, width: int, heads: int) -> tuple[Entry, ...]:
    """Out of heads."""
    return (
        Entry(f"{ours}.weight", (f"{theirs}/kernel",), (heads, width // heads, width), "matrix"),
        Entry(f"{ours}.bias", (f"{theirs}/bias",), (width,)),
    )


def convolution(ours: str, theirs: str, side: int, inputs: int, out: int) -> Entry:
    return Entry(ours, (theirs,), (side, side, inputs, out), "convolution")


def numbered(keys: Keys, template: str, probe: str, first: int) -> int:
    """How many modules there are of the name `template`, from number `first`.

    probe: a tensor that each has. Raises UserError, naming it, where one is missing before the last.
    """
    pattern = re.sub(r"\\{.*?\\}", r"(\\d+)", re.escape(template))
    found = {int(match[1]) for name in keys if (match := re.match(pattern, name))}
    for number in range(first, first + len(found)):
        if number not in found:
            keys.shape(template.format(number) + probe)
    return len(found)


def read_entries(keys: Keys, entries: Iterable[Entry], shapes: dict[str, tuple[int, ...]]) -> None:
    """Moves theirs into ours, whose shapes are given. Raises UserError that names what is missing or misshapen."""

    def read(entry: Entry, ours: Tensor) -> Tensor:
        return entry.fill(ours, (take(keys, name, entry.shape) for name in entry.theirs))

    # Reading, checksums and transposing leave Python to the other threads; what stays is allocated by this one, so that
    # their memory is all free again in the end.
    with ThreadPoolExecutor(READERS) as pool:
        jobs = [(entry, pool.submit(read, entry, _room(keys, entry, shapes[entry.ours]))) for entry in entries]
        try:
            for entry, job in jobs:
                keys.put(entry.ours, job.result(), *entry.theirs)
        finally:
            pool.shutdown(cancel_futures=True)


def read_stacked(keys: Keys, entries: Iterable[Entry], shapes: dict[str, tuple[int, ...]], depth: int) -> None:
    """Blocks that lie one on the other along a first axis, as nn.scan leaves them."""
    for entry in entries:
        stacks = [take(keys, name, (depth, *entry.shape)) for name in entry.theirs]
        for block in range(depth):
            ours = entry.ours.format(block)
            room = _room(keys, entry, shapes[ours])
            keys.put(ours, entry.fill(room, (stack[block] for stack in stacks)))
        keys.renamed.update(dict.fromkeys((keys.prefix + name for name in entry.theirs), entry.ours.format("*")))


def _room(keys: Keys, entry: Entry, shape: tuple[int, ...]) -> Tensor:
    """Memory for our tensor, in the widest type of theirs."""
    kinds = [getattr(torch, keys.checkpoint.dtype(keys.prefix + name)) for name in entry.theirs if name in keys]
    return allocate(shape, functools.reduce(torch.promote_types, kinds) if kinds else torch.float32)


def take(keys: Keys, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that must have `shape`, and floating numbers."""
    found, kind = keys.shape(name), keys.checkpoint.dtype(keys.prefix + name)
    # A group norm's scale was once (1, 1, 1, c): https://github.com/google/flax/issues/1721
    if found not in (shape, (1, 1, 1, *shape)) or "float" not in kind:
        raise UserError(
            f"{keys.checkpoint.path} holds {keys.prefix + name} of shape {found} in {kind}, where the rest of the file "
            f"asks for {shape} in floating numbers: use a checkpoint that was not changed"
        )
    return keys.take(name)


def sizes(keys: Keys, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there and not be empty."""
    shape = keys.shape(name, axes)
    if 0 in shape:
        raise UserError(f"{keys.checkpoint.path} holds {keys.prefix + name} of shape {shape}, with no number in it")
    return shape


@contextmanager
def named(keys: Keys) -> Iterator[None]:
    """Says which file it was whose sizes make no config."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{keys.checkpoint.path} is no whole model: {error}") from error


def head_state(tensors: dict[str, Tensor]) -> Head:
    """Of the linear head: in the paper's ImageNet-21k files it is all zeros."""
    if "head.output.weight" not in tensors:
        return "absent"
    weight = tensors["head.output.weight"]
    return "usable" if weight[0].any() or weight.any() else "all zeros"


def save_npz(destination: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes named tensors as NumPy does, one at a time, bfloat16 as big_vision does: two nameless bytes.

    Raises UserError where it cannot be written; what stood there before is then still there.
    """
    if destination.is_dir():
        raise UserError(f"{destination} is a folder, and a .npz is one file: name the file")

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", allowZip64=True) as archive:
            for name, tensor in tensors:
                # A fixed time, so that the same weights are the same bytes.
                member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                with archive.open(member, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, _array(tensor), allow_pickle=False)

    make_folder(destination.parent)
    write_whole(destination, write)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("V2")
    return tensor.numpy()
