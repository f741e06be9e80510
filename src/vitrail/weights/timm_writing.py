"""A model as timm's: a hub folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens, or a bare file.

The folder's config.json carries all that timm's constructor can be told in JSON: its GELU by name, but its norm epsilon
only by an architecture that has it. A bare file carries tensors alone; what to call timm with stands in the notes.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.runs import save_tensors, write_json, write_whole
from vitrail.core.types import Preprocess
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViT, ViTConfig, resize_preprocess
from vitrail.weights.parts_writing import state_of, write_backbone, written
from vitrail.weights.timm_names import (
    DIALECT,
    GELUS,
    HEADER,
    POOL,
    TRUNK_EPSILON,
    TRUNK_STANDARDIZATION,
    TRUNK_UNIT,
)
from vitrail.weights.writing import make_folder, save_safetensors

# The architectures that are asked for; each is then told its sizes, so only what no argument can say is their own.
PLAIN = "vit_base_patch16_224"
DISTILLED = "deit_base_distilled_patch16_224"
SWIGLU = "vit_giant_patch14_dinov2"
EPSILON_5 = "vit_base_patch32_clip_224"
HYBRIDS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


def write(model: Classifier | ViT, destination: Path) -> tuple[str, ...]:
    """destination: a folder, or a file that ends in .safetensors, .pth, .pt or .bin. Returns what had to be folded.

    Raises UserError where timm has no such model.
    """
    bare = destination.suffix in (".safetensors", ".pth", ".pt", ".bin")
    vit = model.backbone if isinstance(model, Classifier) else model
    classifier = model.config if isinstance(model, Classifier) else None
    if not isinstance(vit, ViT):
        raise _unfit("no tokens, being a ResNet")
    config, notes = vit.config, list[str]()
    _check(config, classifier)
    tensors = write_backbone(vit, DIALECT, config.prefixes if _placed(config) else 0)
    if config.trunk is not None:
        tensors |= _written_trunk(vit)
    if not config.patch_bias and not config.pre_norm:
        tensors["patch_embed.proj.bias"] = torch.zeros(config.width)
        notes.append("timm's patch embedding has a bias: it is zeros")
    if config.positions not in ("learned", "none"):
        notes.append(f"the {config.positions} positions are written as a table, for {config.image} pixels")
    if _placed(config) and config.registers:
        notes.append("timm's registers have positions where the class token has one: they are zeros")
    if isinstance(model, Classifier) and classifier is not None:
        tensors |= _written_head(model, classifier, notes)
    if config.numerics.resample != "bicubic-antialias":
        notes.append(f"at other sizes timm resamples positions by bicubic-antialias, not by {config.numerics.resample}")
    data = _data(vit, classifier, model.labels if isinstance(model, Classifier) else (), notes)
    architecture, arguments = data["architecture"], data["model_args"]
    epsilon = config.numerics.norm_epsilon
    make_folder(destination.parent)
    if not bare:
        if epsilon != _epsilon(architecture):
            raise UserError(
                f"a timm folder cannot say a norm epsilon of {epsilon:g}, and timm would compute something else: write a "
                "bare .safetensors file, whose notes say how to build the model"
            )
        make_folder(destination)
        write_whole(destination / "model.safetensors", lambda path: save_safetensors(tensors, path, {"format": "pt"}))
        write_json(destination / "config.json", data)
        return tuple(notes)
    told = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if epsilon != _epsilon(architecture):
        told += f", norm_layer=partial(torch.nn.LayerNorm, eps={epsilon:g})"
    notes.append(f"timm must be told what model it is: timm.create_model({architecture!r}, {told})")
    if destination.suffix == ".safetensors":
        # timm does not look at a header; Vitrail finds there what the folder's config.json would say.
        header = {"format": "pt", HEADER: json.dumps(data | {"norm_epsilon": epsilon})}
        write_whole(destination, lambda path: save_safetensors(tensors, path, header))
        return tuple(notes)
    if (config.numerics.gelu, epsilon) != ("erf", 1e-5 if config.pre_norm else 1e-6) and config.feed_forward == "mlp":
        raise UserError(
            f"a timm {destination.suffix} file cannot say a {config.numerics.gelu} GELU or a norm epsilon of {epsilon:g}: "
            "write a folder or a .safetensors file"
        )
    write_whole(destination, lambda path: save_tensors(tensors, path))
    return tuple(notes)


def _data(vit: ViT, classifier: ClassifierConfig | None, labels: tuple[str, ...], notes: list[str]) -> dict[str, Any]:
    """What the folder's config.json says."""
    config, preprocess = vit.config, vit.preprocess
    architecture, arguments = _architecture(config, classifier)
    if preprocess.size != config.image:
        preprocess = resize_preprocess(preprocess, config.image)
        notes.append(f"timm looks at pictures of its positions' own size, {config.image[0]} x {config.image[1]} pixels")
    return {
        "architecture": architecture,
        "num_classes": arguments["num_classes"],
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        **({"label_names": list(labels)} if labels else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.channels, *config.image],
            "fixed_input_size": True,
            "num_classes": arguments["num_classes"],
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distillation_token else "head",
            **_written_preprocess(preprocess, notes),
        },
    }


