"""Hugging Face folders: config.json says what the tensors do not, preprocessor_config.json how pictures are looked at.

The norm epsilons differ by six orders between its ViT (1e-12) and others; CLIP norms its class token alone, after the
pool; CLIP's and SigLIP's towers end in an embedding, not in classes.
"""

from dataclasses import replace
from typing import Any

from vitrail.core.errors import UserError
from vitrail.core.types import Numerics
from vitrail.layers.heads import PoolKind
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.conversion import Converted, Head, Keys
from vitrail.weights.huggingface_json import read_labels, read_preprocess
from vitrail.weights.huggingface_names import ACTIVATIONS, DIALECT, DINOV3_GATED, FAMILIES, MAE_BLOCKS
from vitrail.weights.huggingface_writing import write
from vitrail.weights.mae import take_decoder
from vitrail.weights.modules import TWO_HEADS, chosen, head_state, take_module, take_rows, take_two_heads, whole
from vitrail.weights.parts import SCALES, Findings, Size, converted, number_pair, read_backbone, whole_number
from vitrail.weights.source import Checkpoint

__all__ = ["NAME", "convert", "recognises", "write"]

NAME = "huggingface"

HEADS = {
    "ForImageClassification": "classifier.weight",
    "ForImageClassificationWithTeacher": "cls_classifier.weight",
    "VisionModelWithProjection": "visual_projection.weight",
    "CLIPModel": "visual_projection.weight",
}
"""The head that a class, by the end of its name, must have."""

SKIPPED = {
    "text_model.*": "the text tower",
    "text_projection.*": "the text tower's projection",
    "logit_scale": "the temperature between pictures and texts",
    "logit_bias": "the bias between pictures and texts",
    "decoder.*": "the pixel decoder of masked pre-training",
}
"""Beside the backbone."""

SKIPPED_WITHIN = {
    "embeddings.position_ids": "numbers the positions",
    "rope_embeddings.*": "computed from the config",
    "pooler.*": "a tanh layer on the class token, with no classes on it",
}


def recognises(checkpoint: Checkpoint) -> bool:
    """By the config's model_type; and by names, so that a file without its config can be told what it lacks."""
    stated = (checkpoint.config or {}).get("model_type")
    return (
        stated in tuple(FAMILIES)
        if stated
        else _under(checkpoint, tuple(at for f in FAMILIES.values() for at in f.under)) is not None
    )


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: Size | None = None) -> Converted:
    """heads, grid: only to agree with config.json, which says both."""
    if checkpoint.config is None or checkpoint.config.get("model_type") not in tuple(FAMILIES):
        raise UserError(f"{checkpoint.path} holds a Hugging Face model without its config.json: put that beside it")
    kind: str = checkpoint.config["model_type"]
    family = FAMILIES[kind]
    # A whole CLIP or SigLIP keeps its vision tower's settings apart.
    tower = checkpoint.config.get("vision_config")
    config: dict[str, Any] = tower if isinstance(tower, dict) else checkpoint.config
    keys = Keys(checkpoint)
    at = _under(checkpoint, family.under)
    if at is None:
        begun = (at for at in family.under if any(name.startswith(f"{at}embeddings.") for name in keys))
        missed = f"{next(begun, family.under[0])}{family.dialect.patch[0][0]}.weight"
        raise UserError(
            f"{checkpoint.path} is a {kind} by its config.json, but lacks the tensor {missed}: use a whole one"
        )
    findings = _findings(checkpoint, kind, config, heads, grid)
    dialect = DINOV3_GATED if config.get("use_gated_mlp") else family.dialect
    if kind.startswith("clip"):
        # Its last norm is of the pooled class token alone.
        dialect = replace(dialect, norm=())
    if not kind.startswith("siglip"):
        keys.shape(at + chosen(keys, dialect.class_token, at)[0])
    if config.get("num_register_tokens"):
        keys.shape(f"{at}embeddings.register_tokens")
    backbone = read_backbone(keys, dialect, findings, at)
    _compare(checkpoint, config, backbone)
    extra = {}
    if kind == "vit_mae" and "decoder.decoder_embed.weight" in keys:
        extra = take_decoder(
            keys, MAE_BLOCKS, "decoder.", backbone, findings, int(config.get("decoder_num_attention_heads", 16))
        )
    keys.skip(f"{at}embeddings.mask_token", "takes the place of masked patches, for pre-training alone", backbone.width)
    for name, why in SKIPPED_WITHIN.items():
        keys.skip(at + name, why)
    for name, why in SKIPPED.items():
        keys.skip(name, why)
    model, head = _take_head(keys, at, kind, config, backbone, findings)
    preprocess, source = read_preprocess(checkpoint.preprocessor, kind, family, backbone, findings)
    classes = model.classes if isinstance(model, ClassifierConfig) and model.output == "logits" else 0
    labels = read_labels(checkpoint.config, classes) if classes else ()
    return converted(keys, findings, model, head, (preprocess, source), labels, extra)


