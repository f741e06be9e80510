"""Parameters and multiply-accumulates, against published numbers, the built modules and PyTorch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights import zoo

# From the official code's models_test.py (1000 classes) and the sizes of its released files (21,843, pre_logits).

PUBLISHED = [
    ("ViT-Ti/16", "class", 5_717_416),
    ("ViT-S/16", "class", 22_050_664),
    ("ViT-S/32", "class", 22_878_952),
    ("ViT-B/8", "class", 86_576_872),
    ("ViT-B/16", "class", 86_567_656),
    ("ViT-B/16", "mean", 86_566_120),
    ("ViT-B/32", "class", 88_224_232),
    ("ViT-L/16", "class", 304_326_632),
    ("ViT-L/32", "class", 306_535_400),
    ("ViT-H/14", "class", 632_045_800),
]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "pool", "expected"), PUBLISHED)
def test_published_parameter_counts_with_1000_classes(name: str, pool: str, expected: int) -> None:
    config = ClassifierConfig(zoo.config(name, class_token=pool == "class"), 1000, pool)  # type: ignore[arg-type]
    assert count(config.build(device="meta")) == config.parameters() == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("ViT-B/16", 85_798_656), ("ViT-L/16", 303_301_632), ("ViT-H/14", 630_764_800)]
)
def test_published_parameter_counts_without_a_head(name: str, expected: int) -> None:
    assert count(zoo.config(name).build(device="meta")) == zoo.config(name).parameters() == expected


@pytest.mark.parametrize(("name", "expected"), [("ViT-B/16", 103_186_515), ("ViT-H/14", 660_385_363)])
def test_published_parameter_counts_with_the_pre_training_head(name: str, expected: int) -> None:
    backbone = zoo.config(name)
    config = ClassifierConfig(backbone, 21_843, hidden=backbone.width, head_bias=-10.0)
    assert count(config.build(device="meta")) == config.parameters() == expected


@pytest.mark.parametrize("name", [*zoo.VITS, *(f"ViT-{variant}/16x8" for variant in zoo.VARIANTS)])
@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
def test_the_closed_formula_counts_every_size(name: str, pool: str) -> None:
    positions = {"class": "learned", "mean": "sincos2d", "attention": "none"}[pool]
    backbone = zoo.config(name, class_token=pool == "class", positions=positions, channels=4)
    config = ClassifierConfig(backbone, 10, pool)  # type: ignore[arg-type]
    assert count(config.build(device="meta")) == config.parameters()
    assert count(backbone.build(device="meta")) == backbone.parameters()


@pytest.mark.parametrize(
    ("name", "giga"),
    [("ViT-B/16", 17.56), ("ViT-B/32", 4.41), ("ViT-L/16", 61.6), ("ViT-L/32", 15.4), ("ViT-H/14", 167.3)],
)
def test_published_multiply_accumulates(name: str, giga: float) -> None:
    assert zoo.config(name).macs((224, 224)) / 1e9 == pytest.approx(giga, rel=2e-3)


SMALL = ViTConfig(width=24, depth=4, heads=3, mlp=40, patch=(4, 4), image=(16, 24))
ODD = {"class_token": False, "patch": (4, 2), "channels": 5}
VARIANTS = {
    "deit": {"distillation_token": True},
    "registers": {"distillation_token": True, "registers": 4, "prefix_positions": False, "layer_scale": True},
    "swiglu": {"feed_forward": "swiglu", "qk_norm": True},
    "no bias": {"qkv_bias": False, "patch_bias": False, **ODD},
    "clip": {"pre_norm": True, "final_norm": False, "registers": 2},
    "two tables": {"positions": "learned2d", "registers": 1},
    "two tables each": {"positions": "learned2d", "position_layers": "every", **ODD},
    "every": {"position_layers": "every", "distillation_token": True},
    "shared": {"position_layers": "shared", "prefix_positions": False},
    "relative": {"positions": "relative", "registers": 3},
    "rotary": {"positions": "rotary", "registers": 3},
    "sincos": {"positions": "sincos2d", "distillation_token": True, "registers": 3},
}
HEADS = [
    {"pool": "mean", "pool_norm": True},
    {"pool": "class-mean", "hidden": 9},
    {"pool": "prefix", "pool_norm": True},
    {"pool": "attention", "pool_norm": True, "head_has_bias": False},
    {"pool": "class", "head": "none", "classes": 24, "output": "embedding"},
    {"pool": "class-mean", "head": "none", "classes": 48},
]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_closed_formulas_count_every_variant(name: str) -> None:
    config = replace(SMALL, **VARIANTS[name])  # type: ignore[arg-type]
    model = config.build(seed=1).eval()
    assert count(model) == config.parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # The counter knows the products of attention, not PyTorch's fused kernel for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.features(torch.zeros(2, config.channels, 16, 24))
    assert counter.get_total_flops() == 2 * 2 * config.macs()


@pytest.mark.parametrize("head", HEADS)
def test_the_closed_formula_counts_every_pool_and_head(head: dict[str, object]) -> None:
    backbone = replace(SMALL, distillation_token=True, feed_forward="swiglu")
    config = ClassifierConfig(backbone, **{"classes": 5, **head})  # type: ignore[arg-type]
    model = config.build()
    assert count(model) == config.parameters()
    assert model(torch.zeros(2, 3, 16, 24)).shape == (2, config.classes)


def test_multiply_accumulates_are_what_the_operators_do() -> None:
    model = SMALL.build().eval()
    # The counter knows the products of attention, not PyTorch's fused kernel for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.features(torch.zeros(2, 3, 16, 24))
    assert counter.get_total_flops() == 2 * 2 * SMALL.macs()
