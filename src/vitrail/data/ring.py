"""Memory into which data workers write batches, and out of which they are read where they lie; used again and again.

Unusual: sent through a queue, a batch travels in a file of shared memory of its own, whose pages are made, cleared and
mapped anew on either side: 0.15 ms a picture of 224 pixels, more than preparing a packed one takes. These pages are mapped
once. They are anonymous memory, which forked processes share, and no files in /dev/shm, for which containers often have
64 MB.

A place is given out again when nothing looks at it any more: neither the array that was lent nor a tensor made of it.
"""

import mmap
import weakref
from collections import deque

import numpy as np
from jaxtyping import UInt8


class Ring:
    """places: for so many batches. size: bytes of each. Raises OSError where there is no such memory."""

    def __init__(self, places: int, size: int) -> None:
        self._size = size
        self._memory = mmap.mmap(-1, places * size)
        self._free = deque(range(places))

    def taken(self) -> int | None:
        """A place that nobody uses, from now on in use; None where there is none."""
        return self._free.popleft() if self._free else None

    def at(self, place: int) -> UInt8[np.ndarray, "size"]:
        return np.frombuffer(self._memory, np.uint8, self._size, place * self._size)

    def freed_with(self, array: np.ndarray, place: int) -> None:
        """The place is free as soon as this array of it is gone. A tensor made of the array, and each view of that tensor,
        holds the array."""
        weakref.finalize(array, self._free.append, place).atexit = False
