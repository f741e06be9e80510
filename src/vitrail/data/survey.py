"""What is said of the pictures before training starts, in seconds.

Unusual: it keeps to a time, not to a number of pictures. Every picture that there is time for is decoded at thumbnail
size (a damaged file fails there as it would in training), held-out and training pictures in turns, and how many were
looked at is said. Pictures equal byte for byte are looked for among all.
"""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from vitrail.core.device import cores
from vitrail.core.errors import UserError
from vitrail.core.types import Picture, Source
from vitrail.core.values import to_json
from vitrail.data.decode import UnreadablePicture, decode
from vitrail.data.likeness import LOOK, equal_pictures, look, near_pictures
from vitrail.data.sources import class_counts, listed, sizes
from vitrail.data.splits import Splits

MOST_UNREADABLE = 0.05
IMBALANCED = 5
MOST_LOOKED_AT = 50_000


@dataclass(frozen=True)
class Unreadable:
    """name: the sample's. reason: a sentence that names it, says what was found and what to do."""

    split: str
    name: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """Two pictures that are the same, byte for byte (`exact`) or to the eye, in different splits or classes."""

    names: tuple[str, str]
    splits: tuple[str, str]
    classes: tuple[str, str]
    exact: bool


@dataclass(frozen=True)
class Survey:
    """counts: pictures by split and class. imbalance: of the largest training class to the smallest that has any.

    looked_at: how many of the `pictures` were decoded, in `seconds`; `unreadable` and the pairs that are not exact are
    among these.
    """

    counts: dict[str, dict[str, int]]
    imbalance: float
    unreadable: tuple[Unreadable, ...]
    pairs: tuple[Pair, ...]
    looked_at: int
    pictures: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = to_json(self)
        return data

    def lines(self) -> list[str]:
        """Sentences for the person who starts the training."""
        said = [_counted(split, counts) for split, counts in self.counts.items()]
        if self.imbalance > IMBALANCED:
            said.append(
                f"warning: the largest class has {self.imbalance:.0f} times the pictures of the smallest; --balance "
                "draws every class equally often, and the results give macro accuracy too."
            )
        for split, counts in self.counts.items():
            if without := [name for name, count in counts.items() if not count]:
                said.append(f"note: {split} has no pictures of {listed(without)}.")
        if self.unreadable:
            said.append(f"warning: {_share(len(self.unreadable), self.looked_at)} cannot be read and are left out:")
            said += [f"  {item.reason}" for item in self.unreadable[:20]]
            if len(self.unreadable) > 20:
                said.append(f"  and {len(self.unreadable) - 20} more.")
        for exact, same in ((True, "equal byte for byte"), (False, "that look the same")):
            across = [pair for pair in self.pairs if pair.exact == exact and pair.splits[0] != pair.splits[1]]
            if across:
                said.append(f"warning: {len(across)} pairs {same} lie in different splits: {_shown(across)}.")
            mixed = [pair for pair in self.pairs if pair.exact == exact and pair.classes[0] != pair.classes[1]]
            if mixed:
                said.append(f"warning: {len(mixed)} pairs {same} have different classes: {_shown(mixed)}.")
        said.append(
            f"looked at {self.looked_at:,} of {self.pictures:,} pictures in {self.seconds:.0f} s"
            + ("" if self.unreadable or self.pairs else ": none unreadable, none twice")
            + ("." if self.looked_at == self.pictures else "; the rest are decoded as training meets them.")
        )
        return said


def survey(splits: Splits, *, workers: int | None = None, seconds: float = 15.0, seed: int = 0) -> Survey:
    """Counts, unreadable pictures, and pictures that are in two splits or two classes.

    workers: threads that decode; None takes one a core. seconds: for decoding, after which what was not looked at is
    left; `seed` decides which. Comparing comes on top: about a second for 12,000 pictures.
    """
    began = time.monotonic()
    held_out = {"validation": splits.validation, "test": splits.test}
    named: dict[str, Source] = {"train": splits.train, **{k: v for k, v in held_out.items() if v is not None}}
    counts = {split: class_counts(source) for split, source in named.items()}
    present = [count for count in counts["train"].values() if count]
    everything = _All(tuple(named.items()))
    looks, unreadable = _look_at(everything, workers or cores(), began + seconds, seed)
    seen = np.array(sorted(looks), np.int64)
    pairs = list(_pairs(everything, looks, seen))
    return Survey(
        counts,
        max(present) / min(present) if present else 1.0,
        tuple(Unreadable(everything.split(place), *unreadable[place]) for place in sorted(unreadable)),
        tuple(pairs),
        len(looks) + len(unreadable),
        len(everything),
        time.monotonic() - began,
    )


