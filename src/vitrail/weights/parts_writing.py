"""The way back of parts.py: a model's tensors under a dialect's names."""

import torch
from torch import Tensor, nn

from vitrail.core.types import Tokens
from vitrail.layers.patches import grid_coordinates
from vitrail.models.vit import ViT
from vitrail.weights.modules import Choice, whole
from vitrail.weights.parts import Dialect


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def write_backbone(vit: ViT, dialect: Dialect, prefix_rows: int, at: str = "") -> dict[str, Tensor]:
    """All of a ViT but its trunk, as read_backbone takes it, each tensor in memory of its own.

    prefix_rows: how many of the prefix tokens have a row in their table; one that has no position here gets zeros.
    The caller has made sure that the dialect can hold the model: its positions all enter at the stem.
    """
    config, state = vit.config, state_of(vit)
    tensors = written(state, "patch_embedding", dialect.patch, at)
    counts = (int(config.class_token), int(config.distillation_token), config.registers)
    choices = (dialect.class_token, dialect.distillation_token, dialect.registers)
    if config.prefixes:
        for choice, tokens in zip(choices, state["prefix"].split(counts), strict=True):
            if len(tokens):
                tensors[at + choice[0][0]] = tokens[None].clone()
    if config.positions != "none":
        table = position_table(vit)
        tensors[at + dialect.positions[0][0]] = torch.cat([table[:prefix_rows], table[config.prefixes :]])[None]
    for block in range(config.depth):
        for part, choice in dialect.parts.items():
            tensors |= written(state, f"encoder.blocks.{block}.{part}", choice, at + dialect.block.format(block))
    if config.pre_norm:
        tensors |= written(state, "encoder.pre_norm", dialect.pre_norm, at)
    if config.final_norm:
        tensors |= written(state, "encoder.norm", dialect.norm, at)
    return tensors


def position_table(vit: ViT) -> Tensor:
    """What is added at the stem for the model's own size, (prefixes + cells, width), whether learned or computed."""
    config = vit.config
    y, x = config.grid
    tokens = Tokens(torch.empty(1, y * x, config.width), grid_coordinates((y, x)), (y, x))
    with torch.no_grad():
        stem = vit.positions(tokens).stem
    assert stem is not None
    return stem[0].detach().cpu()


def written(state: dict[str, Tensor], ours: str, choice: Choice | str, at: str = "") -> dict[str, Tensor]:
    """A part with its weight and bias, or a bare parameter, as far as it is there; split where they keep pieces."""
    tensors = {}
    for kind in ("weight", "bias", ""):
        if (tensor := state.get(whole(ours, kind))) is not None:
            names = (choice,) if isinstance(choice, str) else choice[0]
            for name, piece in zip(names, tensor.chunk(len(names)), strict=True):
                tensors[at + whole(name, kind)] = piece.clone()
    return tensors
