"""How `vitrail fit` fine-tunes: gently, for what is good already must not be lost.

From the head that was solved on frozen features, so that the first gradients are small and true. On imagenette-small (480
pictures to train on, 120 held out, 300 validation) with a DINOv2-S/14, a batch of 16 and one epoch brought the held-out
accuracy from 89.2 to 95.0 % and the validation's from 90.3 to 96.0 % at a rate of 1e-4, and to 93.3 and 96.7 % at 2e-4;
three epochs of batches of 32 at 1e-4 came to 95.0 and 96.0 % (one seed each).
"""

import dataclasses
from pathlib import Path

import torch

from vitrail.core.device import Precision
from vitrail.data.augment import Augmentation
from vitrail.experiments.first_answer import FirstAnswer, workers
from vitrail.experiments.photos_data import Photos
from vitrail.experiments.recipe import DataSettings, LengthSettings, ModelSettings, Recipe, RunSettings
from vitrail.training.optim import Optimiser

MOST_EPOCHS = 10.0
STEP = 3.5
"""What a training step costs a picture, in forward passes."""


def gentle(
    settings: RunSettings,
    photos: Photos,
    first: FirstAnswer,
    start: Path,
    seconds: float,
    device: torch.device,
    precision: Precision,
) -> Recipe:
    """Small steps, smaller ones for early layers, few epochs; as many as `seconds` hold. start: the first answer's file."""
    epochs = min(seconds / epoch_seconds(first, photos), MOST_EPOCHS)
    return Recipe(
        data=DataSettings(
            size=first.start.preprocess.size,
            crop="inception",
            batch=batch_size(photos, device),
            workers=min(workers(first.speed, device), 8),
        ),
        model=ModelSettings(weights=start, head="keep"),
        augmentation=Augmentation(flip=True),
        optimiser=Optimiser(optimiser="adam", rate=1e-4, weight_decay=0.05, layer_decay=0.75),
        # Minutes are planned from a measured step, in whole epochs; few or very many are better said in epochs.
        length=LengthSettings(minutes=seconds / 60) if 2 < epochs < MOST_EPOCHS else LengthSettings(epochs=epochs),
        # Once, at the end: the best of many evaluations would be too good, and each takes time from the training.
        run=dataclasses.replace(settings, log_every=5, save_minutes=1.0, evaluate_every=1000.0, precision=precision),
    )


def epoch_seconds(first: FirstAnswer, photos: Photos) -> float:
    """As far as looking tells."""
    return STEP * first.speed.seeing * len(photos.learn)


def batch_size(photos: Photos, device: torch.device) -> int:
    return 16 if len(photos.learn) < 2_000 else 32 if device.type == "cpu" else 64
