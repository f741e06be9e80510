"""What spatter's water is drawn with: Canny's edges, the distance from them, and small filters, as OpenCV computes them.

Unusual: whole numbers wherever OpenCV has them (fifteen binary places for the tangent of 22.5 degrees, levels of 0..255
between filters), because each step after them amplifies a difference.
"""

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8

SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
# tan(22.5 degrees) in units of 2^-15.
TANGENT = 13573
# The lengths of a step beside, across and as a chess knight of a 5 x 5 distance (Borgefors 1986), in units of 2^-16.
STEPS = {(0, 1): 65536, (1, 1): 91750, (1, 2): 143976}


def canny(x: UInt8[np.ndarray, "h w"], low: int, high: int) -> Bool[np.ndarray, "h w"]:
    """Ridges of the gradient above `high`, and those above `low` that touch them (Canny 1986).

    Gradients by Sobel with the border told again; their size is |dx| + |dy|.
    """
    across, down = (_filtered(x.astype(np.int64), kernel, "edge") for kernel in (SOBEL, SOBEL.T))
    size = np.abs(across) + np.abs(down)
    flat, steep = np.abs(across) * TANGENT, np.abs(down) << 15
    around = np.pad(size, 1)
    at = {
        (i, j): around[1 + i : 1 + i + x.shape[0], 1 + j : 1 + j + x.shape[1]] for i in (-1, 0, 1) for j in (-1, 0, 1)
    }
    sideways = (size > at[0, -1]) & (size >= at[0, 1])
    upright = (size > at[-1, 0]) & (size >= at[1, 0])
    falling = (size > at[-1, -1]) & (size > at[1, 1])
    rising = (size > at[-1, 1]) & (size > at[1, -1])
    oblique = np.where((across ^ down) < 0, rising, falling)
    beyond = steep > flat + (np.abs(across) << 16)
    ridge = (size > low) & np.where(steep < flat, sideways, np.where(beyond, upright, oblique))
    edges = ridge & (size > high)
    while True:
        around = np.pad(edges, 1)
        near = np.lib.stride_tricks.sliding_window_view(around, (3, 3)).any((2, 3))
        grown = ridge & near
        if (grown == edges).all():
            return edges
        edges = grown


def distance_to(marked: Bool[np.ndarray, "h w"], most: int) -> Float[np.ndarray, "h w"]:
    """The length in pixels of the shortest way of STEPS to a marked one; `most` where it is no shorter."""
    height, width = marked.shape
    far = most << 16
    found = np.where(marked, 0, far)
    steps = {
        (i * down, j * across): length
        for (a, b), length in STEPS.items()
        for i, j in ((a, b), (b, a))
        for down in (-1, 1)
        for across in (-1, 1)
    }
    for _ in range(most):
        around = np.pad(found, 2, constant_values=far)
        ways = [around[2 + i : 2 + i + height, 2 + j : 2 + j + width] + length for (i, j), length in steps.items()]
        nearer = np.minimum(found, np.minimum.reduce(ways))
        if (nearer == found).all():
            break
        found = nearer
    return found / 65536


def equalized(x: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Levels spread so that they are used alike; the lowest becomes 0. One level alone stays what it is."""
    counts = np.bincount(x.ravel(), minlength=256)
    lowest = int(np.flatnonzero(counts)[0])
    if counts[lowest] == x.size:
        return x
    below = np.cumsum(counts) - counts[lowest]
    table = np.round(below.astype(np.float32) * np.float32(255 / (x.size - counts[lowest])))
    return np.clip(table, 0, 255).astype(np.uint8)[x]


def filter3(x: Num[np.ndarray, "h w"], kernel: Num[np.ndarray, "3 3"]) -> Num[np.ndarray, "h w"]:
    """Correlation; the picture is mirrored at its borders, the edge told once."""
    return _filtered(x, kernel, "reflect")


def _filtered(x: np.ndarray, kernel: np.ndarray, border: str) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, 1, mode=border), (3, 3))  # type: ignore[call-overload]
    return np.einsum("yxij,ij->yx", windows, kernel)
