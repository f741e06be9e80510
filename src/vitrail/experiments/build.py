"""A complete recipe's parts: the model, the objective around it, the loaders."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from vitrail.core import ranks
from vitrail.core.errors import UserError
from vitrail.core.runs import write_whole
from vitrail.core.types import Objective, Preprocess, Source
from vitrail.data.loader import Order, PictureLoader, balanced
from vitrail.data.sources import listed
from vitrail.data.transforms import Transform
from vitrail.experiments.plan import DataFacts, pair, samples
from vitrail.experiments.recipe import ModelSettings, Recipe
from vitrail.models.classifier import Classifier, replace_head, resize_classifier
from vitrail.models.masked import MaskedPatchConfig, MaskedPatchPredictor
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViT, resize_backbone
from vitrail.objectives.masked import MaskedPatches
from vitrail.objectives.supervised import Supervised
from vitrail.weights import native, zoo
from vitrail.weights.conversion import Model
from vitrail.weights.load import load_any

PREDICTOR = "predictor.safetensors"


def start(recipe: Recipe) -> Model | None:
    """What --weights names, as it is: at its own size, with its own head. None where the run starts from random weights."""
    settings = recipe.model
    if settings.weights is None:
        return None
    return load_any(
        settings.weights,
        heads=settings.heads or None,
        grid=pair(settings.grid) if settings.grid else None,
        dropout=settings.dropout,
        drop_path=settings.drop_path,
        preprocess=settings.preprocess or None,
    )


def model(recipe: Recipe, classes: tuple[str, ...], start: Model | None) -> tuple[nn.Module, Preprocess]:
    """The model with random weights, or made of `start`, at the recipe's size with a new head or its own; everything
    drawn from the seed."""
    settings, seed = recipe.model, recipe.run.seed
    if recipe.own.network is not None:
        if recipe.own.preprocess is None:
            raise UserError("the recipe brings a network but no preprocess; say how pictures become its input.")
        torch.manual_seed(seed)
        return recipe.own.network(classes), recipe.own.preprocess
    size, hidden = pair(recipe.data.size), settings.representation or None
    if recipe.masked:
        predictor = _predictor(recipe, size, start)
        predictor.backbone.checkpointing = settings.checkpointing
        return predictor, predictor.preprocess
    if start is not None:
        if isinstance(start, Classifier):
            resize_classifier(start, size)
        else:
            resize_backbone(start, size)
        made = _kept_head(start, classes, str(settings.weights)) if settings.head == "keep" else None
        made = made or replace_head(
            start,
            len(classes),
            classes,
            pool=None if settings.pool == "planned" else settings.pool,
            hidden=hidden,
            head_bias=settings.head_bias,
            seed=seed,
        )
    else:
        assert settings.pool != "planned"
        made = zoo.create(
            settings.model,
            labels=classes,
            pool=settings.pool,
            preprocess=recipe.own.preprocess or Preprocess(size=size),
            hidden=hidden,
            head_bias=settings.head_bias,
            seed=seed,
            **_of_vits(settings, size),
        )
    made.backbone.checkpointing = settings.checkpointing
    return made, made.preprocess


def _of_vits(settings: ModelSettings, size: tuple[int, int]) -> dict[str, Any]:
    """What a ViT is made with. Raises UserError where it is asked of a ResNet, which has none of it."""
    given = {"positions": settings.positions, "dropout": settings.dropout, "drop_path": settings.drop_path}
    if not isinstance(zoo.config(settings.model, size), ResNetConfig):
        return given
    for name, value in given.items():
        if value not in ("planned", "none", 0.0):
            raise UserError(
                f"--{name.replace('_', '-')} {value} is for ViTs, and --model {settings.model} is a ResNet; leave it out."
            )
    return {}


def _predictor(recipe: Recipe, size: tuple[int, int], start: Model | None) -> MaskedPatchPredictor:
    settings, targets, seed = recipe.model, recipe.objective.targets, recipe.run.seed
    none = "has no patch embeddings to corrupt; give a ViT or a hybrid (vitrail models lists them)."
    if start is not None:
        backbone = start.backbone if isinstance(start, Classifier) else start
        if not isinstance(backbone, ViT):
            raise UserError(f"--weights {settings.weights} is a ResNet, which {none}")
        resize_backbone(backbone, size)
        return MaskedPatchPredictor.around(backbone, targets, seed)
    preprocess = recipe.own.preprocess or Preprocess(size=size)
    config = zoo.config(settings.model, size)
    if isinstance(config, ResNetConfig):
        raise UserError(f"--model {settings.model} is a ResNet, which {none}")
    fields = {"channels": preprocess.channels, "class_token": settings.pool == "class", **_of_vits(settings, size)}
    config = dataclasses.replace(config, **fields)
    made = MaskedPatchConfig(config, targets).build(seed)
    made.backbone.preprocess = preprocess
    return made


def _kept_head(start: Model, classes: tuple[str, ...], weights: str) -> Classifier:
    if isinstance(start, Classifier) and start.labels == classes and start.config.output == "logits":
        return start
    found = (
        f"classes {listed(start.labels, 3)}" if isinstance(start, Classifier) and start.labels else "no named classes"
    )
    raise UserError(
        f"--head keep: {weights} has {found}, and the data have {listed(classes, 3)}; give --head reset, or data of the "
        "same classes in the same order."
    )


def task(recipe: Recipe, classes: tuple[str, ...], preprocess: Preprocess) -> Callable[[nn.Module], Objective]:
    """What is asked of the model."""
    if recipe.own.objective is not None:
        return recipe.own.objective
    if recipe.masked:
        objective = recipe.objective

        def masked(model: nn.Module) -> Objective:
            config = getattr(model, "module", model).config  # shared between processes, it is wrapped
            assert isinstance(config, MaskedPatchConfig)
            return MaskedPatches(model, config, preprocess, recipe.augmentation, objective.corrupt)

        return masked
    loss = recipe.loss
    return lambda model: Supervised(model, len(classes), preprocess, recipe.augmentation, loss.loss, loss.smoothing)


def training_loader(
    recipe: Recipe, train: Source, preprocess: Preprocess, said: set[str], some_steps: int = 0
) -> PictureLoader:
    """The training stream; `some_steps`: only that many batches of it, to measure with. said: see PictureLoader."""
    count = some_steps * recipe.data.batch or samples(recipe, DataFacts(len(train), len(train.classes), 0, 0))
    weights = balanced(train.labels) if recipe.data.balance else None
    order = Order(len(train), recipe.data.batch, count, recipe.run.seed, weights=weights)
    assert recipe.data.crop != "planned"
    transform = Transform(preprocess, recipe.data.crop)
    workers = 0 if some_steps else recipe.data.workers
    return PictureLoader(train, transform, order, workers, not some_steps, recipe.data.strict, said=said)


def evaluation_loader(
    recipe: Recipe, source: Source, preprocess: Preprocess, said: set[str], hold: bool
) -> PictureLoader:
    """Every picture once, in order; `hold` where they will be asked for again."""
    batch = max(recipe.data.batch // ranks.count(), 1) * ranks.count()
    order = Order(len(source), batch, len(source), shuffle=False)
    return PictureLoader(source, Transform(preprocess), order, recipe.data.workers, hold, recipe.data.strict, said=said)


def save_model(model: nn.Module, path: Path) -> None:
    """A classifier as `vitrail.load` reads it; of a model of the user's own, the tensors alone.

    Of masked patch prediction the best weights, model.safetensors, are the backbone's, as `vitrail.load_backbone` reads
    it; with mask and head they lie beside it, in PREDICTOR, as tensors alone, as the last ones do.
    """
    if isinstance(model, Classifier):
        native.save(model, path)
        return
    if isinstance(model, MaskedPatchPredictor) and path.name == native.FILE:
        save_model(model, path.with_name(PREDICTOR))
        native.save(model.backbone, path)
        return
    tensors = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    write_whole(path, lambda part: part.write_bytes(save(tensors)))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)
