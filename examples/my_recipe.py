"""A model and pictures of your own, trained by Vitrail: `vitrail run examples/my_recipe.py`, 10 s, 99 %.

The pictures are drawn when they are asked for. The model is Vitrail's backbone under a head of ours. All that a run
offers works on them too: flags, resume, the report, several processes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.core.types import Preprocess, Sample
from vitrail.data.splits import Splits
from vitrail.experiments.recipe import LengthSettings, Own, Recipe
from vitrail.models.vit import ViTConfig
from vitrail.training.optim import Optimiser

PREPROCESS = Preprocess(size=(32, 32))
BACKBONE = ViTConfig(64, 4, 2, 128, patch=(4, 4), image=(32, 32), class_token=False, positions="sincos2d")


@dataclass(frozen=True)
class Shapes:
    """A source: anything with these five. Data workers get a copy, so it stands at the top of the file."""

    count: int
    seed: int
    classes: tuple[str, ...] = ("circle", "square", "triangle")

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.count) % 3

    @property
    def fingerprint(self) -> str:
        return f"{self.count:08x}{self.seed:08x}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng((self.seed, index))
        size, middle = random.uniform(6, 11), random.uniform(12, 20, (2, 1, 1))
        y, x = np.mgrid[:32, :32] - middle
        shapes = (y**2 + x**2 < size**2, np.maximum(abs(y), abs(x)) < size, (abs(y) < size) & (2 * abs(x) < y + size))
        ink, paper = random.integers(0, 120, 3), random.integers(136, 256, 3)
        pixels = np.where(shapes[index % 3][..., None], ink, paper) + random.integers(-20, 21, (32, 32, 3))
        return Sample(f"shape {self.seed}-{index}", np.clip(pixels, 0, 255).astype(np.uint8), index % 3)


class TwoPools(nn.Module):
    """The head reads the mean and the maximum of the patches, side by side."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.backbone = BACKBONE.build()
        self.head = nn.Linear(2 * BACKBONE.width, len(classes))

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, 32, 32), uint8 pixels or already normalised, to logits (b, classes)."""
        images = PREPROCESS.normalize(images) if images.dtype == torch.uint8 else images
        tokens = self.backbone.features(images).tokens
        return self.head(torch.cat([tokens.mean(1), tokens.amax(1)], dim=-1))


recipe = Recipe(
    own=Own(
        splits=Splits(Shapes(3000, seed=1), Shapes(300, seed=2), Shapes(600, seed=3), "shapes", made=False),
        network=TwoPools,
        preprocess=PREPROCESS,
    ),
    optimiser=Optimiser(rate=3e-3),
    length=LengthSettings(steps=150),
)
