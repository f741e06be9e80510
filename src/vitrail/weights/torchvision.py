"""torchvision's `vit_*` state dicts: tensors alone, which say neither heads nor preprocessing.

Its module fixes the erf GELU and a class token with a position; it alone of PyTorch's libraries keeps a pre-logits layer,
and resizes positions with their corners aligned (interpolate_embeddings).
"""

import json
from pathlib import Path
from typing import Any

import torch

from vitrail.core.errors import UserError
from vitrail.core.runs import save_tensors, write_whole
from vitrail.core.types import Numerics, Preprocess
from vitrail.core.values import from_json, to_json
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights.conversion import Converted, Head, Keys
from vitrail.weights.looks import IMAGENET, assumed
from vitrail.weights.modules import head_state, take_module
from vitrail.weights.parts import Dialect, Findings, Size, converted, read_backbone
from vitrail.weights.parts_writing import state_of, write_backbone, written
from vitrail.weights.source import Checkpoint
from vitrail.weights.writing import make_folder, save_safetensors

NAME = "torchvision"

DIALECT = Dialect(
    block="encoder.layers.encoder_layer_{}.",
    blocks=r"encoder\.layers\.encoder_layer_(\d{1,4})\.",
    parts={
        "attention_norm": (("ln_1",),),
        "attention.qkv": (("self_attention.in_proj_",),),
        "attention.output": (("self_attention.out_proj",),),
        "mlp_norm": (("ln_2",),),
        # Files from before torchvision 0.14 number the layers by their own count.
        "mlp.hidden": (("mlp.0",), ("mlp.linear_1",)),
        "mlp.output": (("mlp.3",), ("mlp.linear_2",)),
    },
    patch=(("conv_proj",),),
    class_token=(("class_token",),),
    positions=(("encoder.pos_embedding",),),
    norm=(("encoder.ln",),),
)

HEADER = "torchvision"

SWAG = ((384, 384), (512, 512), (518, 518))
"""The sizes of the SWAG weights, which are shown the whole picture; all others were evaluated at 224 of 256 pixels."""

WRAPPERS = ("", "module.", "model.", "state_dict.", "model.module.", "state_dict.module.")


def recognises(checkpoint: Checkpoint) -> bool:
    return _wrapper(checkpoint) is not None


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: Size | None = None) -> Converted:
    """heads: 64 a head where not given, or those of ViT-H. grid: a position table that fills no square."""
    keys = Keys(checkpoint, _wrapper(checkpoint) or "")
    keys.skip_outside("beside the weights that are used: training state, or another copy of them")
    if any(name.startswith("conv_proj.conv_bn_relu_0.") for name in keys):
        raise UserError(
            f"{checkpoint.path} has a stem of convolutions in place of patches: convert a plain vit_* model"
        )
    said = _said(checkpoint)
    numerics = Numerics("erf", said.get("norm_epsilon", 1e-6), "bicubic-aligned")
    findings = Findings(heads or said.get("heads"), None, grid, numerics, placed=True, qkv_bias=True)
    backbone = read_backbone(keys, DIALECT, findings)
    if backbone.patch[0] != backbone.patch[1] or backbone.channels != 3:
        raise UserError(
            f"{checkpoint.path} has patches of {backbone.patch} pixels and {backbone.channels} channels, and torchvision's "
            "are square, of 3 channels: not read"
        )
    config: ClassifierConfig | ViTConfig = backbone
    hidden, has_head = None, "heads.head.weight" in keys
    if has_head:
        if "heads.pre_logits.weight" in keys:
            hidden = keys.shape("heads.pre_logits.weight", 2)[0]
            take_module(keys, "heads.pre_logits", "head.hidden")
        classes = keys.shape("heads.head.weight", 2)[0]
        take_module(keys, "heads.head", "head.output")
        config = ClassifierConfig(backbone, classes, hidden=hidden)
    head: Head = head_state(keys.tensors["head.output.weight"]) if has_head else "absent"
    looks = (said["preprocess"], "stated in its header") if said else _assumed(backbone)
    return converted(keys, findings, config, head, looks)


