"""A model as a folder that `from_pretrained` opens: as transformers' ViT where that fits, else as its Dinov2.

Dinov2 holds more than it seems: without LayerScale it is given scales of one, and a pool by class token or by mean alone
is its classifier on both with zeros for the other.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.runs import write_json, write_whole
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights.huggingface_json import FILE, write_labels, write_preprocess
from vitrail.weights.huggingface_names import ACTIVATIONS, DIALECT, DINOV2, DINOV2_SWIGLU, FAMILIES
from vitrail.weights.parts_writing import state_of, write_backbone
from vitrail.weights.writing import make_folder, save_safetensors


def write(model: Classifier | ViT, destination: Path) -> tuple[str, ...]:
    """destination: a folder, made if need be, for model.safetensors, config.json and preprocessor_config.json.

    Returns what had to be folded. Raises UserError where neither of the two classes can hold the model.
    """
    if destination.suffix in (".safetensors", ".bin", ".pth", ".pt", ".npz"):
        raise UserError(f"transformers reads folders, and {destination} is named as a file: give a folder")
    vit = model.backbone if isinstance(model, Classifier) else model
    classifier = model.config if isinstance(model, Classifier) else None
    if not isinstance(vit, ViT):
        raise UserError("a ResNet is neither a ViT nor a Dinov2 of transformers': save it with vitrail.save")
    config = vit.config
    _check(config, classifier)
    plain = not (config.registers or config.layer_scale or config.feed_forward == "swiglu")
    as_vit = plain and (classifier is None or classifier.pool == "class")
    notes: list[str] = []
    kind, tensors, data = _as_vit(vit, notes) if as_vit else _as_dinov2(vit, notes)
    under = f"{kind}." if classifier is not None else ""
    tensors = {under + name: tensor for name, tensor in tensors.items()}
    if isinstance(model, Classifier) and classifier is not None:
        tensors |= _head(model, classifier, as_vit, notes)
        data |= write_labels(model.labels, classifier.classes)
    if not config.patch_bias:
        tensors[f"{under}embeddings.patch_embeddings.projection.bias"] = torch.zeros(config.width)
        notes.append("transformers' patch embedding has a bias: it is zeros")
    if config.positions != "learned" or not config.prefix_positions:
        notes.append("positions are written as a table, in which what has none is zeros")
    if config.numerics.resample != (rule := FAMILIES[kind].resample):
        notes.append(f"at other sizes transformers resamples positions by {rule}, not by {config.numerics.resample}")
    ends = "ForImageClassification" if classifier is not None else "Model"
    begins = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind]
    data = {
        "architectures": [begins + ends],
        "model_type": kind,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": config.image[0] if config.image[0] == config.image[1] else list(config.image),
        "patch_size": config.patch[0] if config.patch[0] == config.patch[1] else list(config.patch),
        "num_channels": config.channels,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.numerics.norm_epsilon,
        "hidden_act": next(name for name, gelu in ACTIVATIONS.items() if gelu == config.numerics.gelu),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        **data,
    }
    make_folder(destination)
    write_whole(destination / "model.safetensors", lambda path: save_safetensors(tensors, path, {"format": "pt"}))
    write_json(destination / "config.json", data)
    write_json(destination / FILE, write_preprocess(vit.preprocess))
    return tuple(notes)


def _as_vit(vit: ViT, notes: list[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    return "vit", write_backbone(vit, DIALECT, prefix_rows=1), {"intermediate_size": vit.config.mlp}


def _as_dinov2(vit: ViT, notes: list[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    config = vit.config
    swiglu = config.feed_forward == "swiglu"
    dialect = DINOV2_SWIGLU if swiglu else DINOV2
    tensors = write_backbone(vit, dialect, prefix_rows=1)
    if not config.layer_scale:
        for block in range(config.depth):
            for scale in ("layer_scale1", "layer_scale2"):
                tensors[f"{dialect.block.format(block)}{scale}.lambda1"] = torch.ones(config.width)
        notes.append("Dinov2 has LayerScale: its scales are ones")
    ratio = mlp_ratio(config)
    assert ratio is not None
    data: dict[str, Any] = {"mlp_ratio": ratio, "use_swiglu_ffn": swiglu}
    if config.registers:
        tensors["embeddings.mask_token"] = torch.zeros(1, config.width)
        return "dinov2_with_registers", tensors, data | {"num_register_tokens": config.registers}
    return "dinov2", tensors, data | {"use_mask_token": False}


def mlp_ratio(config: ViTConfig) -> int | None:
    """The whole number from which Dinov2Config makes this MLP's width; None where there is none."""
    for ratio in range(1, 65):
        hidden = config.width * ratio
        if config.feed_forward == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == config.mlp:
            return ratio
    return None


def _head(model: Classifier, config: ClassifierConfig, as_vit: bool, notes: list[str]) -> dict[str, Tensor]:
    state = state_of(model)
    weight, bias = state["head.output.weight"], state.get("head.output.bias")
    if bias is None:
        bias = torch.zeros(len(weight), dtype=weight.dtype)
        notes.append("transformers' classifier has a bias: it is zeros")
    if not as_vit and config.pool != "class-mean":
        other = torch.zeros_like(weight)
        weight = torch.cat([weight, other] if config.pool == "class" else [other, weight], dim=1)
        notes.append(f"Dinov2 classifies by class token and mean: it has zeros for what is not the {config.pool}")
    return {"classifier.weight": weight.clone(), "classifier.bias": bias.clone()}


def _check(config: ViTConfig, classifier: ClassifierConfig | None) -> None:
    """Raises UserError for what neither class has, naming it."""
    pool = "class" if classifier is None else classifier.pool
    dinov2 = config.registers or config.layer_scale or config.feed_forward == "swiglu" or pool != "class"
    lacking = {
        "no class token": not config.class_token,
        "a distillation token": config.distillation_token,
        f"{'no' if config.positions == 'none' else config.positions} positions": config.positions
        in ("relative", "rotary", "none"),
        "positions before each block": config.position_layers != "stem",
        "a norm before the blocks, or none after them": config.pre_norm or not config.final_norm,
        "norms of queries and keys": config.qk_norm,
        "a ResNet before its patches": config.trunk is not None,
        f"the pool {pool!r}": pool in ("attention", "prefix") or (classifier is not None and classifier.pool_norm),
        "a hidden layer in the head": classifier is not None and classifier.hidden is not None,
        "an output without classes": classifier is not None and classifier.head == "none",
        f"an MLP of {config.mlp} on a width of {config.width}": bool(dinov2) and mlp_ratio(config) is None,
        "positions for pictures that are not square": bool(dinov2) and config.image[0] != config.image[1],
    }
    for what, there in lacking.items():
        if there:
            raise UserError(
                f"a model with {what} is neither a ViT nor a Dinov2 of transformers': convert to timm or vitrail instead"
            )
