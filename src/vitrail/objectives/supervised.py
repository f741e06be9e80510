"""Classification: softmax or sigmoid cross-entropy against hard or mixed labels."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.core.device import mix
from vitrail.core.errors import UserError
from vitrail.core.types import Batch, Loss, Preprocess, Progress
from vitrail.data.augment import Augmentation

CrossEntropy = Literal["softmax", "sigmoid"]


def softmax_cross_entropy(logits: Float[Tensor, "b k"], weights: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
    """Minus the log-probability of the classes, weighted. In nats."""
    return -(weights * F.log_softmax(logits, dim=-1)).sum(-1)


def sigmoid_cross_entropy(logits: Float[Tensor, "b k"], weights: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
    """Each class a yes or no of its own, summed over the classes as the official pre-training has it. In nats."""
    return -(weights * F.logsigmoid(logits) + (1 - weights) * F.logsigmoid(-logits)).sum(-1)


def class_weights(
    labels: Int[Tensor, "b"] | Float[Tensor, "b k"], classes: int, smoothing: float
) -> Float[Tensor, "b k"]:
    """Labels as a weight for each class; `smoothing` of the whole is spread evenly over all classes."""
    hard = not labels.is_floating_point()
    weights = F.one_hot(labels, classes).float() if hard else labels
    return weights * (1 - smoothing) + smoothing / classes


@dataclass
class Supervised:
    """Cross-entropy of a classifier on augmented pictures."""

    model: nn.Module
    classes: int
    preprocess: Preprocess
    augmentation: Augmentation
    kind: CrossEntropy = "softmax"
    smoothing: float = 0.0

    def __call__(self, batch: Batch, seed: int) -> Loss:
        """The mean over valid rows; zero, with gradients of zero, where no row is valid. Raises UserError without labels."""
        if batch.targets is None:
            raise UserError("A picture of the training data has no label; give each one a class, or leave it out.")
        batch = self.augmentation(batch, self.classes, self.preprocess, mix("augment", seed))
        assert batch.targets is not None
        logits = self.model(batch.views[0]).float()
        weights = class_weights(batch.targets.values, self.classes, self.smoothing)
        each = (softmax_cross_entropy if self.kind == "softmax" else sigmoid_cross_entropy)(logits, weights)
        total = torch.where(batch.valid, each, 0.0).sum() / batch.valid.sum().clamp(min=1)
        return Loss(total)

    def after_backward(self, progress: Progress) -> None:
        """Nothing to do."""

    def after_step(self, progress: Progress) -> None:
        """Nothing to do."""
