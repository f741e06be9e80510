"""The .npz files of google-research/vision_transformer: ImageNet-21k, AugReg, SAM, hybrids included.

Two sets of names are about: those of the published files, from before Flax's "linen", and those of files that were
saved again since; both are read, the published ones are written, because every other reader knows them. Nothing in a
file says its preprocessing. In the ImageNet-21k files of the paper the head is all zeros.

Formats: vit_jax/checkpoint.py and models_vit.py there.
"""

from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from vitrail.models.classifier import Classifier
from vitrail.models.vit import ViT
from vitrail.weights.conversion import Converted, Keys
from vitrail.weights.flax import save_npz
from vitrail.weights.flax_vit import OLD, TABLES, read_vit
from vitrail.weights.flax_writing import check_held, entries_of, split_entries, state_of, stem_positions
from vitrail.weights.source import Checkpoint

NAME = "official"


def recognises(checkpoint: Checkpoint) -> bool:
    return checkpoint.container == "npz" and "embedding/kernel" in checkpoint and TABLES[0] in checkpoint


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: tuple[int, int] | None = None) -> Converted:
    """grid: (rows, columns) of the position table, needed where its rows fill no square."""
    return read_vit(
        Keys(checkpoint),
        "the official code resizes to a square, bilinear, and takes (x - 127.5) / 127.5",
        heads=heads,
        grid=grid,
    )


def write(model: Classifier | ViT, destination: Path) -> tuple[str, ...]:
    """One .npz under the published names; sentences on what it leaves unsaid. Raises UserError for what it cannot hold.

    Two learned tables, of rows and of columns, become the one table that they add up to: under zoom that is the same
    at every size.
    """
    vit, notes = check_held(model, "the official format", ("class", "mean"), ("learned", "learned2d"), ("trunk",))
    if vit.config.positions == "learned2d":
        notes.append("the positions of rows and columns are folded into one table")
    if vit.config.class_token and not vit.config.prefix_positions:
        notes.append("the class token, which has no position, has one of zeros in the file")
    if vit.patch_embedding.weight.dtype == torch.bfloat16:
        notes.append("the file holds bfloat16 numbers as float32")
    tensors = chain(split_entries(state_of(model), entries_of(model, vit, OLD)), [(TABLES[0], stem_positions(vit))])
    save_npz(destination, ((name, _plain(tensor)) for name, tensor in tensors))
    return tuple(notes)


def _plain(tensor: Tensor) -> Tensor:
    """NumPy has no bfloat16, and the official code no way around that."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
