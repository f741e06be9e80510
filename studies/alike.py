"""A ViT and a ResNet trained alike on CIFAR-10, for `vitrail robustness` to compare: about 45 and 5 minutes of one core.

    python studies/alike.py CIFAR10 --out runs/alike         CIFAR10: as --data takes it
    python studies/alike.py CIFAR10 --out runs/alike --resume --only vit

Both see the same pictures in the same order under the same augmentation, loss, optimiser, rate and schedule, have the
same number of parameters within 8 %, and cut a picture of 32 pixels to a map of 8 x 8 at their first layer. The ResNet
learns faster, so it is given fewer epochs: the two shall be within 3 points of each other on the test pictures.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data.augment import Augmentation
from vitrail.experiments.recipe import DataSettings, LengthSettings, LossSettings, Own, Recipe, RunSettings
from vitrail.experiments.run import run
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViTConfig
from vitrail.training.optim import Optimiser

SIZE = (32, 32)
BACKBONES: dict[str, ViTConfig | ResNetConfig] = {
    "vit": ViTConfig(128, 6, 4, 256, patch=(4, 4), image=SIZE, class_token=False, positions="sincos2d"),
    "resnet": ResNetConfig(layers=(2, 2, 2), root_width=32, image=SIZE),
}
EPOCHS = {"vit": 8.0, "resnet": 2.5}


def recipe(kind: str, data: str, out: Path, resume: bool, epochs: float) -> Recipe:
    def network(classes: tuple[str, ...]) -> nn.Module:
        model: Classifier = ClassifierConfig(BACKBONES[kind], len(classes), "mean").build(seed=0)
        model.labels = classes
        return model

    return Recipe(
        data=DataSettings(data=data, validation=0.02, batch=100, workers=0, crop="none"),
        augmentation=Augmentation(flip=True, shift=2),
        loss=LossSettings(smoothing=0.1),
        optimiser=Optimiser(rate=2e-3, weight_decay=0.1),
        length=LengthSettings(epochs=epochs),
        run=RunSettings(out=out, resume=resume, log_every=100),
        own=Own(network=network, preprocess=Preprocess(size=SIZE)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, default=Path("runs/alike"))
    parser.add_argument("--only", choices=tuple(BACKBONES), action="append")
    parser.add_argument("--epochs", type=float, default=0.0, help="other than the study's own; with --only")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for kind in asked.only or BACKBONES:
            run(recipe(kind, asked.data, asked.out / kind, asked.resume, asked.epochs or EPOCHS[kind]), sys.argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
