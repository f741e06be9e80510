"""Common corruptions: fifteen of ImageNet-C and its four extra ones, each at five severities.

By the formulas of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (arXiv 1903.12261), constants from their repository hendrycks/robustness (ImageNet-C/create_c); written
anew. Unusual: which constants depends on the picture. From 64 pixels at the shorter side they are ImageNet-C's, below it
CIFAR-10-C's, which are weaker: a lens of 10 pixels' radius would leave nothing of a picture of 32.

At any size from 32 pixels. Three differ from the authors' files, as they do in imagecorruptions 1.1.2 (Michaelis et al.,
arXiv 1907.07484), which made them work at any size and is what the tests compare with: motion blur and snow's streaks are
computed and not ImageMagick's; elastic, from 64 pixels, has no affine part. And one is ours: frost is grown by a
formula and not cut from photographs (see weather.py). Glass blur copies pixels where the paper says that it swaps them, as
the authors' code does, whose two sides of an exchange are views of one array.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vitrail.analysis import weather
from vitrail.analysis.blurs import correlate, disk, gaussian, motion, sample, zoom
from vitrail.analysis.colours import from_hsv, to_hsv
from vitrail.core.errors import UserError

Corruption = Callable[[UInt8[np.ndarray, "h w 3"], int, np.random.Generator], UInt8[np.ndarray, "h w 3"]]
Formula = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
SMALLEST, SMALL = 32, 64


def gaussian_noise(x: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    return cut(x / 255 + generator.normal(size=x.shape, scale=deviation))


def shot_noise(x: np.ndarray, photons: int, generator: np.random.Generator) -> np.ndarray:
    """photons: how many are counted where it is white."""
    return cut(generator.poisson(x / 255.0 * photons) / float(photons))


def impulse_noise(x: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Salt and pepper alike, each number of each pixel by itself."""
    hit, white = generator.random(x.shape) <= share, generator.random(x.shape) <= 0.5
    return cut(np.where(hit, white, x / 255))


