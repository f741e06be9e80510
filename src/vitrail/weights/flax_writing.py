"""What writing a ViT to the official code's or big_vision's .npz asks first: whether those libraries could compute it.

A field of a config that is not known here must have its default, so that what a later ViT brings is refused and not lost.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess, Tokens
from vitrail.layers.patches import grid_coordinates
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import TrunkConfig
from vitrail.models.vit import ViT
from vitrail.weights.flax import Entry
from vitrail.weights.flax_vit import Names, block_entries, computed_size, head_entries, stem_entries

SIZES = ("width", "depth", "heads", "mlp", "patch", "image", "channels", "classes", "hidden")
HELD = (*SIZES, "class_token", "prefix_positions", "qkv_bias", "patch_bias", "head_bias", "head_has_bias")
"""Fields of ViTConfig and ClassifierConfig that any value may have."""
SEEN_TO = ("positions", "numerics", "pool", "backbone", "dropout", "drop_path", "rotary_base")
"""Fields that are looked at one by one, or do not change what the model computes."""


def check_held(
    model: Classifier | ViT, form: str, pools: tuple[str, ...], positions: tuple[str, ...], more: tuple[str, ...]
) -> tuple[ViT, list[str]]:
    """The backbone, and sentences on what a file of the format named `form` leaves unsaid.

    pools, positions: the kinds that it knows. more: further fields of the configs that it holds.
    Raises UserError for what it cannot hold.
    """
    vit = model.backbone if isinstance(model, Classifier) else model
    if not isinstance(vit, ViT):
        raise cannot(form, "a model that is no ViT")
    config, numerics = vit.config, vit.config.numerics
    _check_defaults(config, (*HELD, *SEEN_TO, *more), form)
    if config.trunk is not None and config.trunk != TrunkConfig(config.trunk.layers, config.trunk.width):
        raise cannot(form, "a trunk with other norms or standardisation than the official code's")
    if config.positions not in positions:
        raise cannot(form, f"{config.positions} positions")
    if (numerics.gelu, numerics.norm_epsilon) != (Numerics().gelu, Numerics().norm_epsilon):
        raise cannot(form, f"a model that computes with GELU {numerics.gelu!r} and epsilon {numerics.norm_epsilon:g}")
    notes, biases = [], config.qkv_bias and config.patch_bias
    if isinstance(model, Classifier):
        _check_defaults(model.config, (*HELD, *SEEN_TO, *more), form)
        if model.config.pool not in pools or (model.config.pool != "class" and config.class_token):
            raise cannot(form, f"{model.config.pool} pooling" + " beside a class token" * config.class_token)
        biases = biases and (model.config.head_has_bias or model.config.head == "none")
        if model.labels:
            notes.append(f"the names of the {len(model.labels)} classes are not in the file")
    if not biases:
        notes.append("where this model has no bias, the file has one of zeros")
    y, x = config.grid
    if y != x and config.positions != "sincos2d":
        if math.isqrt(y * x) ** 2 == y * x:
            raise cannot(form, f"a grid of {y} x {x}, which would be read as the square of as many patches")
        notes.append(f"the file does not say that the grid is {y} x {x}: load it with grid={y}x{x}")
    if config.positions == "sincos2d" and config.image != computed_size(config.stride):
        size = f"{config.image[0]} x {config.image[1]} pixels"
        notes.append(f"the file does not say that the model is for {size}: load it with grid={y}x{x}")
    if numerics.resample != "zoom" and config.positions != "sincos2d":
        notes.append(f"at other sizes, {form} resamples positions by zoom, this model by {numerics.resample}")
    middle = (0.5,) * config.channels
    if model.preprocess != Preprocess(size=config.image, mean=middle, deviation=middle):
        notes.append("the file does not say the preprocessing, which is not the format's own: give it when loading")
    return vit, notes


def _check_defaults(config: Any, held: tuple[str, ...], form: str) -> None:
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name not in held and value != item.default:
            raise cannot(form, f"a model with {item.name} = {value}")


def cannot(form: str, what: str) -> UserError:
    return UserError(f"{form} cannot hold {what}: write it as vitrail's own format instead")


def state_of(model: Classifier | ViT) -> dict[str, Tensor]:
    """Its tensors, the backbone's by their own names."""
    return {name.removeprefix("backbone."): tensor.detach() for name, tensor in model.state_dict().items()}


def stem_positions(vit: ViT) -> Tensor:
    """What is added to prefix and patches at the model's own size, (1, t, d), whatever kind of table it comes from."""
    grid, device = vit.config.grid, vit.patch_embedding.weight.device
    room = torch.zeros(1, grid[0] * grid[1], vit.width, device=device)
    with torch.no_grad():
        stem = vit.positions(Tokens(room, grid_coordinates(grid, device), grid)).stem
    assert stem is not None
    return stem


def split_entries(state: dict[str, Tensor], entries: Iterable[Entry]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors as theirs, named. A bias that we do without is theirs as zeros."""
    for entry in entries:
        parts = entry.split(state[entry.ours]) if entry.ours in state else [torch.zeros(entry.shape)]
        yield from zip(entry.theirs, parts * (len(entry.theirs) // len(parts)), strict=True)


def entries_of(model: Classifier | ViT, vit: ViT, names: Names) -> Iterator[Entry]:
    """All but the position table."""
    yield from stem_entries(vit.config)
    for block in range(vit.depth):
        for entry in block_entries(vit.config, names, "Transformer/encoderblock_{}"):
            yield entry.at(block)
    if isinstance(model, Classifier):
        yield from head_entries(model.config)