def write(model: Classifier | ViT, destination: Path) -> tuple[str, ...]:
    """A state dict: safetensors where `destination` ends so, else a torch file (.pth). Returns how to build its module.

    Raises UserError where torchvision's VisionTransformer has no such model.
    """
    vit = model.backbone if isinstance(model, Classifier) else model
    classifier = model.config if isinstance(model, Classifier) else None
    if not isinstance(vit, ViT):
        raise _unfit("no tokens, being a ResNet")
    config = vit.config
    _check(config, classifier)
    tensors = write_backbone(vit, DIALECT, prefix_rows=1)
    sizes: dict[str, Any] = {
        "image_size": config.image[0],
        "patch_size": config.patch[0],
        "num_layers": config.depth,
        "num_heads": config.heads,
        "hidden_dim": config.width,
        "mlp_dim": config.mlp,
    }
    notes = []
    if not config.patch_bias:
        tensors["conv_proj.bias"] = torch.zeros(config.width)
        notes.append("torchvision's patch embedding has a bias: it is zeros")
    if config.positions != "learned" or not config.prefix_positions:
        notes.append("positions are written as a table, in which what has none is zeros")
    if config.numerics.resample != "bicubic-aligned":
        notes.append(f"at other sizes torchvision resamples by bicubic-aligned, not by {config.numerics.resample}")
    if classifier is not None:
        state = state_of(model)
        tensors |= written(state, "head.output", "heads.head") | written(state, "head.hidden", "heads.pre_logits")
        sizes |= {"num_classes": classifier.classes, "representation_size": classifier.hidden}
    else:
        notes.append("it has no head: load it with strict=False")
    told = ", ".join(f"{name}={value}" for name, value in sizes.items() if value is not None)
    if config.numerics.norm_epsilon != 1e-6:
        told += f", norm_layer=partial(torch.nn.LayerNorm, eps={config.numerics.norm_epsilon:g})"
    notes.append(f"torchvision must be told what model it is: VisionTransformer({told})")
    make_folder(destination.parent)
    if destination.suffix == ".safetensors":
        # torchvision does not look at a header; Vitrail finds there what the tensors cannot say.
        said = {"heads": config.heads, "norm_epsilon": config.numerics.norm_epsilon}
        header = {"format": "pt", HEADER: json.dumps(said | {"preprocess": to_json(vit.preprocess)})}
        write_whole(destination, lambda path: save_safetensors(tensors, path, header))
        return tuple(notes)
    if config.numerics.norm_epsilon != 1e-6:
        raise UserError(
            f"a torchvision {destination.suffix} file cannot say a norm epsilon of {config.numerics.norm_epsilon:g}: write "
            "a .safetensors file, whose notes say how to build the module"
        )
    write_whole(destination, lambda path: save_tensors(tensors, path))
    return tuple(notes)


def _check(config: ViTConfig, classifier: ClassifierConfig | None) -> None:
    pool = "class" if classifier is None else classifier.pool
    lacking = {
        f"the {config.numerics.gelu} GELU": config.numerics.gelu != "erf",
        "SwiGLU": config.feed_forward != "mlp",
        f"{'no' if config.positions == 'none' else config.positions} positions": config.positions
        in ("relative", "rotary", "none"),
        "positions before each block": config.position_layers != "stem",
        "other prefix tokens than a class token": (config.class_token, config.prefixes) != (True, 1),
        f"{config.channels} channels": config.channels != 3,
        "pictures or patches that are not square": config.image[0] != config.image[1]
        or config.patch[0] != config.patch[1],
        "a norm before the blocks, or none after them": config.pre_norm or not config.final_norm,
        "LayerScale": config.layer_scale,
        "norms of queries and keys": config.qk_norm,
        "queries, keys and values without a bias": not config.qkv_bias,
        "a ResNet before its patches": config.trunk is not None,
        f"the pool {pool!r}": pool != "class" or (classifier is not None and classifier.pool_norm),
        "an output without classes": classifier is not None
        and (classifier.head == "none" or not classifier.head_has_bias),
    }
    for what, there in lacking.items():
        if there:
            raise _unfit(what)


def _unfit(what: str) -> UserError:
    return UserError(
        f"a model with {what} is no VisionTransformer of torchvision's: convert to timm, hf or vitrail instead"
    )


def _assumed(config: ViTConfig) -> tuple[Preprocess, str]:
    why = "assumed: torchvision's files state none, and this is what its"
    if config.image in SWAG:
        return assumed(config.image, IMAGENET, "bicubic", 1.0, config.channels), f"{why} SWAG weights take"
    return assumed(config.image, IMAGENET, "bilinear", channels=config.channels), f"{why} IMAGENET1K_V1 weights take"


def _said(checkpoint: Checkpoint) -> dict[str, Any]:
    """What Vitrail wrote into the header; nothing in a file of anyone else."""
    if HEADER not in checkpoint.metadata:
        return {}
    try:
        data = json.loads(checkpoint.metadata[HEADER])
        return {
            "heads": int(data["heads"]),
            "norm_epsilon": float(data["norm_epsilon"]),
            "preprocess": from_json(Preprocess, data["preprocess"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path} has a damaged header ({error}): write it again") from error


def _wrapper(checkpoint: Checkpoint) -> str | None:
    wanted = ("class_token", "encoder.pos_embedding", "encoder.layers.encoder_layer_0.ln_1.weight")
    return next((at for at in WRAPPERS if all(at + name in checkpoint for name in wanted)), None)
