"""MAE's decoder, as its authors' files and Hugging Face's keep it beside the encoder. It waits in Converted.extra."""

from torch import Tensor

from vitrail.models.vit import ViTConfig
from vitrail.weights.conversion import Keys
from vitrail.weights.modules import take_module, take_rows
from vitrail.weights.parts import Dialect, Findings, read_blocks

UNDER = "decoder."


def take_decoder(
    keys: Keys, blocks: Dialect, at: str, backbone: ViTConfig, findings: Findings, heads: int | None
) -> dict[str, Tensor]:
    """All tensors of a decoder, in the names of models.masked.MAEDecoder; the notes say its sizes.

    blocks: what its blocks are called. at: what all of its names begin with. heads: None where the file cannot say.
    """
    width = keys.shape(f"{at}decoder_embed.weight", 2)[0]
    y, x = backbone.grid
    take_module(keys, f"{at}decoder_embed", f"{UNDER}embedding")
    take_rows(keys, f"{at}mask_token", width, f"{UNDER}mask")
    table = take_rows(keys, f"{at}decoder_pos_embed", width)
    prefixes = backbone.prefixes
    keys.put(f"{UNDER}position_embedding.prefix", table[:prefixes])
    grid = table[prefixes:]
    if len(grid) == y * x:
        grid = grid.unflatten(0, (y, x))
    keys.put(f"{UNDER}position_embedding.grid", grid, f"{at}decoder_pos_embed")
    found = read_blocks(keys, blocks, findings, at, UNDER + "encoder.blocks.{}.")
    take_module(keys, f"{at}decoder_norm", f"{UNDER}encoder.norm")
    take_module(keys, f"{at}decoder_pred", f"{UNDER}output")
    told = "heads that it does not say" if heads is None else f"{heads} heads"
    findings.notes.append(
        f"its decoder is read, apart from the model: width {width}, depth {found.depth}, {told}, MLP {found.mlp}"
    )
    names = [name for name in keys.tensors if name.startswith(UNDER)]
    return {name.removeprefix(UNDER): keys.tensors.pop(name) for name in names}
