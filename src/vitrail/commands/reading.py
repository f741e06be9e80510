"""How a verb reads a checkpoint, and where it runs it: the flags that evaluate, probe and vtab have in common."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vitrail.core.device import Precision, pick_device
from vitrail.models.classifier import Classifier
from vitrail.weights.load import Model, load, load_any


@dataclass(frozen=True)
class Checkpoint:
    """Of the checkpoint and the device."""

    device: str = ""
    """cpu, cuda, cuda:1, mps; none: the fastest there is."""
    precision: Precision = "fp32"
    """Of matrix products; bf16 is faster on most GPUs and changes probabilities in the third digit."""
    heads: int | None = None
    """Attention heads, for checkpoints of other libraries that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, likewise."""
    preprocess: str = ""
    """Preprocessing, where the checkpoint does not state it: as imagenet,bicubic,resize=256,size=224."""

    def on(self) -> torch.device:
        """Raises UserError on a device that is not there."""
        return pick_device(self.device or None)

    def classifier(self, weights: Path) -> Classifier:
        """A checkpoint with a head, on the device. Raises UserError."""
        device = self.on()
        return load(str(weights), heads=self.heads, grid=self.grid, preprocess=self.preprocess or None).to(device)

    def model(self, weights: Path) -> Model:
        """A checkpoint with a head or without one, likewise."""
        device = self.on()
        return load_any(str(weights), heads=self.heads, grid=self.grid, preprocess=self.preprocess or None).to(device)
