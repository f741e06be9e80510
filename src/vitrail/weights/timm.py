"""timm's checkpoints: a bare state dict, which cannot say how many heads or what preprocessing, or a hub folder, which can.

timm drops the pre-logits layer that old files hold; here it is kept, as a hidden layer of the head.
"""

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics
from vitrail.layers.heads import PoolKind
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import TrunkConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.conversion import Converted, Head, Keys
from vitrail.weights.modules import TWO_HEADS, head_state, take_module, take_rows, take_two_heads
from vitrail.weights.parts import Findings, Size, converted, read_backbone
from vitrail.weights.source import Checkpoint
from vitrail.weights.timm_json import Stated, read_config, read_preprocess, read_stated
from vitrail.weights.timm_names import DIALECT, FOREIGN, POOL, TRUNK_EPSILON, TRUNK_STANDARDIZATION, TRUNK_UNIT
from vitrail.weights.timm_writing import write

__all__ = ["NAME", "convert", "recognises", "write"]

NAME = "timm"

# The averaged weights of a training run come before the last ones, as timm's own load_checkpoint takes them.
WRAPPERS = (
    "",
    "state_dict_ema.",
    "state_dict.",
    "state_dict_ema.module.",
    "state_dict.module.",
    "module.",
    "timm_model.",
)
OWN = (
    *("head.weight", "attn_pool.latent", "fc_norm.weight", "norm_pre.weight", "reg_token", "dist_token"),
    *("blocks.0.ls1.gamma", "blocks.0.attn.q_norm.weight"),
)
"""What a bare backbone of DINO has not."""

POOLS: dict[str, PoolKind] = {"token": "class", "avg": "mean", "map": "attention"}


def recognises(checkpoint: Checkpoint) -> bool:
    """timm's names. A bare .pth of a plain ViT without a head is taken for DINO's (torch_hub), which publishes those."""
    at = _wrapper(checkpoint)
    if at is None or any(FOREIGN.search(name) for name in checkpoint.names):
        return False
    if "architecture" in read_config(checkpoint):
        return True
    if any(at + name in checkpoint for name in ("mask_token", "register_tokens", "decoder_embed.weight")):
        return False
    return checkpoint.container != "torch" or any(at + name in checkpoint for name in OWN)


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: Size | None = None) -> Converted:
    """heads: where no config says them. grid: (rows, columns) of positions that fill no square."""
    at = _wrapper(checkpoint)
    keys = Keys(checkpoint, at or "")
    keys.skip_outside("beside the weights that are used: training state, or another copy of them")
    stated = read_stated(checkpoint)
    norm_pre = "norm_pre.weight" in keys
    epsilon = stated.epsilon or (1e-5 if norm_pre else 1e-6)
    findings = Findings(
        _agreed(checkpoint, stated.heads, heads),
        stated.image,
        grid,
        Numerics(stated.gelu or "erf", epsilon, "bicubic-antialias"),
    )
    # timm leaves the patch embedding's bias away before a norm.
    findings.patch_bias = None if norm_pre else True
    findings.positions = "learned" if stated.positions else "none"
    if "fc_norm.weight" in keys or not stated.final_norm:
        findings.required = ()
    if stated.gelu is None and norm_pre:
        findings.notes.append(
            "CLIP towers have the erf or the quick GELU, and the file does not say which: erf is taken"
        )
    trunk, channels = _take_trunk(keys)
    backbone = read_backbone(keys, DIALECT, findings, trunk=trunk, channels=channels)
    compare(keys, stated, backbone, grid)
    if findings.heads is None and stated.width not in (None, backbone.width):
        raise UserError(
            f"{checkpoint.path} names an architecture of width {stated.width} in {stated.where}, but its tensors have "
            f"{backbone.width}, so that its attention heads are not known: say them with heads="
        )
    config, head = take_head(keys, backbone, stated, findings)
    classes = config.classes if isinstance(config, ClassifierConfig) else None
    labels = stated.labels if len(stated.labels) == classes else ()
    return converted(keys, findings, config, head, read_preprocess(stated, backbone, findings), labels)


def compare(keys: Keys, stated: Stated, backbone: ViTConfig, grid: Size | None) -> None:
    """Raises UserError where the config states another architecture than the tensors have, and where nobody vouches for
    patches that are not square: no published model has those, but a kernel that was cut has."""
    found = {
        "patch_size": backbone.patch,
        "in_chans": backbone.channels,
        "embed_dim": backbone.width,
        "depth": backbone.depth,
        "class_token": backbone.class_token,
        "reg_tokens": backbone.registers,
        "no_embed_class": not backbone.placed_prefixes,
        "qkv_bias": backbone.qkv_bias,
        "qk_norm": backbone.qk_norm,
        "pre_norm": backbone.pre_norm,
        "init_values": backbone.layer_scale,
        "num_classes": keys.shape("head.weight", 2)[0] if "head.weight" in keys else 0,
    }
    said = stated.parts | ({"num_classes": stated.classes} if stated.classes else {})
    if not backbone.class_token or backbone.positions != "learned":
        said.pop("no_embed_class", None)
    for name, value in said.items():
        if found[name] != value:
            raise UserError(
                f"{keys.checkpoint.path} says {name} {value} in {stated.where}, but its tensors have {found[name]}: use "
                "files that belong together"
            )
    if "patch_size" not in said and grid is None and backbone.patch[0] != backbone.patch[1]:
        raise UserError(
            f"{keys.checkpoint.path} has patches of {backbone.patch[0]} x {backbone.patch[1]} pixels, which no published "
            "model has: if it is so meant, say the grid that its positions are for, with grid=ROWSxCOLUMNS"
        )


def take_head(
    keys: Keys, backbone: ViTConfig, stated: Stated, findings: Findings
) -> tuple[ClassifierConfig | ViTConfig, Head]:
    """Takes pool and head, if any; what they make of the backbone, and whether there is a head that can be used."""
    pool = _pool(keys, backbone, stated, findings)
    width, hidden, pool_norm = backbone.width, None, "fc_norm.weight" in keys
    if pool == "attention":
        take_rows(keys, "attn_pool.latent", width, "pool.probe")
        for ours, theirs in POOL.items():
            take_module(keys, theirs, ours)
        if tuple(keys.tensors["pool.mlp.hidden.weight"].shape) != (backbone.mlp, width):
            raise UserError(
                f"{keys.checkpoint.path} has an attention pool of another MLP width than its blocks: not read"
            )
    if pool_norm:
        take_module(keys, "fc_norm", "pool_norm")
    if "pre_logits.fc.weight" in keys:
        hidden = keys.shape("pre_logits.fc.weight", 2)[0]
        take_module(keys, "pre_logits.fc", "head.hidden")
    if "head.weight" not in keys:
        if hidden is not None:
            raise UserError(f"{keys.checkpoint.path} has a pre-logits layer and no head on it: not read")
        if pool != "attention" and not pool_norm:
            return backbone, "absent"
        findings.notes.append("it has no classes: what comes out is the pooled vector")
        return ClassifierConfig(backbone, width, pool, pool_norm=pool_norm, head="none", output="embedding"), "usable"
    classes = keys.shape("head.weight", 2)[0]
    if pool == "prefix":
        take_two_heads(keys, ("head", "head_dist"))
        findings.folded.append(TWO_HEADS)
    else:
        take_module(keys, "head", "head.output")
    config = ClassifierConfig(backbone, classes, pool, hidden, pool_norm=pool_norm)
    return config, head_state(keys.tensors["head.output.weight"])


def _pool(keys: Keys, backbone: ViTConfig, stated: Stated, findings: Findings) -> PoolKind:
    """As config.json says; else as the tensors do, which leave one doubt: class token or mean, both after the norm."""
    if "head_dist.weight" in keys:
        return "prefix"
    attention = "attn_pool.latent" in keys
    if stated.pool:
        if stated.pool not in POOLS or (stated.pool == "map") != attention:
            raise UserError(f"{keys.checkpoint.path} pools by {stated.pool!r}, which its tensors do not fit: not read")
        return POOLS[stated.pool]
    if attention:
        return "attention"
    mean = "fc_norm.weight" in keys or not backbone.class_token
    if backbone.class_token and ("head.weight" in keys or mean) and stated.preprocess is None:
        what = "the mean of the patch tokens" if mean else "the class token"
        findings.notes.append(
            f"the file does not say what it pools by: {what}, timm's default with these tensors, is taken"
        )
    return "mean" if mean else "class"


def _take_trunk(keys: Keys) -> tuple[TrunkConfig | None, int]:
    """A hybrid's ResNet and the channels that it takes; None where there is none."""
    at = "patch_embed.backbone."
    if not any(name.startswith(at) for name in keys):
        return None, 0
    root_only = at + "conv.weight" in keys
    root = at if root_only else at + "stem."
    if root + "conv.weight" not in keys:
        raise UserError(
            f"{keys.checkpoint.path} is a hybrid on another network than timm's ResNetV2 (it has "
            f"{next(name for name in keys if name.startswith(at))}): convert one of the paper's hybrids"
        )
    width, channels, *_ = keys.shape(root + "conv.weight", 4)
    layers: list[int] = []
    while count := keys.count(f"{at}stages.{len(layers)}.blocks.{{}}.conv1.weight"):
        layers.append(count)
    keys.take(root + "conv.weight", "trunk.root.weight")
    take_module(keys, root + "norm", "trunk.root_norm")
    for stage, count in enumerate(layers):
        for unit in range(count):
            theirs, ours = f"{at}stages.{stage}.blocks.{unit}.", f"trunk.stages.{stage}.{unit}."
            for name, part in TRUNK_UNIT.items():
                if name.startswith("project") and unit:
                    continue
                keys.take(f"{theirs}{part}.weight", f"{ours}{name}.weight")
                if "norm" in name:
                    keys.take(f"{theirs}{part}.bias", f"{ours}{name}.bias")
    return TrunkConfig(tuple(layers), width, TRUNK_EPSILON, TRUNK_STANDARDIZATION), channels


def _wrapper(checkpoint: Checkpoint) -> str | None:
    """What stands before timm's names in this file; None where they are not there."""
    wanted = ("patch_embed.proj.weight", "blocks.0.norm1.weight")
    return next((at for at in WRAPPERS if all(at + name in checkpoint for name in wanted)), None)


def _agreed(checkpoint: Checkpoint, stated: int | None, asked: int | None) -> int | None:
    if stated is not None and asked is not None and stated != asked:
        raise UserError(
            f"{checkpoint.path} states {stated} attention heads, not the {asked} asked for: leave heads out"
        )
    return stated or asked
