"""What timm's config.json says, or the header that Vitrail writes in its place: of the model, and of its pictures.

Much is said by the architecture's name alone, as timm's own constructors know it.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any, get_args

from vitrail.core.errors import UserError
from vitrail.core.types import Gelu, Interpolation, Preprocess
from vitrail.models.vit import ViTConfig
from vitrail.weights.looks import CLIP, HALF, IMAGENET, assumed, fitted
from vitrail.weights.parts import Findings, Size, number_pair, whole_number
from vitrail.weights.source import Checkpoint
from vitrail.weights.timm_names import (
    ATTENTION_POOL,
    GELUS,
    HEADER,
    HEADS,
    NO_NORM,
    NO_QKV_BIAS,
    REFUSED,
    gelu_of,
    registers_of,
    width_of,
)

OURS = ("model_args", "pretrained_cfg", "default_cfg", "num_features")
"""What else stands in timm's config.json."""


@dataclass(frozen=True)
class Stated:
    """What config.json says; None and empty where it does not, or there is none.

    width: of the published architecture of that name. classes: of the head, 0 for none.
    parts: of the backbone, by the names of timm's arguments.
    """

    heads: int | None = None
    width: int | None = None
    image: Size | None = None
    gelu: Gelu | None = None
    epsilon: float | None = None
    positions: bool = True
    final_norm: bool = True
    pool: str = ""
    classes: int = 0
    parts: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Any] | None = None
    labels: tuple[str, ...] = ()
    where: str = "config.json"


def read_stated(checkpoint: Checkpoint) -> Stated:
    """Raises UserError where it does not have timm's form, or names what is not read."""
    config = read_config(checkpoint)
    if "architecture" not in config:
        if not config.keys().isdisjoint(OURS):
            raise UserError(f"{checkpoint.path}'s config.json is timm's but names no architecture: copy it again")
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
            heads=whole_number(arguments["num_heads"]) if "num_heads" in arguments else HEADS.get(architecture),
            width=width_of(architecture),
            image=None if size is None else number_pair(size),
            gelu=GELUS.get(activation) if activation else gelu_of(architecture),
            epsilon=float(config.get("norm_epsilon", 1e-5 if "_clip_" in architecture else 1e-6)),
            positions=arguments.get("pos_embed", "learn") not in ("", "none"),
            final_norm=bool(arguments.get("final_norm", not NO_NORM.search(architecture))),
            pool=str(arguments.get("global_pool", config.get("global_pool", _pool_of(architecture)))),
            classes=int(config.get("num_classes", arguments.get("num_classes", looks.get("num_classes"))) or 0),
            parts=_parts(architecture, arguments),
            preprocess=dict(looks),
            labels=tuple(str(words.get(name, name)) for name in names),
            where="its header" if checkpoint.config is None else "config.json",
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} does not have timm's form ({error}): copy it again, or take it away") from error


def _pool_of(architecture: str) -> str:
    return "map" if ATTENTION_POOL.search(architecture) else "avg" if "_gap_" in architecture else ""


def _parts(architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the arguments say of the backbone, and the name where they do not."""
    counts = {
        name: whole_number(arguments[name])
        for name in ("in_chans", "embed_dim", "depth", "reg_tokens")
        if name in arguments
    }
    kinds = ("class_token", "no_embed_class", "qkv_bias", "qk_norm", "pre_norm", "init_values")
    parts: dict[str, Any] = counts | {name: bool(arguments[name]) for name in kinds if name in arguments}
    if arguments.get("patch_size"):
        parts["patch_size"] = number_pair(arguments["patch_size"])
    by_name = {
        "qkv_bias": NO_QKV_BIAS.search(architecture) is None,
        "reg_tokens": registers_of(architecture),
    }
    return {name: value for name, value in by_name.items() if value is not None} | parts


def read_preprocess(stated: Stated, backbone: ViTConfig, findings: Findings) -> tuple[Preprocess, str]:
    """The preprocessing, and where it is from; findings.notes tell what of it cannot be kept."""
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
        size, share = number_pair(looks["input_size"][1:]), float(looks.get("crop_pct") or 0.875)
        mean, deviation = (tuple(float(value) for value in looks[name]) for name in ("mean", "std"))
        interpolation = str(looks.get("interpolation") or "bicubic")
        if not len(mean) == len(deviation) == backbone.channels:
            raise ValueError(f"{len(mean)} means and {len(deviation)} deviations for {backbone.channels} channels")
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


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json, or what Vitrail wrote in its place into a bare file's header."""
    if checkpoint.config is not None or HEADER not in checkpoint.metadata:
        return checkpoint.config or {}
    try:
        return dict(json.loads(checkpoint.metadata[HEADER]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path} has a damaged header ({error}): write it again") from error
