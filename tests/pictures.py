"""Folders of small pictures that a small model can learn from, made on the spot."""

from pathlib import Path

import numpy as np
from PIL import Image


def folder(root: Path, classes: int = 3, each: int = 20, size: int = 20, seed: int = 0) -> Path:
    """`each` noisy PNG pictures of `size` pixels in each class folder, told apart by a little colour."""
    random = np.random.default_rng(seed)
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(each):
            picture(random, label, size).save(root / f"class{label}" / f"{number}.png")
    return root


def picture(random: np.random.Generator, label: int, size: int = 20) -> Image.Image:
    pixels = random.integers(0, 230, (size, size, 3))
    pixels[..., label % 3] += 25 * (1 + label // 3)
    return Image.fromarray(np.minimum(pixels, 255).astype(np.uint8))
