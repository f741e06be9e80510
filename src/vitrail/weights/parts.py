"""What timm, Hugging Face, torchvision and the authors' own .pth files share: the same parts of a ViT, other names.

A Dialect is a table of names that is walked both ways, so that what is read can be written back to the bit. All of them
lay tensors out as PyTorch does, as we do: a part is renamed, or several of theirs stand row under row in one of ours.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess
from vitrail.layers.positions import PositionKind
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import TrunkConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.conversion import Converted, Head, Keys
from vitrail.weights.modules import Choice, chosen, take_module, take_rows, whole
from vitrail.weights.zoo import VARIANTS

Size = tuple[int, int]
SCALES = ("attention_scale", "mlp_scale")


@dataclass(frozen=True)
class Dialect:
    """The names of a ViT's parts.

    block: what stands before a block's parts, {} its number; blocks: the same as an expression that finds any of the
    ways it was ever called, its last group the number.
    parts: by our names in a block.
    """

    block: str
    blocks: str
    parts: dict[str, Choice]
    patch: Choice
    class_token: Choice
    positions: Choice
    norm: Choice
    distillation_token: Choice = ()
    registers: Choice = ()
    pre_norm: Choice = ()


@dataclass
class Findings:
    """What no shape says, filled in while a file is read.

    heads: as config or person say. image: (height, width) that the position table is for, if the config says;
    grid: the table's (rows, columns), if the person says.
    placed: the position table surely has a row for class and distillation token, and none for registers.
    patch_bias, qkv_bias: whether those have a bias; None: as the file has it.
    required: what else the file must have, though others do without: "encoder.norm", "encoder.pre_norm", SCALES.
    """

    heads: int | None = None
    image: Size | None = None
    grid: Size | None = None
    numerics: Numerics = field(default_factory=Numerics)
    placed: bool = False
    patch_bias: bool | None = True
    qkv_bias: bool | tuple[bool, bool, bool] | None = None
    required: tuple[str, ...] = ("encoder.norm",)
    positions: PositionKind = "learned"
    rotary_base: float = 100.0
    folded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_backbone(
    keys: Keys, dialect: Dialect, findings: Findings, at: str = "", trunk: TrunkConfig | None = None, channels: int = 3
) -> ViTConfig:
    """Takes all of a ViT but its head into the backbone's names, and says what ViT it is.

    at: what their names begin with. trunk: the hybrid's, which takes `channels`; its tensors are the caller's to take.
    Raises UserError where a part is missing, or config and shapes are at odds.
    """
    patch = chosen(keys, dialect.patch, at)
    width, inputs, tall, wide = keys.shape(at + whole(patch[0], "weight"), 4)
    patch_bias = take_module(keys, dialect.patch, "patch_embedding", at, findings.patch_bias)
    names = {
        choice: name
        for choice in (dialect.class_token, dialect.distillation_token, dialect.registers)
        if choice and (name := at + chosen(keys, choice, at)[0]) in keys
    }
    tokens = {choice: take_rows(keys, name, width) for choice, name in names.items()}
    class_token, distilled = dialect.class_token in tokens, dialect.distillation_token in tokens
    registers = len(tokens.get(dialect.registers, ()))
    cell = 1 if trunk is None else trunk.stride
    stride = (tall * cell, wide * cell)
    positions, image, placed = findings.positions, findings.image, class_token
    if positions == "learned":
        table = _take_table(keys, dialect.positions, at, width, stride, (class_token + distilled, registers), findings)
        image, placed = table.image, table.placed > 0
        if table.registers is not None:
            tokens[dialect.registers] = tokens[dialect.registers] + table.registers
    if image is None:
        image = (max(round(224 / stride[0]), 1) * stride[0], max(round(224 / stride[1]), 1) * stride[1])
        findings.notes.append(f"it says no size, so {image[0]} x {image[1]} pixels are taken")
    if tokens:
        keys.put("prefix", torch.cat(list(tokens.values())), *names.values())
    blocks = read_blocks(keys, dialect, findings, at)
    norms = {"encoder.pre_norm": dialect.pre_norm, "encoder.norm": dialect.norm}
    there = {
        ours: take_module(keys, choice, ours, at)
        for ours, choice in norms.items()
        if choice and (ours in findings.required or at + whole(chosen(keys, choice, at)[0], "weight") in keys)
    }
    return ViTConfig(
        width=width,
        depth=blocks.depth,
        heads=heads_of(width, blocks.depth, blocks.mlp, findings),
        mlp=blocks.mlp,
        patch=(tall, wide),
        image=image,
        channels=inputs if trunk is None else channels,
        class_token=class_token,
        positions=positions,
        numerics=findings.numerics,
        distillation_token=distilled,
        registers=registers,
        prefix_positions=placed or not class_token,
        rotary_base=findings.rotary_base,
        pre_norm="encoder.pre_norm" in there,
        final_norm="encoder.norm" in there,
        layer_scale=blocks.layer_scale,
        qk_norm=blocks.qk_norm,
        qkv_bias=blocks.qkv_bias,
        patch_bias=patch_bias,
        feed_forward="swiglu" if blocks.swiglu else "mlp",
        trunk=trunk,
    )


@dataclass(frozen=True)
class Blocks:
    """What a stack of blocks is."""

    depth: int
    mlp: int
    layer_scale: bool
    qk_norm: bool
    qkv_bias: bool
    swiglu: bool


def read_blocks(
    keys: Keys, dialect: Dialect, findings: Findings, at: str = "", ours: str = "encoder.blocks.{}."
) -> Blocks:
    """Takes every block there is. `ours`: what they become. Raises UserError where blocks are not all alike."""
    expression = re.compile(re.escape(at) + dialect.blocks)
    starts = {int(match.groups()[-1]): match[0] for name in keys if (match := expression.match(name))}
    depth = max(starts, default=0) + 1
    alike: set[Blocks] = set()
    for number in range(depth):
        start = starts.get(number, at + dialect.block.format(number))
        have = set()
        for part, choice in dialect.parts.items():
            names = chosen(keys, choice, start)
            optional = part in SCALES or part.endswith(("query_norm", "key_norm"))
            optional = optional and part not in findings.required
            if optional and start + whole(names[0], "" if part in SCALES else "weight") not in keys:
                continue
            to = ours.format(number) + part
            if part in SCALES:
                keys.take(start + names[0], to)
            elif take_module(keys, choice, to, start, findings.qkv_bias if part == "attention.qkv" else True):
                have.add(part + " bias")
            have.add(part)
        weights = [keys.tensors[f"{ours.format(number)}mlp.{part}.weight"] for part in ("hidden", "output")]
        if any(weight.ndim != 2 for weight in weights):
            raise UserError(f"{keys.checkpoint.path} has an MLP in block {number} whose weights are no matrices")
        rows, mlp = weights[0].shape[0], weights[1].shape[1]
        if rows not in (mlp, 2 * mlp):
            raise UserError(
                f"{keys.checkpoint.path} has an MLP of {rows} numbers in block {number} that goes on from {mlp}"
            )
        layer_scale, qk_norm = "attention_scale" in have, "attention.query_norm" in have
        alike.add(Blocks(depth, mlp, layer_scale, qk_norm, "attention.qkv bias" in have, rows == 2 * mlp))
    if len(alike) > 1:
        raise UserError(f"{keys.checkpoint.path} holds blocks that are not alike: use a plain Vision Transformer")
    return alike.pop()


def heads_of(width: int, depth: int, mlp: int, findings: Findings) -> int:
    """As stated; else those of the published model of just these numbers; else 64 a head, and the notes say it.

    Raises UserError where none of that helps.
    """
    if findings.heads is not None:
        if findings.heads < 1 or width % findings.heads:
            raise UserError(
                f"a width of {width} does not divide into {findings.heads} attention heads: give another heads="
            )
        return findings.heads
    for name, variant in VARIANTS.items():
        if (variant.width, variant.depth, variant.mlp) == (width, depth, mlp):
            findings.notes.append(
                f"the file does not say its heads: {variant.heads}, a ViT-{name}'s, are taken (heads=)"
            )
            return variant.heads
    if width % 64:
        raise UserError(
            f"the file does not say how many attention heads its width of {width} is split into: say it with heads="
        )
    findings.notes.append(f"the file does not say its heads: {width // 64}, of 64 numbers each, are taken (heads=)")
    return width // 64


def converted(
    keys: Keys,
    findings: Findings,
    config: ClassifierConfig | ViTConfig,
    head: Head,
    looks: tuple[Preprocess, str],
    labels: tuple[str, ...] = (),
    extra: dict[str, Tensor] | None = None,
) -> Converted:
    """What a format hands on, once every key was taken or skipped. looks: the preprocessing and where it is from.

    What was taken for a backbone stands under "backbone." where config is a classifier's.
    """
    keys.finish()
    tensors, renamed = keys.tensors, keys.renamed
    if isinstance(config, ClassifierConfig):
        tensors = {_placed(name): tensor for name, tensor in tensors.items()}
        renamed = {theirs: _placed(ours) for theirs, ours in renamed.items()}
    return Converted(
        config,
        tensors,
        *looks,
        labels=labels,
        head=head,
        renamed=renamed,
        folded=tuple(findings.folded),
        left_out=keys.left_out,
        notes=tuple(findings.notes),
        extra=extra or {},
    )


def _placed(name: str) -> str:
    return name if name.startswith(("head.", "pool.", "pool_norm.")) else f"backbone.{name}"


class Table(NamedTuple):
    """placed: class and distillation rows. registers: those rows of theirs, which ours do not have."""

    placed: int
    registers: Tensor | None
    image: Size


def _take_table(
    keys: Keys, choice: Choice, at: str, width: int, stride: Size, prefixes: tuple[int, int], findings: Findings
) -> Table:
    """Splits a position table into prefix rows and grid. prefixes: class and distillation token, registers."""
    name = at + chosen(keys, choice, at)[0]
    table = take_rows(keys, name, width)
    count, (tokens, registers) = table.shape[0], prefixes
    possible = [tokens] if findings.placed else list(dict.fromkeys((tokens, 0, tokens + registers)))
    stated = findings.grid
    if stated is None and findings.image is not None:
        stated = (findings.image[0] // stride[0], findings.image[1] // stride[1])
    if stated is None:
        before = next((n for n in possible if count > n and math.isqrt(count - n) ** 2 == count - n), None)
        if before is None:
            raise UserError(
                f"{keys.checkpoint.path} holds {count} positions, which fill no square: say their grid with "
                "grid=ROWSxCOLUMNS, as in 12x16"
            )
        stated = (math.isqrt(count - before),) * 2
        findings.notes.append(
            f"its {count - before} positions are taken as a square grid of {stated[0]} x {stated[1]} patches (grid=)"
        )
    y, x = stated
    before = count - y * x
    if before not in possible:
        raise UserError(
            f"{keys.checkpoint.path} holds {count} positions, which do not fit the {y} x {x} patches that are stated: "
            "say the grid that they are for, with grid=ROWSxCOLUMNS"
        )
    placed = min(before, tokens)
    if placed:
        keys.put("position_embedding.prefix", table[:placed])
    if before > placed:
        findings.folded.append("the registers' positions are added to the registers themselves")
    keys.put("position_embedding.grid", table[before:].reshape(y, x, width), name)
    return Table(placed, table[placed:before] if before > placed else None, (y * stride[0], x * stride[1]))


def whole_number(value: Any) -> int:
    """Of a config's JSON. Raises TypeError for anything else, true and false among it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} in place of a whole number")
    return value


def number_pair(value: Any) -> Size:
    """(height, width) from one whole number or two. Raises TypeError or ValueError for anything else."""
    if not isinstance(value, list | tuple):
        return whole_number(value), value
    height, width = value
    return whole_number(height), whole_number(width)
