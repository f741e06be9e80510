"""The ViT as the official code and big_vision name its parts. The two differ in few names, and in where the class
token's position is kept; their files say so themselves, so that one reader serves both.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import TrunkConfig, places
from vitrail.models.vit import ViTConfig
from vitrail.weights.conversion import Converted, Keys
from vitrail.weights.flax import (
    Entry,
    convolution,
    dense,
    head_state,
    merging,
    named,
    norm,
    numbered,
    projection,
    read_entries,
    read_stacked,
    sizes,
    take,
)


@dataclass(frozen=True)
class Names:
    """What a block's modules are called."""

    attention: str
    mlp_norm: str
    mlp: str


# Before Flax's "linen", modules were numbered in one row, whatever their class; since then, class by class.
OLD = Names("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
LINEN = Names("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")

TABLES = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding")
"""Where a position table may be: the official code's place, and big_vision's before and since 2022."""


def block_entries(config: ViTConfig, names: Names, path: str) -> tuple[Entry, ...]:
    """path: theirs to a block, "Transformer/encoderblock_{}"."""
    ours, attention, mlp = "encoder.blocks.{}", f"{path}/{names.attention}", f"{path}/{names.mlp}"
    return (
        *norm(f"{ours}.attention_norm", f"{path}/LayerNorm_0", config.width),
        *projection(f"{ours}.attention.qkv", attention, ("query", "key", "value"), config.width, config.heads),
        *merging(f"{ours}.attention.output", f"{attention}/out", config.width, config.heads),
        *norm(f"{ours}.mlp_norm", f"{path}/{names.mlp_norm}", config.width),
        *dense(f"{ours}.mlp.hidden", f"{mlp}/Dense_0", config.width, config.mlp),
        *dense(f"{ours}.mlp.output", f"{mlp}/Dense_1", config.mlp, config.width),
    )


def stem_entries(config: ViTConfig) -> tuple[Entry, ...]:
    """All of a backbone but blocks and positions."""
    width, trunk = config.width, config.trunk
    kernel = (*config.patch, trunk.channels if trunk else config.channels, width)
    return (
        *(trunk_entries(trunk, config.channels) if trunk else ()),
        Entry("patch_embedding.weight", ("embedding/kernel",), kernel, "convolution"),
        Entry("patch_embedding.bias", ("embedding/bias",), (width,)),
        *((Entry("prefix", ("cls",), (1, 1, width)),) if config.class_token else ()),
        *norm("encoder.norm", "Transformer/encoder_norm", width),
    )


def trunk_entries(trunk: TrunkConfig, channels: int) -> Iterator[Entry]:
    """A hybrid's ResNet."""
    yield convolution("trunk.root.weight", "conv_root/kernel", 7, channels, trunk.width)
    yield from norm("trunk.root_norm", "gn_root", trunk.width)
    counts = [0] * len(trunk.layers)
    for place in places(trunk.layers, trunk.width):
        stage, inputs, middle, _ = place
        ours = f"trunk.stages.{stage}.{counts[stage]}."
        counts[stage] += 1
        theirs, wide = f"block{stage + 1}/unit{counts[stage]}/", 4 * middle
        sizes = ((1, inputs, middle), (3, middle, middle), (1, middle, wide))
        for number, (side, before, after) in enumerate(sizes, 1):
            yield convolution(f"{ours}conv{number}.weight", f"{theirs}conv{number}/kernel", side, before, after)
            yield from norm(f"{ours}norm{number}", f"{theirs}gn{number}", after)
        if place.projects:
            yield convolution(f"{ours}project.weight", f"{theirs}conv_proj/kernel", 1, inputs, wide)
            yield from norm(f"{ours}project_norm", f"{theirs}gn_proj", wide)


def head_entries(config: ClassifierConfig, pool: str = "MAPHead_0/") -> tuple[Entry, ...]:
    """pool: where theirs keep the attention pool."""
    entries: tuple[Entry, ...] = ()
    vit = config.backbone
    assert isinstance(vit, ViTConfig)
    if config.pool == "attention":
        attention, mlp = f"{pool}{LINEN.attention}", f"{pool}{LINEN.mlp}"
        entries += (
            Entry("pool.probe", (f"{pool}probe",), (1, 1, vit.width)),
            *projection("pool.query", attention, ("query",), vit.width, vit.heads),
            *projection("pool.key_value", attention, ("key", "value"), vit.width, vit.heads),
            *merging("pool.output", f"{attention}/out", vit.width, vit.heads),
            *norm("pool.norm", f"{pool}LayerNorm_0", vit.width),
            *dense("pool.mlp.hidden", f"{mlp}/Dense_0", vit.width, vit.mlp),
            *dense("pool.mlp.output", f"{mlp}/Dense_1", vit.mlp, vit.width),
        )
    if config.hidden is not None:
        entries += dense("head.hidden", "pre_logits", vit.width, config.hidden)
    if config.head == "linear":
        entries += dense("head.output", "head", config.hidden or vit.width, config.classes)
    return entries


def read_vit(
    keys: Keys, source: str, *, heads: int | None = None, grid: tuple[int, int] | None = None, tower: bool = False
) -> Converted:
    """A whole ViT under the keys' prefix, what it has of pool and head included.

    source: what the preprocessing is assumed from. heads: must agree with the file, which says it. grid: the position
        table's (rows, columns). tower: one of a pair, whose output is an embedding and not logits.
    Raises UserError that names what is missing, misshapen or left over; and where positions fill no square and no
    grid is given.
    """
    stacked = "Transformer/encoderblock/LayerNorm_0/scale" in keys
    path = "Transformer/encoderblock" if stacked else "Transformer/encoderblock_{}"
    names = OLD if any(f"/{OLD.attention}/" in name for name in keys) else LINEN
    table = next((name for name in TABLES if name in keys), None)
    config, notes = _backbone(keys, path.format(0), names, stacked, table, heads, grid)
    pool = "MAPHead_0/" if "MAPHead_0/probe" in keys else ""
    has_head, has_pool = "head/kernel" in list(keys), f"{pool}probe" in keys
    if has_pool and config.class_token:
        raise UserError(
            f"{keys.checkpoint.path} has an attention pool and a class token, which big_vision never has together: "
            "use a checkpoint that was not changed"
        )
    whole: ViTConfig | ClassifierConfig = config
    if has_head or has_pool:
        hidden = has_head and "pre_logits/kernel" in keys
        whole = ClassifierConfig(
            config,
            classes=sizes(keys, "head/kernel", 2)[1] if has_head else config.width,
            pool="attention" if has_pool else "class" if config.class_token else "mean",
            hidden=sizes(keys, "pre_logits/kernel", 2)[1] if hidden else None,
            head="linear" if has_head else "none",
            output="embedding" if tower or not has_head else "logits",
        )
    if not has_head:
        keys.skip("pre_logits/*", "the hidden layer of a head that is not there")
    ours = "" if whole is config else "backbone."
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.build(device="meta").state_dict().items()}
    read_entries(keys, (entry.under(ours) for entry in stem_entries(config)), shapes)
    blocks = [entry.under(ours) for entry in block_entries(config, names, path)]
    if stacked:
        read_stacked(keys, blocks, shapes, config.depth)
    else:
        read_entries(keys, (entry.at(block) for block in range(config.depth) for entry in blocks), shapes)
    if table is not None:
        _read_table(keys, table, config, f"{ours}position_embedding.")
    if isinstance(whole, ClassifierConfig):
        read_entries(keys, head_entries(whole, pool), shapes)
    keys.finish()
    state = head_state(keys.tensors)
    channels = (0.5,) * config.channels
    return Converted(
        config=whole,
        tensors=keys.tensors,
        preprocess=Preprocess(size=config.image, mean=channels, deviation=channels),
        preprocess_source=f"assumed: {source}",
        head="usable" if has_pool and not has_head else state,
        renamed=keys.renamed,
        left_out=keys.left_out,
        notes=notes,
    )


