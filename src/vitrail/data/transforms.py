"""From a picture to the uint8 pixels a model is given: for evaluation, and Inception crops for training.

Unusual: there are two ways. Evaluation is one call of Pillow's `resize(box=)`, straight on a JPEG decoded at reduced
size; its filter sees the pixels just outside of the crop, so that a central crop is what resizing the whole picture and
then cropping gives. A training crop is cut out first and then resized, as torchvision and timm have it, by torch's
antialiased kernel for uint8, at a quarter of Pillow's time: bilinear pixels are Pillow's to one level (mean 0.02 on 80
photographs), bicubic ones too (mean 0.03) but where an overshoot at a hard edge is clipped between the two passes (28 at
most). Where the picture is there in reduced size (a large JPEG, a shrunk picture of `vitrail pack`) the crop does not
begin at a whole pixel, and goes the first way. Pixels stay uint8 until they are on the device, where
`Preprocess.normalize` makes them input. Flips and all other augmentation come later (augment.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Picture, Preprocess
from vitrail.data.decode import MODES, Box, UnreadablePicture, opened

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROPPED = ("bilinear", "bicubic")
"""What torch has a kernel for."""
ATTEMPTS = 10


@dataclass(frozen=True)
class Transform:
    """A picture to (channels, height, width) uint8 pixels, as `preprocess` has it.

    crop: "none" is evaluation: resize, then a central crop. "inception" is training: a random part of the picture,
        resized to `preprocess.size` whatever its shape (`preprocess.resize` plays no part).
    area: of the crop, as a fraction of the picture's; the official ViT code has (0.05, 1).
    ratio: of the crop's width to its height.
    """

    preprocess: Preprocess
    crop: Literal["none", "inception"] = "none"
    area: tuple[float, float] = (0.05, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        resize, size = self.preprocess.resize, self.preprocess.size
        smallest = (resize, resize) if isinstance(resize, int) else resize or size
        if smallest[0] < size[0] or smallest[1] < size[1]:
            raise UserError(
                f"a picture resized to {resize} is too small for a crop of {size}: "
                f"say so as --preprocess resize={size[0]}x{size[1]},size={size[0]}x{size[1]}."
            )
        if not (0 < self.area[0] <= self.area[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise UserError(f"a crop of area {self.area} and ratio {self.ratio} cannot be drawn: give low, then high.")

    @property
    def random(self) -> bool:
        """Whether it needs a generator."""
        return self.crop != "none"

    def __call__(self, picture: Picture, rng: np.random.Generator | None, name: str = "") -> UInt8[np.ndarray, "c h w"]:
        """Decodes and resamples one picture. Raises UnreadablePicture.

        When `random` it draws from `rng`, and a pixel's colours lie side by side in memory, as they were decoded:
        `Preprocess.normalize` puts planes behind one another on the device. Else, and of channels that are no colours,
        contiguous.
        """
        channels = self.preprocess.channels
        if channels not in MODES:
            return self._planes(picture, rng, name)
        height, width = self.preprocess.size
        with opened(picture, name) as file:
            box = self._inception_crop(file.size, rng) if self.random else self._central_crop(file.size)
            whole = (
                math.ceil(file.size[0] * height / (box[3] - box[1])),
                math.ceil(file.size[1] * width / (box[2] - box[0])),
            )
            if self.random and self.preprocess.interpolation in CROPPED:
                cut = file.crop(box, channels, whole)
                if cut is not None:
                    return _resized(cut, (height, width), self.preprocess.interpolation)
            image, filled = file.pixels(channels, whole, box)
            across, down = (filled[2] - filled[0]) / file.size[1], (filled[3] - filled[1]) / file.size[0]
            box = (
                max(0.0, filled[0] + box[0] * across),
                max(0.0, filled[1] + box[1] * down),
                min(float(image.width), filled[0] + box[2] * across),
                min(float(image.height), filled[1] + box[3] * down),
            )
            small = image.resize((width, height), FILTERS[self.preprocess.interpolation], box=box)
        planes = np.atleast_3d(np.asarray(small)).transpose(2, 0, 1)
        return np.array(planes, order="K" if self.random else "C")

    def room(self, rows: int, memory: UInt8[np.ndarray, "bytes"] | None = None) -> UInt8[np.ndarray, "rows c h w"]:
        """For so many pictures, not filled, laid out in memory as a call gives them; in memory of its own or in this."""
        channels, (height, width) = self.preprocess.channels, self.preprocess.size
        memory = np.empty(rows * channels * height * width, np.uint8) if memory is None else memory
        if self.random and channels in MODES:
            return memory.reshape(rows, height, width, channels).transpose(0, 3, 1, 2)
        return memory.reshape(rows, channels, height, width)

    def _planes(self, picture: Picture, rng: np.random.Generator | None, name: str) -> UInt8[np.ndarray, "c h w"]:
        """Arrays with channels that are no colours, one grey plane at a time, all cropped alike."""
        channels = self.preprocess.channels
        if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[2] != channels:
            raise UnreadablePicture(
                f"{name or 'the picture'} is no array of (height, width, {channels}), which the model's {channels} "
                "channels ask for."
            )
        grey = Transform(
            Preprocess(self.preprocess.size, self.preprocess.resize, self.preprocess.interpolation, (0.5,), (0.5,)),
            *(self.crop, self.area, self.ratio),
        )
        seed = 0 if rng is None else int(rng.integers(2**63))
        return np.concatenate(
            [grey(picture[:, :, plane], np.random.default_rng(seed), name) for plane in range(channels)]
        )

    def _central_crop(self, size: tuple[int, int]) -> Box:
        """The box in a picture of `size` that the model is given. The long side is cut off to whole pixels and the
        offset rounded to even, as torchvision and timm do."""
        (height, width), wanted, resize = size, self.preprocess.size, self.preprocess.resize
        if resize is None:
            return (0.0, 0.0, float(width), float(height))
        if isinstance(resize, int):
            short = min(height, width)
            resize = (int(resize * height / short), int(resize * width / short))
        top, left = (round((given - kept) / 2) for given, kept in zip(resize, wanted, strict=True))
        down, across = height / resize[0], width / resize[1]
        return (left * across, top * down, (left + wanted[1]) * across, (top + wanted[0]) * down)

    def _inception_crop(self, size: tuple[int, int], rng: np.random.Generator | None) -> Box:
        """The distribution of TensorFlow's `sample_distorted_bounding_box`, on which the paper's models were trained:
        the ratio is uniform, and then the height (not the area) between the bounds that area and picture leave. A crop
        holds 38 % of a square picture in the mean, where torchvision's RandomResizedCrop (uniform area, log-uniform
        ratio) holds 46 %. Where no crop fits, the largest central one of the nearest ratio is taken; TensorFlow takes
        the whole picture then, and squeezes it.
        """
        if rng is None:
            raise ValueError("an Inception crop draws from a generator, and none was given")
        height, width = size
        low, high = (fraction * height * width for fraction in self.area)
        for _ in range(ATTEMPTS):
            ratio = rng.uniform(*self.ratio)
            lowest = max(1, round(math.sqrt(low / ratio)))
            highest = min(round(math.sqrt(high / ratio)), height, int((width + 0.499) / ratio))
            if lowest > highest:
                continue
            tall = int(rng.integers(lowest, highest, endpoint=True))
            wide = round(tall * ratio)
            if 1 <= wide <= width:
                top = int(rng.integers(0, height - tall, endpoint=True))
                left = int(rng.integers(0, width - wide, endpoint=True))
                return (float(left), float(top), float(left + wide), float(top + tall))
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        wide, tall = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        left, top = (width - wide) // 2, (height - tall) // 2
        return (float(left), float(top), float(left + wide), float(top + tall))


def _resized(
    pixels: UInt8[np.ndarray, "h w c"], size: tuple[int, int], interpolation: str
) -> UInt8[np.ndarray, "c height width"]:
    given = np.ascontiguousarray(pixels)
    if not given.flags.writeable:
        given = given.copy()  # torch has no tensors that cannot be written to
    tensor = torch.from_numpy(given.reshape(1, *given.shape).transpose(0, 3, 1, 2))
    resized: np.ndarray = F.interpolate(tensor, size, mode=interpolation, antialias=True).numpy()[0]
    return resized


def read(pictures: Sequence[Picture], preprocess: Preprocess) -> UInt8[Tensor, "b c h w"]:
    """Pictures as a model's evaluation sees them: uint8, which a `Classifier` normalises. Raises UnreadablePicture."""
    transform = Transform(preprocess)
    shape = (0, preprocess.channels, *preprocess.size)
    pixels = [torch.from_numpy(transform(picture, None)) for picture in pictures]
    return torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8)
