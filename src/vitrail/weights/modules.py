"""One module or parameter of another library's file at a time: which name it has there, and taking it as ours."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.weights.conversion import Head, Keys

Choice = tuple[tuple[str, ...], ...]
"""The names of one part: an entry for each way that a library's versions called it, of which the first is written. An
entry of several names is one matrix of ours that they keep apart. A name that ends in "_" goes on in "weight"."""


def whole(name: str, kind: str) -> str:
    """A module's name with "weight" or "bias"; with "", a parameter's own."""
    return f"{name}{kind}" if name.endswith("_") or not kind else f"{name}.{kind}"


def chosen(keys: Keys, choice: Choice | str, at: str) -> tuple[str, ...]:
    """The names that this file uses; the first where it has none of them, so that they are what is missed."""
    if isinstance(choice, str):
        return (choice,)
    for names in choice:
        if any(at + whole(names[0], kind) in keys for kind in ("weight", "")):
            return names
    return choice[0]


def take_module(
    keys: Keys, choice: Choice | str, ours: str, at: str = "", bias: bool | Sequence[bool] | None = True
) -> bool:
    """A dense layer, convolution or norm. Returns whether it has a bias.

    bias: whether it must have one, or each of the several that it is made of; where some have, the others get zeros.
        None: as the file has it.
    """
    names = chosen(keys, choice, at)
    weights = [at + whole(name, "weight") for name in names]
    keys.put(f"{ours}.weight", stacked(keys, weights, [keys.take(name) for name in weights]), *weights)
    biases = [at + whole(name, "bias") for name in names]
    wanted = [bias] * len(names) if bias is None or isinstance(bias, bool) else list(bias)
    wanted = [name in keys if want is None else want for name, want in zip(biases, wanted, strict=True)]
    if not any(wanted):
        return False
    taken = [keys.take(name) if want else None for name, want in zip(biases, wanted, strict=True)]
    like = next(piece for piece in taken if piece is not None)
    pieces = [torch.zeros_like(like) if piece is None else piece for piece in taken]
    there = [name for name, want in zip(biases, wanted, strict=True) if want]
    keys.put(f"{ours}.bias", stacked(keys, biases, pieces), *there)
    return True


def take_rows(keys: Keys, name: str, width: int, ours: str | None = None) -> Tensor:
    """Tokens or positions, as (n, width): (1, n, width) in files, but CLIP's and SigLIP's are an Embedding's."""
    axes = 1 if name.endswith("class_embedding") else 2 if name.endswith("embedding.weight") else 3
    shape = keys.shape(name, axes)
    if shape[-1] != width or (axes == 3 and shape[0] != 1) or 0 in shape:
        raise UserError(
            f"{keys.checkpoint.path} holds {keys.prefix + name} of shape {shape}, where rows of {width} numbers were "
            "expected: use a checkpoint that was not changed"
        )
    return keys.take(name, ours, lambda tensor: tensor.reshape(-1, width))


def take_two_heads(keys: Keys, names: tuple[str, str]) -> Tensor:
    """DeiT's class and distillation head, whose mean is the output, as one layer on both tokens; returns its weight."""
    counts = {keys.shape(f"{name}.weight", 2)[0] for name in names} | {
        keys.shape(f"{name}.bias", 1)[0] for name in names
    }
    if len(counts) > 1:
        raise UserError(f"{keys.checkpoint.path} has heads {names[0]} and {names[1]} for different classes: not read")
    weights, biases = ([f"{name}.{part}" for name in names] for part in ("weight", "bias"))
    weight = stacked(keys, weights, [keys.take(name) for name in weights], dim=1) / 2
    keys.put("head.output.weight", weight, *weights)
    keys.put("head.output.bias", (keys.take(biases[0]) + keys.take(biases[1])) / 2, *biases)
    return weight


TWO_HEADS = "class and distillation head, whose mean is the output, are one layer of their halves"
"""What take_two_heads folds."""


def head_state(weight: Tensor) -> Head:
    return "usable" if bool(weight.any()) else "all zeros"


def stacked(keys: Keys, names: Sequence[str], pieces: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Several tensors as one. Raises UserError, naming them, where their shapes do not fit together."""
    if len(pieces) == 1:
        return pieces[0]
    try:
        return torch.cat(list(pieces), dim=dim)
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{keys.prefix}{name} {tuple(p.shape)}" for name, p in zip(names, pieces, strict=True))
        raise UserError(
            f"{keys.checkpoint.path} holds tensors that do not fit together, {shapes}: use a checkpoint that was not changed"
        ) from error
