"""Whether a difference is more than chance, and how sure a model must be to keep a promise. Exact, from the binomial
distribution itself: pictures are few where people ask."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

SURE = 0.05
"""How often a promise that is kept here may still be broken, by chance."""


def mcnemar(first: Bool[np.ndarray, "n"], second: Bool[np.ndarray, "n"]) -> float:
    """The chance (two-sided, exact) of pictures parting two equally good models at least this unevenly (McNemar 1947).

    first, second: where each is right, on the same pictures; only those that one alone gets right count.
    """
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return min(1.0, 2 * _at_most(min(gained, lost), gained + lost, 0.5))


@dataclass(frozen=True)
class Threshold:
    """confidence: the least that an answer is trusted from; above 1 where no threshold keeps the promise.

    accuracy: of the trusted ones, with its lower bound (one-sided 95 %, Clopper and Pearson 1934). trusted, of: how many of
    the held-out pictures are trusted, and how many there were.
    """

    confidence: float
    accuracy: float
    low: float
    trusted: int
    of: int


def threshold(confidence: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"], promise: float) -> Threshold:
    """The lowest confidence from which on the answers are right at the promised rate, judged by the lower bound.

    confidence: in [0, 1], of answers to pictures that the model was not trained on. promise: in (0, 1).
    """
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence, hits = confidence[order], np.cumsum(right[order])
    # Equal confidences are trusted together.
    ends = np.flatnonzero(np.append(sorted_confidence[1:] < sorted_confidence[:-1], True)) if order.size else order
    for end in ends[::-1].tolist():
        count, hit = end + 1, int(hits[end])
        if hit >= promise * count and _at_most(count - hit, count, 1 - promise) <= SURE:
            return Threshold(float(sorted_confidence[end]), hit / count, lower_bound(hit, count), count, order.size)
    return Threshold(math.inf, 0.0, 0.0, 0, order.size)


def lower_bound(hits: int, count: int) -> float:
    """The proportion below which `hits` of `count`, or more, would come in fewer than 5 % of cases."""
    low, high = 0.0, hits / count if count else 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(count - hits, count, 1 - middle) <= SURE else (low, middle)
    return low


def _at_most(hits: int, count: int, chance: float) -> float:
    """The probability of `hits` or fewer in `count` draws."""
    if hits >= count or chance <= 0:
        return 1.0
    if chance >= 1:
        return 0.0
    first = math.lgamma(count + 1)
    terms = [
        first
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(chance)
        + (count - k) * math.log1p(-chance)
        for k in range(hits + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, terms)))