def _backbone(
    keys: Keys,
    block: str,
    names: Names,
    stacked: bool,
    table: str | None,
    heads: int | None,
    grid: tuple[int, int] | None,
) -> tuple[ViTConfig, tuple[str, ...]]:
    """The config that shapes and names say, and notes on what they do not. block: the path of the first one."""
    tall, wide, inputs, width = sizes(keys, "embedding/kernel", 4)
    trunk = _trunk(keys)
    cell = trunk.stride if trunk else 1
    stride = tall * cell, wide * cell
    *_, found, _ = sizes(keys, f"{block}/{names.attention}/query/kernel", 4 if stacked else 3)
    *_, mlp = sizes(keys, f"{block}/{names.mlp}/Dense_0/kernel", 3 if stacked else 2)
    if stacked:
        depth = sizes(keys, f"{block}/LayerNorm_0/scale", 2)[0]
    else:
        depth = numbered(keys, "Transformer/encoderblock_{}/", "LayerNorm_0/scale", 0)
    if heads is not None and heads != found:
        raise UserError(
            f"{keys.checkpoint.path} has {found} attention heads, not the {heads} asked for: leave heads out"
        )
    class_row = False
    if tall != wide and grid is None:
        raise UserError(
            f"{keys.checkpoint.path} has patches of {tall} x {wide} pixels, which no published model has: if it is so "
            "meant, say the grid that its positions are for, with grid=ROWSxCOLUMNS"
        )
    if table is None and names is OLD:
        keys.shape(TABLES[0])  # big_vision alone computes positions, and never had those names
    if table is None:
        size = computed_size(stride)
        y, x = grid or (size[0] // stride[0], size[1] // stride[1])
        note = (
            "it has no position table, which in big_vision means computed sin-cos positions; the size it was trained "
            f"at is not in the file, and {size[0]} x {size[1]} pixels are taken"
        )
    else:
        rows = sizes(keys, table, 3)[1]
        class_row = _has_class_row(keys, table, rows, grid)
        cells = rows - class_row
        y, x = grid or (math.isqrt(cells), math.isqrt(cells))
        if "cls" not in keys and math.isqrt(rows - 1) ** 2 == rows - 1 and y * x != cells:
            raise UserError(
                f"{keys.checkpoint.path} lacks the tensor {keys.prefix}cls, though its positions are for a class token "
                f"and {rows - 1} patches: use a checkpoint that is whole"
            )
        if y * x != cells:
            fault = f"not for the {y} x {x} of the grid asked for" if grid else "which fill no square"
            raise UserError(
                f"{keys.checkpoint.path} has positions for {cells} patches, {fault}: give their grid=ROWSxCOLUMNS"
            )
        note = f"its {cells} positions are taken as a square grid of {y} x {x} patches"
    with named(keys):
        config = ViTConfig(
            width=width,
            depth=depth,
            heads=found,
            mlp=mlp,
            patch=(tall, wide),
            image=(y * stride[0], x * stride[1]),
            channels=sizes(keys, "conv_root/kernel", 4)[2] if trunk else inputs,
            class_token="cls" in keys,
            positions="sincos2d" if table is None else "learned",
            prefix_positions=class_row or "cls" not in keys,
            trunk=trunk,
        )
    return config, () if grid else (note,)


def computed_size(stride: tuple[int, int]) -> tuple[int, int]:
    """What size to take for a model whose positions are computed: about 224 pixels, as for a new one."""
    return max(round(224 / stride[0]), 1) * stride[0], max(round(224 / stride[1]), 1) * stride[1]


def _has_class_row(keys: Keys, table: str, rows: int, grid: tuple[int, int] | None) -> bool:
    """Whether the table's first row is the class token's: always in the official code, in big_vision until 2022."""
    if "cls" not in keys or table != "pos_embedding":
        return "cls" in keys
    return rows == grid[0] * grid[1] + 1 if grid else rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1


def _trunk(keys: Keys) -> TrunkConfig | None:
    if "conv_root/kernel" not in keys:
        return None
    stages = range(1, 1 + numbered(keys, "block{}/", "unit1/conv1/kernel", 1))
    units = [numbered(keys, f"block{stage}/unit{{}}/", "conv1/kernel", 1) for stage in stages]
    with named(keys):
        return TrunkConfig(tuple(units), sizes(keys, "conv_root/kernel", 4)[-1])


def _read_table(keys: Keys, table: str, config: ViTConfig, ours: str) -> None:
    y, x = config.grid
    rows = config.class_token and config.prefix_positions
    found = take(keys, table, (1, rows + y * x, config.width))[0]
    if rows:
        keys.put(f"{ours}prefix", found[:1].clone())
    keys.put(f"{ours}grid", found[rows:].reshape(y, x, -1).clone(), table)
