"""How torchvision's and timm's users make training crops: rebuilt with Pillow, and by the libraries themselves.

Rebuilt, each step is theirs and none of the calls around it, which anybody can measure; neither library is a dependency.
Their own transforms are given the crop that is to be taken, and flip as they like.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.core.types import Picture, Preprocess, Source
from vitrail.data.decode import Box
from vitrail.data.transforms import Transform
from vitrail.weights.looks import IMAGENET

LIBRARIES = {"torchvision": "bilinear", "timm": "bicubic"}
"""With the filter that each takes here: torchvision's default, and what timm's recipes name."""
MEAN, DEVIATION = IMAGENET

Crop = Callable[[Image.Image, Box, np.random.Generator], Any]
"""From a picture to what is collated: floats (3, size, size) of torchvision's users, uint8 of timm's."""
Collate = Callable[[list[Any]], Tensor]


@dataclass(frozen=True)
class Pipeline:
    """A picture to one training crop, and crops to a batch. The crops are those that ours would be."""

    transform: Transform
    crop: Crop
    collate: Collate

    @classmethod
    def of(cls, library: str, size: int, own: bool) -> "Pipeline":
        """own: by the library's own transforms; it must be there to be imported."""
        transform = Transform(Preprocess((size, size), None, "bilinear", MEAN, DEVIATION), "inception")
        made = _own(library, size) if own else (partial(_rebuilt, library, size), partial(_together, library))
        return cls(transform, *made)

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Any:
        if isinstance(picture, np.ndarray):
            image: Image.Image = Image.fromarray(picture)
        else:
            image = Image.open(picture if isinstance(picture, Path) else BytesIO(picture))
        image = image.convert("RGB")
        return self.crop(image, self.transform._inception_crop((image.height, image.width), rng), rng)


@dataclass(frozen=True)
class Crops:
    """What a data worker of theirs holds; asked for (the number of a crop, the place of its picture)."""

    source: Source
    pipeline: Pipeline

    def __getitem__(self, asked: tuple[int, int]) -> Any:
        number, place = asked
        return self.pipeline(self.source[place].picture, np.random.default_rng(number))


def _rebuilt(library: str, size: int, image: Image.Image, box: Box, rng: np.random.Generator) -> Any:
    kernel = Image.Resampling.BICUBIC if LIBRARIES[library] == "bicubic" else Image.Resampling.BILINEAR
    small = image.crop(box).resize((size, size), kernel)
    if rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(small, np.uint8, copy=True)
    if library == "timm":
        return np.rollaxis(pixels, 2)
    floats = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255).clone()
    mean, deviation = (torch.as_tensor(each).view(-1, 1, 1) for each in (MEAN, DEVIATION))
    return floats.sub_(mean).div_(deviation)


def _together(library: str, crops: list[Any]) -> Tensor:
    """As default_collate, and timm's fast_collate, have it."""
    if library == "torchvision":
        return torch.stack(crops)
    batch = torch.zeros((len(crops), *crops[0].shape), dtype=torch.uint8)
    for place, pixels in enumerate(crops):
        batch[place] += torch.from_numpy(pixels)
    return batch


def _own(library: str, size: int) -> tuple[Crop, Collate]:
    if library == "torchvision":
        vision: Any = importlib.import_module("torchvision.transforms")
        cropping = vision.RandomResizedCrop(size)
        last = [vision.ToTensor(), vision.Normalize(MEAN, DEVIATION)]
        steps = vision.Compose([cropping, vision.RandomHorizontalFlip(), *last])
        collate: Any = torch.utils.data.default_collate
    else:
        steps = importlib.import_module("timm.data").create_transform(
            (3, size, size), is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bicubic"
        )
        cropping = steps.transforms[0]
        collate = importlib.import_module("timm.data.loader").fast_collate

    def crop(image: Image.Image, box: Box, rng: np.random.Generator) -> Any:
        left, top, right, bottom = map(int, box)
        cropping.get_params = lambda *_: (top, left, bottom - top, right - left)
        return steps(image)

    return crop, lambda crops: collate([(each, 0) for each in crops])[0]