def _findings(
    checkpoint: Checkpoint, kind: str, config: dict[str, Any], heads: int | None, grid: Size | None
) -> Findings:
    family = FAMILIES[kind]
    where = f"{checkpoint.path}'s config.json"
    try:
        image = number_pair(config.get("image_size", 224))
        stated = whole_number(config.get("num_attention_heads", family.heads))
        epsilon = float(config.get("layer_norm_eps", family.epsilon))
        base = float(config.get("rope_theta", 100.0))
        number_pair(config.get("patch_size", 16))
        whole_number(config.get("decoder_num_attention_heads", 16))
        if not 0 <= epsilon < 0.01:
            raise ValueError(f"a layer_norm_eps of {epsilon:g}")
        architectures = checkpoint.config.get("architectures") if checkpoint.config else None
        if architectures is not None and not (isinstance(architectures, list) and architectures):
            raise ValueError(f"architectures {architectures!r}")
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} does not have the form that transformers writes ({error}): copy it again") from error
    if heads is not None and heads != stated:
        raise UserError(f"{where} says {stated} attention heads, not the {heads} asked for: leave heads out")
    activation = str(config.get("hidden_act", family.activation))
    swiglu = bool(config.get("use_swiglu_ffn") or config.get("use_gated_mlp"))
    # Dinov2's SwiGLU is one whatever hidden_act says; DINOv3's gate obeys it.
    if config.get("use_gated_mlp") and activation != "silu":
        raise UserError(f"{where} asks for an MLP gated by {activation}: only silu is known")
    if activation not in ACTIVATIONS and not swiglu:
        raise UserError(f"{where} asks for the activation {activation}: {', '.join(ACTIVATIONS)} are known")
    numerics = Numerics(ACTIVATIONS.get(activation, "erf"), epsilon, family.resample)
    findings = Findings(stated, image, grid, numerics, placed=True, rotary_base=base)
    biases = [bool(config.get("qkv_bias", True))] * 3
    if kind.startswith("clip"):
        findings.patch_bias, findings.required = False, ("encoder.pre_norm",)
    elif kind.startswith("dino"):
        findings.required = ("encoder.norm", *SCALES)
    if kind == "dinov3_vit":
        findings.positions = "rotary"
        biases = [bool(config.get(f"{name}_bias", name != "key")) for name in ("query", "key", "value")]
        if any(biases) and not all(biases):
            findings.folded.append("of queries, keys and values, those that have no bias are given zeros")
    findings.qkv_bias = (biases[0], biases[1], biases[2])
    return findings


