"""The .npz files of google-research/big_transfer: BiT ResNets under their TensorFlow names.

Units are a, b, c for the three convolutions; a few files number the convolutions' modules where others do not. Whether
a file was trained on ImageNet-21k or fine-tuned, its names and shapes are the same; nothing says its preprocessing.

Format: big_vision/models/bit_paper.py (maybe_convert_big_transfer_format).
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from vitrail.core.types import Preprocess
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import ResNetConfig, places
from vitrail.weights.conversion import Converted, Keys
from vitrail.weights.flax import Entry, convolution, head_state, named, numbered, read_entries, sizes
from vitrail.weights.source import Checkpoint

NAME = "bit"
ROOT = "resnet/root_block/standardized_conv2d/kernel"
HEAD = "resnet/head/conv2d/"


def recognises(checkpoint: Checkpoint) -> bool:
    return checkpoint.container == "npz" and any(_plain(name) == ROOT for name in checkpoint.names)


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: tuple[int, int] | None = None) -> Converted:
    """heads and grid are a ViT's, and not looked at. Raises UserError that names what is missing or left over."""
    keys = Keys(checkpoint)
    real = {_plain(name): name for name in keys}
    *_, channels, width = sizes(keys, real[ROOT], 4)
    stages = range(1, 1 + numbered(keys, "resnet/block{}/", "unit01/a/group_norm/gamma", 1))
    layers = [numbered(keys, f"resnet/block{stage}/unit{{:02}}/", "a/group_norm/gamma", 1) for stage in stages]
    factor = width // 64 if width % 64 == 0 else 1
    with named(keys):
        backbone = ResNetConfig(tuple(layers), factor, channels=channels, root_width=width // factor)
    has_head = HEAD + "kernel" in keys
    config = ClassifierConfig(backbone, sizes(keys, HEAD + "kernel", 4)[3], "mean") if has_head else backbone
    ours = "backbone." if has_head else ""
    entries = [entry.under(ours) for entry in _backbone_entries(backbone)]
    if isinstance(config, ClassifierConfig):
        kernel = (1, 1, backbone.width, config.classes)
        entries.append(Entry("head.output.weight", (HEAD + "kernel",), kernel, "matrix"))
        entries.append(Entry("head.output.bias", (HEAD + "bias",), (config.classes,)))
    shapes = {name: tuple(tensor.shape) for name, tensor in config.build(device="meta").state_dict().items()}
    actual = (replace(entry, theirs=tuple(real.get(name, name) for name in entry.theirs)) for entry in entries)
    read_entries(keys, actual, shapes)
    keys.finish()
    middle = (0.5,) * channels
    return Converted(
        config=config,
        tensors=keys.tensors,
        preprocess=Preprocess(size=backbone.image, mean=middle, deviation=middle),
        preprocess_source=(
            "assumed: BiT resizes to a square, bilinear, and takes (x - 127.5) / 127.5; the size is not in the file, "
            "224 pixels in pre-training and 480 in its fine-tuning on ImageNet"
        ),
        head=head_state(keys.tensors),
        renamed=keys.renamed,
        left_out=keys.left_out,
    )


def _plain(name: str) -> str:
    return re.sub(r"/standardized_conv2d_\d+/", "/standardized_conv2d/", name)


def _backbone_entries(config: ResNetConfig) -> Iterator[Entry]:
    yield convolution("root.weight", ROOT, 7, config.channels, config.root_channels)
    counts = [0] * config.depth
    for place in places(config.layers, config.root_channels):
        stage, inputs, middle, _ = place
        ours = f"stages.{stage}.{counts[stage]}."
        counts[stage] += 1
        theirs = f"resnet/block{stage + 1}/unit{counts[stage]:02}/"
        sizes = (("a", 1, inputs, middle), ("b", 3, middle, middle), ("c", 1, middle, 4 * middle))
        for number, (letter, side, before, after) in enumerate(sizes, 1):
            yield from _norm(f"{ours}norm{number}", f"{theirs}{letter}/group_norm", before)
            kernel = f"{theirs}{letter}/standardized_conv2d/kernel"
            yield convolution(f"{ours}conv{number}.weight", kernel, side, before, after)
        if place.projects:
            kernel = f"{theirs}a/proj/standardized_conv2d/kernel"
            yield convolution(f"{ours}project.weight", kernel, 1, inputs, 4 * middle)
    yield from _norm("norm", "resnet/group_norm", config.width)


def _norm(ours: str, theirs: str, width: int) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}.weight", (f"{theirs}/gamma",), (width,)),
        Entry(f"{ours}.bias", (f"{theirs}/beta",), (width,)),
    )