def refuse_if_unreadable(seen: Survey, strict: bool) -> None:
    """Raises UserError where more than 5 % of the pictures looked at cannot be read, or, if `strict`, where any cannot."""
    if seen.unreadable and strict:
        raise UserError(f"--strict: {seen.unreadable[0].reason}")
    if len(seen.unreadable) > MOST_UNREADABLE * seen.looked_at:
        reasons = "".join(f"\n  {item.reason}" for item in seen.unreadable)
        raise UserError(
            f"{_share(len(seen.unreadable), seen.looked_at)} cannot be read, more than {MOST_UNREADABLE:.0%}; mend them "
            f"or take them out:{reasons}"
        )


class _All:
    """All splits end to end: places 0 .. len - 1."""

    def __init__(self, named: tuple[tuple[str, Source], ...]) -> None:
        self.named = named
        lengths = [len(source) for _, source in named]
        self.starts = np.cumsum([0, *lengths])
        self.split_of = np.repeat(np.arange(len(named)), lengths)
        self.labels = np.concatenate([np.asarray(source.labels) for _, source in named])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def split(self, place: int) -> str:
        return self.named[self.split_of[place]][0]

    def fetch(self, place: int) -> tuple[str, Picture]:
        which = self.split_of[place]
        sample = self.named[which][1][int(place - self.starts[which])]
        return sample.name, sample.picture

    def sizes(self) -> Int[np.ndarray, "n"]:
        return np.concatenate([sizes(source) for _, source in self.named])


Looks = dict[int, UInt8[np.ndarray, "32 32"]]


def _look_at(everything: _All, workers: int, until: float, seed: int) -> tuple[Looks, dict[int, tuple[str, str]]]:
    """Thumbnails by place, and names and reasons of the unreadable, of as many pictures as there is time for."""
    looks: Looks = {}
    unreadable: dict[int, tuple[str, str]] = {}

    def visit(place: int) -> None:
        if time.monotonic() > until:
            return
        name, picture = everything.fetch(place)
        if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] not in (1, 3, 4):
            picture = picture[:, :, 0]  # channels that are no colours: the first stands for all
        try:
            looks[place] = look(decode(picture, 1, (LOOK, LOOK), name))
        except UnreadablePicture as error:
            unreadable[place] = (name, str(error))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(visit, _turns(everything.split_of, seed)[:MOST_LOOKED_AT].tolist()))
    return looks, unreadable


def _turns(split_of: Int[np.ndarray, "n"], seed: int) -> Int[np.ndarray, "n"]:
    """Places in random order, training and held-out ones in turns while there are both, so that pairs are met early."""
    mixed = np.random.default_rng(seed).permutation(len(split_of))
    held_out = split_of[mixed] > 0
    rank = np.where(held_out, np.cumsum(held_out), np.cumsum(~held_out))
    return mixed[np.argsort(rank, kind="stable")]


def _pairs(everything: _All, looks: Looks, seen: Int[np.ndarray, "n"]) -> Iterator[Pair]:
    """Pairs that matter: in two splits, where scores come out too good, or in two classes, where one is wrong."""

    def concerns(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (everything.split_of[i] != everything.split_of[j]) | (everything.labels[i] != everything.labels[j])

    def pair(i: int, j: int, exact: bool) -> Pair:
        a, b = everything.fetch(i)[0], everything.fetch(j)[0]
        return Pair((a, b), (everything.split(i), everything.split(j)), (class_of(i), class_of(j)), exact)

    def class_of(place: int) -> str:
        label = int(everything.labels[place])
        return everything.named[0][1].classes[label] if label >= 0 else ""

    groups = equal_pictures(everything.sizes(), lambda place: everything.fetch(place)[1])
    # Of a group one picture of each split and class is paired with its first, so that n copies make no n^2 pairs.
    again = set()
    for group in groups or ():
        again.update(group[1:])
        kinds = {(everything.split_of[place], everything.labels[place]): place for place in reversed(group)}
        yield from (pair(group[0], place, True) for place in sorted(kinds.values()) if place != group[0])
    seen = np.array([place for place in seen.tolist() if place not in again], np.int64)
    if not len(seen):
        return
    near = near_pictures(np.stack([looks[place] for place in seen.tolist()]), lambda i, j: concerns(seen[i], seen[j]))
    yield from (pair(int(seen[i]), int(seen[j]), False) for i, j in near)


def _counted(split: str, counts: dict[str, int]) -> str:
    present = {name: count for name, count in counts.items() if count}
    total, low, high = sum(counts.values()), min(present.values(), default=0), max(present.values(), default=0)
    each = f"{low:,} each" if low == high else f"from {low:,} ({_rarest(present)}) to {high:,}"
    return f"{split}: {total:,} pictures of {len(present)} classes, {each}"


def _rarest(counts: dict[str, int]) -> str:
    return min(counts, key=lambda name: counts[name])


def _share(some: int, of: int) -> str:
    return f"{some:,} of {of:,} pictures ({some / max(of, 1):.1%})"


def _shown(pairs: list[Pair]) -> str:
    shown = [f"{a} = {b}" for a, b in (pair.names for pair in itertools.islice(pairs, 3))]
    return "; ".join(shown) + (f"; and {len(pairs) - 3:,} more" if len(pairs) > 3 else "")