def _check(config: ViTConfig, classifier: ClassifierConfig | None) -> None:
    """Raises UserError for what timm's VisionTransformer has not, naming it."""
    pool = "class" if classifier is None else classifier.pool
    dist = config.distillation_token
    trunk = config.trunk
    lacking = {
        f"{config.positions} positions": config.positions in ("relative", "rotary"),
        "positions before each block": config.position_layers != "stem",
        f"the pool {pool!r}": pool == "class-mean" or (dist and pool not in ("class", "prefix")),
        "a hidden layer in the head": classifier is not None and classifier.hidden is not None,
        "a norm before and after pooling": config.final_norm and classifier is not None and classifier.pool_norm,
        "a patch bias together with a first norm": config.pre_norm and config.patch_bias,
        "a distillation token without a position": dist and not _placed(config),
        "a distillation token and registers": dist and config.registers > 0,
        "a distillation token and SwiGLU, a hybrid or another norm epsilon": dist
        and (config.feed_forward == "swiglu" or trunk is not None or config.numerics.norm_epsilon != 1e-6),
        "SwiGLU and an attention pool": config.feed_forward == "swiglu" and pool == "attention",
        "SwiGLU in a hybrid": config.feed_forward == "swiglu" and trunk is not None,
        "a trunk with the official code's epsilons": trunk is not None
        and (trunk.norm_epsilon, trunk.standardization) != (TRUNK_EPSILON, TRUNK_STANDARDIZATION),
        f"a trunk of {trunk and trunk.layers} units and width {trunk and trunk.width}": trunk is not None
        and (trunk.layers not in HYBRIDS or trunk.width != 64),
    }
    for what, there in lacking.items():
        if there:
            raise _unfit(what)


def _epsilon(architecture: str) -> float:
    """The norm epsilon of the architectures that are written."""
    return 1e-5 if architecture == EPSILON_5 else 1e-6


def _placed(config: ViTConfig) -> bool:
    """Whether the class token has a row in the position table."""
    return config.positions in ("learned", "learned2d") and config.placed_prefixes > 0


def _unfit(what: str) -> UserError:
    return UserError(f"a model with {what} is no VisionTransformer of timm's: save it with vitrail.save")


