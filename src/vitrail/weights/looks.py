"""How pictures are made for a public model, where its files do not say it or say more than a Preprocess can hold."""

from dataclasses import replace

from vitrail.core.types import Interpolation, Preprocess
from vitrail.models.vit import ViTConfig

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and deviation: the three normalisations that public ViTs were trained with."""


def assumed(
    image: tuple[int, int],
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    interpolation: Interpolation,
    enlarged: float | None = 256 / 224,
    channels: int = 3,
) -> Preprocess:
    """A way of looking at pictures that a file does not state.

    enlarged: how much longer the picture's shorter side is made than what is cropped; None resizes to `image` itself.
    """
    mean, deviation = normalisation if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    resize = None if enlarged is None else int(min(image) * enlarged)
    return Preprocess(image, resize, interpolation, mean, deviation)


def fitted(preprocess: Preprocess, config: ViTConfig, notes: list[str]) -> Preprocess:
    """For a size that patches do not fill: the libraries leave out the last rows and columns, we those at both ends."""
    size = preprocess.size
    height, width = ((length // side) * side for length, side in zip(size, config.stride, strict=True))
    if (height, width) == size or not height or not width:
        return preprocess
    notes.append(
        f"patches do not fill pictures of {size[0]} x {size[1]}: their middle {height} x {width} pixels are taken, where "
        "its library takes the first ones"
    )
    return replace(preprocess, size=(height, width), resize=size if preprocess.resize is None else preprocess.resize)
