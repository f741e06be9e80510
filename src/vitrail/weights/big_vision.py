"""The .npz files of google-research/big_vision: ViTs, SigLIP's and LiT's image towers, PaliGemma's.

Its table of positions has no row for the class token, whose position is part of `cls`; a file without a table has
computed sin-cos positions. Blocks may be stacked along a first axis (nn.scan), and bfloat16 is stored as two nameless
bytes. Files of full training states keep the model under a prefix.

Formats: big_vision/utils.py (load_params) and models/vit.py (fix_old_checkpoints) there.
"""

import math
from itertools import chain
from pathlib import Path

from vitrail.models.classifier import Classifier
from vitrail.models.vit import ViT
from vitrail.weights import official
from vitrail.weights.conversion import Converted, Keys
from vitrail.weights.flax import save_npz
from vitrail.weights.flax_vit import LINEN, read_vit
from vitrail.weights.flax_writing import cannot, check_held, entries_of, split_entries, state_of, stem_positions
from vitrail.weights.source import Checkpoint

NAME = "big_vision"
TOWER = "params/img/"
PREFIXES = (TOWER, "params/", "opt/target/", "")


def recognises(checkpoint: Checkpoint) -> bool:
    return checkpoint.container == "npz" and _prefix(checkpoint) is not None and not official.recognises(checkpoint)


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: tuple[int, int] | None = None) -> Converted:
    """grid: (rows, columns) of the position table, needed where its rows fill no square.

    Of a pair of towers, the one for pictures, whose output is its embedding. A language model's image tower
    (PaliGemma) is a bare backbone: its head projects every token into that model's space.
    """
    prefix = _prefix(checkpoint)
    assert prefix is not None
    keys = Keys(checkpoint, prefix)
    if prefix:
        keys.skip_outside(f"not under {prefix}: another tower, the optimiser's or the training's state")
    if any(name.startswith("params/llm/") for name in checkpoint.names):
        keys.skip("head/*", "projects each token for the language model")
    source = (
        "big_vision's models take a square, bilinear resize and (x - 127.5) / 127.5 unless their recipe says otherwise"
    )
    return read_vit(keys, source, heads=heads, grid=grid, tower=prefix == TOWER)


def write(model: Classifier | ViT, destination: Path) -> tuple[str, ...]:
    """One .npz, each block by its own name; sentences on what it leaves unsaid or folds.

    Raises UserError for what the format cannot hold.
    """
    kinds = ("learned", "learned2d", "sincos2d")
    vit, notes = check_held(model, "big_vision's format", ("class", "mean", "attention"), kinds, ("head", "output"))
    if isinstance(model, Classifier) and model.config.head == "none" and model.config.pool != "attention":
        raise cannot("big_vision's format", f"{model.config.pool} pooling without a head")
    rows = vit.config.grid[0] * vit.config.grid[1]
    if vit.config.class_token and math.isqrt(rows - 1) ** 2 == rows - 1 > 0:
        raise cannot("big_vision's format", f"{rows} patches, which would be read as the class token and {rows - 1}")
    state, table = state_of(model), []
    if vit.config.positions != "sincos2d":
        stem = stem_positions(vit)
        if vit.config.class_token:
            state["prefix"] = state["prefix"] + stem[0, :1]
            stem = stem[:, 1:]
        if vit.config.placed_prefixes:
            notes.append("the class token's position is folded into the class token")
        if vit.config.positions == "learned2d":
            notes.append("the positions of rows and columns are folded into one table")
        table.append(("pos_embedding", stem))
    prefix = TOWER if isinstance(model, Classifier) and model.config.output == "embedding" else "params/"
    tensors = chain(split_entries(state, entries_of(model, vit, LINEN)), table)
    save_npz(destination, ((prefix + name, tensor) for name, tensor in tensors))
    return tuple(notes)


def _prefix(checkpoint: Checkpoint) -> str | None:
    return next((prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in checkpoint), None)
