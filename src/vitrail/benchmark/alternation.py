"""Fair comparison of any number of things that take time: in turns, medians, an interval without assumptions.

A side is a function without arguments that does its work once. Sides take turns within a round, so that what drifts or
disturbs hits all alike; a ratio is of the medians over the rounds, and its interval resamples whole rounds.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Side = Callable[[], object]
SHORTEST = 0.05
"""Seconds that a side's turn takes at least: quicker work is repeated within its turn."""


@dataclass(frozen=True)
class Ratio:
    """value: of two medians; low, high: its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def alternate(
    sides: Mapping[str, Side],
    *,
    rounds: int = 0,
    seconds: float = 0.0,
    least: int = 5,
    each: Callable[[int], None] | None = None,
    shortest: float = SHORTEST,
    finish: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of one piece of work of each side, a number a round; all sides have equally many.

    rounds: how many; or, where 0, as many as fit into `seconds`, but `least` of them. `each` is told the number of every
    round done. The order of a round is drawn, and turned round in the next.
    shortest: seconds of a turn, within which quick work is repeated; for that each side works twice before the first
    round, unmeasured. 0: no such beginning, and each turn is one piece of work.
    finish: the end of a turn, and part of it: waiting for a device, once, as who gives it work without looking would.
    """
    repeats = dict.fromkeys(sides, 1)
    for name, side in sides.items() if shortest else ():
        _timed(side, 1, finish)
        repeats[name] = max(1, round(shortest / max(_timed(side, 1, finish), 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in sides}
    random, names = np.random.default_rng(seed), list(sides)
    end, done = time.monotonic() + seconds, 0
    while done < rounds if rounds else (done < least or time.monotonic() < end):
        names = [names[place] for place in random.permutation(len(names))] if done % 2 == 0 else names[::-1]
        for name in names:
            taken[name].append(_timed(sides[name], repeats[name], finish))
        done += 1
        if each is not None:
            each(done)
    return taken


def ratio(first: list[float], second: list[float], draws: int = 4000, seed: int = 0) -> Ratio:
    """The median of `first` over the median of `second`: how many times faster the second is, both in seconds.

    Resampled by rounds, in which the two stood side by side. Both have equally many.
    """
    pairs = np.array([first, second])
    drawn = np.random.default_rng(seed).integers(pairs.shape[1], size=(draws, pairs.shape[1]))
    upper, lower = np.median(pairs[:, drawn], axis=2)
    low, high = np.quantile(upper / lower, (0.025, 0.975))
    value = np.median(pairs[0]) / np.median(pairs[1])
    return Ratio(float(value), float(low), float(high))


def _timed(side: Side, repeats: int, finish: Callable[[], object]) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        side()
    finish()
    return (time.perf_counter() - begun) / repeats
