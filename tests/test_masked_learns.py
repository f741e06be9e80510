"""Masked patch prediction learns what pictures look like: a probe on its features against one on random weights."""

import pytest
import torch
from torch import Tensor

from vitrail.core.types import Preprocess, Source
from vitrail.data.augment import Augmentation
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import read_sample, subset
from vitrail.data.transforms import Transform
from vitrail.evaluation.linear import linear
from vitrail.evaluation.metrics import NORMAL_95
from vitrail.inference.features import reader
from vitrail.models.masked import MaskedPatchConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.objectives.masked import MaskedPatches
from vitrail.training.loop import fit
from vitrail.training.optim import Optimiser, Schedule
from vitrail.training.pace import Pace

LOOKS = Preprocess((28, 28))
TINY = ViTConfig(32, 2, 2, 128, (7, 7), (28, 28), class_token=False, positions="sincos2d")


def pixels(source: Source) -> Tensor:
    """(n, c, h, w) uint8; read once, for all the models that are probed."""
    transform, samples = Transform(LOOKS), (source[index] for index in range(len(source)))
    return torch.stack([torch.from_numpy(transform(sample.picture, None, sample.name)) for sample in samples])


@pytest.mark.unhooked
def test_its_features_beat_random_ones() -> None:
    """400 steps on 4,000 pictures of sample:fashion, whose labels are not read: 6 points, more or less 2."""
    pictures, new = read_sample("fashion", "train"), read_sample("fashion", "test")
    seen, known = subset(pictures, range(4_000)), subset(pictures, range(4_000, 6_000))
    batch, steps = 64, 400
    config = MaskedPatchConfig(TINY, "pixels")
    model = config.build(seed=0)
    fit(
        model,
        lambda network: MaskedPatches(network, config, LOOKS, Augmentation()),
        PictureLoader(seen, Transform(LOOKS), Order(len(seen), batch, batch * steps), workers=0, hold=True),
        optimiser=Optimiser(rate=5e-3),
        schedule=Schedule(warmup=0),
        pace=Pace(evaluate_every=steps, log_every=steps),
        device=torch.device("cpu"),
    )
    train, test = pixels(known), pixels(new)

    def right(backbone: ViT) -> Tensor:
        """(n,) 1 for each new picture that a linear probe on the features is right about."""
        backbone.preprocess = LOOKS
        read = reader(backbone.eval())
        with torch.no_grad():
            features, others = (torch.cat([read(part) for part in each.split(250)]) for each in (train, test))
        head = linear(features, torch.from_numpy(known.labels.copy()), len(known.classes)).head
        return (head(others).argmax(1) == torch.from_numpy(new.labels.copy())).double()

    random = max((right(TINY.build(seed)) for seed in (1, 2)), key=lambda some: float(some.mean()))
    each = right(model.backbone) - random
    half = NORMAL_95 * float(each.std()) / each.shape[0] ** 0.5
    assert float(each.mean()) > half, f"{100 * each.mean():.1f} points, more or less {100 * half:.1f}"
