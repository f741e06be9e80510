"""Snow, frost, fog and spatter of the common corruptions (corruptions.py has the others, and the sources).

Unusual: frost. The authors cut it from photographs, which are not ours to hand on. Here it is grown: needles of all
lengths on clouds, whose power falls with about the square of the frequency, as theirs falls, with the mean colour and
deviation of one of theirs, drawn alike; how it is laid on the picture is their formula. Spatter's water needs Canny's
edges and a distance from them, which are written out in edges.py.
"""

import numpy as np
from PIL import Image, ImageDraw

from vitrail.analysis.blurs import gaussian, motion, plasma, zoom
from vitrail.analysis.edges import canny, distance_to, equalized, filter3

# Snow's mean and deviation, its zoom, from where a flake is one, the streaks' radius and sigma, the picture's share.
SNOW = (
    (0.1, 0.3, 3.0, 0.5, 10.0, 4.0, 0.8),
    (0.2, 0.3, 2.0, 0.5, 12.0, 4.0, 0.7),
    (0.55, 0.3, 4.0, 0.9, 12.0, 8.0, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12.0, 8.0, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12.0, 12.0, 0.55),
)
SNOW_SMALL = (
    (0.1, 0.2, 1.0, 0.6, 8.0, 3.0, 0.95),
    (0.1, 0.2, 1.0, 0.5, 10.0, 4.0, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10.0, 4.0, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12.0, 6.0, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14.0, 12.0, 0.8),
)
# What is left of the picture, and how much frost is added.
FROST = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
FROST_SMALL = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
# How thick it is, and how smooth.
FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
FOG_SMALL = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))
# The drops' mean and deviation, their blur, from where a drop is one, how strong, and whether it is mud.
SPATTER = (
    (0.65, 0.3, 4.0, 0.69, 0.6, 0.0),
    (0.65, 0.3, 3.0, 0.68, 0.6, 0.0),
    (0.65, 0.3, 2.0, 0.68, 0.5, 0.0),
    (0.65, 0.3, 1.0, 0.65, 1.5, 1.0),
    (0.67, 0.4, 1.0, 0.65, 1.5, 1.0),
)
SPATTER_SMALL = (
    (0.62, 0.1, 0.7, 0.7, 0.5, 0.0),
    (0.65, 0.1, 0.8, 0.7, 0.5, 0.0),
    (0.65, 0.3, 1.0, 0.69, 0.5, 0.0),
    (0.65, 0.1, 0.7, 0.69, 0.6, 1.0),
    (0.65, 0.1, 0.5, 0.68, 0.6, 1.0),
)
WATER, MUD = np.array([175, 238, 238], np.float32) / 255, np.array([63, 42, 20], np.float32) / 255
GREY = np.array([0.299, 0.587, 0.114], np.float32)
# Mean and deviation of red, green and blue of the five pictures that the authors' code draws from; two are the same.
FROSTS = (
    ((78, 149, 166), (27, 16, 15)),
    ((201, 205, 214), (21, 22, 23)),
    ((201, 205, 214), (21, 22, 23)),
    ((138, 153, 165), (28, 28, 30)),
    ((112, 123, 135), (44, 43, 42)),
)
# Needles laid down, for each square of the shortest one's length, and that length in pixels.
NEEDLES, SHORTEST = 1, 4


def snow(x: np.ndarray, flakes: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    mean, deviation, larger, threshold, radius, sigma, kept = flakes
    x = x.astype(np.float32) / np.float32(255)
    layer = zoom(generator.normal(size=x.shape[:2], loc=mean, scale=deviation)[..., None], larger)
    layer[layer < threshold] = 0
    layer = motion(np.clip(layer[..., 0], 0, 1), int(radius), sigma, generator.uniform(-135, -45))
    layer = (np.round(layer * 255).astype(np.uint8) / 255)[: x.shape[0], : x.shape[1], None]
    grey = (x @ GREY)[..., None]
    x = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return np.clip(x + layer + np.rot90(layer, 2), 0, 1) * 255


def frost(x: np.ndarray, shares: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    mean, deviation = (np.array(numbers) for numbers in FROSTS[generator.integers(5)])
    return frosted(x, shares, mean + deviation * ice((x.shape[0], x.shape[1]), generator)[..., None])


def frosted(x: np.ndarray, shares: tuple[float, float], layer: np.ndarray) -> np.ndarray:
    return np.clip(shares[0] * x + shares[1] * layer, 0, 255)


def ice(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Needles laid over each other, (h, w), of mean 0 and deviation 1: a dead-leaves picture (Lee, Mumford, Huang 2001)
    whose needles' lengths fall by a power, so that what is seen has no scale of its own; on clouds.
    """
    height, width = size
    count = NEEDLES * height * width // SHORTEST**2
    lengths = np.minimum(SHORTEST * generator.random(count) ** -0.5, max(size) / 2)
    angles = generator.random(count) * 2 * np.pi
    along = np.stack([np.cos(angles), np.sin(angles)], -1) * lengths[:, None]
    across = along[:, ::-1] * [-1, 1] * generator.uniform(0.04, 0.16, (count, 1))
    middles = generator.random((count, 2)) * (width, height)
    corners = np.stack([middles + along, middles + across, middles - along, middles - across], 1)
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for needle, level in zip(corners, generator.integers(0, 256, count).tolist(), strict=True):
        draw.polygon([tuple(corner) for corner in needle], fill=level)
    needles, ground = np.asarray(canvas).astype(np.float64), cloud(size, 1.6, generator)
    grown = needles / needles.std() + ground / ground.std()
    return (grown - grown.mean()) / grown.std()


def fog(x: np.ndarray, bank: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    thick, smooth = bank
    x = x / 255
    brightest = x.max()
    x = x + thick * cloud((x.shape[0], x.shape[1]), smooth, generator)[..., None]
    return np.clip(x * brightest / (brightest + thick), 0, 1) * 255


def cloud(size: tuple[int, int], decay: float, generator: np.random.Generator) -> np.ndarray:
    """The corner of a plasma whose side is the next power of two."""
    return plasma(1 << (max(size) - 1).bit_length(), decay, generator)[: size[0], : size[1]]


def spatter(x: np.ndarray, drops: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    mean, deviation, blur, threshold, strength, mud = drops
    x = x.astype(np.float32) / np.float32(255)
    layer = gaussian(generator.normal(size=x.shape[:2], loc=mean, scale=deviation), blur)
    layer[layer < threshold] = 0
    if mud:
        cover = gaussian((layer > threshold).astype(np.float32), strength)[..., None]
        cover[cover < 0.8] = 0
        return np.clip(x * (1 - cover) + MUD * cover, 0, 1) * 255
    liquid = (layer * 255).astype(np.uint8)
    rim = distance_to(canny(liquid, 50, 150), 20)
    rim = equalized((filter3(rim, np.ones((3, 3))) * (1 / 9)).astype(np.float32).astype(np.uint8)).astype(np.float64)
    relief = np.clip(filter3(rim, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])), 0, 255)
    # Whole numbers again, as OpenCV keeps them.
    relief = np.round(filter3(relief, np.ones((3, 3))) / 9)
    lit = (liquid * relief).astype(np.float32)
    return np.clip(x + lit[..., None] / max(lit.max(), 1) * np.float32(strength) * WATER, 0, 1) * 255
