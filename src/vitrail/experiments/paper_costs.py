"""How long a recipe of the paper would take on this machine: from a training step of its model, measured on noise.

Whole batches of the paper's fit few machines, so a step is measured on a few pictures, and its time taken as
proportional. Decoding is left out: `vitrail bench data` measures that.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vitrail.core.device import memory, own_randomness
from vitrail.core.errors import UserError
from vitrail.core.types import Sample
from vitrail.experiments import build
from vitrail.experiments.costs import measure_step, this_machine
from vitrail.experiments.paper import Cell
from vitrail.experiments.plan import change
from vitrail.experiments.recipe import Recipe

ENOUGH = 2.0
"""Seconds of a step after which no larger batch is tried."""
STEPS = 3


@dataclass(frozen=True)
class Measured:
    """batch: pictures of the measured step. seconds: it took. precision: of its matrix products."""

    batch: int
    seconds: float
    precision: str

    def hours(self, pictures: int) -> float:
        """For so many pictures, repeats counted."""
        return self.seconds / self.batch * pictures / 3600


@dataclass(frozen=True)
class Noise:
    """A source of random pixels."""

    count: int
    side: int
    classes: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.count) % len(self.classes)

    @property
    def fingerprint(self) -> str:
        return f"{self.count:08x}{self.side:08x}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        pixels = np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), np.uint8)
        return Sample(f"noise {index}", pixels, int(self.labels[index]))


def measure(cell: Cell, device: torch.device) -> Measured:
    """A step of the recipe's model, loss and optimiser, with the paper's number of classes.

    Raises UserError where weights, gradients and averages alone would not fit into memory.
    """
    recipe, classes = _measurable(cell.recipe, cell.start.model, device), cell.source.classes
    with own_randomness():
        if device.type == "cpu":
            _refuse_if_too_large(cell, recipe)
        labels = tuple(map(str, range(classes)))
        model, preprocess = build.model(recipe, labels, None)
        task, side = build.task(recipe, labels, preprocess), recipe.data.size[0]
        batch = 1 if device.type == "cpu" else 16
        while True:
            sized = change(recipe, "data", batch=batch)
            noise = Noise(batch * STEPS, side, labels)
            loader = build.training_loader(sized, noise, preprocess, set(), some_steps=STEPS)
            seconds = measure_step(model, task, loader, sized, device)
            if seconds > ENOUGH or batch * 2 > cell.recipe.data.batch:
                return Measured(batch, seconds, str(recipe.run.precision))
            batch *= 2


def _measurable(recipe: Recipe, model: str, device: torch.device) -> Recipe:
    """From random weights, and on pictures that need no decoding."""
    resnet = model.startswith("BiT")
    recipe = change(recipe, "model", model=model, weights=None, pool="mean" if resnet else "class")
    if not resnet:
        recipe = change(recipe, "model", positions="learned")
    recipe = change(recipe, "data", crop="none", workers=0)
    precision = "bf16" if this_machine(device).fast_bf16 else "fp32"
    return change(recipe, "run", precision=precision)


def _refuse_if_too_large(cell: Cell, recipe: Recipe) -> None:
    from vitrail.weights import zoo

    side = recipe.data.size[0]
    copies = 4 if recipe.optimiser.optimiser == "adam" else 3
    needed, free = 4 * copies * zoo.config(cell.start.model, (side, side)).parameters(), memory()
    if free and needed > 0.9 * free:
        raise UserError(
            f"--measure: {cell.start.model} needs {needed / 2**30:.0f} GiB for weights, gradients and averages, and "
            f"{free / 2**30:.0f} GiB are free; measure on a larger machine, or a smaller model's recipe."
        )
