"""RGB to hue, saturation and value, and back, in the arithmetic of Smith 1978 ("Color gamut transform pairs")."""

import numpy as np
from jaxtyping import Float


def to_hsv(rgb: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """All six numbers lie in [0, 1]; where there is no colour, hue and saturation are 0."""
    value, delta = rgb.max(-1), np.ptp(rgb, axis=-1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    safe = np.where(delta == 0, 1, delta)
    # Of equal largest channels the last one decides.
    hue = np.select(
        [blue == value, green == value], [4 + (red - green) / safe, 2 + (blue - red) / safe], (green - blue) / safe
    )
    hue = np.where(delta == 0, 0, (hue / 6) % 1)
    return np.stack([hue, np.where(delta == 0, 0, delta / np.where(value == 0, 1, value)), value], -1)


def from_hsv(hsv: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    sector = np.floor(hue * 6)
    part = hue * 6 - sector
    low = value * (1 - saturation)
    falling, rising = value * (1 - part * saturation), value * (1 - (1 - part) * saturation)
    sector = sector.astype(int) % 6
    return np.stack(
        [
            np.choose(sector, [value, falling, low, low, rising, value]),
            np.choose(sector, [rising, value, value, falling, low, low]),
            np.choose(sector, [low, low, rising, value, value, falling]),
        ],
        -1,
    )
