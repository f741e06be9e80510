"""The .pth files that DINO's, DINOv2's, DeiT's, MAE's and MoCo v3's authors publish: timm's names, wrapped in training.

Whose file it is, is told by its wrappers and by the tensors that it has and others have not. What else a run leaves in
its files (the other network of a pair, projectors, an optimiser) is left out, and the report says so.
"""

from dataclasses import dataclass, replace

from vitrail.core.types import Interpolation, Numerics, Resampling
from vitrail.models.vit import ViTConfig
from vitrail.weights.conversion import Converted, Keys
from vitrail.weights.looks import IMAGENET, assumed
from vitrail.weights.mae import take_decoder
from vitrail.weights.parts import SCALES, Findings, Size, converted, read_backbone
from vitrail.weights.source import Checkpoint
from vitrail.weights.timm import compare, take_head
from vitrail.weights.timm_json import Stated
from vitrail.weights.timm_names import DIALECT, FOREIGN

NAME = "torch_hub"

PATCH = "patch_embed.proj.weight"

RANK = {"teacher.": 0, "base_encoder.": 1, "momentum_encoder.": 3, "student.": 4, "model_ema.": 5}
"""Of several networks in one file, the one that its authors evaluate has the lowest; what is none of these has 2."""


@dataclass(frozen=True)
class Author:
    """interpolation, resample: of their evaluation's pictures and of their position tables."""

    name: str
    interpolation: Interpolation = "bicubic"
    resample: Resampling = "bicubic"


# Both scale each axis by (new + 0.1) / old, which keeps it from being rounded down; with registers, DINOv2 does not.
DINO = Author("DINO", resample="bicubic-offset")
DINOV2 = Author("DINOv2", resample="bicubic-offset")
DINOV2_REGISTERS = Author("DINOv2 with registers", resample="bicubic-antialias")
DEIT = Author("DeiT")
MAE = Author("MAE")
# Its evaluation's Resize(256) was torchvision's default.
MOCO = Author("MoCo v3", interpolation="bilinear")

MAE_BLOCKS = replace(DIALECT, block="decoder_blocks.{}.", blocks=r"decoder_blocks\.(\d{1,4})\.")


def recognises(checkpoint: Checkpoint) -> bool:
    return _chosen(checkpoint) is not None and not any(FOREIGN.search(name) for name in checkpoint.names)


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: Size | None = None) -> Converted:
    """heads: where not given, what the published model of these numbers has, or 64 a head. grid: as timm's."""
    at = _chosen(checkpoint) or ""
    keys = Keys(checkpoint, at)
    keys.skip_outside("beside the network that is used: the other one of a pair, a projector, or training state")
    author = _author(keys)
    findings = Findings(heads, None, grid, Numerics("erf", 1e-6, author.resample))
    findings.notes.append(f"its tensors are taken for those of {author.name}")
    if author is MOCO:
        keys.skip("head.*", "MoCo's projector, for pre-training alone")
        if heads is None and keys.shape("norm.weight", 1) == (384,):
            findings.heads = 12
            findings.notes.append("MoCo v3's ViT-S has 12 heads of 32 numbers, not 6 of 64: they are taken (heads=)")
    if "fc_norm.weight" in keys:
        findings.required = ()
    if author in (DINOV2, DINOV2_REGISTERS, MOCO) or "decoder_embed.weight" in keys:
        # Surely theirs, and none of their models is without these; what has no mark of its own may be anyone's.
        keys.shape("cls_token")
        findings.qkv_bias = True
    if author in (DINOV2, DINOV2_REGISTERS):
        findings.required = (*findings.required, *SCALES)
    backbone = read_backbone(keys, DIALECT, findings)
    compare(keys, Stated(), backbone, grid)
    extra = {}
    if "decoder_embed.weight" in keys:
        extra = take_decoder(keys, MAE_BLOCKS, "", backbone, findings, None)
    for name in ("mask_token", "masked_embed"):
        keys.skip(name, "takes the place of masked patches, for pre-training alone", backbone.width)
    pool = "avg" if "fc_norm.weight" in keys else "token"
    config, head = take_head(keys, backbone, Stated(pool=pool), findings)
    size = (224, 224) if author in (DINOV2, DINOV2_REGISTERS) and _fits(backbone, 224) else backbone.image
    looks = assumed(size, IMAGENET, author.interpolation, channels=backbone.channels)
    source = f"assumed: these files state none, and this is how the authors of {author.name} evaluate"
    return converted(keys, findings, config, head, (looks, source), extra=extra)


def _author(keys: Keys) -> Author:
    """By what each has and no other. Bare backbones of DINO and DeiT are alike in all but their preprocessing."""
    if "base_encoder." in keys.prefix or "momentum_encoder." in keys.prefix:
        return MOCO
    if "decoder_embed.weight" in keys:
        return MAE
    if "register_tokens" in keys:
        return DINOV2_REGISTERS
    if "mask_token" in keys:
        return DINOV2
    if "head.weight" in keys:
        return MAE if "fc_norm.weight" in keys else DEIT
    return MAE if keys.prefix.startswith("model.") else DINO


def _chosen(checkpoint: Checkpoint) -> str | None:
    """What stands before the names of the network that is used; None where there is none of timm's names."""
    found = [name.removesuffix(PATCH) for name in checkpoint.names if name.endswith(PATCH)]
    found = [at for at in found if any(name.startswith(f"{at}blocks.0.") for name in checkpoint.names)]
    return min(found, key=lambda at: next((rank for word, rank in RANK.items() if word in at), 2), default=None)


def _fits(config: ViTConfig, size: int) -> bool:
    return all(size % side == 0 and size < whole for side, whole in zip(config.stride, config.image, strict=True))
