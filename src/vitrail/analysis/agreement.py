"""Whether two models compute the same: every layer of both on one fixed picture, which is made here and never changes."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet
from vitrail.models.vit import ViT

Model = Classifier | ViT | ResNet

TOLERANCE = 2e-5
"""Of a layer's largest value: what fp32 arithmetic in another order makes of the same weights, with room to spare."""


@dataclass(frozen=True)
class Difference:
    """Of one layer: the largest difference of two numbers in the same place, and the largest number there."""

    layer: str
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        return self.difference / self.largest if self.largest else float(self.difference > 0)

    @property
    def equal(self) -> bool:
        return self.relative <= TOLERANCE


def reference_picture(size: tuple[int, int], channels: int = 3) -> UInt8[Tensor, "c h w"]:
    """Ramps, squares and rings in integer arithmetic: the same bytes on every machine, and no symmetry."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.int64)
    ring = (y - height // 3) ** 2 + (x - 2 * width // 3) ** 2
    layers = []
    for channel in range(channels):
        ramp = (255 * ((channel + 1) * y * width + (channels - channel) * x * height)) // (
            (channels + 1) * max(height * width, 1)
        )
        squares = 48 * ((y // 16 + x // 16 + channel) % 2)
        rings = (ring // (40 + 25 * channel)) % 64
        layers.append((ramp + squares + rings) % 256)
    return torch.from_numpy(np.stack(layers).astype(np.uint8))


@torch.inference_mode()
def layers_of(model: Model, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "..."]]:
    """Each block's (stage's) raw output, the features after the final norm, and what comes out, if there is a head."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    images = images.to(next(model.parameters()).dtype)
    features = backbone.features(images, keep=tuple(range(backbone.depth)))
    kind = "stage" if isinstance(backbone, ResNet) else "block"
    layers = {
        f"{kind} {number + 1}": torch.cat([layer.prefix, layer.tokens], dim=1)
        for number, layer in enumerate(features.layers)
    }
    layers["features"] = torch.cat([features.prefix, features.tokens], dim=1)
    if isinstance(model, Classifier):
        layers[model.config.output] = model(images)
    return layers


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[Difference, ...]:
    """Of every layer that both have, in order. Raises UserError where their shapes differ, or nothing is shared."""
    found = []
    for layer, x in ours.items():
        if layer not in theirs:
            continue
        y = theirs[layer]
        if x.shape != y.shape:
            raise UserError(
                f"the two cannot be compared: {layer} has the shape {tuple(x.shape)} in one and {tuple(y.shape)} in the "
                "other"
            )
        x, y = x.double(), y.double()
        found.append(Difference(layer, float((x - y).abs().max()), float(y.abs().max())))
    if not found:
        raise UserError(f"the two cannot be compared: one gives {', '.join(ours)}, and the other {', '.join(theirs)}")
    return tuple(found)
