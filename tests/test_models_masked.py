"""MAE's decoder: Hugging Face's prediction and loss, from its own noise, and the joints it needs of the encoder."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Features, Numerics, Tokens
from vitrail.models.masked import MAEDecoder, MAEDecoderConfig
from vitrail.models.vit import ViT, ViTConfig

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-5
"""Of the largest value of the output."""

ENCODER = ViTConfig(24, 2, 3, 48, (8, 8), (64, 64), numerics=Numerics("erf", 1e-12, "bicubic"))
DECODER = MAEDecoderConfig(ENCODER, 16, 1, 2, 32)

WORDS = (
    (r"^(vit|decoder)\.(decoder_)?encoder\.layer\.", "encoder.blocks."),
    (r"^(vit\.layernorm|decoder\.decoder_norm)\.", "encoder.norm."),
    (r"\.layernorm_before\.", ".attention_norm."),
    (r"\.layernorm_after\.", ".mlp_norm."),
    (r"\.attention\.output\.dense\.", ".attention.output."),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.intermediate\.dense\.", ".mlp.hidden."),
    (r"(\d)\.output\.dense\.", r"\1.mlp.output."),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embedding."),
    (r"^decoder\.decoder_embed\.", "embedding."),
    (r"^decoder\.decoder_pred\.", "output."),
)


def ours(there: dict[str, Tensor], whose: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in there.items():
        if name.startswith(whose):
            for pattern, new in WORDS:
                name = re.sub(pattern, new, name)
            found[name] = tensor
    for name in [name for name in found if ".attention.query." in name]:
        parts = [found.pop(name.replace("query", word)) for word in ("query", "key", "value")]
        found[name.replace("query", "qkv")] = torch.cat(parts)
    table = found.pop("vit.embeddings.position_embeddings" if whose == "vit." else "decoder.decoder_pos_embed")[0]
    found |= {"position_embedding.prefix": table[:1], "position_embedding.grid": table[1:].unflatten(0, (8, 8))}
    renamed = {"vit.embeddings.cls_token": "prefix", "decoder.mask_token": "mask"}
    return {renamed.get(name, name): tensor[0] if name in renamed else tensor for name, tensor in found.items()}


def models() -> tuple[ViT, MAEDecoder]:
    there = load_file(FIXTURES / "hf_mae" / "model.safetensors")
    encoder, decoder = ENCODER.build(device="meta"), DECODER.build(device="meta")
    encoder.load_state_dict(ours(there, "vit."), assign=True)
    decoder.load_state_dict(ours(there, "decoder."), assign=True)
    return encoder.eval(), decoder.eval()


def leave(tokens: Tokens, noise: Tensor, count: int) -> tuple[Tokens, Tensor]:
    """The `count` patches of least noise, and where each patch stands when these come first."""
    order = noise.argsort(dim=1)
    rows = torch.arange(noise.shape[0])[:, None]
    left = order[:, :count]
    return Tokens(tokens.x[rows, left], tokens.coords[rows, left], None), order.argsort(dim=1)


def test_mask_prediction_and_loss_are_hugging_faces() -> None:
    encoder, decoder = models()
    with np.load(FIXTURES / "hf_mae_io.npz") as io:
        images, noise = torch.from_numpy(io["images_nchw"]), torch.from_numpy(io["noise"])
        tokens, restore = leave(encoder.tokenize(images), noise, 16)
        prediction = decoder(encoder.encode(tokens, encoder.positions(tokens)), restore)
        mask = (restore >= 16).float()
        assert np.array_equal(mask.numpy(), io["mask"])
        expected = io["prediction"]
        np.testing.assert_allclose(prediction.detach(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
        pixels = images.unflatten(2, (8, 8)).unflatten(4, (8, 8)).permute(0, 2, 4, 3, 5, 1).reshape(2, 64, 192)
        loss = ((prediction - pixels).square().mean(-1) * mask).sum() / mask.sum()
        assert loss.item() == pytest.approx(io["loss"].item(), rel=TOLERANCE)


def test_dropping_tokens_before_or_after_positions_is_the_same() -> None:
    encoder, _ = models()
    tokens = encoder.tokenize(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    left, restore = leave(tokens, torch.rand(2, 64, generator=torch.Generator().manual_seed(1)), 20)
    stem, whole = encoder.positions(left).stem, encoder.positions(tokens).stem
    assert stem is not None
    assert whole is not None
    for row in range(2):
        kept = restore[row].argsort()[:20]
        assert torch.equal(stem[row], torch.cat([whole[0, :1], whole[0, 1 + kept]]))


@pytest.mark.parametrize("backbone", [ENCODER, replace(ENCODER, class_token=False, channels=1, image=(32, 48))])
def test_counts_initialisation_and_another_size(backbone: ViTConfig) -> None:
    config = replace(DECODER, backbone=backbone)
    one, same, other = config.build(1), config.build(1), config.build(2)
    assert sum(parameter.numel() for parameter in one.parameters()) == config.parameters()
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        assert parameter.isfinite().all()
        assert parameter.requires_grad != name.startswith("position_embedding.")
    assert not torch.equal(one.mask, other.mask)
    prefix = torch.zeros(2, backbone.prefixes, 24)
    features = Features(prefix, torch.ones(2, 5, 24), None, (8, 8))
    prediction = one(features, torch.randperm(30).expand(2, -1), grid=(5, 6))
    assert prediction.shape == (2, 30, 64 * backbone.channels)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4 and of its heads"):
        replace(DECODER, heads=3)