def _architecture(config: ViTConfig, classifier: ClassifierConfig | None) -> tuple[str, dict[str, Any]]:
    """The name and the arguments that timm.create_model makes this model from."""
    swiglu = config.feed_forward == "swiglu"
    hidden = 2 * config.mlp if swiglu else config.mlp
    pool = "class" if classifier is None else classifier.pool
    if config.trunk is not None:
        name = HYBRIDS[config.trunk.layers]
    elif config.distillation_token:
        name = DISTILLED
    elif swiglu:
        name = SWIGLU
    else:
        name = EPSILON_5 if config.numerics.norm_epsilon == 1e-5 else PLAIN
    if classifier is None and not config.class_token:
        pool = "mean"
    arguments = {
        "img_size": list(config.image),
        "patch_size": list(config.patch),
        "in_chans": config.channels,
        "num_classes": 0 if classifier is None or classifier.head == "none" else classifier.classes,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        # timm multiplies and cuts: the half keeps it from being cut to one less.
        "mlp_ratio": next(
            ratio
            for ratio in (hidden / config.width, (hidden + 0.5) / config.width)
            if int(config.width * ratio) == hidden
        ),
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        # What is loaded replaces it; for timm, zero means that there is no scale.
        "init_values": 1e-5 if config.layer_scale else 0.0,
        "class_token": config.class_token,
        "reg_tokens": config.registers,
        "no_embed_class": not _placed(config),
        "pos_embed": "none" if config.positions == "none" else "learn",
        "pre_norm": config.pre_norm,
        "final_norm": config.final_norm or (classifier is not None and classifier.pool_norm),
        "fc_norm": classifier is not None and classifier.pool_norm,
        "global_pool": {"class": "token", "prefix": "token", "mean": "avg", "attention": "map"}[pool],
    }
    if not swiglu:
        arguments["act_layer"] = next(name for name, kind in GELUS.items() if kind == config.numerics.gelu)
    return name, arguments


def _written_head(model: Classifier, config: ClassifierConfig, notes: list[str]) -> dict[str, Tensor]:
    state = state_of(model)
    tensors: dict[str, Tensor] = {}
    if config.pool == "attention":
        tensors["attn_pool.latent"] = state["pool.probe"][None].clone()
        for ours, theirs in POOL.items():
            tensors |= written(state, ours, theirs)
    if config.pool_norm:
        tensors |= written(state, "pool_norm", "fc_norm")
    if config.head == "none":
        return tensors
    weight = state["head.output.weight"]
    bias = state.get("head.output.bias")
    if bias is None:
        bias = torch.zeros(len(weight), dtype=weight.dtype)
        notes.append("timm's head has a bias: it is zeros")
    if not config.backbone.distillation_token:  # type: ignore[union-attr]
        return tensors | {"head.weight": weight.clone(), "head.bias": bias.clone()}
    width = config.backbone.width
    if config.pool == "prefix":
        notes.append("the head is two again, of twice its halves; both have its bias")
        second = weight[:, width:] * 2
    else:
        notes.append("timm averages a class and a distillation head: the first is twice ours, the second zeros")
        second = torch.zeros_like(weight)
    other = bias.clone() if config.pool == "prefix" else torch.zeros_like(bias)
    return tensors | {
        "head.weight": weight[:, :width] * 2,
        "head.bias": bias.clone() if config.pool == "prefix" else bias * 2,
        "head_dist.weight": second,
        "head_dist.bias": other,
    }


def _written_trunk(vit: ViT) -> dict[str, Tensor]:
    state = state_of(vit)
    layers = vit.config.trunk.layers if vit.config.trunk is not None else ()
    at = "patch_embed.backbone." + ("stem." if layers else "")
    tensors = written(state, "trunk.root", f"{at}conv") | written(state, "trunk.root_norm", f"{at}norm")
    for stage, count in enumerate(layers):
        for unit in range(count):
            for ours, theirs in TRUNK_UNIT.items():
                tensors |= written(
                    state,
                    f"trunk.stages.{stage}.{unit}.{ours}",
                    f"patch_embed.backbone.stages.{stage}.blocks.{unit}.{theirs}",
                )
    return tensors


def _written_preprocess(preprocess: Preprocess, notes: list[str]) -> dict[str, Any]:
    """timm says a share of the resized picture that is cropped, and rounds the resized picture down."""
    size, resize = preprocess.size, preprocess.resize
    mode = "center" if isinstance(resize, int) and size[0] == size[1] else "squash"
    side, larger = size[0], size[0] if resize is None else resize if isinstance(resize, int) else resize[0]
    share = side / larger
    if math.floor(side / share) != larger:
        share = side / (larger + 0.5)
    wanted = (larger, larger) if isinstance(resize, int) else resize or size
    if tuple(math.floor(length / share) for length in size) != wanted:
        notes.append(f"timm's preprocessing cannot say {resize} before a crop of {size}: its pictures differ a little")
    return {
        "mean": list(preprocess.mean),
        "std": list(preprocess.deviation),
        "interpolation": preprocess.interpolation,
        "crop_pct": share,
        "crop_mode": mode,
    }
