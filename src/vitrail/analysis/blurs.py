"""Filters, zooms and warps that the common corruptions are made of, on arrays of floating numbers.

Unusual: the order of each sum is part of the definition. A corrupted picture is cut to whole numbers at the end, so a
difference in the last bit shows as a whole level wherever a picture is flat. Where scipy's order of summation is known,
it is kept, and the results are scipy's to the bit; nothing here needs scipy or OpenCV.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num

# What stands beyond the border: the last number again; the picture mirrored with or without its edge told twice.
Border = Literal["edge", "symmetric", "reflect"]


def gaussian(
    x: Float[np.ndarray, "h w *c"], sigma: float | tuple[float, float], border: Border = "edge", truncate: float = 4.0
) -> Float[np.ndarray, "h w *c"]:
    """scipy.ndimage.gaussian_filter over the first two axes, to the bit: kernels cut at `truncate` deviations."""
    pair = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    for axis, deviation in enumerate(pair):
        radius = int(truncate * deviation + 0.5)
        if radius:
            offsets = np.arange(-radius, radius + 1)
            kernel = np.exp(-0.5 / (deviation * deviation) * offsets**2)
            x = _along(x, kernel / kernel.sum(), axis, border)
    return x


def _along(x: np.ndarray, kernel: np.ndarray, axis: int, border: Border) -> np.ndarray:
    radius, length = len(kernel) // 2, x.shape[axis]
    padded = np.pad(
        x.astype(np.float64), [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)], mode=border
    )
    total = _from(padded, radius, length, axis) * kernel[radius]
    for k in range(radius, 0, -1):
        pair = _from(padded, radius - k, length, axis) + _from(padded, radius + k, length, axis)
        total += pair * kernel[radius - k]
    return total.astype(x.dtype)


def _from(x: np.ndarray, start: int, length: int, axis: int) -> np.ndarray:
    return x[start : start + length] if axis == 0 else x[:, start : start + length]


def disk(radius: float, softness: float) -> Float[np.ndarray, "k k"]:
    """A lens out of focus: an even disk that sums to 1, its rim softened by a small Gaussian."""
    reach = 8 if radius <= 8 else int(radius)
    offsets = np.arange(-reach, reach + 1)
    inside = (offsets[:, None] ** 2 + offsets[None] ** 2 <= radius**2).astype(np.float32)
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    soft = np.exp(-(taps**2) / (2 * softness**2))
    soft = soft / soft.sum()
    kernel = inside / inside.sum()
    for axis in (0, 1):
        kernel = _along(kernel, soft, axis, "reflect")
    return kernel


def correlate(x: Float[np.ndarray, "h w *c"], kernel: Float[np.ndarray, "k l"]) -> Float[np.ndarray, "h w *c"]:
    """With any kernel of odd sides, a channel at a time; the picture is mirrored at its borders, its edge told once."""
    channels = torch.from_numpy(np.ascontiguousarray(x.reshape(*x.shape[:2], -1).transpose(2, 0, 1), np.float64))
    down, across = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(channels[:, None], (across, across, down, down), mode="reflect")
    found = F.conv2d(padded, torch.from_numpy(kernel.astype(np.float64))[None, None])[:, 0]
    return found.numpy().transpose(1, 2, 0).reshape(x.shape)


def motion(x: Num[np.ndarray, "h w *c"], radius: int, sigma: float, angle: float) -> Float[np.ndarray, "h w *c"]:
    """Moved while the shutter is open: copies along a line of 2 radius + 1 pixels, falling as half a Gaussian.

    angle: of the line in degrees, 0 to the left, 90 upwards. Pixels that come from beyond the border are the border's.
    """
    taps = 2 * radius + 1
    weights = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    weights = weights / np.sum(weights)
    down, across = taps * np.sin(np.deg2rad(angle)), taps * np.cos(np.deg2rad(angle))
    length = np.hypot(down, across)
    height, width = x.shape[:2]
    total = np.zeros(x.shape, np.float64)
    for i, weight in enumerate(weights):
        dy, dx = -int(np.ceil(i * down / length - 0.5)), -int(np.ceil(i * across / length - 0.5))
        if abs(dy) >= height or abs(dx) >= width:
            # What would come now is all border; the authors stop here, and the picture stays a little darker.
            break
        rows, columns = np.clip(np.arange(height) - dy, 0, height - 1), np.clip(np.arange(width) - dx, 0, width - 1)
        total += weight * x[rows[:, None], columns]
    return total


def zoom(x: Float[np.ndarray, "h w *c"], factor: float) -> Float[np.ndarray, "big wide *c"]:
    """The middle of the picture at `factor` times its size (at least 1), linear, corner pixels on corner pixels.

    A little larger than the picture where the size does not come out whole: the caller cuts.
    """
    for axis in (0, 1):
        cut = int(np.ceil(x.shape[axis] / float(factor)))
        x = _from(x, (x.shape[axis] - cut) // 2, cut, axis)
    size = [round(length * factor) for length in x.shape[:2]]
    steps = [(length - 1) / (out - 1) if out > 1 else 1.0 for length, out in zip(x.shape[:2], size, strict=True)]
    y, x_ = (np.arange(out) * step for out, step in zip(size, steps, strict=True))
    return sample(x, np.broadcast_to(y[:, None], size), np.broadcast_to(x_, size))


def sample(
    x: Float[np.ndarray, "h w *c"], y: Float[np.ndarray, "big wide"], x_: Float[np.ndarray, "big wide"]
) -> Float[np.ndarray, "big wide *c"]:
    """The picture at fractional places, linear between pixels; beyond its border it is mirrored, edge told twice."""
    top, left = np.floor(y), np.floor(x_)
    parts = [y - top, x_ - left]
    rows, columns = top.astype(int), left.astype(int)
    total = np.zeros((*y.shape, *x.shape[2:]), np.float64)
    for dy in (0, 1):
        for dx in (0, 1):
            share = (parts[0] if dy else 1 - parts[0]) * (parts[1] if dx else 1 - parts[1])
            found = x[_mirrored(rows + dy, x.shape[0]), _mirrored(columns + dx, x.shape[1])]
            total += found * share.reshape(share.shape + (1,) * (x.ndim - 2))
    return total.astype(x.dtype)


def _mirrored(index: Int[np.ndarray, "*any"], length: int) -> Int[np.ndarray, "*any"]:
    index = index % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


def plasma(size: int, decay: float, generator: np.random.Generator) -> Float[np.ndarray, "size size"]:
    """Clouds by diamonds and squares on a torus, from 0 to 1; `size` is a power of two.

    Each finer grid is the mean of its four neighbours plus noise that is `decay` times weaker, both in range and factor.
    """
    heights = np.zeros((size, size))
    step, noise = size, 100.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = _shaken(pairs + np.roll(pairs, -1, 1), noise, generator)
        middles = heights[half::step, half::step]
        beside = (middles + np.roll(middles, 1, 0)) + (corners + np.roll(corners, -1, 1))
        heights[::step, half::step] = _shaken(beside, noise, generator)
        above = (middles + np.roll(middles, 1, 1)) + (corners + np.roll(corners, -1, 0))
        heights[half::step, ::step] = _shaken(above, noise, generator)
        step, noise = half, noise / decay
    heights -= heights.min()
    return heights / heights.max()


def _shaken(sums: np.ndarray, noise: float, generator: np.random.Generator) -> np.ndarray:
    return sums / 4 + noise * generator.uniform(-noise, noise, sums.shape)