def speckle_noise(x: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    x = x / 255
    return cut(x + x * generator.normal(size=x.shape, scale=deviation))


def gaussian_blur(x: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    return cut(gaussian(x / 255, sigma))


def defocus_blur(x: np.ndarray, lens: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """lens: the radius of the disk that a point becomes, and how soft its rim is."""
    return cut(correlate(x / 255, disk(*lens)))


def glass_blur(x: np.ndarray, pane: tuple[float, int, int], generator: np.random.Generator) -> np.ndarray:
    """pane: blur before and after; how far a pixel may come from; how often all are moved."""
    sigma, reach, times = pane
    blurred = levels(gaussian(x / 255, sigma) * 255)
    height, width = blurred.shape[:2]
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    here = (rows[:, None] * width + columns).ravel()
    source = list(range(height * width))
    for _ in range(times):
        across, down = generator.integers(-reach, reach, size=(len(here), 2)).T
        # One after the other: what is copied may have been copied before.
        for place, other in zip(here.tolist(), (here + down * width + across).tolist(), strict=True):
            source[place] = source[other]
    return cut(gaussian(blurred.reshape(-1, 3)[source].reshape(blurred.shape) / 255, sigma))


def motion_blur(x: np.ndarray, camera: tuple[int, float], generator: np.random.Generator) -> np.ndarray:
    return np.clip(motion(x, *camera, angle=generator.uniform(-45, 45)), 0, 255)


def zoom_blur(x: np.ndarray, factors: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """The mean of the picture and of it at all zooms from 1 to below factors[0] in steps of factors[1]."""
    x = (x / 255).astype(np.float32)
    steps = np.arange(1, *factors)
    total = np.zeros_like(x)
    for factor in steps:
        total += zoom(x, factor)[: x.shape[0], : x.shape[1]]
    return cut((x + total) / (len(steps) + 1))


def brightness(x: np.ndarray, more: float, generator: np.random.Generator) -> np.ndarray:
    hsv = to_hsv(x / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + more, 0, 1)
    return cut(from_hsv(hsv))


def saturate(x: np.ndarray, change: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """change: the saturation's factor, and what is added."""
    hsv = to_hsv(x / 255)
    hsv[..., 1] = np.clip(hsv[..., 1] * change[0] + change[1], 0, 1)
    return cut(from_hsv(hsv))


def contrast(x: np.ndarray, kept: float, generator: np.random.Generator) -> np.ndarray:
    x = x / 255
    means = x.mean(axis=(0, 1), keepdims=True)
    return cut((x - means) * kept + means)


def elastic_transform(x: np.ndarray, rubber: tuple[float, float, float], generator: np.random.Generator) -> np.ndarray:
    """rubber: how far pixels are drawn, how smoothly, and how far the corners of a triangle: parts of the side."""
    x = (x / 255).astype(np.float32)
    size = x.shape[:2]
    strength, smooth, corners = rubber
    y, x_ = np.mgrid[: size[0], : size[1]].astype(np.float64)
    if corners:
        x = sample_affine(x, corners, generator)
    moves = []
    for _ in range(2):
        noise = gaussian(generator.uniform(-1, 1, size), (size[0] * smooth, size[1] * smooth), "symmetric", 3.0)
        moves.append((noise * (strength * size[0])).astype(np.float32))
    return cut(sample(x, y + moves[1], x_ + moves[0]))


def sample_affine(x: np.ndarray, corners: float, generator: np.random.Generator) -> np.ndarray:
    """Three points of the picture, each drawn up to `corners` of the side either way, and all else with them."""
    size = np.array(x.shape[:2])
    centre, reach = size[::-1] // 2, min(size) // 3
    before = np.array([centre + reach, centre + np.array([reach, -reach]), centre - reach], float)
    after = before + generator.uniform(-corners * size[0], corners * size[0], before.shape)
    back = np.linalg.solve(np.c_[after, np.ones(3)], before)
    y, x_ = np.mgrid[: size[0], : size[1]]
    found = np.stack([x_, y, np.ones_like(y)], -1) @ back
    return sample(x, found[..., 1], found[..., 0])


def pixelate(x: np.ndarray, way: tuple[float, Image.Resampling], generator: np.random.Generator) -> np.ndarray:
    """way: the part of the side that is left, and how it is brought back."""
    size = x.shape[1], x.shape[0]
    small = Image.fromarray(x).resize((int(size[0] * way[0]), int(size[1] * way[0])), Image.Resampling.BOX)
    return np.asarray(small.resize(size, way[1]))


def jpeg_compression(x: np.ndarray, quality: int, generator: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def cut(x: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
    """Numbers of [0, 1], cut to it, to 0..255."""
    return np.clip(x, 0, 1) * 255


def levels(x: np.ndarray) -> UInt8[np.ndarray, "h w c"]:
    """The fraction is dropped and not rounded, as in the published sets."""
    return x.astype(np.uint8)


_BOX, _NEAREST = Image.Resampling.BOX, Image.Resampling.NEAREST
# Name: formula, CIFAR-10-C's five constants (make_cifar_c.py), ImageNet-C's (make_imagenet_c.py; elastic: imagecorruptions).
TABLE: dict[str, tuple[Formula, tuple[Any, ...], tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
        ((3.0, 0.1), (4.0, 0.5), (6.0, 0.5), (8.0, 0.5), (10.0, 0.5)),
    ),
    "glass_blur": (
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (
        motion_blur,
        ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
        ((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0)),
    ),
    "zoom_blur": (
        zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (weather.snow, weather.SNOW_SMALL, weather.SNOW),
    "frost": (weather.frost, weather.FROST_SMALL, weather.FROST),
    "fog": (weather.fog, weather.FOG_SMALL, weather.FOG),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        elastic_transform,
        ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple((0.005 * 250 * k, 0.01, 0.0) for k in (0.05, 0.065, 0.085, 0.1, 0.12)),
    ),
    "pixelate": (
        pixelate,
        tuple((part, _BOX) for part in (0.95, 0.9, 0.85, 0.75, 0.65)),
        tuple((part, _NEAREST) for part in (0.6, 0.5, 0.4, 0.3, 0.25)),
    ),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "spatter": (weather.spatter, weather.SPATTER_SMALL, weather.SPATTER),
    "saturate": (
        saturate,
        ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),
        ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2)),
    ),
}


def corrupted(
    picture: UInt8[np.ndarray, "h w 3"], severity: int, generator: np.random.Generator, *, name: str
) -> UInt8[np.ndarray, "h w 3"]:
    """One picture at severity 1 to 5, drawn from `generator`. Raises UserError for a name, severity or size without one."""
    if name not in TABLE:
        raise UserError(f"there is no corruption {name!r}; there are {', '.join(TABLE)}")
    if not 1 <= severity <= 5:
        raise UserError(f"a corruption's severity is 1 to 5, not {severity}")
    if min(picture.shape[:2]) < SMALLEST:
        height, width = picture.shape[:2]
        raise UserError(f"corruptions are for pictures of at least {SMALLEST} pixels a side, not {height} x {width}")
    formula, small, large = TABLE[name]
    constants = small if min(picture.shape[:2]) < SMALL else large
    return levels(formula(picture, constants[severity - 1], generator))


CORRUPTIONS: dict[str, Corruption] = {name: partial(corrupted, name=name) for name in TABLE}
COMMON, EXTRA = tuple(TABLE)[:15], tuple(TABLE)[15:]


def corrupt(images: UInt8[Tensor, "b c h w"], name: str, severity: int, seed: int) -> UInt8[Tensor, "b c h w"]:
    """A batch of RGB pictures; each draws from its own generator, made of the seed and its place in the batch.

    Raises UserError as `corrupted` does, and for other than three channels.
    """
    if images.shape[1] != 3:
        raise UserError(f"corruptions are for pictures of 3 channels, not {images.shape[1]}")
    done = [
        corrupted(picture.permute(1, 2, 0).cpu().numpy(), severity, np.random.default_rng((seed, index)), name=name)
        for index, picture in enumerate(images)
    ]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).contiguous().to(images.device)
