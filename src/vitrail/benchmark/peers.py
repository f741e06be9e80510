"""The same model in other people's libraries, with random weights: what a measurement is compared with.

Each is built from our config, not by name, so that any plain ViT has a peer. Neither library is a dependency.
"""

import importlib.util
from typing import Any

from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViTConfig

PEERS = ("timm", "transformers")


def wanted(against: str, known: tuple[str, ...] = PEERS) -> tuple[str, ...]:
    """The peers of a flag such as "timm,transformers", in its order. Raises UserError on others, and on missing ones."""
    names = tuple(name.strip() for name in against.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise UserError(f"--against {name} is not known; give {' or '.join(known)}, or both with a comma.")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--against {name}: the package cannot be imported; install it, or leave it out.")
        if name == "transformers":
            continue  # which takes seconds, and imports what else it needs as it is asked for
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"--against {name}: {name} cannot be imported ({str(error).splitlines()[0]}); bench/peers/README.md says "
                "how it can, or leave it out."
            ) from error
    return names


def build(library: str, config: ViTConfig | ResNetConfig, classes: int) -> nn.Module:
    """A classifier of that library, images (b c h w) to logits (b k). Raises UserError for what it has no equal of.

    library: of PEERS, or "timm-written": timm with its fused attention switched off, whose training in bf16 on a CPU is
        the faster of the two.
    """
    plain = isinstance(config, ViTConfig) and config.trunk is None and config.class_token
    if not isinstance(config, ViTConfig) or not plain or config.positions != "learned" or config.feed_forward != "mlp":
        raise UserError(f"--against {library} compares plain ViTs with a class token; leave it out for this model.")
    if config.position_layers != "stem" or config.distillation_token or config.registers:
        raise UserError(f"--against {library} compares plain ViTs without registers; leave it out for this model.")
    if library == "transformers":
        return _transformers(config, classes)
    layers: Any = importlib.import_module("timm.layers")
    layers.set_fused_attn(library == "timm")
    try:
        return _timm(config, classes)
    finally:
        layers.set_fused_attn(True)


def _timm(config: ViTConfig, classes: int) -> nn.Module:
    # By the module's name, so that nobody needs the package to check the types of this one.
    vision: Any = importlib.import_module("timm.models.vision_transformer")
    model: nn.Module = vision.VisionTransformer(
        img_size=config.image,
        patch_size=config.patch,
        in_chans=config.channels,
        num_classes=classes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp / config.width,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        init_values=1e-5 if config.layer_scale else None,
    )
    return model


def _transformers(config: ViTConfig, classes: int) -> nn.Module:
    if config.layer_scale or config.qk_norm or config.patch[0] != config.patch[1]:
        raise UserError("--against transformers compares plain ViTs with square patches; leave it out for this model.")
    transformers: Any = importlib.import_module("transformers")
    theirs = transformers.ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp,
        image_size=list(config.image),
        patch_size=config.patch[0],
        num_channels=config.channels,
        qkv_bias=config.qkv_bias,
        num_labels=classes,
        attn_implementation="sdpa",
    )
    return _Logits(transformers.ViTForImageClassification(theirs))


class _Logits(nn.Module):
    """The logits out of what transformers gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits
