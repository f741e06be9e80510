"""timm's checkpoints: a bare state dict, which cannot say how many heads or what preprocessing, or a hub folder, which can.

timm drops the pre-logits layer that old files hold; here it is kept, as a hidden layer of the head.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, get_args

from vitrail.core.errors import UserError
from vitrail.core.types import Gelu, Interpolation, Numerics, Preprocess
from vitrail.layers.heads import PoolKind
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import TrunkConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.conversion import Converted, Head, Keys
from vitrail.weights.looks import CLIP, HALF, IMAGENET, assumed, fitted
from vitrail.weights.modules import TWO_HEADS, head_state, rows, take_module, take_two_heads
from vitrail.weights.parts import Findings, Size, converted, read_backbone
from vitrail.weights.source import Checkpoint
from vitrail.weights.timm_names import (
    DIALECT,
    FOREIGN,
    GELUS,
    HEADER,
    HEADS,
    NO_NORM,
    POOL,
    REFUSED,
    TRUNK_EPSILON,
    TRUNK_STANDARDIZATION,
    TRUNK_UNIT,
    gelu_of,
)
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
    if "architecture" in _config(checkpoint):
        return True
    if any(at + name in checkpoint for name in ("mask_token", "register_tokens", "decoder_embed.weight")):
        return False
    return checkpoint.container != "torch" or any(at + name in checkpoint for name in OWN)


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: Size | None = None) -> Converted:
    """heads: where no config says them. grid: (rows, columns) of positions that fill no square."""
    at = _wrapper(checkpoint)
    keys = Keys(checkpoint, at or "")
    keys.skip_outside("beside the weights that are used: training state, or another copy of them")
    stated = _stated(checkpoint)
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
    config, head = take_head(keys, backbone, stated, findings)
    classes = config.classes if isinstance(config, ClassifierConfig) else None
    labels = stated.labels if len(stated.labels) == classes else ()
    return converted(keys, findings, config, head, _preprocess(stated, backbone, findings), labels)


@dataclass(frozen=True)
class Stated:
    """What config.json says; None and empty where it does not, or there is none."""

    heads: int | None = None
    image: Size | None = None
    gelu: Gelu | None = None
    epsilon: float | None = None
    positions: bool = True
    final_norm: bool = True
    pool: str = ""
    preprocess: dict[str, Any] | None = None
    labels: tuple[str, ...] = ()
    where: str = "config.json"


def _stated(checkpoint: Checkpoint) -> Stated:
    config = _config(checkpoint)
    if "architecture" not in config:
        return Stated()
    architecture, arguments = str(config["architecture"]), config.get("model_args") or {}
    # Before 2023 the preprocessing stood at the root.
    looks = config.get("pretrained_cfg") or config.get("default_cfg") or config
    where = f"{checkpoint.path}'s {'header' if checkpoint.config is None else 'config.json'}"
    for expression, what in REFUSED.items():
        if expression.search(architecture):
            raise UserError(f"{where} names {architecture}, which has {what}: convert a plain Vision Transformer")
    try:
        names = config.get("label_names") or looks.get("label_names") or config.get("labels") or ()
        words = config.get("label_descriptions") or looks.get("label_descriptions") or {}
        if isinstance(names, dict):
            names = [names[key] for key in sorted(names, key=int)]
        activation, norm = arguments.get("act_layer"), str(arguments.get("norm_layer") or "layernorm")
        swiglu = "mlp_layer" in arguments or "giant_patch14" in architecture
        if norm.replace("_", "").lower() != "layernorm":
            raise UserError(f"{where} asks for {norm}: only models with layer norms are read")
        if activation is not None and activation not in GELUS and not swiglu:
            raise UserError(f"{where} asks for the activation {activation}: {', '.join(GELUS)} are known")
        if arguments.get("pool_include_prefix"):
            raise UserError(f"{where} asks for a pool that looks at the prefix tokens: convert a plain model")
        size = arguments.get("img_size") or (looks.get("input_size") or (None,))[1:] or None
        return Stated(
            heads=int(arguments.get("num_heads") or HEADS.get(architecture, 0)) or None,
            image=None if size is None else _pair(size),
            gelu=GELUS.get(activation) if activation else gelu_of(architecture),
            epsilon=float(config.get("norm_epsilon", 1e-5 if "_clip_" in architecture else 1e-6)),
            positions=arguments.get("pos_embed", "learn") not in ("", "none"),
            final_norm=bool(arguments.get("final_norm", not NO_NORM.search(architecture))),
            pool=str(arguments.get("global_pool", config.get("global_pool", "avg" if "_gap_" in architecture else ""))),
            preprocess=dict(looks),
            labels=tuple(str(words.get(name, name)) for name in names),
            where="its header" if checkpoint.config is None else "config.json",
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} does not have timm's form ({error}): copy it again, or take it away") from error


def take_head(
    keys: Keys, backbone: ViTConfig, stated: Stated, findings: Findings
) -> tuple[ClassifierConfig | ViTConfig, Head]:
    """Takes pool and head, if any; what they make of the backbone, and whether there is a head that can be used."""
    pool = _pool(keys, backbone, stated, findings)
    width, hidden, pool_norm = backbone.width, None, "fc_norm.weight" in keys
    if pool == "attention":
        keys.take("attn_pool.latent", "pool.probe", lambda latent: rows(latent, width))
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


def _preprocess(stated: Stated, backbone: ViTConfig, findings: Findings) -> tuple[Preprocess, str]:
    looks = stated.preprocess
    if looks is None or "mean" not in looks:
        if backbone.pre_norm:
            normalisation, whose = CLIP, "CLIP towers"
        elif backbone.distillation_token:
            normalisation, whose = IMAGENET, "DeiT"
        else:
            normalisation, whose = HALF, "the ViTs that came from the official code"
        preprocess = assumed(backbone.image, normalisation, "bicubic", 1 / 0.9, backbone.channels)
        return preprocess, f"assumed: bare timm files state none, and this is timm's own for {whose}"
    try:
        size, share = _pair(looks["input_size"][1:]), float(looks.get("crop_pct") or 0.875)
        mean, deviation = (tuple(float(value) for value in looks[name]) for name in ("mean", "std"))
        interpolation = str(looks.get("interpolation") or "bicubic")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the config.json's preprocessing does not have timm's form ({error}): copy it again"
        ) from error
    if interpolation not in get_args(Interpolation):
        raise UserError(
            f"the config.json asks for {interpolation} interpolation, which is not known: set another there"
        )
    larger = (math.floor(size[0] / share), math.floor(size[1] / share))
    resize: int | Size | None = larger[0]
    mode = looks.get("crop_mode") or "center"
    if mode != "center" or size[0] != size[1]:
        resize = None if larger == size else larger
        if mode != "squash":
            findings.notes.append(f"timm's crop mode {mode!r} at {size} keeps the aspect, which is given up here")
    preprocess = Preprocess(size, resize, interpolation, mean, deviation)  # type: ignore[arg-type]
    return fitted(preprocess, backbone, findings.notes), f"stated in {stated.where}"


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json, or what Vitrail wrote in its place into a bare file's header."""
    if checkpoint.config is not None or HEADER not in checkpoint.metadata:
        return checkpoint.config or {}
    try:
        return dict(json.loads(checkpoint.metadata[HEADER]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path} has a damaged header ({error}): write it again") from error


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


def _pair(value: Any) -> Size:
    """(height, width) from one number or two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)
