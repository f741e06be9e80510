"""What is measured: a model by name, with random weights, or a checkpoint, as a classifier."""

from pathlib import Path

import torch
from torch import nn

from vitrail.core.errors import UserError
from vitrail.models.classifier import Classifier, replace_head
from vitrail.weights import zoo
from vitrail.weights.load import load_any

CLASSES = 1000
"""Of a head where the model has none."""


def subject(name: str, size: int = 0) -> Classifier:
    """A name of `vitrail models`, a checkpoint's path or an id; for square pictures of `size` pixels, or its own.

    What has no head is given one of CLASSES classes, of random numbers: of a new head's zeros any two engines would have
    the same answers. Raises UserError.
    """
    image = (size, size) if size else None
    if size < 0:
        raise UserError(f"--size is {size}; give a side in pixels.")
    if Path(name).exists() or ":" in name or Path(name).suffix:
        model = load_any(name, image=image)
        return model if isinstance(model, Classifier) else _answering(replace_head(model, CLASSES))
    return _answering(zoo.create(name, classes=CLASSES, image=image))


def _answering(model: Classifier) -> Classifier:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.head.named_parameters():
        if name == "output.weight":
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def called(name: str) -> str:
    """A name for a record: of a path its last part, as nobody needs to know where it lay."""
    return Path(name).name if Path(name).is_absolute() else name
