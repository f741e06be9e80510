"""RandAugment's sixteen operations on batches of uint8 pixels, on any device.

Unusual: each is Pillow's own arithmetic, integer for integer, so that results can be compared bit for bit with Pillow's
(tests/test_augment_operations.py), and each picture of a batch draws its own operations. The set, the strengths and the
grey of 128 that fills what comes in are those of the code that AugReg was trained with (big_vision's and EfficientNet's
`distort_image_with_randaugment`), where a magnitude of 10 is AutoAugment's full strength.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

from vitrail.core.errors import UserError

Pixels = UInt8[Tensor, "b c h w"]
FILL = 128
# The official code's distances are in pixels of a 224 picture; here they are that part of any picture.
TRANSLATE, CUTOUT = 100 / 224, 40 / 224


def randaugment(pixels: Pixels, count: int, magnitude: float, rng: np.random.Generator) -> Pixels:
    """`count` operations on each picture, drawn for each picture alone from the sixteen, with replacement.

    As in the official code strength does not always grow with `magnitude`: posterize keeps int(0.4 m) bits and solarize
    inverts from int(25.6 m) on, so that both fade out as m grows; at 0 the enhancements blend 90 % away. Pictures have
    1 or 3 channels.
    """
    if pixels.shape[1] not in (1, 3):
        raise UserError(f"--randaugment works on pictures of 1 or 3 channels, not {pixels.shape[1]}: leave it out.")
    pixels = pixels.clone()
    for _ in range(count):
        drawn = rng.integers(len(OPERATIONS), size=pixels.shape[0])
        for number, operation in enumerate(OPERATIONS):
            rows = np.flatnonzero(drawn == number)
            if len(rows):
                chosen = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
                pixels[chosen] = operation(pixels[chosen], magnitude / 10, rng)
    return pixels


def autocontrast(pixels: Pixels) -> Pixels:
    """Stretches each channel to 0..255. Pillow computes this in floats, whose rounding may fall one level short."""
    values = pixels.flatten(2).int()
    low, high = values.amin(2)[..., None, None], values.amax(2)[..., None, None]
    stretched = (pixels.int() - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched, pixels.int()).to(torch.uint8)


def equalize(pixels: Pixels) -> Pixels:
    """Flattens each channel's histogram."""
    values = pixels.flatten(2).flatten(0, 1).long()
    histogram = torch.zeros(values.shape[0], 256, dtype=torch.long, device=pixels.device)
    histogram.scatter_add_(1, values, torch.ones_like(values))
    last = histogram.gather(1, values.amax(1, keepdim=True))
    step = (values.shape[1] - last) // 255
    table = (step // 2 + histogram.cumsum(1) - histogram) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(max=255), torch.arange(256, device=pixels.device))
    return table.gather(1, values).to(torch.uint8).view(pixels.shape)


def invert(pixels: Pixels) -> Pixels:
    return 255 - pixels


def posterize(pixels: Pixels, bits: int) -> Pixels:
    return pixels & (255 - (255 >> bits))


def solarize(pixels: Pixels, threshold: int) -> Pixels:
    return torch.where(pixels.int() < threshold, pixels, 255 - pixels)


def solarize_add(pixels: Pixels, addition: int) -> Pixels:
    """Brightens the darker half alone. Not in Pillow."""
    return torch.where(pixels < 128, (pixels.int() + addition).clamp(0, 255).to(torch.uint8), pixels)


def color(pixels: Pixels, factor: float) -> Pixels:
    return _blend(_grey(pixels), pixels, factor)


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Away from the mean grey, as in Pillow. The official code meant that too, but puts the number of pixels divided by
    256 in its place (196 for a 224 picture)."""
    grey = _grey(pixels).flatten(1).long()
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])
    return _blend(mean.int()[:, None, None, None], pixels, factor)


def brightness(pixels: Pixels, factor: float) -> Pixels:
    return _blend(torch.zeros_like(pixels, dtype=torch.int32), pixels, factor)


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Away from Pillow's SMOOTH: a 3 x 3 mean in which the centre counts five times; the border stays as it is."""
    smooth = pixels.int()
    height, width = pixels.shape[2:]
    if min(height, width) >= 3:
        total = 4 * smooth[:, :, 1:-1, 1:-1]
        for y in range(3):
            for x in range(3):
                total = total + smooth[:, :, y : height - 2 + y, x : width - 2 + x]
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(smooth, pixels, factor)


def affine(pixels: Pixels, matrix: Float[np.ndarray, "b 6"]) -> Pixels:
    """Output pixel (x, y) is the input pixel at (a x + b y + c, d x + e y + f), a row of `matrix` being a..f, in
    continuous coordinates (a pixel's centre lies at one half); nearest neighbour, in Pillow's 16.16 fixed point."""
    height, width = pixels.shape[2:]
    offset = matrix[:, 2::3] + (matrix[:, 0::3] + matrix[:, 1::3]) / 2
    fixed = np.floor(np.concatenate([matrix[:, 0::3], matrix[:, 1::3], offset], axis=1) * 65536 + 0.5).astype(np.int64)
    xx, yx, xy, yy, x0, y0 = torch.from_numpy(fixed).to(pixels.device).T[:, :, None, None]
    x = torch.arange(width, device=pixels.device)
    y = torch.arange(height, device=pixels.device)[:, None]
    column, row = (x0 + xx * x + xy * y) >> 16, (y0 + yx * x + yy * y) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten(1)[:, None]
    moved = pixels.flatten(2).gather(2, index.expand(-1, pixels.shape[1], -1)).view(pixels.shape)
    return torch.where(inside[:, None], moved, FILL)


def cutout(pixels: Pixels, half: Int[np.ndarray, "2"], centre: Int[np.ndarray, "b 2"]) -> Pixels:
    """Greys out the rectangle that reaches `half` (rows, columns) to each side of `centre`. Not in Pillow."""
    y, x = (np.arange(side) for side in pixels.shape[2:])
    rows = (y >= centre[:, :1] - half[0]) & (y < centre[:, :1] + half[0])
    columns = (x >= centre[:, 1:] - half[1]) & (x < centre[:, 1:] + half[1])
    inside = torch.from_numpy(rows[:, :, None] & columns[:, None, :]).to(pixels.device)
    return torch.where(inside[:, None], FILL, pixels)


def _grey(pixels: Pixels) -> Int32[Tensor, "b 1 h w"]:
    """ITU-R 601 luma in Pillow's integers."""
    if pixels.shape[1] == 1:
        return pixels.int()
    red, green, blue = pixels.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(origin: Int32[Tensor, "b #c #h #w"], pixels: Pixels, factor: float) -> Pixels:
    """origin + factor (pixels - origin), cut off to 0..255 and to whole levels."""
    return (origin + factor * (pixels.int() - origin)).clamp(0, 255).to(torch.uint8)


def _signs(rows: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice((-1.0, 1.0), rows)


def _matrix(rows: int, **entries: np.ndarray | float) -> np.ndarray:
    matrix = np.tile([1.0, 0, 0, 0, 1, 0], (rows, 1))
    for entry, value in entries.items():
        matrix[:, "abcdef".index(entry)] = value
    return matrix


def _rotate(pixels: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    height, width = pixels.shape[2:]
    angle = _signs(pixels.shape[0], rng) * math.radians(30 * level)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = width / 2, height / 2
    centred = {"c": x - cos * x - sin * y, "f": y + sin * x - cos * y}
    return affine(pixels, _matrix(pixels.shape[0], a=cos, b=sin, d=-sin, e=cos, **centred))


def _shear(entry: str) -> Callable[[Pixels, float, np.random.Generator], Pixels]:
    return lambda pixels, level, rng: affine(
        pixels, _matrix(pixels.shape[0], **{entry: _signs(pixels.shape[0], rng) * 0.3 * level})
    )


def _translate(entry: str, axis: int) -> Callable[[Pixels, float, np.random.Generator], Pixels]:
    return lambda pixels, level, rng: affine(
        pixels,
        _matrix(
            pixels.shape[0],
            **{entry: _signs(pixels.shape[0], rng) * round(TRANSLATE * level * pixels.shape[axis])},
        ),
    )


def _cutout(pixels: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    size = np.array(pixels.shape[2:])
    return cutout(pixels, np.rint(CUTOUT * level * size).astype(int), rng.integers(size, size=(pixels.shape[0], 2)))


OPERATIONS: tuple[Callable[[Pixels, float, np.random.Generator], Pixels], ...] = (
    lambda pixels, level, rng: autocontrast(pixels),
    lambda pixels, level, rng: equalize(pixels),
    lambda pixels, level, rng: invert(pixels),
    _rotate,
    lambda pixels, level, rng: posterize(pixels, min(8, int(4 * level))),
    lambda pixels, level, rng: solarize(pixels, int(256 * level)),
    lambda pixels, level, rng: solarize_add(pixels, int(110 * level)),
    lambda pixels, level, rng: color(pixels, 0.1 + 1.8 * level),
    lambda pixels, level, rng: contrast(pixels, 0.1 + 1.8 * level),
    lambda pixels, level, rng: brightness(pixels, 0.1 + 1.8 * level),
    lambda pixels, level, rng: sharpness(pixels, 0.1 + 1.8 * level),
    _shear("b"),
    _shear("d"),
    _translate("c", 3),
    _translate("f", 2),
    _cutout,
)
