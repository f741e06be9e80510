"""What a run should be, from what the data and the machine are. Pure: facts in, a recipe and its reasons out.

Whatever a person set is kept; only settings at their "planned" value are filled in. The reasons are printed, so that a
default is never a secret.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from vitrail.core.types import Preprocess
from vitrail.experiments.recipe import Recipe
from vitrail.models.resnet import ResNetConfig
from vitrail.weights import zoo

SMALL = 64
"""Pictures up to this many pixels a side are learned whole, at their own size, with small patches."""
OF_WEIGHTS = "as the weights have it"
"""Stands for the name of the model where a run starts from weights."""


@dataclass(frozen=True)
class DataFacts:
    """pictures: in the training split. classes. height, width: their median, in pixels."""

    pictures: int
    classes: int
    height: int
    width: int


@dataclass(frozen=True)
class Machine:
    """kind: "cpu", "cuda" or "mps". fast_bf16: whether it multiplies bf16 matrices faster than fp32 ones."""

    kind: str
    cores: int
    memory: int
    fast_bf16: bool


def plan(
    recipe: Recipe, facts: DataFacts, machine: Machine, start: tuple[int, Preprocess] | None = None
) -> tuple[Recipe, list[str]]:
    """Fills in all but the length. start: width and preprocessing of the weights that the run starts from."""
    given, said = recipe, []
    pretrained = start is not None
    if start is not None:
        width, preprocess = start
        size = given.data.size or preprocess.size
        recipe = change(recipe, "data", size=tuple(size))
        if given.model.model not in ("", OF_WEIGHTS):
            said.append(f"model {OF_WEIGHTS}, not the recipe's {given.model.model}")
        recipe = change(recipe, "model", model=OF_WEIGHTS, positions="planned")
        tiny = max(size) <= SMALL
    else:
        tiny = max(given.data.size or (facts.height, facts.width)) <= SMALL
        if not given.data.size:
            side = 224 if machine.kind == "cuda" else 128
            named = given.model.model and recipe.own.network is None
            down, across = zoo.config(given.model.model).stride if named else (4, 4)
            height, width = (facts.height, facts.width) if tiny else (side, side)
            size = (_up(height, down), _up(width, across))
            recipe = change(recipe, "data", size=size)
            said.append(f"size {size[0]} x {size[1]}: the pictures are {facts.height} x {facts.width} (median)")
        width = 384
        if recipe.own.network is None:
            recipe, lines = _plan_model(recipe, facts, machine, tiny)
            said += lines
            width = zoo.config(recipe.model.model, image=pair(recipe.data.size)).width
    if given.data.crop == "planned":
        recipe = change(recipe, "data", crop="none" if tiny else "inception")
    if tiny and not pretrained and given.augmentation == Recipe().augmentation:
        recipe = change(recipe, "augmentation", shift=1)
        said.append("shift 1: small pictures are learned whole, moved by a pixel (any flag of augmentation ends this)")
    if not given.data.batch:
        batch = 64 if facts.pictures < 5_000 else 128 if machine.kind == "cpu" else 512
        recipe = change(recipe, "data", batch=batch)
        said.append(f"batch {batch}: {facts.pictures:,} pictures to train on")
    if given.data.workers < 0:
        held = recipe.data.crop == "none" and facts.pictures * math.prod(pair(recipe.data.size)) < 1 << 26
        recipe = change(recipe, "data", workers=0 if held else min(machine.cores, 8))
    if given.run.precision == "planned":
        recipe = change(recipe, "run", precision="bf16" if machine.fast_bf16 else "fp32")
    if not given.optimiser.rate:
        rate = base_rate(recipe.optimiser.optimiser, width, pretrained, recipe.masked)
        recipe = change(recipe, "optimiser", rate=rate)
        said.append(f"rate {rate:g}: {recipe.optimiser.optimiser}, {'pre-trained' if pretrained else 'random'} weights")
    return recipe, said


def _plan_model(recipe: Recipe, facts: DataFacts, machine: Machine, tiny: bool) -> tuple[Recipe, list[str]]:
    given, said = recipe.model, []
    if not given.model:
        name = "ViT-S/16" if machine.kind == "cuda" else "ViT-Ti/16"
        if tiny:
            # 16 tokens: in minutes of a processor, many epochs of few words beat few of many (docs/log.md).
            size = pair(recipe.data.size)
            name = f"ViT-Ti/{_sides(size, 8)}" if machine.kind == "cuda" else f"ViT-Nano/{_sides(size, 4)}"
        recipe = change(recipe, "model", model=name)
        said.append(f"model {name}: for random weights, {facts.pictures:,} pictures and a {machine.kind}")
    if isinstance(zoo.config(recipe.model.model), ResNetConfig):
        pool = "mean" if given.pool == "planned" else given.pool
        return change(recipe, "model", pool=pool), said
    faster = "which learns faster from random weights than the paper's"
    if given.pool == "planned":
        recipe = change(recipe, "model", pool="mean")
        said.append(f"pool mean, {faster} class token (--pool class)")
    if given.positions == "planned":
        recipe = change(recipe, "model", positions="sincos2d")
        said.append(f"positions sincos2d, {faster} learned table (--positions learned)")
    return recipe, said


def base_rate(rule: str, width: int, pretrained: bool, masked: bool = False) -> float:
    """A base learning rate that trains; fine-tuning's is the middle of Table 4's candidates, that of masked patch prediction
    for ViT-B and larger is B.1.2's."""
    if rule == "sgd":
        return 0.01 if pretrained else 0.1
    if pretrained:
        return 1e-4
    if masked and width >= 768:
        return 2e-4
    return 3e-3 if width <= 128 else 1e-3 if width < 1024 else 5e-4


