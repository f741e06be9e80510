"""How torchvision's and timm's users make a training crop: rebuilt with Pillow, and by the libraries themselves.

Rebuilt, each step is theirs and none of the calls around it, which anybody can measure; neither library is a dependency.
Their own transforms are given the crop that is to be taken, and flip as they like.
"""

import importlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.core.types import Picture
from vitrail.data.decode import Box

LIBRARIES = {"torchvision": "bilinear", "timm": "bicubic"}
"""With the filter that each takes here: torchvision's default, and what timm's recipes name."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def loaded(picture: Picture) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture).convert("RGB")
    return Image.open(picture if isinstance(picture, Path) else BytesIO(picture)).convert("RGB")


def rebuilt(library: str, image: Image.Image, box: Box, size: int, flipped: bool) -> Any:
    """One crop: normalised floats (3, size, size) as torchvision has it, uint8 as timm has it."""
    kernel = Image.Resampling.BICUBIC if LIBRARIES[library] == "bicubic" else Image.Resampling.BILINEAR
    small = image.crop(box).resize((size, size), kernel)
    if flipped:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(small, np.uint8, copy=True)
    if library == "timm":
        return np.rollaxis(pixels, 2)
    floats = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255).clone()
    mean, deviation = (torch.as_tensor(each).view(-1, 1, 1) for each in (MEAN, DEVIATION))
    return floats.sub_(mean).div_(deviation)


def together(library: str, prepared: list[Any]) -> Tensor:
    """The batch of what `rebuilt` gives: default_collate's, or timm's fast_collate's."""
    if library == "torchvision":
        return torch.stack(prepared)
    batch = torch.zeros((len(prepared), *prepared[0].shape), dtype=torch.uint8)
    for place, pixels in enumerate(prepared):
        batch[place] += torch.from_numpy(pixels)
    return batch


def itself(library: str, size: int) -> tuple[Callable[[Image.Image, Box], Any], Callable[[list[Any]], Tensor]]:
    """One crop, and the batch of several, by the library's own transforms and collation. It must be there to be imported."""
    if library == "torchvision":
        vision: Any = importlib.import_module("torchvision.transforms")
        crop = vision.RandomResizedCrop(size)
        last = [vision.ToTensor(), vision.Normalize(MEAN, DEVIATION)]
        steps = vision.Compose([crop, vision.RandomHorizontalFlip(), *last])
        collate: Any = torch.utils.data.default_collate
    else:
        steps = importlib.import_module("timm.data").create_transform(
            (3, size, size), is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bicubic"
        )
        crop = steps.transforms[0]
        collate = importlib.import_module("timm.data.loader").fast_collate

    def prepare(image: Image.Image, box: Box) -> Any:
        left, top, right, bottom = map(int, box)
        crop.get_params = lambda *_: (top, left, bottom - top, right - left)
        return steps(image)

    return prepare, lambda prepared: collate([(each, 0) for each in prepared])[0]
