"""What the numbers of ImageNet's heads mean. The files beside this one, their source and licence: labels/LICENSE."""

import functools
from importlib.resources import files

IMAGENET_1K = 1000
IMAGENET_21K = 21_843
"""Classes in Google's ImageNet-21k; other orders have 21,841 or 21,842 and are not guessed."""


def imagenet1k() -> tuple[str, ...]:
    """Names of the 1000 classes in the order of every public head: by WordNet id."""
    return _names("imagenet1k.txt")


def imagenet1k_ids() -> tuple[str, ...]:
    """The same as WordNet ids, "n01440764", as ImageNet's folders are called."""
    return tuple(key for key, _ in _lines("imagenet1k.txt"))


def imagenet21k() -> tuple[str, ...]:
    """Names of Google's 21,843 classes, in the order of its heads."""
    return _names("imagenet21k.txt")


def imagenet21k_ids() -> tuple[str, ...]:
    return tuple(key for key, _ in _lines("imagenet21k.txt"))


@functools.cache
def real() -> tuple[tuple[int, ...], ...]:
    """ReaL (arXiv 2006.07159): for each of the 50,000 validation pictures of ImageNet in the order of their file names,
    all classes that are right; none for 3,163 pictures, which do not count."""
    text = (files(__package__) / "labels" / "imagenet_real.txt").read_text(encoding="utf-8")
    return tuple(tuple(map(int, line.split())) for line in text.splitlines())


@functools.cache
def _lines(name: str) -> tuple[tuple[str, str], ...]:
    text = (files(__package__) / "labels" / name).read_text(encoding="utf-8")
    return tuple((key, words) for key, words in (line.split("\t") for line in text.splitlines()))


@functools.cache
def _names(name: str) -> tuple[str, ...]:
    """Each name once: of two classes that are called the same (crane, bird or machine), each is given its id."""
    lines = _lines(name)
    seen: dict[str, int] = {}
    for _, words in lines:
        seen[words] = seen.get(words, 0) + 1
    return tuple(words if seen[words] == 1 else f"{words} ({key})" for key, words in lines)