def plan_length(
    recipe: Recipe, facts: DataFacts, machine: Machine, step_seconds: float, epoch_seconds: float
) -> tuple[Recipe, list[str]]:
    """Turns minutes into epochs, and fills in the warm-up.

    step_seconds: one training step, measured. epoch_seconds: what an epoch costs apart from its steps (evaluation).
    """
    said = []
    steps_an_epoch = facts.pictures / recipe.data.batch
    if not recipe.length.steps and not recipe.length.epochs:
        minutes = recipe.length.minutes or (10.0 if machine.kind == "cpu" else 30.0)
        each = steps_an_epoch * step_seconds + epoch_seconds / recipe.run.evaluate_every
        epochs = minutes * 60 / each
        epochs = max(1.0, float(math.floor(epochs)))
        epochs = epochs if recipe.length.minutes else min(epochs, 100.0)
        recipe = change(recipe, "length", epochs=epochs)
        said.append(f"{epochs:g} epochs: about {minutes:g} minutes at {each:.1f} s an epoch (--epochs or --minutes)")
    if recipe.schedule.warmup < 0:
        warmup = min(10_000, steps(recipe, facts) // 10)
        recipe = change(recipe, "schedule", warmup=warmup)
    return recipe, said


def samples(recipe: Recipe, facts: DataFacts) -> int:
    """Pictures that the run trains on in all, repeats counted."""
    if recipe.length.steps:
        return recipe.length.steps * recipe.data.batch
    return math.ceil(recipe.length.epochs * facts.pictures)


def steps(recipe: Recipe, facts: DataFacts) -> int:
    return -(-samples(recipe, facts) // recipe.data.batch)


def pair(size: tuple[int, ...]) -> tuple[int, int]:
    """One number is a square."""
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


def change(recipe: Recipe, group: str, **settings: Any) -> Recipe:
    return dataclasses.replace(recipe, **{group: dataclasses.replace(getattr(recipe, group), **settings)})


def _sides(size: tuple[int, int], cells: int) -> str:
    """A patch, as in a model's name, that cuts `size` into `cells` by `cells`, or a little finer."""
    height, width = (next(p for p in range(max(side // cells, 1), 0, -1) if side % p == 0) for side in size)
    return f"{height}" if height == width else f"{height}x{width}"


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