def _compare(checkpoint: Checkpoint, config: dict[str, Any], backbone: ViTConfig) -> None:
    """Raises UserError where the config states another architecture than the tensors have."""
    found = {
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth,
        "patch_size": backbone.patch,
        "num_channels": backbone.channels,
        "intermediate_size": backbone.mlp,
        "num_register_tokens": backbone.registers,
    }
    for name, value in found.items():
        stated = config.get(name, value)
        if stated != value and (name != "patch_size" or number_pair(stated) != value):
            raise UserError(
                f"{checkpoint.path}'s config.json says {name} {stated}, but its tensors have {value}: use files that belong "
                "together"
            )


def _take_head(
    keys: Keys, at: str, kind: str, tower: dict[str, Any], backbone: ViTConfig, findings: Findings
) -> tuple[ClassifierConfig | ViTConfig, Head]:
    """What stands on the backbone: classes, an embedding or nothing; and whether it can be used."""
    width, config = backbone.width, keys.checkpoint.config or {}
    stated = str((config.get("architectures") or [""])[0])
    for ending, name in HEADS.items():
        if stated.endswith(ending):
            keys.shape(name, 2)
    if "classifier.weight" in keys:
        count, columns = keys.shape("classifier.weight", 2)
        take_module(keys, "classifier", "head.output")
        pool: PoolKind = "class-mean" if columns == 2 * width else "mean" if kind in ("clip", "siglip") else "class"
        why = "belongs to the embedding; the classes are made from the mean of the patch tokens"
        keys.skip(f"{at}post_layernorm.*", why)
        keys.skip(f"{at}head.*", why)
        return ClassifierConfig(backbone, count, pool), head_state(keys.tensors["head.output.weight"])
    if "cls_classifier.weight" in keys:
        weight = take_two_heads(keys, ("cls_classifier", "distillation_classifier"))
        findings.folded.append(TWO_HEADS)
        return ClassifierConfig(backbone, len(weight), "prefix"), head_state(weight)
    if kind.startswith("clip"):
        take_module(keys, f"{at}post_layernorm", "pool_norm")
        if "visual_projection.weight" not in keys:
            findings.notes.append("it has no projection: what comes out is the pooled vector")
            return ClassifierConfig(backbone, width, pool_norm=True, head="none", output="embedding"), "usable"
        count = keys.shape("visual_projection.weight", 2)[0]
        if config.get("projection_dim", count) != count:
            raise UserError(
                f"{keys.checkpoint.path}'s config.json says projection_dim {config['projection_dim']}, but its tensors have "
                f"{count}: use files that belong together"
            )
        take_module(keys, "visual_projection", "head.output", bias=False)
        made = ClassifierConfig(backbone, count, pool_norm=True, head_has_bias=False, output="embedding")
        return made, head_state(keys.tensors["head.output.weight"])
    if kind.startswith("siglip") and tower.get("vision_use_head", True):
        _take_attention_pool(keys, f"{at}head.", width)
        return ClassifierConfig(backbone, width, "attention", head="none", output="embedding"), "usable"
    return backbone, "absent"


def _take_attention_pool(keys: Keys, at: str, width: int) -> None:
    """SigLIP's, whose attention is a torch.nn.MultiheadAttention: the query's rows come first."""
    take_rows(keys, f"{at}probe", width, "pool.probe")
    for part in ("weight", "bias"):
        name = f"{at}attention.in_proj_{part}"
        joint = keys.take(name, None, lambda table: table.unflatten(0, (3, width)).flatten(0, 1))
        keys.put(f"pool.query.{part}", joint[:width])
        keys.put(f"pool.key_value.{part}", joint[width:], name)
    for ours, theirs in {
        "output": "attention.out_proj",
        "norm": "layernorm",
        "mlp.hidden": "mlp.fc1",
        "mlp.output": "mlp.fc2",
    }.items():
        take_module(keys, at + theirs, f"pool.{ours}")


def _under(checkpoint: Checkpoint, beginnings: tuple[str, ...]) -> str | None:
    """What stands before the backbone's names; None where they are not there."""
    keys = Keys(checkpoint)
    return next((at for at in beginnings if at + whole(chosen(keys, DIALECT.patch, at)[0], "weight") in keys), None)
